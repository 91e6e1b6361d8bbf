//! From a clone to the raw image at the bottom of its chain, by the headers alone.
//!
//! ```text
//!     clone.qcow2 --backing file--> golden-2.qcow2 --backing file--> golden.raw      the base: blocks where the guest sees them
//!     the guest writes here         nobody writes below here
//! ```
//!
//! What stands in a raw image under a clone stands in the guest's memory too, page by page, and nobody writes there: pages may be
//! referred to on it. The layers above are not looked into for blocks.
//!
//! Headers are the host's own files, written by QEMU and by who makes clones, never by the guest, whose writes go to clusters; they
//! are decoded as if a stranger had written them all the same. Nothing is guessed: an image whose format nobody names
//! may have been a guest's disk once, with a header of the guest's own making at its start, and is not followed.
//!
//! Control path; any thread.
#![forbid(unsafe_code)]

mod qcow2;
#[cfg(test)]
mod tests;
mod vhd;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom};

use super::image::remedy;
use crate::error::DiskError;
use crate::limits::{CHAIN_IMAGES_MAX, IMAGE_NAME_BYTES_MAX};
use crate::units::usize_of;

/// How an image is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Block for block as the guest sees it.
    Raw,
    /// QEMU's.
    Qcow2,
    /// Connectix' and Microsoft's, as XenServer clones with it.
    Vhd,
}

/// The raw image under a clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bottom {
    /// Where it is.
    pub path: PathBuf,
    /// Whether the guest's writes go there: there is no clone above it.
    pub written: bool,
}

/// What an image says of where its blocks stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layer {
    /// In itself, as the guest sees them.
    Raw,
    /// In itself, in clusters of its own.
    Clusters,
    /// In that file, as the guest sees them.
    RawIn(String),
    /// Those that it does not have in another image.
    Over(Backing),
}

/// The image under a clone, as the clone names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// Its path, from the clone's directory on if it is not absolute.
    pub name: String,
    /// Its format.
    pub format: Format,
    /// What a VHD has to be called by itself to be the one.
    pub uuid: Option<[u8; 16]>,
}

/// Why a header is not followed: the sentence without its end, and what to do.
pub type Refusal = (String, &'static str);

/// Bytes of an image, read where they are asked for.
pub trait Bytes {
    /// How many there are.
    fn length(&self) -> u64;
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// It can't be read, or ends before.
    fn fill(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Bytes for [u8] {
    fn length(&self) -> u64 {
        crate::units::u64_of(self.len())
    }
    fn fill(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|from| self.get(from..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// An open image.
struct Opened {
    file: File,
    bytes: u64,
}

impl Bytes for Opened {
    fn length(&self) -> u64 {
        self.bytes
    }
    fn fill(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

/// The raw image at the bottom of the chain that begins at `path`.
///
/// # Errors
/// There is none, or a header on the way to it can't be read or says what can't be followed; the sentence names it.
pub fn bottom(path: &Path, format: Format) -> Result<Bottom, DiskError> {
    let (mut path, mut format, mut uuid) = (path.to_owned(), format, None);
    for above in 0..CHAIN_IMAGES_MAX {
        if format == Format::Raw {
            return Ok(Bottom { path, written: above == 0 });
        }
        let refused =
            |(why, remedy): Refusal| DiskError::Chain { path: path.display().to_string(), why, remedy };
        let image = open(&path)?;
        match layer(&image, format, uuid.as_ref()).map_err(refused)? {
            Layer::Raw => return Ok(Bottom { path, written: above == 0 }),
            Layer::RawIn(name) => return Ok(Bottom { path: beside(&path, &name), written: above == 0 }),
            Layer::Over(backing) => {
                path = beside(&path, &backing.name);
                (format, uuid) = (backing.format, backing.uuid);
            }
            Layer::Clusters => {
                let why = "there is no raw image under it".to_owned();
                return Err(refused((why, "Pages are sent; clones of a raw base have one")));
            }
        }
    }
    Err(DiskError::Chain {
        path: path.display().to_string(),
        why: format!("it stands under {CHAIN_IMAGES_MAX} others, or under itself"),
        remedy: "Make the chain shorter (`qemu-img rebase`)",
    })
}

/// What `image`, of `format`, says of where its blocks stand. A VHD that is to be another's parent has that's word for its `uuid`.
///
/// # Errors
/// It is not of that format, or says what can't be followed.
pub fn layer(
    image: &(impl Bytes + ?Sized),
    format: Format,
    uuid: Option<&[u8; 16]>,
) -> Result<Layer, Refusal> {
    match format {
        Format::Raw => Ok(Layer::Raw),
        Format::Qcow2 => qcow2::layer(image),
        Format::Vhd => vhd::layer(image, uuid),
    }
}

/// A name out of a header, if it is a path.
fn name(bytes: &[u8]) -> Result<String, Refusal> {
    let shown = String::from_utf8_lossy(bytes);
    let refuse = |what: &str| {
        let shown: String = shown.chars().filter(|c| !c.is_control()).take(80).collect();
        Err((
            format!("the image it names, `{shown}`, {what}"),
            "Name a file of this host by its path (`qemu-img rebase -u`)",
        ))
    };
    let Ok(text) = std::str::from_utf8(bytes) else { return refuse("is no text") };
    // "nbd:...", "json:{...}", "file:...": for QEMU to understand.
    let protocol = text.split('/').next().is_some_and(|first| first.contains(':'));
    match () {
        () if text.is_empty() || text.len() > IMAGE_NAME_BYTES_MAX => refuse("has no length that a path has"),
        () if text.chars().any(char::is_control) => refuse("has characters in it that no path has"),
        () if protocol => refuse("is no path"),
        () => Ok(text.to_owned()),
    }
}

/// Where `name` is, which stands in the header of `clone`.
fn beside(clone: &Path, name: &str) -> PathBuf {
    clone.parent().unwrap_or(Path::new("/")).join(name)
}

/// Opens an image to read its header. What is no file and no block device is not opened at all: to open a device may do something.
fn open(path: &Path) -> Result<Opened, DiskError> {
    let failed = |source: io::Error| DiskError::Os {
        doing: format!("reading the header of {}", path.display()),
        remedy: remedy(rustix::io::Errno::from_io_error(&source).unwrap_or(rustix::io::Errno::IO)),
        source,
    };
    let look = || -> io::Result<Opened> {
        let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&found)?;
        if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::BlockDevice) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        // Another host may have made the clone since this one has looked.
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0))?;
        Ok(Opened { file, bytes })
    };
    look().map_err(failed)
}

/// A big-endian number of `N` bytes at `at`, which the caller knows to be there.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[8 - N..].copy_from_slice(&bytes[at..at + N]);
    u64::from_be_bytes(wide)
}

/// `length` bytes at `offset`, which the header says.
fn read(
    image: &(impl Bytes + ?Sized),
    what: &str,
    offset: u64,
    length: u64,
    most: usize,
) -> Result<Vec<u8>, Refusal> {
    let refuse = |why: String| (why, "Is it whole? `qemu-img check` tells");
    if length > crate::units::u64_of(most) {
        return Err(refuse(format!("its {what} is said to be {length} bytes long, {most} will do")));
    }
    let mut bytes = vec![0; usize_of(length)];
    image.fill(&mut bytes, offset).map_err(|error| refuse(format!("its {what} can't be read: {error}")))?;
    Ok(bytes)
}
