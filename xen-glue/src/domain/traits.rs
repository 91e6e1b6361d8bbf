//! What a save and a restore ask of a domain. The phases are generic over these, so that tests run them over a
//! domain made up in memory.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mover::bitmap::{Bitmap, SharedBitmap, bits_of};
use mover::error::GuestError;
use mover::guest::{GuestMemory, HoldBack};
use mover::memory::{GuestPage, PageBuf};
use mover::units::{Pfn, usize_of};

use super::{DomainError, FinalState, Frames, Guarded, PagingCost, StaticState, Wiring};
use crate::abi::Part;
use crate::stream::{DomainHeader, GuestType, P2mFrames, PageEntry};

/// What a domain is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It runs, or could.
    Running,
    /// It has suspended itself.
    Suspended,
    /// It has shut down for another reason (`SHUTDOWN_*` of `sched.h`).
    ShutDown(u32),
}

/// Which reading of the log of written pages this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogRead {
    /// Between rounds.
    Round,
    /// The last: pages that the hypervisor itself has mapped count as written.
    Last,
}

/// A batch of pages, used again for every one.
#[derive(Debug, Default)]
pub struct Batch {
    /// The pages asked for, in their order, less those that need not be named in the stream.
    pub entries: Vec<PageEntry>,
    /// Pages that could not be had as they are now, and are to be sent again once the guest stands still.
    pub deferred: Vec<u64>,
}

/// Pages that a lane could not have as they were, to be looked at again: what [`Batch::deferred`] is to the stream.
#[derive(Debug)]
pub struct Absent {
    pages: SharedBitmap,
    /// The guest has stopped: a page that can't be had is an error.
    still: AtomicBool,
}

impl Absent {
    /// None yet, of a guest with so many frames.
    #[must_use]
    pub fn new(frames: u64) -> Arc<Self> {
        Arc::new(Self { pages: SharedBitmap::new(usize_of(frames)), still: AtomicBool::new(false) })
    }
    /// The guest has stopped.
    pub fn stand_still(&self) {
        self.still.store(true, Ordering::SeqCst);
    }
    /// Whether it has stopped.
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.still.load(Ordering::SeqCst)
    }
    /// Notes one; false if the guest has stopped.
    pub fn note(&self, pfn: Pfn) -> bool {
        self.pages.set(pfn.index());
        !self.still.load(Ordering::SeqCst)
    }
    /// Adds them to `into`, and forgets them.
    pub fn take(&self, into: &mut Bitmap) {
        for word in 0..self.pages.words() {
            for bit in bits_of(self.pages.take_word(word)) {
                into.set(word * 64 + bit);
            }
        }
    }
}

/// A domain to be saved. Dropping it leaves nothing behind but what [`Self::log_on`] and [`Self::slow_down`] have done.
pub trait Source {
    /// For the stream's header.
    fn header(&self) -> DomainHeader;
    /// Frames 0 up to this may be the guest's.
    fn pages(&self) -> u64;
    /// Most pages of a batch.
    fn batch_pages(&self) -> usize;
    /// What it can't change.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn static_state(&mut self) -> Result<StaticState, DomainError>;
    /// Of a PV guest, where its table of frames is.
    fn table_frames(&self) -> Option<P2mFrames>;
    /// What it is doing.
    ///
    /// # Errors
    /// The domain is gone.
    fn life(&mut self) -> Result<Life, DomainError>;
    /// Fails if the guest has done something that a save in progress can't follow.
    ///
    /// # Errors
    /// It has.
    fn check(&mut self) -> Result<(), DomainError>;
    /// Starts logging written pages.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn log_on(&mut self) -> Result<(), DomainError>;
    /// Replaces `into` by the pages written since the last reading, or since [`Self::log_on`]. Returns how many.
    ///
    /// # Errors
    /// The hypervisor refused; the log is as it was.
    fn log_read(&mut self, which: LogRead, into: &mut Bitmap) -> Result<u64, DomainError>;
    /// Stops logging. On a domain that is gone it does nothing.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn log_off(&mut self) -> Result<(), DomainError>;
    /// Lets the running guest have only `percent` of its processor time, so that it writes less.
    ///
    /// # Errors
    /// The hypervisor refused, or its scheduler can't; the guest may be slowed down or not.
    fn slow_down(&mut self, percent: u8) -> Result<(), DomainError>;
    /// Undoes that. On a domain that is not slowed down, or is gone, it does nothing.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn full_speed(&mut self) -> Result<(), DomainError>;
    /// Has the pages `pfns` ready, at most [`Self::batch_pages`] of them, instead of those before. `still` says that
    /// the guest has stopped: a page that can't be had then is an error.
    ///
    /// # Errors
    /// The hypervisor refused, or the guest is inconsistent.
    fn fetch(&mut self, pfns: &[u64], still: bool, batch: &mut Batch) -> Result<(), DomainError>;
    /// The content of page `at` of the batch, counted over those that have one.
    ///
    /// # Panics
    /// If there is no such page.
    fn content(&self, at: usize) -> Part<'_>;
    /// Lets go of the batch.
    ///
    /// # Errors
    /// Unmapping failed.
    fn release(&mut self) -> Result<(), DomainError>;
    /// Whether lanes can read its memory as it is.
    fn ferries(&self) -> bool {
        false
    }
    /// Its memory for lanes, each with mappings of its own; pages that can't be had go to `absent`. Asked for where
    /// [`Self::ferries`].
    ///
    /// # Errors
    /// The hypervisor refused.
    fn memory(&mut self, _absent: &Arc<Absent>) -> Result<Arc<dyn GuestMemory>, DomainError> {
        unreachable!("lanes are not asked of a domain that has none")
    }
    /// The frames that have contents now, in ascending runs that neither touch nor overlap.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn populated(&mut self) -> Result<Vec<Range<u64>>, DomainError> {
        unreachable!("lanes are not asked of a domain that has none")
    }
    /// Adds to `into` the frames that others have mapped, or may map at any time: a backend's request may be under way to them.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn granted(&mut self, _into: &mut Bitmap) -> Result<(), DomainError> {
        Ok(())
    }
    /// What the stopped guest is besides its memory.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn final_state(&mut self) -> Result<FinalState, DomainError>;
}

/// Begins to hold pages back; from another thread than the target's.
pub type Lazy = Box<dyn FnOnce() -> Result<Held, String> + Send>;

/// A guest whose pages can be held back.
pub struct Held {
    /// What does that.
    pub hold: Arc<dyn HoldBack>,
    /// Stops the running guest, which keeps its memory.
    pub stop: Box<dyn FnMut() -> Result<(), GuestError> + Send>,
    /// What it costs.
    pub cost: Arc<PagingCost>,
    /// Who goes on if this process is killed.
    pub guard: Guarded,
}

/// A domain to be restored, created by the toolstack, without memory. It is the toolstack's to destroy if this fails.
pub trait Target {
    /// The kind of stream it can be restored from.
    fn guest(&self) -> GuestType;
    /// Most pages of a batch.
    fn batch_pages(&self) -> usize;
    /// Virtual CPUs a PV guest's stream may have state of; they are numbered from 0.
    fn vcpus(&self) -> u32;
    /// Sets what the guest can't change; what is missing is left to the toolstack.
    ///
    /// # Errors
    /// The hypervisor refused, or it does not fit this domain.
    fn set_static_state(&mut self, state: &StaticState) -> Result<(), DomainError>;
    /// Tells of a PV guest's table of frames.
    ///
    /// # Errors
    /// It can't be.
    fn set_table_frames(&mut self, frames: P2mFrames) -> Result<(), DomainError>;
    /// Populates the pages of `entries`, at most [`Self::batch_pages`] of them, where they are not yet, and has those
    /// with contents ready for writing, instead of those before. Returns how many these are.
    ///
    /// # Errors
    /// No memory, or pages that can't be.
    fn place(&mut self, entries: &[PageEntry]) -> Result<usize, DomainError>;
    /// Page `at` of the batch, counted over those with contents, for writing.
    ///
    /// # Panics
    /// If there is no such page.
    fn page(&self, at: usize) -> GuestPage<'_>;
    /// The batch's contents have been written: makes them this host's.
    ///
    /// # Errors
    /// Contents that can't be.
    fn settle(&mut self) -> Result<(), DomainError>;
    /// Where page `at` of the batch is not what the stream says it should be: from the first byte that differs to
    /// behind the last.
    ///
    /// # Errors
    /// Contents that can't be.
    fn difference(&self, at: usize, expected: &mut PageBuf) -> Result<Option<Range<usize>>, DomainError>;
    /// Whether lanes can write its memory as it comes.
    fn ferries(&self) -> bool {
        false
    }
    /// Gives memory to the frames of `populated`, runs that ascend, and returns the memory of all `pages` for lanes. Asked
    /// for where [`Self::ferries`].
    ///
    /// # Errors
    /// No memory, or the hypervisor refused.
    fn memory(
        &mut self,
        _pages: u64,
        _populated: &[Range<u64>],
    ) -> Result<Arc<dyn GuestMemory>, DomainError> {
        unreachable!("lanes are not asked of a domain that has none")
    }
    /// Has the memory that [`Self::memory`] returned hold pages back, so that the guest can run before they are there; to be
    /// asked for before anything of it is mapped. Else a sentence about why it can't.
    fn hold_back(&self) -> Lazy {
        Box::new(|| Err("this guest's pages can't be paged out: it is no HVM or PVH guest".to_owned()))
    }
    /// Gives the guest the rest of its state. It is ready to run then.
    ///
    /// # Errors
    /// The hypervisor refused, or the state can't be.
    fn finish(&mut self, state: &FinalState, wiring: &Wiring) -> Result<Frames, DomainError>;
}

/// Where two pages differ: from the first byte to behind the last.
pub(crate) fn difference(one: &PageBuf, other: &PageBuf) -> Option<Range<usize>> {
    let differs = |at: &usize| one.0[*at] != other.0[*at];
    let first = (0..one.0.len()).find(differs)?;
    let last = (first..one.0.len()).rfind(differs)?;
    Some(first..last + 1)
}
