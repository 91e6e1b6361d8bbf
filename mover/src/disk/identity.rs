//! Whether a disk on this host is the one the source means.
//!
//! A name or a UUID can't tell: clones of one golden image share both. What is compared: the size; the WWID, where
//! both ends see block devices that have one; and a sample of up to [`SAMPLE_BLOCKS`] blocks that are not zero, spread
//! evenly over the disk, by digest. The guest goes on writing while the sample travels, so a few of the blocks
//! ([`SAMPLE_STRAY_MAX`] of 64) may differ. Two clones that differ in less than that can't be told apart by this; a
//! page loaded from the wrong one is still caught by its own check. Of what nobody writes (a base under clones, a
//! reference image) no block may differ.
//!
//! On the wire an identity is text: `pf1 wwid=naa.5000c500 blocks=0:9f3a51c0ffee0123,2048:...` (sector, then the first
//! 8 bytes of the block's BLAKE3 in hex), of a base `pf1 base wwid=...`, of a reference image `pf1 reference wwid=...`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, StatxFlags};

use super::image::{DiskSpec, ImageDisks, Role};
use super::{DiskInfo, Disks, Read, Reader, Slot};
use crate::error::DiskError;
use crate::units::{DiskId, PAGE_BYTES, PAGE_BYTES_U64, Sector, u64_of, usize_of};

/// Blocks in a sample at most.
pub const SAMPLE_BLOCKS: usize = 64;
/// Of a full sample, so many may differ because the guest wrote them meanwhile.
pub const SAMPLE_STRAY_MAX: usize = 4;
/// Reads under way while sampling.
pub(super) const SAMPLE_DEPTH: usize = 4;
/// Places looked at to find blocks that are not zero; a power of two.
const CANDIDATES: u64 = 256;
/// How roles are written.
const BASE: &str = "base ";
const REFERENCE: &str = "reference ";
/// A read of the sample that takes longer than this counts as failed.
const READ_WAIT: Duration = Duration::from_secs(60);

/// What a disk is recognised by.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// What the disk is to the guest; one it only reads travels as one it writes.
    pub role: Role,
    /// The world-wide name of a block device, as its driver tells it.
    pub wwid: Option<String>,
    /// Digests of some blocks, by sector.
    pub blocks: BTreeMap<u64, u64>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Own | Role::ReadOnly => "",
            Role::Base => BASE,
            Role::Reference => REFERENCE,
        };
        write!(f, "pf1 {role}wwid={} blocks=", self.wwid.as_deref().unwrap_or("-"))?;
        for (number, (sector, digest)) in self.blocks.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma}{sector}:{digest:016x}")?;
        }
        Ok(())
    }
}

impl FromStr for Identity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let rest = text.strip_prefix("pf1 ")?;
            let roles = [(BASE, Role::Base), (REFERENCE, Role::Reference)];
            let role = roles.iter().find_map(|(word, role)| Some((rest.strip_prefix(word)?, *role)));
            let (rest, role) = role.unwrap_or((rest, Role::Own));
            let (wwid, blocks) = rest.strip_prefix("wwid=")?.split_once(" blocks=")?;
            let wwid = (wwid != "-").then(|| wwid.to_owned());
            let mut identity = Self { role, wwid, blocks: BTreeMap::new() };
            for pair in blocks.split(',').filter(|pair| !pair.is_empty()) {
                let (sector, digest) = pair.split_once(':')?;
                identity.blocks.insert(sector.parse().ok()?, u64::from_str_radix(digest, 16).ok()?);
            }
            (identity.blocks.len() <= SAMPLE_BLOCKS).then_some(identity)
        };
        parse().ok_or_else(|| "the source's description of it can't be read".to_owned())
    }
}

/// The world-wide name of the block device behind `fd`, from sysfs; `None` for files and for devices without one.
pub(super) fn wwid(fd: BorrowedFd<'_>) -> Option<String> {
    let stat = rustix::fs::fstat(fd).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return None;
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    wwid_at(&PathBuf::from(format!("/sys/dev/block/{major}:{minor}")).canonicalize().ok()?)
}

/// What a disk's index is filed under on this host, whatever stands on the disk: the WWID of a block device, else its
/// number; of a file, the file system, the inode and when it was made (a file put in another's place has others).
pub fn local_key(fd: BorrowedFd<'_>) -> io::Result<String> {
    let stat = rustix::fs::fstat(fd)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        return Ok(wwid(fd).map_or_else(|| format!("block {major}:{minor}"), |wwid| format!("wwid {wwid}")));
    }
    let system = rustix::fs::fstatvfs(fd)?.f_fsid;
    let made = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME)
        .map(|statx| (statx.stx_btime.tv_sec, statx.stx_btime.tv_nsec))
        .unwrap_or_default();
    Ok(format!("file {system:016x} {} {}.{:09}", stat.st_ino, made.0, made.1))
}

fn wwid_at(device: &Path) -> Option<String> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).ok()?;
        // One word on the wire.
        let word: String =
            text.trim().chars().map(|c| if c.is_ascii_graphic() && c != ',' { c } else { '_' }).collect();
        (!word.is_empty()).then_some(word)
    };
    // A partition has its disk's name and its own start.
    let (disk, start) = match read(&device.join("partition")) {
        Some(_) => (device.parent()?, read(&device.join("start"))),
        None => (device, None),
    };
    let name = ["wwid", "device/wwid", "serial"].iter().find_map(|file| read(&disk.join(file)))?;
    Some(start.map_or(name.clone(), |start| format!("{name}+{start}")))
}

/// Digests of up to [`SAMPLE_BLOCKS`] blocks that are not zero, spread evenly.
pub(super) fn sample(
    reader: &mut dyn Reader,
    disk: DiskId,
    bytes: u64,
    alignment: usize,
) -> Result<BTreeMap<u64, u64>, DiskError> {
    let mut blocks = BTreeMap::new();
    for sector in candidates(bytes, alignment) {
        if blocks.len() == SAMPLE_BLOCKS {
            break;
        }
        let block = read_block(reader, disk, sector, alignment)?;
        if block.iter().any(|byte| *byte != 0) {
            blocks.insert(sector.0, digest(&block));
        }
    }
    Ok(blocks)
}

/// Sectors of whole blocks, each as far as possible from those before it.
fn candidates(bytes: u64, alignment: usize) -> impl Iterator<Item = Sector> {
    let step = u64_of(alignment).max(PAGE_BYTES_U64);
    let whole = bytes / step;
    (0..CANDIDATES).filter_map(move |number| {
        let spread = number.reverse_bits() >> (64 - CANDIDATES.trailing_zeros());
        let block = if whole <= CANDIDATES {
            (spread < whole).then_some(spread)
        } else {
            u64::try_from(u128::from(whole) * u128::from(spread) / u128::from(CANDIDATES)).ok()
        }?;
        Some(Sector::holding(block * step))
    })
}

fn read_block(
    reader: &mut dyn Reader,
    disk: DiskId,
    sector: Sector,
    alignment: usize,
) -> Result<Vec<u8>, DiskError> {
    let slot = Slot(0);
    reader.read(Read { disk, sector, bytes: alignment.max(PAGE_BYTES), slot })?;
    let mut done = Vec::new();
    reader.complete(&mut done, READ_WAIT)?;
    let Some(completion) = done.pop() else {
        return Err(DiskError::Os {
            doing: format!("reading byte {} of disk {}", sector.bytes(), disk.0),
            remedy: "Is the storage reachable? Look at the kernel log of this host",
            source: io::ErrorKind::TimedOut.into(),
        });
    };
    completion.result?;
    Ok(reader.staged(slot)[..PAGE_BYTES].to_vec())
}

fn digest(block: &[u8]) -> u64 {
    let hash = blake3::hash(block);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Opens on this host the disks the source named, in its order: each at the path `paths` has for its name, else at the
/// path it has on the source. Fails on the first that is missing, unreadable, shrunk, or another one.
pub fn open_same(expected: &[DiskInfo], paths: &BTreeMap<String, PathBuf>) -> Result<ImageDisks, DiskError> {
    let specs: Vec<DiskSpec> = expected
        .iter()
        .map(|info| DiskSpec { name: info.name.clone(), path: resolve(info, paths), role: role(info) })
        .collect();
    let disks = ImageDisks::open_unidentified(&specs)?;
    for (number, info) in (0..).zip(expected) {
        compare(info, &disks, DiskId(number))?;
    }
    Ok(disks.identified(expected))
}

/// What the source says that its disk `info` is to the guest. Of one it says in no way this end knows, the guest's own: that
/// is the one which must be right.
#[must_use]
pub fn role(info: &DiskInfo) -> Role {
    info.identity.parse().map_or(Role::Own, |identity: Identity| identity.role)
}

/// Where the source's disk `info` should be on this host.
#[must_use]
pub fn resolve(info: &DiskInfo, paths: &BTreeMap<String, PathBuf>) -> PathBuf {
    paths.get(&info.name).cloned().unwrap_or_else(|| PathBuf::from(&info.path))
}

/// Whether the disk at `path` is the one the source describes. The error says what differs.
pub fn verify_same(expected: &DiskInfo, path: &Path) -> Result<(), DiskError> {
    let spec = DiskSpec { name: expected.name.clone(), path: path.to_owned(), role: Role::ReadOnly };
    compare(expected, &ImageDisks::open_unidentified(&[spec])?, DiskId(0))
}

fn compare(expected: &DiskInfo, disks: &ImageDisks, disk: DiskId) -> Result<(), DiskError> {
    let refuse = |why: String, remedy: &'static str| {
        Err(DiskError::Identity { path: disks.path(disk).to_owned(), why, remedy })
    };
    let theirs: Identity = match expected.identity.parse() {
        Ok(identity) => identity,
        Err(why) => return refuse(why, "Update the older end"),
    };
    let ours = &disks.infos()[usize::from(disk.0)];
    if ours.bytes != expected.bytes {
        let verb = if ours.bytes < expected.bytes { "has shrunk" } else { "is larger" };
        let why = format!("it {verb}: {} bytes here, {} on the source", ours.bytes, expected.bytes);
        return refuse(why, "Name the right disk for this host, or bring both to the same size");
    }
    if let (Some(theirs), Some(ours)) = (&theirs.wwid, disks.wwid(disk))
        && *theirs != ours
    {
        let why = format!("its WWID is {ours} here and {theirs} on the source");
        return refuse(why, "Map the disk by name to the path it has on this host");
    }
    let alignment = disks.alignment(disk);
    let mut reader = disks.image_reader(SAMPLE_DEPTH)?;
    let (mut differ, mut first) = (0, None);
    for (sector, expected_digest) in &theirs.blocks {
        let sector = Sector(*sector);
        let unit = u64_of(alignment).max(PAGE_BYTES_U64);
        // The two hosts may ask for different alignments; read the unit around the block.
        let before = usize_of(sector.bytes() % unit);
        if sector.bytes() >= ours.bytes || !before.is_multiple_of(PAGE_BYTES) {
            return refuse("the source describes blocks it can't have".to_owned(), "Update the older end");
        }
        let start = Sector::holding(sector.bytes() - u64_of(before));
        let block = read_unit(&mut reader, disk, start, before, alignment)?;
        if digest(&block) != *expected_digest {
            differ += 1;
            first.get_or_insert(sector);
        }
    }
    let allowed = match theirs.role {
        // In proportion for a small sample, rounded down: of one block, none may differ.
        Role::Own | Role::ReadOnly => SAMPLE_STRAY_MAX * theirs.blocks.len() / SAMPLE_BLOCKS,
        Role::Base | Role::Reference => 0,
    };
    match first {
        Some(sector) if differ > allowed => refuse(
            format!(
                "another one stands under that name: {differ} of {} sampled blocks differ, the first at byte {}",
                theirs.blocks.len(),
                sector.bytes()
            ),
            "Map the disk by name to the path it has on this host",
        ),
        _ => Ok(()),
    }
}

fn read_unit(
    reader: &mut dyn Reader,
    disk: DiskId,
    start: Sector,
    before: usize,
    alignment: usize,
) -> Result<Vec<u8>, DiskError> {
    let slot = Slot(0);
    read_block(reader, disk, start, alignment)?;
    Ok(reader.staged(slot)[before..before + PAGE_BYTES].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    /// An image of `blocks` blocks, each different; blocks in `zero` stay zero.
    fn image(path: &Path, blocks: u64, zero: std::ops::Range<u64>) {
        let mut bytes = vec![0; usize_of(blocks) * PAGE_BYTES];
        for block in (0..blocks).filter(|block| !zero.contains(block)) {
            let at = usize_of(block) * PAGE_BYTES;
            bytes[at..at + 8].copy_from_slice(&(block + 1).to_le_bytes());
        }
        std::fs::write(path, bytes).unwrap();
    }

    fn overwrite(path: &Path, block: u64) {
        let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.seek(SeekFrom::Start(block * PAGE_BYTES_U64)).unwrap();
        file.write_all(&[0xee; PAGE_BYTES]).unwrap();
        file.sync_all().unwrap();
    }

    fn info(path: &Path) -> DiskInfo {
        let spec = DiskSpec { name: "disk0".to_owned(), path: path.to_owned(), role: Role::Own };
        ImageDisks::open(&[spec]).unwrap().infos()[0].clone()
    }

    fn refusal(expected: &DiskInfo, path: &Path) -> String {
        verify_same(expected, path).unwrap_err().to_string()
    }

    #[test]
    fn a_copy_is_the_same_disk_and_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (one, copy, other) = (dir.path().join("one"), dir.path().join("copy"), dir.path().join("other"));
        image(&one, 1000, 100..900);
        std::fs::copy(&one, &copy).unwrap();
        image(&other, 1000, 0..1);
        for block in 0..1000 {
            overwrite(&other, block);
        }
        let info = info(&one);
        let identity: Identity = info.identity.parse().unwrap();
        assert!((40..=SAMPLE_BLOCKS).contains(&identity.blocks.len()), "{info:?}");
        verify_same(&info, &one).unwrap();
        verify_same(&info, &copy).unwrap();
        let why = refusal(&info, &other);
        assert!(why.contains("another one stands under that name") && why.contains("other"), "{why}");
        let map = BTreeMap::from([("disk0".to_owned(), copy.clone())]);
        let opened = open_same(std::slice::from_ref(&info), &map).unwrap();
        assert_eq!(opened.path(DiskId(0)), copy.display().to_string());
        assert_eq!(opened.infos()[0].identity, info.identity);
        let map = BTreeMap::from([("disk0".to_owned(), other)]);
        open_same(&[info], &map).unwrap_err();
    }

    #[test]
    fn a_few_blocks_the_guest_wrote_meanwhile_are_no_other_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        image(&path, 1000, 0..0);
        let info = info(&path);
        let identity: Identity = info.identity.parse().unwrap();
        assert_eq!(identity.blocks.len(), SAMPLE_BLOCKS);
        for (count, sector) in identity.blocks.keys().enumerate().take(SAMPLE_STRAY_MAX + 1) {
            verify_same(&info, &path).unwrap_or_else(|why| panic!("{count} blocks written: {why}"));
            overwrite(&path, sector / 8);
        }
        assert!(refusal(&info, &path).contains("5 of 64 sampled blocks differ"));
    }

    /// Under a clone nothing is written: one other block is another base, and the guest would run on it.
    #[test]
    fn of_what_nobody_writes_no_block_may_differ() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        for (role, word) in [(Role::Base, "pf1 base wwid="), (Role::Reference, "pf1 reference wwid=")] {
            image(&path, 1000, 0..0);
            let spec = DiskSpec { name: "xvda-base".to_owned(), path: path.clone(), role };
            let info = ImageDisks::open(&[spec]).unwrap().infos()[0].clone();
            assert!(info.identity.starts_with(word), "{info:?}");
            assert_eq!(super::role(&info), role);
            let identity: Identity = info.identity.parse().unwrap();
            assert_eq!(identity.to_string(), info.identity);
            verify_same(&info, &path).unwrap();
            overwrite(&path, identity.blocks.keys().next().unwrap() / 8);
            assert!(refusal(&info, &path).contains("1 of 64 sampled blocks differ"));
        }
        let own = DiskInfo { identity: "pf1 wwid=- blocks=".to_owned(), ..info(&path) };
        let strange = DiskInfo { identity: "pf1 loan wwid=- blocks=".to_owned(), ..own.clone() };
        assert_eq!((super::role(&own), super::role(&strange)), (Role::Own, Role::Own));
        assert!(refusal(&strange, &path).contains("can't be read"));
    }

    #[test]
    fn what_was_written_before_the_source_asks_again_is_no_difference() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        image(&path, 1000, 0..0);
        let spec = DiskSpec { name: "disk0".to_owned(), path: path.clone(), role: Role::Own };
        let disks = ImageDisks::open_images(&[spec]).unwrap();
        (0..1000).for_each(|block| overwrite(&path, block));
        let mut info = disks.infos()[0].clone();
        assert!(refusal(&info, &path).contains("another one stands under that name"));
        info.identity = disks.identities().unwrap().remove(0);
        verify_same(&info, &path).unwrap();
    }

    #[test]
    fn says_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        image(&path, 100, 0..0);
        let mut info = info(&path);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(99 * PAGE_BYTES_U64).unwrap();
        assert!(refusal(&info, &path).contains("it has shrunk: 405504 bytes here, 409600 on the source"));
        file.set_len(101 * PAGE_BYTES_U64).unwrap();
        assert!(refusal(&info, &path).contains("it is larger"));
        std::fs::remove_file(&path).unwrap();
        let why = refusal(&info, &path);
        assert!(why.contains("opening disk disk0") && why.contains("mapped by name"), "{why}");
        assert!(refusal(&info, dir.path()).contains("neither a file nor a block device"));
        info.identity = "garbage".to_owned();
        image(&path, 100, 0..0);
        assert!(refusal(&info, &path).contains("can't be read"));
    }

    #[test]
    fn a_blank_disk_is_told_by_its_size_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blank");
        std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
        let info = info(&path);
        assert_eq!(info.identity, "pf1 wwid=- blocks=");
        verify_same(&info, &path).unwrap();
    }

    #[test]
    fn wwids_come_from_sysfs_and_tell_partitions_apart() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("sda");
        let part = disk.join("sda2");
        std::fs::create_dir_all(disk.join("device")).unwrap();
        std::fs::create_dir_all(&part).unwrap();
        assert_eq!(wwid_at(&disk), None);
        std::fs::write(disk.join("device/wwid"), "naa.5000 c500,x\n").unwrap();
        std::fs::write(part.join("partition"), "2\n").unwrap();
        std::fs::write(part.join("start"), "2048\n").unwrap();
        assert_eq!(wwid_at(&disk).unwrap(), "naa.5000_c500_x");
        assert_eq!(wwid_at(&part).unwrap(), "naa.5000_c500_x+2048");
    }

    #[test]
    fn candidates_are_whole_distinct_blocks_over_the_whole_disk() {
        for bytes in [512, 4096, 40960, 1 << 20, 3 << 30, 10_000_000_000_123] {
            let sectors: Vec<u64> = candidates(bytes, 512).map(|s| s.0).collect();
            let distinct: std::collections::BTreeSet<u64> = sectors.iter().copied().collect();
            assert_eq!(sectors.len(), distinct.len());
            assert!(sectors.iter().all(|s| s % 8 == 0 && s * 512 + 4096 <= bytes), "{bytes}");
            assert_eq!(u64_of(sectors.len()), (bytes / 4096).min(CANDIDATES));
        }
    }
}
