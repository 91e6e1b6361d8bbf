//! Where a page's content may stand on a disk: a hint, never a truth.

use crate::memory::PageBuf;
use crate::units::BlockAddress;

/// A lookup from page content to a disk block; what the judge asks. Shared by all lanes, takes no lock.
pub trait Duplicates: Send + Sync {
    /// A block that probably holds just these bytes. Where several do, the one nearest after `near` is preferred,
    /// so that references stay in runs.
    fn find(&self, page: &PageBuf, near: Option<BlockAddress>) -> Option<BlockAddress>;
    /// Bytes the index has mapped.
    fn mapped_bytes(&self) -> u64;
}

/// An index that knows nothing.
pub struct Empty;

impl Duplicates for Empty {
    fn find(&self, _: &PageBuf, _: Option<BlockAddress>) -> Option<BlockAddress> {
        None
    }
    fn mapped_bytes(&self) -> u64 {
        0
    }
}
