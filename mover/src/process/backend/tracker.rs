//! The dirty log: the kernel lifts the write protection of a page at the first write (userfaultfd, `WP_ASYNC`), and a
//! scan of the page tables (PAGEMAP_SCAN) collects the pages without it and protects them again.
//!
//! Owning thread: whoever holds it, one at a time. Invariants:
//! - A write is in the scan during which or before which it happened, or in the next one; a scan that failed half-way
//!   makes the next harvest report every page.
//! - Pages the guest never touched are not reported, though the scan counts them as written once a neighbour is
//!   touched (see [`crate::kernel::pagemap`]): they are still holes in the memory file. So the engine does not touch
//!   them either, and they cost no memory.
//! - The kernel ends the log when this is dropped, however its process ends.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::memory::Memory;
use super::{gone, os};
use crate::bitmap::Bitmap;
use crate::error::GuestError;
use crate::guest::{DirtyLog, GuestMemory};
use crate::kernel::pagemap::{self, Scanner};
use crate::kernel::uffd::{Span, Userfaultfd, Watch};
use crate::units::{PAGE_BYTES_U64, PageCount, u64_of, usize_of};

/// Pages of one page table: what is protected at once when the log is armed.
const TABLE_PAGES: u64 = 512;

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
    memory: Arc<Memory>,
    /// Pages that were holes when last looked at: reported only once they no longer are.
    virgin: Bitmap,
    state: State,
}

impl WriteTracker {
    /// Of the guest that has its memory mapped at `span`.
    pub(super) fn new(uffd: Userfaultfd, pagemap: OwnedFd, span: Span, memory: Arc<Memory>) -> Self {
        let virgin = Bitmap::new(memory.pages().entries());
        Self { uffd, scanner: Scanner::new(pagemap), span, memory, virgin, state: State::Off }
    }

    /// Protects what there is.
    fn protect(&mut self) -> io::Result<()> {
        self.scanner.protect(self.span)?;
        // Data without a page table (the guest has not touched it since it came here) gets one, or the first touch
        // would report all its neighbours.
        let (pages, memfd, mut at) = (self.memory.pages().0, self.memory.file(), 0);
        while let Some(data) = pagemap::next_data(memfd, at)?.filter(|data| *data < pages) {
            let from = data / TABLE_PAGES * TABLE_PAGES;
            let mut to = (from + TABLE_PAGES).min(pages);
            while to < pages && pagemap::next_data(memfd, to)?.is_some_and(|data| data < to + TABLE_PAGES) {
                to = (to + TABLE_PAGES).min(pages);
            }
            let bytes = (to - from) * PAGE_BYTES_U64;
            self.uffd.protect(Span { start: self.span.start + from * PAGE_BYTES_U64, bytes })?;
            at = to;
        }
        // Looked at last: what is written after this look has a page in the file and no protection.
        self.virgin.clear_all();
        pagemap::untouched(memfd, &mut self.virgin)
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
        let armed = self.uffd.register(self.span, Watch::WRITES).and_then(|()| self.protect());
        armed.map_err(|e| self.failed("cannot start the log of pages the guest writes", e))?;
        self.state = State::Armed;
        Ok(())
    }

    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError> {
        assert_eq!(into.len(), self.virgin.len(), "a bit per page");
        assert!(self.state != State::Off, "a log is armed before it is harvested");
        if self.state == State::Lost {
            self.protect().map_err(|e| self.failed("cannot restart the log of pages the guest writes", e))?;
            self.state = State::Armed;
            return Ok(PageCount(u64_of(into.set_range(0, into.len()))));
        }
        let (span, memfd, virgin) = (self.span, self.memory.file(), &mut self.virgin);
        let (mut fresh, mut looked) = (0, Ok(()));
        let scanned = self.scanner.written(span, |from, to| {
            let page = |address: u64| usize_of((address - span.start) / PAGE_BYTES_U64);
            match admit(virgin, memfd, page(from), page(to), into) {
                Ok(more) => fresh += more,
                Err(e) => looked = Err(e),
            }
        });
        match scanned.and(looked) {
            // A dead guest's page tables are empty: not an error to the scan, and not a clean guest either.
            Ok(()) if self.uffd.is_alive() => Ok(PageCount(u64_of(fresh))),
            Ok(()) => Err(gone()),
            Err(e) => {
                self.state = State::Lost;
                Err(self.failed("cannot collect the pages the guest has written", e))
            }
        }
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

/// Sets pages `from..to` in `into`, but for those that are virgin and still holes; how many were clear.
fn admit(
    virgin: &mut Bitmap,
    memfd: BorrowedFd<'_>,
    from: usize,
    to: usize,
    into: &mut Bitmap,
) -> io::Result<usize> {
    let (mut at, mut fresh) = (from, 0);
    while let Some((first, end)) = virgin.next_run(at).filter(|(first, _)| *first < to) {
        let end = end.min(to);
        fresh += into.set_range(at, first);
        let mut touched = first;
        pagemap::holes(memfd, u64_of(first), u64_of(end), |hole, hole_end| {
            fresh += into.set_range(touched, usize_of(hole));
            virgin.clear_range(touched, usize_of(hole));
            touched = usize_of(hole_end);
        })?;
        fresh += into.set_range(touched, end);
        virgin.clear_range(touched, end);
        at = end;
    }
    Ok(fresh + into.set_range(at, to))
}
