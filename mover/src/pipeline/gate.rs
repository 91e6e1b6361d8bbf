//! The gate before the target's disks: a write of the restarted guest to a block that outstanding pages still need
//! waits until they are loaded (invariant 4). Where the backend is not ours there is no gate, and the check catches
//! what such a write changes.
//!
//! One task. Blocks open one by one as writes ask for them, all others when the drain is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::disk::Disks;
use crate::error::Error;
use crate::guest::WriteGate;
use crate::pipeline::faults::SmallLoader;
use crate::pipeline::landing::Landing;
use crate::pipeline::table::State;
use crate::units::{BlockAddress, DiskId, PAGE_BYTES_U64, Pfn, SECTORS_PER_PAGE, Sector, usize_of};

/// How long to wait before looking whether a write waits.
const GLANCE: Duration = Duration::from_millis(1);

/// Closes the gate for every block that a page of `outstanding` needs, before the guest starts.
pub fn close(
    gate: &dyn WriteGate,
    disks: &dyn Disks,
    landing: &Landing,
    outstanding: &Bitmap,
) -> Result<(), Error> {
    let blocks_of = |bytes: u64| usize_of(bytes.div_ceil(PAGE_BYTES_U64));
    let mut held: Vec<Bitmap> = disks.infos().iter().map(|d| Bitmap::new(blocks_of(d.bytes))).collect();
    for wanted in outstanding.iter().filter_map(|at| landing.table.reference(Pfn::at(at))) {
        let start = wanted.block.sector.bytes();
        let blocks = &mut held[usize::from(wanted.block.disk.0)];
        let end = blocks.len().min(blocks_of(start + PAGE_BYTES_U64));
        blocks.set_range(usize_of(start / PAGE_BYTES_U64).min(end), end);
    }
    for (disk, blocks) in held.iter().enumerate().filter(|(_, blocks)| blocks.count() > 0) {
        gate.hold(DiskId(u8::try_from(disk).unwrap_or(u8::MAX)), blocks)?;
    }
    Ok(())
}

/// Serves writes that wait at the gate.
pub struct GateKeeper {
    /// The gate.
    pub gate: Arc<dyn WriteGate>,
    /// Where pages land.
    pub landing: Arc<Landing>,
    /// Loads.
    pub loader: SmallLoader,
    /// The pages outstanding at the restart.
    pub outstanding: Bitmap,
    /// Set when nothing is outstanding.
    pub finish: Arc<AtomicBool>,
}

impl GateKeeper {
    /// Serves until told to finish, or until the migration fails.
    pub fn run(mut self) -> Result<(), Error> {
        let by_place = self.by_place();
        while !self.finish.load(SeqCst) && !self.landing.failure.is_set() {
            match self.gate.wanted() {
                Some((disk, block)) => self.clear_block(&by_place, disk, block)?,
                None => self.landing.runtime.sleep(GLANCE),
            }
        }
        Ok(())
    }

    /// The outstanding pages by their place on disk, which no longer changes: 4 bytes each, as a guest's pfns fit.
    fn by_place(&self) -> Vec<u32> {
        let mut pfns: Vec<u32> = self.outstanding.iter().filter_map(|at| u32::try_from(at).ok()).collect();
        pfns.sort_unstable_by_key(|pfn| place(&self.landing, *pfn));
        pfns
    }

    /// Loads what still stands on `block` and opens it once none of that is outstanding any more.
    fn clear_block(&mut self, by_place: &[u32], disk: DiskId, block: u64) -> Result<(), Error> {
        let (from, to) = (block * PAGE_BYTES_U64, (block + 1) * PAGE_BYTES_U64);
        // Pages that overlap the block start less than a page before it.
        let lowest = BlockAddress {
            disk,
            sector: Sector(Sector::holding(from).0.saturating_sub(SECTORS_PER_PAGE - 1)),
        };
        let first = by_place.partition_point(|pfn| place(&self.landing, *pfn) < lowest);
        let landing = Arc::clone(&self.landing);
        let overlapping = by_place[first..].iter().take_while(|pfn| {
            let place = place(&landing, **pfn);
            place.disk == disk && place.sector.bytes() < to
        });
        let mut still = false;
        for pfn in overlapping.map(|pfn| Pfn(u64::from(*pfn))) {
            match self.landing.table.state(pfn) {
                State::Outstanding(_) => {
                    if let Some(wanted) = self.landing.table.reference(pfn) {
                        still |= !self.loader.load(&[wanted])?;
                    }
                }
                State::Busy(_) => still = true,
                State::Empty | State::Placed(_) => {}
            }
        }
        if still {
            // The source has been asked, or the drain is landing one: look again in a moment.
            self.landing.runtime.sleep(GLANCE);
        } else {
            self.gate.open(disk, block);
        }
        Ok(())
    }
}

/// Where page `pfn` stood when its reference was made.
fn place(landing: &Landing, pfn: u32) -> BlockAddress {
    landing.table.last_block(Pfn(u64::from(pfn)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::image::{DiskSpec, ImageDisks, Role};
    use crate::error::GuestError;
    use crate::fingerprint::Check;
    use crate::guest::GuestMemory;
    use crate::memory::Window;
    use crate::pipeline::Failure;
    use crate::runtime::Threads;
    use crate::units::{PageCount, Version};
    use std::sync::Mutex;

    /// Memory that is never looked at.
    struct Pages(u64);

    impl GuestMemory for Pages {
        fn pages(&self) -> PageCount {
            PageCount(self.0)
        }
        fn pinnable(&self) -> bool {
            false
        }
        fn window(&self, _capacity: usize) -> Result<Window, GuestError> {
            unreachable!("the gate maps nothing")
        }
        fn map(&self, _pfns: &[Pfn], _window: &mut Window) -> Result<(), GuestError> {
            unreachable!("the gate maps nothing")
        }
        fn untouched(&self, _into: &mut Bitmap) -> Result<(), GuestError> {
            unreachable!("the gate asks nothing")
        }
    }

    /// Notes which blocks are held.
    #[derive(Default)]
    struct Notes(Mutex<Vec<(u8, Vec<usize>)>>);

    impl WriteGate for Notes {
        fn hold(&self, disk: DiskId, blocks: &Bitmap) -> Result<(), GuestError> {
            self.0.lock().unwrap().push((disk.0, blocks.iter().collect()));
            Ok(())
        }
        fn wanted(&self) -> Option<(DiskId, u64)> {
            None
        }
        fn open(&self, _disk: DiskId, _block: u64) {}
    }

    #[test]
    fn the_gate_closes_on_every_block_an_outstanding_page_needs() {
        let dir = tempfile::tempdir().unwrap();
        let specs = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![1; 16 * 4096 + 512]).unwrap();
            DiskSpec { name: name.to_owned(), path, role: Role::ReadOnly }
        });
        let disks = ImageDisks::open(&specs).unwrap();
        let landing = Landing::new(Arc::new(Pages(8)), Arc::new(Threads::new()), Arc::<Failure>::default());
        // Aligned; across two blocks; another disk; the disk's last sectors; and one that has been loaded already.
        let places = [(0, 8), (0, 8 * 5 + 3), (1, 0), (1, 8 * 15 + 1), (0, 8 * 9)];
        let mut outstanding = Bitmap::new(8);
        for (pfn, (disk, sector)) in places.into_iter().enumerate() {
            let block = BlockAddress { disk: DiskId(disk), sector: Sector(sector) };
            landing.table.refer(Pfn::at(pfn), Version(1), block, Check::default());
            outstanding.set(pfn);
        }
        outstanding.clear(4);
        let gate = Notes::default();
        close(&gate, &*disks, &landing, &outstanding).unwrap();
        assert_eq!(*gate.0.lock().unwrap(), [(0, vec![1, 5, 6]), (1, vec![0, 15, 16])]);
    }
}
