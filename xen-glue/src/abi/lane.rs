//! A domain's pages as the engine's lanes see them: windows of a batch, mapped anew for every batch (a running guest's pages
//! come and go), and a span over all of a restored guest's, mapped once, so that a lane only computes addresses. Pages of a
//! saved guest that are still wanted when its toolstack has destroyed it are kept mapped: that keeps them.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use mover::bitmap::Bitmap;
use mover::memory::Window;
use mover::units::{Pfn, u64_of, usize_of};

use super::window::{Access, ForeignWindow};
use super::{DomainId, HypercallBuffer, Xen};

/// Frames of one mapping of a span: 512 MiB, so that the largest guest takes some hundred of them.
const SPAN_FRAMES: usize = 128 * 1024;
/// Frames whose types are asked for at once.
const TYPES: usize = 1024;

/// Frames of a guest, mapped once. Unmapped on drop.
#[derive(Debug)]
pub struct Span {
    windows: Vec<ForeignWindow>,
    /// First frame, frames, window, and the place of the first frame in that window; ascending.
    runs: Vec<(u64, u64, usize, usize)>,
}

impl Span {
    /// Maps the frames of `runs`, which ascend.
    ///
    /// # Errors
    /// What `mmap(2)` or privcmd says, of the whole or of the first frame that could not be mapped.
    pub fn map(xen: &Xen, domain: DomainId, runs: &[Range<u64>], access: Access) -> io::Result<Self> {
        let mut span = Self { windows: Vec::new(), runs: Vec::with_capacity(runs.len()) };
        let mut frames = Vec::with_capacity(SPAN_FRAMES);
        for run in runs {
            let mut first = run.start;
            while first < run.end {
                if frames.len() == SPAN_FRAMES {
                    span.add(xen, domain, &mut frames, access)?;
                }
                let end = run.end.min(first + u64_of(SPAN_FRAMES - frames.len()));
                span.runs.push((first, end - first, span.windows.len(), frames.len()));
                frames.extend(first..end);
                first = end;
            }
        }
        if !frames.is_empty() {
            span.add(xen, domain, &mut frames, access)?;
        }
        Ok(span)
    }

    fn add(&mut self, xen: &Xen, domain: DomainId, frames: &mut Vec<u64>, access: Access) -> io::Result<()> {
        let mut window = ForeignWindow::reserve(xen, frames.len())?;
        let errors = window.map(domain, frames, access)?;
        if let Some(error) = errors.iter().find(|error| **error != 0) {
            return Err(io::Error::from_raw_os_error(-error));
        }
        self.windows.push(window);
        frames.clear();
        Ok(())
    }

    /// Where `frame` is mapped, if it is.
    fn address(&self, frame: u64) -> Option<NonNull<u8>> {
        let behind = self.runs.partition_point(|run| run.0 <= frame);
        let (first, frames, window, place) = *self.runs.get(behind.checked_sub(1)?)?;
        let inside = frame - first;
        if inside >= frames {
            return None;
        }
        self.windows[window].page_address(place + usize_of(inside))
    }

    /// Whether `frame` is mapped.
    #[must_use]
    pub fn has(&self, frame: u64) -> bool {
        self.address(frame).is_some()
    }
}

/// Pages that stay mapped, and so stay, when their domain is destroyed. It only grows.
#[derive(Debug)]
pub struct Kept {
    spans: Mutex<(Vec<Span>, Bitmap)>,
    /// Windows are filled from here alone.
    alone: AtomicBool,
}

impl Kept {
    /// None yet, of a guest with so many frames.
    #[must_use]
    pub fn new(frames: u64) -> Arc<Self> {
        let spans = Mutex::new((Vec::new(), Bitmap::new(usize_of(frames))));
        Arc::new(Self { spans, alone: AtomicBool::new(false) })
    }

    /// Keeps `pages` too.
    ///
    /// # Errors
    /// As [`Span::map`].
    pub fn add(&self, xen: &Xen, domain: DomainId, pages: &Bitmap) -> io::Result<()> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = pages.clone();
        fresh.subtract(&spans.1);
        let (mut runs, mut at) = (Vec::new(), 0);
        while let Some((first, end)) = fresh.next_run(at) {
            runs.push(u64_of(first)..u64_of(end));
            at = end;
        }
        if !runs.is_empty() {
            let span = Span::map(xen, domain, &runs, Access::Read)?;
            spans.0.push(span);
            spans.1.union(&fresh);
        }
        Ok(())
    }

    /// From here on there is nothing of the guest but what is kept.
    pub fn stand_alone(&self) {
        self.alone.store(true, SeqCst);
    }

    /// Whether there is nothing else.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.alone.load(SeqCst)
    }

    fn address(&self, frame: u64) -> Option<NonNull<u8>> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.0.iter().find_map(|span| span.address(frame))
    }
}

/// Where a window looks before it maps a page of its own.
#[derive(Clone, Debug)]
pub enum Beside {
    /// Nowhere.
    Nothing,
    /// Nowhere; and a page that is paged out is a hole, for who pages it in itself.
    NothingPagedOut,
    /// In a span.
    Span(Arc<Span>),
    /// Where that is all there is: among kept pages.
    Kept(Arc<Kept>),
}

impl Beside {
    fn address(&self, frame: u64) -> Option<NonNull<u8>> {
        match self {
            Self::Nothing | Self::NothingPagedOut => None,
            Self::Span(span) => span.address(frame),
            Self::Kept(kept) if kept.is_alone() => kept.address(frame),
            Self::Kept(_) => None,
        }
    }
    fn is_all(&self) -> bool {
        matches!(self, Self::Kept(kept) if kept.is_alone())
    }
}

/// What stands behind a lane's window: a handle to the hypervisor and a mapping of its own.
#[derive(Debug)]
pub struct LaneWindow {
    xen: Xen,
    frames: HypercallBuffer,
    foreign: ForeignWindow,
    beside: Beside,
    wanted: Vec<u64>,
    addresses: Vec<Option<NonNull<u8>>>,
}

// SAFETY: the addresses are of the mappings beside them, which belong to no thread. Worth it: a window is made on one thread
// and used by the lane's.
unsafe impl Send for LaneWindow {}

impl LaneWindow {
    /// A window with room for `capacity` pages; what is to be had `beside` it is taken from there.
    ///
    /// # Errors
    /// As [`Xen::open`].
    pub fn open(capacity: usize, beside: Beside) -> io::Result<Window> {
        let xen = Xen::open()?;
        let frames = xen.buffer(TYPES * size_of::<u64>())?;
        let foreign = ForeignWindow::reserve(&xen, capacity)?;
        let foreign = if matches!(beside, Beside::NothingPagedOut) { foreign.impatient() } else { foreign };
        let (wanted, addresses) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        let mut window = Window::with_capacity(capacity);
        window.backing = Some(Box::new(Self { xen, frames, foreign, beside, wanted, addresses }));
        Ok(window)
    }

    fn of(window: &mut Window) -> &mut Self {
        let backing = window.backing.as_mut().and_then(|backing| backing.downcast_mut::<Self>());
        match backing {
            Some(lane) => lane,
            None => panic!("a window is filled by the memory that made it"),
        }
    }

    /// What the hypervisor says of the types of `pfns`, in bits 28 to 31 of a word each, which `each` is told with its place.
    ///
    /// # Errors
    /// What the hypervisor says.
    pub fn types(
        window: &mut Window,
        domain: DomainId,
        pfns: &[Pfn],
        mut each: impl FnMut(usize, u64),
    ) -> io::Result<()> {
        let lane = Self::of(window);
        for (number, some) in pfns.chunks(TYPES).enumerate() {
            for (word, pfn) in lane.frames.words_mut().iter_mut().zip(some) {
                *word = pfn.0;
            }
            lane.xen.page_types(domain, &mut lane.frames, some.len())?;
            let answers = &lane.frames.words()[..some.len()];
            answers.iter().enumerate().for_each(|(at, answer)| each(number * TYPES + at, *answer));
        }
        Ok(())
    }

    /// Fills `window` with `pfns` in their order, instead of what it held: `None` where `skip` says so or a page could not
    /// be mapped.
    ///
    /// # Errors
    /// What `mmap(2)` or privcmd says of the batch as a whole.
    pub fn fill(
        window: &mut Window,
        domain: DomainId,
        pfns: &[Pfn],
        access: Access,
        skip: impl Fn(usize) -> bool,
    ) -> io::Result<()> {
        window.clear();
        let Self { foreign, beside, wanted, addresses, .. } = Self::of(window);
        let spanned = |pfn: &Pfn| beside.address(pfn.0);
        let skip = |at: usize| skip(at) || beside.is_all() && spanned(&pfns[at]).is_none();
        wanted.clear();
        wanted.extend(
            pfns.iter()
                .enumerate()
                .filter(|(at, pfn)| !skip(*at) && spanned(pfn).is_none())
                .map(|(_, pfn)| pfn.0),
        );
        foreign.map(domain, wanted, access)?;
        addresses.clear();
        let mut mapped = 0;
        for (at, pfn) in pfns.iter().enumerate() {
            let address = match spanned(pfn) {
                _ if skip(at) => None,
                Some(address) => Some(address),
                None => {
                    mapped += 1;
                    foreign.page_address(mapped - 1)
                }
            };
            addresses.push(address);
        }
        let addresses = std::mem::take(addresses);
        for address in &addresses {
            // SAFETY: a page of a span or of the lane's own mapping. Both are kept by the window's backing; the latter is
            // mapped anew only here, where the window has been cleared before. Worth it: lanes read and write the domain's
            // pages where they are.
            unsafe { window.push(*address) };
        }
        Self::of(window).addresses = addresses;
        Ok(())
    }
}
