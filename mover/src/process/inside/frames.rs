//! The page descriptors, in guest memory, and everything that must agree with them.
//!
//! A zone is the 256 pages one descriptor page describes. Its lock guards their descriptors, their contents, and the
//! zone's accumulator; nobody holds two. Before a lock is taken the pages to be used are touched without it, so that
//! a vCPU waiting for an absent page holds nothing up. `set` keeps the bitmaps of free and dirty pages and the counts
//! in step with the descriptors.
//!
//! Accesses through a zone check what they read; [`Frames::check`] checks any page.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::accounts::Times;
use super::content::mix_all;
use super::layout::{FRAMES_PER_ZONE, Layout};
use super::ledger::Ledger;
use crate::fingerprint::hint;
use crate::kernel::resident;
use crate::memory::{GuestPage, Mapping, PageBuf};
use crate::units::{PAGE_BYTES, Pfn, u64_of, usize_of};

/// What a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Kind {
    /// Zero, unused.
    #[default]
    Free,
    /// The guest's own tables.
    Metadata,
    /// A program's memory.
    Anonymous,
    /// A block of a disk.
    Cache,
    /// Being filled; its content means nothing yet. None are while the guest is paused.
    Busy,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Metadata => "metadata",
            Self::Anonymous => "anonymous",
            Self::Cache => "cache",
            Self::Busy => "busy",
        }
    }
}

/// A page's descriptor. In memory: two words, the first packed as below, the second the hash; a free page's are zero.
///
/// ```text
///   bit 63           32 31        12 11     8 7       6      5          4         3      2..0
///   | block            | generation | disk   | unused | short | writeback | stale | dirty | kind |
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Cache: differs from the disk, to be written back.
    pub(super) dirty: bool,
    /// Cache: the disk has something newer, the page stays as it was.
    pub(super) stale: bool,
    /// Cache: being written back; not to be changed.
    pub(super) writeback: bool,
    /// Anonymous: short-lived.
    pub(super) short: bool,
    /// Cache: which disk.
    pub(super) disk: u8,
    /// Cache: which block.
    pub(super) block: u32,
    /// Anonymous: how often it was filled, modulo 2^20.
    pub(super) generation: u32,
    /// Hash of its content.
    pub(super) hash: u64,
}

/// Generations there are.
pub(super) const GENERATIONS: u32 = 1 << 20;

impl Frame {
    fn pack(self) -> [u64; 2] {
        let kind = match self.kind {
            Kind::Free => 0,
            Kind::Metadata => 1,
            Kind::Anonymous => 2,
            Kind::Cache => 3,
            Kind::Busy => 4,
        };
        let flag = |set: bool, bit: u32| u64::from(set) << bit;
        let flags = flag(self.dirty, 3) | flag(self.stale, 4) | flag(self.writeback, 5) | flag(self.short, 6);
        let word = kind
            | flags
            | (u64::from(self.disk & 15) << 8)
            | (u64::from(self.generation % GENERATIONS) << 12)
            | (u64::from(self.block) << 32);
        [word, self.hash]
    }
    /// Any words give a descriptor: wrong ones are noticed by what they say.
    fn unpack([word, hash]: [u64; 2]) -> Self {
        let kind = match word & 7 {
            0 => Kind::Free,
            1 => Kind::Metadata,
            2 => Kind::Anonymous,
            3 => Kind::Cache,
            _ => Kind::Busy,
        };
        let low = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(0);
        Self {
            kind,
            dirty: word & 8 != 0,
            stale: word & 16 != 0,
            writeback: word & 32 != 0,
            short: word & 64 != 0,
            disk: u8::try_from((word >> 8) & 15).unwrap_or(0),
            generation: low((word >> 12) % u64::from(GENERATIONS)),
            block: low(word >> 32),
            hash,
        }
    }
    /// What it adds to its zone's accumulator.
    fn weight(words: [u64; 2], pfn: Pfn) -> u64 {
        if words == [0, 0] { 0 } else { mix_all(&[pfn.0, words[0], words[1]]) }
    }
}

/// How many pages are what.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) free: AtomicU64,
    /// Those being filled count: they are about to be cache.
    pub(super) cache: AtomicU64,
    pub(super) dirty: AtomicU64,
}

/// All descriptors of a guest.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(super) memory: Arc<Mapping>,
    pub(super) layout: Layout,
    pub(crate) ledger: Ledger,
    pub(super) counts: Counts,
    accumulators: Vec<Mutex<u64>>,
    /// No free page lies below this word of the bitmap; a hint.
    free_from: AtomicU64,
    /// Whether pages are held back.
    pub(crate) holding: AtomicBool,
    /// How long vCPUs waited for pages that were not there meanwhile.
    pub(crate) waits: Times,
}

/// A locked zone.
pub(super) struct Zone<'f> {
    frames: &'f Frames,
    number: usize,
    accumulator: MutexGuard<'f, u64>,
}

impl Frames {
    pub(super) fn new(memory: Arc<Mapping>, layout: Layout, guest: &str) -> Self {
        let accumulators = (0..layout.zones()).map(|_| Mutex::new(0)).collect();
        let ledger = Ledger::new(guest, layout.pages);
        Self {
            memory,
            layout,
            ledger,
            counts: Counts::default(),
            accumulators,
            free_from: AtomicU64::new(0),
            holding: AtomicBool::new(false),
            waits: Times::default(),
        }
    }

    /// The accumulators, for the state that moves; the guest is paused.
    pub(super) fn accumulators(&self) -> Vec<u64> {
        self.accumulators.iter().map(|sum| *sum.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }
    /// Takes them over; the guest has not started.
    pub(super) fn set_accumulators(&self, sums: &[u64]) {
        assert_eq!(sums.len(), self.accumulators.len(), "checked when the state was decoded");
        for (mine, sum) in self.accumulators.iter().zip(sums) {
            *mine.lock().unwrap_or_else(PoisonError::into_inner) = *sum;
        }
    }

    /// Locks the zone of `pfn`.
    pub(super) fn zone(&self, pfn: Pfn) -> Zone<'_> {
        self.touch(self.layout.descriptor_page(pfn));
        let number = Layout::zone_of(pfn);
        let accumulator = self.accumulators[number].lock().unwrap_or_else(PoisonError::into_inner);
        Zone { frames: self, number, accumulator }
    }

    /// Touches `pfn`, waiting for it if it is absent, and locks its zone.
    pub(super) fn touched(&self, pfn: Pfn) -> Zone<'_> {
        self.touch(pfn);
        self.zone(pfn)
    }

    /// Has `pfn` be there. While pages are held back, the time of those that were not is taken.
    fn touch(&self, pfn: Pfn) {
        let absent = self.holding.load(Ordering::Relaxed)
            && resident::resident(&self.memory, pfn, 1).is_ok_and(|there| !there[0]);
        let begun = absent.then(Instant::now);
        self.memory.page(pfn).touch();
        if let Some(begun) = begun {
            self.waits.add(begun.elapsed());
        }
    }

    /// A look at a descriptor without the lock: good for choosing, not for acting.
    pub(super) fn glance(&self, pfn: Pfn) -> Frame {
        Frame::unpack(self.load(pfn))
    }

    fn words_of(&self, pfn: Pfn) -> &[AtomicU64] {
        let at = usize_of(self.layout.descriptors) * (PAGE_BYTES / 8) + pfn.index() * 2;
        &self.memory.words()[at..at + 2]
    }
    fn load(&self, pfn: Pfn) -> [u64; 2] {
        let words = self.words_of(pfn);
        [words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)]
    }
    fn bit(&self, first_page: u64, pfn: Pfn) -> (&AtomicU64, u64) {
        let at = usize_of(first_page) * (PAGE_BYTES / 8) + pfn.index() / 64;
        (&self.memory.words()[at], 1 << (pfn.0 % 64))
    }
    fn put_bit(&self, first_page: u64, pfn: Pfn, set: bool) {
        let (word, bit) = self.bit(first_page, pfn);
        if set {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// The lowest free page, taken as [`Kind::Busy`]. Checks that it is zero.
    pub(super) fn take_free(&self) -> Option<Pfn> {
        loop {
            let pfn =
                self.next_with_bit(self.layout.free_bits, self.free_from.load(Ordering::Relaxed) * 64)?;
            self.free_from.store(pfn.0 / 64, Ordering::Relaxed);
            let mut zone = self.touched(pfn);
            if zone.get(pfn).kind == Kind::Free {
                zone.verify(pfn, &mut PageBuf::zeroed());
                zone.set(pfn, Frame { kind: Kind::Busy, ..Frame::default() });
                return Some(pfn);
            }
            // Another vCPU was faster, or the bit lies: then it must not be found again and again.
            if self.load(pfn) != [0, 0] {
                self.put_bit(self.layout.free_bits, pfn, false);
            }
        }
    }

    /// Zeroes a page and makes it free.
    pub(super) fn give_back(&self, pfn: Pfn) {
        let mut zone = self.touched(pfn);
        self.memory.page(pfn).fill_zero();
        zone.set(pfn, Frame::default());
        drop(zone);
        self.free_from.fetch_min(pfn.0 / 64, Ordering::Relaxed);
    }

    /// The first page from `from` on whose bit is set in the bitmap that begins at page `bitmap`.
    fn next_with_bit(&self, bitmap: u64, from: u64) -> Option<Pfn> {
        let first = usize_of(bitmap) * (PAGE_BYTES / 8);
        let words = &self.memory.words()[first..first + usize_of(self.layout.pages.div_ceil(64))];
        let start = usize_of(from / 64);
        let masked = |at: usize, word: u64| if at == start { word & (u64::MAX << (from % 64)) } else { word };
        let (at, word) = words
            .iter()
            .enumerate()
            .skip(start)
            .map(|(at, word)| (at, masked(at, word.load(Ordering::Relaxed))))
            .find(|(_, word)| *word != 0)?;
        let pfn = Pfn(u64_of(at) * 64 + u64::from(word.trailing_zeros()));
        (pfn.0 < self.layout.pages).then_some(pfn)
    }
    /// The first dirty page from `from` on.
    pub(super) fn next_dirty(&self, from: Pfn) -> Option<Pfn> {
        self.next_with_bit(self.layout.dirty_bits, from.0)
    }

    /// The page that the disk's table names for a block.
    pub(super) fn table(&self, disk: u8, block: u64) -> Option<Pfn> {
        let pfn = u64::from(self.entry(disk, block)?.load(Ordering::Acquire));
        (pfn != 0 && pfn < self.layout.pages).then_some(Pfn(pfn))
    }
    fn entry(&self, disk: u8, block: u64) -> Option<&std::sync::atomic::AtomicU32> {
        let blocks = *self.layout.blocks.get(usize::from(disk))?;
        let first = self.layout.tables[usize::from(disk)];
        (block < blocks)
            .then(|| &self.memory.half_words()[usize_of(first) * (PAGE_BYTES / 4) + usize_of(block)])
    }
    /// Changes a table's entry from `old` to `new` (0: none); under the lock of the zone of the one that is not 0.
    pub(super) fn change_table(&self, disk: u8, block: u64, old: Pfn, new: Pfn) -> bool {
        let half = |pfn: Pfn| u32::try_from(pfn.0).unwrap_or(0);
        self.entry(disk, block).is_some_and(|entry| {
            entry.compare_exchange(half(old), half(new), Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// Checks one page in full: content, descriptor, tables. The page and its descriptor must be there, or the call
    /// waits for them.
    pub(super) fn check(&self, pfn: Pfn, scratch: &mut PageBuf) {
        let zone = self.touched(pfn);
        zone.verify(pfn, scratch);
        zone.verify_tables(pfn);
        drop(zone);
        // What is metadata follows from the layout: a lost descriptor page says that nothing is.
        if pfn.0 < self.layout.metadata {
            self.check_metadata(pfn);
        }
    }

    fn check_metadata(&self, pfn: Pfn) {
        let descriptors = self.layout.descriptors..self.layout.descriptors + self.layout.zones();
        if descriptors.contains(&pfn.0) {
            let zone = self.zone(Pfn((pfn.0 - descriptors.start) * FRAMES_PER_ZONE));
            zone.verify_sum();
        } else if let Some((disk, first)) = self.layout.table_at(pfn) {
            for block in first..first + u64_of(PAGE_BYTES / 4) {
                let Some(named) = self.table(disk, block) else { continue };
                let zone = self.zone(named);
                let frame = zone.get(named);
                let right =
                    frame.kind == Kind::Cache && frame.disk == disk && u64::from(frame.block) == block;
                // Under its lock a page can't leave its block: a table that names it still is wrong.
                if !right && self.table(disk, block) == Some(named) {
                    let what =
                        format!("its table of disk {disk} names {named} for block {block}, which is another");
                    self.ledger.report(pfn, "metadata", what, block, named.0);
                }
            }
        }
    }
}

impl Zone<'_> {
    /// The descriptor of a page of this zone.
    pub(super) fn get(&self, pfn: Pfn) -> Frame {
        self.own(pfn);
        Frame::unpack(self.frames.load(pfn))
    }

    /// Gives a page of this zone its descriptor, and keeps sums, bitmaps and counts in step.
    pub(super) fn set(&mut self, pfn: Pfn, frame: Frame) {
        self.own(pfn);
        let (old, new) = (self.frames.load(pfn), frame.pack());
        let before = Frame::unpack(old);
        *self.accumulator ^= Frame::weight(old, pfn) ^ Frame::weight(new, pfn);
        for (word, new) in self.frames.words_of(pfn).iter().zip(new) {
            word.store(new, Ordering::Relaxed);
        }
        let frames = self.frames;
        let step = |was: bool, is: bool, count: &AtomicU64| {
            if was != is {
                // Wraps only where a wrong descriptor was replaced, and then both ways alike.
                count.fetch_add(if is { 1 } else { u64::MAX }, Ordering::Relaxed);
            }
            was != is
        };
        let is = |frame: Frame, kind: Kind| frame.kind == kind;
        if step(is(before, Kind::Free), is(frame, Kind::Free), &frames.counts.free) {
            frames.put_bit(frames.layout.free_bits, pfn, is(frame, Kind::Free));
        }
        let cached = |frame: Frame| is(frame, Kind::Cache) || is(frame, Kind::Busy);
        step(cached(before), cached(frame), &frames.counts.cache);
        if step(before.dirty, frame.dirty, &frames.counts.dirty) {
            frames.put_bit(frames.layout.dirty_bits, pfn, frame.dirty);
        }
        if before.hash != frame.hash || before.kind != frame.kind {
            frames.ledger.forget(pfn);
        }
    }

    /// At boot: a page that was never used becomes free in the books.
    pub(super) fn found_free(&mut self, pfn: Pfn) {
        self.own(pfn);
        self.frames.put_bit(self.frames.layout.free_bits, pfn, true);
        self.frames.counts.free.fetch_add(1, Ordering::Relaxed);
    }

    /// The page itself.
    pub(super) fn page(&self, pfn: Pfn) -> GuestPage<'_> {
        self.own(pfn);
        self.frames.memory.page(pfn)
    }

    /// Writes a page's content and returns its hash.
    pub(super) fn fill(&self, pfn: Pfn, content: &PageBuf) -> u64 {
        self.page(pfn).copy_from(content);
        hint(&content.0)
    }

    /// Checks the page's content against its descriptor; its bytes are in `scratch` afterwards, if it has any to check.
    pub(super) fn verify(&self, pfn: Pfn, scratch: &mut PageBuf) -> bool {
        let frame = self.get(pfn);
        let ledger = &self.frames.ledger;
        ledger.count_check();
        match frame.kind {
            Kind::Metadata | Kind::Busy => true,
            Kind::Free => {
                let right = self.page(pfn).is_zero() && self.frames.load(pfn) == [0, 0];
                if !right {
                    self.page(pfn).copy_to(scratch);
                    let what = "a free page that is not zero".to_owned();
                    ledger.report(pfn, "free", what, hint(&PageBuf::zeroed().0), hint(&scratch.0));
                }
                right
            }
            Kind::Anonymous | Kind::Cache => {
                self.page(pfn).copy_to(scratch);
                let found = hint(&scratch.0);
                if found != frame.hash {
                    let zero = if self.page(pfn).is_zero() { ", it is all zero" } else { "" };
                    let what = match frame.kind {
                        Kind::Cache => format!("block {} of disk {}{zero}", frame.block, frame.disk),
                        _ => format!("generation {}{zero}", frame.generation),
                    };
                    ledger.report(pfn, frame.kind.name(), what, frame.hash, found);
                }
                found == frame.hash
            }
        }
    }

    /// Checks that bitmaps and tables say of the page what its descriptor says.
    fn verify_tables(&self, pfn: Pfn) {
        let (frame, frames) = (self.get(pfn), self.frames);
        let bit = |bitmap: u64| {
            let (word, bit) = frames.bit(bitmap, pfn);
            word.load(Ordering::Relaxed) & bit != 0
        };
        let mut wrong = Vec::new();
        if bit(frames.layout.free_bits) != (frame.kind == Kind::Free) {
            wrong.push("the bitmap of free pages");
        }
        if bit(frames.layout.dirty_bits) != frame.dirty {
            wrong.push("the bitmap of dirty pages");
        }
        if frame.kind == Kind::Cache && frames.table(frame.disk, u64::from(frame.block)) != Some(pfn) {
            wrong.push("its disk's table");
        }
        if !wrong.is_empty() {
            let what = format!("descriptor and {} disagree", wrong.join(", "));
            frames.ledger.report(pfn, frame.kind.name(), what, frame.pack()[0], frame.hash);
        }
    }

    /// Checks the zone's descriptors against their sum outside memory.
    fn verify_sum(&self) {
        let frames = self.frames;
        let first = u64_of(self.number) * FRAMES_PER_ZONE;
        let last = (first + FRAMES_PER_ZONE).min(frames.layout.pages);
        let sum = (first..last).map(Pfn).fold(0, |sum, pfn| sum ^ Frame::weight(frames.load(pfn), pfn));
        if sum != *self.accumulator {
            let page = frames.layout.descriptor_page(Pfn(first));
            let what = format!("descriptors of pages {first:#x} to {last:#x} are not the last ones written");
            frames.ledger.report(page, "metadata", what, *self.accumulator, sum);
        }
    }

    fn own(&self, pfn: Pfn) {
        assert_eq!(Layout::zone_of(pfn), self.number, "{pfn} is not of the locked zone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn descriptors_come_back_as_they_were(words in any::<[u64; 2]>()) {
            let frame = Frame::unpack(words);
            prop_assert_eq!(Frame::unpack(frame.pack()), frame);
        }
    }

    #[test]
    fn a_free_page_is_all_zero_words() {
        assert_eq!(Frame::default().pack(), [0, 0]);
        assert_eq!(Frame::weight([0, 0], Pfn(5)), 0);
    }
}
