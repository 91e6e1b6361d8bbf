//! Whether this is a Xen control domain, and what of it can be had: each thing a save or restore opens, tried one by one, and what
//! the hypervisor was built with.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xen_glue::xenstore::Xenstore;

use super::{Capability, State};

/// Minor versions of Xen 4 this was made for.
const MINORS: std::ops::RangeInclusive<u32> = 17..=20;

/// The devices of a toolstack: name, what is lost without it, how to get it.
const DEVICES: [(&str, &str, &str, &str); 4] = [
    (
        "Xen privcmd",
        "dev/xen/privcmd",
        "no guest of Xen can be saved, restored or migrated: hypercalls and the mapping of guests' memory go by it",
        "run as root; a dom0 kernel with CONFIG_XEN_PRIVCMD",
    ),
    (
        "Xen hypercall buffers",
        "dev/xen/hypercall",
        "memory for hypercalls is locked instead, and a call that fails because the kernel moves it is made again",
        "Linux 4.18 or newer; run as root",
    ),
    (
        "Xen event channels",
        "dev/xen/evtchn",
        "no restart before the last page (`lazy`): accesses to pages that are out are told by an event channel",
        "run as root; modprobe xen-evtchn",
    ),
    (
        "Xen grants",
        "dev/xen/gntdev",
        "no disk or console of a guest that QEMU serves, so that an HVM guest with them can't be restored; pageferry itself \
         opens none",
        "run as root; modprobe xen-gntdev",
    ),
];

/// The control domain, and where this is one, what can be had of it.
pub(super) fn probes() -> Vec<Capability> {
    let mut all = below(Path::new("/"));
    if all.first().is_some_and(|domain| domain.state != State::No) {
        all.push(xenstore(Xenstore::open().and_then(|mut store| store.list("/"))));
        all.extend(built_with(configuration().as_deref()));
    }
    all
}

/// What the files of a system at `root` say.
fn below(root: &Path) -> Vec<Capability> {
    let domain = domain(root);
    let there = domain.state != State::No;
    let mut all = vec![domain];
    if there {
        all.extend(DEVICES.map(|(name, path, lost, remedy)| device(root, name, path, lost, remedy)));
        all.push(kinds(root));
    }
    all
}

fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}

/// Whether there is one, and of which Xen.
fn domain(root: &Path) -> Capability {
    let this = Capability::optional("Xen", "no Xen domains here; process guests need none of it");
    if read(root, "sys/hypervisor/type").trim() != "xen" && !root.join("proc/xen").exists() {
        return this.no(
            "this system does not run on Xen",
            "boot it as a control domain (dom0) of Xen 4.17 or newer",
        );
    }
    if !read(root, "proc/xen/capabilities").contains("control_d") {
        return this.no(
            "this is a guest of Xen, not its control domain (or /proc/xen is not mounted)",
            "run in dom0; mount -t xenfs xenfs /proc/xen",
        );
    }
    let part = |name: &str| read(root, &format!("sys/hypervisor/version/{name}")).trim().to_owned();
    let version = match (part("major"), part("minor")) {
        (major, minor) if major.is_empty() || minor.is_empty() => "unknown version".to_owned(),
        (major, minor) => format!("{major}.{minor}{}", part("extra")),
    };
    if tried(&version) {
        return this.yes(format!("control domain of Xen {version}"));
    }
    let found = format!("control domain of Xen {version}, which pageferry was not made for");
    this.partly(found, format!("Xen 4.{} to 4.{}", MINORS.start(), MINORS.end()))
}

/// Whether that version is one of those.
fn tried(version: &str) -> bool {
    let minor = version.strip_prefix("4.").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    minor.and_then(|minor| minor.parse().ok()).is_some_and(|minor: u32| MINORS.contains(&minor))
}

fn device(root: &Path, name: &'static str, path: &str, lost: &'static str, remedy: &str) -> Capability {
    let this = Capability::optional(name, lost);
    let path: PathBuf = root.join(path);
    match File::options().read(true).write(true).open(&path) {
        Ok(_) => this.yes(format!("{} can be opened", path.display())),
        Err(error) => this.no(format!("{}: {error}", path.display()), remedy),
    }
}

fn xenstore(asked: io::Result<Vec<String>>) -> Capability {
    let this = Capability::optional(
        "xenstore",
        "a guest's name and disks are not known: nothing is referenced, all pages are sent",
    );
    match asked {
        Ok(_) => this.yes("it answers"),
        Err(error) => this.no(
            format!("it does not answer: {error}"),
            "run as root; start xenstored (systemctl start xenstored, or oxenstored)",
        ),
    }
}

/// Which kinds of guests the hypervisor runs, as it says itself.
fn kinds(root: &Path) -> Capability {
    let this = Capability::optional(
        "Xen guests' kinds",
        "no HVM and no PVH guests: they take a processor with virtualisation that the firmware has switched on",
    );
    let said = read(root, "sys/hypervisor/properties/capabilities");
    let has = |kind: &str| said.split_whitespace().any(|word| word.starts_with(kind));
    match (has("hvm-"), has("xen-")) {
        (true, true) => this.yes("HVM, PVH, PV"),
        (true, false) => this.yes("HVM, PVH"),
        (false, true) => this.partly("PV alone", "switch on VT-x or AMD-V in the firmware"),
        (false, false) => this.partly("not known: /sys/hypervisor does not tell", "mount /sys; run as root"),
    }
}

/// The hypervisor's own configuration, where it tells.
fn configuration() -> Option<String> {
    let asked = Command::new("xenhypfs").args(["cat", "/buildinfo/config"]).stdin(Stdio::null()).output();
    let said = asked.ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&said.stdout).into_owned())
}

/// What it says of memory paging and shadow paging.
fn built_with(config: Option<&str>) -> [Capability; 2] {
    let paging = Capability::optional(
        "Xen memory paging",
        "no restart before the last page (`lazy`) for Xen guests: all is loaded first, as in `refer`",
    );
    let shadow =
        Capability::optional("Xen shadow paging", "PV guests can be saved, and not be migrated live");
    let judge = |this: Capability, option: &str, remedy: &str| match config {
        None => this.partly(
            "not known: `xenhypfs cat /buildinfo/config` does not tell",
            "a Xen with CONFIG_HYPFS_CONFIG, and its tools (xen-utils); run as root",
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
        let states = |config| built_with(config).map(|one| one.state);
        assert_eq!(states(Some(config)), [State::No, State::Yes]);
        assert_eq!(states(None), [State::Partly, State::Partly]);
    }

    /// A system in a directory, file by file.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("it is below the root")).expect("it is made");
            fs::write(path, text).expect("it is written");
        }
        root
    }

    #[test]
    fn each_thing_of_a_control_domain_is_judged_by_itself() {
        let dom0 = system(&[
            ("sys/hypervisor/type", "xen\n"),
            ("proc/xen/capabilities", "control_d\n"),
            ("sys/hypervisor/version/major", "4\n"),
            ("sys/hypervisor/version/minor", "17\n"),
            ("sys/hypervisor/version/extra", ".5\n"),
            ("sys/hypervisor/properties/capabilities", "xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_64 \n"),
            ("dev/xen/privcmd", ""),
            ("dev/xen/evtchn", ""),
        ]);
        let all = below(dom0.path());
        let states: Vec<_> = all.iter().map(|one| (one.name, one.state)).collect();
        assert_eq!(
            states,
            [
                ("Xen", State::Yes),
                ("Xen privcmd", State::Yes),
                ("Xen hypercall buffers", State::No),
                ("Xen event channels", State::Yes),
                ("Xen grants", State::No),
                ("Xen guests' kinds", State::Yes),
            ]
        );
        assert!(all[0].found.contains("4.17.5"), "{}", all[0].found);
        assert!(all[4].found.contains("gntdev") && !all[4].remedy.is_empty() && !all[4].lost.is_empty());

        let guest = system(&[("sys/hypervisor/type", "xen\n"), ("proc/xen/capabilities", "\n")]);
        assert_eq!(below(guest.path()).len(), 1);
        let elsewhere = system(&[]);
        let none = below(elsewhere.path());
        assert!(none.len() == 1 && none[0].found.contains("does not run on Xen"));
        let silent = xenstore(Err(io::Error::from(io::ErrorKind::NotFound)));
        assert!(silent.state == State::No && silent.lost.contains("all pages are sent"));
    }
}
