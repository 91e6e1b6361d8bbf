//! Probes of what keeps a migration safe: encryption and its speed, the system calls that can be given up, the record of
//! who has the guest, the clock.

use std::fs;
use std::path::{Path, PathBuf};

use mover::kernel::probe;
use mover::net::tls::Identity;
use mover::process::launch;
use rustix::fs::{Access, access};
use rustix::process::{Resource, getrlimit};

use super::Capability;
use crate::state;

/// Descriptors an end may need: lanes, disks, those who knock, and what it has open anyway.
const DESCRIPTORS_WANTED: u64 = 256;
/// Clocks that are read without asking the kernel.
const FAST_CLOCKS: [&str; 4] = ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"];

/// All of them.
pub(super) fn probes() -> Vec<Capability> {
    vec![tls(), ciphers(), seccomp(), directories(), rights(), descriptors(), clock()]
}

fn tls() -> Capability {
    let this = Capability::optional("TLS 1.3", "`send` and `receive` work with `--plaintext` only");
    match Identity::new() {
        Ok(_) => this.yes("a key pair was made"),
        Err(error) => this.no(error.to_string(), "a system that lets getrandom(2) through"),
    }
}

/// What AES-GCM is done with.
fn ciphers() -> Capability {
    let this = Capability::optional(
        "AES instructions",
        "encryption takes several times the CPU time, and may be slower than the link; `--plaintext` is for links nobody \
         else is on",
    );
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let (there, missing) = aes(&info);
    match (there.as_slice(), missing.as_slice()) {
        ([], _) => this.no(
            "this processor, or what of it this virtual machine sees, has none",
            "for a virtual machine: pass the host's processor through (-cpu host)",
        ),
        (there, []) => this.yes(there.join(", ")),
        (there, missing) => this.partly(
            format!("{}; not {}", there.join(", "), missing.join(", ")),
            "for a virtual machine: pass the host's processor through (-cpu host)",
        ),
    }
}

/// What `/proc/cpuinfo` has of the instructions that count, and what it lacks.
fn aes(info: &str) -> (Vec<&'static str>, Vec<&'static str>) {
    let line = info.lines().find_map(|line| {
        let (key, flags) = line.split_once(':')?;
        matches!(key.trim(), "flags" | "Features").then_some((key.trim() == "flags", flags))
    });
    let Some((x86, flags)) = line else { return (Vec::new(), vec!["aes"]) };
    let wanted: &[&str] = if x86 { &["aes", "pclmulqdq", "avx"] } else { &["aes", "pmull"] };
    let has = |name: &&&str| flags.split_whitespace().any(|flag| flag == **name);
    let (there, missing): (Vec<&&str>, Vec<&&str>) = wanted.iter().partition(has);
    if !there.iter().any(|name| **name == "aes") {
        return (Vec::new(), vec!["aes"]);
    }
    (there.into_iter().copied().collect(), missing.into_iter().copied().collect())
}

fn seccomp() -> Capability {
    let this = Capability::optional(
        "seccomp",
        "system calls that no engine has use for are not given up: whoever takes an end over can do more with it",
    );
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "errno") => {
            this.yes("filters can be set")
        }
        Ok(_) => this.no("this kernel's filters can't refuse a call", "Linux 4.14 or newer"),
        Err(_) => this.no("this kernel has none", "a kernel with CONFIG_SECCOMP_FILTER; /proc mounted"),
    }
}

fn places() -> [PathBuf; 3] {
    [state::records_dir(), state::index_dir(), launch::runtime_dir()]
}

/// Where records and control sockets go.
fn directories() -> Capability {
    let this = Capability::required("state directory", "no migration begins without its record");
    let places = places();
    let shut: Vec<_> = places.iter().filter_map(|path| shut(path)).collect();
    if shut.is_empty() {
        let shown: Vec<_> = places.iter().map(|path| path.display().to_string()).collect();
        return this.yes(format!("can be written to: {}", shown.join(", ")));
    }
    this.no(
        shut.join("; "),
        "run as root, or set XDG_STATE_HOME and XDG_RUNTIME_DIR to directories of this user's",
    )
}

/// Why nothing can be written there, if so: the directory itself, or the nearest one above that is there.
fn shut(path: &Path) -> Option<String> {
    let there: PathBuf = path.ancestors().find(|part| part.exists())?.to_owned();
    if !there.is_dir() {
        return Some(format!("{} is no directory", there.display()));
    }
    let error = access(there.as_path(), Access::WRITE_OK | Access::EXEC_OK).err()?;
    Some(format!("{}: {error}", there.display()))
}

/// What this user can't have that root could.
fn rights() -> Capability {
    let missing = [
        (probe::log_writes().is_err(), "userfaultfd: its guest could not be moved on while it runs"),
        (probe::hold_back().is_err(), "userfaultfd for pages that are missing: no mode `lazy`"),
        (probe::uring_operations().is_err(), "io_uring: disks are read by a pool of threads"),
        (memlock_is_short(), "locked memory: buffers are pinned for each read anew"),
        (places().iter().any(|path| shut(path).is_some()), "its directories: no migration begins"),
    ];
    let missing = missing.into_iter().filter_map(|(is, what)| is.then_some(what)).collect();
    judge_rights(rustix::process::geteuid().is_root(), missing)
}

fn judge_rights(root: bool, missing: Vec<&str>) -> Capability {
    let this = Capability::optional(
        "rights",
        "`send` and `receive` by this user do without what is named, and can't have ports below 1024 or disks that belong to \
         others",
    );
    match (root, missing.as_slice()) {
        (true, _) => this.yes("root's; `send` and `receive` give them up when everything is open"),
        (false, []) => this.yes(
            "those of a user, and `send` and `receive` miss none; disks have to be this user's, and ports 1024 or above",
        ),
        (false, missing) => this.partly(
            format!("those of a user; `receive` would lack {}", missing.join("; ")),
            "as the lines above say of each, or run as root: it gives its privileges up when everything is open",
        ),
    }
}

/// Less than an end locks, and no right to more.
fn memlock_is_short() -> bool {
    let limit = getrlimit(Resource::Memlock).current;
    limit.is_some_and(|limit| limit < super::machine::MEMLOCK_WANTED)
}

fn descriptors() -> Capability {
    let this = Capability::optional(
        "open files",
        "an end with many lanes or disks, or a target many strangers call at, runs out of descriptors",
    );
    match getrlimit(Resource::Nofile).current {
        None => this.yes("unlimited"),
        Some(limit) if limit >= DESCRIPTORS_WANTED => this.yes(format!("up to {limit}")),
        Some(limit) => this.partly(
            format!("up to {limit}; {DESCRIPTORS_WANTED} are enough for everything"),
            "raise the limit (`ulimit -n`, LimitNOFILE= in the service)",
        ),
    }
}

/// Only steps of the monotonic clock count; the time of day may jump.
fn clock() -> Capability {
    let this = Capability::optional(
        "clock",
        "each look at the time is a system call, or a slow read of a device: lanes take more CPU time",
    );
    let source = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    match source.as_deref().map(str::trim) {
        Ok(name) if FAST_CLOCKS.contains(&name) => this.yes(format!("{name}, read without a system call")),
        Ok(name) => this.partly(
            name.to_owned(),
            "the processor's own, where it is steady: clocksource=tsc on the kernel's command line",
        ),
        Err(_) => this.partly("unknown", "mount /sys"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_instructions_are_read_as_the_kernel_lists_them() {
        let x86 = "processor\t: 0\nflags\t\t: fpu aes pclmulqdq avx vaes\n";
        assert_eq!(aes(x86), (vec!["aes", "pclmulqdq", "avx"], vec![]));
        assert_eq!(aes("flags\t\t: fpu aes pclmulqdqx\n"), (vec!["aes"], vec!["pclmulqdq", "avx"]));
        assert_eq!(aes("flags\t\t: fpu pclmulqdq avx\n").0, Vec::<&str>::new());
        assert_eq!(aes("Features\t: fp aes pmull sha2\n"), (vec!["aes", "pmull"], vec![]));
        assert_eq!(aes("").0, Vec::<&str>::new());
    }

    #[test]
    fn a_user_is_told_what_is_missing_and_root_that_it_is_given_up() {
        assert!(judge_rights(true, vec!["x"]).found.contains("give them up"));
        assert_eq!(judge_rights(false, Vec::new()).state, crate::doctor::State::Yes);
        let lacking = judge_rights(false, vec!["io_uring: slow", "its directories: none"]);
        assert_eq!(lacking.state, crate::doctor::State::Partly);
        assert!(lacking.found.contains("`receive` would lack io_uring: slow; its directories: none"));
    }

    #[test]
    fn a_place_that_is_none_is_named() {
        let place = tempfile::tempdir().expect("a directory");
        assert_eq!(shut(&place.path().join("not/there/yet")), None);
        let file = place.path().join("file");
        std::fs::write(&file, "").expect("it is written");
        assert!(shut(&file.join("below")).expect("it is shut").contains("no directory"));
    }
}
