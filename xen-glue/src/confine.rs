//! What the save helper's worker gives up before it reads a byte of a stream: all capabilities but two, the way to new ones,
//! core dumps.
//!
//! What it needs as root it needs as the *owner* of files: `/dev/xen/*`, xenstore's socket, the settings, indexes, notes and the
//! log are root's own, and Linux asks for no capability behind the open (`drivers/xen/privcmd.c`, `evtchn.c`: none
//! of their calls does). Memory locked for hypercalls is paid for by lifting the limit first. What is kept is the right to
//! *read* files of others, for a guest's disk may be another user's image, and which it is the target learns from the handshake; and
//! to listen on the port that `lanes_address` names. The threads that face the network have neither: those that wait for the
//! target or dial the source give up both when they start, and the engine's when it has the disks, before it starts lanes,
//! loader and receivers.
//!
//! What stays is much: `/dev/xen/privcmd` of dom0 is the whole host to who has it open. Linux can restrict it to one domain
//! (`IOCTL_PRIVCMD_RESTRICT`), but then it takes no hypercalls, and a save is made of them.
//!
//! The front is left as libxl has started it, and so is a program that has the engine in it as a library.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use mover::confine::{self, Keep};

/// This process is a worker.
static WORKER: AtomicBool = AtomicBool::new(false);

/// Confines this process, a worker; to be called before it starts threads. A sentence for each thing that could not be given
/// up, for libxl's log.
pub(crate) fn worker() -> Vec<String> {
    WORKER.store(true, Ordering::SeqCst);
    let mut kept = confine::no_core_dumps();
    kept.extend(confine::privileges(Keep::ReadAndListen));
    kept
}

/// Whether this process is one.
pub(crate) fn is_worker() -> bool {
    WORKER.load(Ordering::SeqCst)
}

/// The calling thread, of a worker, faces the network from here on and needs no capability; a sentence where it keeps them all the
/// same.
pub(crate) fn faces_the_network() -> Option<String> {
    if !WORKER.load(Ordering::SeqCst) {
        return None;
    }
    let dropped = confine::drop_capabilities(Keep::Nothing);
    dropped
        .err()
        .map(|error| format!("a thread for the lanes keeps the right to read others' files: {error}"))
}
