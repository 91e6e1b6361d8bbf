//! What the workload's programs do: one step of each activity, and a vCPU's turn over all of them.
//!
//! A step is one operation on a few pages; a vCPU stops only between steps. Rates are kept by credit: time adds to
//! it, steps take from it, and what piles up beyond a fifth of a second (a pause, a slow disk, absent pages) is
//! dropped and counted, so that no burst follows.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::accounts::{Accounts, add};
use super::cache::{Cache, Found};
use super::content::{Rng, fill, mix_all};
use super::frames::{Frame, Frames, GENERATIONS, Kind};
use super::workload::Workload;
use crate::memory::{GuestPage, PageBuf};
use crate::units::{PAGE_BYTES_U64, Pfn, u64_of, usize_of};

/// Activities a workload can have.
pub(super) const ACTIVITIES: usize = 8;
/// Pages each vCPU has for writes past the page cache.
pub(super) const BOUNCE_PAGES: u64 = 32;
/// Longest time credit is kept for.
const CREDIT_KEPT: Duration = Duration::from_millis(200);
/// A turn waits for at least this much to do...
const BATCH_BYTES: u64 = 16 * PAGE_BYTES_U64;
/// ...within these bounds.
const TURN_MIN: Duration = Duration::from_millis(2);
const TURN_MAX: Duration = Duration::from_millis(50);
/// How often dirty cache pages are looked for, and the share of them then written back: so a page stays dirty for
/// about a second.
const FLUSH_EVERY: Duration = Duration::from_millis(250);
const FLUSH_SHARE: u64 = 4;
/// Blocks of the long file read at a time.
const STREAM_BLOCKS: usize = 32;
/// Cached blocks that use as much of a read rate as one from the disk.
const CACHED_PER_READ: u64 = 8;
/// Short-lived pages freed in one step.
const FREED_PER_STEP: usize = 64;
/// Short-lived pages of one program.
const CHURN_PAGES_MAX: u64 = 4096;
/// Attempts to find something at random before a step gives up.
const ATTEMPTS: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Activity {
    Dirty,
    Read,
    Write,
    Copy,
    Churn,
    Stream,
    Overwrite,
    Touch,
}

/// What a guest sets out to do, once it is booted or loaded.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) workload: Workload,
    /// Its TOML text, which moves with the guest.
    pub(super) text: String,
    pub(super) seed: u64,
    /// Long-lived anonymous pages: from the first, so many.
    pub(super) anonymous: (Pfn, u64),
    /// Blocks with files, per disk.
    pub(super) used: Vec<u64>,
    /// Where new files go: disk, first block, blocks.
    pub(super) scratch: (u8, u64, u64),
}

/// One vCPU's state outside memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Vcpu {
    pub(super) number: u64,
    pub(super) rng: Rng,
    pub(super) credits: [i64; ACTIVITIES],
    /// Position in the long file, in blocks of all disks' files.
    pub(super) stream: u64,
    /// Position in the place for new files.
    pub(super) scratch: u64,
    /// Short-lived pages it has.
    pub(super) churn: Vec<Pfn>,
    /// Whether it fills more of them, or frees them.
    pub(super) filling: bool,
}

/// A guest's inside, shared by its threads.
#[derive(Debug)]
pub(crate) struct Inside {
    pub(crate) frames: Frames,
    pub(crate) cache: Cache,
    pub(crate) accounts: Accounts,
    /// Blocks with files, per disk.
    pub(super) used: Vec<u64>,
    pub(super) plan: OnceLock<Plan>,
    /// Made when it boots or is loaded: how many there are moves with it.
    pub(super) vcpus: OnceLock<Vec<Mutex<Vcpu>>>,
    /// Numbers whatever is written to disks.
    pub(super) generation: AtomicU64,
    pub(crate) throttle: AtomicU8,
}

/// A vCPU's sense of time; not moved.
#[derive(Debug)]
pub(super) struct Clock {
    last: Instant,
    flushed: Instant,
}

impl Clock {
    pub(super) fn new(now: Instant) -> Self {
        Self { last: now, flushed: now }
    }
    /// Forgets the time a pause took.
    pub(super) fn skip_to(&mut self, now: Instant) {
        self.last = now;
    }
}

impl Inside {
    /// Its vCPUs; none before it is booted or loaded.
    pub(crate) fn vcpus(&self) -> &[Mutex<Vcpu>] {
        self.vcpus.get().map_or(&[], Vec::as_slice)
    }
    pub(super) fn vcpu(&self, number: usize) -> MutexGuard<'_, Vcpu> {
        self.vcpus()[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The workload's name, once there is one.
    pub(crate) fn workload_name(&self) -> Option<String> {
        self.plan.get().map(|plan| plan.workload.name.clone())
    }

    /// What the workload asks for, in the order of `credits`.
    fn rates(workload: &Workload) -> [(Activity, u64); ACTIVITIES] {
        let rate = |rated: &Option<super::workload::Rated>| rated.map_or(0, |rated| rated.rate);
        [
            (Activity::Dirty, workload.dirty.map_or(0, |dirty| dirty.rate)),
            (Activity::Read, rate(&workload.read)),
            (Activity::Write, rate(&workload.write)),
            (Activity::Copy, rate(&workload.copy)),
            (Activity::Churn, rate(&workload.churn)),
            (Activity::Stream, rate(&workload.stream)),
            (Activity::Overwrite, rate(&workload.overwrite)),
            (Activity::Touch, rate(&workload.touch)),
        ]
    }

    /// One turn of a vCPU: everything that is due, until `stop` is set. Returns when the next turn is due.
    pub(super) fn turn(&self, vcpu: &mut Vcpu, clock: &mut Clock, stop: &AtomicBool) -> Instant {
        let now = Instant::now();
        let Some(plan) = self.plan.get() else { return now + TURN_MAX };
        let passed = now.saturating_duration_since(clock.last);
        clock.last = now;
        let mut wait = TURN_MAX;
        for (n, (activity, whole)) in Self::rates(&plan.workload).into_iter().enumerate() {
            let share = whole * u64::from(self.throttle.load(Ordering::Relaxed)) / 100;
            let rate = share / u64_of(self.vcpus().len());
            if rate == 0 {
                continue;
            }
            vcpu.credits[n] += signed(bytes_in(passed, rate));
            let kept = signed(bytes_in(CREDIT_KEPT, rate).max(PAGE_BYTES_U64));
            if vcpu.credits[n] > kept {
                add(&self.accounts.skipped_bytes, u64::try_from(vcpu.credits[n] - kept).unwrap_or(0));
                vcpu.credits[n] = kept;
            }
            while vcpu.credits[n] > 0 && !stop.load(Ordering::Relaxed) {
                let cost = self.step(plan, vcpu, activity);
                add(&self.accounts.operations, 1);
                vcpu.credits[n] -= signed(cost);
            }
            let lacking = u64::try_from(signed(BATCH_BYTES) - vcpu.credits[n]).unwrap_or(0);
            wait = wait.min(Duration::from_nanos(lacking.saturating_mul(1_000_000_000) / rate));
        }
        if vcpu.number == 0 && now.saturating_duration_since(clock.flushed) >= FLUSH_EVERY {
            clock.flushed = now;
            let dirty = self.frames.counts.dirty.load(Ordering::Relaxed);
            self.cache.write_back(&self.frames, &self.accounts, dirty.div_ceil(FLUSH_SHARE), stop);
        }
        Instant::now() + wait.max(TURN_MIN)
    }

    /// One operation; the bytes of the activity's rate it used up.
    fn step(&self, plan: &Plan, vcpu: &mut Vcpu, activity: Activity) -> u64 {
        let pages = match activity {
            Activity::Dirty => self.dirty(plan, vcpu),
            Activity::Read => self.read(plan, vcpu),
            Activity::Write => self.write(plan, vcpu),
            Activity::Copy => self.copy(plan, vcpu),
            Activity::Churn => self.churn(plan, vcpu),
            Activity::Stream => self.stream(plan, vcpu),
            Activity::Overwrite => self.overwrite(plan, vcpu),
            Activity::Touch => self.touch(vcpu),
        };
        pages * PAGE_BYTES_U64
    }

    /// Checks a long-lived anonymous page and fills it anew.
    pub(super) fn rewrite(&self, plan: &Plan, pfn: Pfn) {
        let begun = Instant::now();
        let mut zone = self.frames.touched(pfn);
        let frame = zone.get(pfn);
        let mut page = PageBuf::zeroed();
        zone.verify(pfn, &mut page);
        let generation = (frame.generation + 1) % GENERATIONS;
        fill(mix_all(&[plan.seed, pfn.0, u64::from(generation)]), &mut page);
        let hash = zone.fill(pfn, &page);
        zone.set(pfn, Frame { kind: Kind::Anonymous, generation, hash, ..Frame::default() });
        drop(zone);
        self.accounts.access(begun.elapsed());
        add(&self.accounts.dirtied_bytes, PAGE_BYTES_U64);
    }

    fn dirty(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let (first, pages) = plan.anonymous;
        let percent = plan.workload.dirty.map_or(100, |dirty| u64::from(dirty.over_percent));
        self.rewrite(plan, first.plus(vcpu.rng.below((pages * percent / 100).max(1))));
        1
    }

    /// A place among the files of all disks, as disk and block.
    fn place(plan: &Plan, mut at: u64) -> (u8, u64) {
        for (disk, used) in (0u8..).zip(&plan.used) {
            if at < *used {
                return (disk, at);
            }
            at -= used;
        }
        (0, 0)
    }

    /// A file at random; rather one that is not in the cache yet.
    fn some_file(&self, plan: &Plan, vcpu: &mut Vcpu) -> (u8, u64, usize) {
        let all: u64 = plan.used.iter().sum();
        let mut place = (0, 0);
        for _ in 0..ATTEMPTS {
            place = Self::place(plan, vcpu.rng.below(all));
            if !self.cache.has(&self.frames, place.0, place.1) {
                break;
            }
        }
        let (disk, block) = place;
        let left = plan.used.get(usize::from(disk)).map_or(1, |used| used.saturating_sub(block).max(1));
        (disk, block, usize_of(vcpu.rng.file_blocks().min(left)))
    }

    /// Reads a run through the cache, checking every page of it; how many blocks came from the disk.
    fn read_through(&self, disk: u8, block: u64, blocks: usize) -> u64 {
        let end = block + u64_of(blocks);
        let (mut at, mut page, mut fresh) = (block, PageBuf::zeroed(), 0);
        while at < end {
            if self.cache.look_up(&self.frames, &self.accounts, disk, at, &mut page) == Found::Hit {
                at += 1;
                continue;
            }
            let absent = (at..end).take_while(|block| !self.cache.has(&self.frames, disk, *block)).count();
            fresh += self.cache.read_run(&self.frames, &self.accounts, disk, at, absent);
            at += u64_of(absent.max(1));
        }
        fresh
    }

    fn read(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let (disk, block, blocks) = self.some_file(plan, vcpu);
        // The rate is the disk's: what the cache has costs little of it, so that a warm cache does not stop reading.
        let fresh = self.read_through(disk, block, blocks);
        fresh + (u64_of(blocks) - fresh).div_ceil(CACHED_PER_READ)
    }

    fn stream(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let all: u64 = plan.used.iter().sum();
        let (disk, block) = Self::place(plan, vcpu.stream % all.max(1));
        let left = plan.used.get(usize::from(disk)).map_or(1, |used| used.saturating_sub(block).max(1));
        let blocks = STREAM_BLOCKS.min(usize_of(left));
        self.read_through(disk, block, blocks);
        vcpu.stream = (vcpu.stream + u64_of(blocks)) % all.max(1);
        u64_of(blocks)
    }

    /// The next place for `blocks` blocks of a new file.
    fn new_file(plan: &Plan, vcpu: &mut Vcpu, blocks: u64) -> (u8, u64) {
        let (disk, first, room) = plan.scratch;
        if vcpu.scratch + blocks > room {
            vcpu.scratch = 0;
        }
        let at = first + vcpu.scratch;
        vcpu.scratch += blocks;
        (disk, at)
    }

    fn write(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let blocks = vcpu.rng.file_blocks().min(plan.scratch.2);
        let (disk, first) = Self::new_file(plan, vcpu, blocks);
        let mut page = PageBuf::zeroed();
        for block in first..first + blocks {
            self.new_content(plan, disk, block, &mut page);
            self.cache.write(&self.frames, &self.accounts, (disk, block), &page);
        }
        blocks
    }

    fn copy(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let (from_disk, from, blocks) = self.some_file(plan, vcpu);
        let blocks = u64_of(blocks).min(plan.scratch.2);
        let (disk, to) = Self::new_file(plan, vcpu, blocks);
        self.cache.read_run(&self.frames, &self.accounts, from_disk, from, usize_of(blocks));
        let mut page = PageBuf::zeroed();
        for n in 0..blocks {
            let found = self.cache.look_up(&self.frames, &self.accounts, from_disk, from + n, &mut page);
            if found == Found::Hit {
                self.cache.write(&self.frames, &self.accounts, (disk, to + n), &page);
            }
        }
        blocks
    }

    /// Content that no block has had yet.
    fn new_content(&self, plan: &Plan, disk: u8, block: u64, page: &mut PageBuf) {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        fill(mix_all(&[plan.seed, u64::from(disk), block, generation]), page);
    }

    fn churn(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let free = self.frames.counts.free.load(Ordering::Relaxed);
        let most = CHURN_PAGES_MAX.min((free + u64_of(vcpu.churn.len())) / 2 / u64_of(self.vcpus().len()));
        if !vcpu.filling {
            let keep = vcpu.churn.len().saturating_sub(FREED_PER_STEP);
            let mut page = PageBuf::zeroed();
            for pfn in vcpu.churn.drain(keep..) {
                self.frames.touched(pfn).verify(pfn, &mut page);
                self.frames.give_back(pfn);
            }
            vcpu.filling = keep == 0;
            return 0;
        }
        vcpu.filling = u64_of(vcpu.churn.len()) + 1 < most;
        let begun = Instant::now();
        let Some(pfn) = self.frames.take_free() else { return 1 };
        let mut page = PageBuf::zeroed();
        let generation = u32::try_from(vcpu.rng.below(u64::from(GENERATIONS))).unwrap_or(0);
        fill(mix_all(&[plan.seed, pfn.0, u64::from(generation), 1]), &mut page);
        let mut zone = self.frames.touched(pfn);
        let hash = zone.fill(pfn, &page);
        zone.set(pfn, Frame { kind: Kind::Anonymous, short: true, generation, hash, ..Frame::default() });
        drop(zone);
        self.accounts.access(begun.elapsed());
        vcpu.churn.push(pfn);
        add(&self.accounts.dirtied_bytes, PAGE_BYTES_U64);
        1
    }

    /// A clean cached block at random.
    fn some_cached(&self, vcpu: &mut Vcpu) -> Option<Frame> {
        let (first, pages) = (self.frames.layout.metadata, self.frames.layout.pages);
        (0..ATTEMPTS).find_map(|_| {
            let frame = self.frames.glance(Pfn(first + vcpu.rng.below(pages - first)));
            (frame.kind == Kind::Cache && !frame.dirty && !frame.writeback).then_some(frame)
        })
    }

    fn touch(&self, vcpu: &mut Vcpu) -> u64 {
        if let Some(frame) = self.some_cached(vcpu) {
            let block = u64::from(frame.block);
            self.cache.look_up(&self.frames, &self.accounts, frame.disk, block, &mut PageBuf::zeroed());
        }
        1
    }

    /// Rewrites cached blocks on the disk from pages of its own; the cached pages are marked stale and stay.
    fn overwrite(&self, plan: &Plan, vcpu: &mut Vcpu) -> u64 {
        let Some(seen) = self.some_cached(vcpu) else { return 1 };
        let (disk, block) = (seen.disk, u64::from(seen.block));
        let Some(drive) = self.cache.drives.get(usize::from(disk)) else { return 1 };
        let mut blocks = 0;
        for block in block..block + BOUNCE_PAGES {
            let Some(pfn) = self.frames.table(disk, block) else { break };
            let mut zone = self.frames.touched(pfn);
            let frame = zone.get(pfn);
            let ours = frame.kind == Kind::Cache && frame.disk == disk && u64::from(frame.block) == block;
            if !ours || frame.dirty || frame.writeback {
                break;
            }
            zone.verify(pfn, &mut PageBuf::zeroed());
            zone.set(pfn, Frame { stale: true, ..frame });
            blocks += 1;
        }
        let bounce = self.bounce(plan, vcpu.number);
        let mut page = PageBuf::zeroed();
        for n in 0..blocks {
            let pfn = bounce.plus(n);
            self.new_content(plan, disk, block + n, &mut page);
            let mut zone = self.frames.touched(pfn);
            let hash = zone.fill(pfn, &page);
            zone.set(pfn, Frame { kind: Kind::Anonymous, hash, ..Frame::default() });
        }
        let pages: Vec<GuestPage<'_>> =
            (0..blocks).map(|n| self.frames.memory.page(bounce.plus(n))).collect();
        match drive.write(block, &pages) {
            Ok(()) => add(&self.accounts.written_bytes, blocks * PAGE_BYTES_U64),
            Err(e) => self.cache.failed(&self.accounts, &e),
        }
        blocks.max(1)
    }

    /// The first of a vCPU's pages for writes past the cache: they follow the long-lived anonymous ones.
    fn bounce(&self, plan: &Plan, vcpu: u64) -> Pfn {
        plan.anonymous.0.plus(plan.anonymous.1 + vcpu * BOUNCE_PAGES)
    }
}

fn bytes_in(time: Duration, rate: u64) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
