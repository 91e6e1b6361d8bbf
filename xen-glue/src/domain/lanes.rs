//! HVM and PVH guests' memory for the engine's lanes: guest frames are what the hypervisor takes, contents pass as they are.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mover::bitmap::Bitmap;
use mover::error::GuestError;
use mover::guest::{GuestMemory, HoldBack as _};
use mover::memory::Window;
use mover::units::{PageCount, Pfn, u64_of};

use super::common::{Domain, LOG, fill_words};
use super::paging::Paging;
use super::populate::Populate;
use super::{Absent, BATCH_PAGES, DomainError, Held};
use crate::abi::{Access, Beside, DomainId, Kept, LaneWindow, Span, Xen};
use crate::stream::PageType;

/// Frames whose types are asked for at once.
const TYPES: usize = 1024;

/// What a backend's error is to the engine.
pub(super) fn told(error: DomainError) -> GuestError {
    GuestError::State(error.to_string())
}

fn has_data(answer: u64) -> bool {
    let bits = u32::try_from(answer & 0xffff_ffff).unwrap_or(u32::MAX);
    // Types this program does not know have contents like any other page.
    PageType::from_pfinfo(bits).unwrap_or(PageType::Normal).has_data()
}

/// The frames of `domain`, of which there are `frames`, that have contents now, as runs.
pub(super) fn populated(domain: &mut Domain, frames: u64) -> Result<Vec<Range<u64>>, DomainError> {
    let fail = || DomainError::call("find out the types of pages", domain.id, LOG);
    let mut buffer = domain.xen.buffer(TYPES * size_of::<u64>()).map_err(fail())?;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut batch = Vec::with_capacity(TYPES);
    for first in (0..frames).step_by(TYPES) {
        batch.clear();
        batch.extend(first..frames.min(first + u64_of(TYPES)));
        fill_words(&mut buffer, &batch);
        domain.xen.page_types(domain.id, &mut buffer, batch.len()).map_err(fail())?;
        for (frame, _) in batch.iter().zip(buffer.words()).filter(|(_, answer)| has_data(**answer)) {
            match runs.last_mut() {
                Some(run) if run.end == *frame => run.end += 1,
                _ => runs.push(*frame..frame + 1),
            }
        }
    }
    Ok(runs)
}

/// A guest to be saved.
#[derive(Debug)]
pub(super) struct SavedMemory {
    pub(super) domain: DomainId,
    pub(super) frames: u64,
    pub(super) absent: Arc<Absent>,
    pub(super) kept: Arc<Kept>,
}

fn os(doing: &'static str, domain: DomainId) -> impl Fn(io::Error) -> GuestError {
    move |source| told(DomainError::call(doing, domain, LOG)(source))
}

impl GuestMemory for SavedMemory {
    fn pages(&self) -> PageCount {
        PageCount(self.frames)
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        LaneWindow::open(capacity, Beside::Kept(Arc::clone(&self.kept)))
            .map_err(os("make room for pages", self.domain))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        if self.kept.is_alone() {
            return LaneWindow::fill(window, self.domain, pfns, Access::Read, |_| false)
                .map_err(os("find pages that were kept", self.domain));
        }
        // A bit a page; a window has room for a frame's pages, or for a read's.
        let mut absent = Bitmap::new(pfns.len());
        LaneWindow::types(window, self.domain, pfns, |at, answer| {
            if !has_data(answer) {
                absent.set(at);
            }
        })
        .map_err(os("find out the types of pages", self.domain))?;
        LaneWindow::fill(window, self.domain, pfns, Access::Read, |at| absent.get(at))
            .map_err(os("map pages", self.domain))?;
        for (at, pfn) in pfns.iter().enumerate().filter(|(at, _)| !absent.get(*at)) {
            // Gone since its type was asked for, as when the guest gives memory back.
            if window.page(at).is_none() && !self.absent.note(*pfn) {
                return Err(GuestError::State(format!(
                    "cannot map {pfn} of the stopped {}. {LOG}",
                    self.domain
                )));
            }
        }
        Ok(())
    }
    fn keep(&self, pages: &Bitmap) -> Result<(), GuestError> {
        let kept = Xen::open().and_then(|xen| self.kept.add(&xen, self.domain, pages));
        kept.map_err(os("keep pages for the target", self.domain))?;
        if self.absent.is_still() {
            // From the stopped guest on the toolstack may destroy it at any time.
            self.kept.stand_alone();
        }
        Ok(())
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
}

/// A guest to be restored: a span over what the stream says has memory, and pages beside it that come up later. A page that is
/// mapped can't be paged out: with paging there is no span, and windows map what they need for as long as they need it.
#[derive(Debug)]
pub(super) struct RestoredMemory {
    domain: DomainId,
    pages: u64,
    runs: Vec<Range<u64>>,
    /// Made for the first window; none with paging.
    span: OnceLock<Option<Arc<Span>>>,
    paging: OnceLock<Arc<Paging>>,
    /// For pages outside the span only.
    late: Mutex<Late>,
}

/// What populates late pages.
#[derive(Debug)]
struct Late {
    domain: Domain,
    populate: Arc<Mutex<Populate>>,
}

/// Nothing panics while it holds one of these locks, short of a bug that has ended the restore already.
pub(super) fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RestoredMemory {
    /// Populates the frames of `runs`.
    pub(super) fn new(
        domain: &mut Domain,
        populate: &Arc<Mutex<Populate>>,
        pages: u64,
        runs: &[Range<u64>],
    ) -> Result<Self, DomainError> {
        let batch = u64_of(BATCH_PAGES);
        for run in runs {
            let mut first = run.start;
            while first < run.end {
                // Cut between superpages.
                let end = run.end.min((first / batch + 1) * batch);
                lock(populate).ensure(domain, first..end, true, |_, _| {})?;
                first = end;
            }
        }
        let late = Late { domain: Domain::open(domain.id)?, populate: Arc::clone(populate) };
        Ok(Self {
            domain: domain.id,
            pages,
            runs: runs.to_vec(),
            span: OnceLock::new(),
            paging: OnceLock::new(),
            late: Mutex::new(late),
        })
    }

    /// Has the hypervisor page the guest's memory from now on; a sentence about why it can't. To be called before there are
    /// windows.
    pub(super) fn hold_back(&self) -> Result<Held, String> {
        let mut late = lock(&self.late);
        let Late { domain, populate } = &mut *late;
        let paging = Arc::new(Paging::begin(domain, &mut lock(populate), self.pages)?);
        assert!(self.span.set(None).is_ok(), "paging begins before anything is mapped");
        assert!(self.paging.set(Arc::clone(&paging)).is_ok(), "paging begins once");
        Ok(held(self.domain, paging))
    }

    fn span(&self) -> Result<Option<&Arc<Span>>, GuestError> {
        if self.span.get().is_none() {
            let late = lock(&self.late);
            if self.span.get().is_none() {
                let span = Span::map(&late.domain.xen, self.domain, &self.runs, Access::Write)
                    .map_err(os("map pages", self.domain))?;
                assert!(self.span.set(Some(Arc::new(span))).is_ok(), "made under a lock");
            }
        }
        Ok(self.span.get().and_then(Option::as_ref))
    }

    /// Whether `pfn` has been populated since.
    fn is_beside(&self, pfn: Pfn) -> bool {
        let behind = self.runs.partition_point(|run| run.start <= pfn.0);
        behind.checked_sub(1).is_none_or(|at| pfn.0 >= self.runs[at].end)
    }
}

/// `paging` holds back pages of `domain`.
pub(super) fn held(domain: DomainId, paging: Arc<Paging>) -> Held {
    let (cost, guard) = (paging.cost(), paging.guard());
    let stop = Box::new(move || Domain::open(domain).and_then(|mut domain| domain.pause()).map_err(told));
    Held { hold: paging, stop, cost, guard }
}

impl GuestMemory for RestoredMemory {
    fn pages(&self) -> PageCount {
        PageCount(self.pages)
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        let beside = match self.span()? {
            Some(span) => Beside::Span(Arc::clone(span)),
            None => Beside::NothingPagedOut,
        };
        LaneWindow::open(capacity, beside).map_err(os("make room for pages", self.domain))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        if pfns.iter().any(|pfn| self.is_beside(*pfn)) {
            let mut late = lock(&self.late);
            let Late { domain, populate } = &mut *late;
            let beside = pfns.iter().filter(|pfn| self.is_beside(**pfn)).map(|pfn| pfn.0);
            lock(populate).ensure(domain, beside, false, |_, _| {}).map_err(told)?;
        }
        let held = |at: usize| self.paging.get().is_some_and(|paging| paging.is_held(pfns[at]));
        LaneWindow::fill(window, self.domain, pfns, Access::Write, held)
            .map_err(os("map pages", self.domain))?;
        match (0..pfns.len()).find(|at| window.page(*at).is_none()) {
            // Held back by now, if not when it was looked at: who wants to write it sees that once it has claimed it.
            _ if self.paging.get().is_some() => Ok(()),
            None => Ok(()),
            Some(at) => Err(GuestError::State(format!("cannot map {} of {}. {LOG}", pfns[at], self.domain))),
        }
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
    fn starts_zero(&self) -> bool {
        // The hypervisor scrubs what a domain leaves, not what another one is given.
        false
    }
}

const _: () = assert!(BATCH_PAGES.is_multiple_of(512), "superpages are not torn");
