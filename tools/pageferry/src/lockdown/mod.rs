//! What this program gives up once it has what it needs: privileges, the way to new ones, and all system calls but those of
//! an engine at work. So whoever takes it over through what comes from the network has a process with some sockets,
//! one guest's memory and that guest's disks, and not the host.
//!
//! Capabilities belong to threads (capabilities(7)): a thread gives up its own, and those it starts afterwards have no
//! more than it. The signals' thread does so by itself; lanes, loader and receivers are started after
//! [`engine`]. `no_new_privs` and seccomp hold for every thread there is.
//!
//! No call ends the process, whatever it is: an error path that nobody has seen yet is not to lose a guest. What is refused by
//! name gets `EPERM`; what is on no list gets `ENOSYS`, upon which C libraries take the older way, which is on the list. The
//! kernel writes down both (`type=1326` in its log or the audit log).

#![forbid(unsafe_code)]

mod calls;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mover::confine::{self, Keep};
use mover::kernel::seccomp::{Instruction, filter_all_threads};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// No core dump of this process is made, and no other process of the same user may look into it.
pub(crate) fn no_core_dumps() {
    confine::no_core_dumps().iter().for_each(|what| tracing::warn!("{what}"));
}

/// Gives up what the engine does not need, on the calling thread and those it will start. What could not be given up
/// is no reason not to migrate: a sentence each. `records` is where this process goes on keeping its record.
pub(crate) fn engine(records: &Path) -> Vec<String> {
    let mut kept = Vec::new();
    let ours = rustix::process::geteuid().as_raw();
    let keep = match std::fs::metadata(records).map(|found| found.uid()) {
        Ok(owner) if owner != ours => {
            kept.push(format!(
                "{} belongs to another user: this process keeps the right to write to others' files",
                records.display()
            ));
            Keep::WriteOthersFiles
        }
        _ => Keep::Nothing,
    };
    kept.extend(confine::privileges(keep));
    if let Err(why) = limit_calls() {
        kept.push(format!("system calls are not limited, is seccomp there (CONFIG_SECCOMP_FILTER)? {why}"));
    }
    kept
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Limits every thread of this process to the calls an engine makes.
fn limit_calls() -> Result<(), String> {
    // A new thread asked for with a structure can't be told from a new process: glibc asks the older way then, call by call, so
    // that nothing is logged.
    let asked_anew: Rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let forbidden = forbidden().map_err(|error| error.to_string())?;
    let known = known().map_err(|error| error.to_string())?;
    install(asked_anew, libc::ENOSYS, false, false)?;
    install(forbidden, libc::EPERM, false, true)?;
    install(known, libc::ENOSYS, true, true)
}

/// Refuses what `rules` match, or what they don't where they are those `allowed`.
fn install(rules: Rules, errno: libc::c_int, allowed: bool, log: bool) -> Result<(), String> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(|_| "unknown processor".to_owned())?;
    let refusal = SeccompAction::Errno(u32::try_from(errno).map_err(|error| error.to_string())?);
    let (matched, others) = match allowed {
        true => (SeccompAction::Allow, refusal),
        false => (refusal, SeccompAction::Allow),
    };
    let filter = SeccompFilter::new(rules, others, matched, arch).map_err(|error| error.to_string())?;
    let program: BpfProgram =
        filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    let mut program: Vec<_> =
        program.iter().map(|i| Instruction { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    filter_all_threads(&mut program, log).map_err(|error| error.to_string())
}

fn is(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)
}

/// The calls an engine makes, and those that [`forbidden`] refuses: of two errors that of the latest filter counts.
fn known() -> Result<Rules, seccompiler::BackendError> {
    let all = calls::ALLOWED.iter().chain(calls::OLDER).chain(calls::REFUSED);
    let mut rules: Rules = all.map(|call| (*call, Vec::new())).collect();
    let whole = calls::REQUESTS.map(|request| is(1, SeccompCmpOp::Eq, request));
    let numbered = calls::NUMBERED.map(|number| is(1, SeccompCmpOp::MaskedEq(0xffff), number));
    let kinds = [is(1, SeccompCmpOp::MaskedEq(0xff00), calls::USERFAULT)];
    let requests = whole.into_iter().chain(numbered).chain(kinds).map(|one| SeccompRule::new(vec![one?]));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    Ok(rules)
}

/// The calls refused by name, and those of the others that ask for more than an engine has use for.
fn forbidden() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpOp::{MaskedEq, Ne};
    let wide = |number: libc::c_int| u64::try_from(number).unwrap_or(u64::MAX);
    let none_of = |argument, values: &[u64]| -> Result<Vec<_>, _> {
        values.iter().map(|value| is(argument, Ne, *value)).collect()
    };
    let mut rules: Rules = calls::REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let mut refuse = |call, conditions| -> Result<(), seccompiler::BackendError> {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    refuse(libc::SYS_socket, none_of(0, &calls::FAMILIES.map(wide))?)?;
    refuse(libc::SYS_prctl, none_of(0, &calls::PROCESS.map(wide))?)?;
    // Signals to this process, which is what abort(3) is made of.
    refuse(libc::SYS_tgkill, none_of(0, &[std::process::id().into()])?)?;
    // A new process, not a thread.
    let thread = wide(libc::CLONE_THREAD);
    refuse(libc::SYS_clone, vec![is(0, MaskedEq(thread), 0)?])?;
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::process::{PidfdFlags, Signal, getpid, kill_process, pidfd_open, set_ptracer};

    use super::*;

    /// nextest runs each test in a process of its own, so this one may give up what it has.
    #[test]
    fn what_is_given_up_is_gone_and_the_rest_works() {
        let directory = tempfile::tempdir().expect("a directory");
        let kept = engine(directory.path());
        assert_eq!(kept, Vec::<String>::new());
        let now = rustix::thread::capabilities(None).expect("the kernel says");
        assert!((now.permitted | now.effective | now.inheritable).is_empty());
        let number = |error: rustix::io::Errno| error.raw_os_error();
        // AF_ALG: the kernel's ciphers, which take no privilege.
        let cipher = AddressFamily::from_raw(38);
        // By name, or for what they ask for; most of these any user may do.
        let refused = [
            ("execve", Command::new("/bin/true").exec().raw_os_error()),
            ("a new process", Command::new("/bin/true").spawn().err().and_then(|error| error.raw_os_error())),
            ("pidfd_open", pidfd_open(getpid(), PidfdFlags::empty()).err().map(number)),
            ("kill", kill_process(getpid(), Signal::CONT).err().map(number)),
            ("prctl(PR_SET_PTRACER)", set_ptracer(rustix::process::PTracer::None).err().map(number)),
            ("socket(AF_PACKET)", socket(AddressFamily::PACKET, SocketType::RAW, None).err().map(number)),
            ("socket(AF_ALG)", socket(cipher, SocketType::SEQPACKET, None).err().map(number)),
        ];
        for (call, error) in refused {
            assert_eq!(error, Some(libc::EPERM), "{call}");
        }
        // On no list.
        let file = std::fs::File::create(directory.path().join("a")).expect("its own files it can make");
        let unlisted = [
            ("inotify_init1", rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::empty()).err()),
            ("ioctl(FICLONE)", rustix::fs::ioctl_ficlone(&file, &file).err()),
        ];
        for (call, error) in unlisted {
            assert_eq!(error, Some(rustix::io::Errno::NOSYS), "{call}");
        }
        std::fs::write(directory.path().join("record"), "written").expect("its own files it can write");
        std::net::TcpListener::bind("127.0.0.1:0").expect("and sockets it can open");
        std::net::ToSocketAddrs::to_socket_addrs("localhost:1").expect("and names it can look up");
        std::thread::spawn(|| ()).join().expect("and threads it can start");
    }

    #[test]
    fn no_call_is_on_two_lists() {
        let known: Vec<_> = calls::ALLOWED.iter().chain(calls::OLDER).collect();
        let mut all: Vec<_> = known.iter().copied().chain(calls::REFUSED).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
