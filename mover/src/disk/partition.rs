//! Regions of a disk from its partition table: MBR with logical partitions, GPT, or a file system on the whole disk.
//!
//! A block of a file begins at a multiple of the file system's block size from the start of its partition; where that
//! start is no multiple of 4 KiB (sector 63 in old images), or the file system's blocks are smaller than a page (ext
//! and XFS of 1 KiB), blocks begin elsewhere than at multiples of 4 KiB of the disk. What can't be made out is searched
//! at multiples of 4 KiB. Everything read here comes from the guest: it is held against limits, and a table that makes
//! no sense is no error. Pure but for the reading function it is given.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::error::DiskError;
use crate::index::layout::{Layout, REGIONS_MAX, Region};
use crate::units::{SECTOR_BYTES, SECTORS_PER_PAGE, Sector, u64_of, usize_of};

/// Logical partitions followed at most; a chain may be circular.
const LOGICAL_MAX: usize = 64;
/// Entries of a GPT looked at.
const GPT_ENTRIES_MAX: u32 = 128;

/// Reads this many bytes at this byte offset of a disk; fewer where it ends.
pub type ReadAt<'r> = dyn FnMut(u64, usize) -> Result<Vec<u8>, DiskError> + 'r;

/// The regions of a disk of `bytes`.
pub fn layout(bytes: u64, read: &mut ReadAt<'_>) -> Result<Layout, DiskError> {
    let end = Sector::holding(bytes).0;
    let head = read(0, 8192)?;
    let mut partitions = match gpt(&head, read)? {
        Some(partitions) => partitions,
        None => mbr(&head, read)?.unwrap_or_default(),
    };
    partitions.retain(|range| range.start < range.end && range.start > 0 && range.end <= end);
    partitions.sort_by_key(|range| (range.start, range.end));
    if partitions.len() * 2 + 1 > REGIONS_MAX {
        partitions.clear();
    }
    let mut regions = Vec::new();
    let mut at = 0;
    if partitions.is_empty() {
        regions.push(Region { start: 0, end, stride: stride(0, read)? });
        at = end;
    }
    for range in partitions {
        if range.start < at {
            // Overlaps the one before, as the entries of hybrid tables do.
            continue;
        }
        regions.extend(gap(at, range.start));
        regions.push(Region { start: range.start, end: range.end, stride: stride(range.start, read)? });
        at = range.end;
    }
    regions.extend(gap(at, end));
    Ok(Layout::new(regions).unwrap_or_else(|_| Layout::plain(bytes)))
}

/// The stretch between two partitions: boot loaders, and what a table that can't be read left out.
fn gap(from: u64, to: u64) -> Option<Region> {
    let start = from.next_multiple_of(SECTORS_PER_PAGE);
    (start + SECTORS_PER_PAGE <= to).then_some(Region { start, end: to, stride: SECTORS_PER_PAGE })
}

fn le16(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]).into())
}
fn le32(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into())
}
fn le64(bytes: &[u8], at: usize) -> u64 {
    le32(bytes, at) | le32(bytes, at + 4) << 32
}

/// Partitions of a GPT (UEFI specification, 5.3), if there is one. Its own blocks are of the disk's logical size.
fn gpt(head: &[u8], read: &mut ReadAt<'_>) -> Result<Option<Vec<Range<u64>>>, DiskError> {
    let is_header = |at: usize| head.get(at..at + 8) == Some(b"EFI PART");
    let Some(logical) = [512_usize, 4096].into_iter().find(|at| is_header(*at)) else { return Ok(None) };
    let header = &head[logical..];
    let count = usize_of(le32(header, 80).min(GPT_ENTRIES_MAX.into()));
    let size = usize_of(le32(header, 84));
    if !(128..=4096).contains(&size) || !size.is_multiple_of(128) {
        return Ok(None);
    }
    let sectors = u64_of(logical) / SECTOR_BYTES;
    let entries = read(le64(header, 72).saturating_mul(u64_of(logical)), count * size)?;
    let used = entries.chunks_exact(size).filter(|entry| entry[..16].iter().any(|byte| *byte != 0));
    let ranges = used.map(|entry| {
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        first.saturating_mul(sectors)..last.saturating_add(1).saturating_mul(sectors)
    });
    Ok(Some(ranges.collect()))
}

/// The four entries of a boot record: type, start, sectors.
fn entries(record: &[u8]) -> impl Iterator<Item = (u8, u64, u64)> + '_ {
    record[446..510].chunks_exact(16).map(|entry| (entry[4], le32(entry, 8), le32(entry, 12)))
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// Partitions of an MBR and of the chain of extended boot records in it, if there is one.
fn mbr(head: &[u8], read: &mut ReadAt<'_>) -> Result<Option<Vec<Range<u64>>>, DiskError> {
    let is_record = |record: &[u8]| record.len() >= 512 && record[510..512] == [0x55, 0xaa];
    // A file system's boot sector carries the same signature; its "entries" are code.
    let sane = |record: &[u8]| {
        entries(record).zip(record[446..].chunks_exact(16)).all(|(_, raw)| raw[0] & 0x7f == 0)
            && entries(record).any(|(kind, start, sectors)| kind != 0 && start > 0 && sectors > 0)
    };
    if !is_record(head) || !sane(head) {
        return Ok(None);
    }
    let mut ranges = Vec::new();
    for (kind, start, sectors) in entries(head).filter(|(kind, ..)| *kind != 0) {
        if !is_extended(kind) {
            ranges.push(start..start + sectors);
            continue;
        }
        // Each record of the chain names one partition relative to itself, and the next relative to the first.
        let mut at = start;
        for _ in 0..LOGICAL_MAX {
            let record = read(at * SECTOR_BYTES, 512)?;
            if !is_record(&record) {
                break;
            }
            let logical = entries(&record).find(|(kind, ..)| *kind != 0 && !is_extended(*kind));
            ranges.extend(logical.map(|(_, first, sectors)| at + first..at + first + sectors));
            let Some((_, next, _)) = entries(&record).find(|(kind, ..)| is_extended(*kind)) else { break };
            if start + next <= at {
                break;
            }
            at = start + next;
        }
    }
    Ok(Some(ranges))
}

/// Sectors from one place where file content may begin to the next, in the file system that begins at `start`.
fn stride(start: u64, read: &mut ReadAt<'_>) -> Result<u64, DiskError> {
    let head = read(start.saturating_mul(SECTOR_BYTES), 4096)?;
    let block = ext_block(&head).or_else(|| xfs_block(&head)).or_else(|| ntfs_cluster(&head));
    Ok(match block {
        Some(bytes) if bytes < SECTORS_PER_PAGE * SECTOR_BYTES => (bytes / SECTOR_BYTES).max(1),
        _ => SECTORS_PER_PAGE,
    })
}

/// Block size of ext2, 3, 4 (Documentation/filesystems/ext4/super.rst: s_magic, s_log_block_size).
fn ext_block(head: &[u8]) -> Option<u64> {
    let superblock = head.get(1024..2048)?;
    let log = le32(superblock, 24);
    (le16(superblock, 56) == 0xef53 && log <= 6).then(|| 1024 << log)
}

/// Block size of XFS (sb_magicnum, sb_blocksize, big-endian).
fn xfs_block(head: &[u8]) -> Option<u64> {
    let size = u32::from_be_bytes(head.get(4..8)?.try_into().ok()?);
    (head.starts_with(b"XFSB") && size.is_power_of_two() && (512..=65536).contains(&size))
        .then_some(size.into())
}

/// Cluster size of NTFS (BPB: bytes per sector, sectors per cluster).
fn ntfs_cluster(head: &[u8]) -> Option<u64> {
    let (sector, per_cluster) = (le16(head, 11), u64::from(*head.get(13)?));
    let size = sector * per_cluster;
    (head.get(3..11) == Some(b"NTFS    ") && size.is_power_of_two() && (512..=65536).contains(&size))
        .then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout_of(image: &[u8]) -> Vec<Region> {
        let mut read = |offset: u64, bytes: usize| {
            let from = usize_of(offset.min(u64_of(image.len())));
            Ok(image[from..(from + bytes).min(image.len())].to_vec())
        };
        layout(u64_of(image.len()), &mut read).unwrap().regions().to_vec()
    }

    fn region(start: u64, end: u64, stride: u64) -> Region {
        Region { start, end, stride }
    }

    /// Writes an MBR entry.
    fn entry(image: &mut [u8], record: usize, number: usize, kind: u8, start: u32, sectors: u32) {
        let at = record * 512 + 446 + number * 16;
        image[at + 4] = kind;
        image[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        image[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        image[record * 512 + 510..record * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    /// Writes what is looked at of an ext superblock.
    fn ext(image: &mut [u8], start: usize, log: u32) {
        let at = start * 512 + 1024;
        image[at + 24..at + 28].copy_from_slice(&log.to_le_bytes());
        image[at + 56..at + 58].copy_from_slice(&[0x53, 0xef]);
    }

    #[test]
    fn without_a_table_the_disk_is_one_region() {
        assert_eq!(layout_of(&vec![0; 1 << 20]), [region(0, 2048, 8)]);
        let mut image = vec![0; 1 << 20];
        ext(&mut image, 0, 0);
        assert_eq!(layout_of(&image), [region(0, 2048, 2)]);
        ext(&mut image, 0, 2);
        assert_eq!(layout_of(&image), [region(0, 2048, 8)]);
        image[..8].copy_from_slice(b"XFSB\0\0\x04\0");
        ext(&mut image, 0, 99);
        assert_eq!(layout_of(&image), [region(0, 2048, 2)]);
    }

    #[test]
    fn an_old_partition_has_its_own_phase() {
        let mut image = vec![0; 1 << 20];
        entry(&mut image, 0, 0, 0x83, 63, 1000);
        entry(&mut image, 0, 1, 0x83, 1063, 900);
        ext(&mut image, 1063, 1);
        let regions = [region(0, 63, 8), region(63, 1063, 8), region(1063, 1963, 4), region(1968, 2048, 8)];
        assert_eq!(layout_of(&image), regions);
    }

    #[test]
    fn logical_partitions_are_followed_and_a_circle_is_left() {
        let mut image = vec![0; 1 << 20];
        entry(&mut image, 0, 0, 0x0f, 100, 1900);
        entry(&mut image, 100, 0, 0x83, 63, 200);
        entry(&mut image, 100, 1, 0x05, 500, 400);
        entry(&mut image, 600, 0, 0x83, 1, 300);
        let regions = [
            region(0, 163, 8),
            region(163, 363, 8),
            region(368, 601, 8),
            region(601, 901, 8),
            region(904, 2048, 8),
        ];
        assert_eq!(layout_of(&image), regions);
        entry(&mut image, 600, 1, 0x05, 0, 400);
        assert_eq!(layout_of(&image), regions);
    }

    #[test]
    fn a_gpt_is_read_in_the_disks_own_blocks() {
        for logical in [512_usize, 4096] {
            let scale = u64_of(logical) / 512;
            let mut image = vec![0; 4 << 20];
            // The protective MBR says one partition over all; it must not be believed.
            entry(&mut image, 0, 0, 0xee, 1, 8191);
            image[logical..logical + 8].copy_from_slice(b"EFI PART");
            image[logical + 72..logical + 80].copy_from_slice(&2_u64.to_le_bytes());
            image[logical + 80..logical + 84].copy_from_slice(&128_u32.to_le_bytes());
            image[logical + 84..logical + 88].copy_from_slice(&128_u32.to_le_bytes());
            for (number, first, last) in [(0, 34_u64, 99_u64), (5, 101, 200)] {
                let at = 2 * logical + number * 128;
                image[at] = 1;
                image[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
                image[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
            }
            let found = layout_of(&image);
            assert!(found.contains(&region(34 * scale, 100 * scale, 8)), "{found:?}");
            assert!(found.contains(&region(101 * scale, 201 * scale, 8)), "{found:?}");
            assert_eq!(found.last().unwrap().end, 8192);
        }
    }

    #[test]
    fn partitions_past_the_end_or_over_another_are_left_out() {
        let mut image = vec![0; 1 << 20];
        entry(&mut image, 0, 0, 0x83, 63, 500);
        entry(&mut image, 0, 1, 0x83, 100, 500);
        entry(&mut image, 0, 2, 0x83, 1000, u32::MAX);
        assert_eq!(layout_of(&image), [region(0, 63, 8), region(63, 563, 8), region(568, 2048, 8)]);
    }

    #[test]
    fn sfdisk_and_mke2fs_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        for (label, start) in [("dos", 63), ("gpt", 2048)] {
            let script = format!("label: {label}\nstart={start}, size=40960\nsize=40960\n");
            if !run("sfdisk", &["--quiet", &path.display().to_string()], &script) {
                eprintln!("SKIPPED: sfdisk is not installed (package fdisk)");
                return;
            }
            let offset = format!("offset={}", start * 512);
            let path = path.display().to_string();
            assert!(run("mke2fs", &["-qF", "-b", "1024", "-E", &offset, &path, "20480"], ""));
            let found = layout_of(&std::fs::read(&path).unwrap());
            assert!(found.contains(&region(start, start + 40960, 2)), "{label}: {found:?}");
            assert_eq!(found.iter().filter(|r| r.end - r.start == 40960).count(), 2, "{label}: {found:?}");
        }
    }

    fn run(program: &str, args: &[&str], input: &str) -> bool {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let path = format!("/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
        let child = Command::new(program)
            .args(args)
            .env("PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let Ok(mut child) = child else { return false };
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{program}");
        true
    }

    proptest! {
        #[test]
        fn garbage_makes_a_layout_too(
            mut image in proptest::collection::vec(any::<u8>(), 8192..16384),
            signature in any::<bool>(),
            is_gpt in any::<bool>(),
        ) {
            if signature {
                image[510..512].copy_from_slice(&[0x55, 0xaa]);
                for number in 0..4 {
                    image[446 + number * 16] = 0;
                }
            }
            if is_gpt {
                image[512..520].copy_from_slice(b"EFI PART");
                image[596..600].copy_from_slice(&128_u32.to_le_bytes());
            }
            let regions = layout_of(&image);
            prop_assert!(regions.iter().all(|r| r.end <= u64_of(image.len()) / 512));
        }
    }
}
