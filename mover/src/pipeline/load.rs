//! The loader: reads referenced pages from the disks in runs, checks each one, and lands it.
//!
//! One task. It takes what is wanted from the table's bitmap in sweeps, sorts a sweep by place on disk, merges
//! neighbours into runs and reads through small gaps, because a lone 4 KiB read is the slow case. A page whose bytes
//! do not give the reference's check, or that can't be read, is asked of the source.
//!
//! The disks never wait for the loader: reads are queued before what has completed is checked, for which there are
//! more slots than reads under way, and the next sweep is begun while the last reads of the one before are out.
//!
//! A run goes straight into guest pages where it has no gaps, memory can be pinned and the guest has not started
//! (`direct`); otherwise into a staging slot, from where good pages are copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::disk::{Completion, Disks, Read, Reader, Slot};
use crate::error::Error;
use crate::fingerprint::CheckKey;
use crate::limits::{PAGES_PER_FRAME, READ_BYTES_MAX};
use crate::memory::{GuestPage, PageBuf, Window};
use crate::pipeline::landing::{Incoming, Landing};
use crate::pipeline::table::{State, Wanted};
use crate::runtime::Moment;
use crate::units::{PAGE_BYTES, PAGE_BYTES_U64, Pfn, Sector, u64_of, usize_of};

/// References taken in one sweep, so that a sort finds neighbours: 128 MiB of pages.
pub const SWEEP_PAGES: usize = 32 * 1024;
/// The same where other references are held back meanwhile: what is in a sweep has been begun.
const SWEEP_PAGES_AHEAD: usize = 1024;
/// Gaps up to this are read through: at 64 KiB a read costs about as much as another operation.
pub const GAP_BYTES_MAX: u64 = 64 * 1024;
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
    /// Whether it goes straight into guest pages, which are claimed.
    direct: bool,
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
    direct: bool,
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
        let spare = (0..slots)
            .map(|_| {
                let window = memory.window(READ_BYTES_MAX / PAGE_BYTES)?;
                Ok(Flight { turn: 0, members: 0..0, start: 0, direct: false, window })
            })
            .collect::<Result<_, Error>>()?;
        let sweep = || Sweep { wanted: Vec::with_capacity(SWEEP_PAGES), ..Sweep::default() };
        Ok(Self {
            direct: direct && memory.pinnable(),
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
        let whole = run.is_whole(&sweep.wanted);
        let slot = self.flights.iter().position(Option::is_none).expect("a spare flight has a free slot");
        flight.turn = self.turn;
        flight.members = run.members.clone();
        flight.start = run.start;
        let sector = Sector::holding(run.start);
        let read = Read { disk, sector, bytes: usize_of(run.end - run.start), slot: Slot(slot) };
        flight.direct = self.direct && whole && self.claim_run(&run.members, &mut flight.window)?;
        let queued = if flight.direct {
            let mut pages: [Option<GuestPage<'_>>; READ_BYTES_MAX / PAGE_BYTES] =
                [None; READ_BYTES_MAX / PAGE_BYTES];
            for (at, page) in pages[..run.members.len()].iter_mut().enumerate() {
                *page = flight.window.page(at);
            }
            let first = pages[0].expect("claim_run has looked");
            self.reader.read_direct(read, &pages.map(|p| p.unwrap_or(first))[..run.members.len()])
        } else {
            self.reader.read(read)
        };
        self.flights[slot] = Some(flight);
        Ok(queued?)
    }

    /// Claims all pages of a run for a direct load and maps them; none if any of them is superseded, can't be
    /// mapped, or the guest is about to start.
    fn claim_run(&self, members: &std::ops::Range<usize>, window: &mut Window) -> Result<bool, Error> {
        let table = &self.landing.table;
        let sweep = &self.sweeps[self.turn].wanted[members.clone()];
        let claimed = sweep.iter().take_while(|w| table.claim_load(w.pfn, w.version)).count();
        let mut good = claimed == sweep.len();
        self.landing.runtime.interleave();
        if good {
            let mut pfns = [Pfn(0); READ_BYTES_MAX / PAGE_BYTES];
            for (pfn, wanted) in pfns.iter_mut().zip(sweep) {
                *pfn = wanted.pfn;
            }
            self.landing.memory.map(&pfns[..sweep.len()], window)?;
            good = (0..sweep.len()).all(|at| window.page(at).is_some()) && self.landing.is_early();
        }
        if !good {
            for wanted in &sweep[..claimed] {
                table.unclaim(wanted.pfn, wanted.version, State::Outstanding(wanted.version));
            }
            self.landing.runtime.ring(&self.landing.settled);
        }
        Ok(good)
    }

    /// Checks and lands the pages of a completed read.
    fn land(&mut self, completion: Completion) -> Result<(), Error> {
        let slot = completion.slot;
        let flight = self.flights[slot.0].take().expect("only reads in flight complete");
        self.sweeps[flight.turn].runs -= 1;
        let bytes = completion.result.unwrap_or(0);
        self.landing.counts.disk_bytes.fetch_add(u64_of(bytes), SeqCst);
        for at in flight.members.clone() {
            let wanted = self.sweeps[flight.turn].wanted[at];
            let offset = usize_of(wanted.block.sector.bytes() - flight.start);
            let whole = offset + PAGE_BYTES <= bytes;
            let good = if flight.direct {
                self.settle_direct(wanted, whole, flight.window.page(at - flight.members.start))
            } else {
                let read = self.reader.staged(slot)[..bytes].get(offset..).unwrap_or_default();
                land_read(&self.landing, &self.key, wanted, read, &mut self.page, &mut self.window)?
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

    /// Settles a page that was read in place: it is there if its bytes are right, else as outstanding as before.
    fn settle_direct(&mut self, wanted: Wanted, whole: bool, page: Option<GuestPage<'_>>) -> bool {
        let good = whole
            && page.is_some_and(|page| {
                page.copy_to(&mut self.page);
                self.key.check(&self.page) == wanted.check
            });
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

/// A stretch of a sorted sweep that is read at once.
pub(super) struct Run {
    /// Its places in the sweep.
    pub(super) members: std::ops::Range<usize>,
    /// First byte on disk.
    pub(super) start: u64,
    /// The byte behind the last.
    pub(super) end: u64,
}

impl Run {
    /// The longest run from place `first` on: same disk, gaps within [`GAP_BYTES_MAX`], within a read's limit, its
    /// ends moved out to the disk's alignment.
    pub(super) fn at(sweep: &[Wanted], first: usize, alignment: u64) -> Self {
        let down = |at: u64| at / alignment * alignment;
        let up = |at: u64| at.div_ceil(alignment) * alignment;
        let disk = sweep[first].block.disk;
        let start = down(sweep[first].block.sector.bytes());
        let mut end = sweep[first].block.sector.bytes() + PAGE_BYTES_U64;
        let mut last = first + 1;
        while let Some(next) = sweep.get(last) {
            let from = next.block.sector.bytes();
            let to = end.max(from + PAGE_BYTES_U64);
            let fits = up(to) - start <= u64_of(READ_BYTES_MAX);
            if next.block.disk != disk || from > end + GAP_BYTES_MAX || !fits {
                break;
            }
            end = to;
            last += 1;
        }
        Self { members: first..last, start, end: up(end) }
    }

    /// Whether its pages follow one another on disk without a gap, a repetition or anything before and after.
    fn is_whole(&self, sweep: &[Wanted]) -> bool {
        let pages = sweep[self.members.clone()].iter().enumerate();
        let mut places =
            pages.map(|(at, w)| w.block.sector.bytes() == self.start + u64_of(at) * PAGE_BYTES_U64);
        places.all(|right| right) && self.end - self.start == u64_of(self.members.len()) * PAGE_BYTES_U64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::Check;
    use crate::units::{BlockAddress, DiskId, Version};

    fn sweep(sectors: &[u64]) -> Vec<Wanted> {
        let wanted = |(at, sector): (usize, &u64)| Wanted {
            pfn: Pfn::at(at),
            version: Version(1),
            block: BlockAddress { disk: DiskId(0), sector: Sector(*sector) },
            check: Check::default(),
        };
        sectors.iter().enumerate().map(wanted).collect()
    }

    #[test]
    fn neighbours_are_one_run_and_far_ones_are_not() {
        let s = sweep(&[8, 16, 24, 24 + 8 + 128, 10_000]);
        let run = Run::at(&s, 0, 512);
        assert_eq!((run.members.clone(), run.start, run.end), (0..4, 8 * 512, (24 + 8 + 128 + 8) * 512));
        assert!(!run.is_whole(&s), "it has a gap");
        assert!(Run::at(&s[..3], 0, 512).is_whole(&s));
        assert_eq!(Run::at(&s, 4, 512).members, 4..5);
    }

    #[test]
    fn a_run_is_widened_to_the_disks_alignment() {
        let s = sweep(&[63, 71]);
        let run = Run::at(&s, 0, 4096);
        assert_eq!((run.start, run.end), (56 * 512, 80 * 512));
        assert!(!run.is_whole(&s));
    }

    #[test]
    fn duplicates_of_one_block_share_a_read() {
        let s = sweep(&[8, 8, 8]);
        let run = Run::at(&s, 0, 512);
        assert_eq!((run.members.clone(), run.end - run.start), (0..3, 4096));
        assert!(!run.is_whole(&s));
    }

    #[test]
    fn no_run_is_longer_than_a_slot() {
        let sectors: Vec<u64> = (0..600).map(|i| 1 + i * 8).collect();
        let s = sweep(&sectors);
        let mut first = 0;
        while first < s.len() {
            let run = Run::at(&s, first, 4096);
            assert!(run.end - run.start <= u64_of(READ_BYTES_MAX));
            assert!(run.members.end > first);
            first = run.members.end;
        }
    }
}
