//! The descriptor a stream goes through: bytes of our own and guest pages in one system call, and an end to waiting
//! when told to stop.
#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::abi::{Part, PartMut, Transfer};

/// Bytes a pipe should hold, so that its two ends take turns less often. More than the usual limit for users; the
/// kernel grants root what it asks for.
const PIPE_BYTES: usize = 1 << 20;

/// One end of a stream. It never reads past what it is asked for, and leaves the descriptor's flags as they are.
pub(crate) struct Channel<'a> {
    fd: BorrowedFd<'a>,
    transfer: Transfer<'a>,
}

impl<'a> Channel<'a> {
    /// Over `fd`, until `stop` is set.
    pub(crate) fn new(fd: BorrowedFd<'a>, stop: &'a AtomicBool) -> Self {
        // Only pipes have a size to set, and a smaller one only takes longer.
        let _ = rustix::pipe::fcntl_setpipe_size(fd, PIPE_BYTES);
        Self { fd, transfer: Transfer::new(stop) }
    }

    /// Writes all of `head` and then of `contents`.
    pub(crate) fn send<'p>(
        &mut self,
        head: &'p [u8],
        contents: impl Iterator<Item = Part<'p>>,
    ) -> io::Result<()> {
        self.transfer.write(self.fd, std::iter::once(Part::Bytes(head)).chain(contents))
    }

    /// Fills all of `pages`; how many bytes, which is fewer only where the stream has ended.
    pub(crate) fn receive<'p>(&mut self, pages: impl Iterator<Item = PartMut<'p>>) -> io::Result<usize> {
        self.transfer.read(self.fd, pages)
    }
}

impl Channel<'_> {
    /// Waits until there is something to read, or the stream has ended, at most as long as `timeout`; whether there is.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let until = Timespec::try_from(timeout).ok();
        match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], until.as_ref()) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Write for Channel<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.transfer.write(self.fd, [Part::Bytes(bytes)])?;
        Ok(bytes.len())
    }
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.transfer.write(self.fd, slices.iter().map(|slice| Part::Bytes(slice)))?;
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Channel<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(bytes)])
    }
    fn read_vectored(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.transfer.read_some(self.fd, slices.iter_mut().map(|slice| PartMut::Bytes(slice)))
    }
}
