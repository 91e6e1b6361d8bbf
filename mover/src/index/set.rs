//! The tables of all disks of a guest as one lookup. Shared by all lanes, no lock.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Duplicates;
use super::table::Table;
use crate::fingerprint;
use crate::memory::PageBuf;
use crate::units::{BlockAddress, DiskId};

/// A table for each disk that has one, by the disk's number.
#[derive(Clone, Debug, Default)]
pub struct Tables(Vec<Option<Arc<Table>>>);

impl Tables {
    /// One table (or none) for each disk, in the order of their numbers.
    #[must_use]
    pub fn new(tables: Vec<Option<Arc<Table>>>) -> Self {
        Self(tables)
    }

    /// The table of `disk`.
    #[must_use]
    pub fn table(&self, disk: DiskId) -> Option<&Arc<Table>> {
        self.0.get(usize::from(disk.0))?.as_ref()
    }

    fn find_on(&self, number: usize, hint: u64, near: Option<BlockAddress>) -> Option<BlockAddress> {
        let table = self.0.get(number)?.as_ref()?;
        let disk = DiskId(u8::try_from(number).ok()?);
        let near = near.filter(|near| near.disk == disk).map(|near| near.sector);
        Some(BlockAddress { disk, sector: table.find(hint, near)? })
    }
}

impl Duplicates for Tables {
    fn find(&self, page: &PageBuf, near: Option<BlockAddress>) -> Option<BlockAddress> {
        let hint = fingerprint::hint(&page.0);
        // The disk of the last reference first: runs stay whole.
        let last = near.map(|near| usize::from(near.disk.0));
        let rest = (0..self.0.len()).filter(|number| Some(*number) != last);
        last.into_iter().chain(rest).find_map(|number| self.find_on(number, hint, near))
    }

    fn mapped_bytes(&self) -> u64 {
        self.0.iter().flatten().map(|table| table.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::layout::Layout;
    use crate::units::{PAGE_BYTES, Sector};

    #[test]
    fn looks_on_every_disk_and_stays_on_one() {
        let page = |n: u8| PageBuf([n; PAGE_BYTES]);
        let table = |contents: &[(u64, u8)]| {
            let table = Table::new(Layout::plain(1 << 20), 100);
            for (unit, n) in contents {
                table.learn(*unit, fingerprint::hint(&page(*n).0));
            }
            Some(Arc::new(table))
        };
        let tables = Tables::new(vec![table(&[(1, 1), (2, 2), (9, 3)]), None, table(&[(5, 1), (6, 2)])]);
        let at = |disk, unit: u64| BlockAddress { disk: DiskId(disk), sector: Sector(unit * 8) };
        assert_eq!(tables.find(&page(1), None), Some(at(0, 1)));
        assert_eq!(tables.find(&page(2), Some(at(0, 1))), Some(at(0, 2)));
        assert_eq!(tables.find(&page(1), Some(at(2, 3))), Some(at(2, 5)));
        assert_eq!(tables.find(&page(2), Some(at(2, 5))), Some(at(2, 6)));
        assert_eq!(tables.find(&page(3), Some(at(2, 6))), Some(at(0, 9)));
        assert_eq!(tables.find(&page(3), Some(at(1, 0))), Some(at(0, 9)));
        assert_eq!(tables.find(&page(4), Some(at(0, 9))), None);
        assert!(tables.mapped_bytes() > 0);
    }
}
