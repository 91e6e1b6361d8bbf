//! Where pages come down on the target: the table, guest memory, and the moment at which the guest starts.
//!
//! Until then a page is written through a window. From then on an outstanding page is given to the guest whole, by
//! [`HoldBack::release`], and a page that is there is the guest's and not touched again. In between lies the switch:
//!
//! ```text
//!   early ------------------> switching ------------------> held
//!   write through a window    nothing is written; what was   release outstanding pages,
//!                             being written is waited for    drop everything else
//!                                       `-----------------> sealed
//!                                        nothing outstanding drop everything
//! ```
//! Whoever writes claims the page first and reads the mode after; [`Landing::hold_back`] and [`Landing::seal`] set the mode first and reads
//! the table after. So either the writer sees the switch, or the switch sees the writer's claim and waits.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::error::{Error, GuestError};
use crate::guest::{GuestMemory, HoldBack};
use crate::memory::{GuestPage, PageBuf, Window};
use crate::pipeline::Failure;
use crate::pipeline::table::{Claim, PageTable, State};
use crate::runtime::{Bell, Runtime};
use crate::sync::{AtomicBool, AtomicU8, Ordering::SeqCst};
use crate::units::{PAGE_BYTES, Pfn, Version};

const EARLY: u8 = 0;
const SWITCHING: u8 = 1;
const HELD: u8 = 2;
const SEALED: u8 = 3;
/// How long to wait on the `settled` bell before looking again whether the migration has failed.
const GLANCE: Duration = Duration::from_millis(20);

/// Running counts of the target, read by the reporter.
#[derive(Default)]
pub struct Counts {
    /// References loaded and checked.
    pub checked: AtomicU64,
    /// Those whose bytes were not the page's, or could not be read.
    pub failed: AtomicU64,
    /// Bytes read from disks.
    pub disk_bytes: AtomicU64,
    /// Microseconds with at least one read in flight.
    pub disk_busy_us: AtomicU64,
    /// Faults on held pages answered.
    pub faults: AtomicU64,
    /// Pages compared with their digest.
    pub verified: AtomicU64,
    /// Pages of those that differed.
    pub mismatched: AtomicU64,
    /// The first of those, plus one.
    pub first_mismatch: AtomicU64,
    /// Pages loaded straight into guest memory.
    pub direct: AtomicU64,
}

impl Counts {
    /// Counts a page that differs from its digest.
    pub fn mismatch(&self, pfn: Pfn) {
        self.mismatched.fetch_add(1, SeqCst);
        let _ = self.first_mismatch.compare_exchange(0, pfn.0 + 1, SeqCst, SeqCst);
    }
}

/// The bytes of a page that is to land.
pub enum Incoming<'a> {
    /// In a buffer of its own.
    Page(&'a mut PageBuf),
    /// Where a disk's read put them, and a buffer for the one place that takes whole buffers only.
    Staged(&'a [u8; PAGE_BYTES], &'a mut PageBuf),
}

impl Incoming<'_> {
    fn copy_into(&self, target: GuestPage<'_>) {
        match self {
            Self::Page(page) => target.copy_from(page),
            Self::Staged(bytes, _) => target.copy_from_slice(*bytes),
        }
    }
    fn whole(&mut self) -> GuestPage<'_> {
        match self {
            Self::Page(page) => page.as_guest_page(),
            Self::Staged(bytes, buffer) => {
                buffer.0.copy_from_slice(*bytes);
                buffer.as_guest_page()
            }
        }
    }
}

/// What became of a page that was to land.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Landed {
    /// It is in the guest's memory now.
    Placed,
    /// Something newer was there.
    Dropped,
}

/// Where pages land.
pub struct Landing {
    /// What is known of each page.
    pub table: PageTable,
    /// The guest's memory.
    pub memory: Arc<dyn GuestMemory>,
    /// Time and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Where tasks say that they failed.
    pub failure: Arc<Failure>,
    /// Counts.
    pub counts: Counts,
    /// Rung when claimed pages have been settled, and when the mode changes.
    pub settled: Bell,
    /// Rung when there are references to load, pages to ask for, or the end has come.
    pub work: Bell,
    /// Set while the guest changes hands and nobody waits for what is outstanding: what is read meanwhile keeps the
    /// record of the handover waiting at the same disk, and the guest with it.
    pub hushed: AtomicBool,
    mode: AtomicU8,
    hold: OnceLock<Arc<dyn HoldBack>>,
    /// Outstanding pages held back before the switch.
    ahead: AtomicU64,
}

impl Landing {
    /// For a guest that has not started.
    #[must_use]
    pub fn new(memory: Arc<dyn GuestMemory>, runtime: Arc<dyn Runtime>, failure: Arc<Failure>) -> Self {
        let table = PageTable::new(memory.pages());
        Self::with(table, memory, runtime, failure)
    }

    /// As [`Self::new`], with this table of the guest's pages.
    pub(crate) fn with(
        table: PageTable,
        memory: Arc<dyn GuestMemory>,
        runtime: Arc<dyn Runtime>,
        failure: Arc<Failure>,
    ) -> Self {
        Self {
            table,
            memory,
            runtime,
            failure,
            counts: Counts::default(),
            settled: Bell::default(),
            work: Bell::default(),
            hushed: AtomicBool::new(false),
            mode: AtomicU8::new(EARLY),
            hold: OnceLock::new(),
            ahead: AtomicU64::new(0),
        }
    }

    /// Lets pages be held back one by one from now on, before the switch.
    ///
    /// # Panics
    /// If there is something already that holds pages back.
    pub fn hold_ahead_with(&self, hold: &Arc<dyn HoldBack>) {
        assert!(self.hold.set(Arc::clone(hold)).is_ok(), "pages are held back once");
    }

    /// Holds back the page of this reference, unless something newer has come meanwhile, or it can't be.
    pub fn hold_ahead(&self, pfn: Pfn, version: Version) -> Result<bool, Error> {
        let Some(hold) = self.hold.get() else { return Ok(false) };
        if !self.is_early() || !self.table.claim_load(pfn, version) {
            return Ok(false);
        }
        self.runtime.interleave();
        // The switch waits for the claim. Until it is given back nobody else writes the page, or holds it.
        let held = if hold.is_held(pfn) { Ok(false) } else { hold.hold_ahead(pfn) };
        if let Ok(true) = held {
            self.ahead.fetch_add(1, SeqCst);
        }
        self.give_back(pfn, version, State::Outstanding(version));
        Ok(held?)
    }

    /// Gives back a claimed page that is still to be loaded.
    pub(super) fn give_back(&self, pfn: Pfn, version: Version, before: State) {
        self.table.unclaim(pfn, version, before);
        self.runtime.ring(&self.settled);
        // The loader may have passed it over while it was claimed.
        if self.table.wanted.set(pfn.index()) {
            self.runtime.ring(&self.work);
        }
    }

    /// Whether pages are held back now, before the switch.
    #[must_use]
    pub fn holds_ahead(&self) -> bool {
        self.is_early() && self.hold.get().is_some()
    }

    /// Whether `pfn` is held back before the switch. It stays so or not while the caller has it claimed.
    #[must_use]
    pub fn is_ahead(&self, pfn: Pfn) -> bool {
        self.ahead.load(SeqCst) > 0 && self.hold.get().is_some_and(|hold| hold.is_held(pfn))
    }

    /// Outstanding pages that keep the guest from starting: those that are not held back where that is done ahead.
    #[must_use]
    pub fn in_the_way(&self) -> u64 {
        self.table.outstanding().saturating_sub(self.ahead.load(SeqCst))
    }

    /// The guest has given `pfn` back, which it may do with a page it has not got yet: nothing is to be loaded for it.
    pub fn give_up(&self, pfn: Pfn) {
        if let State::Outstanding(version) = self.table.state(pfn)
            && self.table.claim_load(pfn, version)
        {
            self.table.placed(pfn, version, State::Outstanding(version));
            self.runtime.ring(&self.settled);
            self.runtime.ring(&self.work);
        }
    }

    /// Whether pages may be written through a window. Asked before a claim it is advice; after one, a yes is the truth.
    #[must_use]
    pub fn is_early(&self) -> bool {
        self.mode.load(SeqCst) == EARLY
    }

    /// Claims `pfn` as this moment allows. `Busy` also while the mode switches: wait with [`Self::wait_settled`].
    pub fn claim(&self, pfn: Pfn, version: Version) -> Claim {
        self.claim_in(self.mode.load(SeqCst), pfn, version)
    }

    /// Claims `pfn` to write it through a window, by whatever way; `Busy` also once the mode has changed: [`Self::land`] it then.
    pub fn claim_early(&self, pfn: Pfn, version: Version) -> Claim {
        // Looked at here and not before: a mode seen earlier may be over, and the claim one of a page that is held.
        if self.is_early() { self.claim_in(EARLY, pfn, version) } else { Claim::Busy }
    }

    fn claim_in(&self, mode: u8, pfn: Pfn, version: Version) -> Claim {
        let claim = match mode {
            SWITCHING => return Claim::Busy,
            SEALED => return Claim::Stale,
            _ => self.table.claim(pfn, version, mode != EARLY),
        };
        self.runtime.interleave();
        if let Claim::Granted(before) = claim
            && self.mode.load(SeqCst) != mode
        {
            self.table.unclaim(pfn, version, before);
            self.runtime.ring(&self.settled);
            return Claim::Busy;
        }
        claim
    }

    /// Waits until some page settles or the mode changes; `heard` is the bell's count read before looking.
    pub fn wait_settled(&self, heard: u32) -> Result<(), Error> {
        self.failure.check()?;
        self.runtime.wait(&self.settled, heard, GLANCE);
        Ok(())
    }

    /// Lands a page that arrived as data: waits for whoever writes an older version, then writes it or drops it.
    pub fn land(
        &self,
        pfn: Pfn,
        version: Version,
        page: &mut PageBuf,
        window: &mut Window,
    ) -> Result<Landed, Error> {
        loop {
            let heard = self.settled.heard();
            match self.claim(pfn, version) {
                Claim::Granted(before) => {
                    return self.write(pfn, version, before, Incoming::Page(page), window);
                }
                Claim::Stale => return Ok(Landed::Dropped),
                Claim::Busy => self.wait_settled(heard)?,
            }
        }
    }

    /// Lands a page that was loaded for the reference of `version`, unless something newer has come meanwhile. While
    /// the mode switches the page is dropped and wanted again.
    pub fn land_load(
        &self,
        pfn: Pfn,
        version: Version,
        page: Incoming<'_>,
        window: &mut Window,
    ) -> Result<Landed, Error> {
        loop {
            let mode = self.mode.load(SeqCst);
            if mode == SWITCHING {
                // The loader holds the claims of its other loads, for which the switch waits: it must not wait for
                // the switch. The page is loaded again behind it.
                self.table.wanted.set(pfn.index());
                self.runtime.ring(&self.work);
                return Ok(Landed::Dropped);
            }
            if !self.table.claim_load(pfn, version) {
                match self.table.state(pfn) {
                    // It is just being held back, or was a moment ago: it is still to be loaded.
                    State::Busy(other) if other == version => {
                        self.table.wanted.set(pfn.index());
                        self.runtime.ring(&self.work);
                    }
                    State::Outstanding(other) if other == version => continue,
                    _ => {}
                }
                return Ok(Landed::Dropped);
            }
            self.runtime.interleave();
            let before = State::Outstanding(version);
            if self.mode.load(SeqCst) == mode {
                return self.write(pfn, version, before, page, window);
            }
            self.table.unclaim(pfn, version, before);
            self.runtime.ring(&self.settled);
        }
    }

    /// Writes a claimed page and settles it. On an error it goes back to what it was: an outstanding page is held
    /// back or loaded again, so what was written of it is never seen.
    pub(super) fn write(
        &self,
        pfn: Pfn,
        version: Version,
        before: State,
        mut page: Incoming<'_>,
        window: &mut Window,
    ) -> Result<Landed, Error> {
        let ahead = self.is_ahead(pfn);
        let written = match self.hold.get() {
            // A claim made early outlives the mode by a moment: until the switch has waited for it, the page is nobody's else
            // to write, and not held yet.
            Some(hold) if self.mode.load(SeqCst) == HELD || ahead => hold.release(pfn, page.whole()),
            _ => self.write_early(pfn, &page, window),
        };
        if ahead && written.is_ok() {
            self.ahead.fetch_sub(1, SeqCst);
        }
        match written {
            Ok(()) => self.table.placed(pfn, version, before),
            Err(_) => self.table.unclaim(pfn, version, before),
        }
        self.runtime.ring(&self.settled);
        written?;
        Ok(Landed::Placed)
    }

    fn write_early(&self, pfn: Pfn, page: &Incoming<'_>, window: &mut Window) -> Result<(), GuestError> {
        self.memory.map(&[pfn], window)?;
        match window.page(0) {
            Some(target) => {
                page.copy_into(target);
                Ok(())
            }
            None => Err(GuestError::State(format!("{pfn} can't be mapped on this host"))),
        }
    }

    /// The switch: takes every outstanding page away from the guest and from then on releases them one by one.
    /// Returns them. Called once, when all rounds are in; loads go on before and after.
    pub fn hold_back(&self, hold: &Arc<dyn HoldBack>) -> Result<Bitmap, Error> {
        if !hold.holds_ahead() {
            self.hold_ahead_with(hold);
        }
        let outstanding = self.switch()?;
        if hold.holds_ahead() {
            let bare = outstanding.iter().map(Pfn::at).find(|pfn| !hold.is_held(*pfn));
            assert_eq!(bare, None, "a page that is not held back is outstanding");
        }
        hold.hold_back(&outstanding)?;
        self.mode.store(HELD, SeqCst);
        self.runtime.ring(&self.settled);
        Ok(outstanding)
    }

    /// The switch where nothing is outstanding: from here on the memory is the guest's, and whatever still comes in (the
    /// answer to a refetch whose page has come by another way meanwhile) is dropped, however new.
    pub fn seal(&self) -> Result<(), Error> {
        self.switch()?;
        self.mode.store(SEALED, SeqCst);
        self.runtime.ring(&self.settled);
        Ok(())
    }

    /// Lets nobody write from here on, and waits for those who do; what is outstanding then.
    fn switch(&self) -> Result<Bitmap, Error> {
        self.mode.store(SWITCHING, SeqCst);
        loop {
            let heard = self.settled.heard();
            match self.table.survey() {
                (outstanding, None) => return Ok(outstanding),
                (_, Some(_)) => self.wait_settled(heard)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapping;
    use crate::runtime::Threads;
    use crate::units::PageCount;
    use std::os::fd::AsFd;

    struct Pages(Arc<Mapping>);

    impl GuestMemory for Pages {
        fn pages(&self) -> PageCount {
            self.0.pages()
        }
        fn pinnable(&self) -> bool {
            false
        }
        fn window(&self, capacity: usize) -> Result<Window, GuestError> {
            Ok(self.0.window(capacity))
        }
        fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
            self.0.fill(pfns.iter().map(|pfn| Some(*pfn)), window);
            Ok(())
        }
        fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
            Ok(())
        }
    }

    fn landing() -> (Landing, Arc<Mapping>) {
        let file = rustix::fs::memfd_create("landing", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let mapping = Arc::new(Mapping::shared(file.as_fd(), 8192, false).unwrap());
        let memory = Arc::new(Pages(Arc::clone(&mapping)));
        (Landing::new(memory, Arc::new(Threads::new()), Arc::default()), mapping)
    }

    /// The answer to a refetch may come when the page has come as newer data before, and the guest is running on it.
    #[test]
    fn sealed_memory_is_not_written_however_new_the_data() {
        let (landing, mapping) = landing();
        let mut window = landing.memory.window(1).unwrap();
        let mut land = |version, byte| {
            landing.land(Pfn(1), Version(version), &mut PageBuf([byte; PAGE_BYTES]), &mut window).unwrap()
        };
        assert_eq!(land(3, 7), Landed::Placed);
        landing.seal().unwrap();
        assert_eq!(land(9, 8), Landed::Dropped);
        let mut page = PageBuf::zeroed();
        mapping.page(Pfn(1)).copy_to(&mut page);
        assert!(page.0 == [7; PAGE_BYTES]);
        assert!(!landing.is_early());
    }

    /// Who writes when the seal is set is waited for.
    #[test]
    fn sealing_waits_for_a_page_that_is_being_written() {
        let (landing, _) = landing();
        let Claim::Granted(before) = landing.claim(Pfn(0), Version(1)) else {
            panic!("nobody else is there")
        };
        std::thread::scope(|scope| {
            let sealing = scope.spawn(|| landing.seal());
            while landing.is_early() {
                std::thread::yield_now();
            }
            assert_eq!(landing.claim(Pfn(1), Version(1)), Claim::Busy);
            assert!(!sealing.is_finished());
            landing.table.placed(Pfn(0), Version(1), before);
            landing.runtime.ring(&landing.settled);
            sealing.join().unwrap().unwrap();
        });
        assert_eq!(landing.claim(Pfn(1), Version(1)), Claim::Stale);
    }
}
