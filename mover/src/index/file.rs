//! The index file: a table as it is mapped again, with everything needed to refuse one that is not whole.
//!
//! ```text
//!     byte 0      header, one page: magic, version, sizes, whose disk, sum of `sums`, sum of itself
//!     4096        regions: 24 bytes each (first sector, end sector, stride)         \
//!     ...         directory: u32 for each chunk of 4096 units, 0 = not stored,        |  each section begins at a
//!                 else 1 + its number among the stored chunks                         |  multiple of 4096; `sums` has
//!     ...         forward table: u64 words in buckets of 8                            |  an XXH3-64 for each MiB from
//!     ...         stored chunks of the reverse table: 16 KiB each                    /   byte 4096 to its own start
//!     ...         sums
//! ```
//!
//! All numbers are little-endian. `version` counts formats: a reader names the versions it knows and refuses others; a
//! new one is given when the meaning of any byte changes. Words are laid out as [`super::table`] draws them.
//!
//! A file is never changed: a new one is written beside it, flushed, and renamed over it, so a crash at any instant
//! leaves the old one or the new one. It is mapped privately: what a migration learns and forgets stays in memory.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek, SeekFrom, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{Layout, REGIONS_MAX, Region};
use super::table::{BUCKET_WORDS, CHUNK_UNITS, CHUNK_WORDS, MappedParts, Table};
use crate::error::DiskError;
use crate::memory::Mapping;
use crate::units::{PAGE_BYTES, PAGE_BYTES_U64, u64_of, usize_of};

const _: () = assert!(cfg!(target_endian = "little"), "an index file's words are mapped as they are");

const MAGIC: [u8; 8] = *b"\x8fPFIDX\r\n";
/// The format written and read.
pub const VERSION: u32 = 1;
/// Bytes of the file under one sum.
const SUM_BYTES: usize = 1 << 20;
const KEY_BYTES: usize = 256;
const PATH_BYTES: usize = 1024;
const REST_BYTES: usize = PAGE_BYTES - 8 - 2 * 4 - 13 * 8 - KEY_BYTES - PATH_BYTES - 8;

/// The first page of an index file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    regions: U32,
    file_bytes: U64,
    chunks: U64,
    stored_chunks: U64,
    forward_words: U64,
    entries: U64,
    disk_bytes: U64,
    built_unix_ms: U64,
    image_mtime_ns: U64,
    blocks: U64,
    zero_blocks: U64,
    repeated_blocks: U64,
    hole_bytes: U64,
    sums_sum: U64,
    key: [u8; KEY_BYTES],
    path: [u8; PATH_BYTES],
    rest: [u8; REST_BYTES],
    sum: U64,
}

const _: () = assert!(size_of::<Header>() == PAGE_BYTES);

/// What an index file says about itself, besides its table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    /// The disk it is of ([`crate::disk::identity::local_key`]).
    pub key: String,
    /// Where the disk was, for people.
    pub path: String,
    /// The disk's size when it was scanned.
    pub disk_bytes: u64,
    /// When it was scanned, in milliseconds since 1970.
    pub built_unix_ms: u64,
    /// The image's time of last change when the scan began, in nanoseconds since 1970; 0 for a block device.
    pub image_mtime_ns: u64,
    /// Blocks looked at.
    pub blocks: u64,
    /// Of these, all zero.
    pub zero_blocks: u64,
    /// Of these, left out because their content stands at enough other places.
    pub repeated_blocks: u64,
    /// Bytes of holes, which were not looked at.
    pub hole_bytes: u64,
}

/// Where the index of the disk with this key is kept.
#[must_use]
pub fn path_in(directory: &Path, key: &str) -> PathBuf {
    let name = blake3::hash(key.as_bytes()).to_hex();
    directory.join(format!("{}.pfindex", &name[..24]))
}

fn bad(path: &Path, why: impl Into<String>, remedy: &'static str) -> DiskError {
    DiskError::Index { path: path.display().to_string(), why: why.into(), remedy }
}

const REBUILD: &str = "Build it again with `pageferry index build`";

fn write_failed(path: &Path, error: &io::Error) -> DiskError {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "Free some space there, or choose another state directory"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "Choose a state directory that this user can write"
        }
        _ => "Look at the kernel log of this host for the cause",
    };
    bad(path, format!("it can't be written: {error}"), remedy)
}

/// Writes `table` to `path` instead of what stands there. Returns the file's length.
pub fn write(path: &Path, table: &Table, meta: &Meta) -> Result<u64, DiskError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(|error| write_failed(path, &error))?;
    clear_leftovers(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.tmp-{}", std::process::id()));
    let replace = || {
        // Digests of a disk's content say something about it: for its owner only.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let bytes = write_to(&file, table, meta)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()?;
        Ok(bytes)
    };
    replace().map_err(|error| {
        // Best effort: the error that counts is the one that led here.
        let _ = std::fs::remove_file(&temporary);
        write_failed(path, &error)
    })
}

/// Removes what processes that were killed while they wrote this index left behind.
fn clear_leftovers(path: &Path) {
    let prefix = format!(".{}.tmp-", path.file_name().unwrap_or_default().to_string_lossy());
    let entries = path.parent().and_then(|directory| std::fs::read_dir(directory).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = name.strip_prefix(&prefix)
            && !Path::new("/proc").join(pid).exists()
        {
            // Whoever else removes it at the same time is welcome to.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Buffers, sums and writes what follows the header.
struct Out<'f> {
    file: &'f File,
    buffer: Vec<u8>,
    sums: Vec<u64>,
    at: u64,
}

impl Out<'_> {
    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(SUM_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == SUM_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.sums.push(twox_hash::XxHash3_64::oneshot(&self.buffer));
            self.file.write_all(&self.buffer)?;
            self.at += u64_of(self.buffer.len());
            self.buffer.clear();
        }
        Ok(())
    }
    /// Fills up to the next section.
    fn pad(&mut self) -> io::Result<()> {
        let at = usize_of(self.at) + self.buffer.len();
        self.put(&[0; PAGE_BYTES][..at.next_multiple_of(PAGE_BYTES) - at])
    }
}

fn write_to(mut file: &File, table: &Table, meta: &Meta) -> io::Result<u64> {
    file.write_all(&[0; PAGE_BYTES])?;
    let mut out = Out { file, buffer: Vec::with_capacity(SUM_BYTES), sums: Vec::new(), at: PAGE_BYTES_U64 };
    for region in table.layout().regions() {
        for number in [region.start, region.end, region.stride] {
            out.put(&number.to_le_bytes())?;
        }
    }
    out.pad()?;
    let (mut chunks, mut stored) = (0_u64, 0_u32);
    for chunk in table.chunk_words() {
        chunks += 1;
        stored += u32::from(chunk.is_some());
        out.put(&if chunk.is_some() { stored } else { 0 }.to_le_bytes())?;
    }
    out.pad()?;
    let mut forward_words = 0;
    for word in table.forward_words() {
        out.put(&word.to_le_bytes())?;
        forward_words += 1;
    }
    out.pad()?;
    for word in table.chunk_words().flatten().flatten() {
        out.put(&word.load(std::sync::atomic::Ordering::Relaxed).to_le_bytes())?;
    }
    out.flush()?;
    let sums: Vec<u8> = out.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    let file_bytes = out.at + u64_of(sums.len().next_multiple_of(PAGE_BYTES));
    file.write_all(&sums)?;
    file.set_len(file_bytes)?;
    let mut header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        regions: u32::try_from(table.layout().regions().len()).unwrap_or(u32::MAX).into(),
        file_bytes: file_bytes.into(),
        chunks: chunks.into(),
        stored_chunks: u64::from(stored).into(),
        forward_words: U64::new(forward_words),
        entries: table.entries().into(),
        disk_bytes: meta.disk_bytes.into(),
        built_unix_ms: meta.built_unix_ms.into(),
        image_mtime_ns: meta.image_mtime_ns.into(),
        blocks: meta.blocks.into(),
        zero_blocks: meta.zero_blocks.into(),
        repeated_blocks: meta.repeated_blocks.into(),
        hole_bytes: meta.hole_bytes.into(),
        sums_sum: twox_hash::XxHash3_64::oneshot(&sums).into(),
        key: text(&meta.key),
        path: text(&meta.path),
        rest: [0; REST_BYTES],
        sum: U64::ZERO,
    };
    header.sum = header_sum(&header).into();
    file.seek(SeekFrom::Start(0))?;
    file.write_all(header.as_bytes())?;
    Ok(file_bytes)
}

fn header_sum(header: &Header) -> u64 {
    twox_hash::XxHash3_64::oneshot(&header.as_bytes()[..PAGE_BYTES - 8])
}

/// `text` cut to a field's length.
fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let cut = (0..=text.len().min(N)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    field[..cut].copy_from_slice(&text.as_bytes()[..cut]);
    field
}

fn untext(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// Where the sections are.
struct Sections {
    regions: usize,
    directory: usize,
    forward: usize,
    chunks: usize,
    sums: usize,
    end: usize,
}

impl Sections {
    /// From a header whose sum is right; `None` if its numbers are no file's.
    fn of(header: &Header) -> Option<Self> {
        let section = |start: u64, count: u64, bytes: u64| {
            count.checked_mul(bytes)?.checked_add(start)?.checked_next_multiple_of(PAGE_BYTES_U64)
        };
        let regions = PAGE_BYTES_U64;
        let directory = section(regions, u64::from(header.regions.get()), 24)?;
        let forward = section(directory, header.chunks.get(), 4)?;
        let chunks = section(forward, header.forward_words.get(), 8)?;
        let sums = section(chunks, header.stored_chunks.get(), u64_of(CHUNK_WORDS) * 8)?;
        let end = section(sums, (sums - PAGE_BYTES_U64).div_ceil(u64_of(SUM_BYTES)), 8)?;
        let whole = header.forward_words.get() > 0
            && header.forward_words.get().is_multiple_of(u64_of(BUCKET_WORDS))
            && usize_of(header.regions.get().into()) <= REGIONS_MAX
            && end == header.file_bytes.get();
        let at = usize_of;
        whole.then_some(Self {
            regions: at(regions),
            directory: at(directory),
            forward: at(forward),
            chunks: at(chunks),
            sums: at(sums),
            end: at(end),
        })
    }
}

/// Opens the index at `path`, `None` if there is none. One that is not whole, of another version, or of another disk
/// than that with `key`, is refused.
pub fn open(path: &Path, key: &str) -> Result<Option<(Table, Meta)>, DiskError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(path, &error)),
    };
    let header = read_header(path, &mut file)?;
    let meta = meta_of(&header);
    if meta.key != key {
        let why = format!("it is of another disk (of {}, {})", meta.path, meta.key);
        return Err(bad(path, why, REBUILD));
    }
    let Some(sections) = Sections::of(&header) else {
        return Err(bad(path, "its sections do not fit its length", REBUILD));
    };
    let (regions, directory) = read_sections(path, &mut file, &header, &sections)?;
    let layout = layout_of(&regions, &header).map_err(|why| bad(path, why, REBUILD))?;
    let chunks = chunks_of(&directory, &header, &sections, &layout)
        .ok_or_else(|| bad(path, "its directory names chunks it does not have", REBUILD))?;
    let map = Mapping::private(file.as_fd(), sections.sums).map_err(|error| {
        bad(path, format!("it can't be mapped: {error}"), "Free some memory or raise `ulimit -v`")
    })?;
    let words = usize_of(header.forward_words.get());
    let parts = MappedParts {
        layout,
        forward: sections.forward / 8..sections.forward / 8 + words,
        chunks,
        entries: header.entries.get(),
    };
    Ok(Some((Table::mapped(Arc::new(map), parts), meta)))
}

fn unreadable(path: &Path, error: &io::Error) -> DiskError {
    bad(path, format!("it can't be read: {error}"), "Make it readable to this user, or build it again")
}

fn read_header(path: &Path, file: &mut File) -> Result<Header, DiskError> {
    let mut page = [0; PAGE_BYTES];
    let length = file.metadata().map_err(|error| unreadable(path, &error))?.len();
    if length < PAGE_BYTES_U64 {
        return Err(bad(path, format!("it is cut off: {length} bytes are less than its header"), REBUILD));
    }
    file.read_exact(&mut page).map_err(|error| unreadable(path, &error))?;
    let Ok(header) = Header::read_from_bytes(&page) else {
        return Err(bad(path, "its header can't be read", REBUILD));
    };
    if header.magic != MAGIC {
        return Err(bad(path, "it is no index file", REBUILD));
    }
    if header.version.get() != VERSION {
        let why = format!("it has format version {}, this pageferry knows {VERSION}", header.version.get());
        return Err(bad(path, why, "Build it again with `pageferry index build`, or update pageferry"));
    }
    if header.sum.get() != header_sum(&header) {
        return Err(bad(path, "its header is damaged", REBUILD));
    }
    if header.file_bytes.get() != length {
        let why = format!("it is cut off: {length} of {} bytes", header.file_bytes.get());
        return Err(bad(path, why, REBUILD));
    }
    Ok(header)
}

/// Reads and checks everything between the header and the end once; keeps the regions and the directory.
fn read_sections(
    path: &Path,
    file: &mut File,
    header: &Header,
    sections: &Sections,
) -> Result<(Vec<u8>, Vec<u8>), DiskError> {
    let mut go = |at: usize, bytes: usize| {
        let mut buffer = vec![0; bytes];
        file.seek(SeekFrom::Start(u64_of(at)))?;
        file.read_exact(&mut buffer)?;
        Ok(buffer)
    };
    let mut get =
        |at: usize, bytes: usize| go(at, bytes).map_err(|error: io::Error| unreadable(path, &error));
    let count = (sections.sums - PAGE_BYTES).div_ceil(SUM_BYTES);
    let sums = get(sections.sums, sections.end - sections.sums)?;
    if twox_hash::XxHash3_64::oneshot(&sums[..count * 8]) != header.sums_sum.get() {
        return Err(bad(path, "its check sums are damaged", REBUILD));
    }
    for (number, sum) in sums.chunks_exact(8).take(count).enumerate() {
        let at = PAGE_BYTES + number * SUM_BYTES;
        let piece = get(at, SUM_BYTES.min(sections.sums - at))?;
        if twox_hash::XxHash3_64::oneshot(&piece).to_le_bytes() != *sum {
            return Err(bad(path, format!("it is damaged in the MiB after byte {at}"), REBUILD));
        }
    }
    let regions = get(sections.regions, sections.directory - sections.regions)?;
    let directory = get(sections.directory, sections.forward - sections.directory)?;
    Ok((regions, directory))
}

fn layout_of(bytes: &[u8], header: &Header) -> Result<Layout, &'static str> {
    let count = usize_of(header.regions.get().into());
    let regions = bytes.chunks_exact(24).take(count).map(|region| {
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&region[at * 8..at * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        Region { start: number(0), end: number(1), stride: number(2) }
    });
    Layout::new(regions.collect())
}

/// The words of each chunk in the mapping.
fn chunks_of(
    directory: &[u8],
    header: &Header,
    sections: &Sections,
    layout: &Layout,
) -> Option<Vec<Option<std::ops::Range<usize>>>> {
    if header.chunks.get() != layout.units().div_ceil(CHUNK_UNITS) {
        return None;
    }
    let entries = directory.chunks_exact(4).take(usize_of(header.chunks.get()));
    let words = entries.map(|entry| {
        let number = u64::from(u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]));
        if number > header.stored_chunks.get() {
            return None;
        }
        let start = number.checked_sub(1).map(|number| sections.chunks / 8 + usize_of(number) * CHUNK_WORDS);
        Some(start.map(|start| start..start + CHUNK_WORDS))
    });
    words.collect()
}

fn meta_of(header: &Header) -> Meta {
    Meta {
        key: untext(&header.key),
        path: untext(&header.path),
        disk_bytes: header.disk_bytes.get(),
        built_unix_ms: header.built_unix_ms.get(),
        image_mtime_ns: header.image_mtime_ns.get(),
        blocks: header.blocks.get(),
        zero_blocks: header.zero_blocks.get(),
        repeated_blocks: header.repeated_blocks.get(),
        hole_bytes: header.hole_bytes.get(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Sector;
    use proptest::prelude::*;
    use std::process::{Command, Stdio};

    fn hint(unit: u64) -> u64 {
        unit.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn table(units: u64, step: usize) -> Table {
        let region = |start, end, stride| Region { start, end, stride };
        let layout = Layout::new(vec![region(0, 63, 8), region(63, 63 + units * 8, 8)]).unwrap();
        let table = Table::new(layout, units);
        for unit in (0..units).step_by(step) {
            table.learn(unit, hint(unit));
        }
        table
    }

    fn meta() -> Meta {
        Meta {
            key: "file 1 2 3".to_owned(),
            path: "/images/gölden.img".to_owned(),
            disk_bytes: 1 << 40,
            built_unix_ms: 1,
            image_mtime_ns: 2,
            blocks: 3,
            zero_blocks: 4,
            repeated_blocks: 5,
            hole_bytes: 6,
        }
    }

    fn refused(path: &Path) -> String {
        open(path, "file 1 2 3").unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_is_found_again_and_changes_stay_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(&dir.path().join("new/state"), "file 1 2 3");
        assert!(open(&path, "file 1 2 3").unwrap().is_none());
        let one = table(20_000, 3);
        let bytes = write(&path, &one, &meta()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
        let before = std::fs::read(&path).unwrap();
        let (mut found, its_meta) = open(&path, "file 1 2 3").unwrap().unwrap();
        assert_eq!(its_meta, meta());
        assert_eq!(found.layout(), one.layout());
        assert_eq!(found.entries(), one.entries());
        for unit in 0..20_000 {
            assert_eq!(found.find(hint(unit), None), one.find(hint(unit), None), "{unit}");
        }
        assert!(found.forget(3) && !found.forget(4));
        found.learn(4, hint(4));
        found.learn(8, 99 << 40 | 99);
        found.grow(30_000);
        assert_eq!(found.find(hint(3), None), None);
        assert_eq!(found.find(hint(4), None), found.layout().sector(4));
        assert_eq!(std::fs::read(&path).unwrap(), before);
        write(&path, &found, &meta()).unwrap();
        let (again, _) = open(&path, "file 1 2 3").unwrap().unwrap();
        assert!(again.known_units().eq(found.known_units()));
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }

    #[test]
    fn holes_of_the_disk_take_no_room_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let table = Table::new(Layout::plain(1 << 40), 0);
        table.learn(1 << 27, 5);
        assert!(write(&path, &table, &meta()).unwrap() < 1 << 20);
        let (found, _) = open(&path, "file 1 2 3").unwrap().unwrap();
        assert_eq!(found.find(5, None), Some(Sector(1 << 30)));
    }

    #[test]
    fn a_file_that_is_not_whole_is_refused_with_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        write(&path, &table(9000, 1), &meta()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            refused(&path)
        };
        for length in [0, 100, 4095, 4096, 10_000, whole.len() - 1] {
            let why = with(&|bytes| bytes.truncate(length));
            assert!(why.contains("cut off") && why.contains("index build"), "{why}");
        }
        assert!(with(&|bytes| bytes.push(0)).contains("cut off"));
        assert!(with(&|bytes| bytes[0] ^= 1).contains("no index file"));
        let why = with(&|bytes| bytes[8] = 2);
        assert!(why.contains("format version 2, this pageferry knows 1"), "{why}");
        assert!(with(&|bytes| bytes[200] ^= 4).contains("its header is damaged"));
        assert!(with(&|bytes| bytes[5000] ^= 4).contains("damaged in the MiB after byte 4096"));
        let sums = whole.len() - 4096;
        assert!(with(&|bytes| bytes[sums] ^= 4).contains("check sums are damaged"));
        std::fs::write(&path, &whole).unwrap();
        let why = open(&path, "file 9 9 9").unwrap_err().to_string();
        assert!(why.contains("another disk (of /images/gölden.img"), "{why}");
    }

    #[test]
    fn a_directory_that_can_not_be_written_is_named() {
        let why = write(Path::new("/proc/pageferry/index"), &table(10, 1), &meta()).unwrap_err().to_string();
        assert!(why.contains("/proc/pageferry/index") && why.contains("can't be written"), "{why}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn any_flipped_bit_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index");
            write(&path, &table(2000, 2), &meta()).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            // The last page holds one sum; the rest of it is padding.
            let length = bytes.len() - 4096 + 8;
            bytes[at.index(length)] ^= 1_u8 << bit;
            std::fs::write(&path, bytes).unwrap();
            prop_assert!(open(&path, "file 1 2 3").is_err());
        }
    }

    /// Not a test by itself: writes indexes until it is killed.
    #[test]
    fn writes_until_killed() {
        let Ok(path) = std::env::var("PAGEFERRY_TEST_INDEX") else { return };
        let tables = [table(50_000, 1), table(50_000, 2)];
        println!("writing");
        for turn in 0.. {
            write(Path::new(&path), &tables[turn % 2], &meta()).unwrap();
        }
    }

    #[test]
    fn killing_the_writer_leaves_a_whole_index() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        write(&path, &table(50_000, 1), &meta()).unwrap();
        let mut leftovers = 0;
        for wait in [3, 7, 12, 20, 31] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "index::file::tests::writes_until_killed", "--nocapture"])
                .env("PAGEFERRY_TEST_INDEX", &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut seen = Vec::new();
            let mut out = child.stdout.take().unwrap();
            while !seen.ends_with(b"writing\n") {
                let mut byte = [0];
                out.read_exact(&mut byte).unwrap();
                seen.push(byte[0]);
            }
            std::thread::sleep(std::time::Duration::from_millis(wait));
            child.kill().unwrap();
            child.wait().unwrap();
            let (found, _) = open(&path, "file 1 2 3").unwrap().unwrap();
            assert!(matches!(found.entries(), 50_000 | 25_000), "{}", found.entries());
            leftovers += std::fs::read_dir(dir.path()).unwrap().count() - 1;
        }
        write(&path, &table(10, 1), &meta()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{leftovers} leftovers are cleared");
    }
}
