//! Disks that are image files or block devices of this host, read past the page cache.
//!
//! O_DIRECT is not only the faster way: another host writes these disks, and what this host's page cache once held is
//! not what stands there now. Where a file system refuses O_DIRECT, reads are buffered, leave nothing in the cache
//! (RWF_DONTCACHE, or dropped after each read), and a notice says so.
//!
//! Owner of a reader: one thread from its first read on. Opening and describing disks is control path.
#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::{Completion, DiskInfo, Disks, Read, Reader, Slot, identity};
use crate::error::DiskError;
use crate::kernel::reads::{Done, RWF_DONTCACHE, ReadFile, SlotReads};
use crate::limits::{DISKS_MAX, READ_BYTES_MAX};
use crate::memory::{GuestPage, PageBuf};
use crate::units::{DiskId, PAGE_BYTES, SECTOR_BYTES, u64_of, usize_of};

/// Alignment assumed where the kernel does not tell (before Linux 6.1, or a file system that does not say).
const ALIGNMENT_UNKNOWN: usize = 4096;

/// A disk to open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskSpec {
    /// The guest's name for it.
    pub name: String,
    /// The image file or block device.
    pub path: PathBuf,
    /// What it is to the guest.
    pub role: Role,
}

/// What a disk is to the guest that refers to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Role {
    /// Its own disk, which it writes.
    #[default]
    Own,
    /// Its own disk, which nobody writes: there is nothing to flush.
    ReadOnly,
    /// Stands under its own disk, which is a clone of it; nobody writes it.
    Base,
    /// An image that its pages may be referred to on, and nothing more; nobody writes it.
    Reference,
}

/// How one disk is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    /// O_DIRECT.
    Direct,
    /// Buffered; the kernel keeps nothing (RWF_DONTCACHE).
    Uncached,
    /// Buffered; dropped from the cache after each read.
    Dropped,
}

/// One open disk.
#[derive(Debug)]
struct Image {
    path: String,
    bytes: u64,
    alignment: usize,
    access: Access,
    role: Role,
}

/// Image files and block devices, opened for reading.
#[derive(Debug)]
pub struct ImageDisks {
    images: Arc<[Image]>,
    files: Arc<[ReadFile]>,
    infos: Vec<DiskInfo>,
    notes: Vec<String>,
}

impl ImageDisks {
    /// Opens `specs`, in the order that numbers them, and takes each one's identity. Fails on the first that is
    /// missing, unreadable, empty, or neither a file nor a block device.
    pub fn open(specs: &[DiskSpec]) -> Result<Arc<dyn Disks>, DiskError> {
        Ok(Arc::new(Self::open_images(specs)?))
    }

    /// As [`Self::open`], for callers that want the concrete type.
    pub fn open_images(specs: &[DiskSpec]) -> Result<Self, DiskError> {
        let mut disks = Self::open_unidentified(specs)?;
        let identities = disks.identities()?;
        for (info, identity) in disks.infos.iter_mut().zip(identities) {
            info.identity = identity;
        }
        Ok(disks)
    }

    /// Opens `specs` without looking at what stands on them; their identities stay empty.
    pub fn open_unidentified(specs: &[DiskSpec]) -> Result<Self, DiskError> {
        if specs.len() > DISKS_MAX {
            return Err(DiskError::Os {
                doing: format!("opening {} disks", specs.len()),
                remedy: "Name at most 16 disks",
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        let (mut images, mut files, mut infos, mut notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for spec in specs {
            let (image, file) = open_one(spec, &mut notes)?;
            let (name, path) = (spec.name.clone(), image.path.clone());
            infos.push(DiskInfo { name, path, bytes: image.bytes, identity: String::new() });
            images.push(image);
            files.push(file);
        }
        Ok(Self { images: images.into(), files: files.into(), infos, notes })
    }

    /// What `disk`'s index is filed under on this host ([`identity::local_key`]).
    pub fn local_key(&self, disk: DiskId) -> Result<String, DiskError> {
        let number = usize::from(disk.0);
        identity::local_key(self.files[number].fd.as_fd()).map_err(|source| DiskError::Os {
            doing: format!("looking at {}", self.images[number].path),
            remedy: "Look at the kernel log of this host for the cause",
            source,
        })
    }

    /// The byte ranges of `disk` that may hold something else than zero.
    #[must_use]
    pub fn data_ranges(&self, disk: DiskId) -> Vec<std::ops::Range<u64>> {
        let number = usize::from(disk.0);
        super::extents::data_ranges(self.files[number].fd.as_fd(), self.images[number].bytes)
    }

    /// When `disk`, a file, was last changed, in nanoseconds since 1970; 0 for a block device.
    #[must_use]
    pub fn changed_unix_ns(&self, disk: DiskId) -> u64 {
        let Ok(stat) = rustix::fs::fstat(&self.files[usize::from(disk.0)].fd) else { return 0 };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return 0;
        }
        let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
        #[allow(
            clippy::useless_conversion,
            reason = "signed where rustix asks libc: under miri and sanitizers"
        )]
        let nanoseconds = u64::try_from(stat.st_mtime_nsec).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
    }

    /// The path of `disk` on this host.
    #[must_use]
    pub fn path(&self, disk: DiskId) -> &str {
        &self.images[usize::from(disk.0)].path
    }

    /// Takes over what the source knows of these disks, which have been found to be the same.
    pub(super) fn identified(mut self, expected: &[DiskInfo]) -> Self {
        for (ours, theirs) in self.infos.iter_mut().zip(expected) {
            ours.identity.clone_from(&theirs.identity);
        }
        self
    }

    /// The world-wide name of `disk`, where it is a block device that has one.
    #[must_use]
    pub fn wwid(&self, disk: DiskId) -> Option<String> {
        identity::wwid(self.files[usize::from(disk.0)].fd.as_fd())
    }

    /// A reader, as its concrete type.
    pub fn image_reader(&self, slots: usize) -> Result<ImageReader, DiskError> {
        let reads = SlotReads::new(Arc::clone(&self.files), slots).map_err(no_reader)?;
        Ok(ImageReader::new(Arc::clone(&self.images), Arc::clone(&self.files), reads))
    }

    /// A reader that uses threads and no io_uring, to compare.
    pub fn thread_reader(&self, slots: usize) -> Result<ImageReader, DiskError> {
        let reads = SlotReads::with_threads(Arc::clone(&self.files), slots).map_err(no_reader)?;
        Ok(ImageReader::new(Arc::clone(&self.images), Arc::clone(&self.files), reads))
    }
}

fn no_reader(source: io::Error) -> DiskError {
    DiskError::Os {
        doing: "setting up disk reads".to_owned(),
        remedy: "Free some memory, or raise the limits on memory and threads of this process",
        source,
    }
}

fn disk_id(number: usize) -> DiskId {
    DiskId(u8::try_from(number).unwrap_or(u8::MAX))
}

impl Disks for ImageDisks {
    fn infos(&self) -> &[DiskInfo] {
        &self.infos
    }
    fn identities(&self) -> Result<Vec<String>, DiskError> {
        if self.images.is_empty() {
            return Ok(Vec::new());
        }
        let mut reader = self.image_reader(identity::SAMPLE_DEPTH)?;
        let mut identities = Vec::with_capacity(self.images.len());
        for (number, image) in self.images.iter().enumerate() {
            let wwid = identity::wwid(self.files[number].fd.as_fd());
            let blocks = identity::sample(&mut reader, disk_id(number), image.bytes, image.alignment)?;
            identities.push(identity::Identity { role: image.role, wwid, blocks }.to_string());
        }
        Ok(identities)
    }
    fn alignment(&self, disk: DiskId) -> usize {
        self.images[usize::from(disk.0)].alignment
    }
    fn reader(&self, slots: usize) -> Result<Box<dyn Reader>, DiskError> {
        Ok(Box::new(self.image_reader(slots)?))
    }
    fn flush(&self) -> Result<(), DiskError> {
        for (image, file) in
            self.images.iter().zip(self.files.iter()).filter(|(image, _)| image.role == Role::Own)
        {
            rustix::fs::fsync(&file.fd).map_err(|errno| DiskError::Os {
                doing: format!("flushing {}", image.path),
                remedy: "The disk lost writes: look at the kernel log of this host before going on",
                source: errno.into(),
            })?;
        }
        Ok(())
    }
    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

/// Opens `path` for reading past the page cache where its file system can.
fn open_one(spec: &DiskSpec, notes: &mut Vec<String>) -> Result<(Image, ReadFile), DiskError> {
    let path = spec.path.display().to_string();
    let failed = |doing: &str, errno: Errno| DiskError::Os {
        doing: format!("{doing} disk {} at {path}", spec.name),
        remedy: remedy(errno),
        source: errno.into(),
    };
    let buffered = open(&spec.path, OFlags::empty()).map_err(|errno| failed("opening", errno))?;
    let stat = rustix::fs::fstat(&buffered).map_err(|errno| failed("looking at", errno))?;
    if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::BlockDevice) {
        return Err(DiskError::Os {
            doing: format!("opening disk {} at {path}", spec.name),
            remedy: "Name an image file or a block device",
            source: io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"),
        });
    }
    let bytes = rustix::fs::seek(&buffered, SeekFrom::End(0)).map_err(|errno| failed("measuring", errno))?;
    if bytes < SECTOR_BYTES {
        return Err(DiskError::Os {
            doing: format!("opening disk {} at {path}", spec.name),
            remedy: "Is this the right image, or one that was never filled?",
            source: io::Error::new(io::ErrorKind::UnexpectedEof, format!("it is {bytes} bytes long")),
        });
    }
    if let Some((fd, alignment)) = open_direct(&spec.path, &buffered) {
        let image = Image { path, bytes, alignment, access: Access::Direct, role: spec.role };
        return Ok((image, ReadFile { fd, flags: 0 }));
    }
    // What the cache holds from before may be older than the disk.
    rustix::fs::fadvise(&buffered, 0, None, Advice::DontNeed).map_err(|errno| failed("uncaching", errno))?;
    let mut page = PageBuf::zeroed();
    let flag = ReadWriteFlags::from_bits_retain(RWF_DONTCACHE.cast_unsigned());
    let uncached = rustix::io::preadv2(&buffered, &mut [IoSliceMut::new(&mut page.0)], 0, flag).is_ok();
    let access = if uncached { Access::Uncached } else { Access::Dropped };
    let how = if uncached { "without leaving them in the page cache" } else { "and dropped from the cache" };
    notes.push(format!(
        "disk {} at {path}: its file system refuses O_DIRECT; blocks are read through the page cache {how}, which \
         costs CPU",
        spec.name
    ));
    let flags = if uncached { RWF_DONTCACHE } else { 0 };
    let alignment = usize_of(SECTOR_BYTES);
    Ok((Image { path, bytes, alignment, access, role: spec.role }, ReadFile { fd: buffered, flags }))
}

fn open(path: &Path, more: OFlags) -> Result<OwnedFd, Errno> {
    // NONBLOCK: a path that turns out to be a fifo must not hang the opening; files and disks ignore it.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The same file opened with O_DIRECT and its alignment, if that is possible and a read then works.
fn open_direct(path: &Path, buffered: &OwnedFd) -> Option<(OwnedFd, usize)> {
    let fd = open(path, OFlags::DIRECT).ok()?;
    // Opened a second time by name: make sure it is the same file.
    let (one, other) = (rustix::fs::fstat(&fd).ok()?, rustix::fs::fstat(buffered).ok()?);
    if (one.st_dev, one.st_ino, one.st_rdev) != (other.st_dev, other.st_ino, other.st_rdev) {
        return None;
    }
    let alignment = direct_alignment(&fd)?;
    if alignment <= PAGE_BYTES {
        rustix::io::pread(&fd, &mut PageBuf::zeroed().0, 0).ok()?;
    }
    (alignment <= READ_BYTES_MAX).then_some((fd, alignment))
}

/// The alignment O_DIRECT asks of offsets and lengths; `None` where it is not supported after all.
fn direct_alignment(fd: &OwnedFd) -> Option<usize> {
    let told = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    if let Some(statx) = told {
        let align = usize_of(statx.stx_dio_offset_align.into());
        let memory = usize_of(statx.stx_dio_mem_align.into());
        // Staging slots and guest pages are aligned to pages, no better.
        return (align != 0 && memory <= PAGE_BYTES).then_some(align.max(usize_of(SECTOR_BYTES)));
    }
    match rustix::fs::ioctl_blksszget(fd) {
        Ok(logical) => Some(usize_of(logical.into()).max(usize_of(SECTOR_BYTES))),
        Err(_) => Some(ALIGNMENT_UNKNOWN),
    }
}

/// What to do about an error of a disk.
pub(super) fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT | Errno::NOTDIR => {
            "Check the path; a disk that has another path on this host can be mapped by name"
        }
        Errno::ACCESS | Errno::PERM => {
            "Run as root or as a member of the disk's group, or make it readable to this user"
        }
        Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => {
            "Attach the device to this host (iSCSI, multipath, LVM activation) first"
        }
        Errno::IO | Errno::REMOTEIO | Errno::TIMEDOUT => {
            "The storage failed: look at the kernel log of this host and at the storage itself"
        }
        Errno::STALE => "The file was replaced on the file server: mount it again",
        Errno::MFILE | Errno::NFILE => "Raise the limit on open files (`ulimit -n`)",
        Errno::INVAL => "The read is not aligned as the disk asks; this is an error in pageferry",
        _ => "Look at the kernel log of this host for the cause",
    }
}

/// What a slot's read was for.
#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    disk: DiskId,
    offset: u64,
    /// Bytes of it that stand on the disk.
    expected: usize,
}

/// Reads from [`ImageDisks`].
#[derive(Debug)]
pub struct ImageReader {
    images: Arc<[Image]>,
    files: Arc<[ReadFile]>,
    reads: SlotReads,
    pending: Vec<Pending>,
    /// Reads that failed before they began; handed out by the next `complete`.
    refused: Vec<Completion>,
    ended: Vec<Done>,
}

impl ImageReader {
    fn new(images: Arc<[Image]>, files: Arc<[ReadFile]>, reads: SlotReads) -> Self {
        let slots = reads.slots();
        Self {
            images,
            files,
            reads,
            pending: vec![Pending::default(); slots],
            refused: Vec::with_capacity(slots),
            ended: Vec::with_capacity(slots),
        }
    }

    /// Checks a read against its disk and takes note of it. `None` if it was refused: its completion says why.
    fn admit(&mut self, read: Read) -> Option<(usize, Pending)> {
        let file = usize::from(read.disk.0);
        let image = &self.images[file];
        // A sector from the wire may be any number.
        let offset = read.sector.0.saturating_mul(SECTOR_BYTES);
        let aligned = u64_of(image.alignment);
        if offset >= image.bytes {
            let wanted = offset.saturating_add(u64_of(read.bytes));
            let error = DiskError::Short { disk: read.disk, end: image.bytes, wanted };
            self.refused.push(Completion { slot: read.slot, result: Err(error) });
            return None;
        }
        if !offset.is_multiple_of(aligned) || !u64_of(read.bytes).is_multiple_of(aligned) || read.bytes == 0 {
            let error = self.failure(read.disk, offset, Errno::INVAL.into());
            self.refused.push(Completion { slot: read.slot, result: Err(error) });
            return None;
        }
        let expected = usize_of(u64_of(read.bytes).min(image.bytes - offset));
        let pending = Pending { disk: read.disk, offset, expected };
        self.pending[read.slot.0] = pending;
        Some((file, pending))
    }

    fn failure(&self, disk: DiskId, offset: u64, source: io::Error) -> DiskError {
        let errno = Errno::from_io_error(&source).unwrap_or(Errno::IO);
        let path = &self.images[usize::from(disk.0)].path;
        DiskError::Os { doing: format!("reading {path} at byte {offset}"), remedy: remedy(errno), source }
    }

    fn completion(&self, done: Done) -> Completion {
        let Pending { disk, offset, expected } = self.pending[done.slot];
        let number = usize::from(disk.0);
        if self.images[number].access == Access::Dropped {
            let length = std::num::NonZeroU64::new(u64_of(expected));
            // Only advice: what stays cached now is dropped by a later read or by the kernel.
            let _ = rustix::fs::fadvise(&self.files[number].fd, offset, length, Advice::DontNeed);
        }
        let result = match done.result {
            Ok(got) if got < expected => {
                Err(DiskError::Short { disk, end: offset + u64_of(got), wanted: offset + u64_of(expected) })
            }
            Ok(_) => Ok(expected),
            Err(error) => Err(self.failure(disk, offset, error)),
        };
        Completion { slot: Slot(done.slot), result }
    }

    /// Adapts an error of the ring itself.
    fn broken(source: io::Error) -> DiskError {
        DiskError::Os {
            doing: "submitting disk reads".to_owned(),
            remedy: "Look at the kernel log of this host for the cause",
            source,
        }
    }
}

impl Reader for ImageReader {
    fn slots(&self) -> usize {
        self.reads.slots()
    }
    fn read(&mut self, read: Read) -> Result<(), DiskError> {
        let Some((file, pending)) = self.admit(read) else { return Ok(()) };
        self.reads.read(read.slot.0, file, pending.offset, read.bytes, pending.expected).map_err(Self::broken)
    }
    fn read_direct(&mut self, read: Read, pages: &[GuestPage<'_>]) -> Result<(), DiskError> {
        assert_eq!(pages.len() * PAGE_BYTES, read.bytes, "a direct read fills its pages");
        let Some((file, pending)) = self.admit(read) else { return Ok(()) };
        self.reads
            .read_direct(read.slot.0, file, pending.offset, pending.expected, pages)
            .map_err(Self::broken)
    }
    fn complete(&mut self, done: &mut Vec<Completion>, wait: Duration) -> Result<(), DiskError> {
        let wait = if self.refused.is_empty() { wait } else { Duration::ZERO };
        done.append(&mut self.refused);
        let mut ended = std::mem::take(&mut self.ended);
        let result = self.reads.complete(&mut ended, wait);
        done.extend(ended.drain(..).map(|one| self.completion(one)));
        self.ended = ended;
        result.map_err(Self::broken)
    }
    fn staged(&self, slot: Slot) -> &[u8] {
        self.reads.bytes(slot.0)
    }
    fn path(&self) -> String {
        let first = self.images.first().map(|image| image.access);
        let same = self.images.iter().all(|image| Some(image.access) == first);
        let access = match first {
            Some(Access::Direct) if same => "O_DIRECT",
            Some(_) if same => "buffered",
            _ => "O_DIRECT and buffered",
        };
        format!("{access}, {}", self.reads.path())
    }
    fn notes(&self) -> Vec<String> {
        self.reads.notes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Window;
    use crate::units::Sector;
    use std::ptr::NonNull;

    fn pattern(bytes: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        (0..bytes.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(bytes).collect()
    }

    fn disks(path: &Path) -> ImageDisks {
        let spec = DiskSpec { name: "disk0".to_owned(), path: path.to_owned(), role: Role::Own };
        ImageDisks::open_images(&[spec]).unwrap()
    }

    fn collect(reader: &mut ImageReader, count: usize) -> Vec<Completion> {
        let mut done = Vec::new();
        while done.len() < count {
            let before = done.len();
            reader.complete(&mut done, Duration::from_secs(20)).unwrap();
            assert!(done.len() > before, "reads ended");
        }
        done
    }

    /// Reads all of `image` in runs of changing length and compares with `bytes`.
    fn reads_all(disks: &ImageDisks, mut reader: ImageReader, bytes: &[u8]) {
        let alignment = disks.alignment(DiskId(0));
        let (mut at, mut turn) = (0, 0);
        while at < bytes.len() {
            let mut expected = Vec::new();
            for slot in 0..reader.slots() {
                let length = [4096, 65536, READ_BYTES_MAX, 12288][(turn + slot) % 4].max(alignment);
                if at >= bytes.len() {
                    break;
                }
                let read = Read {
                    disk: DiskId(0),
                    sector: Sector::holding(u64_of(at)),
                    bytes: length,
                    slot: Slot(slot),
                };
                reader.read(read).unwrap();
                expected.push(at..(at + length).min(bytes.len()));
                at += length;
            }
            turn += 1;
            for completion in collect(&mut reader, expected.len()) {
                let range = expected[completion.slot.0].clone();
                assert_eq!(completion.result.unwrap(), range.len());
                assert!(reader.staged(completion.slot)[..range.len()] == bytes[range]);
            }
        }
    }

    #[test]
    fn reads_what_stands_on_the_disk_to_its_odd_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = pattern(9 * READ_BYTES_MAX + 700);
        std::fs::write(&path, &bytes).unwrap();
        let disks = disks(&path);
        disks.flush().unwrap();
        let ring = disks.image_reader(5).unwrap();
        eprintln!("{} {:?}", ring.path(), ring.notes());
        reads_all(&disks, ring, &bytes);
        reads_all(&disks, disks.thread_reader(5).unwrap(), &bytes);
    }

    #[test]
    fn bad_reads_end_with_a_sentence_and_good_ones_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = pattern(64 * 4096);
        std::fs::write(&path, &bytes).unwrap();
        let disks = disks(&path);
        // Shrinks behind our back.
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(32 * 4096).unwrap();
        for mut reader in [disks.image_reader(5).unwrap(), disks.thread_reader(5).unwrap()] {
            let read = |slot, sector, bytes| Read {
                disk: DiskId(0),
                sector: Sector(sector),
                bytes,
                slot: Slot(slot),
            };
            reader.read(read(0, 0, 4096)).unwrap();
            reader.read(read(1, 31 * 8, 8192)).unwrap();
            reader.read(read(2, 40 * 8, 4096)).unwrap();
            reader.read(read(3, u64::MAX / 8, 4096)).unwrap();
            reader.read(read(4, 8, 100)).unwrap();
            let mut done = collect(&mut reader, 5);
            done.sort_by_key(|completion| completion.slot.0);
            assert_eq!(*done[0].result.as_ref().unwrap(), 4096);
            assert!(reader.staged(Slot(0))[..4096] == bytes[..4096]);
            let end = |slot: usize| match &done[slot].result {
                Err(DiskError::Short { end, .. }) => *end,
                other => panic!("{other:?}"),
            };
            assert_eq!(end(1), 32 * 4096);
            assert_eq!(end(2), 40 * 4096);
            assert_eq!(end(3), 64 * 4096);
            let why = done[4].result.as_ref().unwrap_err().to_string();
            assert!(why.contains("reading") && why.contains("image at byte 4096"), "{why}");
            // The slots are free again.
            reader.read(read(1, 8, 4096)).unwrap();
            assert_eq!(collect(&mut reader, 1).len(), 1);
            assert!(reader.staged(Slot(1))[..4096] == bytes[4096..8192]);
        }
    }

    #[test]
    fn reads_into_scattered_guest_pages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = pattern(8 * 4096);
        std::fs::write(&path, &bytes).unwrap();
        let disks = disks(&path);
        for mut reader in [disks.image_reader(2).unwrap(), disks.thread_reader(2).unwrap()] {
            let mut memory = vec![PageBuf::zeroed(); 8];
            let order = [3_usize, 4, 5, 0, 7];
            let mut window = Window::with_capacity(order.len());
            for page in order {
                crate::memory::push_for_test(&mut window, NonNull::from(&mut memory[page]).cast());
            }
            let pages: Vec<GuestPage<'_>> = (0..order.len()).map(|n| window.page(n).unwrap()).collect();
            let read = Read { disk: DiskId(0), sector: Sector(16), bytes: order.len() * 4096, slot: Slot(1) };
            reader.read_direct(read, &pages).unwrap();
            let done = collect(&mut reader, 1);
            assert_eq!(*done[0].result.as_ref().unwrap(), order.len() * 4096);
            for (number, page) in order.into_iter().enumerate() {
                assert!(memory[page].0[..] == bytes[(2 + number) * 4096..][..4096], "page {page}");
            }
            assert!(memory[1] == PageBuf::zeroed() && memory[6] == PageBuf::zeroed());
        }
    }

    #[test]
    fn a_file_system_without_o_direct_is_read_through_the_cache_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mount =
            std::process::Command::new("mount").args(["-t", "ramfs", "none"]).arg(dir.path()).status();
        if !mount.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: mounting a ramfs, which refuses O_DIRECT, needs root");
            return;
        }
        let path = dir.path().join("image");
        let bytes = pattern(3 * READ_BYTES_MAX + 700);
        std::fs::write(&path, &bytes).unwrap();
        let run = std::panic::catch_unwind(|| {
            let disks = disks(&path);
            assert!(disks.notes()[0].contains("refuses O_DIRECT"), "{:?}", disks.notes());
            let reader = disks.image_reader(4).unwrap();
            assert!(reader.path().starts_with("buffered"));
            reads_all(&disks, reader, &bytes);
        });
        assert!(std::process::Command::new("umount").arg("-l").arg(dir.path()).status().unwrap().success());
        run.unwrap();
    }

    #[test]
    fn a_reader_moves_to_its_owner_and_may_be_dropped_with_reads_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let bytes = pattern(8 * READ_BYTES_MAX);
        std::fs::write(&path, &bytes).unwrap();
        let disks = disks(&path);
        for mut reader in [disks.image_reader(8).unwrap(), disks.thread_reader(8).unwrap()] {
            let owner = std::thread::spawn(move || {
                let read = |slot: usize| Read {
                    disk: DiskId(0),
                    sector: Sector::holding(u64_of(slot * READ_BYTES_MAX)),
                    bytes: READ_BYTES_MAX,
                    slot: Slot(slot),
                };
                reader.read(read(1)).unwrap();
                collect(&mut reader, 1);
                for slot in 0..8 {
                    reader.read(read(slot)).unwrap();
                }
                reader.complete(&mut Vec::new(), Duration::ZERO).unwrap();
            });
            owner.join().unwrap();
        }
    }

    #[test]
    #[should_panic(expected = "has a read under way")]
    fn bytes_of_a_slot_under_way_are_not_to_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, pattern(8 * 4096)).unwrap();
        let mut reader = disks(&path).image_reader(2).unwrap();
        reader.read(Read { disk: DiskId(0), sector: Sector(0), bytes: 4096, slot: Slot(0) }).unwrap();
        let _ = reader.staged(Slot(0));
    }

    #[test]
    fn nothing_and_a_fifo_are_no_disks() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, []).unwrap();
        let open = |path: &Path| {
            let spec = DiskSpec { name: "disk0".to_owned(), path: path.to_owned(), role: Role::ReadOnly };
            ImageDisks::open(&[spec]).err().unwrap().to_string()
        };
        assert!(open(&empty).contains("it is 0 bytes long"));
        let fifo = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(open(&fifo).contains("neither a file nor a block device"));
        assert!(open(Path::new("/dev/null")).contains("neither a file nor a block device"));
    }
}
