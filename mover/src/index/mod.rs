//! Where a page's content may stand on a disk: a hint, never a truth.

pub mod commands;
pub mod file;
pub mod keeper;
pub mod layout;
pub mod scan;
pub mod set;
pub mod table;
pub mod watch;

use crate::error::DiskError;
use crate::memory::PageBuf;
use crate::runtime::Moment;
use crate::units::BlockAddress;

/// A lookup from page content to a disk block; what the judge asks. Shared by all lanes, takes no lock.
pub trait Duplicates: Send + Sync {
    /// A block that probably holds just these bytes. Where several do, the one nearest after `near` is preferred,
    /// so that references stay in runs.
    fn find(&self, page: &PageBuf, near: Option<BlockAddress>) -> Option<BlockAddress>;
    /// Bytes the index has mapped.
    fn mapped_bytes(&self) -> u64;
}

/// Keeps an index fresh while a migration runs. Owned by the control task, which calls it between other things.
pub trait Keeper: Send {
    /// Forgets every block the guest has written since the last call; how many there were.
    fn forget_written(&mut self) -> Result<u64, DiskError>;
    /// Reads a few written blocks that have been quiet for a while and learns what they hold now.
    fn learn(&mut self, now: Moment) -> Result<(), DiskError>;
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
