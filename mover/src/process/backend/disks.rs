//! The two shared bitmaps of the guest's disks, as the engine uses them: what was written, and what may not be.

#![forbid(unsafe_code)]

use crate::bitmap::Bitmap;
use crate::disk::WriteLog;
use crate::error::{DiskError, GuestError};
use crate::guest::WriteGate;
use crate::process::shared::{SharedGate, SharedWriteLog};
use crate::units::DiskId;

/// The log of disk writes.
pub(super) struct DiskWrites {
    log: SharedWriteLog,
    disks: usize,
}

impl DiskWrites {
    pub(super) fn new(log: SharedWriteLog, disks: usize) -> Self {
        Self { log, disks }
    }
}

impl WriteLog for DiskWrites {
    fn harvest(&mut self, disk: DiskId, into: &mut Bitmap) -> Result<u64, DiskError> {
        assert!(usize::from(disk.0) < self.disks, "disk {} of {}", disk.0, self.disks);
        let mut fresh = 0;
        // A word is taken and entered in one go: nothing in between can fail.
        self.log.harvest(disk, |word, bits| fresh += into.set_word(word, bits));
        Ok(fresh)
    }
}

/// The gate before the disks.
pub(super) struct Gate(SharedGate);

impl Gate {
    pub(super) fn new(gate: SharedGate) -> Self {
        Self(gate)
    }
    /// Lets every write through.
    pub(super) fn open_all(&self) {
        self.0.open_all();
    }
}

impl WriteGate for Gate {
    fn hold(&self, disk: DiskId, blocks: &Bitmap) -> Result<(), GuestError> {
        for (word, bits) in blocks.words().iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.0.hold_word(disk, word, *bits);
        }
        Ok(())
    }
    fn open(&self, disk: DiskId, block: u64) {
        self.0.open_block(disk, block);
    }
    fn wanted(&self) -> Option<(DiskId, u64)> {
        self.0.wanted()
    }
}
