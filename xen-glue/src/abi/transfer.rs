//! Bytes between a descriptor and pages that are no Rust memory: one system call for a header and the pages behind it.
//!
//! Neighbouring pages are one piece to the kernel, so a batch from one window is a handful of pieces, not a thousand.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use mover::memory::GuestPage;
use mover::units::{PAGE_BYTES, usize_of};
use rustix::event::{PollFd, PollFlags, poll};

/// Most pieces of one system call (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// Something to be written.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    /// Bytes of our own.
    Bytes(&'a [u8]),
    /// A guest's page.
    Page(GuestPage<'a>),
}

/// Somewhere to read to.
pub enum PartMut<'a> {
    /// Bytes of our own.
    Bytes(&'a mut [u8]),
    /// A guest's page, mapped for writing.
    Page(GuestPage<'a>),
}

/// Why a transfer ended that was told to stop. Not [`io::ErrorKind::Interrupted`], on which callers try again.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("told to stop")]
pub struct Stopped;

/// The list of pieces of a system call, used again for every one. A set `stop` ends a transfer at the next signal or
/// wait, with [`Stopped`].
pub struct Transfer<'s> {
    pieces: Vec<libc::iovec>,
    stop: &'s AtomicBool,
    single: PhantomData<*mut u8>,
}

// SAFETY: between calls the list is empty. Worth it: a transfer is made on one thread and used on another.
unsafe impl Send for Transfer<'_> {}

impl<'s> Transfer<'s> {
    /// With an empty list; `stop` is what ends a transfer that waits.
    #[must_use]
    pub fn new(stop: &'s AtomicBool) -> Self {
        Self { pieces: Vec::with_capacity(PIECES_MAX), stop, single: PhantomData }
    }

    /// Writes all of `parts`, in order.
    ///
    /// # Errors
    /// What `writev(2)` says; [`Stopped`] if told to. Some of it may have been written then.
    pub fn write<'a>(
        &mut self,
        to: BorrowedFd<'_>,
        parts: impl IntoIterator<Item = Part<'a>>,
    ) -> io::Result<()> {
        self.pieces.clear();
        for part in parts {
            match part {
                Part::Bytes(bytes) => self.add(bytes.as_ptr().cast_mut(), bytes.len()),
                Part::Page(page) => self.add(page.address().as_ptr(), PAGE_BYTES),
            }
        }
        if self.all(write_call(to), to, PollFlags::OUT)?.1 {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Fills all of `parts`, in order; how many bytes, which is fewer only where the stream has ended.
    ///
    /// # Errors
    /// What `readv(2)` says; [`Stopped`] if told to. Some of it may have been filled then.
    pub fn read<'a>(
        &mut self,
        from: BorrowedFd<'_>,
        parts: impl IntoIterator<Item = PartMut<'a>>,
    ) -> io::Result<usize> {
        self.gather_mut(parts);
        Ok(self.all(read_call(from), from, PollFlags::IN)?.0)
    }

    /// Fills what there is of `parts`, in order, waiting for the first byte only; how many bytes, 0 at the end.
    ///
    /// # Errors
    /// What `readv(2)` says; [`Stopped`] if told to.
    pub fn read_some<'a>(
        &mut self,
        from: BorrowedFd<'_>,
        parts: impl IntoIterator<Item = PartMut<'a>>,
    ) -> io::Result<usize> {
        self.gather_mut(parts);
        self.once(read_call(from), from, PollFlags::IN, 0)
    }

    fn gather_mut<'a>(&mut self, parts: impl IntoIterator<Item = PartMut<'a>>) {
        self.pieces.clear();
        for part in parts {
            match part {
                PartMut::Bytes(bytes) => self.add(bytes.as_mut_ptr(), bytes.len()),
                PartMut::Page(page) => self.add(page.address().as_ptr(), PAGE_BYTES),
            }
        }
    }

    /// Adds a piece, or makes the last one longer.
    fn add(&mut self, address: *mut u8, bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some(last) = self.pieces.last_mut()
            && last.iov_base.addr() + last.iov_len == address.addr()
        {
            last.iov_len += bytes;
            return;
        }
        self.pieces.push(libc::iovec { iov_base: address.cast(), iov_len: bytes });
    }

    /// Repeats `call` until every piece is through or it does nothing any more: how many bytes, and whether that is all.
    fn all(
        &mut self,
        call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
        fd: BorrowedFd<'_>,
        ready: PollFlags,
    ) -> io::Result<(usize, bool)> {
        let (mut first, mut through) = (0, 0);
        while first < self.pieces.len() {
            match self.once(&call, fd, ready, first)? {
                0 => break,
                done => {
                    self.advance(&mut first, done);
                    through += done;
                }
            }
        }
        let all = first == self.pieces.len();
        self.pieces.clear();
        Ok((through, all))
    }

    /// Calls `call` for the pieces from `first` on until it has done something; how many bytes.
    fn once(
        &self,
        call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
        fd: BorrowedFd<'_>,
        ready: PollFlags,
        first: usize,
    ) -> io::Result<usize> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::Error::other(Stopped));
            }
            let pieces = &self.pieces[first..];
            if let Ok(done) = u64::try_from(call(&pieces[..pieces.len().min(PIECES_MAX)])) {
                return Ok(usize_of(done));
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                // Somebody else made it non-blocking: it is shared with whoever handed it to us.
                error if error.kind() == io::ErrorKind::WouldBlock => {
                    match poll(&mut [PollFd::new(&fd, ready)], None) {
                        Ok(_) | Err(rustix::io::Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                error => return Err(error),
            }
        }
    }

    /// Takes `done` bytes off the pieces from `first` on.
    fn advance(&mut self, first: &mut usize, mut done: usize) {
        while done > 0 {
            let piece = &mut self.pieces[*first];
            if done < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(done);
                piece.iov_len -= done;
                return;
            }
            done -= piece.iov_len;
            *first += 1;
        }
    }
}

/// `writev` of pieces that [`Transfer`] has gathered.
fn write_call(to: BorrowedFd<'_>) -> impl Fn(&[libc::iovec]) -> libc::ssize_t {
    move |pieces| {
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pieces are borrowed bytes and pages, which the caller of `Transfer` keeps alive past this call,
        // of the lengths they say; writev only reads them. Worth it: pages go out without a copy of our own.
        unsafe { libc::writev(to.as_raw_fd(), pieces.as_ptr(), count) }
    }
}

/// `readv` into pieces that [`Transfer`] has gathered.
fn read_call(from: BorrowedFd<'_>) -> impl Fn(&[libc::iovec]) -> libc::ssize_t {
    move |pieces| {
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: as in `write_call`; readv writes them: our own are borrowed mutably, pages are mapped for writing or
        // the kernel answers EFAULT. Worth it: pages come in without a copy of our own.
        unsafe { libc::readv(from.as_raw_fd(), pieces.as_ptr(), count) }
    }
}
