//! The page cache: blocks of the disks in guest memory, read in runs, dirtied, written back, evicted by a clock.
//!
//! A page belongs to a block from the moment the block's table names it; both change under the page's zone lock.
//! Pages being read are `Busy` and in no table. The clock's "referenced" bits are this process's own, like a CPU's
//! accessed bits: they do not move.

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::accounts::{Accounts, add};
use super::drive::Drive;
use super::frames::{Frame, Frames, Kind};
use crate::fingerprint::hint;
use crate::memory::{GuestPage, PageBuf};
use crate::units::{PAGE_BYTES_U64, Pfn, u64_of, usize_of};

/// Blocks in one disk operation: 1 MiB.
pub(super) const RUN_BLOCKS_MAX: usize = 256;
/// Blocks in one write-back: 128 KiB.
const WRITE_BACK_BLOCKS_MAX: u64 = 32;
/// Pages written back before an eviction is tried again, when all it meets are dirty.
const WRITE_BACK_TO_EVICT: u64 = 64;

/// The page cache of a guest.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(super) drives: Vec<Drive>,
    /// Pages it may have.
    pub(super) target: AtomicU64,
    /// Where the clock stands.
    pub(super) hand: AtomicU64,
    referenced: Vec<AtomicU64>,
    complained: AtomicBool,
}

/// What a look into the cache gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// The page; its content is in the scratch buffer.
    Hit,
    /// Not there.
    Miss,
}

impl Cache {
    pub(super) fn new(drives: Vec<Drive>, pages: u64) -> Self {
        Self {
            drives,
            target: AtomicU64::new(0),
            hand: AtomicU64::new(0),
            referenced: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            complained: AtomicBool::new(false),
        }
    }

    fn reference(&self, pfn: Pfn) {
        let (word, bit) = (&self.referenced[usize_of(pfn.0 / 64)], 1 << (pfn.0 % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
    fn take_reference(&self, pfn: Pfn) -> bool {
        let (word, bit) = (&self.referenced[usize_of(pfn.0 / 64)], 1 << (pfn.0 % 64));
        word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    /// Whether a block is in the cache, without looking at its page.
    pub(super) fn has(&self, frames: &Frames, disk: u8, block: u64) -> bool {
        frames.table(disk, block).is_some()
    }

    /// Looks a block up and checks its page, whose content is in `scratch` after a hit.
    pub(super) fn look_up(
        &self,
        frames: &Frames,
        accounts: &Accounts,
        disk: u8,
        block: u64,
        scratch: &mut PageBuf,
    ) -> Found {
        let begun = Instant::now();
        let Some(pfn) = frames.table(disk, block) else { return Found::Miss };
        let zone = frames.touched(pfn);
        let frame = zone.get(pfn);
        let right = frame.kind == Kind::Cache && frame.disk == disk && u64::from(frame.block) == block;
        if !right || frames.table(disk, block) != Some(pfn) {
            // Evicted a moment ago; if the table lies instead, the scrubber says so.
            return Found::Miss;
        }
        zone.verify(pfn, scratch);
        drop(zone);
        self.reference(pfn);
        accounts.access(begun.elapsed());
        add(&accounts.cache_hits, 1);
        Found::Hit
    }

    /// Reads `blocks` blocks from `block` on into the cache, those that are not there, in one operation.
    /// Returns how many came from the disk.
    pub(super) fn read_run(
        &self,
        frames: &Frames,
        accounts: &Accounts,
        disk: u8,
        block: u64,
        blocks: usize,
    ) -> u64 {
        let Some(drive) = self.drives.get(usize::from(disk)) else { return 0 };
        let end = drive.blocks().min(block + u64_of(blocks.min(RUN_BLOCKS_MAX)));
        let mut fresh = 0;
        let mut at = block;
        while at < end {
            let missing = (at..end).take_while(|block| !self.has(frames, disk, *block)).count();
            if missing > 0 {
                fresh += self.read_missing(frames, accounts, drive, (disk, at), missing);
            }
            at += u64_of(missing.max(1));
        }
        fresh
    }

    fn read_missing(
        &self,
        frames: &Frames,
        accounts: &Accounts,
        drive: &Drive,
        (disk, block): (u8, u64),
        blocks: usize,
    ) -> u64 {
        let taken: Vec<Pfn> = std::iter::from_fn(|| self.take_page(frames, accounts)).take(blocks).collect();
        let pages: Vec<GuestPage<'_>> = taken.iter().map(|pfn| frames.memory.page(*pfn)).collect();
        pages.iter().for_each(GuestPage::touch);
        if let Err(e) = drive.read(block, &pages) {
            self.failed(accounts, &e);
            taken.iter().for_each(|pfn| frames.give_back(*pfn));
            return 0;
        }
        let mut scratch = PageBuf::zeroed();
        for (pfn, block) in taken.iter().zip(block..) {
            frames.memory.page(*pfn).copy_to(&mut scratch);
            let frame = Frame { hash: hint(&scratch.0), ..Frame::default() };
            self.insert(frames, *pfn, disk, block, frame);
        }
        add(&accounts.read_bytes, u64_of(taken.len()) * PAGE_BYTES_U64);
        u64_of(taken.len())
    }

    /// Makes a busy page the cache's page of a block; gives it back if another vCPU was faster.
    fn insert(&self, frames: &Frames, pfn: Pfn, disk: u8, block: u64, frame: Frame) {
        let mut zone = frames.zone(pfn);
        if frames.change_table(disk, block, Pfn(0), pfn) {
            let block = u32::try_from(block).unwrap_or(u32::MAX);
            zone.set(pfn, Frame { kind: Kind::Cache, disk, block, ..frame });
            drop(zone);
            self.reference(pfn);
        } else {
            drop(zone);
            frames.give_back(pfn);
        }
    }

    /// A busy page for the cache: a free one while the cache is below its target, else an evicted one.
    fn take_page(&self, frames: &Frames, accounts: &Accounts) -> Option<Pfn> {
        if frames.counts.cache.load(Ordering::Relaxed) < self.target.load(Ordering::Relaxed) {
            return frames.take_free();
        }
        self.evict(frames, accounts).or_else(|| {
            self.write_back(frames, accounts, WRITE_BACK_TO_EVICT, &AtomicBool::new(false));
            self.evict(frames, accounts)
        })
    }

    /// Takes the page the clock meets first that is clean and was not referenced since it last came by.
    fn evict(&self, frames: &Frames, accounts: &Accounts) -> Option<Pfn> {
        let (first, pages) = (frames.layout.metadata, frames.layout.pages);
        for _ in 0..2 * (pages - first) {
            let step = self.hand.fetch_add(1, Ordering::Relaxed);
            let pfn = Pfn(first + step % (pages - first));
            let seen = frames.glance(pfn);
            if seen.kind != Kind::Cache || seen.dirty || seen.writeback || self.take_reference(pfn) {
                continue;
            }
            let mut zone = frames.touched(pfn);
            let frame = zone.get(pfn);
            if frame.kind != Kind::Cache || frame.dirty || frame.writeback {
                continue;
            }
            zone.verify(pfn, &mut PageBuf::zeroed());
            if !frames.change_table(frame.disk, u64::from(frame.block), pfn, Pfn(0)) {
                // A table or a descriptor is wrong; the scrubber says which. The page is nobody's now.
                continue;
            }
            zone.set(pfn, Frame { kind: Kind::Busy, ..Frame::default() });
            add(&accounts.evicted, 1);
            return Some(pfn);
        }
        None
    }

    /// Gives a block new content in the cache, to be written back later. `false` where its page is being written back
    /// right now, or no page could be had.
    pub(super) fn write(
        &self,
        frames: &Frames,
        accounts: &Accounts,
        (disk, block): (u8, u64),
        content: &PageBuf,
    ) -> bool {
        let begun = Instant::now();
        if let Some(pfn) = frames.table(disk, block) {
            let mut zone = frames.touched(pfn);
            let frame = zone.get(pfn);
            let right = frame.kind == Kind::Cache && frame.disk == disk && u64::from(frame.block) == block;
            if !right || frame.writeback || frames.table(disk, block) != Some(pfn) {
                return false;
            }
            zone.verify(pfn, &mut PageBuf::zeroed());
            let hash = zone.fill(pfn, content);
            zone.set(pfn, Frame { dirty: true, stale: false, hash, ..frame });
            drop(zone);
            self.reference(pfn);
        } else {
            let Some(pfn) = self.take_page(frames, accounts) else { return false };
            let zone = frames.touched(pfn);
            let hash = zone.fill(pfn, content);
            drop(zone);
            self.insert(frames, pfn, disk, block, Frame { dirty: true, hash, ..Frame::default() });
        }
        accounts.access(begun.elapsed());
        true
    }

    /// Writes up to `pages` dirty pages back, in runs, until `stop` is set.
    pub(super) fn write_back(&self, frames: &Frames, accounts: &Accounts, pages: u64, stop: &AtomicBool) {
        let mut from = Pfn(frames.layout.metadata);
        let mut left = pages;
        while left > 0 && !stop.load(Ordering::Relaxed) {
            let Some(pfn) = frames.next_dirty(from) else { return };
            from = pfn.plus(1);
            let seen = frames.glance(pfn);
            if seen.kind == Kind::Cache && seen.dirty && !seen.writeback {
                left = left.saturating_sub(self.write_back_run(frames, accounts, seen));
            }
        }
    }

    /// Writes the run of dirty blocks around one back; how many there were.
    fn write_back_run(&self, frames: &Frames, accounts: &Accounts, seen: Frame) -> u64 {
        let Some(drive) = self.drives.get(usize::from(seen.disk)) else { return 0 };
        let (disk, middle) = (seen.disk, u64::from(seen.block));
        let dirty = |block: &u64| frames.table(disk, *block).is_some_and(|pfn| frames.glance(pfn).dirty);
        let lowest = middle.saturating_sub(WRITE_BACK_BLOCKS_MAX / 2);
        let first = (lowest..middle).rev().take_while(dirty).last().unwrap_or(middle);
        let mut run = Vec::new();
        for block in first..first + WRITE_BACK_BLOCKS_MAX {
            let Some(pfn) = frames.table(disk, block) else { break };
            let mut zone = frames.touched(pfn);
            let frame = zone.get(pfn);
            let ours = frame.kind == Kind::Cache && frame.disk == disk && u64::from(frame.block) == block;
            if !ours || !frame.dirty || frame.writeback {
                break;
            }
            zone.verify(pfn, &mut PageBuf::zeroed());
            zone.set(pfn, Frame { writeback: true, ..frame });
            run.push(pfn);
        }
        let pages: Vec<GuestPage<'_>> = run.iter().map(|pfn| frames.memory.page(*pfn)).collect();
        if pages.is_empty() {
            return 0;
        }
        let written = drive.write(first, &pages);
        for pfn in &run {
            let mut zone = frames.zone(*pfn);
            let frame = zone.get(*pfn);
            // What could not be written stays dirty and is tried again.
            zone.set(*pfn, Frame { writeback: false, dirty: written.is_err(), ..frame });
        }
        match written {
            Ok(()) => add(&accounts.written_bytes, u64_of(run.len()) * PAGE_BYTES_U64),
            Err(e) => self.failed(accounts, &e),
        }
        u64_of(run.len())
    }

    /// Counts a failed disk operation; the first one is printed.
    pub(super) fn failed(&self, accounts: &Accounts, error: &io::Error) {
        add(&accounts.disk_errors, 1);
        if !self.complained.swap(true, Ordering::Relaxed) {
            eprintln!(
                "a disk operation of the guest failed: {error}. The guest goes on without it; further ones are only \
                 counted"
            );
        }
    }
}
