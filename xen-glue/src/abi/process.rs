//! What a process is started with, and signals, as far as the standard library has no way to them.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over the descriptors this process was started with under these numbers, and closes every other one above 2.
/// To be called once, before the process opens anything; asserts the former.
///
/// # Errors
/// A number is not above 2, stands twice, or names no open descriptor.
pub fn take_over<const N: usize>(numbers: [RawFd; N]) -> io::Result<[OwnedFd; N]> {
    assert!(!TAKEN.swap(true, Ordering::SeqCst), "a process takes over its descriptors once");
    let mut sorted = numbers;
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) || sorted.first().is_some_and(|&first| first <= 2) {
        let what = format!("{numbers:?} are not different descriptors above 2");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    for &number in &sorted {
        // SAFETY: F_GETFD only looks at the table of descriptors. Worth it: a wrong number becomes an error here.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut from = 3;
    for &number in &sorted {
        close_range(from, number - 1);
        from = number + 1;
    }
    close_range(from, RawFd::MAX);
    // SAFETY: they are open, distinct, and nobody's: whoever started this process has handed them over by number, and
    // this is called once, first of all. Worth it: there is no other way to be handed a descriptor across exec.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }))
}

/// Closes descriptors `first` to `last`, as far as they are open.
fn close_range(first: RawFd, last: RawFd) {
    let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else { return };
    if first <= last {
        // SAFETY: only called while nothing of this process's own is open above 2. Worth it: whatever the toolstack
        // forgot to mark close-on-exec would be held for as long as the worker lives. Linux before 5.9 lacks the call
        // and keeps them.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Has `signal` interrupt system calls that wait (`EINTR`) and do nothing else.
///
/// # Errors
/// No such signal.
pub fn interrupt_by(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a zeroed sigaction is one without flags, SA_RESTART among them, and with an empty mask; the handler
    // touches nothing. Worth it: every safe wrapper sets SA_RESTART, and then a write that waits is never left.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int) = nothing;
        #[expect(clippy::as_conversions, reason = "sigaction keeps a function's address as a number")]
        {
            action.sa_sigaction = handler as libc::sighandler_t;
        }
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets `signals` through to this thread; whoever started the process may have left them blocked.
///
/// # Errors
/// No such signal.
pub fn unblock(signals: &[libc::c_int]) -> io::Result<()> {
    // SAFETY: the set lives on this stack and is initialised by sigemptyset. Worth it: a blocked SIGTERM would leave
    // the toolstack no way to end a save.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            if libc::sigaddset(&raw mut set, signal) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// While this lives, a broken pipe is an error (`EPIPE`) of the calls of the thread that made it, whatever the process
/// does about the signal; then it is as it was. Not to be sent to another thread.
pub struct BrokenPipes {
    before: libc::sigset_t,
    /// One was waiting already, and is not ours to take.
    waiting: bool,
    thread: std::marker::PhantomData<*const ()>,
}

/// The set of one signal, `SIGPIPE`.
fn broken_pipe() -> libc::sigset_t {
    // SAFETY: the set lives on this stack and is initialised by sigemptyset. Worth it: as `unblock`.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGPIPE);
        set
    }
}

impl BrokenPipes {
    /// Holds the signal back.
    #[must_use]
    pub fn as_errors() -> Self {
        let pipe = broken_pipe();
        // SAFETY: the sets live on this stack and are filled by the calls before they are read; only this thread's mask
        // changes. Worth it: a signal that ends the process in the middle of a save leaves the guest's log of written
        // pages on.
        unsafe {
            let (mut before, mut pending): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigpending(&raw mut pending);
            let waiting = libc::sigismember(&raw const pending, libc::SIGPIPE) == 1;
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const pipe, &raw mut before);
            Self { before, waiting, thread: std::marker::PhantomData }
        }
    }
}

impl Drop for BrokenPipes {
    fn drop(&mut self) {
        let (pipe, now) = (broken_pipe(), libc::timespec { tv_sec: 0, tv_nsec: 0 });
        // SAFETY: as in `as_errors`, on the same thread: this is not Send. Ours, if there is one, is taken away before
        // it can be delivered. Worth it: as there.
        unsafe {
            if !self.waiting {
                libc::sigtimedwait(&raw const pipe, std::ptr::null_mut(), &raw const now);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}
