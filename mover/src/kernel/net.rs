//! Sending from, and receiving into, guest pages without a copy of our own (`sendmsg(2)`, `recvmsg(2)`), and the few
//! questions to a TCP socket that need raw structures (`tcp(7)`, `MSG_ZEROCOPY` in the kernel's
//! `Documentation/networking/msg_zerocopy.rst`).
//!
//! A message here is a head of our own bytes and then pages. Every call says how much of the message is done, and
//! does the next part of it; so no address outlives the call it was borrowed for.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::GuestPage;
use crate::units::PAGE_BYTES;

/// Pieces one call may take (`IOV_MAX`, `UIO_MAXIOV` in `linux/uio.h`).
const PIECES_MAX: usize = 1024;

/// `SO_EE_ORIGIN_ZEROCOPY` of `linux/errqueue.h`: this entry of the error queue is about a zero-copy send.
const ORIGIN_ZERO_COPY: u8 = 5;
/// `SO_EE_CODE_ZEROCOPY_COPIED` of `linux/errqueue.h`: the kernel copied after all.
const CODE_COPIED: u8 = 1;

/// Room for the list of pieces a call hands to the kernel; empty between calls.
pub(crate) struct Pieces(Vec<libc::iovec>);

// SAFETY: the addresses in the list are written and used within one call and cleared after it.
// Worth it: a lane's sender is made on one thread and used on another, and must not allocate per message.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(crate) fn new() -> Self {
        Self(Vec::with_capacity(PIECES_MAX))
    }

    /// Lists the message from byte `done` on, at most `limit` bytes of it, neighbours in memory merged.
    fn list(&mut self, head: &[u8], pages: &[GuestPage<'_>], done: usize, limit: usize) {
        self.0.clear();
        let mut left = limit;
        if done < head.len() {
            let rest = &head[done..];
            let length = rest.len().min(left);
            self.0.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: length });
            left -= length;
        }
        let into_pages = done.saturating_sub(head.len());
        let mut offset = into_pages % PAGE_BYTES;
        for page in pages.iter().skip(into_pages / PAGE_BYTES) {
            let length = (PAGE_BYTES - offset).min(left);
            if length == 0 {
                break;
            }
            let base = page.address().as_ptr().wrapping_add(offset);
            let full = self.0.len() == PIECES_MAX;
            match self.0.last_mut() {
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                    last.iov_len += length;
                }
                _ if full => break,
                _ => self.0.push(libc::iovec { iov_base: base.cast(), iov_len: length }),
            }
            left -= length;
            offset = 0;
        }
    }

    /// A message header over the list, for one system call.
    fn header(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is a plain C structure for which all zero is valid ("no name, no control data").
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = self.0.as_mut_ptr();
        header.msg_iovlen = self.0.len();
        header
    }
}

/// How a piece of a message is to be sent.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    /// More follows at once: do not push a short segment out.
    pub(crate) more: bool,
    /// Let the NIC read the pages where they are.
    pub(crate) zero_copy: bool,
}

/// Sends more of the message `head`, `pages`, of which `done` bytes are sent, at most `limit` bytes; returns how
/// many the kernel took.
pub(crate) fn send_more(
    socket: BorrowedFd<'_>,
    pieces: &mut Pieces,
    (head, pages): (&[u8], &[GuestPage<'_>]),
    (done, limit): (usize, usize),
    how: How,
) -> io::Result<usize> {
    pieces.list(head, pages, done, limit);
    let header = pieces.header();
    let mut flags = libc::MSG_NOSIGNAL;
    if how.more {
        flags |= libc::MSG_MORE;
    }
    if how.zero_copy {
        flags |= libc::MSG_ZEROCOPY;
    }
    // SAFETY: the pieces lie in `head`, borrowed for this call, and in pages that are mapped for as long as their
    // GuestPage lives; the kernel only reads them, and answers EFAULT where it can't.
    // Worth it: page bytes go from guest memory to the socket with no copy of ours.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) };
    pieces.0.clear();
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives more of `pages`, of which `done` bytes are there, at most `limit` bytes; returns how many came, 0 at the
/// end of the stream. Waits until all of them are there, the socket's receive timeout is over, or something is wrong.
pub(crate) fn receive_more(
    socket: BorrowedFd<'_>,
    pieces: &mut Pieces,
    pages: &[GuestPage<'_>],
    (done, limit): (usize, usize),
) -> io::Result<usize> {
    pieces.list(&[], pages, done, limit);
    let mut header = pieces.header();
    // SAFETY: the pieces lie in pages that are mapped for as long as their GuestPage lives. The kernel writes them
    // while the guest may look, which is what a GuestPage allows, and answers EFAULT where it can't.
    // Worth it: page bytes go from the socket into guest memory with no copy of ours.
    let came = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_WAITALL) };
    pieces.0.clear();
    usize::try_from(came).map_err(|_| io::Error::last_os_error())
}

/// Bytes written to the socket and not yet acknowledged by the peer (`SIOCOUTQ` in `linux/sockios.h`, the same
/// request as `TIOCOUTQ`); 0 when the socket is closed.
pub(crate) fn unacknowledged(socket: BorrowedFd<'_>) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int, which is what it is given.
    // Worth it: nothing safe offers this figure, and the judge needs it for every frame.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
}

/// Allows `MSG_ZEROCOPY` on the socket.
pub(crate) fn allow_zero_copy(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("the size of an int is small");
    // SAFETY: SO_ZEROCOPY reads one int, which is what it is given.
    // Worth it: no crate in use offers this option.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel says about zero-copy sends that are done.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct Completions {
    /// Sends done.
    pub(crate) sends: u64,
    /// Whether the kernel copied for any of them after all.
    pub(crate) copied: bool,
}

/// Room for control data, aligned as `cmsghdr` is.
#[repr(C, align(8))]
struct Control([u8; 128]);

/// Takes the completions that wait in the socket's error queue, without blocking.
pub(crate) fn completions(socket: BorrowedFd<'_>) -> Completions {
    let mut total = Completions::default();
    loop {
        let mut control = Control([0; 128]);
        // SAFETY: msghdr is a plain C structure for which all zero is valid ("no name, no pieces").
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len();
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: the kernel writes control data into `control`, whose length it is told.
        // Worth it: the error queue is the only place where the kernel says whether it copied.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        if result < 0 {
            return total;
        }
        // SAFETY: CMSG_FIRSTHDR, CMSG_NXTHDR and CMSG_DATA walk the control data the kernel has just written, within
        // the length it left in the header; each error message holds a sock_extended_err, read unaligned.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&raw const header);
            while let Some(head) = message.as_ref() {
                let ours = (head.cmsg_level == libc::SOL_IP && head.cmsg_type == libc::IP_RECVERR)
                    || (head.cmsg_level == libc::SOL_IPV6 && head.cmsg_type == libc::IPV6_RECVERR);
                if ours {
                    let error = libc::CMSG_DATA(message).cast::<libc::sock_extended_err>().read_unaligned();
                    if error.ee_errno == 0 && error.ee_origin == ORIGIN_ZERO_COPY {
                        total.sends += u64::from(error.ee_data.wrapping_sub(error.ee_info)) + 1;
                        total.copied |= error.ee_code == CODE_COPIED;
                    }
                }
                message = libc::CMSG_NXTHDR(&raw const header, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::NonNull;

    fn pages_at(arena: &mut [u8], order: &[usize]) -> Vec<GuestPage<'static>> {
        let base = arena.as_mut_ptr();
        let place = |&at: &usize| NonNull::new(base.wrapping_add(at * PAGE_BYTES)).unwrap();
        // SAFETY: only the addresses are used in these tests.
        order.iter().map(|at| unsafe { GuestPage::new(place(at)) }).collect()
    }

    fn shape(pieces: &Pieces, base: *const u8) -> Vec<(usize, usize)> {
        pieces.0.iter().map(|p| (p.iov_base.addr().wrapping_sub(base.addr()), p.iov_len)).collect()
    }

    #[test]
    fn neighbours_merge_and_a_message_can_start_and_end_anywhere() {
        let mut arena = vec![0; 8 * PAGE_BYTES];
        let base = arena.as_ptr();
        let pages = pages_at(&mut arena, &[0, 1, 2, 5, 4, 6, 7]);
        let mut pieces = Pieces::new();
        pieces.list(&[], &pages, 0, usize::MAX);
        let page = PAGE_BYTES;
        assert_eq!(
            shape(&pieces, base),
            [(0, 3 * page), (5 * page, page), (4 * page, page), (6 * page, 2 * page)]
        );
        pieces.list(&[], &pages, page + 100, page);
        assert_eq!(shape(&pieces, base), [(page + 100, page)]);
        pieces.list(&[], &pages, 7 * page - 1, usize::MAX);
        assert_eq!(shape(&pieces, base), [(8 * page - 1, 1)]);
        let head = [1, 2, 3, 4];
        pieces.list(&head, &pages, 3, 2 + page);
        assert_eq!(pieces.0.len(), 2);
        assert_eq!(pieces.0[0].iov_len, 1);
        assert_eq!(pieces.0[1].iov_len, page + 1);
    }

    #[test]
    fn the_list_ends_at_the_kernels_limit() {
        let mut arena = vec![0; 2 * PAGE_BYTES];
        let pages = pages_at(&mut arena, &[1, 0].repeat(PIECES_MAX));
        let mut pieces = Pieces::new();
        pieces.list(&[0], &pages, 0, usize::MAX);
        assert_eq!(pieces.0.len(), PIECES_MAX);
        assert_eq!(pieces.0.capacity(), PIECES_MAX);
    }

    /// Three pages, of which the middle one can't be touched.
    struct Holed(*mut libc::c_void);

    impl Holed {
        fn new() -> Self {
            let (length, access) = (3 * PAGE_BYTES, libc::PROT_READ | libc::PROT_WRITE);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a fresh mapping at an address the kernel chooses.
            let base = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
            assert_ne!(base, libc::MAP_FAILED);
            // SAFETY: the middle page of that mapping, which nothing refers to.
            let result =
                unsafe { libc::mprotect(base.wrapping_byte_add(PAGE_BYTES), PAGE_BYTES, libc::PROT_NONE) };
            assert_eq!(result, 0);
            Self(base)
        }
        fn pages(&self) -> Vec<GuestPage<'_>> {
            let place = |at| NonNull::new(self.0.wrapping_byte_add(at * PAGE_BYTES).cast()).unwrap();
            // SAFETY: mapped while self lives; the middle one is only ever handed to the kernel, which checks.
            (0..3).map(|at| unsafe { GuestPage::new(place(at)) }).collect()
        }
    }

    impl Drop for Holed {
        fn drop(&mut self) {
            // SAFETY: the mapping made in `new`; no page of it is borrowed any more.
            unsafe { libc::munmap(self.0, 3 * PAGE_BYTES) };
        }
    }

    /// A page that can't be read, or written, ends the call with an error that says which one it is.
    #[test]
    fn a_page_out_of_reach_is_named() {
        use crate::error::NetError;
        use crate::net::tcp::{Settings, TcpAcceptor, TcpDialer};
        use std::time::Duration;
        let second = Duration::from_secs(1);
        for zero_copy in [false, true] {
            let settings = Settings { zero_copy, ..Settings::default() };
            let mut acceptor = TcpAcceptor::listen("127.0.0.1:0", settings.clone()).unwrap();
            let dialer = TcpDialer::new(&acceptor.local().to_string(), settings);
            let mut near = dialer.dial(second).unwrap();
            let mut far = acceptor.accept(second).unwrap().unwrap();
            let holed = Holed::new();
            let mut list = holed.pages();
            list.extend(list.clone());
            list[0..3].rotate_left(1);
            let error = near.sender.send(&[1, 2, 3], &list[1..]).unwrap_err();
            assert!(matches!(&error, NetError::Page { index: 3, access: "read", .. }), "{error}");
            far.sender.send(&[7; 6 * PAGE_BYTES], &[]).unwrap();
            let error = near.receiver.recv_pages(&list[1..]).unwrap_err();
            assert!(matches!(&error, NetError::Page { index: 3, access: "write", .. }), "{error}");
        }
    }
}
