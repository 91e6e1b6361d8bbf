//! A guest backend: a few small traits with batch-shaped calls and errors per page. The engine is generic over
//! them; [`crate::process`] implements them for a process, `sim` for a simulation, xen-glue for Xen domains.

use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::disk::{Disks, WriteLog};
use crate::error::GuestError;
use crate::memory::{GuestPage, Mapping, Window};
use crate::units::{PageCount, Pfn};
use crate::wire::hello::{MigrationId, Secret};

/// A guest's memory, on either end.
pub trait GuestMemory: Send + Sync {
    /// Pages, from pfn 0.
    fn pages(&self) -> PageCount;
    /// Whether the kernel can pin a mapped page: without it there is no O_DIRECT into it and no zero-copy send.
    fn pinnable(&self) -> bool;
    /// A window with room for `capacity` pages.
    fn window(&self, capacity: usize) -> Result<Window, GuestError>;
    /// Maps `pfns` into `window`, in order, instead of what it held. A page that can't be mapped now (ballooned
    /// out, a hole) is `None` there; an error is for the whole batch.
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError>;
    /// Whether a page nobody has written yet reads as zero, on the target.
    fn starts_zero(&self) -> bool {
        true
    }
    /// Keeps `pages` as they are, on the source, where its owner may take the guest away once it is released: they may be
    /// asked for until the drain is over. Called again and again while it runs, each time with all of them.
    fn keep(&self, _pages: &Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
    /// Sets in `into` the pages known never to have been touched, which read as zero, without touching them.
    /// A backend that can't tell sets nothing.
    fn untouched(&self, into: &mut Bitmap) -> Result<(), GuestError>;
}

/// The log of pages the guest dirties, on the source.
pub trait DirtyLog: Send {
    /// Starts tracking: every write from now on is in the next harvest.
    fn arm(&mut self) -> Result<(), GuestError>;
    /// Sets in `into` the pages of the first round: all, unless some have travelled before this engine took over.
    fn first_round(&mut self, into: &mut Bitmap) -> Result<(), GuestError> {
        into.set_all();
        Ok(())
    }
    /// Whether a harvest costs the guest so little that it may be made within a round, to leave out what is dirty again.
    fn is_cheap(&self) -> bool {
        true
    }
    /// Adds the pages written since the last harvest (or `arm`) to `into`, and goes on tracking. Returns how many
    /// bits it set that were clear. If it fails, no page is lost: the next harvest has them.
    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError>;
    /// Stops tracking. Called on every way out; on a guest that is gone it does nothing.
    fn disarm(&mut self) -> Result<(), GuestError>;
}

/// The guest's life on the source.
pub trait SourceLife: Send {
    /// Stops all vCPUs and waits for I/O in flight. When it returns, neither memory nor disk changes.
    fn pause(&mut self) -> Result<(), GuestError>;
    /// Lets a paused guest go on.
    fn resume(&mut self) -> Result<(), GuestError>;
    /// The paused guest's state outside memory (vCPUs, devices).
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError>;
    /// Slows the guest to `percent` of its speed; 100 is full speed.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;
    /// Gives the paused guest up: from now on it is not resumed when this engine dies. Memory stays as it is.
    fn release(&mut self) -> Result<(), GuestError>;
    /// Takes a released guest back, still paused: the target answered that it never started it.
    fn reclaim(&mut self) -> Result<(), GuestError>;
    /// Ends the released guest and frees its memory: the target has every page.
    fn destroy(&mut self) -> Result<(), GuestError>;
}

/// The guest's life on the target. Dropping it before `start` leaves nothing behind.
pub trait TargetLife: Send {
    /// Loads the state outside memory.
    fn load_state(&mut self, state: &[u8]) -> Result<(), GuestError>;
    /// Lets the guest run. When it returns, its vCPUs are going; an error says that none of them has run.
    fn start(&mut self) -> Result<(), GuestError>;
    /// Stops a started guest whose outstanding pages can't be had any more; it is never left running on wrong ones.
    fn stop(&mut self) -> Result<(), GuestError>;
}

/// What the target may do with pages that are not there yet.
pub trait HoldBack: Send + Sync {
    /// Takes the pages of `outstanding` away from the guest, whatever they held, before it starts: an access from
    /// it or on its behalf waits. Pages not named are the guest's.
    fn hold_back(&self, outstanding: &Bitmap) -> Result<(), GuestError>;
    /// Whether holding a page back takes long, so that it is done page by page with [`Self::hold_ahead`] while the rounds
    /// come in, and [`Self::hold_back`] is asked for such pages only.
    fn holds_ahead(&self) -> bool {
        false
    }
    /// Holds back one outstanding page that nobody writes meanwhile. False if it can't be: it is loaded before the start.
    fn hold_ahead(&self, _pfn: Pfn) -> Result<bool, GuestError> {
        Ok(false)
    }
    /// Whether [`Self::hold_ahead`] has held back `pfn`, and it was not released since.
    fn is_held(&self, _pfn: Pfn) -> bool {
        false
    }
    /// A held page that the running guest has given back instead of touching it: its content is of no use any more.
    fn given_up(&self) -> Option<Pfn> {
        None
    }
    /// Gives the guest one held page with this content, atomically, and wakes who waits for it.
    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError>;
    /// Answers a fault on a page that is not held (never touched, or released meanwhile).
    fn wake(&self, pfn: Pfn) -> Result<(), GuestError>;
    /// The next page an access waits for, `None` when `timeout` has passed. One task calls it.
    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError>;
    /// Ends holding back: no page is outstanding any more.
    fn finish(&self) -> Result<(), GuestError>;
    /// Puts by, where the guest's backend can keep it, what another engine needs to go on if this one is lost while pages are
    /// held back. Called before the guest starts; a backend that keeps nothing loses only that.
    fn keep(&self, session: &Session<'_>) -> Result<(), GuestError> {
        let _ = session;
        Ok(())
    }
    /// Memory for the engine's table of pages, zeroes, where what holds pages back has some that another engine finds again.
    fn table(&self) -> Option<Arc<Mapping>> {
        None
    }
    /// Goes on where an engine has stopped that had such a table: of the pages in `left`, which it has left outstanding, those stay
    /// that are not there yet, and they are held.
    fn take_up(&self, left: &mut Bitmap) -> Result<(), GuestError> {
        let _ = left;
        Err(GuestError::State("this guest's backend keeps no table of its pages".to_owned()))
    }
    /// Sets in `into` (a bit a page) the pages that are not there, for an engine that goes on after another one was lost.
    fn absent(&self, into: &mut Bitmap) -> Result<(), GuestError> {
        let _ = into;
        Err(GuestError::State("this guest's backend can't tell which of its pages are missing".to_owned()))
    }
}

/// What makes a connection of the source's one of this migration's.
#[derive(Clone, Copy)]
pub struct Session<'a> {
    /// The migration.
    pub migration: MigrationId,
    /// What the source shows when it comes in again.
    pub secret: &'a Secret,
    /// Lanes it comes with.
    pub lanes: u8,
}

/// Keeps the target's own guest from overwriting disk blocks that outstanding pages still need.
pub trait WriteGate: Send + Sync {
    /// Writes to these pieces of `disk` (a bit per 4 KiB) wait from now on.
    fn hold(&self, disk: crate::units::DiskId, blocks: &Bitmap) -> Result<(), GuestError>;
    /// Block number `block` (4 KiB units) of `disk` is not needed any more.
    fn open(&self, disk: crate::units::DiskId, block: u64);
    /// A block a write waits for, to be loaded first; `None` when nothing waits.
    fn wanted(&self) -> Option<(crate::units::DiskId, u64)>;
}

/// A guest on the source.
pub struct SourceGuest {
    /// Its memory.
    pub memory: Arc<dyn GuestMemory>,
    /// Its dirty log.
    pub dirty: Box<dyn DirtyLog>,
    /// Its life.
    pub life: Box<dyn SourceLife>,
    /// Its disks, opened for reading.
    pub disks: Arc<dyn Disks>,
    /// What it writes to them.
    pub writes: Box<dyn WriteLog>,
}

/// A guest to be on the target.
pub struct TargetGuest {
    /// Its memory, all untouched.
    pub memory: Arc<dyn GuestMemory>,
    /// Its life.
    pub life: Box<dyn TargetLife>,
    /// Lazy pages; `None` where this host can't, with the reason.
    pub lazy: Result<Arc<dyn HoldBack>, String>,
    /// Gate before its disks, where the backend is ours.
    pub gate: Option<Arc<dyn WriteGate>>,
}
