//! Simulated disks that both hosts reach: what a host wrote is seen by the other after a flush (or by chance
//! before), reads take time and land piece by piece, out of order, and everything that can be wrong with a block is
//! wrong with some.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::content::Content;
use super::rng::Rng;
use super::runtime::nanos;
use super::scheduler::{Group, Key, MICRO, MILLI, Scheduler};
use crate::bitmap::Bitmap;
use crate::disk::{Completion, DiskInfo, Disks, Read, Reader, Slot, WriteLog};
use crate::error::DiskError;
use crate::limits::READ_BYTES_MAX;
use crate::memory::{GuestPage, OwnedPages, PageBuf};
use crate::units::{DiskId, PAGE_BYTES, PAGE_BYTES_U64, SECTOR_BYTES, u64_of, usize_of};

/// A host: the source's is 0, the target's 1.
pub(crate) type Host = usize;
/// The source's host.
pub(crate) const SOURCE: Host = 0;
/// The target's.
pub(crate) const TARGET: Host = 1;

/// What the disks are like.
#[derive(Clone, Debug)]
pub(crate) struct DiskShape {
    /// Blocks of each disk.
    pub(crate) blocks: Vec<u64>,
    /// Required alignment, bytes.
    pub(crate) alignment: usize,
    /// Time of a read, up to, nanoseconds.
    pub(crate) latency: u64,
    /// Writes stay in the writer's host until flushed.
    pub(crate) cached: bool,
    /// One in so many blocks reads wrong on the target.
    pub(crate) corrupt: u64,
    /// One in so many reads fails.
    pub(crate) failing: u64,
    /// The target's disk ends this many blocks early.
    pub(crate) shrunk: u64,
}

impl DiskShape {
    /// One of many; `pages` is the guest's size.
    pub(crate) fn drawn(rng: &mut Rng, pages: u64) -> Self {
        let disks = rng.range(1, 2);
        let blocks: Vec<u64> = (0..disks).map(|_| rng.range(pages / 2, pages * 2)).collect();
        let least = blocks.iter().copied().min().unwrap_or(1);
        Self {
            blocks,
            alignment: rng.pick(&[512, 4096]),
            latency: rng.pick(&[50 * MICRO, MILLI, 20 * MILLI, 100 * MILLI]),
            cached: rng.once_in(2),
            corrupt: rng.pick(&[0, 0, 7, 50]),
            failing: rng.pick(&[0, 0, 0, 10, 100]),
            shrunk: if rng.once_in(16) { rng.below(least) } else { 0 },
        }
    }
}

/// One disk under the images of several guests: it does one thing after the other.
#[derive(Clone, Default)]
pub(crate) struct Spindle(Arc<AtomicU64>);

impl Spindle {
    /// Takes its turn for something that lasts `nanos`; how long until that is done.
    fn book(&self, now: u64, nanos: u64) -> u64 {
        let done = self.0.load(SeqCst).max(now) + nanos;
        self.0.store(done, SeqCst);
        done - now
    }
}

struct Disk {
    /// The bytes as each host sees them.
    seen: [Vec<u8>; 2],
    /// Blocks a host has written and the other does not see yet.
    unflushed: [BTreeSet<u64>; 2],
    /// Written since the last harvest.
    log: Bitmap,
    corrupt: BTreeSet<u64>,
}

struct State {
    rng: Rng,
    shape: DiskShape,
    disks: Vec<Disk>,
    /// Reads take this many times longer.
    slowness: u64,
    /// Every read fails.
    broken: bool,
    memories: Vec<Arc<OwnedPages>>,
}

/// The disks of one guest.
pub(crate) struct DiskWorld {
    scheduler: Arc<Scheduler>,
    state: Mutex<State>,
    infos: Vec<DiskInfo>,
    alignment: usize,
    spindle: Option<Spindle>,
}

impl DiskWorld {
    /// Disks full of content of their own; direct reads may land in pages of `memories`.
    pub(crate) fn new(
        scheduler: &Arc<Scheduler>,
        mut rng: Rng,
        shape: DiskShape,
        contents: &[Vec<Content>],
        memories: Vec<Arc<OwnedPages>>,
        spindle: Option<Spindle>,
    ) -> Arc<Self> {
        let mut disks = Vec::new();
        let mut infos = Vec::new();
        for (number, blocks) in contents.iter().enumerate() {
            let mut bytes = Vec::with_capacity(blocks.len() * PAGE_BYTES);
            for block in blocks {
                bytes.extend_from_slice(&block.page().0);
            }
            let count = u64_of(blocks.len());
            infos.push(DiskInfo {
                name: format!("disk{number}"),
                path: format!("/sim/disk{number}"),
                bytes: count * PAGE_BYTES_U64,
                identity: format!("sim:{number}"),
            });
            let corrupt = (0..count).filter(|_| rng.once_in(shape.corrupt)).collect();
            disks.push(Disk {
                seen: [bytes.clone(), bytes],
                unflushed: Default::default(),
                log: Bitmap::new(blocks.len()),
                corrupt,
            });
        }
        let alignment = shape.alignment;
        let state = State { rng, shape, disks, slowness: 1, broken: false, memories };
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            state: Mutex::new(state),
            infos,
            alignment,
            spindle,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disks as opened on `host`.
    pub(crate) fn on(self: &Arc<Self>, host: Host) -> Arc<dyn Disks> {
        Arc::new(HostDisks { world: Arc::clone(self), host })
    }

    /// The log of the guest's writes on the source.
    pub(crate) fn write_log(self: &Arc<Self>) -> Box<dyn WriteLog> {
        Box::new(SimWriteLog { world: Arc::clone(self) })
    }

    /// Blocks of each disk.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.infos.iter().map(|info| usize_of(info.bytes / PAGE_BYTES_U64)).collect()
    }

    /// Makes reads take `times` as long.
    pub(crate) fn slow(&self, times: u64) {
        self.state().slowness = times;
    }

    /// Makes every read of the engine fail, or not any more.
    pub(crate) fn broken(&self, broken: bool) {
        self.state().broken = broken;
    }

    /// The guest is about to write a block.
    pub(crate) fn announce_write(&self, disk: usize, block: u64) {
        self.state().disks[disk].log.set(usize_of(block));
    }

    /// The guest, on `host`, writes bytes `from..to` of a block.
    pub(crate) fn guest_write(
        &self,
        host: Host,
        disk: usize,
        block: u64,
        page: &PageBuf,
        from: usize,
        to: usize,
    ) {
        let mut guard = self.state();
        let state = &mut *guard;
        let at = usize_of(block) * PAGE_BYTES;
        let cached = state.shape.cached && !state.rng.once_in(4);
        let disk = &mut state.disks[disk];
        disk.seen[host][at + from..at + to].copy_from_slice(&page.0[from..to]);
        if cached {
            disk.unflushed[host].insert(block);
        } else {
            disk.seen[1 - host][at + from..at + to].copy_from_slice(&page.0[from..to]);
        }
    }

    /// The guest, on `host`, reads a block.
    pub(crate) fn guest_read(&self, host: Host, disk: usize, block: u64, out: &mut PageBuf) {
        let at = usize_of(block) * PAGE_BYTES;
        out.0.copy_from_slice(&self.state().disks[disk].seen[host][at..at + PAGE_BYTES]);
    }

    fn flush(&self, host: Host) {
        for disk in &mut self.state().disks {
            for block in std::mem::take(&mut disk.unflushed[host]) {
                let range = usize_of(block) * PAGE_BYTES..(usize_of(block) + 1) * PAGE_BYTES;
                let [a, b] = &mut disk.seen;
                let (from, to) = if host == SOURCE { (a, b) } else { (b, a) };
                to[range.clone()].copy_from_slice(&from[range]);
            }
        }
    }

    fn error(&self, disk: DiskId, kind: io::ErrorKind) -> DiskError {
        DiskError::Os {
            doing: format!("cannot read {}", self.infos[usize::from(disk.0)].path),
            remedy: "It is simulated",
            source: io::Error::from(kind),
        }
    }
}

struct HostDisks {
    world: Arc<DiskWorld>,
    host: Host,
}

impl Disks for HostDisks {
    fn infos(&self) -> &[DiskInfo] {
        &self.world.infos
    }

    fn alignment(&self, _: DiskId) -> usize {
        self.world.alignment
    }

    fn reader(&self, slots: usize) -> Result<Box<dyn Reader>, DiskError> {
        let scheduler = &self.world.scheduler;
        scheduler.interleave();
        let queue = Arc::new(Queue {
            state: Mutex::new(QueueState {
                slots: (0..slots).map(|_| Staging::Free).collect(),
                queued: Vec::new(),
                done: Vec::new(),
                closed: false,
            }),
            work: scheduler.signal(),
            finished: scheduler.signal(),
        });
        let device = Device { world: Arc::clone(&self.world), host: self.host, queue: Arc::clone(&queue) };
        scheduler.spawn(Group::World, "disk", Box::new(move || device.serve()));
        Ok(Box::new(SimReader {
            world: Arc::clone(&self.world),
            queue,
            unsubmitted: Vec::new(),
            buffers: vec![Vec::new(); slots],
        }))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.world.scheduler.interleave();
        self.world.flush(self.host);
        Ok(())
    }
}

/// Where a page of a direct read lands.
struct Landing {
    memory: Arc<OwnedPages>,
    page: usize,
}

enum Target {
    Staged(Vec<u8>),
    /// Page by page; what has none goes into the buffer.
    Direct(Vec<Option<Landing>>, Vec<u8>),
}

struct Request {
    read: Read,
    target: Target,
    done: usize,
    failed: bool,
}

enum Staging {
    Free,
    Busy,
}

struct QueueState {
    slots: Vec<Staging>,
    queued: Vec<Request>,
    done: Vec<(Request, Result<usize, DiskError>)>,
    closed: bool,
}

struct Queue {
    state: Mutex<QueueState>,
    work: Key,
    finished: Key,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's side of a reader: moves one piece of one request at a time, any of them.
struct Device {
    world: Arc<DiskWorld>,
    host: Host,
    queue: Arc<Queue>,
}

impl Device {
    fn serve(&self) {
        let scheduler = &self.world.scheduler;
        let mut going: Vec<Request> = Vec::new();
        loop {
            {
                let mut queue = self.queue.state();
                going.append(&mut queue.queued);
                if queue.closed && going.is_empty() {
                    return;
                }
            }
            if going.is_empty() {
                scheduler.block(self.queue.work, None, "reads to do");
                continue;
            }
            let (which, pause) = {
                let mut state = self.world.state();
                let which = state.rng.index(going.len());
                let latency = state.shape.latency * state.slowness / 4;
                (which, state.rng.below(latency + 1))
            };
            match &self.world.spindle {
                Some(spindle) => scheduler.sleep(spindle.book(scheduler.now(), pause)),
                None => scheduler.sleep(pause),
            }
            let request = &mut going[which];
            if let Some(result) = self.piece(request) {
                let request = going.swap_remove(which);
                self.queue.state().done.push((request, result));
                scheduler.wake(self.queue.finished);
            }
        }
    }

    /// Moves the next piece of `request`; its result when that was the last.
    fn piece(&self, request: &mut Request) -> Option<Result<usize, DiskError>> {
        let mut guard = self.world.state();
        let state = &mut *guard;
        let read = request.read;
        if !request.failed && request.done == 0 {
            let failing = state.shape.failing;
            request.failed = state.rng.once_in(failing);
        }
        if request.failed || state.broken {
            return Some(Err(self.world.error(read.disk, io::ErrorKind::Other)));
        }
        let disk = &state.disks[usize::from(read.disk.0)];
        let shrunk = if self.host == TARGET { state.shape.shrunk } else { 0 };
        let end = disk.seen[0].len() - usize_of(shrunk) * PAGE_BYTES;
        let start = usize_of(read.sector.bytes());
        let length = read.bytes.min(end.saturating_sub(start));
        let piece = (length - request.done.min(length)).min(usize_of(SECTOR_BYTES << state.rng.below(9)));
        let at = start + request.done;
        let mut bytes = disk.seen[self.host][at..at + piece].to_vec();
        if self.host == TARGET {
            for block in &disk.corrupt {
                let spot = usize_of(*block) * PAGE_BYTES + usize_of(super::rng::mix(*block) % PAGE_BYTES_U64);
                if (at..at + piece).contains(&spot) {
                    bytes[spot - at] ^= 0x40;
                }
            }
        }
        match &mut request.target {
            Target::Staged(buffer) => buffer[request.done..request.done + piece].copy_from_slice(&bytes),
            Target::Direct(landings, buffer) => {
                for (i, chunk) in bytes.chunks(512).enumerate() {
                    let offset = request.done + i * 512;
                    match &landings[offset / PAGE_BYTES] {
                        Some(landing) => {
                            landing.memory.page(landing.page).copy_part_from(offset % PAGE_BYTES, chunk);
                        }
                        None => buffer[offset..offset + chunk.len()].copy_from_slice(chunk),
                    }
                }
            }
        }
        request.done += piece;
        (request.done >= length).then_some(Ok(length))
    }
}

struct SimReader {
    world: Arc<DiskWorld>,
    queue: Arc<Queue>,
    unsubmitted: Vec<Request>,
    buffers: Vec<Vec<u8>>,
}

impl SimReader {
    fn enqueue(&mut self, read: Read, target: Target) -> Result<(), DiskError> {
        let world = &self.world;
        let disk = world.infos.get(usize::from(read.disk.0));
        let aligned = |n: u64| n.is_multiple_of(u64_of(world.alignment));
        if disk.is_none() || !aligned(read.sector.bytes()) || !aligned(u64_of(read.bytes)) {
            world.scheduler.fail(format!("a read that is not aligned to {}: {read:?}", world.alignment));
        } else if read.bytes == 0 || read.bytes > READ_BYTES_MAX {
            world.scheduler.fail(format!("a read of no or too many bytes: {read:?}"));
        }
        let slot = {
            let mut queue = self.queue.state();
            std::mem::replace(&mut queue.slots[read.slot.0], Staging::Busy)
        };
        if matches!(slot, Staging::Busy) {
            world.scheduler.fail(format!("a read into a slot that is busy: {read:?}"));
        }
        self.unsubmitted.push(Request { read, target, done: 0, failed: false });
        Ok(())
    }
}

impl Reader for SimReader {
    fn slots(&self) -> usize {
        self.buffers.len()
    }

    fn read(&mut self, read: Read) -> Result<(), DiskError> {
        self.enqueue(read, Target::Staged(vec![0xcd; read.bytes]))
    }

    fn read_direct(&mut self, read: Read, pages: &[Option<GuestPage<'_>>]) -> Result<(), DiskError> {
        if pages.len() * PAGE_BYTES != read.bytes {
            self.world.scheduler.fail(format!("a direct read of {} pages: {read:?}", pages.len()));
        }
        let landings = {
            let state = self.world.state();
            let home = |page: &GuestPage<'_>| {
                let found = state.memories.iter().find_map(|m| Some((m, m.index_of(*page)?)));
                let (memory, page) = found.expect("direct reads go into guest memory");
                Landing { memory: Arc::clone(memory), page }
            };
            pages.iter().map(|page| page.as_ref().map(home)).collect()
        };
        self.enqueue(read, Target::Direct(landings, vec![0xcd; read.bytes]))
    }

    fn complete(&mut self, done: &mut Vec<Completion>, wait: Duration) -> Result<(), DiskError> {
        let scheduler = Arc::clone(&self.world.scheduler);
        scheduler.interleave();
        if !self.unsubmitted.is_empty() {
            self.queue.state().queued.append(&mut self.unsubmitted);
            scheduler.wake(self.queue.work);
        }
        let deadline = scheduler.now().saturating_add(nanos(wait));
        loop {
            let finished = std::mem::take(&mut self.queue.state().done);
            if !finished.is_empty() {
                for (request, result) in finished {
                    let slot = request.read.slot;
                    self.queue.state().slots[slot.0] = Staging::Free;
                    let (Target::Staged(bytes) | Target::Direct(_, bytes)) = request.target;
                    self.buffers[slot.0] = bytes;
                    done.push(Completion { slot, result });
                }
                return Ok(());
            }
            if scheduler.now() >= deadline || !scheduler.alive() {
                return Ok(());
            }
            scheduler.block(self.queue.finished, Some(deadline), "reads to end");
        }
    }

    fn staged(&self, slot: Slot) -> &[u8] {
        &self.buffers[slot.0]
    }
}

impl Drop for SimReader {
    fn drop(&mut self) {
        // Reads under way end in their own time, as DMA does; those not submitted never began.
        self.queue.state().closed = true;
        self.world.scheduler.wake(self.queue.work);
    }
}

struct SimWriteLog {
    world: Arc<DiskWorld>,
}

impl WriteLog for SimWriteLog {
    fn harvest(&mut self, disk: DiskId, into: &mut Bitmap) -> Result<u64, DiskError> {
        self.world.scheduler.interleave();
        let mut state = self.world.state();
        let log = &mut state.disks[usize::from(disk.0)].log;
        let before = into.count();
        into.union(log);
        log.clear_all();
        Ok(into.count() - before)
    }
}
