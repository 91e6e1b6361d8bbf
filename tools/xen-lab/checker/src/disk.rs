//! The shared disk's pattern files, read past the page cache and, if asked for, out of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use xen_lab_checker::{FILE_BYTES, FILES, PAGE_BYTES, Words, file_name, wrong_block};

/// `O_DIRECT` on x86 (asm-generic/fcntl.h).
const O_DIRECT: i32 = 0o40000;
/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// The disk, mounted at `/mnt`.
pub(crate) struct Disk {
    /// Opened for reads past the cache.
    direct: Vec<File>,
    /// Opened for reads from the cache: as many as were read at start.
    cached: Vec<File>,
    choice: Words,
    /// Room for an aligned chunk.
    room: Vec<u8>,
}

impl Disk {
    /// Opens the files under `directory` and reads `files_mib` MiB of them; nothing where there is no disk.
    pub(crate) fn open(directory: &Path, files_mib: u64) -> Result<Option<Self>, String> {
        if !directory.join(file_name(0)).exists() {
            return if files_mib == 0 { Ok(None) } else { Err("disk: there is none".into()) };
        }
        let mut disk = Self {
            direct: Vec::new(),
            cached: Vec::new(),
            choice: Words::of_page(0, u64::MAX),
            room: vec![0; CHUNK + PAGE_BYTES],
        };
        for file in 0..FILES {
            let path = directory.join(file_name(file));
            let failed = |error| format!("disk: {}: {error}", path.display());
            let opened = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(&path);
            disk.direct.push(opened.map_err(failed)?);
            if file * FILE_BYTES < files_mib << 20 {
                let opened = File::open(&path).map_err(failed)?;
                for chunk in 0..FILE_BYTES / chunk_bytes() {
                    check(&opened, file, chunk, &mut disk.room)?;
                }
                disk.cached.push(opened);
            }
        }
        Ok(Some(disk))
    }

    /// Reads and verifies one chunk past the cache, and one out of it.
    pub(crate) fn verify(&mut self) -> Result<(), String> {
        for files in [&self.direct, &self.cached] {
            let count = u64::try_from(files.len()).unwrap_or(0);
            if count == 0 {
                continue;
            }
            let file = self.choice.next_word() % count;
            let chunk = self.choice.next_word() % (FILE_BYTES / chunk_bytes());
            if let Some(opened) = usize::try_from(file).ok().and_then(|at| files.get(at)) {
                check(opened, file, chunk, &mut self.room)?;
            }
        }
        Ok(())
    }
}

fn chunk_bytes() -> u64 {
    u64::try_from(CHUNK).unwrap_or(u64::MAX)
}

fn check(opened: &File, file: u64, chunk: u64, room: &mut [u8]) -> Result<(), String> {
    let skip = room.as_ptr().align_offset(PAGE_BYTES);
    let bytes = room.get_mut(skip..skip + CHUNK).ok_or("disk: no room for a chunk")?;
    let offset = chunk * chunk_bytes();
    let failed = |error| format!("disk: {} at {offset}: {error}", file_name(file));
    opened.read_exact_at(bytes, offset).map_err(failed)?;
    match wrong_block(file, chunk * 16, bytes) {
        None => Ok(()),
        Some(block) => Err(format!("disk: {}: block {block} is not what was written", file_name(file))),
    }
}
