//! Whether this is a Xen control domain, and what of it can be opened.

use std::fs::{self, File};
use std::path::Path;

use super::Capability;

/// The devices of a toolstack.
const DEVICES: [&str; 4] = ["privcmd", "evtchn", "gntdev", "xenbus"];

/// Looks for them.
pub(super) fn probe() -> Capability {
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
    if shut.is_empty() {
        this.yes(format!("control domain of Xen {version}; {} can be opened", DEVICES.join(", ")))
    } else {
        this.no(
            format!("control domain of Xen {version}, but {}", shut.join("; ")),
            "run as root; modprobe xen-gntdev",
        )
    }
}

fn version() -> Option<String> {
    let part = |name: &str| fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok();
    Some(format!("{}.{}{}", part("major")?.trim(), part("minor")?.trim(), part("extra")?.trim()))
}
