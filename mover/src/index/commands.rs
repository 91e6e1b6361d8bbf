//! What `pageferry index` does, and what a migration does to get its tables: functions over image files, a state
//! directory and the modules beside this one. Control path; sleeps to keep to a rate.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::file::{self, Meta};
use super::layout::Layout;
use super::scan::{self, Counts, Source};
use super::set::Tables;
use super::table::Table;
use crate::bitmap::Bitmap;
use crate::disk::image::{DiskSpec, ImageDisks, ImageReader, Role};
use crate::disk::{Completion, Disks, Read, Reader, Slot, partition};
use crate::error::DiskError;
use crate::fingerprint;
use crate::limits::READ_BYTES_MAX;
use crate::units::{DiskId, PAGE_BYTES, PAGE_BYTES_U64, Sector, f64_of, u64_of, u64_of_f64, usize_of};

/// Reads under way while scanning: enough to keep a disk busy while a core looks at what came.
const DEPTH: usize = 4;
/// The one disk of these commands.
const DISK: DiskId = DiskId(0);
/// Entries compared with the disk unless all are.
const SAMPLE: usize = 4096;
/// Entries compared before a migration trusts an index, and how many of them must be right.
const TRUST_SAMPLE: usize = 64;

/// Called now and then with the bytes read so far and the bytes to read; stops the scan by returning false.
pub type Progress<'p> = dyn FnMut(u64, u64) -> bool + 'p;

/// Where indexes are kept unless the user says otherwise: under `/var/lib` for root, else in the user's state
/// directory (XDG base directories).
#[must_use]
pub fn default_state_directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/pageferry/index");
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = variable("XDG_STATE_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/state")));
    state.unwrap_or_else(|| PathBuf::from("/tmp")).join("pageferry/index")
}

/// What `build` and `update` did.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Built {
    /// The index file.
    pub index: String,
    /// Its length in bytes.
    pub index_bytes: u64,
    /// The disk's size in bytes.
    pub disk_bytes: u64,
    /// "built", "updated", "unchanged", or "stopped": then the old index, if any, stays.
    pub outcome: &'static str,
    /// Why a whole scan was needed where less was asked for.
    pub reason: Option<String>,
    /// Entries that can be found.
    pub entries: u64,
    /// Bytes of holes, which were not read.
    pub hole_bytes: u64,
    /// What the scan met.
    pub counts: Counts,
    /// Time it took.
    pub seconds: f64,
}

/// What `stat` tells.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Stat {
    /// The index file.
    pub index: String,
    /// Its length in bytes.
    pub index_bytes: u64,
    /// Where the disk was when it was scanned.
    pub image: String,
    /// The disk's size now.
    pub disk_bytes: u64,
    /// The disk's size when it was scanned.
    pub scanned_disk_bytes: u64,
    /// Since the scan.
    pub age_seconds: f64,
    /// Whether the file was changed since; `None` for a block device, which does not tell.
    pub image_changed: Option<bool>,
    /// Entries that can be found.
    pub entries: u64,
    /// Entries for which there is room.
    pub room: u64,
    /// Bytes of content that can be found.
    pub findable_bytes: u64,
    /// Share of the disk in holes.
    pub hole_share: f64,
    /// Share of the blocks looked at that were zero.
    pub zero_share: f64,
    /// Share of the blocks looked at whose content stands at enough other places.
    pub repeated_share: f64,
    /// Regions with a phase or stride of their own: sector, end, stride.
    pub regions: Vec<super::layout::Region>,
}

/// What `verify` found.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Verified {
    /// The index file, whose own sums are right.
    pub index: String,
    /// Entries compared with the disk.
    pub checked: u64,
    /// Of these, right.
    pub right: u64,
    /// Of these, stale: the block holds something else now.
    pub stale: u64,
}

/// An open image and its reader.
struct Image {
    disks: ImageDisks,
    reader: ImageReader,
    source: Source,
    bytes: u64,
    key: String,
    index: PathBuf,
}

impl Image {
    fn open(path: &Path, state: &Path) -> Result<Self, DiskError> {
        let spec = DiskSpec { name: "disk".to_owned(), path: path.to_owned(), role: Role::Own };
        let disks = ImageDisks::open_unidentified(&[spec])?;
        // What is written and not flushed may lie in what is told to be a hole.
        disks.flush()?;
        let key = disks.local_key(DISK)?;
        Ok(Self {
            reader: disks.image_reader(DEPTH)?,
            source: Source { disk: DISK, alignment: disks.alignment(DISK) },
            bytes: disks.infos()[0].bytes,
            index: file::path_in(state, &key),
            key,
            disks,
        })
    }

    fn layout(&mut self) -> Result<Layout, DiskError> {
        layout(&mut self.reader, self.source, self.bytes)
    }

    /// Scans `runs` into `table` and writes the index.
    fn scan_and_write(
        &mut self,
        mut table: Table,
        runs: &[Range<u64>],
        old: Option<&Meta>,
        options: &mut Options<'_>,
    ) -> Result<Built, DiskError> {
        let began = Instant::now();
        let changed_ns = self.disks.changed_unix_ns(DISK);
        let total = runs.iter().map(|run| (run.end - run.start) * PAGE_BYTES_U64).sum();
        let (mut done, mut stopped) = (0, false);
        let mut pace = |bytes: u64| {
            done += bytes;
            stopped |= !(options.progress)(done, total);
            hold_back(began, done, options.bytes_per_second);
            !stopped
        };
        let counts = scan::scan(&mut self.reader, self.source, &mut table, runs, &mut pace)?;
        let data: u64 = self.disks.data_ranges(DISK).iter().map(|range| range.end - range.start).sum();
        let hole_bytes = self.bytes - data.min(self.bytes);
        let mut built = Built {
            index: self.index.display().to_string(),
            index_bytes: 0,
            disk_bytes: self.bytes,
            outcome: "stopped",
            reason: None,
            entries: table.entries(),
            hole_bytes,
            counts,
            seconds: 0.0,
        };
        if !stopped {
            // Room for what a guest writes until the next scan.
            table.shrink(table.entries() / 8 + 1024);
            let before = old.cloned().unwrap_or_default();
            let meta = Meta {
                key: self.key.clone(),
                path: self.disks.path(DISK).to_owned(),
                disk_bytes: self.bytes,
                built_unix_ms: unix_ms(),
                image_mtime_ns: changed_ns,
                blocks: before.blocks.max(counts.blocks),
                zero_blocks: before.zero_blocks.max(counts.zero),
                repeated_blocks: before.repeated_blocks.max(counts.repeated),
                hole_bytes,
            };
            built.index_bytes = file::write(&self.index, &table, &meta)?;
            built.entries = table.entries();
            built.outcome = if old.is_some() { "updated" } else { "built" };
        }
        built.seconds = began.elapsed().as_secs_f64();
        Ok(built)
    }

    fn build(&mut self, options: &mut Options<'_>) -> Result<Built, DiskError> {
        let data = self.disks.data_ranges(DISK);
        let table = Table::new(self.layout()?, 0);
        let runs = scan::units_over(&table, &data);
        self.scan_and_write(table, &runs, None, options)
    }
}

/// How `build` and `update` go about it.
pub struct Options<'p> {
    /// Bytes a second to read at most.
    pub bytes_per_second: Option<u64>,
    /// Told how far it is.
    pub progress: &'p mut Progress<'p>,
}

fn hold_back(began: Instant, bytes: u64, bytes_per_second: Option<u64>) {
    let Some(rate) = bytes_per_second.filter(|rate| *rate > 0) else { return };
    let due = Duration::from_secs_f64(f64_of(bytes) / f64_of(rate));
    std::thread::sleep(due.saturating_sub(began.elapsed()));
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64_of_f64(since.as_secs_f64() * 1000.0)
}

/// The regions of a disk of `bytes` bytes, read through `reader`.
pub fn layout(reader: &mut dyn Reader, source: Source, bytes: u64) -> Result<Layout, DiskError> {
    partition::layout(bytes, &mut |offset, length| read_at(reader, source, bytes, offset, length))
}

/// Up to `length` bytes at `offset`; fewer where the disk of `bytes` ends, or past what one read holds.
fn read_at(
    reader: &mut dyn Reader,
    source: Source,
    bytes: u64,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, DiskError> {
    let unit = u64_of(source.alignment);
    let end = offset.saturating_add(u64_of(length)).min(bytes);
    if offset >= end {
        return Ok(Vec::new());
    }
    let start = offset / unit * unit;
    let whole = (end.next_multiple_of(unit) - start).min(u64_of(READ_BYTES_MAX));
    let read =
        Read { disk: source.disk, sector: Sector::holding(start), bytes: usize_of(whole), slot: Slot(0) };
    reader.read(read)?;
    let mut done: Vec<Completion> = Vec::new();
    reader.complete(&mut done, Duration::from_secs(60))?;
    let Some(completion) = done.pop() else {
        return Err(DiskError::Os {
            doing: format!("reading disk {} at byte {offset}", source.disk.0),
            remedy: "Is the storage reachable? Look at the kernel log of this host",
            source: std::io::ErrorKind::TimedOut.into(),
        });
    };
    let got = completion.result?;
    let staged = reader.staged(Slot(0));
    let (from, to) = (usize_of(offset - start), usize_of(end - start).min(got));
    Ok(staged.get(from..to).unwrap_or_default().to_vec())
}

/// Scans the disk at `image` and writes its index into `state`.
pub fn build(image: &Path, state: &Path, options: &mut Options<'_>) -> Result<Built, DiskError> {
    Image::open(image, state)?.build(options)
}

/// What stands on a disk, block by block, told by the blocks' hints; to hold an index and a guest's memory against.
#[derive(Debug)]
pub struct Contents {
    /// By unit; 0 is a block of zeroes or one that was not read.
    blocks: Vec<u64>,
    /// All of them, ascending.
    sorted: Vec<u64>,
    /// The disk's index, if there is one.
    index: Option<Table>,
}

impl Contents {
    /// Reads the disk at `image`, holes left out, past the page cache.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(image: &Path, state: &Path) -> Result<Self, DiskError> {
        let mut image = Image::open(image, state)?;
        let table = Table::new(image.layout()?, 0);
        let mut blocks = vec![0; usize_of(table.layout().units())];
        let mut window: (u64, Vec<u8>) = (0, Vec::new());
        for run in scan::units_over(&table, &image.disks.data_ranges(DISK)) {
            for unit in run {
                let Some(at) = table.layout().sector(unit).map(Sector::bytes) else { continue };
                if at < window.0 || at + PAGE_BYTES_U64 > window.0 + u64_of(window.1.len()) {
                    let length = READ_BYTES_MAX - image.source.alignment;
                    window = (at, read_at(&mut image.reader, image.source, image.bytes, at, length)?);
                }
                let from = usize_of(at - window.0);
                let block = window.1.get(from..from + PAGE_BYTES).map(<&[u8; PAGE_BYTES]>::try_from);
                if let Some(Ok(block)) = block
                    && block.iter().any(|byte| *byte != 0)
                {
                    blocks[usize_of(unit)] = fingerprint::hint(block).max(1);
                }
            }
        }
        let mut sorted: Vec<u64> = blocks.iter().copied().filter(|hint| *hint != 0).collect();
        sorted.sort_unstable();
        let index = file::open(&image.index, &image.key)?.map(|(table, _)| table);
        Ok(Self { blocks, sorted, index })
    }

    /// Whether it stands on the disk.
    #[must_use]
    pub fn has(&self, page: &[u8; PAGE_BYTES]) -> bool {
        self.sorted.binary_search(&fingerprint::hint(page).max(1)).is_ok()
    }

    /// Whether the disk's index leads to a block that holds it; none where the index knows nothing of it.
    #[must_use]
    pub fn index_is_right(&self, page: &[u8; PAGE_BYTES]) -> Option<bool> {
        let (table, hint) = (self.index.as_ref()?, fingerprint::hint(page));
        let sector = table.find(hint, None)?;
        let layout = table.layout();
        let units = layout.touching(sector.0..sector.0 + 1);
        let unit = units.into_iter().flatten().find(|unit| layout.sector(*unit) == Some(sector))?;
        Some(self.blocks.get(usize_of(unit)) == Some(&hint.max(1)))
    }
}

/// How many bytes the disk at `image` has.
pub(super) fn measure(image: &Path, state: &Path) -> Result<u64, DiskError> {
    Ok(Image::open(image, state)?.bytes)
}

/// Brings the index of the disk at `image` up to date. `written` has a bit for each 4 KiB of the disk written since;
/// without it a file whose time of change is the same is left as it is, and everything else is scanned whole.
pub fn update(
    image: &Path,
    state: &Path,
    written: Option<&Bitmap>,
    options: &mut Options<'_>,
) -> Result<Built, DiskError> {
    let mut image = Image::open(image, state)?;
    let whole = |image: &mut Image, reason: String, options: &mut Options<'_>| {
        let mut built = image.build(options)?;
        built.reason = Some(reason);
        Ok(built)
    };
    let (mut table, meta) = match file::open(&image.index, &image.key) {
        Ok(Some(found)) => found,
        Ok(None) => return whole(&mut image, "there was no index yet".to_owned(), options),
        Err(error) => return whole(&mut image, error.to_string(), options),
    };
    let layout = image.layout()?;
    if image.bytes < meta.disk_bytes || !layout.extends(table.layout()) {
        return whole(&mut image, "the disk's size or partitions have changed".to_owned(), options);
    }
    let changed = image.disks.changed_unix_ns(DISK);
    let Some(written) = written else {
        if changed == 0 || changed != meta.image_mtime_ns || image.bytes != meta.disk_bytes {
            let reason = "it is not known which blocks were written since the last scan".to_owned();
            return whole(&mut image, reason, options);
        }
        return Ok(Built {
            index: image.index.display().to_string(),
            index_bytes: std::fs::metadata(&image.index).map_or(0, |stat| stat.len()),
            disk_bytes: image.bytes,
            outcome: "unchanged",
            reason: None,
            entries: table.entries(),
            hole_bytes: meta.hole_bytes,
            counts: Counts::default(),
            seconds: 0.0,
        });
    };
    let known = table.layout().units();
    table.adopt(layout, Sector::holding(image.bytes));
    let pieces = written.iter().map(|piece| u64_of(piece) * PAGE_BYTES_U64);
    let ranges: Vec<Range<u64>> = pieces.map(|at| at..at + PAGE_BYTES_U64).collect();
    let mut runs = scan::units_over(&table, &ranges);
    // What has come to the disk since is read where it holds data.
    let grown = scan::units_over(&table, &image.disks.data_ranges(DISK));
    runs.extend(grown.into_iter().filter(|run| run.end > known).map(|run| run.start.max(known)..run.end));
    image.scan_and_write(table, &runs, Some(&meta), options)
}

/// Opens the index of the disk at `image`; that there is none is an error here.
fn open_index(image: &Image) -> Result<(Table, Meta), DiskError> {
    file::open(&image.index, &image.key)?.ok_or_else(|| DiskError::Index {
        path: image.index.display().to_string(),
        why: format!("there is none of {}", image.disks.path(DISK)),
        remedy: "Build it with `pageferry index build`",
    })
}

/// Tells about the index of the disk at `image`.
pub fn stat(image: &Path, state: &Path) -> Result<Stat, DiskError> {
    let image = Image::open(image, state)?;
    let (table, meta) = open_index(&image)?;
    let changed = image.disks.changed_unix_ns(DISK);
    let share = |part: u64, of: u64| if of == 0 { 0.0 } else { f64_of(part) / f64_of(of) };
    Ok(Stat {
        index: image.index.display().to_string(),
        index_bytes: std::fs::metadata(&image.index).map_or(0, |stat| stat.len()),
        image: meta.path,
        disk_bytes: image.bytes,
        scanned_disk_bytes: meta.disk_bytes,
        age_seconds: f64_of(unix_ms().saturating_sub(meta.built_unix_ms)) / 1000.0,
        image_changed: (changed != 0).then_some(changed != meta.image_mtime_ns),
        entries: table.entries(),
        room: table.capacity(),
        findable_bytes: table.entries() * PAGE_BYTES_U64,
        hole_share: share(meta.hole_bytes, meta.disk_bytes),
        zero_share: share(meta.zero_blocks, meta.blocks),
        repeated_share: share(meta.repeated_blocks, meta.blocks),
        regions: table.layout().regions().to_vec(),
    })
}

/// Compares the index of the disk at `image` with the disk: a sample of the entries, or all of them.
pub fn verify(image: &Path, state: &Path, all: bool) -> Result<Verified, DiskError> {
    let mut image = Image::open(image, state)?;
    let (table, _) = open_index(&image)?;
    let sample = if all { usize::MAX } else { SAMPLE };
    let (checked, right) = compare(&mut image.reader, image.source, image.bytes, &table, sample)?;
    Ok(Verified { index: image.index.display().to_string(), checked, right, stale: checked - right })
}

/// Compares up to `sample` known units, evenly spread, with the disk: how many, and how many are right.
fn compare(
    reader: &mut dyn Reader,
    source: Source,
    bytes: u64,
    table: &Table,
    sample: usize,
) -> Result<(u64, u64), DiskError> {
    let known: Vec<u64> = table.known_units().collect();
    let step = (known.len() / sample.max(1)).max(1);
    let (mut checked, mut right) = (0, 0);
    let mut window: (u64, Vec<u8>) = (0, Vec::new());
    for unit in known.into_iter().step_by(step) {
        let Some(sector) = table.layout().sector(unit) else { continue };
        let at = sector.bytes();
        // When all are compared they come in order: one read serves many.
        let inside = |window: &(u64, Vec<u8>)| {
            at >= window.0 && at + PAGE_BYTES_U64 <= window.0 + u64_of(window.1.len())
        };
        if !inside(&window) {
            let length = if step == 1 { READ_BYTES_MAX - source.alignment } else { PAGE_BYTES };
            window = (at, read_at(reader, source, bytes, at, length)?);
        }
        checked += 1;
        if inside(&window) {
            let from = usize_of(at - window.0);
            let block = <&[u8; PAGE_BYTES]>::try_from(&window.1[from..from + PAGE_BYTES]);
            right += u64::from(block.is_ok_and(|block| table.holds(unit, fingerprint::hint(block))));
        }
    }
    Ok((checked, right))
}

/// The tables of `disks` from the state directory, for a migration, and a sentence for each disk whose index is
/// missing, refused, or of little use. A disk that has grown or shrunk since the scan keeps what still holds.
pub fn load(disks: &ImageDisks, state: &Path) -> Result<(Tables, Vec<String>), DiskError> {
    let (mut tables, mut notes) = (Vec::new(), Vec::new());
    if disks.infos().is_empty() {
        return Ok((Tables::default(), notes));
    }
    let mut reader = disks.image_reader(1)?;
    for (number, info) in (0..).zip(disks.infos()) {
        let disk = DiskId(number);
        match load_one(disks, disk, &mut reader, state) {
            Ok((table, note)) => {
                notes.extend(note.map(|note| format!("disk {}: {note}", info.name)));
                tables.push(Some(Arc::new(table)));
            }
            Err(error) => {
                notes.push(format!("disk {}: no page is referenced on it: {error}", info.name));
                tables.push(None);
            }
        }
    }
    Ok((Tables::new(tables), notes))
}

fn load_one(
    disks: &ImageDisks,
    disk: DiskId,
    reader: &mut ImageReader,
    state: &Path,
) -> Result<(Table, Option<String>), DiskError> {
    let key = disks.local_key(disk)?;
    let index = file::path_in(state, &key);
    let refuse = |why: String, remedy: &'static str| {
        Err(DiskError::Index { path: index.display().to_string(), why, remedy })
    };
    let Some((mut table, meta)) = file::open(&index, &key)? else {
        return refuse(
            format!("there is none of {}", disks.path(disk)),
            "Build it with `pageferry index build`",
        );
    };
    let bytes = disks.infos()[usize::from(disk.0)].bytes;
    let source = Source { disk, alignment: disks.alignment(disk) };
    let mut note = None;
    if bytes != meta.disk_bytes {
        let layout = layout(reader, source, bytes)?;
        if bytes > meta.disk_bytes && layout.extends(table.layout()) {
            table.adopt(layout, Sector::holding(bytes));
        } else {
            table.end_at(Sector::holding(bytes.min(meta.disk_bytes) / PAGE_BYTES_U64 * PAGE_BYTES_U64));
        }
        let how = if bytes > meta.disk_bytes { "grown" } else { "shrunk" };
        note = Some(format!(
            "it has {how} from {} to {bytes} bytes since it was scanned; `pageferry index update` reads the rest",
            meta.disk_bytes
        ));
    }
    let (checked, right) = compare(reader, source, bytes, &table, TRUST_SAMPLE)?;
    if right * 2 < checked && bytes >= meta.disk_bytes {
        let why = format!("it is stale: {right} of {checked} sampled blocks are as they were");
        return refuse(why, "Bring it up to date with `pageferry index update`");
    }
    Ok((table, note))
}

/// A table of what stands on `disk` now, built in memory and kept nowhere; for disks too small or too short-lived to
/// keep an index of, and for the simulator's.
pub fn scan_in_memory(
    reader: &mut dyn Reader,
    source: Source,
    bytes: u64,
    data: &[Range<u64>],
) -> Result<(Table, Counts), DiskError> {
    let mut table = Table::new(layout(reader, source, bytes)?, 0);
    let runs = scan::units_over(&table, data);
    let counts = scan::scan(reader, source, &mut table, &runs, &mut |_| true)?;
    Ok((table, counts))
}

#[cfg(test)]
mod tests;
