//! A counter on the shared disk's last block, written past the page cache at a steady pace: whoever reads that block outside sees when
//! the guest was not running, by a clock that is not the guest's.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

use xen_lab_checker::PAGE_BYTES;

use crate::disk::O_DIRECT;

/// The disk, at its last block.
pub(crate) struct Beat {
    disk: File,
    at: u64,
    every: Duration,
}

impl Beat {
    /// On this block device.
    pub(crate) fn open(device: &Path, every_ms: u64) -> Result<Self, String> {
        let failed = |error| format!("beat: {}: {error}", device.display());
        let opened = OpenOptions::new().write(true).custom_flags(O_DIRECT).open(device);
        let mut disk = opened.map_err(failed)?;
        let bytes = disk.seek(SeekFrom::End(0)).map_err(failed)?;
        let block = u64::try_from(PAGE_BYTES).map_err(|_| "beat: a page is larger than a file")?;
        let at = bytes.checked_sub(block).ok_or("beat: the disk is smaller than a block")?;
        Ok(Self { disk, at, every: Duration::from_millis(every_ms) })
    }

    /// Counts, without end.
    pub(crate) fn keep(self) -> Result<(), String> {
        let mut room = vec![0; 2 * PAGE_BYTES];
        let skip = room.as_ptr().align_offset(PAGE_BYTES);
        let block = room.get_mut(skip..skip + PAGE_BYTES).ok_or("beat: no room for a block")?;
        for number in 1_u64.. {
            thread::sleep(self.every);
            block[..8].copy_from_slice(&number.to_le_bytes());
            self.disk.write_all_at(block, self.at).map_err(|error| format!("beat: {error}"))?;
        }
        Ok(())
    }
}
