//! Disks as the engine sees them: named blocks that both hosts can read, batched reads into staging slots or
//! straight into guest pages, and the log of what the guest writes.

pub mod chain;
pub mod extents;
pub mod identity;
pub mod image;
pub mod observer;
pub mod partition;

use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::error::DiskError;
use crate::memory::GuestPage;
use crate::units::{DiskId, Sector};

/// What is known of a disk before it is opened; sent in the handshake.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct DiskInfo {
    /// The guest's name for it: "xvda", "disk0".
    pub name: String,
    /// Path on the source.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// What tells this disk from others: WWID or file handle where there is one, and a keyed sample of blocks.
    pub identity: String,
}

/// A staging slot of a reader: [`crate::limits::READ_BYTES_MAX`] bytes of its own, aligned memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot(pub usize);

/// One read of a run of sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Read {
    /// The disk.
    pub disk: DiskId,
    /// First sector; aligned as the disk asks.
    pub sector: Sector,
    /// Bytes: a multiple of the disk's alignment, at most [`crate::limits::READ_BYTES_MAX`].
    pub bytes: usize,
    /// Comes back with the completion. For a staged read, also the slot.
    pub slot: Slot,
}

/// The end of a read.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub slot: Slot,
    /// Bytes read; fewer than asked only at the disk's end.
    pub result: Result<usize, DiskError>,
}

/// Reads from the disks in batches. One owner thread; in a real one an io_uring with O_DIRECT.
pub trait Reader: Send {
    /// Staging slots, and so reads that may be in flight.
    fn slots(&self) -> usize;
    /// Queues a read into its staging slot, which must be free.
    fn read(&mut self, read: Read) -> Result<(), DiskError>;
    /// Queues a read straight into guest pages (contiguous on disk, in this order); the slot is only its name.
    /// The pages must stay mapped until its completion.
    fn read_direct(&mut self, read: Read, pages: &[GuestPage<'_>]) -> Result<(), DiskError>;
    /// Submits what is queued and collects what has completed; waits at most `wait` for the first.
    fn complete(&mut self, done: &mut Vec<Completion>, wait: Duration) -> Result<(), DiskError>;
    /// The bytes of a staging slot whose read has completed.
    fn staged(&self, slot: Slot) -> &[u8];
    /// How reads are made, in a few words, for the summary's `load_path`.
    fn path(&self) -> String {
        "memory".to_owned()
    }
    /// What could not be had and costs speed, a sentence each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A guest's disks, opened on this host.
pub trait Disks: Send + Sync {
    /// What they are.
    fn infos(&self) -> &[DiskInfo];
    /// What each is recognised by, as it is now: a guest that writes fast soon leaves the one behind that was taken when
    /// they were opened.
    fn identities(&self) -> Result<Vec<String>, DiskError> {
        Ok(self.infos().iter().map(|info| info.identity.clone()).collect())
    }
    /// Alignment of reads in bytes, 512 or more (STATX_DIOALIGN, logical block size).
    fn alignment(&self, disk: DiskId) -> usize;
    /// A reader with `slots` staging slots.
    fn reader(&self, slots: usize) -> Result<Box<dyn Reader>, DiskError>;
    /// Makes everything written so far readable by the other host.
    fn flush(&self) -> Result<(), DiskError>;
    /// What is not as it should be and ends nothing, a sentence each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What the guest has written to its disks: a bit per 4 KiB-aligned piece of the disk that a write touched, set
/// before the write is submitted.
pub trait WriteLog: Send {
    /// Adds the pieces of `disk` written since the last harvest to `into` (a bit per [`crate::units::PAGE_BYTES`]
    /// of the disk), and forgets them. Returns how many were added.
    fn harvest(&mut self, disk: DiskId, into: &mut Bitmap) -> Result<u64, DiskError>;
}
