//! The table behind an index: from a page's hint to the places on one disk where it may stand.
//!
//! ```text
//!     forward: buckets of 8 words, one cache line each            reverse: a 32-bit tag for each unit, in chunks
//!     +--------+--------+-----+--------+                          +-------+-------+-------+----
//!     | tag:24 | unit+1:40    |  ...   |  --- unit, and its tag ->|  tag  |   0   |  tag  | ...
//!     +--------+--------+-----+--------+                          +-------+-------+-------+----
//!       0 = never used, all ones = dead                             0 = nothing known of this unit
//! ```
//!
//! A hint's low 32 bits are the reverse tag and choose the bucket; its high 24 bits are the forward tag. So an entry
//! counts only if both agree, and from a unit alone the entry can be found and removed. A full bucket runs over into
//! the next ones; a bucket with a never-used word ends the run.
//!
//! Any number of threads look up while one learns and forgets; no lock, one writer at a time. A unit that was forgotten
//! is not found any more as soon as `forget` has returned: its tag is cleared first. What is found is a hint, so a
//! lookup that races a writer may be wrong in either way, but never leads outside the disk. No system calls here.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::OnceLock;

use super::layout::Layout;
use crate::memory::Mapping;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{SECTORS_PER_PAGE, Sector, u64_of, usize_of};

/// Words of a bucket: a cache line.
pub const BUCKET_WORDS: usize = 8;
/// Units whose tags are kept together; a chunk without any takes no room.
pub const CHUNK_UNITS: u64 = 4096;
/// Words of such a chunk.
pub const CHUNK_WORDS: usize = 2048;
/// Buckets a run goes over at most.
const PROBES_MAX: u64 = 8;
/// Places remembered for one content; more would only make every lookup of it slower.
const PLACES_MAX: usize = 4;
/// Entries for a bucket at which a growing table is made larger: 0.7 of its words would be 5.6.
const LOAD_WORDS: u64 = 5;

const UNIT_MASK: u64 = (1 << 40) - 1;
const UNUSED: u64 = 0;
const DEAD: u64 = u64::MAX;

/// The unit that an entry names. A word that names none (the table may be a file's) gives one that no disk has.
#[inline]
fn unit_of(word: u64) -> u64 {
    (word & UNIT_MASK).wrapping_sub(1)
}

/// A hint as the table keeps it.
#[derive(Clone, Copy)]
struct Mark {
    /// 24 bits, in place.
    high: u64,
    /// 32 bits, never 0.
    low: u64,
}

fn mark(hint: u64) -> Mark {
    Mark { high: hint & !UNIT_MASK, low: (hint & u64::from(u32::MAX)).max(1) }
}

/// Words of a mapped file.
#[cfg(not(all(test, feature = "loom")))]
#[inline]
fn mapped<'m>(map: &'m Mapping, range: &Range<usize>) -> &'m [AtomicU64] {
    &map.words()[range.clone()]
}

/// The kernel's words are not loom's.
#[cfg(all(test, feature = "loom"))]
fn mapped<'m>(_: &'m Mapping, range: &Range<usize>) -> &'m [AtomicU64] {
    unreachable!("a model maps no file, and has no words {range:?} of one")
}

/// Words of this process, or of a mapped file.
enum Words {
    Own(Box<[AtomicU64]>),
    Mapped(Arc<Mapping>, Range<usize>),
}

impl Words {
    fn own(count: usize) -> Self {
        Self::Own((0..count).map(|_| AtomicU64::new(0)).collect())
    }
    #[inline]
    fn get(&self) -> &[AtomicU64] {
        match self {
            Self::Own(words) => words,
            Self::Mapped(map, range) => mapped(map, range),
        }
    }
}

/// The tags of [`CHUNK_UNITS`] units, two in a word.
enum Chunk {
    Mapped(Range<usize>),
    Own(OnceLock<Box<[AtomicU64]>>),
}

/// What became of something to learn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Learned {
    /// It can be found now.
    Added,
    /// It was known before.
    Known,
    /// There are enough places of this content; found only as the block after another one.
    Enough,
    /// No room; found only as the block after another one. Where [`Table::is_crowded`], [`Table::grow`] makes room.
    Full,
}

/// Where contents may stand on one disk.
pub struct Table {
    layout: Layout,
    map: Option<Arc<Mapping>>,
    forward: Words,
    reverse: Vec<Chunk>,
    entries: AtomicU64,
    /// First sector that is not there; entries beyond it are of a disk that has shrunk since.
    end: u64,
}

/// What a mapped file says of its table; held against the file before a table is made of it.
pub(super) struct MappedParts {
    pub(super) layout: Layout,
    pub(super) forward: Range<usize>,
    /// Words of each chunk, `None` for one that is not stored.
    pub(super) chunks: Vec<Option<Range<usize>>>,
    pub(super) entries: u64,
}

impl Table {
    /// Nothing known, with room for about `entries`.
    #[must_use]
    pub fn new(layout: Layout, entries: u64) -> Self {
        let buckets = usize_of(entries / LOAD_WORDS + 1);
        let chunks = layout.units().div_ceil(CHUNK_UNITS);
        Self {
            end: layout.regions().last().map_or(0, |region| region.end),
            layout,
            map: None,
            forward: Words::own(buckets * BUCKET_WORDS),
            reverse: (0..chunks).map(|_| Chunk::Own(OnceLock::new())).collect(),
            entries: AtomicU64::new(0),
        }
    }

    /// A table in a private mapping of an index file.
    pub(super) fn mapped(map: Arc<Mapping>, parts: MappedParts) -> Self {
        let chunk = |words: Option<Range<usize>>| words.map_or(Chunk::Own(OnceLock::new()), Chunk::Mapped);
        Self {
            end: parts.layout.regions().last().map_or(0, |region| region.end),
            layout: parts.layout,
            forward: Words::Mapped(Arc::clone(&map), parts.forward),
            map: Some(map),
            reverse: parts.chunks.into_iter().map(chunk).collect(),
            entries: AtomicU64::new(parts.entries),
        }
    }

    /// Goes over to a layout whose units are those of this one and more after them, and to a disk that ends at sector
    /// `end`: nothing is found beyond it.
    ///
    /// # Panics
    /// If `layout` numbers its units in another way.
    pub fn adopt(&mut self, layout: Layout, end: Sector) {
        assert!(layout.extends(&self.layout), "units keep their numbers");
        let chunks = usize_of(layout.units().div_ceil(CHUNK_UNITS));
        self.reverse.resize_with(chunks, || Chunk::Own(OnceLock::new()));
        self.layout = layout;
        self.end = end.0;
    }

    /// Finds nothing at or past sector `end` from now on: the disk has become smaller.
    pub fn end_at(&mut self, end: Sector) {
        self.end = end.0;
    }

    /// The disk's regions.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    /// Entries that can be found.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }
    /// Words in the forward table.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        u64_of(self.forward.get().len())
    }
    /// Bytes it holds, mapped or not.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let mapped = self.map.as_ref().map_or(0, |map| map.bytes());
        let own = match &self.forward {
            Words::Own(words) => words.len() * 8,
            Words::Mapped(..) => 0,
        };
        let chunks =
            self.reverse.iter().filter(|c| matches!(c, Chunk::Own(once) if once.get().is_some())).count();
        u64_of(mapped + own + chunks * CHUNK_WORDS * 8 + self.reverse.len() * size_of::<Chunk>())
    }

    #[inline]
    fn chunk(&self, unit: u64) -> Option<&[AtomicU64]> {
        match self.reverse.get(usize_of(unit / CHUNK_UNITS))? {
            Chunk::Own(once) => once.get().map(|words| &**words),
            Chunk::Mapped(range) => self.map.as_ref().map(|map| mapped(map, range)),
        }
    }

    /// What is known of `unit`: the low half of its hint, 0 for nothing.
    #[inline]
    fn tag(&self, unit: u64) -> u64 {
        let Some(words) = self.chunk(unit) else { return 0 };
        let within = unit % CHUNK_UNITS;
        let word = words[usize_of(within / 2)].load(Ordering::Acquire);
        (word >> (32 * (within % 2))) & u64::from(u32::MAX)
    }

    fn set_tag(&self, unit: u64, tag: u64) {
        let words = match &self.reverse[usize_of(unit / CHUNK_UNITS)] {
            // Clearing what was never set needs no chunk.
            Chunk::Own(once) if tag == 0 && once.get().is_none() => return,
            Chunk::Own(once) => once.get_or_init(|| (0..CHUNK_WORDS).map(|_| AtomicU64::new(0)).collect()),
            Chunk::Mapped(range) => match &self.map {
                Some(map) => mapped(map, range),
                None => return,
            },
        };
        let within = unit % CHUNK_UNITS;
        let (word, shift) = (&words[usize_of(within / 2)], 32 * (within % 2));
        // One writer: nobody else stores between these two.
        let others = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        word.store(others | tag << shift, Ordering::Release);
    }

    /// The buckets of a run, first to last.
    #[inline]
    fn run(&self, low: u64) -> impl Iterator<Item = &[AtomicU64]> {
        let words = self.forward.get();
        let buckets = u64_of(words.len() / BUCKET_WORDS);
        let first = (low * buckets) >> 32;
        (first..first + PROBES_MAX.min(buckets)).map(move |number| {
            let at = usize_of(number % buckets) * BUCKET_WORDS;
            &words[at..at + BUCKET_WORDS]
        })
    }

    /// A sector where the content with this hint may stand: the one right after the block at `near`, else the next
    /// one after it, else any.
    #[must_use]
    pub fn find(&self, hint: u64, near: Option<Sector>) -> Option<Sector> {
        let wanted = mark(hint);
        let inside = |sector: &Sector| sector.0.saturating_add(SECTORS_PER_PAGE) <= self.end;
        let after = near.map_or(Sector(0), |near| Sector(near.0.saturating_add(SECTORS_PER_PAGE)));
        if near.is_some()
            && let Some(unit) = self.layout.unit(after)
            && self.tag(unit) == wanted.low
            && inside(&after)
        {
            return Some(after);
        }
        let mut best: Option<Sector> = None;
        for bucket in self.run(wanted.low) {
            let mut ends = false;
            for word in bucket {
                let word = word.load(Ordering::Acquire);
                ends |= word == UNUSED;
                if word & !UNIT_MASK != wanted.high || word == UNUSED || word == DEAD {
                    continue;
                }
                let unit = unit_of(word);
                if self.tag(unit) != wanted.low {
                    continue;
                }
                let found = self.layout.sector(unit).filter(inside);
                // Distance forward from `after`; what lies before it is far.
                let distance = |sector: Sector| sector.0.wrapping_sub(after.0);
                best = match (best, found) {
                    (Some(best), Some(found)) if distance(found) < distance(best) => Some(found),
                    (None, found) => found,
                    (best, _) => best,
                };
            }
            if ends {
                break;
            }
        }
        best
    }

    /// Whether `unit` is remembered with this hint, as far as a lookup would tell.
    #[must_use]
    pub fn holds(&self, unit: u64, hint: u64) -> bool {
        self.tag(unit) == mark(hint).low
    }

    /// Whether anything is known of `unit`.
    #[must_use]
    pub fn knows(&self, unit: u64) -> bool {
        self.tag(unit) != 0
    }

    /// Remembers that the block at `unit` has this hint, instead of what was known of it.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn learn(&self, unit: u64, hint: u64) -> Learned {
        assert!(unit < self.layout.units(), "unit {unit} of {}", self.layout.units());
        let wanted = mark(hint);
        if self.tag(unit) == wanted.low
            && self
                .slot_of(unit, wanted.low)
                .is_some_and(|(word, _)| word.load(Ordering::Relaxed) == wanted.high | (unit + 1))
        {
            return Learned::Known;
        }
        self.forget(unit);
        self.set_tag(unit, wanted.low);
        self.insert(unit, wanted)
    }

    fn insert(&self, unit: u64, wanted: Mark) -> Learned {
        let (mut free, mut places) = (None, 0);
        for bucket in self.run(wanted.low) {
            let mut ends = false;
            for slot in bucket {
                let word = slot.load(Ordering::Relaxed);
                ends |= word == UNUSED;
                if word == UNUSED || word == DEAD {
                    free = free.or(Some(slot));
                } else if word & !UNIT_MASK == wanted.high && self.tag(unit_of(word)) == wanted.low {
                    places += 1;
                }
            }
            if ends {
                break;
            }
        }
        match free {
            _ if places >= PLACES_MAX => Learned::Enough,
            None => Learned::Full,
            Some(slot) => {
                slot.store(wanted.high | (unit + 1), Ordering::Release);
                self.entries.fetch_add(1, Ordering::Relaxed);
                Learned::Added
            }
        }
    }

    /// The word of `unit`'s entry and its bucket, if it has one.
    fn slot_of(&self, unit: u64, low: u64) -> Option<(&AtomicU64, &[AtomicU64])> {
        for bucket in self.run(low) {
            let mut ends = false;
            for slot in bucket {
                let word = slot.load(Ordering::Relaxed);
                if word != DEAD && word & UNIT_MASK == unit + 1 {
                    return Some((slot, bucket));
                }
                ends |= word == UNUSED;
            }
            if ends {
                return None;
            }
        }
        None
    }

    /// Forgets what is known of `unit`; whether anything was.
    pub fn forget(&self, unit: u64) -> bool {
        let low = self.tag(unit);
        if low == 0 {
            return false;
        }
        // From here on no lookup finds it; the entry is only rubbish to clear away.
        self.set_tag(unit, 0);
        if let Some((slot, bucket)) = self.slot_of(unit, low) {
            // Runs end at this bucket already if it has a never-used word; then one more does not change them.
            let ends = bucket.iter().any(|word| word.load(Ordering::Relaxed) == UNUSED);
            slot.store(if ends { UNUSED } else { DEAD }, Ordering::Release);
            self.entries.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// Forgets every unit with a sector in `sectors`; how many were known.
    pub fn forget_sectors(&self, sectors: Range<u64>) -> u64 {
        let units = self.layout.touching(sectors).flatten();
        u64_of(units.filter(|unit| self.forget(*unit)).count())
    }

    /// Makes room: a forward table of about `entries`, twice the present ones if that is more. Dead words are cleared.
    pub fn grow(&mut self, entries: u64) {
        self.refill(entries.max(self.entries() * 2).max(64));
    }

    /// Gives back room: a forward table with `spare` entries more than there are.
    pub fn shrink(&mut self, spare: u64) {
        self.refill(self.entries() + spare);
    }

    /// Moves all entries to a forward table for `room` of them. One that does not fit there has a bucket that somebody
    /// filled on purpose (the hint has no key): no amount of room would help it, and it is dropped.
    fn refill(&mut self, room: u64) {
        let fresh = Words::own(usize_of(room / LOAD_WORDS + 1) * BUCKET_WORDS);
        let old = std::mem::replace(&mut self.forward, fresh);
        self.entries.store(0, Ordering::Relaxed);
        let live = old.get().iter().map(|word| word.load(Ordering::Relaxed));
        for word in live.filter(|word| *word != UNUSED && *word != DEAD) {
            let unit = unit_of(word);
            let low = self.tag(unit);
            if low != 0 {
                self.insert(unit, Mark { high: word & !UNIT_MASK, low });
            }
        }
    }

    /// Whether learning much more would begin to fail.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.entries() * u64_of(BUCKET_WORDS) >= self.capacity() * LOAD_WORDS
    }

    /// The words of the forward table, to be stored.
    pub(super) fn forward_words(&self) -> impl Iterator<Item = u64> + '_ {
        self.forward.get().iter().map(|word| word.load(Ordering::Relaxed))
    }
    /// The chunks of the reverse table, `None` where nothing is known, to be stored.
    pub(super) fn chunk_words(&self) -> impl Iterator<Item = Option<&[AtomicU64]>> + '_ {
        (0..u64_of(self.reverse.len())).map(|number| {
            let words = self.chunk(number * CHUNK_UNITS)?;
            words.iter().any(|word| word.load(Ordering::Relaxed) != 0).then_some(words)
        })
    }
    /// Units something is known of, ascending.
    pub fn known_units(&self) -> impl Iterator<Item = u64> + '_ {
        let chunks = 0..u64_of(self.reverse.len());
        let there = chunks.filter(|number| self.chunk(number * CHUNK_UNITS).is_some());
        there
            .flat_map(|number| number * CHUNK_UNITS..((number + 1) * CHUNK_UNITS).min(self.layout.units()))
            .filter(|unit| self.knows(*unit))
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Table({} entries in {} words, {} units)",
            self.entries(),
            self.capacity(),
            self.layout.units()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::layout::Region;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Op {
        Learn(u64, u64),
        Forget(u64),
        Grow(u64),
        Shrink,
    }

    /// Hints that share buckets, high halves and low halves as much as they can.
    fn hints() -> impl Strategy<Value = u64> {
        let low = prop_oneof![0_u64..4, Just(u64::from(u32::MAX)), 0..=u64::from(u32::MAX)];
        (prop_oneof![0_u64..3, 0_u64..1 << 24], low).prop_map(|(high, low)| high << 40 | low)
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            12 => (0_u64..200, hints()).prop_map(|(unit, hint)| Op::Learn(unit, hint)),
            6 => (0_u64..200).prop_map(Op::Forget),
            1 => (0_u64..300).prop_map(Op::Grow),
            1 => Just(Op::Shrink),
        ];
        proptest::collection::vec(op, 1..300)
    }

    fn layout() -> Layout {
        let region = |start, end, stride| Region { start, end, stride };
        Layout::new(vec![region(0, 63, 8), region(63, 863, 8), region(863, 1200, 2)]).unwrap()
    }

    /// The oracle's key: the bits of a hint the table keeps.
    fn kept(hint: u64) -> u64 {
        mark(hint).high | mark(hint).low
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn finds_what_was_learnt_and_nothing_that_was_forgotten(ops in ops(), near in 0_u64..1200) {
            let mut table = Table::new(layout(), 10);
            let mut oracle: BTreeMap<u64, u64> = BTreeMap::new();
            // Contents that could once not be entered, for want of room or for plenty: they may stay unfound.
            let mut lost = std::collections::BTreeSet::new();
            for op in ops {
                match op {
                    Op::Learn(unit, hint) => {
                        let before = oracle.insert(unit, kept(hint));
                        match table.learn(unit, hint) {
                            Learned::Known => prop_assert_eq!(before, Some(kept(hint))),
                            Learned::Added => {}
                            Learned::Enough | Learned::Full => { lost.insert(kept(hint)); }
                        }
                    }
                    Op::Forget(unit) => prop_assert_eq!(table.forget(unit), oracle.remove(&unit).is_some()),
                    Op::Grow(_) | Op::Shrink => {
                        let before = table.entries();
                        if let Op::Grow(entries) = op { table.grow(entries) } else { table.shrink(0) }
                        if table.entries() < before {
                            lost.extend(oracle.values());
                        }
                    }
                }
            }
            for hint in oracle.values().copied().chain([0, 77 << 40 | 5]) {
                for near in [None, Some(Sector(near))] {
                    match table.find(hint, near) {
                        Some(sector) => {
                            let unit = table.layout().unit(sector).unwrap();
                            let known = oracle.get(&unit).copied();
                            let after = near.is_some_and(|near| near.0 + 8 == sector.0);
                            // Right after another block only the low half is compared.
                            let mask = if after { u64::from(u32::MAX) } else { u64::MAX };
                            prop_assert_eq!(known.map(|hint| hint & mask), Some(kept(hint) & mask));
                        }
                        None => prop_assert!(
                            lost.contains(&kept(hint)) || !oracle.values().any(|known| *known == kept(hint)),
                            "{:x} is not found", hint
                        ),
                    }
                }
            }
            let known: Vec<u64> = oracle.keys().copied().collect();
            prop_assert_eq!(table.known_units().collect::<Vec<_>>(), known);
            prop_assert!(table.entries() <= u64_of(oracle.len()));
        }
    }

    #[test]
    fn the_block_right_after_the_last_one_is_preferred_then_the_next_then_any() {
        let table = Table::new(Layout::plain(1 << 20), 100);
        for unit in [10, 20, 30, 40, 50, 60] {
            table.learn(unit, 7 << 40 | 9);
        }
        assert_eq!(table.entries(), 4, "popular contents are remembered at a few places only");
        let find =
            |near: Option<u64>| table.find(7 << 40 | 9, near.map(|unit| Sector(unit * 8))).unwrap().0 / 8;
        assert_eq!(find(None), 10);
        assert_eq!(find(Some(19)), 20);
        assert_eq!(find(Some(20)), 30);
        assert_eq!(find(Some(59)), 60, "the sixth is found as the one after another");
        assert_eq!(find(Some(45)), 10);
    }

    #[test]
    fn nothing_is_found_past_the_end_of_a_disk_that_shrank() {
        let mut table = Table::new(Layout::plain(1 << 20), 100);
        table.learn(100, 1 << 40 | 1);
        assert!(table.find(1 << 40 | 1, None).is_some());
        assert!(table.find(1 << 40 | 1, Some(Sector(99 * 8))).is_some());
        table.end_at(Sector(100 * 8 + 7));
        assert_eq!(table.find(1 << 40 | 1, None), None);
        assert_eq!(table.find(1 << 40 | 1, Some(Sector(99 * 8))), None);
        assert_eq!(table.find(1 << 40 | 1, Some(Sector(u64::MAX))), None);
    }

    #[test]
    fn a_written_sector_makes_every_block_over_it_invisible() {
        let table = Table::new(layout(), 100);
        for unit in 0..layout().units() {
            table.learn(unit, (unit + 1) << 40 | (unit + 1));
        }
        let gone: Vec<u64> = (0..layout().units())
            .filter(|u| (856..1004).contains(&(layout().sector(*u).unwrap().0 + 7)))
            .collect();
        assert_eq!(
            table.forget_sectors(863 - 7..1004),
            u64_of(gone.len())
                + u64_of(
                    (0..layout().units())
                        .filter(|u| (1004..1011).contains(&(layout().sector(*u).unwrap().0 + 7)))
                        .count()
                )
        );
        for unit in gone {
            assert_eq!(table.find((unit + 1) << 40 | (unit + 1), None), None);
        }
    }

    #[test]
    fn lookups_on_other_threads_see_only_what_is_or_was_there() {
        let table = Arc::new(Table::new(Layout::plain(64 << 20), 4000));
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let hint = |unit: u64| unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let lookers: Vec<_> = (0..2)
            .map(|n| {
                let (table, stop) = (Arc::clone(&table), Arc::clone(&stop));
                std::thread::spawn(move || {
                    let (mut unit, mut found) = (n, 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        unit = (unit + 7) % 8000;
                        if let Some(sector) = table.find(hint(unit), None) {
                            assert_eq!(sector.0, unit * 8);
                            found += 1;
                        }
                    }
                    found
                })
            })
            .collect();
        for turn in 0..40 {
            for unit in (turn % 3..8000).step_by(3) {
                table.learn(unit, hint(unit));
            }
            for unit in (turn % 5..8000).step_by(5) {
                table.forget(unit);
                assert_eq!(table.find(hint(unit), None), None);
            }
        }
        stop.store(true, Ordering::Relaxed);
        for looker in lookers {
            assert!(looker.join().unwrap() > 0);
        }
    }

    #[test]
    fn holes_take_no_room() {
        let table = Table::new(Layout::plain(1 << 40), 100);
        table.learn(1 << 27, 5 << 40 | 5);
        table.forget(12345);
        assert!(table.bytes() < 4 << 20, "{}", table.bytes());
    }
}
