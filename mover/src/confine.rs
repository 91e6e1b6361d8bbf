//! What a process gives up once it has what it needs, so that whoever takes it over through what comes from the network
//! has as little as possible of the host: capabilities, the way to new ones, and core dumps with guests' memory in them.
//!
//! Capabilities and `no_new_privs` belong to threads (capabilities(7), prctl(2)): a thread gives up its own, and those it
//! starts afterwards have no more than it. Core dumps are the process's. What can't be given up is no reason to leave a guest where it
//! is: each function says what failed in a sentence, and goes on.
#![forbid(unsafe_code)]

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};

/// What a thread keeps of its capabilities, as far as it has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// The rights to read files of others and to listen on ports below 1024: `CAP_DAC_READ_SEARCH`, `CAP_NET_BIND_SERVICE`.
    ReadAndListen,
    /// The right to write files of others: `CAP_DAC_OVERRIDE`.
    WriteOthersFiles,
}

/// No core dump of this process is made, by the kernel or a program it would pipe one to, and no other process of the same
/// user may look into this one: it has guests' memory and keys in it. An exec takes back the second half.
#[must_use = "a sentence for each that failed"]
pub fn no_core_dumps() -> Vec<String> {
    let limit = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    [limit, set_dumpable_behavior(DumpableBehavior::NotDumpable)]
        .into_iter()
        .filter_map(Result::err)
        .map(|error| format!("a crash of this process may leave its memory in a core dump: {error}"))
        .collect()
}

/// Gives up the calling thread's capabilities but for `keep`, and its way to new ones. What memory the process may lock is
/// no longer limited, for only root may say so: io_uring's buffers and hypercalls' count.
#[must_use = "a sentence for each that failed"]
pub fn privileges(keep: Keep) -> Vec<String> {
    // Not root: then it is as before.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let dropped =
        drop_capabilities(keep).map_err(|error| format!("privileges could not be given up: {error}"));
    let closed = set_no_new_privs(true)
        .map_err(|error| format!("programs started from here could gain new privileges: {error}"));
    [dropped, closed].into_iter().filter_map(Result::err).collect()
}

/// Drops every capability of the calling thread but what it keeps.
///
/// # Errors
/// What `capset(2)` says.
pub fn drop_capabilities(keep: Keep) -> rustix::io::Result<()> {
    let before = rustix::thread::capabilities(None)?;
    let wanted = match keep {
        Keep::Nothing => CapabilitySet::empty(),
        Keep::ReadAndListen => CapabilitySet::DAC_READ_SEARCH | CapabilitySet::NET_BIND_SERVICE,
        Keep::WriteOthersFiles => CapabilitySet::DAC_OVERRIDE,
    };
    let kept = before.permitted & wanted;
    // An old kernel has no ambient set to clear.
    let _ = clear_ambient_capability_set();
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{dumpable_behavior, getrlimit};
    use rustix::thread::{capabilities, no_new_privs};

    /// nextest runs each test in a process of its own, so this one may give up what it has.
    #[test]
    fn what_is_given_up_is_gone() {
        assert_eq!(no_core_dumps(), [""; 0]);
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Core), Rlimit { current: Some(0), maximum: Some(0) });
        let had = capabilities(None).unwrap().permitted;
        assert_eq!(privileges(Keep::ReadAndListen), [""; 0]);
        assert!(no_new_privs().unwrap());
        let now = capabilities(None).unwrap();
        assert_eq!(now.permitted, had & (CapabilitySet::DAC_READ_SEARCH | CapabilitySet::NET_BIND_SERVICE));
        assert_eq!((now.effective, now.inheritable), (now.permitted, CapabilitySet::empty()));
        drop_capabilities(Keep::Nothing).unwrap();
        let inherited = std::thread::spawn(|| capabilities(None).unwrap()).join().unwrap();
        assert_eq!(inherited.permitted | inherited.effective, CapabilitySet::empty());
        // What is gone does not come back.
        drop_capabilities(Keep::WriteOthersFiles).unwrap();
        assert_eq!(capabilities(None).unwrap().permitted, CapabilitySet::empty());
    }
}
