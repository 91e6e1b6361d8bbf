//! Probes of kernel features.

use std::fs;

use mover::kernel::probe::{self, UringOperation};
use mover::kernel::uffd::Reach;

use super::Capability;

/// Which kernel this is. Features are tried one by one; the number only helps a report.
pub(super) fn release() -> Capability {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| "unknown".to_owned());
    Capability::optional("kernel", "").yes(format!("Linux {}", release.trim()))
}

/// All others.
pub(super) fn probes() -> Vec<Capability> {
    let mut all = write_log();
    all.push(hold_back());
    all.push(io_uring());
    all
}

/// How to be allowed a userfaultfd.
const ALLOW: &str = "Linux 6.7 or newer with CONFIG_USERFAULTFD; run as root, or as root: sysctl \
                     vm.unprivileged_userfaultfd=1, or give this user /dev/userfaultfd; in a container, a seccomp \
                     profile that allows it";

/// The two halves of a process guest's dirty log.
fn write_log() -> Vec<Capability> {
    let protect = Capability::required("userfaultfd WP_ASYNC", "no process guest can be moved while it runs");
    let scan = Capability::required("PAGEMAP_SCAN", "no process guest can be moved while it runs");
    match probe::log_writes() {
        Err(error) => vec![
            protect.no(error.to_string(), ALLOW),
            scan.no("can't be tried without WP_ASYNC", "as for WP_ASYNC"),
        ],
        Ok(logged) => vec![
            protect.yes("writes to a memfd are logged by the kernel itself"),
            match probe::scan_written(&logged) {
                Ok(()) => scan.yes("finds the page written, and only that"),
                Err(error) => scan.no(error.to_string(), "Linux 6.7 or newer, /proc mounted"),
            },
        ],
    }
}

fn hold_back() -> Capability {
    let this = Capability::optional(
        "userfaultfd MISSING",
        "no mode `lazy` for process guests: they restart when all pages are there, as in `refer`",
    );
    match probe::hold_back() {
        Ok(Reach::Everything) => this.yes("faults on missing pages of a memfd, those of system calls too"),
        Ok(Reach::UserOnly) => {
            this.yes("faults of user code only (UFFD_USER_MODE_ONLY), which is enough for process guests")
        }
        Err(error) => this.no(error.to_string(), ALLOW),
    }
}

fn io_uring() -> Capability {
    let this =
        Capability::optional("io_uring", "disks are read by a pool of threads: more CPU time, less depth");
    match probe::uring_operations() {
        Err(error) => this.no(
            error.to_string(),
            "Linux 5.11 or newer; sysctl kernel.io_uring_disabled=0; in a container, a seccomp profile that allows it",
        ),
        Ok(operations) => {
            let names = |there: bool| {
                operations
                    .iter()
                    .filter(|operation| operation.supported == there)
                    .map(|operation: &UringOperation| operation.name)
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let absent = names(false);
            if absent.is_empty() {
                this.yes(names(true))
            } else {
                this.partly(format!("{}; not {absent}", names(true)), "a newer kernel (SEND_ZC: Linux 6.0)")
            }
        }
    }
}
