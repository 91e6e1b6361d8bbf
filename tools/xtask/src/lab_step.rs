//! The Xen lab's short tier: two real Xen hosts under emulation, guests saved, restored and migrated between them. Where
//! a lab can't be had the step says so and is shown again behind the tests: nothing is passed over in silence.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::ci::skipped;
use crate::{run, setup};

/// What is left out where it can't be had.
const WHAT: &str = "the Xen lab";
/// Memory two hosts and their surroundings take, in MiB.
const MEMORY_MIB: u64 = 6500;

/// Builds what the hosts boot and our helper, and runs the tier.
pub(crate) fn run() -> Result<String> {
    if let Some(obstacle) = obstacle()? {
        return Ok(skipped(WHAT, &obstacle));
    }
    // No mirror, no room, no right to mount: no fault of the tree. That the lab's program builds has been seen by now.
    if let Err(error) = lab(&["build", "--hypervisor", "full"]) {
        return Ok(skipped(WHAT, &format!("its hosts could not be built, for the reason above ({error:#})")));
    }
    // Our helper alone: nothing else of ours runs in there.
    let helper = ["build", "--quiet", "--locked", "--release", "--package", "pageferry-save-helper"];
    run::succeed(&mut run::cargo(helper)?)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let binaries = run::root()?.join(target).join("release");
    let binaries = binaries.to_str().context("the tree's path is not text")?;
    // A name of its own: what is up on this machine is somebody else's.
    let name = format!("ci-{}", std::process::id());
    lab(&["test", "--tier", "ci", "--name", &name, "--binaries", binaries])?;
    Ok("the short tier passed".into())
}

/// Instead, where nothing may be installed.
pub(crate) fn leave_out() -> Result<String> {
    Ok(skipped(WHAT, "it would install QEMU and what its hosts are built with"))
}

/// Runs the lab's program.
fn lab(arguments: &[&str]) -> Result<()> {
    let mut command = run::cargo(["run", "--quiet", "--locked", "--package", "xen-lab", "--"])?;
    run::succeed(command.args(arguments))
}

/// Why no lab can be had here; nothing if it can be tried.
fn obstacle() -> Result<Option<String>> {
    if !setup::is_root() {
        return Ok(Some("building its hosts needs root (mmdebstrap)".into()));
    }
    if !Path::new("/etc/debian_version").exists() || !run::in_path("apt-get") {
        return Ok(Some("it is made of Debian's packages, and this is no Debian".into()));
    }
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot tell how much memory there is")?;
    Ok(match available_mib(&meminfo) {
        Some(mib) if mib < MEMORY_MIB => {
            Some(format!("its two hosts need {MEMORY_MIB} MiB of memory, {mib} are free"))
        }
        _ => None,
    })
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

#[cfg(test)]
mod tests {
    use super::available_mib;

    #[test]
    fn free_memory_is_read_where_the_kernel_tells_it() {
        assert_eq!(available_mib("MemTotal: 9 kB\nMemAvailable:   20480 kB\n"), Some(20));
        assert_eq!(available_mib("MemTotal: 9 kB\n"), None);
    }
}
