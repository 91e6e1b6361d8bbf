//! Reading a disk, or parts of it, into its table.
//!
//! Units are read in runs: large reads in a row, as many under way as the reader has slots, each looked at while the
//! next ones are on their way. A block that lies over the seam of two reads (a partition at an odd sector) is put
//! together from both. Zero blocks are forgotten, not entered; holes are never read.
//!
//! Control path: runs in the task that called it, over any [`Reader`], so the simulator scans its disks with it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::table::{Learned, Table};
use crate::disk::{Completion, Read, Reader, Slot};
use crate::error::DiskError;
use crate::fingerprint;
use crate::limits::READ_BYTES_MAX;
use crate::units::{DiskId, PAGE_BYTES, PAGE_BYTES_U64, SECTOR_BYTES, Sector, u64_of, usize_of};

/// A read that takes longer than this has failed.
const READ_WAIT: Duration = Duration::from_secs(60);

/// The disk to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its number for the reader.
    pub disk: DiskId,
    /// Its alignment in bytes.
    pub alignment: usize,
}

/// What a scan met.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Bytes read.
    pub bytes_read: u64,
    /// Blocks looked at.
    pub blocks: u64,
    /// Of these, all zero.
    pub zero: u64,
    /// Of these, not entered because their content already stands at enough places.
    pub repeated: u64,
}

/// Whether a scan goes on; asked after every read with the bytes it brought. May sleep, to limit the rate.
pub type Pace<'p> = dyn FnMut(u64) -> bool + 'p;

/// The units whose blocks lie, at least in part, in the byte ranges `data`, as runs in order.
#[must_use]
pub fn units_over(table: &Table, data: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in data {
        let sectors = range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES);
        for run in table.layout().touching(sectors) {
            match runs.last_mut() {
                Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
                _ => runs.push(run),
            }
        }
    }
    runs
}

/// Reads the blocks of `runs` and has `table` know just what stands there now. Returns early, with what it has met so
/// far, when `pace` says so.
pub fn scan(
    reader: &mut dyn Reader,
    source: Source,
    table: &mut Table,
    runs: &[Range<u64>],
    pace: &mut Pace<'_>,
) -> Result<Counts, DiskError> {
    let mut counts = Counts::default();
    let mut pieces = Pieces::new(table, source, runs);
    let mut under_way: VecDeque<(Slot, Piece)> = VecDeque::new();
    let mut free: Vec<Slot> = (0..reader.slots()).map(Slot).collect();
    let mut arrived: Vec<Completion> = Vec::new();
    let mut seam = Seam::default();
    loop {
        while let Some(slot) = free.pop() {
            let Some(piece) = pieces.next(table) else {
                free.push(slot);
                break;
            };
            let sector = Sector::holding(piece.start);
            reader.read(Read { disk: source.disk, sector, bytes: piece.bytes, slot })?;
            under_way.push_back((slot, piece));
        }
        let Some((slot, piece)) = under_way.pop_front() else { return Ok(counts) };
        let got = wait_for(reader, &mut arrived, slot, source.disk)?;
        let bytes = &reader.staged(slot)[..got];
        counts.bytes_read += u64_of(got);
        look(bytes, &piece, &mut seam, table, &mut counts);
        free.push(slot);
        if !pace(u64_of(got)) {
            // What is under way ends in the reader; its slots are not looked at again.
            drain(reader, &mut arrived, &under_way, source.disk)?;
            return Ok(counts);
        }
    }
}

fn drain(
    reader: &mut dyn Reader,
    arrived: &mut Vec<Completion>,
    under_way: &VecDeque<(Slot, Piece)>,
    disk: DiskId,
) -> Result<(), DiskError> {
    for (slot, _) in under_way {
        wait_for(reader, arrived, *slot, disk)?;
    }
    Ok(())
}

/// Waits for the read in `slot`; keeps what else arrives in `arrived`.
fn wait_for(
    reader: &mut dyn Reader,
    arrived: &mut Vec<Completion>,
    slot: Slot,
    disk: DiskId,
) -> Result<usize, DiskError> {
    loop {
        if let Some(at) = arrived.iter().position(|completion| completion.slot == slot) {
            return arrived.swap_remove(at).result;
        }
        let before = arrived.len();
        reader.complete(arrived, READ_WAIT)?;
        if arrived.len() == before {
            return Err(DiskError::Os {
                doing: format!("scanning disk {}", disk.0),
                remedy: "Is the storage reachable? Look at the kernel log of this host",
                source: std::io::ErrorKind::TimedOut.into(),
            });
        }
    }
}

/// One read, and the units that begin in it or before it and have not been looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    /// Byte it starts at, aligned.
    start: u64,
    /// Bytes, aligned.
    bytes: usize,
    /// The first unit of its run, if it is the run's first piece.
    begins: Option<u64>,
    /// The unit after its run's last.
    end: u64,
    /// Bytes from one unit's start to the next.
    stride: u64,
}

/// Cuts runs of units into aligned reads.
struct Pieces {
    /// Runs within one region each, in reverse order.
    runs: Vec<Range<u64>>,
    source: Source,
    /// The run being cut: its units, the next byte to read, the byte it ends at.
    current: Option<(Range<u64>, u64, u64, bool)>,
}

impl Pieces {
    fn new(table: &Table, source: Source, runs: &[Range<u64>]) -> Self {
        let mut cut = Vec::new();
        for run in runs {
            for region in 0..table.layout().regions().len() {
                let units = table.layout().units_of(region);
                let part = run.start.max(units.start)..run.end.min(units.end);
                if part.start < part.end {
                    cut.push(part);
                }
            }
        }
        cut.reverse();
        Self { runs: cut, source, current: None }
    }

    fn next(&mut self, table: &Table) -> Option<Piece> {
        let unit = u64_of(self.source.alignment);
        if self.current.is_none() {
            let run = self.runs.pop()?;
            let from = table.layout().sector(run.start)?.bytes();
            let to = table.layout().sector(run.end - 1)?.bytes() + PAGE_BYTES_U64;
            self.current = Some((run, from / unit * unit, to.next_multiple_of(unit), true));
        }
        let (run, at, end, first) = self.current.take()?;
        let bytes = (end - at).min(u64_of(READ_BYTES_MAX));
        let piece = Piece {
            start: at,
            bytes: usize_of(bytes),
            begins: first.then_some(run.start),
            end: run.end,
            stride: table
                .layout()
                .sector(run.start + 1)
                .zip(table.layout().sector(run.start))
                .filter(|_| run.end - run.start > 1)
                .map_or(PAGE_BYTES_U64, |(next, this)| next.bytes() - this.bytes()),
        };
        if at + bytes < end {
            self.current = Some((run, at + bytes, end, false));
        }
        Some(piece)
    }
}

/// What is left of the read before, and the next unit of the run.
#[derive(Default)]
struct Seam {
    /// The bytes from `start` to the end of the last read: of units that go on in the next one.
    bytes: Vec<u8>,
    start: u64,
    unit: u64,
    /// Byte at which `unit` begins.
    at: u64,
}

/// Looks at every unit that ends within `bytes`, which stand at `piece.start`.
fn look(bytes: &[u8], piece: &Piece, seam: &mut Seam, table: &mut Table, counts: &mut Counts) {
    let end = piece.start + u64_of(bytes.len());
    if let Some(unit) = piece.begins {
        seam.unit = unit;
        seam.at = table.layout().sector(unit).map_or(piece.start, Sector::bytes);
        seam.bytes.clear();
    }
    let mut stitched = [0; PAGE_BYTES];
    while seam.unit < piece.end && seam.at + PAGE_BYTES_U64 <= end {
        let block: &[u8] = if seam.at >= piece.start {
            let from = usize_of(seam.at - piece.start);
            &bytes[from..from + PAGE_BYTES]
        } else {
            let before = &seam.bytes[usize_of(seam.at - seam.start)..];
            stitched[..before.len()].copy_from_slice(before);
            stitched[before.len()..].copy_from_slice(&bytes[..PAGE_BYTES - before.len()]);
            &stitched
        };
        if let Ok(block) = block.try_into() {
            enter(block, seam.unit, table, counts);
        }
        seam.unit += 1;
        seam.at += piece.stride;
    }
    if seam.unit < piece.end && seam.at < end {
        // Keep what the next unit needs: the end of this read, after what was kept where the unit began before it.
        if seam.at >= piece.start {
            seam.bytes.clear();
            seam.bytes.extend_from_slice(&bytes[usize_of(seam.at - piece.start)..]);
        } else {
            seam.bytes.drain(..usize_of(seam.at - seam.start));
            seam.bytes.extend_from_slice(bytes);
        }
        seam.start = seam.at;
    }
}

/// Has `table` know what stands at `unit`.
pub(super) fn enter(block: &[u8; PAGE_BYTES], unit: u64, table: &mut Table, counts: &mut Counts) {
    static ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    counts.blocks += 1;
    if *block == ZERO {
        counts.zero += 1;
        table.forget(unit);
        return;
    }
    if table.is_crowded() {
        table.grow(0);
    }
    match table.learn(unit, fingerprint::hint(block)) {
        Learned::Enough => counts.repeated += 1,
        // Room is made before it runs out; what still finds none is left out.
        Learned::Added | Learned::Known | Learned::Full => {}
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::index::layout::{Layout, Region};
    use crate::memory::GuestPage;
    use proptest::prelude::*;

    /// A reader over bytes in memory that completes in an order of its own.
    pub(crate) struct Bytes {
        pub(crate) image: Vec<u8>,
        pub(crate) slots: Vec<Vec<u8>>,
        queued: Vec<Read>,
        pub(crate) read_bytes: u64,
    }

    impl Bytes {
        pub(crate) fn new(image: Vec<u8>, slots: usize) -> Self {
            Self { image, slots: vec![Vec::new(); slots], queued: Vec::new(), read_bytes: 0 }
        }
    }

    impl Reader for Bytes {
        fn slots(&self) -> usize {
            self.slots.len()
        }
        fn read(&mut self, read: Read) -> Result<(), DiskError> {
            assert!(self.queued.iter().all(|other| other.slot != read.slot));
            self.queued.push(read);
            Ok(())
        }
        fn read_direct(&mut self, _: Read, _: &[Option<GuestPage<'_>>]) -> Result<(), DiskError> {
            unreachable!("scans read into slots")
        }
        fn complete(&mut self, done: &mut Vec<Completion>, _: Duration) -> Result<(), DiskError> {
            // Last in, first out, one at a time: as far from the order asked as can be.
            let Some(read) = self.queued.pop() else { return Ok(()) };
            let from = usize_of(read.sector.bytes()).min(self.image.len());
            let to = (from + read.bytes).min(self.image.len());
            self.read_bytes += u64_of(to - from);
            self.slots[read.slot.0] = self.image[from..to].to_vec();
            done.push(Completion { slot: read.slot, result: Ok(to - from) });
            Ok(())
        }
        fn staged(&self, slot: Slot) -> &[u8] {
            &self.slots[slot.0]
        }
    }

    fn pattern(sectors: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut image = vec![0; sectors * 512];
        for sector in image.chunks_mut(512) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // A quarter of the sectors zero, so that some blocks are.
            if state >> 62 != 0 {
                sector[..8].copy_from_slice(&state.to_le_bytes());
            }
        }
        image
    }

    /// What a table should know of `image`: the hint of every block that is not zero.
    fn oracle(layout: &Layout, image: &[u8]) -> Vec<Option<u64>> {
        let block = |unit| {
            let from = usize_of(layout.sector(unit).unwrap().bytes());
            let block: [u8; PAGE_BYTES] = image[from..from + PAGE_BYTES].try_into().unwrap();
            (block != [0; PAGE_BYTES]).then(|| fingerprint::hint(&block))
        };
        (0..layout.units()).map(block).collect()
    }

    fn check(table: &Table, oracle: &[Option<u64>]) {
        for (unit, hint) in (0..).zip(oracle) {
            match hint {
                Some(hint) => assert!(table.holds(unit, *hint), "unit {unit}"),
                None => assert!(!table.knows(unit), "unit {unit} is zero"),
            }
        }
    }

    fn scan_all(image: &[u8], layout: Layout, alignment: usize) -> (Table, Counts) {
        let mut table = Table::new(layout, 0);
        let mut reader = Bytes::new(image.to_vec(), 3);
        let source = Source { disk: DiskId(0), alignment };
        let runs = std::iter::once(0..table.layout().units()).collect::<Vec<_>>();
        let counts = scan(&mut reader, source, &mut table, &runs, &mut |_| true).unwrap();
        (table, counts)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_block_of_every_region_is_known(
            start in 0_u64..130,
            stride in prop_oneof![Just(1_u64), Just(2), Just(8)],
            extra in 0_usize..40,
            alignment in prop_oneof![Just(512_usize), Just(4096)],
            seed in any::<u64>(),
        ) {
            let sectors = 2 * READ_BYTES_MAX / 512 + extra;
            let image = pattern(sectors, seed);
            let end = u64_of(sectors);
            let layout = Layout::new(vec![
                Region { start: 0, end: start, stride: 8 },
                Region { start, end: end / 2, stride },
                Region { start: end / 2, end, stride: 8 },
            ]).unwrap();
            let (table, counts) = scan_all(&image, layout.clone(), alignment);
            let oracle = oracle(&layout, &image);
            check(&table, &oracle);
            prop_assert_eq!(counts.blocks, layout.units());
            prop_assert_eq!(counts.zero, u64_of(oracle.iter().filter(|hint| hint.is_none()).count()));
            prop_assert!(counts.bytes_read <= u64_of(image.len()) + 3 * 8192);
        }

        #[test]
        fn rescanning_what_was_written_is_as_good_as_scanning_all(
            writes in proptest::collection::vec((0_usize..4000, 1_usize..30), 1..12),
            seed in any::<u64>(),
        ) {
            let mut image = pattern(4096, seed);
            let layout = Layout::new(vec![
                Region { start: 0, end: 63, stride: 8 },
                Region { start: 63, end: 2000, stride: 8 },
                Region { start: 2000, end: 4096, stride: 2 },
            ]).unwrap();
            let (mut table, _) = scan_all(&image, layout.clone(), 512);
            let fresh = pattern(4096, seed ^ 0xffff);
            let mut written = Vec::new();
            for (at, length) in writes {
                let range = at * 512..(at + length).min(4096) * 512;
                image[range.clone()].copy_from_slice(&fresh[range.clone()]);
                written.push(u64_of(range.start)..u64_of(range.end));
            }
            written.sort_by_key(|range| range.start);
            let runs = units_over(&table, &written);
            let source = Source { disk: DiskId(0), alignment: 512 };
            let mut reader = Bytes::new(image.clone(), 2);
            scan(&mut reader, source, &mut table, &runs, &mut |_| true).unwrap();
            check(&table, &oracle(&layout, &image));
        }
    }

    #[test]
    fn stops_when_told_and_leaves_nothing_under_way() {
        let image = pattern(8 * READ_BYTES_MAX / 512, 5);
        let mut table = Table::new(Layout::plain(u64_of(image.len())), 0);
        let source = Source { disk: DiskId(0), alignment: 512 };
        let mut reader = Bytes::new(image, 4);
        let runs = std::iter::once(0..table.layout().units()).collect::<Vec<_>>();
        let mut reads = 0;
        let mut pace = |_| {
            reads += 1;
            reads < 3
        };
        let counts = scan(&mut reader, source, &mut table, &runs, &mut pace).unwrap();
        assert_eq!(counts.bytes_read, 3 * u64_of(READ_BYTES_MAX));
        assert!(reader.queued.is_empty());
    }
}
