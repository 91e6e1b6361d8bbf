//! The shared disk's pattern files, read past the page cache and, if asked for, out of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use xen_lab_checker::{FILE_BYTES, FILES, PAGE_BYTES, Words, file_name, wrong_block};

/// `O_DIRECT` on x86 (asm-generic/fcntl.h).
pub(crate) const O_DIRECT: i32 = 0o40000;
/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// The disk, mounted at `/mnt`.
pub(crate) struct Disk {
    /// Read past the cache.
    pub(crate) direct: Files,
    /// Read from the cache: as many as were read at start.
    pub(crate) cached: Files,
}

/// Opened files, of which chunks are read in no order.
pub(crate) struct Files {
    opened: Vec<File>,
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
        let mut disk = Self { direct: Files::none(0), cached: Files::none(1) };
        for file in 0..FILES {
            let path = directory.join(file_name(file));
            let failed = |error| format!("disk: {}: {error}", path.display());
            let opened = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(&path);
            disk.direct.opened.push(opened.map_err(failed)?);
            if file * FILE_BYTES < files_mib << 20 {
                disk.cached.opened.push(File::open(&path).map_err(failed)?);
                (0..FILE_BYTES / chunk_bytes()).try_for_each(|chunk| disk.cached.check(file, chunk))?;
            }
        }
        Ok(Some(disk))
    }
}

impl Files {
    fn none(choice: u64) -> Self {
        Self {
            opened: Vec::new(),
            choice: Words::of_page(choice, u64::MAX),
            room: vec![0; CHUNK + PAGE_BYTES],
        }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.opened.is_empty()
    }

    /// Reads and verifies one chunk of one of them; there must be one.
    pub(crate) fn verify(&mut self) -> Result<(), String> {
        let count = u64::try_from(self.opened.len()).unwrap_or(u64::MAX);
        let file = self.choice.next_word() % count;
        let chunk = self.choice.next_word() % (FILE_BYTES / chunk_bytes());
        self.check(file, chunk)
    }

    fn check(&mut self, file: u64, chunk: u64) -> Result<(), String> {
        let opened =
            usize::try_from(file).ok().and_then(|at| self.opened.get(at)).ok_or("disk: no such file")?;
        let skip = self.room.as_ptr().align_offset(PAGE_BYTES);
        let bytes = self.room.get_mut(skip..skip + CHUNK).ok_or("disk: no room for a chunk")?;
        let offset = chunk * chunk_bytes();
        let failed = |error| format!("disk: {} at {offset}: {error}", file_name(file));
        opened.read_exact_at(bytes, offset).map_err(failed)?;
        match wrong_block(file, chunk * 16, bytes) {
            None => Ok(()),
            Some(block) => Err(format!("disk: {}: block {block} is not what was written", file_name(file))),
        }
    }
}

fn chunk_bytes() -> u64 {
    u64::try_from(CHUNK).unwrap_or(u64::MAX)
}
