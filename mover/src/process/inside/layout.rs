//! Where the guest's own metadata stands in its memory. Derived from the sizes of memory and disks alone, so that both
//! ends agree on it without exchanging it.

#![forbid(unsafe_code)]

use crate::error::GuestError;
use crate::units::{PAGE_BYTES_U64, Pfn, usize_of};

/// Descriptors in a page of them; a *zone* is the pages they describe.
pub(super) const FRAMES_PER_ZONE: u64 = PAGE_BYTES_U64 / 16;
const BITS_PER_PAGE: u64 = PAGE_BYTES_U64 * 8;
const ENTRIES_PER_PAGE: u64 = PAGE_BYTES_U64 / 4;

/// First pages and lengths of the metadata.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    /// Pages of guest memory.
    pub(crate) pages: u64,
    /// First page of the bitmap of free pages.
    pub(super) free_bits: u64,
    /// First page of the bitmap of dirty cache pages.
    pub(super) dirty_bits: u64,
    /// First page of the descriptors.
    pub(super) descriptors: u64,
    /// First page of each disk's table from block to page.
    pub(super) tables: Vec<u64>,
    /// Blocks of each disk.
    pub(super) blocks: Vec<u64>,
    /// Pages of metadata, from page 0: the first page of anything else.
    pub(crate) metadata: u64,
}

impl Layout {
    /// For `memory_bytes` of memory and disks of these sizes.
    pub(crate) fn new(memory_bytes: u64, disk_bytes: &[u64]) -> Result<Self, GuestError> {
        let pages = memory_bytes / PAGE_BYTES_U64;
        let mut at = 0;
        let mut take = |pages: u64| {
            let first = at;
            at += pages;
            first
        };
        let free_bits = take(pages.div_ceil(BITS_PER_PAGE));
        let dirty_bits = take(pages.div_ceil(BITS_PER_PAGE));
        let descriptors = take(pages.div_ceil(FRAMES_PER_ZONE));
        let blocks: Vec<u64> = disk_bytes.iter().map(|bytes| bytes / PAGE_BYTES_U64).collect();
        let tables = blocks.iter().map(|blocks| take(blocks.div_ceil(ENTRIES_PER_PAGE))).collect();
        if at > pages / 4 {
            return Err(GuestError::State(format!(
                "the guest's tables for its memory and disks would take {at} of its {pages} pages. Give it more \
                 memory or smaller disks"
            )));
        }
        if blocks.iter().any(|blocks| *blocks > u64::from(u32::MAX)) {
            return Err(GuestError::State("a guest's disk can't be larger than 16T".to_owned()));
        }
        Ok(Self { pages, free_bits, dirty_bits, descriptors, tables, blocks, metadata: at })
    }

    /// Number of zones.
    pub(crate) fn zones(&self) -> u64 {
        self.pages.div_ceil(FRAMES_PER_ZONE)
    }
    /// The zone of a page.
    pub(super) fn zone_of(pfn: Pfn) -> usize {
        usize_of(pfn.0 / FRAMES_PER_ZONE)
    }
    /// The page that holds the descriptor of `pfn`.
    pub(super) fn descriptor_page(&self, pfn: Pfn) -> Pfn {
        Pfn(self.descriptors + pfn.0 / FRAMES_PER_ZONE)
    }
    /// The disk and first block that a metadata page is a table of, if it is one.
    pub(super) fn table_at(&self, pfn: Pfn) -> Option<(u8, u64)> {
        let disk = self.tables.iter().rposition(|first| pfn.0 >= *first)?;
        (pfn.0 < self.metadata)
            .then(|| (u8::try_from(disk).unwrap_or(u8::MAX), (pfn.0 - self.tables[disk]) * ENTRIES_PER_PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_stands_side_by_side_and_small() {
        let layout = Layout::new(2 << 30, &[4 << 30, 1 << 30]).unwrap();
        assert_eq!((layout.free_bits, layout.dirty_bits, layout.descriptors), (0, 16, 32));
        assert_eq!(layout.tables, [32 + 2048, 32 + 2048 + 1024]);
        assert_eq!(layout.metadata, 32 + 2048 + 1024 + 256);
        assert!(layout.metadata * 100 < layout.pages);
        assert_eq!(layout.table_at(Pfn(32 + 2048 + 1023)), Some((0, 1023 * 1024)));
        assert_eq!(layout.table_at(Pfn(32 + 2048 + 1024)), Some((1, 0)));
        assert_eq!((layout.table_at(Pfn(31)), layout.table_at(Pfn(layout.metadata))), (None, None));
        assert!(Layout::new(2 << 20, &[1 << 40]).is_err());
    }
}
