//! Keeping the tables true while the guest writes its disks.
//!
//! ```text
//!     harvest --> forgotten at once --> fresh --(quiet time)--> resting --(quiet time)--> ready --> read --> learnt
//!                      ^                                                                             |
//!                      +------------------ written again: back to the start -------------------------+
//! ```
//!
//! A piece of 4 KiB that the guest wrote is forgotten before anything else is looked up. When it has been quiet for one
//! to two quiet times it is read and learnt again, at a limited rate. A piece that is written while it is read is not
//! learnt. Owner: the control task of a migration, which calls in between other things; nothing here waits.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::time::Duration;

use super::set::Tables;
use super::table::Table;
use crate::bitmap::Bitmap;
use crate::disk::{Completion, Disks, Read, Reader, Slot, WriteLog};
use crate::error::DiskError;
use crate::fingerprint;
use crate::limits::READ_BYTES_MAX;
use crate::runtime::Moment;
use crate::units::{
    DiskId, PAGE_BYTES, PAGE_BYTES_U64, SECTORS_PER_PAGE, Sector, f64_of, u64_of, u64_of_f64, usize_of,
};

/// Reads under way.
const DEPTH: usize = 4;
/// Pieces of one read: less than a slot, because blocks at an odd phase begin before and end after them.
const PIECES_MAX: usize = READ_BYTES_MAX / PAGE_BYTES / 2;
/// Time for which unspent rate is kept.
const BURST: Duration = Duration::from_millis(100);

/// How a keeper goes about it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Habits {
    /// A written piece rests for one to two of these before it is read.
    pub quiet: Duration,
    /// Bytes a second it reads at most.
    pub bytes_per_second: u64,
}

impl Default for Habits {
    fn default() -> Self {
        Self { quiet: Duration::from_secs(1), bytes_per_second: 100 << 20 }
    }
}

/// One disk's written pieces, a bit per 4 KiB.
struct Written {
    disk: DiskId,
    bytes: u64,
    alignment: u64,
    harvest: Bitmap,
    fresh: Bitmap,
    resting: Bitmap,
    ready: Bitmap,
    /// Where the search for ready pieces goes on.
    cursor: usize,
}

impl Written {
    fn is_pending(&self, piece: usize) -> bool {
        self.fresh.get(piece) || self.resting.get(piece) || self.ready.get(piece)
    }

    /// The next run of ready pieces, which are ready no more.
    fn take_run(&mut self) -> Option<Range<usize>> {
        let words = self.ready.words();
        let from = self.cursor / 64;
        let order = (from..words.len()).chain(0..from);
        let word = order.into_iter().find(|word| words[*word] != 0)?;
        let start = word * 64 + usize_of(words[word].trailing_zeros().into());
        let mut end = start;
        while end - start < PIECES_MAX && end < self.ready.len() && self.ready.clear(end) {
            end += 1;
        }
        self.cursor = end;
        Some(start..end)
    }
}

/// A read under way: the units it is for.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Flight {
    number: usize,
    units: Range<u64>,
    sector: Sector,
}

/// Keeps tables fresh.
pub struct DiskKeeper {
    tables: Tables,
    log: Box<dyn WriteLog>,
    reader: Box<dyn Reader>,
    habits: Habits,
    disks: Vec<Written>,
    flights: Vec<Option<Flight>>,
    arrived: Vec<Completion>,
    /// Units of the run being cut into reads, by disk.
    queued: Vec<(usize, Range<u64>)>,
    turned: Option<Moment>,
    refilled: Option<Moment>,
    budget: u64,
    failed_reads: u64,
}

impl DiskKeeper {
    /// Keeps `tables`, which are of `disks` in the same order, by what `log` says.
    pub fn new(
        tables: Tables,
        disks: &dyn Disks,
        log: Box<dyn WriteLog>,
        habits: Habits,
    ) -> Result<Self, DiskError> {
        let mut written = Vec::new();
        for (number, info) in (0..).zip(disks.infos()) {
            let disk = DiskId(number);
            let pieces = usize_of(info.bytes.div_ceil(PAGE_BYTES_U64));
            let map = || Bitmap::new(pieces);
            written.push(Written {
                disk,
                bytes: info.bytes,
                alignment: u64_of(disks.alignment(disk)),
                harvest: map(),
                fresh: map(),
                resting: map(),
                ready: map(),
                cursor: 0,
            });
        }
        Ok(Self {
            tables,
            log,
            reader: disks.reader(DEPTH)?,
            habits,
            disks: written,
            flights: vec![None; DEPTH],
            arrived: Vec::with_capacity(DEPTH),
            queued: Vec::new(),
            turned: None,
            refilled: None,
            budget: 0,
            failed_reads: 0,
        })
    }

    /// Reads that failed; what they were for stays forgotten.
    #[must_use]
    pub fn failed_reads(&self) -> u64 {
        self.failed_reads
    }

    /// Ages what was written: fresh to resting, resting to ready.
    fn turn(&mut self, now: Moment) {
        let turned = *self.turned.get_or_insert(now);
        if now.since(turned) < self.habits.quiet {
            return;
        }
        self.turned = Some(now);
        for written in &mut self.disks {
            written.ready.union(&written.resting);
            std::mem::swap(&mut written.resting, &mut written.fresh);
            written.fresh.clear_all();
        }
    }

    /// Queues reads for what is ready, as far as slots and the rate allow.
    fn read_ready(&mut self, now: Moment) -> Result<(), DiskError> {
        let rate = f64_of(self.habits.bytes_per_second);
        let since = now.since(*self.refilled.get_or_insert(now)).min(BURST);
        self.refilled = Some(now);
        let most = u64_of_f64(rate * BURST.as_secs_f64()).max(u64_of(READ_BYTES_MAX));
        self.budget = (self.budget + u64_of_f64(rate * since.as_secs_f64())).min(most);
        while let Some(slot) = self.flights.iter().position(Option::is_none) {
            if self.budget < u64_of(READ_BYTES_MAX) && self.budget < most {
                return Ok(());
            }
            let Some((number, units)) = self.next_units() else { return Ok(()) };
            self.budget = self.budget.saturating_sub(self.start(slot, number, units)?);
        }
        Ok(())
    }

    /// The next units to read that lie in one region.
    fn next_units(&mut self) -> Option<(usize, Range<u64>)> {
        if self.queued.is_empty() {
            for number in 0..self.disks.len() {
                let Some(run) = self.disks[number].take_run() else { continue };
                // A disk without a table has nothing to learn.
                let Some(table) = self.tables.table(self.disks[number].disk) else { continue };
                let sectors = u64_of(run.start) * SECTORS_PER_PAGE..u64_of(run.end) * SECTORS_PER_PAGE;
                self.queued.extend(table.layout().touching(sectors).map(|units| (number, units)));
            }
        }
        self.queued.pop()
    }

    fn start(&mut self, slot: usize, number: usize, units: Range<u64>) -> Result<u64, DiskError> {
        let written = &self.disks[number];
        let Some(table) = self.tables.table(written.disk) else { return Ok(0) };
        let ends = table.layout().sector(units.start).zip(table.layout().sector(units.end - 1));
        let Some((first, last)) = ends else { return Ok(0) };
        let from = first.bytes() / written.alignment * written.alignment;
        let to = (last.bytes() + PAGE_BYTES_U64).next_multiple_of(written.alignment);
        let sector = Sector::holding(from);
        let bytes = usize_of(to - from);
        self.reader.read(Read { disk: written.disk, sector, bytes, slot: Slot(slot) })?;
        self.flights[slot] = Some(Flight { number, units, sector });
        Ok(to - from)
    }

    /// Learns from the reads that have ended.
    fn collect(&mut self) -> Result<(), DiskError> {
        self.reader.complete(&mut self.arrived, Duration::ZERO)?;
        for completion in self.arrived.drain(..) {
            let Some(flight) = self.flights[completion.slot.0].take() else { continue };
            let Some(table) = self.tables.table(self.disks[flight.number].disk) else { continue };
            match completion.result {
                Ok(bytes) => {
                    let staged = &self.reader.staged(completion.slot)[..bytes];
                    learn(table, &self.disks[flight.number], &flight, staged);
                }
                Err(error) => {
                    // Only a hint is lost. The first one is worth a line.
                    if self.failed_reads == 0 {
                        tracing::warn!(%error, "a written block could not be read back for the index");
                    }
                    self.failed_reads += 1;
                }
            }
        }
        Ok(())
    }
}

/// Learns the units of `flight` whose pieces are all quiet still.
fn learn(table: &Table, written: &Written, flight: &Flight, staged: &[u8]) {
    for unit in flight.units.clone() {
        let Some(sector) = table.layout().sector(unit) else { continue };
        let at = usize_of(sector.bytes() - flight.sector.bytes());
        let Some(block) = staged.get(at..at + PAGE_BYTES) else { continue };
        let pieces = sector.0 / SECTORS_PER_PAGE..(sector.0 + SECTORS_PER_PAGE).div_ceil(SECTORS_PER_PAGE);
        let moving = pieces.into_iter().any(|piece| written.is_pending(usize_of(piece)));
        if moving || sector.bytes() + PAGE_BYTES_U64 > written.bytes {
            continue;
        }
        if let Ok(block) = <&[u8; PAGE_BYTES]>::try_from(block)
            && block.iter().any(|byte| *byte != 0)
        {
            table.learn(unit, fingerprint::hint(block));
        }
    }
}

impl super::Keeper for DiskKeeper {
    fn forget_written(&mut self) -> Result<u64, DiskError> {
        let mut total = 0;
        for written in &mut self.disks {
            if self.log.harvest(written.disk, &mut written.harvest)? == 0 {
                continue;
            }
            let table = self.tables.table(written.disk);
            for piece in written.harvest.iter() {
                if let Some(table) = table {
                    let sector = u64_of(piece) * SECTORS_PER_PAGE;
                    table.forget_sectors(sector..sector + SECTORS_PER_PAGE);
                }
                written.fresh.set(piece);
                written.resting.clear(piece);
                written.ready.clear(piece);
                total += 1;
            }
            written.harvest.clear_all();
        }
        Ok(total)
    }

    fn learn(&mut self, now: Moment) -> Result<(), DiskError> {
        self.turn(now);
        self.collect()?;
        self.read_ready(now)?;
        // Submits what was queued; on a fast disk some of it is there already.
        self.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::DiskInfo;
    use crate::index::layout::{Layout, Region};
    use crate::index::scan::tests::Bytes;
    use crate::index::{Duplicates, Keeper};
    use crate::memory::{GuestPage, PageBuf};
    use std::sync::{Arc, Mutex};

    /// A disk in memory that the test writes, its log, and a reader over it.
    #[derive(Clone)]
    struct World(Arc<Mutex<State>>);
    struct State {
        image: Vec<u8>,
        log: Vec<usize>,
        fail: bool,
        /// Written, and logged, right after the disk has answered the next read.
        surprise: Option<(u64, u8)>,
    }

    struct OneDisk(World, Vec<DiskInfo>);
    /// Answers with what stood there when it was asked, one call later.
    struct WorldReader(World, Bytes, bool);

    impl World {
        fn new(bytes: usize) -> Self {
            Self(Arc::new(Mutex::new(State {
                image: vec![0; bytes],
                log: Vec::new(),
                fail: false,
                surprise: None,
            })))
        }
        fn write(&self, sector: u64, fill: u8) {
            let mut state = self.0.lock().unwrap();
            let at = usize_of(sector) * 512;
            state.image[at..at + PAGE_BYTES].fill(fill);
            state.log.extend(at / PAGE_BYTES..(at + PAGE_BYTES).div_ceil(PAGE_BYTES));
        }
    }

    impl Disks for OneDisk {
        fn infos(&self) -> &[DiskInfo] {
            &self.1
        }
        fn alignment(&self, _: DiskId) -> usize {
            512
        }
        fn reader(&self, slots: usize) -> Result<Box<dyn Reader>, DiskError> {
            Ok(Box::new(WorldReader(self.0.clone(), Bytes::new(Vec::new(), slots), false)))
        }
        fn flush(&self) -> Result<(), DiskError> {
            Ok(())
        }
    }

    impl Reader for WorldReader {
        fn slots(&self) -> usize {
            self.1.slots()
        }
        fn read(&mut self, read: Read) -> Result<(), DiskError> {
            self.1.image.clone_from(&self.0.0.lock().unwrap().image);
            let surprise = self.0.0.lock().unwrap().surprise.take();
            if let Some((sector, fill)) = surprise {
                self.0.write(sector, fill);
            }
            self.2 = true;
            self.1.read(read)
        }
        fn read_direct(&mut self, _: Read, _: &[Option<GuestPage<'_>>]) -> Result<(), DiskError> {
            unreachable!("a keeper reads into slots")
        }
        fn complete(&mut self, done: &mut Vec<Completion>, wait: Duration) -> Result<(), DiskError> {
            if std::mem::take(&mut self.2) {
                return Ok(());
            }
            let before = done.len();
            self.1.complete(done, wait)?;
            if self.0.0.lock().unwrap().fail {
                for completion in &mut done[before..] {
                    completion.result = Err(DiskError::Short { disk: DiskId(0), end: 0, wanted: 1 });
                }
            }
            Ok(())
        }
        fn staged(&self, slot: Slot) -> &[u8] {
            self.1.staged(slot)
        }
    }

    impl WriteLog for World {
        fn harvest(&mut self, disk: DiskId, into: &mut Bitmap) -> Result<u64, DiskError> {
            assert_eq!(disk, DiskId(0));
            let log = std::mem::take(&mut self.0.lock().unwrap().log);
            Ok(u64_of(log.into_iter().filter(|piece| into.set(*piece)).count()))
        }
    }

    const SECTORS: u64 = 12_000;

    fn keeper(world: &World) -> (DiskKeeper, Tables) {
        let region = |start, end, stride| Region { start, end, stride };
        let layout = Layout::new(vec![region(0, 63, 8), region(63, 10_000, 8), region(10_000, SECTORS, 2)]);
        let tables = Tables::new(vec![Some(Arc::new(Table::new(layout.unwrap(), 10_000)))]);
        let bytes = SECTORS * 512;
        let info = DiskInfo { name: "disk0".into(), path: "/d".into(), bytes, identity: String::new() };
        let disks = OneDisk(world.clone(), vec![info]);
        let habits = Habits { quiet: Duration::from_millis(100), bytes_per_second: 1 << 30 };
        let keeper = DiskKeeper::new(tables.clone(), &disks, Box::new(world.clone()), habits).unwrap();
        (keeper, tables)
    }

    fn find(tables: &Tables, fill: u8) -> Option<u64> {
        tables.find(&PageBuf([fill; PAGE_BYTES]), None).map(|found| found.sector.0)
    }

    /// Steps until `until`, ten milliseconds at a time.
    fn run(keeper: &mut DiskKeeper, now: &mut u64, until_ms: u64) {
        while *now < until_ms {
            *now += 10;
            keeper.forget_written().unwrap();
            keeper.learn(Moment(*now * 1_000_000)).unwrap();
        }
    }

    #[test]
    fn written_blocks_are_forgotten_at_once_and_learnt_when_quiet_at_every_phase() {
        let world = World::new(usize_of(SECTORS) * 512);
        let (mut keeper, tables) = keeper(&world);
        let mut now = 0;
        run(&mut keeper, &mut now, 10);
        let places = [(8, 1), (63 + 800, 2), (10_000 + 34, 3)];
        for (sector, fill) in places {
            world.write(sector, fill);
        }
        run(&mut keeper, &mut now, 100);
        assert!(places.iter().all(|(_, fill)| find(&tables, *fill).is_none()), "not quiet yet");
        run(&mut keeper, &mut now, 400);
        for (sector, fill) in places {
            assert_eq!(find(&tables, fill), Some(sector));
        }
        // One is written again, with other contents: gone with the next call, and back under its new contents.
        world.write(63 + 800, 9);
        assert!(keeper.forget_written().unwrap() >= 1);
        assert_eq!(find(&tables, 2), None);
        run(&mut keeper, &mut now, 800);
        assert_eq!((find(&tables, 2), find(&tables, 9)), (None, Some(63 + 800)));
        // And zeroed: nothing to find.
        world.write(63 + 800, 0);
        run(&mut keeper, &mut now, 1200);
        assert_eq!((find(&tables, 9), find(&tables, 0)), (None, None));
        assert_eq!(find(&tables, 1), Some(8));
    }

    #[test]
    fn what_is_written_while_it_is_read_is_not_learnt_from_that_read() {
        let world = World::new(usize_of(SECTORS) * 512);
        let (mut keeper, tables) = keeper(&world);
        let mut now = 0;
        world.write(79, 5);
        run(&mut keeper, &mut now, 150);
        world.0.lock().unwrap().surprise = Some((79, 6));
        // The read that is interrupted, step by step: its stale contents never stay findable after a harvest.
        while now < 600 {
            now += 10;
            keeper.learn(Moment(now * 1_000_000)).unwrap();
            keeper.forget_written().unwrap();
            assert!(find(&tables, 5).is_none_or(|_| world.0.lock().unwrap().image[80 * 512] == 5));
        }
        assert_eq!((find(&tables, 5), find(&tables, 6)), (None, Some(79)));
    }

    #[test]
    fn a_block_written_all_the_time_is_never_read() {
        let world = World::new(usize_of(SECTORS) * 512);
        let (mut keeper, tables) = keeper(&world);
        let mut now = 0;
        for turn in 0..20 {
            world.write(79, turn + 1);
            let until = now + 50;
            run(&mut keeper, &mut now, until);
            assert!((0..=20).all(|fill| find(&tables, fill).is_none()));
        }
    }

    #[test]
    fn keeps_to_its_rate() {
        let world = World::new(usize_of(SECTORS) * 512);
        let (mut keeper, tables) = keeper(&world);
        keeper.habits.bytes_per_second = 2 << 20;
        for piece in 0..1000 {
            world.write(63 + piece * 8, 1 + u8::try_from(piece % 200).unwrap());
        }
        let mut now = 0;
        run(&mut keeper, &mut now, 1200);
        let known = tables.table(DiskId(0)).unwrap().known_units().count();
        assert!((250..800).contains(&known), "{known} blocks after a second at 512 a second");
        run(&mut keeper, &mut now, 4000);
        assert_eq!(tables.table(DiskId(0)).unwrap().known_units().count(), 1000);
    }

    #[test]
    fn a_read_that_fails_costs_a_hint_and_no_more() {
        let world = World::new(usize_of(SECTORS) * 512);
        let (mut keeper, tables) = keeper(&world);
        world.write(79, 5);
        world.0.lock().unwrap().fail = true;
        let mut now = 0;
        run(&mut keeper, &mut now, 500);
        assert!(keeper.failed_reads() > 0 && find(&tables, 5).is_none());
        world.0.lock().unwrap().fail = false;
        world.write(79, 5);
        run(&mut keeper, &mut now, 1000);
        assert_eq!(find(&tables, 5), Some(79));
    }
}
