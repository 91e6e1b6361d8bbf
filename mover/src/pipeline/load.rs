//! The loader: reads referenced pages from the disks in runs, checks each one, and lands it.
//!
//! One task. It takes what is wanted from the table's bitmap in sweeps, sorts a sweep by place on disk, merges
//! neighbours into runs and reads through small gaps, because a lone 4 KiB read is the slow case. A page whose bytes
//! do not give the reference's check, or that can't be read, is asked of the source.
//!
//! The disks never wait for the loader: reads are queued before what has completed is checked, for which there are
//! more slots than reads under way, and the next sweep is begun while the last reads of the one before are out.
//!
//! A run is read into a staging slot, from where good pages are copied. Where loads are *direct* and the guest has not started,
//! its pages are lent to the read instead ([`crate::guest::Lender`]), claimed for as long, and only what stands between them
//! goes into the slot, and whatever can't be lent:
//!
//! ```text
//!     on disk   | a | b |gap| c | c' | d |     c and c': two pages want this block
//!     into      | a | b |slot|slot   | d |
//!                 claim, lend -> read -> check -> take back -> settle
//! ```
//! A page is settled only when it has been taken back, and the switch waits for claims: nothing is lent when the guest runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::disk::{Completion, Disks, Read, Reader, Slot};
use crate::error::{Error, GuestError};
use crate::fingerprint::CheckKey;
use crate::guest::{GuestMemory, Lender};
use crate::limits::{PAGES_PER_FRAME, READ_BYTES_MAX};
use crate::memory::{GuestPage, PageBuf, Window};
use crate::pipeline::landing::{Incoming, Landing};
use crate::pipeline::run::Run;
use crate::pipeline::table::{State, Wanted};
use crate::runtime::Moment;
use crate::units::{PAGE_BYTES, Pfn, Sector, u64_of, usize_of};

/// References taken in one sweep, so that a sort finds neighbours: 128 MiB of pages.
pub const SWEEP_PAGES: usize = 32 * 1024;
/// The same where other references are held back meanwhile: what is in a sweep has been begun.
const SWEEP_PAGES_AHEAD: usize = 1024;
/// Pages of a read.
const READ_PAGES: usize = READ_BYTES_MAX / PAGE_BYTES;
/// Reads under way while the guest changes hands.
const HUSHED_DEPTH: usize = 1;
/// How long an idle loader sleeps before it looks whether the migration has ended.
const GLANCE: Duration = Duration::from_millis(50);

/// References on their way, in two turns: one is being read to its end while the next one begins.
#[derive(Default)]
struct Sweep {
    wanted: Vec<Wanted>,
    /// Where the next run begins.
    next: usize,
    /// Runs of it that are out or not landed yet.
    runs: usize,
}

/// One read, from its launch until its pages have landed.
struct Flight {
    /// Which of the two sweeps.
    turn: usize,
    /// Its pages: a stretch of the sweep.
    members: std::ops::Range<usize>,
    /// First byte on disk.
    start: u64,
    /// Where it goes straight into guest pages, page by page on disk: the place of the page lent in the window. These are claimed.
    lent: Vec<Option<usize>>,
    window: Window,
}

/// The loader.
pub struct Loader {
    landing: Arc<Landing>,
    disks: Arc<dyn Disks>,
    key: CheckKey,
    reader: Box<dyn Reader>,
    /// Reads under way at most.
    depth: usize,
    /// Whether pages are lent; what was lent is given back whatever this says.
    lends: bool,
    /// Set when no more references can come and none is outstanding.
    finish: Arc<AtomicBool>,
    sweeps: [Sweep; 2],
    turn: usize,
    next_word: usize,
    /// The bell's count at which nothing was wanted.
    swept_at: Option<u32>,
    flights: Vec<Option<Flight>>,
    spare: Vec<Flight>,
    under_way: usize,
    done: Vec<Completion>,
    page: PageBuf,
    window: Window,
    busy_since: Option<Moment>,
    /// Behind the reader, which waits for its reads, and the windows.
    lender: Option<Box<dyn Lender>>,
}

impl Loader {
    /// With `depth` reads under way at most; `direct` says whether to load straight into guest memory where possible.
    pub fn new(
        landing: Arc<Landing>,
        disks: Arc<dyn Disks>,
        key: CheckKey,
        depth: usize,
        direct: bool,
        finish: Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        let reader = disks.reader(depth + depth.div_ceil(2))?;
        let slots = reader.slots();
        let memory = Arc::clone(&landing.memory);
        let mut lender = match direct {
            true => lender(&memory, slots).map_err(|why| landing.not_direct.set(why)).ok(),
            false => None,
        };
        let spare = (0..slots)
            .map(|_| {
                let window = lender.as_mut().map_or_else(|| Ok(Window::with_capacity(0)), |l| l.window())?;
                let lent = Vec::with_capacity(READ_PAGES);
                Ok(Flight { turn: 0, members: 0..0, start: 0, lent, window })
            })
            .collect::<Result<_, Error>>()?;
        let sweep = || Sweep { wanted: Vec::with_capacity(SWEEP_PAGES), ..Sweep::default() };
        Ok(Self {
            lends: lender.is_some(),
            lender,
            window: memory.window(PAGES_PER_FRAME)?,
            landing,
            disks,
            key,
            reader,
            depth,
            finish,
            sweeps: [sweep(), sweep()],
            turn: 0,
            next_word: 0,
            swept_at: None,
            flights: (0..slots).map(|_| None).collect(),
            spare,
            under_way: 0,
            done: Vec::with_capacity(slots),
            page: PageBuf::zeroed(),
            busy_since: None,
        })
    }

    /// Loads until told to finish, or until the migration fails.
    pub fn run(mut self) -> Result<(), Error> {
        while !self.landing.failure.is_set() {
            let heard = self.landing.work.heard();
            self.fill_up(heard)?;
            if self.under_way > 0 {
                let wait = if self.done.is_empty() { GLANCE } else { Duration::ZERO };
                let before = self.done.len();
                self.reader.complete(&mut self.done, wait)?;
                self.under_way -= self.done.len() - before;
            }
            if let Some(completion) = self.done.pop() {
                self.land(completion)?;
            } else if self.under_way == 0 {
                if self.finish.load(SeqCst) {
                    return Ok(());
                }
                self.landing.runtime.wait(&self.landing.work, heard, GLANCE);
            }
            if self.under_way == 0 {
                self.count_busy_time();
            }
        }
        Ok(())
    }

    /// Starts reads until as many are under way as may be, or nothing is wanted.
    fn fill_up(&mut self, heard: u32) -> Result<(), Error> {
        let depth = if self.landing.hushed.load(SeqCst) { self.depth.min(HUSHED_DEPTH) } else { self.depth };
        while self.under_way < depth && !self.spare.is_empty() && self.has_next(heard) {
            let flight = self.spare.pop().expect("looked just now");
            self.launch(flight)?;
            self.under_way += 1;
            self.busy_since.get_or_insert_with(|| self.landing.runtime.now());
        }
        Ok(())
    }

    /// Whether there is a run to read, taking the next sweep where this one is used up and there is news: `heard` is
    /// the bell's count before looking.
    fn has_next(&mut self, heard: u32) -> bool {
        let current = &self.sweeps[self.turn];
        if current.next < current.wanted.len() {
            return true;
        }
        let other = 1 - self.turn;
        if self.sweeps[other].runs > 0 || self.swept_at == Some(heard) {
            return false;
        }
        self.take_sweep(other);
        self.turn = other;
        let empty = self.sweeps[other].wanted.is_empty();
        self.swept_at = empty.then_some(heard);
        !empty
    }

    /// Collects wanted pages, from where the last sweep ended, and sorts them by their place on disk: those first that keep
    /// the guest from starting.
    fn take_sweep(&mut self, turn: usize) {
        let sweep = &mut self.sweeps[turn];
        sweep.wanted.clear();
        sweep.next = 0;
        let landing = &self.landing;
        let table = &landing.table;
        let picky = landing.is_early() && landing.in_the_way() > 0;
        let most = if landing.holds_ahead() { SWEEP_PAGES_AHEAD } else { SWEEP_PAGES };
        for _ in 0..table.wanted.words() {
            if sweep.wanted.len() + 64 > most {
                break;
            }
            let word = self.next_word;
            self.next_word = (word + 1) % table.wanted.words();
            for bit in crate::bitmap::bits_of(table.wanted.take_word(word)) {
                let pfn = Pfn::at(word * 64 + bit);
                if picky && landing.is_ahead(pfn) {
                    table.wanted.set(pfn.index());
                } else {
                    sweep.wanted.extend(table.reference(pfn));
                }
            }
        }
        sweep.wanted.sort_unstable_by_key(|w| (w.block, w.pfn));
    }

    fn count_busy_time(&mut self) {
        if let Some(since) = self.busy_since.take() {
            let busy = self.landing.runtime.now().since(since);
            self.landing
                .counts
                .disk_busy_us
                .fetch_add(u64::try_from(busy.as_micros()).unwrap_or(u64::MAX), SeqCst);
        }
    }

    /// Starts the read of the sweep's next run.
    fn launch(&mut self, mut flight: Flight) -> Result<(), Error> {
        let sweep = &mut self.sweeps[self.turn];
        let disk = sweep.wanted[sweep.next].block.disk;
        let alignment = u64_of(self.disks.alignment(disk));
        let run = Run::at(&sweep.wanted, sweep.next, alignment);
        sweep.next = run.members.end;
        sweep.runs += 1;
        let slot = self.flights.iter().position(Option::is_none).expect("a spare flight has a free slot");
        flight.turn = self.turn;
        flight.members = run.members.clone();
        flight.start = run.start;
        let sector = Sector::holding(run.start);
        let read = Read { disk, sector, bytes: usize_of(run.end - run.start), slot: Slot(slot) };
        let queued = if self.lend(slot, &run, &mut flight)? {
            let mut pages: [Option<GuestPage<'_>>; READ_PAGES] = [None; READ_PAGES];
            for (page, place) in pages.iter_mut().zip(&flight.lent) {
                *page = place.and_then(|place| flight.window.page(place));
            }
            self.reader.read_direct(read, &pages[..flight.lent.len()])
        } else {
            self.reader.read(read)
        };
        self.flights[slot] = Some(flight);
        Ok(queued?)
    }

    /// Has those of a run's pages lent to the read in `slot` that it can go straight into, and claims them; whether there is
    /// any. None that is superseded or held back, and none at all once the guest is about to start.
    fn lend(&mut self, slot: usize, run: &Run, flight: &mut Flight) -> Result<bool, Error> {
        flight.lent.clear();
        let (landing, wanted) = (&self.landing, &self.sweeps[self.turn].wanted);
        let Some(lender) = self.lender.as_mut().filter(|_| self.lends && landing.is_early()) else {
            return Ok(false);
        };
        if !run.is_aligned(wanted) {
            return Ok(false);
        }
        let unclaim =
            |one: &Wanted| landing.table.unclaim(one.pfn, one.version, State::Outstanding(one.version));
        let (mut pfns, mut members) = ([Pfn(0); READ_PAGES], [0; READ_PAGES]);
        let mut claimed = 0;
        flight.lent.resize(run.pages(), None);
        for at in run.members.clone().filter(|at| run.is_alone(wanted, *at)) {
            let one = &wanted[at];
            if !landing.table.claim_load(one.pfn, one.version) {
                continue;
            }
            if landing.is_ahead(one.pfn) {
                unclaim(one);
                continue;
            }
            flight.lent[run.page_of(one)] = Some(claimed);
            (pfns[claimed], members[claimed]) = (one.pfn, at);
            claimed += 1;
        }
        landing.runtime.interleave();
        let mut lent = 0;
        if claimed > 0 && landing.is_early() {
            match lender.lend(slot, &pfns[..claimed], &mut flight.window) {
                Ok(()) => lent = claimed,
                Err(why) => {
                    self.lends = false;
                    // The first reason is the one that matters.
                    let _ = landing.not_direct.set(why);
                }
            }
        }
        let mut any = false;
        for (place, at) in members[..claimed].iter().enumerate() {
            let one = &wanted[*at];
            if place < lent.min(flight.window.len()) && flight.window.page(place).is_some() {
                any = true;
            } else {
                flight.lent[run.page_of(one)] = None;
                unclaim(one);
            }
        }
        landing.runtime.ring(&landing.settled);
        if lent > 0 && !any {
            lender.take_back(slot, &mut flight.window)?;
        }
        Ok(any)
    }

    /// Checks and lands the pages of a completed read.
    fn land(&mut self, completion: Completion) -> Result<(), Error> {
        let slot = completion.slot;
        let mut flight = self.flights[slot.0].take().expect("only reads in flight complete");
        self.sweeps[flight.turn].runs -= 1;
        let bytes = completion.result.unwrap_or(0);
        self.landing.counts.disk_bytes.fetch_add(u64_of(bytes), SeqCst);
        let mut good = [None; READ_PAGES];
        if flight.lent.iter().any(Option::is_some) {
            self.check_lent(&flight, bytes, &mut good);
            if let Some(lender) = &mut self.lender {
                lender.take_back(slot.0, &mut flight.window)?;
            }
        }
        for at in flight.members.clone() {
            let wanted = self.sweeps[flight.turn].wanted[at];
            let offset = usize_of(wanted.block.sector.bytes() - flight.start);
            let good = match good[offset / PAGE_BYTES] {
                Some(good) => self.settle_lent(wanted, good),
                None => {
                    let read = self.reader.staged(slot)[..bytes].get(offset..).unwrap_or_default();
                    land_read(&self.landing, &self.key, wanted, read, &mut self.page, &mut self.window)?
                }
            };
            self.landing.counts.checked.fetch_add(1, SeqCst);
            if !good {
                ask(&self.landing, wanted.pfn);
            }
        }
        self.landing.runtime.ring(&self.landing.settled);
        self.spare.push(flight);
        Ok(())
    }

    /// Sets in `good`, for each page on disk that was read into guest memory, whether its bytes are right there.
    fn check_lent(&mut self, flight: &Flight, bytes: usize, good: &mut [Option<bool>; READ_PAGES]) {
        for at in flight.members.clone() {
            let wanted = self.sweeps[flight.turn].wanted[at];
            let offset = usize_of(wanted.block.sector.bytes() - flight.start);
            let lent = flight.lent[offset / PAGE_BYTES].and_then(|place| flight.window.page(place));
            if let Some(page) = lent {
                let whole = offset + PAGE_BYTES <= bytes;
                page.copy_to(&mut self.page);
                good[offset / PAGE_BYTES] = Some(whole && self.key.check(&self.page) == wanted.check);
            }
        }
    }

    /// Settles a page that was read in place and is nobody's but the guest's again: it is there if its bytes are right, else
    /// as outstanding as before.
    fn settle_lent(&self, wanted: Wanted, good: bool) -> bool {
        let (table, before) = (&self.landing.table, State::Outstanding(wanted.version));
        if good {
            table.placed(wanted.pfn, wanted.version, before);
            self.landing.counts.direct.fetch_add(1, SeqCst);
        } else {
            table.unclaim(wanted.pfn, wanted.version, before);
        }
        good
    }
}

/// What lends pages of `memory`: nothing has to be done where the kernel can pin them as they are mapped.
fn lender(memory: &Arc<dyn GuestMemory>, slots: usize) -> Result<Box<dyn Lender>, String> {
    if memory.pinnable() { Ok(Box::new(Mapped(Arc::clone(memory)))) } else { memory.lender(slots) }
}

/// Lends pages as they are mapped.
struct Mapped(Arc<dyn GuestMemory>);

impl Lender for Mapped {
    fn window(&mut self) -> Result<Window, GuestError> {
        self.0.window(READ_PAGES)
    }
    fn lend(&mut self, _: usize, pages: &[Pfn], window: &mut Window) -> Result<(), String> {
        self.0.map(pages, window).map_err(|error| error.to_string())
    }
    fn take_back(&mut self, _: usize, window: &mut Window) -> Result<(), GuestError> {
        window.clear();
        Ok(())
    }
}

/// Notes that `pfn`'s reference did not hold and the source must send the page, if it is still outstanding.
pub fn ask(landing: &Landing, pfn: Pfn) {
    landing.counts.failed.fetch_add(1, SeqCst);
    if matches!(landing.table.state(pfn), State::Outstanding(_) | State::Busy(_)) {
        landing.table.ask.set(pfn.index());
        landing.runtime.ring(&landing.work);
    }
}

/// Lands the page that what a disk's read brought, `read`, begins with. `false` if not all of it came or its bytes are
/// not the page's.
pub fn land_read(
    landing: &Landing,
    key: &CheckKey,
    wanted: Wanted,
    read: &[u8],
    page: &mut PageBuf,
    window: &mut Window,
) -> Result<bool, Error> {
    let Some(bytes) = read.first_chunk() else { return Ok(false) };
    if key.check_bytes(bytes) != wanted.check {
        return Ok(false);
    }
    landing.land_load(wanted.pfn, wanted.version, Incoming::Staged(bytes, page), window)?;
    Ok(true)
}
