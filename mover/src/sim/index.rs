//! A duplicates index for the simulator: what stood on the disks at the start, with lies.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::content::Content;
use super::disk::{DiskWorld, SOURCE};
use super::rng::Rng;
use crate::bitmap::Bitmap;
use crate::disk::WriteLog;
use crate::error::DiskError;
use crate::fingerprint::hint;
use crate::index::{Duplicates, Keeper};
use crate::memory::PageBuf;
use crate::runtime::Moment;
use crate::units::{BlockAddress, DiskId, SECTORS_PER_PAGE, Sector, u64_of};

/// The index.
pub(crate) struct SimIndex {
    state: Mutex<State>,
    all: Vec<BlockAddress>,
    lies: u64,
}

struct State {
    rng: Rng,
    by_hint: BTreeMap<u64, Vec<BlockAddress>>,
    by_place: BTreeMap<BlockAddress, u64>,
}

fn place(disk: usize, block: usize) -> BlockAddress {
    BlockAddress {
        disk: DiskId(u8::try_from(disk).unwrap_or(u8::MAX)),
        sector: Sector(u64_of(block) * SECTORS_PER_PAGE),
    }
}

impl SimIndex {
    /// Of disks with this content; once in `lies` it names any block at all.
    pub(crate) fn new(rng: Rng, disks: &[Vec<Content>], lies: u64) -> Self {
        let mut state = State { rng, by_hint: BTreeMap::new(), by_place: BTreeMap::new() };
        let mut all = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            for (at, content) in disk.iter().enumerate() {
                all.push(place(number, at));
                if *content != Content::ZERO {
                    state.learn(place(number, at), hint(&content.page().0));
                }
            }
        }
        Self { state: Mutex::new(state), all, lies }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn learn(&mut self, at: BlockAddress, hint: u64) {
        self.forget(at);
        self.by_place.insert(at, hint);
        self.by_hint.entry(hint).or_default().push(at);
    }
    fn forget(&mut self, at: BlockAddress) {
        if let Some(places) = self.by_place.remove(&at).and_then(|hint| self.by_hint.get_mut(&hint)) {
            places.retain(|p| *p != at);
        }
    }
}

impl Duplicates for SimIndex {
    fn find(&self, page: &PageBuf, near: Option<BlockAddress>) -> Option<BlockAddress> {
        let mut state = self.state();
        if state.rng.once_in(self.lies) {
            return Some(state.rng.pick(&self.all));
        }
        let found = state.by_hint.get(&hint(&page.0))?;
        found.iter().find(|b| near.is_some_and(|n| **b > n)).or(found.first()).copied()
    }

    fn mapped_bytes(&self) -> u64 {
        0
    }
}

/// Keeps the index fresh from the guest's writes.
pub(crate) struct SimKeeper {
    pub(crate) index: Arc<SimIndex>,
    pub(crate) disks: Arc<DiskWorld>,
    pub(crate) writes: Box<dyn WriteLog>,
    /// Written and not read again yet.
    pub(crate) written: Vec<(usize, usize)>,
}

impl Keeper for SimKeeper {
    fn forget_written(&mut self) -> Result<u64, DiskError> {
        let mut count = 0;
        for (disk, blocks) in self.disks.sizes().into_iter().enumerate() {
            let mut written = Bitmap::new(blocks);
            count += self.writes.harvest(DiskId(u8::try_from(disk).unwrap_or(u8::MAX)), &mut written)?;
            for block in written.iter() {
                self.index.state().forget(place(disk, block));
                self.written.push((disk, block));
            }
        }
        Ok(count)
    }

    fn learn(&mut self, _: Moment) -> Result<(), DiskError> {
        // One block a call, whether it has been quiet or not: what is learned too early is a lie like others.
        if let Some((disk, block)) = self.written.pop() {
            let mut page = PageBuf::zeroed();
            self.disks.guest_read(SOURCE, disk, u64_of(block), &mut page);
            self.index.state().learn(place(disk, block), hint(&page.0));
        }
        Ok(())
    }
}

/// A log of writes that has been taken by someone else.
pub(crate) struct NoWrites;

impl WriteLog for NoWrites {
    fn harvest(&mut self, _: DiskId, _: &mut Bitmap) -> Result<u64, DiskError> {
        Ok(0)
    }
}
