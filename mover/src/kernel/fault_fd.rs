//! Opening a userfaultfd for the calling process (`userfaultfd(2)`; `linux/userfaultfd.h`).

use std::io;
use std::os::fd::OwnedFd;

use rustix::mm::UserfaultfdFlags;

/// `UFFD_USER_MODE_ONLY` of `linux/userfaultfd.h`: faults from inside system calls are not handled but fail.
const USER_MODE_ONLY: u32 = 1;

/// Opens a userfaultfd for this process's memory, non-blocking and closed on exec, its features not chosen yet
/// (`UFFDIO_API` is the next call on it). The flag says whether it handles faults from user mode only, which is what
/// an unprivileged process gets where `vm.unprivileged_userfaultfd` is 0.
///
/// # Errors
/// What `userfaultfd(2)` says to the user-mode-only attempt: the kernel has none, or a sandbox refuses it.
pub(crate) fn open() -> io::Result<(OwnedFd, bool)> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: opening one changes nothing; what is done through it later is its user's promise.
    // Worth it: the guest process itself must open it, so that the engine can track and fill its memory.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => Ok((fd, false)),
        Err(_) => {
            let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
            // SAFETY: as above.
            let fd = unsafe { rustix::mm::userfaultfd(flags)? };
            Ok((fd, true))
        }
    }
}
