//! Domains made up in memory, for tests of the phases: what a guest does while it is saved is a script.
#![forbid(unsafe_code)]

mod grants;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mover::bitmap::{Bitmap, SharedBitmap};
use mover::error::GuestError;
use mover::guest::{GuestMemory, HoldBack, Lender};
use mover::memory::{GuestPage, Mapping, PageBuf, Window};
use mover::units::{PAGE_BYTES, PageCount, Pfn, u64_of, usize_of};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;

use crate::abi::{DomainId, Part};
use crate::domain::{
    Absent, Batch, DomainError, FinalState, Frames, Held, KindState, Lazy, Lent, Life, Loans, LogRead,
    Source, StaticState, Target, Wiring, difference,
};
pub(crate) use grants::{SimGrants, grant_world};

use crate::stream::{DomainHeader, GuestType, HvmParam, P2mFrames, PageEntry, PageType, TscInfo};

pub(crate) const ID: DomainId = DomainId(7);
pub(crate) const WIRING: Wiring =
    Wiring { store_port: 1, store_domain: DomainId(0), console_port: 2, console_domain: DomainId(0) };

fn memory(pages: usize) -> Arc<Mapping> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, u64_of(pages * PAGE_BYTES)).unwrap();
    Arc::new(Mapping::shared(file.as_fd(), pages * PAGE_BYTES, false).unwrap())
}

/// Content number `version` of a page.
fn content(pfn: u64, version: u64) -> PageBuf {
    let mut page = PageBuf::zeroed();
    for (at, word) in page.0.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(pfn << 40 ^ version << 20 ^ u64_of(at)).to_le_bytes());
    }
    page
}

pub(crate) fn read(page: GuestPage<'_>) -> PageBuf {
    let mut out = PageBuf::zeroed();
    page.copy_to(&mut out);
    out
}

/// A guest on the source: shared with the test, which looks at it afterwards.
pub(crate) struct Guest {
    pub(crate) memory: Arc<Mapping>,
    /// Frames without memory.
    pub(crate) holes: BTreeSet<u64>,
    /// Frames that can't be had while it runs.
    pub(crate) shy: BTreeSet<u64>,
    /// Frames it writes after each batch, one set a batch.
    pub(crate) writes: Vec<BTreeSet<u64>>,
    /// Frames it writes after its log was read, one set a reading, from the end.
    pub(crate) later: Vec<BTreeSet<u64>>,
    /// Frames that are in every reading of its log: somebody else writes them all the time.
    pub(crate) racing: Range<u64>,
    pub(crate) life: Life,
    pub(crate) logging: bool,
    /// How often the log was turned off.
    pub(crate) off: u32,
    /// Percentages it was slowed down to, one after the other; 100 at the end of each slow spell.
    pub(crate) speeds: Vec<u8>,
    /// Whether it can be.
    pub(crate) has_caps: bool,
    log: BTreeSet<u64>,
    versions: u64,
    /// Batches had.
    pub(crate) batches: usize,
}

impl Guest {
    pub(crate) fn new(pages: usize) -> Rc<RefCell<Self>> {
        let memory = memory(pages);
        for pfn in 0..u64_of(pages) {
            memory.page(Pfn(pfn)).copy_from(&content(pfn, 0));
        }
        Rc::new(RefCell::new(Self {
            memory,
            holes: BTreeSet::new(),
            shy: BTreeSet::new(),
            writes: Vec::new(),
            later: Vec::new(),
            racing: 0..0,
            life: Life::Running,
            logging: false,
            off: 0,
            speeds: Vec::new(),
            has_caps: true,
            log: BTreeSet::new(),
            versions: 0,
            batches: 0,
        }))
    }

    pub(crate) fn write(&mut self, pfns: &BTreeSet<u64>) {
        self.versions += 1;
        for &pfn in pfns.difference(&self.holes) {
            self.memory.page(Pfn(pfn)).copy_from(&content(pfn, self.versions));
            self.log.insert(pfn);
        }
    }
}

/// What a simulated guest is besides its memory.
pub(crate) fn states() -> (StaticState, FinalState) {
    let kind = KindState::Hvm {
        context: (0..=255).cycle().take(3000).collect(),
        params: vec![HvmParam { index: 1, value: 3 }, HvmParam { index: 17, value: 4 }],
    };
    let tsc = TscInfo { mode: 1, khz: 2_000_000, nsec: 12_345_678, incarnation: 3 };
    (StaticState { cpuid: vec![7; 240], msrs: vec![9; 32], pv: None }, FinalState { tsc, kind })
}

/// The source's end.
pub(crate) struct SimSource {
    pub(crate) guest: Rc<RefCell<Guest>>,
    /// Copies of the batch's contents, as they were when it was had.
    contents: Vec<PageBuf>,
}

impl SimSource {
    pub(crate) fn new(guest: &Rc<RefCell<Guest>>) -> Self {
        Self { guest: Rc::clone(guest), contents: Vec::new() }
    }
}

impl Source for SimSource {
    fn header(&self) -> DomainHeader {
        DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 }
    }
    fn pages(&self) -> u64 {
        self.guest.borrow().memory.pages().0
    }
    fn batch_pages(&self) -> usize {
        64
    }
    fn static_state(&mut self) -> Result<StaticState, DomainError> {
        Ok(states().0)
    }
    fn table_frames(&self) -> Option<P2mFrames> {
        None
    }
    fn life(&mut self) -> Result<Life, DomainError> {
        Ok(self.guest.borrow().life)
    }
    fn check(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn log_on(&mut self) -> Result<(), DomainError> {
        self.guest.borrow_mut().logging = true;
        Ok(())
    }
    fn log_read(&mut self, _: LogRead, into: &mut Bitmap) -> Result<u64, DomainError> {
        let mut guest = self.guest.borrow_mut();
        assert!(guest.logging, "the log is read while it is off");
        into.clear_all();
        for pfn in std::mem::take(&mut guest.log).into_iter().chain(guest.racing.clone()) {
            into.set(usize_of(pfn));
        }
        if guest.life == Life::Running
            && let Some(writes) = guest.later.pop()
        {
            guest.write(&writes);
        }
        Ok(into.count())
    }
    fn log_off(&mut self) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        guest.logging = false;
        guest.off += 1;
        Ok(())
    }
    fn slow_down(&mut self, percent: u8) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        if guest.has_caps {
            guest.speeds.push(percent);
            return Ok(());
        }
        let refused = std::io::Error::from_raw_os_error(libc::EINVAL);
        Err(DomainError::call("cap the processor time", crate::abi::DomainId(1), "")(refused))
    }
    fn full_speed(&mut self) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        if guest.speeds.last().is_some_and(|speed| *speed != 100) {
            guest.speeds.push(100);
        }
        Ok(())
    }
    fn fetch(&mut self, pfns: &[u64], still: bool, batch: &mut Batch) -> Result<(), DomainError> {
        assert!(pfns.len() <= self.batch_pages());
        let mut guest = self.guest.borrow_mut();
        batch.entries.clear();
        batch.deferred.clear();
        self.contents.clear();
        for &pfn in pfns.iter().filter(|pfn| !guest.holes.contains(pfn)) {
            if guest.shy.contains(&pfn) && !still {
                batch.deferred.push(pfn);
                continue;
            }
            batch.entries.push(PageEntry::new(Pfn(pfn), PageType::Normal));
            self.contents.push(read(guest.memory.page(Pfn(pfn))));
        }
        let at = guest.batches;
        guest.batches += 1;
        if !still && let Some(writes) = guest.writes.get(at).cloned() {
            guest.write(&writes);
        }
        Ok(())
    }
    fn content(&self, at: usize) -> Part<'_> {
        Part::Bytes(&self.contents[at].0)
    }
    fn release(&mut self) -> Result<(), DomainError> {
        self.contents.clear();
        Ok(())
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, absent: &Arc<Absent>) -> Result<Arc<dyn GuestMemory>, DomainError> {
        let guest = self.guest.borrow();
        let (mapping, holes, shy) = (Arc::clone(&guest.memory), guest.holes.clone(), guest.shy.clone());
        Ok(Arc::new(SimMemory {
            mapping,
            holes,
            shy,
            absent: Some(Arc::clone(absent)),
            held: None,
            grants: None,
        }))
    }
    fn populated(&mut self) -> Result<Vec<Range<u64>>, DomainError> {
        let guest = self.guest.borrow();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for pfn in (0..guest.memory.pages().0).filter(|pfn| !guest.holes.contains(pfn)) {
            match runs.last_mut() {
                Some(run) if run.end == pfn => run.end += 1,
                _ => runs.push(pfn..pfn + 1),
            }
        }
        Ok(runs)
    }
    fn final_state(&mut self) -> Result<FinalState, DomainError> {
        assert_eq!(self.guest.borrow().life, Life::Suspended);
        Ok(states().1)
    }
}

/// A guest's memory as lanes see it, at either end.
struct SimMemory {
    mapping: Arc<Mapping>,
    holes: BTreeSet<u64>,
    shy: BTreeSet<u64>,
    /// On the source.
    absent: Option<Arc<Absent>>,
    /// On the target.
    held: Option<Arc<SimHold>>,
    grants: Option<Arc<Granting>>,
}

/// Lends pages of a guest that never runs.
pub(crate) struct Granting {
    pub(crate) table: SimGrants,
    loans: OnceLock<Arc<Loans>>,
    /// Why it does not, if so.
    pub(crate) refuses: OnceLock<String>,
}

/// Holds pages back from a guest that never runs: what is in their place is looked at by the test.
pub(crate) struct SimHold {
    mapping: Arc<Mapping>,
    held: SharedBitmap,
    /// Pages that were ever held.
    pub(crate) times: AtomicU64,
    pub(crate) finished: AtomicBool,
}

impl HoldBack for SimHold {
    fn hold_back(&self, outstanding: &Bitmap) -> Result<(), GuestError> {
        assert!(outstanding.iter().all(|at| self.held.get(at)), "held ahead");
        Ok(())
    }
    fn holds_ahead(&self) -> bool {
        true
    }
    fn hold_ahead(&self, pfn: Pfn) -> Result<bool, GuestError> {
        // One in five can't be.
        if pfn.0.is_multiple_of(5) {
            return Ok(false);
        }
        self.mapping.page(pfn).copy_from(&PageBuf([0xdd; PAGE_BYTES]));
        assert!(self.held.set(pfn.index()), "{pfn} is held twice");
        self.times.fetch_add(1, Ordering::SeqCst);
        Ok(true)
    }
    fn is_held(&self, pfn: Pfn) -> bool {
        self.held.get(pfn.index())
    }
    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError> {
        assert!(self.held.get(pfn.index()), "{pfn} is not held");
        self.mapping.page(pfn).copy_from(&read(page));
        self.held.clear(pfn.index());
        Ok(())
    }
    fn wake(&self, _: Pfn) -> Result<(), GuestError> {
        Ok(())
    }
    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError> {
        std::thread::sleep(timeout);
        Ok(None)
    }
    fn finish(&self) -> Result<(), GuestError> {
        assert!(self.held.is_clear());
        self.finished.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl GuestMemory for SimMemory {
    fn pages(&self) -> PageCount {
        self.mapping.pages()
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(self.mapping.window(capacity))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        let there = |pfn: &Pfn| {
            let shy =
                self.shy.contains(&pfn.0) && self.absent.as_ref().is_some_and(|absent| absent.note(*pfn));
            let held = self.held.as_ref().is_some_and(|hold| hold.is_held(*pfn));
            (!self.holes.contains(&pfn.0) && !shy && !held).then_some(*pfn)
        };
        self.mapping.fill(pfns.iter().map(there), window);
        Ok(())
    }
    fn lender(&self, slots: usize) -> Result<Box<dyn Lender>, String> {
        let granting = self.grants.as_ref().expect("asked of a target");
        if let Some(why) = granting.refuses.get() {
            return Err(why.clone());
        }
        let loans = Loans::with(ID, slots, Box::new(granting.table.clone()))?;
        let held = self.held.clone();
        // One that is paged out can't be mapped: the hypervisor would have whoever tries wait.
        let lender = loans.lender(move |pfn| {
            assert!(!held.as_ref().is_some_and(|hold| hold.is_held(pfn)), "{pfn} is held back");
            // Some have no memory that can be lent.
            !pfn.0.is_multiple_of(97)
        });
        assert!(granting.loans.set(loans).is_ok());
        Ok(lender)
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
    fn starts_zero(&self) -> bool {
        false
    }
}

/// What has become of a target, shared with the test.
pub(crate) struct Landed {
    pub(crate) memory: Arc<Mapping>,
    pub(crate) populated: BTreeSet<u64>,
    pub(crate) static_state: Option<StaticState>,
    pub(crate) final_state: Option<FinalState>,
}

/// The target's end.
pub(crate) struct SimTarget {
    landed: Rc<RefCell<Landed>>,
    /// The batch: written here, and placed when settled.
    batch: Vec<u64>,
    staging: Arc<Mapping>,
    comparing: bool,
    /// Whether pages can be held back, and what does it then.
    pub(crate) can_hold: bool,
    pub(crate) hold: Arc<SimHold>,
    pub(crate) grants: Arc<Granting>,
}

impl SimTarget {
    pub(crate) fn new(pages: usize) -> (Self, Rc<RefCell<Landed>>) {
        let landed = Rc::new(RefCell::new(Landed {
            memory: memory(pages),
            populated: BTreeSet::new(),
            static_state: None,
            final_state: None,
        }));
        let (batch, staging) = (Vec::new(), memory(32));
        let (mapping, held) = (Arc::clone(&landed.borrow().memory), SharedBitmap::new(pages));
        let (times, finished) = (AtomicU64::new(0), AtomicBool::new(false));
        let hold = Arc::new(SimHold { mapping, held, times, finished });
        let table = SimGrants::of(&landed.borrow().memory);
        let grants = Arc::new(Granting { table, loans: OnceLock::new(), refuses: OnceLock::new() });
        let landed_too = Rc::clone(&landed);
        let target =
            Self { landed: landed_too, batch, staging, comparing: false, can_hold: true, hold, grants };
        (target, landed)
    }
}

impl Target for SimTarget {
    fn guest(&self) -> GuestType {
        GuestType::Hvm
    }
    fn batch_pages(&self) -> usize {
        32
    }
    fn vcpus(&self) -> u32 {
        0
    }
    fn set_static_state(&mut self, state: &StaticState) -> Result<(), DomainError> {
        self.landed.borrow_mut().static_state = Some(state.clone());
        Ok(())
    }
    fn set_table_frames(&mut self, _: P2mFrames) -> Result<(), DomainError> {
        Err(DomainError::Stream { what: "a table".into() })
    }
    fn place(&mut self, entries: &[PageEntry]) -> Result<usize, DomainError> {
        assert!(entries.len() <= self.batch_pages());
        let mut landed = self.landed.borrow_mut();
        assert!(landed.static_state.is_some(), "pages before the static state");
        self.batch.clear();
        for entry in entries {
            if entry.pfn().0 >= landed.memory.pages().0 {
                return Err(DomainError::TooMany { domain: ID, max: landed.memory.pages().0 });
            }
            if entry.page_type().is_populated() {
                landed.populated.insert(entry.pfn().0);
            }
            if entry.has_data() {
                self.batch.push(entry.pfn().0);
            }
        }
        Ok(self.batch.len())
    }
    fn page(&self, at: usize) -> GuestPage<'_> {
        assert!(at < self.batch.len());
        self.staging.page(Pfn::at(at))
    }
    fn settle(&mut self) -> Result<(), DomainError> {
        assert!(!self.comparing);
        let landed = self.landed.borrow_mut();
        for (at, &pfn) in self.batch.iter().enumerate() {
            landed.memory.page(Pfn(pfn)).copy_from(&read(self.staging.page(Pfn::at(at))));
        }
        Ok(())
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, pages: u64, populated: &[Range<u64>]) -> Result<Arc<dyn GuestMemory>, DomainError> {
        let mut landed = self.landed.borrow_mut();
        if pages != landed.memory.pages().0 {
            return Err(DomainError::TooMany { domain: ID, max: landed.memory.pages().0 });
        }
        for pfn in populated.iter().cloned().flatten() {
            if landed.populated.insert(pfn) {
                // What a domain is given is not zero.
                landed.memory.page(Pfn(pfn)).copy_from(&PageBuf([0xee; PAGE_BYTES]));
            }
        }
        let mapping = Arc::clone(&landed.memory);
        let held = Some(Arc::clone(&self.hold));
        let grants = Some(Arc::clone(&self.grants));
        let (holes, shy) = (BTreeSet::new(), BTreeSet::new());
        Ok(Arc::new(SimMemory { mapping, holes, shy, absent: None, held, grants }))
    }
    fn hold_back(&self) -> Lazy {
        let (hold, can) = (Arc::clone(&self.hold), self.can_hold);
        Box::new(move || match can {
            true => Ok(Held { hold, stop: Box::new(|| Ok(())), cost: Arc::default() }),
            false => Err("the simulated hypervisor has no paging".to_owned()),
        })
    }
    fn difference(&self, at: usize, expected: &mut PageBuf) -> Result<Option<Range<usize>>, DomainError> {
        Ok(difference(&read(self.landed.borrow().memory.page(Pfn(self.batch[at]))), expected))
    }
    fn lent(&self) -> Option<Lent> {
        self.grants.loans.get().map(|loans| loans.figures()).filter(|lent| lent.pages > 0)
    }
    fn finish(&mut self, state: &FinalState, wiring: &Wiring) -> Result<Frames, DomainError> {
        if let Some(loans) = self.grants.loans.get() {
            loans.close().map_err(|what| DomainError::Lent { domain: ID, what })?;
        }
        assert!(self.grants.table.written().is_empty(), "a guest is to run with grants of ours");
        assert_eq!(*wiring, WIRING);
        self.landed.borrow_mut().final_state = Some(state.clone());
        Ok(Frames { store: 3, console: 4 })
    }
}

/// Called on every event of a save.
pub(crate) type Watch = Box<dyn FnMut(&crate::save::Event<'_>)>;

/// A toolstack that does as it is told, and writes down what it was asked for.
#[derive(Default)]
pub(crate) struct SimToolstack {
    pub(crate) guest: Option<Rc<RefCell<Guest>>>,
    /// What the guest does when it is to suspend itself; as told if `None`.
    pub(crate) instead: Option<Life>,
    /// Answers to being asked.
    pub(crate) refuse: bool,
    /// Called on every event.
    pub(crate) watch: Option<Watch>,
    pub(crate) device_log: Vec<bool>,
    pub(crate) suspended: u32,
    pub(crate) missing: Option<u32>,
    pub(crate) notes: Vec<String>,
}

impl crate::save::Toolstack for SimToolstack {
    fn suspend(&mut self) -> io::Result<bool> {
        self.suspended += 1;
        if let Some(guest) = &self.guest {
            guest.borrow_mut().life = self.instead.unwrap_or(Life::Suspended);
        }
        Ok(!self.refuse)
    }
    fn device_log(&mut self, on: bool) -> io::Result<bool> {
        self.device_log.push(on);
        Ok(true)
    }
    fn report(&mut self, event: &crate::save::Event<'_>) {
        if let Some(watch) = &mut self.watch {
            watch(event);
        }
        if let crate::save::Event::Note(note) = event {
            self.notes.push((*note).to_string());
        }
    }
}

impl crate::restore::Toolstack for SimToolstack {
    fn static_data_done(&mut self, missing: u32) -> io::Result<bool> {
        self.missing = Some(missing);
        Ok(!self.refuse)
    }
    fn report(&mut self, event: &crate::restore::Event<'_>) {
        if let crate::restore::Event::Note(note) = event {
            self.notes.push((*note).to_string());
        }
    }
}
