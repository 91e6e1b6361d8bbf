//! Disk images made of real files, for guests to work on: no download, the machine's own content.
//!
//! ```text
//!   block 0        1 ...                                   table            used
//!   | header | file, file, ... each from a block of its own | table of files | hole to the end
//! ```
//! The header: `PFERRYIM`, version (4 bytes), zero (4), used blocks (8), table's first block (8), table's bytes (8),
//! files (8); little-endian. The table: a line a file, `block bytes path`. The same files give the same image.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::error::GuestError;
use crate::units::{PAGE_BYTES, PAGE_BYTES_U64, u64_of};

const MAGIC: &[u8; 8] = b"PFERRYIM";
const VERSION: u32 = 1;
/// Bytes copied at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// What an image's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// 4 KiB blocks with the header, files and table: what a guest reads as files.
    pub used_blocks: u64,
    /// First block of the table.
    pub table_block: u64,
    /// Bytes of the table.
    pub table_bytes: u64,
    /// Files in it.
    pub files: u64,
}

impl Header {
    fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut block = [0; PAGE_BYTES];
        block[..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let words = [self.used_blocks, self.table_block, self.table_bytes, self.files];
        for (to, word) in block[16..48].as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        block
    }
    fn decode(block: &[u8; PAGE_BYTES]) -> Option<Self> {
        let words: Vec<u64> =
            block[16..48].as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let ours = block[..8] == *MAGIC && block[8..12] == VERSION.to_le_bytes();
        let [used_blocks, table_block, table_bytes, files] = words[..] else { return None };
        ours.then_some(Self { used_blocks, table_block, table_bytes, files })
    }
}

/// The header of an image, `None` for a disk that was not made here.
///
/// # Errors
/// What reading it says.
pub fn header(path: &Path) -> io::Result<Option<Header>> {
    let mut block = [0; PAGE_BYTES];
    let mut file = File::open(path)?;
    match file.read_exact(&mut block) {
        Ok(()) => Ok(Header::decode(&block)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(e) => Err(e),
    }
}

/// What [`make`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// The image's header.
    pub header: Header,
    /// Whether it was there already.
    pub cached: bool,
    /// Files and directories that could not be read and were left out.
    pub skipped: u64,
}

/// Makes an image of `bytes` at `path` out of the files under `roots`, in the order of their names, until
/// `content_bytes` are filled; the rest is a hole. An image of that size made here before is kept as it is.
///
/// # Errors
/// The disk is full, or `path` can't be written; what was begun is removed.
pub fn make(path: &Path, bytes: u64, content_bytes: u64, roots: &[PathBuf]) -> Result<Made, GuestError> {
    let bytes = bytes - bytes % PAGE_BYTES_U64;
    if let Ok(meta) = std::fs::metadata(path)
        && meta.len() == bytes
        && let Ok(Some(header)) = header(path)
    {
        return Ok(Made { header, cached: true, skipped: 0 });
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| failed(path, e))?;
    }
    // Written beside and renamed, so that an interrupted one is never taken for whole.
    let beside = path.with_extension(format!("{}.partial", std::process::id()));
    let made = write_image(&beside, bytes, content_bytes.min(bytes), roots)
        .and_then(|made| std::fs::rename(&beside, path).map(|()| made));
    made.map_err(|e| {
        // The error at hand says more than one about tidying up would.
        let _ = std::fs::remove_file(&beside);
        failed(path, e)
    })
}

fn failed(path: &Path, source: io::Error) -> GuestError {
    let remedy = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "There is no room for it: free some, name another directory, or make it smaller"
        }
        _ => "Is its directory writable?",
    };
    GuestError::Os { doing: format!("cannot make the disk image {}", path.display()), remedy, source }
}

struct Packer {
    out: File,
    /// Next free block.
    at: u64,
    /// Blocks the files may take, header and table included.
    limit: u64,
    table: String,
    files: u64,
    skipped: u64,
    chunk: Vec<u8>,
}

fn write_image(path: &Path, bytes: u64, content_bytes: u64, roots: &[PathBuf]) -> io::Result<Made> {
    let out = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    out.set_len(bytes)?;
    let limit = content_bytes / PAGE_BYTES_U64;
    let mut packer =
        Packer { out, at: 1, limit, table: String::new(), files: 0, skipped: 0, chunk: vec![0; CHUNK_BYTES] };
    let mut roots = roots.to_vec();
    roots.sort();
    for root in &roots {
        packer.walk(root)?;
    }
    packer.finish()
}

impl Packer {
    fn full(&self) -> bool {
        self.at + self.table_blocks() + 1 >= self.limit
    }
    fn table_blocks(&self) -> u64 {
        u64_of(self.table.len()).div_ceil(PAGE_BYTES_U64)
    }

    /// Packs the files under `path`, links not followed.
    fn walk(&mut self, path: &Path) -> io::Result<()> {
        let mut todo = vec![path.to_owned()];
        while let Some(path) = todo.pop() {
            if self.full() {
                return Ok(());
            }
            let Ok(meta) = std::fs::symlink_metadata(&path) else {
                self.skipped += 1;
                continue;
            };
            if meta.is_dir() {
                match std::fs::read_dir(&path) {
                    Ok(entries) => {
                        let mut below: Vec<_> =
                            entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
                        // The last one is taken next.
                        below.sort_by(|a, b| b.cmp(a));
                        todo.extend(below);
                    }
                    Err(_) => self.skipped += 1,
                }
            } else if meta.is_file() && meta.len() > 0 {
                self.pack(&path)?;
            }
        }
        Ok(())
    }

    /// Packs one file, cut short where the image ends. Errors are those of the image: a file that can't be read, or
    /// not to its end, is left out.
    fn pack(&mut self, path: &Path) -> io::Result<()> {
        let line = format!(" {}\n", path.display().to_string().replace('\n', "?"));
        let room = self.limit.saturating_sub(self.at + self.table_blocks() + 2) * PAGE_BYTES_U64;
        let Ok(mut input) = File::open(path) else {
            self.skipped += 1;
            return Ok(());
        };
        self.out.seek(SeekFrom::Start(self.at * PAGE_BYTES_U64))?;
        let mut packed = 0;
        while packed < room {
            let want = CHUNK_BYTES.min(crate::units::usize_of(room - packed));
            let got = match read_full(&mut input, &mut self.chunk[..want]) {
                Ok(0) => break,
                Ok(got) => got,
                Err(_) => {
                    self.skipped += 1;
                    return Ok(());
                }
            };
            let whole = got.next_multiple_of(PAGE_BYTES);
            self.chunk[got..whole].fill(0);
            self.out.write_all(&self.chunk[..whole])?;
            packed += u64_of(got);
            if got < want {
                break;
            }
        }
        if packed > 0 {
            self.table.push_str(&format!("{} {packed}{line}", self.at));
            self.files += 1;
            self.at += packed.div_ceil(PAGE_BYTES_U64);
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<Made> {
        let header = Header {
            used_blocks: self.at + self.table_blocks(),
            table_block: self.at,
            table_bytes: u64_of(self.table.len()),
            files: self.files,
        };
        let mut table = std::mem::take(&mut self.table).into_bytes();
        table.resize(table.len().next_multiple_of(PAGE_BYTES), 0);
        self.out.seek(SeekFrom::Start(header.table_block * PAGE_BYTES_U64))?;
        self.out.write_all(&table)?;
        // What an unreadable file left behind its start is cut off, and the hole begins.
        let bytes = self.out.metadata()?.len();
        self.out.set_len(header.used_blocks * PAGE_BYTES_U64)?;
        self.out.set_len(bytes)?;
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&header.encode())?;
        self.out.sync_all()?;
        Ok(Made { header, cached: false, skipped: self.skipped })
    }
}

fn read_full(input: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

/// Makes `to` a copy of the image `from` for a guest to write to: sharing its blocks where the file system can
/// (`FICLONE`), else copying its content, holes left out. An old `to` is replaced.
///
/// # Errors
/// The disk is full, or a file can't be read or written; what was begun is removed.
pub fn copy(from: &Path, to: &Path) -> Result<(), GuestError> {
    let copied = copy_content(from, to);
    copied.map_err(|e| {
        // The error at hand says more than one about tidying up would.
        let _ = std::fs::remove_file(to);
        failed(to, e)
    })
}

fn copy_content(from: &Path, to: &Path) -> io::Result<()> {
    let mut input = File::open(from)?;
    let mut output = OpenOptions::new().write(true).create(true).truncate(true).open(to)?;
    if rustix::fs::ioctl_ficlone(output.as_fd(), input.as_fd()).is_ok() {
        return Ok(());
    }
    let bytes = input.metadata()?.len();
    output.set_len(bytes)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    loop {
        let data = match rustix::fs::seek(&input, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = rustix::fs::seek(&input, rustix::fs::SeekFrom::Hole(data))?;
        input.seek(SeekFrom::Start(data))?;
        output.seek(SeekFrom::Start(data))?;
        let mut left = hole - data;
        while left > 0 {
            let want = CHUNK_BYTES.min(crate::units::usize_of(left));
            let got = read_full(&mut input, &mut chunk[..want])?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            output.write_all(&chunk[..got])?;
            left -= u64_of(got);
        }
        at = hole;
    }
    output.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn files(dir: &Path) -> PathBuf {
        let root = dir.join("files");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("b"), vec![b'b'; 5000]).unwrap();
        std::fs::write(root.join("a"), b"short").unwrap();
        std::fs::write(root.join("sub/c"), vec![b'c'; 3 << 20]).unwrap();
        std::fs::write(root.join("empty"), b"").unwrap();
        std::os::unix::fs::symlink("/dev/zero", root.join("link")).unwrap();
        root
    }

    #[test]
    fn files_stand_at_blocks_of_their_own_and_the_rest_is_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let (root, path) = (files(dir.path()), dir.path().join("images/disk.img"));
        let roots = [root, dir.path().join("not there")];
        let made = make(&path, 64 << 20, 32 << 20, &roots).unwrap();
        assert_eq!((made.header.files, made.skipped, made.cached), (3, 1, false));
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 64 << 20);
        assert_eq!(&bytes[4096..4102], b"short\0");
        assert_eq!((bytes[8192], bytes[8192 + 4999], bytes[8192 + 5000]), (b'b', b'b', 0));
        assert_eq!(bytes[16384], b'c');
        let table = String::from_utf8_lossy(&bytes[16384 + (3 << 20)..][..100]).into_owned();
        assert!(table.starts_with("1 5 /") && table.contains("\n2 5000 /"), "{table}");
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 8 << 20, "sparse");
        assert_eq!(header(&path).unwrap(), Some(made.header));

        let again = dir.path().join("again.img");
        make(&again, 64 << 20, 32 << 20, &roots).unwrap();
        assert!(bytes == std::fs::read(&again).unwrap(), "reproducible");
        assert!(make(&again, 64 << 20, 32 << 20, &[]).unwrap().cached);
        assert!(!make(&again, 32 << 20, 16 << 20, &roots).unwrap().cached, "another size is another image");

        let copied = dir.path().join("copied.img");
        copy(&path, &copied).unwrap();
        assert!(bytes == std::fs::read(&copied).unwrap());
        assert!(std::fs::metadata(&copied).unwrap().blocks() * 512 < 8 << 20, "holes stay");
        assert_eq!(std::fs::read_dir(dir.path().join("images")).unwrap().count(), 1, "nothing left beside");
    }

    #[test]
    fn an_image_is_filled_to_its_limit_and_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let (root, path) = (files(dir.path()), dir.path().join("small.img"));
        let made = make(&path, 1 << 20, 1 << 20, &[root]).unwrap();
        assert!(made.header.used_blocks <= 256 && made.header.used_blocks > 250, "{made:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
        assert!(header(&dir.path().join("files/a")).unwrap().is_none());
    }

    #[test]
    fn a_full_disk_is_said_in_a_sentence() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let said = failed(Path::new("x.img"), full).to_string();
        assert!(said.contains("x.img") && said.contains("no room"), "{said}");
    }
}
