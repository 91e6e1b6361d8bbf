//! Faults on held pages: what the running guest waits for is loaded before everything else.
//!
//! One task on the target, with a reader of its own so that a fault does not queue behind the drain's long reads. It
//! loads the page and those that follow it both in memory and on disk, which the guest is likely to touch next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::disk::{Completion, Disks, Read, Reader, Slot};
use crate::error::Error;
use crate::fingerprint::CheckKey;
use crate::guest::HoldBack;
use crate::memory::{PageBuf, Window};
use crate::pipeline::landing::Landing;
use crate::pipeline::load;
use crate::pipeline::table::{State, Wanted};
use crate::units::{PAGE_BYTES_U64, Pfn, Sector, u64_of, usize_of};

/// How long to wait for a fault before looking whether the drain is over.
const GLANCE: Duration = Duration::from_millis(20);
/// Pages loaded with the faulting one, itself included.
const CLUSTER_PAGES: usize = 16;

/// Loads a few pages at once, now; used for faults and for blocks a write waits for.
pub struct SmallLoader {
    landing: Arc<Landing>,
    disks: Arc<dyn Disks>,
    key: CheckKey,
    reader: Box<dyn Reader>,
    window: Window,
    page: PageBuf,
    done: Vec<Completion>,
}

impl SmallLoader {
    /// With a reader of its own.
    pub fn new(landing: Arc<Landing>, disks: Arc<dyn Disks>, key: CheckKey) -> Result<Self, Error> {
        let reader = disks.reader(1)?;
        let window = landing.memory.window(1)?;
        Ok(Self { landing, disks, key, reader, window, page: PageBuf::zeroed(), done: Vec::with_capacity(1) })
    }

    /// Loads `pages`, which stand in ascending order on one disk within one read's length. Those whose bytes are not
    /// right are asked of the source; returns whether the first is there.
    pub fn load(&mut self, pages: &[Wanted]) -> Result<bool, Error> {
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return Ok(true) };
        let disk = first.block.disk;
        let alignment = u64_of(self.disks.alignment(disk));
        let start = first.block.sector.bytes() / alignment * alignment;
        let end = (last.block.sector.bytes() + PAGE_BYTES_U64).div_ceil(alignment) * alignment;
        self.reader.read(Read {
            disk,
            sector: Sector::holding(start),
            bytes: usize_of(end - start),
            slot: Slot(0),
        })?;
        while self.done.is_empty() {
            self.reader.complete(&mut self.done, GLANCE)?;
            self.landing.failure.check()?;
        }
        let bytes = self.done.pop().map_or(0, |completion| completion.result.unwrap_or(0));
        self.landing.counts.disk_bytes.fetch_add(u64_of(bytes), SeqCst);
        let mut first_is_there = false;
        for (at, wanted) in pages.iter().enumerate() {
            let offset = usize_of(wanted.block.sector.bytes() - start);
            let read = self.reader.staged(Slot(0))[..bytes].get(offset..).unwrap_or_default();
            let good =
                load::land_read(&self.landing, &self.key, *wanted, read, &mut self.page, &mut self.window)?;
            self.landing.counts.checked.fetch_add(1, SeqCst);
            if !good {
                load::ask(&self.landing, wanted.pfn);
            }
            first_is_there |= at == 0 && good;
        }
        Ok(first_is_there)
    }
}

/// Serves faults.
pub struct FaultServer {
    /// Where pages land.
    pub landing: Arc<Landing>,
    /// Whose faults.
    pub hold: Arc<dyn HoldBack>,
    /// Loads; without one every page comes from the source.
    pub loader: Option<SmallLoader>,
    /// Pages the guest waits for that only the source can give; taken by the reporter.
    pub urgent: Arc<ArrayQueue<Pfn>>,
    /// Set when nothing is outstanding.
    pub finish: Arc<AtomicBool>,
}

impl FaultServer {
    /// Serves until told to finish, or until the migration fails.
    pub fn run(mut self) -> Result<(), Error> {
        while !self.finish.load(SeqCst) && !self.landing.failure.is_set() {
            if let Some(pfn) = self.hold.next_fault(GLANCE)? {
                self.serve(pfn)?;
                self.landing.counts.faults.fetch_add(1, SeqCst);
            }
            while let Some(pfn) = self.hold.given_up() {
                self.landing.give_up(pfn);
            }
        }
        Ok(())
    }

    fn serve(&mut self, pfn: Pfn) -> Result<(), Error> {
        let table = &self.landing.table;
        match table.state(pfn) {
            State::Outstanding(_) if table.ask.get(pfn.index()) || table.asked.get(pfn.index()) => {
                self.hurry(pfn)
            }
            State::Outstanding(_) => {
                let Some(first) = table.reference(pfn) else { return Ok(()) };
                let mut cluster = [first; CLUSTER_PAGES];
                let count = self.cluster(&mut cluster);
                let loaded = match &mut self.loader {
                    Some(loader) => loader.load(&cluster[..count])?,
                    None => false,
                };
                if !loaded {
                    self.hurry(pfn);
                }
            }
            // Someone is landing it this moment, and whoever waits is woken by that.
            State::Busy(_) => {}
            State::Empty | State::Placed(_) => self.hold.wake(pfn)?,
        }
        Ok(())
    }

    /// Has the source send `pfn` before all others. Where the queue is full, its turn comes with the rest.
    fn hurry(&self, pfn: Pfn) {
        self.landing.table.ask.set(pfn.index());
        let _ = self.urgent.push(pfn);
        self.landing.runtime.ring(&self.landing.work);
    }

    /// Fills in the outstanding pages that follow `cluster[0]` both in memory and on disk.
    fn cluster(&self, cluster: &mut [Wanted; CLUSTER_PAGES]) -> usize {
        let first = cluster[0];
        for (at, place) in cluster.iter_mut().enumerate().skip(1) {
            let pfn = first.pfn.plus(u64_of(at));
            if pfn.0 >= self.landing.table.pages().0 || self.landing.table.asked.get(pfn.index()) {
                return at;
            }
            let start = first.block.sector.bytes() + u64_of(at) * PAGE_BYTES_U64;
            match self.landing.table.reference(pfn) {
                Some(next) if next.block.disk == first.block.disk && next.block.sector.bytes() == start => {
                    *place = next;
                }
                _ => return at,
            }
        }
        CLUSTER_PAGES
    }
}
