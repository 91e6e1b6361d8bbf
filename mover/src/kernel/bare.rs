//! One plain `send(2)` or `recv(2)` on a mapping: what a program that only copies a buffer through a socket does. The
//! benches hold the engine against it; nothing else uses it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::Mapping;

/// Sends what it can of the bytes `range` of `mapping`; returns how many the kernel took.
///
/// # Errors
/// What `send(2)` says.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn send_range(socket: BorrowedFd<'_>, mapping: &Mapping, range: Range<usize>) -> io::Result<usize> {
    assert!(range.start <= range.end && range.end <= mapping.bytes(), "a range inside the mapping");
    let from = mapping.address().as_ptr().wrapping_add(range.start);
    // SAFETY: the range lies in the mapping, which is borrowed for the call; the kernel only reads it.
    // Worth it: the mapping may change under the call, so it can't be a slice that a safe call would take.
    let sent = unsafe { libc::send(socket.as_raw_fd(), from.cast(), range.len(), libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what there is into the bytes `range` of `mapping`, all of it where `wait_all`; returns how many bytes
/// came, 0 at the end of the stream.
///
/// # Errors
/// What `recv(2)` says.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn receive_range(
    socket: BorrowedFd<'_>,
    mapping: &Mapping,
    range: Range<usize>,
    wait_all: bool,
) -> io::Result<usize> {
    assert!(range.start <= range.end && range.end <= mapping.bytes(), "a range inside the mapping");
    let into = mapping.address().as_ptr().wrapping_add(range.start);
    let flags = if wait_all { libc::MSG_WAITALL } else { 0 };
    // SAFETY: the range lies in the mapping, which is borrowed for the call and reached through raw copies and atomics
    // only, so the kernel may write it. Worth it: as above.
    let came = unsafe { libc::recv(socket.as_raw_fd(), into.cast(), range.len(), flags) };
    usize::try_from(came).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageBuf;
    use crate::units::{PAGE_BYTES, Pfn};
    use std::os::fd::AsFd;

    #[test]
    fn ranges_go_through_a_socket_unchanged() {
        let map = |name: &str| {
            let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&file, 8192).unwrap();
            Mapping::shared(file.as_fd(), 2 * PAGE_BYTES, false).unwrap()
        };
        let (from, into) = (map("from"), map("into"));
        from.page(Pfn(1)).copy_from(&PageBuf([9; PAGE_BYTES]));
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(send_range(near.as_fd(), &from, 4096..8192).unwrap(), 4096);
        assert_eq!(receive_range(far.as_fd(), &into, 100..4196, true).unwrap(), 4096);
        let mut page = PageBuf::zeroed();
        into.page(Pfn(0)).copy_to(&mut page);
        assert_eq!((page.0[99], page.0[100], page.0[4095]), (0, 9, 9));
    }
}
