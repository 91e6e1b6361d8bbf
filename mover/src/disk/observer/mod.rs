//! Which blocks of a disk are written, as the kernel of this host sees the requests go by: for guests whose disk's backend is
//! the kernel's (blkback, on a block device or on a file under a loop device).
//!
//! ```text
//!     guest -> blkback -> submit_bio -> event block:block_bio_queue -> ring per processor -> harvest -> a bit per 4 KiB
//!                              |           (filter: this device, no reads)
//!                              `-> the disk
//! ```
//!
//! The event comes before the request: a block is known as written before it is. It goes through an instance of tracefs of its own
//! (bounded rings, nobody else's tracing is touched), which ends with this value; one that a killed process has left is cleared
//! away by the next to start. What is lost because a ring was full counts as everything: [`Written::lost`].
//!
//! What is not seen: writes of another host; of QEMU into an image file (they pass no block device of the image's own); through
//! another device of this host that shows the same blocks (a partition's writes carry the partition's number).
//!
//! Control path; one owner.
#![forbid(unsafe_code)]

mod ring;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;

use super::WriteLog;
use crate::bitmap::Bitmap;
use crate::error::DiskError;
use crate::units::{DiskId, SECTORS_PER_PAGE, u64_of, usize_of};

/// Where tracefs is mounted.
pub const TRACEFS: &str = "/sys/kernel/tracing";
/// Kilobytes of each processor's ring: some 18,000 requests.
const RING_KIB: u32 = 1024;
/// Pages read of a processor's ring in one harvest; who writes faster than that has lost.
const PAGES_MAX: usize = 4 * 256;
/// How instances are called: this, the process, a number.
const PREFIX: &str = "pageferry";
/// The event.
const EVENT: &str = "events/block/block_bio_queue";
/// Loop devices over one file that are looked at.
const LOOPS_MAX: usize = 8;

/// What a harvest found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Pieces of 4 KiB that were not in the bitmap before.
    pub fresh: u64,
    /// Requests are missing: anything may have been written.
    pub lost: bool,
}

/// Watches the writes to one disk.
#[derive(Debug)]
pub struct Observer {
    /// Before the instance: as long as they are open it can't go.
    rings: Vec<File>,
    instance: Instance,
    event: ring::Event,
    /// Where the disk begins on the device that the event's sectors count from.
    start: u64,
    page: Box<[u8; ring::PAGE]>,
}

/// A block device by its number, and where its sectors begin on the whole disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Device {
    major: u32,
    minor: u32,
    start: u64,
}

/// An instance of tracefs, which goes when this does.
#[derive(Debug)]
struct Instance(PathBuf);

impl Drop for Instance {
    fn drop(&mut self) {
        // The rings are open no more: it can go, and takes its events along. One that can't is cleared away by the next to start.
        let _ = fs::remove_dir(&self.0);
    }
}

fn failed(doing: String, source: io::Error) -> DiskError {
    let remedy = match source.kind() {
        io::ErrorKind::NotFound => {
            "Mount tracefs (`mount -t tracefs none /sys/kernel/tracing`); the kernel needs CONFIG_BLK_DEV_IO_TRACE"
        }
        io::ErrorKind::PermissionDenied => "Run as root; a locked-down kernel (confidentiality) refuses it",
        _ => "Look at the kernel log of this host for the cause",
    };
    DiskError::Os { doing, remedy, source }
}

impl Observer {
    /// Begins to watch the disk at `path`: a block device, or a file that loop devices of this host show. What is written
    /// before this returns may be missing.
    ///
    /// # Errors
    /// It is neither, or the kernel does not tell.
    pub fn start(path: &Path) -> Result<Self, DiskError> {
        Self::start_in(Path::new(TRACEFS), path, RING_KIB)
    }

    fn start_in(tracefs: &Path, path: &Path, ring_kib: u32) -> Result<Self, DiskError> {
        let devices = devices(path)?;
        let doing = || format!("watching the writes to {}", path.display());
        // Sectors of a partition are told as the whole disk's.
        let start = devices.first().map_or(0, |device| device.start);
        if devices.iter().any(|device| device.start != start) {
            return Err(failed(doing(), io::Error::other("its devices begin at different sectors")));
        }
        Self::trace(tracefs, &devices, start, ring_kib).map_err(|source| failed(doing(), source))
    }

    fn trace(tracefs: &Path, devices: &[Device], start: u64, ring_kib: u32) -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        clear_left(tracefs);
        let format = fs::read_to_string(tracefs.join(EVENT).join("format"))?;
        let event = ring::Event::parse(&format)
            .ok_or_else(|| io::Error::other("the event block_bio_queue has another format than is known"))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = tracefs.join("instances").join(format!("{PREFIX}-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        let instance = Instance(path);
        let at = |name: &str| instance.0.join(name);
        fs::write(at("buffer_size_kb"), ring_kib.to_string())?;
        let ours: Vec<String> = devices
            .iter()
            .map(|device| format!("dev == {}", u64::from(device.major) << 20 | u64::from(device.minor)))
            .collect();
        // Discards and zeroing, too, leave other contents behind.
        let filter = format!("({}) && !(rwbs ~ \"R*\")", ours.join(" || "));
        fs::write(at(EVENT).join("filter"), filter)?;
        let mut rings = Vec::new();
        for entry in fs::read_dir(at("per_cpu"))? {
            let mut options = fs::OpenOptions::new();
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
            rings.push(options.read(true).custom_flags(flags).open(entry?.path().join("trace_pipe_raw"))?);
        }
        fs::write(at(EVENT).join("enable"), "1")?;
        Ok(Self { rings, instance, event, start, page: Box::new([0; ring::PAGE]) })
    }

    /// Adds a bit to `into` for each 4 KiB of the disk that a request has touched since the last time.
    ///
    /// # Errors
    /// The kernel's rings can't be read.
    pub fn harvest(&mut self, into: &mut Bitmap) -> Result<Written, DiskError> {
        let mut found = Written::default();
        let (start, event) = (self.start, self.event);
        for ring in &mut self.rings {
            let mut whole = false;
            for _ in 0..PAGES_MAX {
                let count = match ring.read(&mut self.page[..]) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        let doing = format!("reading {}", self.instance.0.display());
                        return Err(failed(doing, error));
                    }
                };
                if count == 0 {
                    whole = true;
                    break;
                }
                let page = ring::read(&self.page[..count], &event, &mut |sector, sectors| {
                    found.fresh += enter(into, sector.wrapping_sub(start), sectors);
                });
                found.lost |= page == ring::Page::Lost;
            }
            found.lost |= !whole;
        }
        Ok(found)
    }
}

/// Enters the pieces that `sectors` from `sector` on touch; how many were not there.
fn enter(into: &mut Bitmap, sector: u64, sectors: u64) -> u64 {
    let last = u64_of(into.len());
    let from = (sector / SECTORS_PER_PAGE).min(last);
    let to = sector.saturating_add(sectors).div_ceil(SECTORS_PER_PAGE).min(last);
    if sectors == 0 || from >= to {
        return 0;
    }
    u64_of(into.set_range(usize_of(from), usize_of(to)))
}

/// Removes instances of processes that are no more.
fn clear_left(tracefs: &Path) {
    let Ok(entries) = fs::read_dir(tracefs.join("instances")) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let mut words = name.to_str().unwrap_or_default().split('-');
        if words.next() == Some(PREFIX)
            && let Some(process) = words.next().filter(|word| word.parse::<u32>().is_ok())
            && !Path::new("/proc").join(process).exists()
        {
            // One whose rings somebody has open all the same, from another namespace of processes, stays.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The devices through which the disk at `path` is written.
fn devices(path: &Path) -> Result<Vec<Device>, DiskError> {
    let doing = || format!("looking for the device of {}", path.display());
    let stat = fs::metadata(path).map_err(|source| failed(doing(), source))?;
    let sys = Path::new("/sys/dev/block");
    if stat.file_type().is_block_device() {
        let (major, minor) = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
        let device = sys.join(format!("{major}:{minor}"));
        let start = match fs::read_to_string(device.join("partition")) {
            Ok(_) => number(&device.join("start")).map_err(|source| failed(doing(), source))?,
            Err(_) => 0,
        };
        return Ok(vec![Device { major, minor, start }]);
    }
    let found = loops(&stat).map_err(|source| failed(doing(), source))?;
    if found.is_empty() || found.len() > LOOPS_MAX {
        return Err(DiskError::Os {
            doing: doing(),
            remedy: "Writes to files under QEMU can't be watched: scan them now and then (`pageferry index update`)",
            source: io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} loop devices show all of it", found.len()),
            ),
        });
    }
    Ok(found)
}

/// Loop devices over all of the file.
fn loops(file: &fs::Metadata) -> io::Result<Vec<Device>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let device = entry?.path();
        let Ok(backing) = fs::read_to_string(device.join("loop/backing_file")) else { continue };
        let same = fs::metadata(backing.trim_end_matches('\n'))
            .is_ok_and(|stat| (stat.dev(), stat.ino()) == (file.dev(), file.ino()));
        if !same || number(&device.join("loop/offset"))? != 0 {
            continue;
        }
        let text = fs::read_to_string(device.join("dev"))?;
        let numbers = text.trim().split_once(':').and_then(|(major, minor)| {
            Some(Device { major: major.parse().ok()?, minor: minor.parse().ok()?, start: 0 })
        });
        found.extend(numbers);
    }
    Ok(found)
}

fn number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

/// The observers of a guest's disks, as the log of its writes.
#[derive(Debug, Default)]
pub struct Observed(Vec<Option<Observer>>);

impl Observed {
    /// One for each disk, in the order of their numbers; none for a disk that nobody writes, or whose writes can't be seen.
    #[must_use]
    pub fn new(observers: Vec<Option<Observer>>) -> Self {
        Self(observers)
    }
}

impl WriteLog for Observed {
    fn harvest(&mut self, disk: DiskId, into: &mut Bitmap) -> Result<u64, DiskError> {
        let Some(place) = self.0.get_mut(usize::from(disk.0)) else { return Ok(0) };
        let Some(observer) = place else { return Ok(0) };
        let before = into.count();
        match observer.harvest(into) {
            Ok(found) if !found.lost => {}
            Ok(_) => into.set_all(),
            Err(error) => {
                // A hint less: what is written from here on is found by its check.
                tracing::warn!(%error, "the guest's writes to a disk are watched no more");
                into.set_all();
                *place = None;
            }
        }
        Ok(into.count() - before)
    }
}
