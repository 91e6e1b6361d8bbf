//! What this kernel offers, found by asking or trying: for `pageferry doctor`, never on a migration's path.
//!
//! Owning thread: any; nothing outlives a call.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, Probe, opcode};
use rustix::fs::MemfdFlags;

use super::pagemap::Scanner;
use super::uffd::{self, Features, Reach, Span, Userfaultfd, Watch};
use crate::memory::Mapping;
use crate::units::{PAGE_BYTES_U64, Pfn, u64_of, usize_of};

/// An operation of io_uring (`enum io_uring_op` of linux/io_uring.h) the engine can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UringOperation {
    /// Its name without the prefix.
    pub name: &'static str,
    /// Whether this kernel has it.
    pub supported: bool,
}

/// Sets up a small ring and asks it for its operations.
///
/// # Errors
/// A sentence of why there is no ring: no io_uring in this kernel, forbidden, or no memory for it.
pub fn uring_operations() -> io::Result<Vec<UringOperation>> {
    let explain = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOSYS) => io::Error::new(io::ErrorKind::Unsupported, "this kernel has no io_uring"),
        Some(libc::EPERM | libc::EACCES) => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "io_uring is forbidden to this process (sysctl kernel.io_uring_disabled, or a seccomp filter)",
        ),
        _ => error,
    };
    let ring = IoUring::new(8).map_err(explain)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(explain)?;
    let wanted = [
        ("READ", opcode::Read::CODE),
        ("READV", opcode::Readv::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("SEND_ZC", opcode::SendZc::CODE),
        ("SENDMSG_ZC", opcode::SendMsgZc::CODE),
    ];
    Ok(wanted.map(|(name, code)| UringOperation { name, supported: probe.is_supported(code) }).to_vec())
}

/// Whether the kernel takes `SO_ZEROCOPY` on a TCP socket, without which `MSG_ZEROCOPY` sends are refused
/// (`Documentation/networking/msg_zerocopy.rst`). Whether a send is then really made without a copy depends on the
/// network card, and is only known afterwards.
///
/// # Errors
/// What the kernel answers.
pub fn zero_copy_send() -> io::Result<()> {
    let socket = TcpListener::bind(("127.0.0.1", 0))?;
    let on: libc::c_int = 1;
    let bytes = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the option's value is an int that lives through the call, and `bytes` is its size. Worth it: neither std
    // nor rustix has this option.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            std::ptr::from_ref(&on).cast(),
            bytes,
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A few pages of a memfd, as a guest process has its memory.
fn small_memory() -> io::Result<(Mapping, Span)> {
    let bytes = 8 * PAGE_BYTES_U64;
    let file = rustix::fs::memfd_create("pageferry probe", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    let memory = Mapping::shared(file.as_fd(), usize_of(bytes), false)?;
    let span = Span { start: u64_of(memory.address().as_ptr().addr()), bytes };
    Ok((memory, span))
}

/// Logs writes to a few pages of this process with userfaultfd's `WP_ASYNC`, as the source of a migration does.
/// What comes back can then be asked with [`scan_written`].
///
/// # Errors
/// What stands in the way, as the kernel says it.
pub fn log_writes() -> io::Result<Logged> {
    let uffd = Userfaultfd::new(uffd::open()?.0, Features::LOG_WRITES)?;
    let (memory, span) = small_memory()?;
    uffd.register(span, Watch::WRITES)?;
    uffd.protect(span)?;
    Ok(Logged { memory, span, _uffd: uffd })
}

/// Pages whose writes are logged.
pub struct Logged {
    memory: Mapping,
    span: Span,
    /// The log ends when it is closed.
    _uffd: Userfaultfd,
}

/// Writes to one of the logged pages and looks for just that one with PAGEMAP_SCAN.
///
/// # Errors
/// What the kernel answers, or that it named other pages.
pub fn scan_written(logged: &Logged) -> io::Result<()> {
    let mut scanner = Scanner::new(Scanner::open_own()?);
    let mut found = Vec::new();
    logged.memory.page(Pfn(3)).mark_written();
    scanner.written(logged.span, |from, to| found.push((from - logged.span.start, to - from)))?;
    if found == [(3 * PAGE_BYTES_U64, PAGE_BYTES_U64)] {
        return Ok(());
    }
    Err(io::Error::other(format!("a scan after a write to one page named {} ranges: {found:?}", found.len())))
}

/// Watches a few pages for accesses while they are missing, as the target of a lazy migration does, and how much such
/// a userfaultfd sees.
///
/// # Errors
/// What stands in the way, as the kernel says it.
pub fn hold_back() -> io::Result<Reach> {
    let (fd, reach) = uffd::open()?;
    let uffd = Userfaultfd::new(fd, Features::HOLD_BACK)?;
    let (_memory, span) = small_memory()?;
    uffd.register(span, Watch::MISSING)?;
    Ok(reach)
}
