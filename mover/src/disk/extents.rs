//! Which parts of an image file hold data: what lies between is holes, which read as zero and need no reading.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, SeekFrom};

/// Holes shorter than this are read through: seeking over them costs more.
const HOLE_BYTES_MIN: u64 = 64 * 1024;

/// The byte ranges of `fd`, `bytes` long, that may hold something else than zero (lseek(2), SEEK_DATA). All of it
/// where that can't be told: block devices, and file systems without holes. Data that was written and not yet flushed
/// may be missing.
#[must_use]
pub fn data_ranges(fd: BorrowedFd<'_>, bytes: u64) -> Vec<Range<u64>> {
    let whole = std::iter::once(0..bytes).collect();
    if !rustix::fs::fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile) {
        return whole;
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(start) => start.min(bytes),
            // No data from here to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => return whole,
        };
        let Ok(end) = rustix::fs::seek(fd, SeekFrom::Hole(start)) else { return whole };
        let end = end.min(bytes);
        match ranges.last_mut() {
            Some(last) if start - last.end < HOLE_BYTES_MIN => last.end = end,
            _ => ranges.push(start..end),
        }
        // The file may change under us; never stand still.
        at = end.max(at + 1);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_left_out_and_short_ones_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        assert!(data_ranges(file.as_fd(), 64 << 20).is_empty());
        for at in [1 << 20, (1 << 20) + 32768, 32 << 20] {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        file.sync_all().unwrap();
        let ranges = data_ranges(file.as_fd(), 64 << 20);
        assert_eq!(ranges.len(), 2, "{ranges:?}");
        assert!(ranges[0].start <= 1 << 20 && ranges[0].end >= (1 << 20) + 36864, "{ranges:?}");
        assert!(ranges[1].contains(&(32 << 20)), "{ranges:?}");
        assert!(ranges.iter().map(|range| range.end - range.start).sum::<u64>() < 4 << 20, "{ranges:?}");
    }

    #[test]
    fn a_device_is_all_data() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(data_ranges(null.as_fd(), 4096), std::iter::once(0..4096).collect::<Vec<_>>());
    }
}
