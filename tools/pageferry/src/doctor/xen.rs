//! Whether this is a Xen control domain, and what of it can be opened.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Capability, State};

/// The devices of a toolstack.
const DEVICES: [&str; 4] = ["privcmd", "evtchn", "gntdev", "xenbus"];

/// Minor versions of Xen 4 this was made for.
const MINORS: std::ops::RangeInclusive<u32> = 17..=20;

/// The control domain, and where this is one, what its hypervisor was built with.
pub(super) fn probes() -> Vec<Capability> {
    let domain = probe();
    let there = domain.state == State::Yes;
    let mut all = vec![domain];
    if there {
        all.extend(built_with());
    }
    all
}

/// What the hypervisor's own configuration says of memory paging and shadow paging.
fn built_with() -> [Capability; 2] {
    let paging = Capability::optional(
        "Xen memory paging",
        "no restart before the last page (`lazy`) for Xen guests: all is loaded first, as in `refer`",
    );
    let shadow =
        Capability::optional("Xen shadow paging", "PV guests can be saved, and not be migrated live");
    let asked = Command::new("xenhypfs").args(["cat", "/buildinfo/config"]).stdin(Stdio::null()).output();
    let config = asked.ok().filter(|output| output.status.success());
    let config = config.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let judge = |this: Capability, option: &str, remedy: &str| match &config {
        None => this.partly(
            "not known: `xenhypfs cat /buildinfo/config` does not tell",
            "a Xen with CONFIG_HYPFS_CONFIG, and its tools (xen-utils)",
        ),
        Some(text) if has(text, option) => this.yes(format!("built in ({option})")),
        Some(_) => this.no(format!("left out of this hypervisor ({option})"), remedy),
    };
    [
        judge(
            paging,
            "CONFIG_MEM_PAGING",
            "a hypervisor built with CONFIG_UNSUPPORTED and CONFIG_MEM_PAGING; no distribution ships one",
        ),
        judge(shadow, "CONFIG_SHADOW_PAGING", "a hypervisor built with CONFIG_SHADOW_PAGING"),
    ]
}

fn has(config: &str, option: &str) -> bool {
    config.lines().any(|line| line.trim().strip_prefix(option) == Some("=y"))
}

/// Looks for them.
fn probe() -> Capability {
    let this = Capability::optional("Xen", "no Xen domains here; process guests need none of it");
    let hypervisor = fs::read_to_string("/sys/hypervisor/type").unwrap_or_default();
    if hypervisor.trim() != "xen" && !Path::new("/proc/xen").exists() {
        return this.no(
            "this system does not run on Xen",
            "boot it as a control domain (dom0) of Xen 4.17 or newer",
        );
    }
    let control = fs::read_to_string("/proc/xen/capabilities").unwrap_or_default();
    if !control.contains("control_d") {
        return this.no(
            "this is a guest of Xen, not its control domain (or /proc/xen is not mounted)",
            "run in dom0; mount -t xenfs xenfs /proc/xen",
        );
    }
    let shut: Vec<_> = DEVICES
        .into_iter()
        .filter_map(|name| {
            let path = format!("/dev/xen/{name}");
            File::options().read(true).write(true).open(&path).err().map(|error| format!("{path}: {error}"))
        })
        .collect();
    let version = version().unwrap_or_else(|| "unknown version".to_owned());
    if shut.is_empty() && !tried(&version) {
        let found = format!("control domain of Xen {version}, which pageferry was not made for");
        return this.partly(found, format!("Xen 4.{} to 4.{}", MINORS.start(), MINORS.end()));
    }
    if shut.is_empty() {
        this.yes(format!("control domain of Xen {version}; {} can be opened", DEVICES.join(", ")))
    } else {
        this.no(
            format!("control domain of Xen {version}, but {}", shut.join("; ")),
            "run as root; modprobe xen-gntdev",
        )
    }
}

/// Whether that version is one of those.
fn tried(version: &str) -> bool {
    let minor = version.strip_prefix("4.").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    minor.and_then(|minor| minor.parse().ok()).is_some_and(|minor: u32| MINORS.contains(&minor))
}

fn version() -> Option<String> {
    let part = |name: &str| fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok();
    Some(format!("{}.{}{}", part("major")?.trim(), part("minor")?.trim(), part("extra")?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_options_are_read_as_xen_writes_them() {
        assert!(tried("4.17.5") && tried("4.20.0") && tried("4.18-rc"));
        assert!(!tried("4.16.2") && !tried("4.21.0") && !tried("5.17") && !tried("unknown version"));
        let config = "CONFIG_X86=y\n# CONFIG_MEM_PAGING is not set\nCONFIG_SHADOW_PAGING=y\n";
        assert!(has(config, "CONFIG_SHADOW_PAGING"));
        assert!(!has(config, "CONFIG_MEM_PAGING") && !has(config, "CONFIG_SHADOW"));
    }
}
