//! Pages held back from a guest that runs already: holes in its memory file, watched by a userfaultfd, so that an
//! access waits until the page is put there, whole, in one step.
//!
//! Owning thread: any; `next_fault` is one task's. What happens to a page:
//!
//! ```text
//!   hold_back:  mark held (our own `map` refuses it from here on) -> punch a hole -> watch its piece
//!   an access:  the thread waits in the kernel ──> next_fault (once a page, however many wait)
//!   release:    UFFDIO_COPY: there, and all who wait go on -> unmark
//!   wake:       a page nobody held (free memory beside an outstanding page): a zero page, or go on and look again
//!   finish:     no page is held -> end watching -> the guest forgets its copy of the userfaultfd
//! ```
//!
//! Invariants:
//! - A held page is a hole until `release`, so that nobody, here or there, ever sees what it held before.
//! - One task releases a page, once (the engine's word for the page sees to it).
//! - Only pieces with outstanding pages are watched, in at most [`RUNS_MAX`] ranges: an access to free memory elsewhere
//!   is the kernel's business alone.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::FallocateFlags;

use super::disks::Gate;
use super::memory::Memory;
use super::{Line, gone, os};
use crate::bitmap::{Bitmap, SharedBitmap};
use crate::error::GuestError;
use crate::guest::{GuestMemory, HoldBack, Session};
use crate::kernel::pagemap;
use crate::kernel::uffd::{Event, Span, Userfaultfd, Watch};
use crate::memory::GuestPage;
use crate::process::keepsake::{Keepsake, Way};
use crate::units::{PAGE_BYTES_U64, Pfn, u64_of, usize_of};

/// Pages of the smallest piece that is watched: 2 MiB, a page table's worth.
const PIECE_PAGES: usize = 512;
/// Ranges watched at most. Each is a mapping of its own in the guest process, which may have 65,530
/// (`vm.max_map_count`), and a system call within the downtime.
const RUNS_MAX: usize = 1024;

/// Pages held back from a guest process.
pub(super) struct PageHold {
    uffd: Userfaultfd,
    span: Span,
    memory: Arc<Memory>,
    line: Arc<Line>,
    gate: Arc<Gate>,
    /// The guest runs already, with pages that an engine before this one held back.
    again: bool,
    /// How the source reaches this engine.
    way: Option<Way>,
    /// Pages whose fault was told and not answered.
    told: SharedBitmap,
    faults: Mutex<Faults>,
}

struct Faults {
    events: Vec<Event>,
    pages: VecDeque<Pfn>,
}

impl PageHold {
    /// For the guest that has its memory mapped at `span`.
    pub(super) fn new(
        uffd: Userfaultfd,
        span: Span,
        memory: Arc<Memory>,
        line: Arc<Line>,
        gate: Arc<Gate>,
        again: bool,
    ) -> Self {
        let told = SharedBitmap::new(memory.pages().entries());
        let faults = Mutex::new(Faults {
            events: Vec::with_capacity(Userfaultfd::BATCH),
            pages: VecDeque::with_capacity(Userfaultfd::BATCH),
        });
        Self { uffd, span, memory, line, gate, again, way: None, told, faults }
    }

    /// The source reaches this engine that way: an engine after it is to be reached so too.
    pub(super) fn reached_by(self, way: Option<Way>) -> Self {
        Self { way, ..self }
    }

    fn address(&self, pfn: Pfn) -> u64 {
        self.span.start + pfn.0 * PAGE_BYTES_U64
    }

    /// Makes holes of the outstanding pages that hold something.
    fn punch(&self, outstanding: &Bitmap) -> io::Result<()> {
        let (memfd, mut at) = (self.memory.file(), 0);
        while let Some((first, end)) = outstanding.next_run(at) {
            at = end;
            match pagemap::next_data(memfd, u64_of(first))?.map(usize_of) {
                None => return Ok(()),
                // Most outstanding pages were never there: skip to the run that reaches the data.
                Some(data) if data >= end => at = data,
                Some(data) => {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let bytes = u64_of(end - data) * PAGE_BYTES_U64;
                    rustix::fs::fallocate(memfd, flags, u64_of(data) * PAGE_BYTES_U64, bytes)?;
                }
            }
        }
        Ok(())
    }

    fn watch(&self, outstanding: &Bitmap) -> io::Result<()> {
        for (from, to) in pieces(outstanding, PIECE_PAGES, RUNS_MAX) {
            let (start, bytes) = (self.address(Pfn::at(from)), u64_of(to - from) * PAGE_BYTES_U64);
            self.uffd.register(Span { start, bytes }, Watch::MISSING)?;
        }
        Ok(())
    }

    /// Turns faults read from the kernel into pages, each once until it is answered.
    fn take_in(&self, faults: &mut Faults) {
        for event in faults.events.drain(..) {
            let Event::Fault { address, .. } = event else {
                // Never asked for: a guest process neither forks nor unmaps its memory.
                tracing::warn!(?event, "userfaultfd told of something that was not asked for");
                continue;
            };
            let pfn = Pfn((address - self.span.start) / PAGE_BYTES_U64);
            if self.told.set(pfn.index()) {
                faults.pages.push_back(pfn);
            }
        }
    }

    fn failed(&self, doing: &str, source: io::Error) -> GuestError {
        if !self.uffd.is_alive() {
            return gone();
        }
        os(doing, "Is there memory left on this host?", source)
    }
}

impl HoldBack for PageHold {
    fn hold_back(&self, outstanding: &Bitmap) -> Result<(), GuestError> {
        assert_eq!(u64_of(outstanding.len()), self.memory.pages().0, "a bit per page");
        assert!(self.memory.held().is_clear(), "pages are held back once");
        self.memory.held().copy_from(outstanding);
        if outstanding.next_run(0).is_none() {
            return Ok(());
        }
        self.line.holding.store(true, Ordering::SeqCst);
        let held = if self.again {
            // What an engine before us released holds the guest's own data by now: `release` leaves it alone. Whoever
            // waits told that engine, so they are sent to look, and to tell us, once we watch.
            self.watch(outstanding).and_then(|()| self.uffd.wake(self.span))
        } else {
            self.punch(outstanding).and_then(|()| self.watch(outstanding))
        };
        held.map_err(|e| self.failed("cannot hold back pages of the guest", e))
    }

    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError> {
        self.memory.check(pfn)?;
        // Unmarked before the page is there: who asks after this mark is told of (again), who asked before is woken.
        self.told.clear(pfn.index());
        let to = self.address(pfn);
        let held = self.memory.held().get(pfn.index());
        match self.uffd.copy_page(to, page) {
            Ok(()) => {
                assert!(held, "{pfn} was released, and was a hole without being held back");
                self.memory.held().clear(pfn.index());
                Ok(())
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                assert!(!held || self.again, "{pfn} is held back, and has content that nobody released");
                self.memory.held().clear(pfn.index());
                self.uffd.wake(Span::page_of(to)).map_err(|e| self.failed("cannot wake the guest", e))
            }
            Err(e) => Err(self.failed("cannot give the guest an outstanding page", e)),
        }
    }

    fn wake(&self, pfn: Pfn) -> Result<(), GuestError> {
        self.memory.check(pfn)?;
        assert!(
            !self.memory.held().get(pfn.index()),
            "{pfn} is held back: only its content wakes who waits for it"
        );
        self.told.clear(pfn.index());
        let to = self.address(pfn);
        match self.uffd.zero_page(to) {
            Ok(()) => Ok(()),
            // There already, or no longer watched: the access only has to be tried again.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)) => {
                self.uffd.wake(Span::page_of(to)).map_err(|e| self.failed("cannot wake the guest", e))
            }
            Err(e) => Err(self.failed("cannot give the guest a zero page", e)),
        }
    }

    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.pages.is_empty() {
            self.uffd
                .events(timeout, &mut faults.events)
                .map_err(|e| self.failed("cannot read which pages the guest waits for", e))?;
            self.take_in(&mut faults);
        }
        while let Some(pfn) = faults.pages.pop_front() {
            // Answered while it stood in the queue: who waited was woken by that.
            if self.told.get(pfn.index()) {
                return Ok(Some(pfn));
            }
        }
        Ok(None)
    }

    fn keep(&self, session: &Session<'_>) -> Result<(), GuestError> {
        match &self.way {
            Some(way) => self.line.client().keep(&Keepsake::encode(session, way)),
            None => Ok(()),
        }
    }

    fn absent(&self, into: &mut Bitmap) -> Result<(), GuestError> {
        assert_eq!(u64_of(into.len()), self.memory.pages().0, "a bit per page");
        pagemap::holes(self.memory.file(), 0, self.memory.pages().0, |from, to| {
            into.set_range(usize_of(from), usize_of(to));
        })
        .map_err(|e| self.failed("cannot ask which pages of the guest are missing", e))
    }

    fn finish(&self) -> Result<(), GuestError> {
        assert!(self.memory.held().is_clear(), "pages are held back: the guest would take them for zero");
        self.uffd
            .unregister(self.span)
            .map_err(|e| self.failed("cannot end holding back the guest's pages", e))?;
        self.gate.open_all();
        if self.line.holding.swap(false, Ordering::SeqCst) && self.line.started.load(Ordering::SeqCst) {
            self.line.client().holds_done()?;
        }
        Ok(())
    }
}

/// The pages to watch for `outstanding`: runs of pieces of `piece` pages with outstanding ones among them, as first page
/// and the page after the last. The piece is doubled until there are at most `runs_max`.
fn pieces(outstanding: &Bitmap, piece: usize, runs_max: usize) -> Vec<(usize, usize)> {
    let pages = outstanding.len();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    while let Some((first, end)) = outstanding.next_run(at) {
        let (from, to) = (first / piece * piece, end.next_multiple_of(piece).min(pages));
        match runs.last_mut() {
            Some(last) if last.1 >= from => last.1 = to,
            _ => runs.push((from, to)),
        }
        at = to;
    }
    if runs.len() > runs_max { pieces(outstanding, piece * 2, runs_max) } else { runs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_what_is_outstanding_and_little_else() {
        let mut outstanding = Bitmap::new(10_000);
        assert!(pieces(&outstanding, 512, 4).is_empty());
        for page in [0, 511, 1024, 5000, 9_999] {
            outstanding.set(page);
        }
        assert_eq!(pieces(&outstanding, 512, 4), [(0, 512), (1024, 1536), (4608, 5120), (9728, 10_000)]);
        assert_eq!(pieces(&outstanding, 512, 3), [(0, 2048), (4096, 5120), (9216, 10_000)]);
        assert_eq!(pieces(&outstanding, 512, 1), [(0, 10_000)]);
        outstanding.set_range(400, 1100);
        assert_eq!(pieces(&outstanding, 512, 4)[0], (0, 1536));
    }
}
