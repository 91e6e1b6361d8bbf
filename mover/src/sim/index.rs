//! A duplicates index for the simulator: what stood on the disks at the start, with lies.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::content::Content;
use super::rng::Rng;
use crate::fingerprint::hint;
use crate::index::Duplicates;
use crate::memory::PageBuf;
use crate::units::{BlockAddress, DiskId, SECTORS_PER_PAGE, Sector, u64_of};

/// The index.
pub(crate) struct SimIndex {
    blocks: BTreeMap<u64, Vec<BlockAddress>>,
    all: Vec<BlockAddress>,
    lies: u64,
    rng: Mutex<Rng>,
}

impl SimIndex {
    /// Of disks with this content; once in `lies` it names any block at all.
    pub(crate) fn new(rng: Rng, disks: &[Vec<Content>], lies: u64) -> Self {
        let mut blocks: BTreeMap<u64, Vec<BlockAddress>> = BTreeMap::new();
        let mut all = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            let id = DiskId(u8::try_from(number).unwrap_or(u8::MAX));
            for (at, content) in disk.iter().enumerate() {
                let address = BlockAddress { disk: id, sector: Sector(u64_of(at) * SECTORS_PER_PAGE) };
                all.push(address);
                if *content != Content::ZERO {
                    blocks.entry(hint(&content.page().0)).or_default().push(address);
                }
            }
        }
        Self { blocks, all, lies, rng: Mutex::new(rng) }
    }
}

impl Duplicates for SimIndex {
    fn find(&self, page: &PageBuf, near: Option<BlockAddress>) -> Option<BlockAddress> {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        if rng.once_in(self.lies) {
            return Some(rng.pick(&self.all));
        }
        let found = self.blocks.get(&hint(&page.0))?;
        found.iter().find(|b| near.is_some_and(|n| **b > n)).or(found.first()).copied()
    }

    fn mapped_bytes(&self) -> u64 {
        0
    }
}
