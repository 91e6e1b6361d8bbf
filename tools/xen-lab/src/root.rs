//! A host's root: Debian with Xen's toolstack, as a file system image, and what boots it.
//!
//! The object holds `dom0.img`, `xen` (the stock hypervisor), `vmlinuz`, `boot.cpio` and `guest.cpio` (modules and a
//! busybox for dom0's and a guest's initial RAM disk; the lab's own scripts are added when a lab starts, so changing
//! one rebuilds nothing here).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::cpio::Archive;
use crate::modules::Modules;
use crate::spec::Suite;
use crate::{image, machine, run};

/// Raised when this file builds something else from the same inputs.
const RECIPE: &str = "1";
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(20 * 60);
/// Size of the image; sparse, a bit over half of it is used.
const IMAGE_MIB: u64 = 1400;

/// Packages beyond the essential ones; `@` is Xen's version.
const PACKAGES: [&str; 18] = [
    "xen-utils-@",
    "xen-hypervisor-@-amd64",
    "xenstore-utils",
    "qemu-system-xen",
    "seabios",
    "linux-image-amd64",
    "busybox-static",
    "iproute2",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon-driver-xen",
    "mount",
    "procps",
    "python3-minimal",
    "socat",
    "strace",
    "util-linux",
    "xz-utils",
];

/// Left out of the packages: nobody reads it there, no such device is emulated. The hook would build an initial RAM
/// disk that nothing boots, for half a minute.
const EXCLUDED: [&str; 9] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/etc/kernel/postinst.d/initramfs-tools",
    "/lib/modules/*/kernel/sound/*",
    "/lib/modules/*/kernel/drivers/gpu/*",
    "/lib/modules/*/kernel/drivers/media/*",
    "/lib/modules/*/kernel/drivers/net/wireless/*",
    "/lib/modules/*/kernel/drivers/infiniband/*",
];

/// Modules that reach dom0's root.
const BOOT_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"];
/// Modules a guest needs.
const GUEST_MODULES: [&str; 3] = ["xen_blkfront", "ext4", "crc32c_generic"];

/// The root of `suite`, built if need be.
pub(crate) fn object(cache: &Cache, suite: Suite) -> Result<PathBuf> {
    let packages = PACKAGES.map(|package| package.replace('@', suite.xen())).join(",");
    let inputs = [
        RECIPE,
        suite.name(),
        &packages,
        &EXCLUDED.join(" "),
        &BOOT_MODULES.join(" "),
        &GUEST_MODULES.join(" "),
    ];
    cache.object(&format!("root-{suite}"), &inputs, |into, log| build(suite, &packages, into, log))
}

fn build(suite: Suite, packages: &str, into: &Path, log: &Path) -> Result<()> {
    machine::require_root()?;
    machine::ensure(&machine::TO_BUILD_ROOTS, log)?;
    let root = into.join("root");
    let sources = into.join("sources.list");
    fs::write(&sources, machine::sources(suite, "deb")?)?;

    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=essential", "--format=directory"]);
    command.args(EXCLUDED.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--include={packages}")).arg(suite.name()).arg(&root).arg(&sources);
    run::logged(&mut command, log, BOOTSTRAP_LIMIT)?;

    let modules = Modules::of(&root)?;
    fs::copy(root.join("boot").join(format!("vmlinuz-{}", modules.version()?)), into.join("vmlinuz"))?;
    hypervisor(&root, suite, &into.join("xen"), log)?;
    let busybox = fs::read(root.join("bin/busybox")).context("the root has no busybox")?;
    fs::write(into.join("boot.cpio"), ram_disk(&busybox, &modules, &BOOT_MODULES)?)?;
    fs::write(into.join("guest.cpio"), ram_disk(&busybox, &modules, &GUEST_MODULES)?)?;
    image::ext4(&into.join("dom0.img"), &root, IMAGE_MIB, log)?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// QEMU's multiboot loader wants the bare ELF file, Debian packs it.
fn hypervisor(root: &Path, suite: Suite, to: &Path, log: &Path) -> Result<()> {
    let packed = root.join(format!("boot/xen-{}-amd64.gz", suite.xen()));
    let mut command = Command::new("sh");
    command.args(["-c", "gzip -dc < \"$1\" > \"$2\"", "sh"]).arg(packed).arg(to);
    run::logged(&mut command, log, Duration::from_secs(60))
}

fn ram_disk(busybox: &[u8], modules: &Modules, names: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "root", "mnt", "lab"] {
        archive.directory(directory)?;
    }
    archive.file("bin/busybox", busybox)?;
    modules.pack(names, &mut archive)?;
    archive.finish()
}
