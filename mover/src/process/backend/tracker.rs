//! The dirty log: the kernel lifts the write protection of a page at the first write (userfaultfd, `WP_ASYNC`), and a
//! scan of the page tables (PAGEMAP_SCAN) collects the pages without it and protects them again.
//!
//! Owning thread: whoever holds it, one at a time. Invariants:
//! - A write is in the scan during which or before which it happened, or in the next one; a scan that failed half-way
//!   makes the next harvest report every page.
//! - Pages the guest never touched are not reported: arming protects them too. So the engine does not touch them
//!   either, and they cost no memory.
//! - The kernel ends the log when this is dropped, however its process ends.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use super::{gone, os};
use crate::bitmap::Bitmap;
use crate::error::GuestError;
use crate::guest::DirtyLog;
use crate::kernel::pagemap::Scanner;
use crate::kernel::uffd::{Span, Userfaultfd, Watch};
use crate::units::{ByteCount, PAGE_BYTES_U64, PageCount, u64_of, usize_of};

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Off,
    Armed,
    /// A scan failed, so that some pages may be protected that nobody was told of.
    Lost,
}

/// The log of pages a guest process writes.
pub(super) struct WriteTracker {
    uffd: Userfaultfd,
    scanner: Scanner,
    span: Span,
    pages: PageCount,
    state: State,
}

impl WriteTracker {
    /// Of the guest that has its memory, all of it, mapped at `span`.
    pub(super) fn new(uffd: Userfaultfd, pagemap: OwnedFd, span: Span) -> Self {
        let pages = ByteCount(span.bytes).whole_pages();
        Self { uffd, scanner: Scanner::new(pagemap), span, pages, state: State::Off }
    }

    fn failed(&self, doing: &str, source: io::Error) -> GuestError {
        if !self.uffd.is_alive() {
            return gone();
        }
        match source.raw_os_error() {
            Some(libc::EBUSY) => GuestError::State(
                "another program logs this guest's writes already (its userfaultfd is registered). End that program"
                    .to_owned(),
            ),
            Some(libc::ENOTTY) => GuestError::Unsupported {
                what: "the scan for written pages (PAGEMAP_SCAN)",
                why: source.to_string(),
                remedy: "It needs Linux 6.7 or later",
            },
            _ => os(doing, "The migration can be tried again; the guest runs on", source),
        }
    }
}

impl DirtyLog for WriteTracker {
    fn arm(&mut self) -> Result<(), GuestError> {
        let armed =
            self.uffd.register(self.span, Watch::WRITES).and_then(|()| self.scanner.protect(self.span));
        armed.map_err(|e| self.failed("cannot start the log of pages the guest writes", e))?;
        self.state = State::Armed;
        Ok(())
    }

    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError> {
        assert_eq!(into.len(), self.pages.entries(), "a bit per page");
        assert!(self.state != State::Off, "a log is armed before it is harvested");
        if self.state == State::Lost {
            self.arm()?;
            return Ok(PageCount(u64_of(into.set_range(0, into.len()))));
        }
        let (start, mut fresh) = (self.span.start, 0);
        let page = |address: u64| usize_of((address - start) / PAGE_BYTES_U64);
        let scanned =
            self.scanner.written(self.span, |from, to| fresh += into.set_range(page(from), page(to)));
        if let Err(e) = scanned {
            self.state = State::Lost;
            return Err(self.failed("cannot collect the pages the guest has written", e));
        }
        // Of a process that is gone some kernels scan nothing, with success: a dead guest is no clean one.
        if !self.uffd.is_alive() {
            self.state = State::Lost;
            return Err(gone());
        }
        Ok(PageCount(u64_of(fresh)))
    }

    fn disarm(&mut self) -> Result<(), GuestError> {
        if self.state == State::Off || !self.uffd.is_alive() {
            return Ok(());
        }
        self.uffd
            .unregister(self.span)
            .map_err(|e| self.failed("cannot end the log of pages the guest writes", e))?;
        self.state = State::Off;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::uffd::tests::{Pair, skipped};
    use crate::kernel::uffd::{self, Features};
    use crate::units::Pfn;

    #[test]
    fn after_a_failed_harvest_the_next_has_every_page() {
        let uffd = match uffd::open().and_then(|(fd, _)| Userfaultfd::new(fd, Features::LOG_WRITES)) {
            Ok(uffd) => uffd,
            Err(e) => return skipped("dirty log test", &e),
        };
        let pair = Pair::new(1000);
        let mut log = WriteTracker::new(uffd, Scanner::open_own().unwrap(), pair.span());
        log.arm().unwrap();
        pair.guest.page(Pfn(3)).mark_written();
        let nothing = std::fs::File::open("/dev/null").unwrap();
        let scanner = std::mem::replace(&mut log.scanner, Scanner::new(nothing.into()));
        let mut dirty = Bitmap::new(1000);
        assert!(log.harvest(&mut dirty).is_err() && log.harvest(&mut dirty).is_err());
        log.scanner = scanner;
        let mut dirty = Bitmap::new(1000);
        dirty.set(7);
        assert_eq!(log.harvest(&mut dirty).unwrap(), PageCount(999));
        pair.guest.page(Pfn(4)).mark_written();
        let mut dirty = Bitmap::new(1000);
        assert_eq!(log.harvest(&mut dirty).unwrap(), PageCount(1));
        assert!(dirty.get(4));
    }
}
