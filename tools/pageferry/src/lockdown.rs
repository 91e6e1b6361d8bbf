//! What this program gives up once it has what it needs: privileges, the way to new ones, and system calls that no
//! engine has use for. So whoever takes it over through what comes from the network has a process with some sockets,
//! one guest's memory and that guest's disks, and not the host.
//!
//! Capabilities belong to threads (capabilities(7)): a thread gives up its own, and those it starts afterwards have no
//! more than it. The signals' thread does so by itself; lanes, loader and receivers are started after
//! [`engine`]. `no_new_privs` and seccomp hold for every thread there is.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// What a thread keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Keep {
    /// No capability.
    Nothing,
    /// That of writing to files of others.
    OthersFiles,
}

/// System calls that are refused (`EPERM`): to run programs, to look into or steer other processes, to load code into the kernel,
/// to change mounts, namespaces, time, keys or identity, and to open files past their directories.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_setuid,
    libc::SYS_setreuid,
    libc::SYS_setresuid,
    libc::SYS_setgid,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_personality,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_quotactl,
];

/// No core dump of this process is made, and no other process of the same user may look into it: it has guests' memory
/// and keys in it.
pub(crate) fn no_core_dumps() {
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!("a crash of this process may leave its memory in a core dump: {error}");
    }
}

/// Gives up what the engine does not need, on the calling thread and those it will start. What could not be given up
/// is no reason not to migrate: a sentence each. `records` is where this process goes on keeping its record.
pub(crate) fn engine(records: &Path) -> Vec<String> {
    let mut kept = Vec::new();
    // io_uring's fixed buffers count against it where CAP_IPC_LOCK does not lift it; only root may raise it.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let ours = rustix::process::geteuid().as_raw();
    let keep = match std::fs::metadata(records).map(|found| found.uid()) {
        Ok(owner) if owner != ours => {
            kept.push(format!(
                "{} belongs to another user: this process keeps the right to write to others' files",
                records.display()
            ));
            Keep::OthersFiles
        }
        _ => Keep::Nothing,
    };
    if let Err(error) = drop_capabilities(keep) {
        kept.push(format!("privileges could not be given up: {error}"));
    }
    if let Err(error) = set_no_new_privs(true) {
        kept.push(format!("programs could gain new privileges: {error}"));
    }
    if let Err(why) = refuse_calls() {
        kept.push(format!("system calls are not limited, is seccomp there (CONFIG_SECCOMP_FILTER)? {why}"));
    }
    kept
}

/// Drops every capability of the calling thread but what it keeps.
pub(crate) fn drop_capabilities(keep: Keep) -> rustix::io::Result<()> {
    let before = rustix::thread::capabilities(None)?;
    let wanted = match keep {
        Keep::Nothing => CapabilitySet::empty(),
        Keep::OthersFiles => CapabilitySet::DAC_OVERRIDE,
    };
    let kept = before.permitted & wanted;
    // An old kernel has no ambient set to clear.
    let _ = clear_ambient_capability_set();
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

/// Refuses [`REFUSED`] on every thread of this process.
fn refuse_calls() -> Result<(), String> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(|_| "unknown processor".to_owned())?;
    let rules: BTreeMap<i64, _> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let refusal = u32::try_from(libc::EPERM).map_err(|error| error.to_string())?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(refusal), arch)
        .map_err(|error| error.to_string())?;
    let program: BpfProgram =
        filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// nextest runs each test in a process of its own, so this one may give up what it has.
    #[test]
    fn what_is_given_up_is_gone_and_the_rest_works() {
        no_core_dumps();
        let dumps = rustix::process::dumpable_behavior().expect("the kernel says");
        assert_eq!(dumps, DumpableBehavior::NotDumpable);
        let directory = tempfile::tempdir().expect("a directory");
        let kept = engine(directory.path());
        assert_eq!(kept, Vec::<String>::new());
        let now = rustix::thread::capabilities(None).expect("the kernel says");
        assert_eq!(now.permitted | now.effective | now.inheritable, CapabilitySet::empty());
        let inherited = std::thread::spawn(|| rustix::thread::capabilities(None).expect("the kernel says"));
        assert_eq!(inherited.join().expect("it ran").effective, CapabilitySet::empty());
        let refused = Command::new("/bin/true").status().expect_err("no program can be run any more");
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        std::fs::write(directory.path().join("record"), "written").expect("its own files it can write");
        std::net::TcpListener::bind("127.0.0.1:0").expect("and sockets it can open");
    }
}
