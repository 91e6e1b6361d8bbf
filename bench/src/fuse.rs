//! A file system of a few files, served by this process over `/dev/fuse`: what they hold, and how reading and writing them
//! goes, is up to [`Files`].
//!
//! Layouts are those of `linux/fuse.h`, protocol 7.31, in the machine's own byte order. All files are opened past the page cache
//! (`FOPEN_DIRECT_IO`), so that each read and write comes here. Reads and writes are answered on threads of their own: one
//! that waits holds up nobody else. (The crate `fuser` would do; it brings `nix`, and system calls go through rustix here.)

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, ensure};
use mover::units::usize_of;

/// Bytes of the largest read or write: the kernel's default of 32 pages.
const PIECE_BYTES: u32 = 128 * 1024;
const REQUEST_HEADER: usize = 40;
const ANSWER_HEADER: usize = 16;
/// The directory; files have other numbers.
const ROOT: u64 = 1;
const ENOENT: i32 = 2;
/// An error of the medium, for [`Files`].
pub const EIO: i32 = 5;
const ENOSYS: i32 = 38;

/// The files, by numbers from 2 on. Errors are those of `errno.h`.
pub trait Files: Send + Sync + 'static {
    /// The file of that name.
    fn node(&self, name: &[u8]) -> Option<u64>;
    /// Bytes of that file; none if there is none of that number.
    fn bytes(&self, node: u64) -> Option<u64>;
    /// Reads up to so many bytes from `place` on, for a thread of the number `asker`.
    ///
    /// # Errors
    /// What the reader is to be told.
    fn read(&self, node: u64, asker: u32, place: u64, bytes: usize) -> Result<Vec<u8>, i32>;
    /// Writes all of `data`.
    ///
    /// # Errors
    /// What the writer is to be told.
    fn write(&self, node: u64, place: u64, data: &[u8]) -> Result<(), i32>;
    /// Has all that was written be there for good.
    ///
    /// # Errors
    /// What who asked is to be told.
    fn flush(&self) -> Result<(), i32>;
}

/// The mounted file system. Dropping it unmounts.
pub struct Fuse {
    directory: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Fuse {
    /// Mounts it at `directory`, which is made.
    ///
    /// # Errors
    /// Without root, or where the kernel has no FUSE.
    pub fn mount(directory: &Path, files: impl Files) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("cannot open /dev/fuse: the kernel needs CONFIG_FUSE_FS")?;
        let mut mount = Command::new("mount");
        // The descriptor is the one that mount has as its standard input.
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        mount.args(["-i", "-t", "fuse", "-o", options, "pageferry"]).arg(directory);
        let output = mount.stdin(Stdio::from(device.try_clone()?)).output().context("cannot run mount")?;
        ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr).trim());
        let (device, files) = (Arc::new(device), Arc::new(files));
        let server = thread::Builder::new().name("fuse".into()).spawn(move || serve(&device, &files))?;
        Ok(Self { directory: directory.to_owned(), server: Some(server) })
    }

    /// One of its files.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let ended = unmount.arg("-l").arg(&self.directory).status().is_ok_and(|status| status.success());
        // The server ends when the last file of it is closed; one that can't be unmounted would wait for ever.
        if let (true, Some(server)) = (ended, self.server.take()) {
            let _ = server.join();
        }
    }
}

/// A request, its header parsed.
struct Request {
    opcode: u32,
    unique: u64,
    node: u64,
    process: u32,
    body: Vec<u8>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn serve<F: Files>(device: &Arc<File>, files: &Arc<F>) {
    let mut buffer = vec![0; usize_of(u64::from(PIECE_BYTES)) + 8192];
    loop {
        let bytes = match (&**device).read(&mut buffer) {
            Ok(0) => return,
            Ok(bytes) => bytes,
            // A request that was taken back meanwhile; try again.
            Err(error) if error.kind() == ErrorKind::Interrupted || error.raw_os_error() == Some(ENOENT) => {
                continue;
            }
            // Unmounted.
            Err(_) => return,
        };
        let request = Request {
            opcode: u32_at(&buffer, 4),
            unique: u64_at(&buffer, 8),
            node: u64_at(&buffer, 16),
            process: u32_at(&buffer, 32),
            body: buffer[REQUEST_HEADER.min(bytes)..bytes].to_vec(),
        };
        let (device, files) = (Arc::clone(device), Arc::clone(files));
        match request.opcode {
            15 | 16 => {
                thread::spawn(move || answer(&device, &*files, &request));
            }
            _ => answer(&device, &*files, &request),
        }
    }
}

/// Answers a request; those that want none (forget, interrupt) get none.
fn answer(device: &File, files: &impl Files, request: &Request) {
    let answered = match request.opcode {
        2 | 36 | 42 => return,
        1 => lookup(files, request),
        3 => attributes(files, request.node).map(|bytes| [vec![0; 16], bytes].concat()),
        14 | 27 => Ok(opened()),
        15 => read(files, request),
        16 => write(files, request),
        17 => Ok(vec![0; 80]),
        20 => files.flush().map(|()| Vec::new()),
        18 | 25 | 29 | 38 => Ok(Vec::new()),
        26 => Ok(greeted()),
        _ => Err(ENOSYS),
    };
    let (error, body) = match answered {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let length = u32::try_from(ANSWER_HEADER + body.len()).expect("at most a piece");
    let mut whole = Vec::with_capacity(ANSWER_HEADER + body.len());
    whole.extend(length.to_ne_bytes());
    whole.extend(error.to_ne_bytes());
    whole.extend(request.unique.to_ne_bytes());
    whole.extend(body);
    // Who asked may have been killed, or the file system be gone: there is nobody to tell.
    let _ = { device }.write_all(&whole);
}

/// `fuse_init_out`.
fn greeted() -> Vec<u8> {
    const ASYNC_READ: u32 = 1;
    const ASYNC_DIRECT: u32 = 1 << 15;
    let mut out = Vec::new();
    for word in [7, 31, PIECE_BYTES, ASYNC_READ | ASYNC_DIRECT] {
        out.extend(u32::to_ne_bytes(word));
    }
    // Requests in the background, and when that is many.
    out.extend(64u16.to_ne_bytes());
    out.extend(48u16.to_ne_bytes());
    out.extend(PIECE_BYTES.to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.resize(64, 0);
    out
}

/// `fuse_open_out`: past the page cache, writes beside one another.
fn opened() -> Vec<u8> {
    const DIRECT_IO: u32 = 1;
    const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    let mut out = vec![0; 8];
    out.extend((DIRECT_IO | PARALLEL_DIRECT_WRITES).to_ne_bytes());
    out.resize(16, 0);
    out
}

/// `fuse_entry_out`.
fn lookup(files: &impl Files, request: &Request) -> Result<Vec<u8>, i32> {
    let name = request.body.split(|byte| *byte == 0).next().unwrap_or_default();
    let node = files.node(name).ok_or(ENOENT)?;
    let mut out = node.to_ne_bytes().to_vec();
    out.resize(40, 0);
    out.extend(attributes(files, node)?);
    Ok(out)
}

/// `fuse_attr`.
fn attributes(files: &impl Files, node: u64) -> Result<Vec<u8>, i32> {
    let (size, mode) = match node {
        ROOT => (0, 0o40755u32),
        _ => (files.bytes(node).ok_or(ENOENT)?, 0o100_644),
    };
    let mut out = Vec::with_capacity(88);
    for word in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend(word.to_ne_bytes());
    }
    for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(word.to_ne_bytes());
    }
    Ok(out)
}

/// `fuse_read_in`: the file's handle, the place, the length.
fn read(files: &impl Files, request: &Request) -> Result<Vec<u8>, i32> {
    let (place, bytes) = (u64_at(&request.body, 8), u32_at(&request.body, 16));
    files.read(request.node, request.process, place, usize_of(u64::from(bytes)))
}

/// `fuse_write_in`: the file's handle, the place, the length; 40 bytes, the data behind them.
fn write(files: &impl Files, request: &Request) -> Result<Vec<u8>, i32> {
    let (place, bytes) = (u64_at(&request.body, 8), u32_at(&request.body, 16));
    files.write(request.node, place, request.body.get(40..).unwrap_or_default())?;
    let mut out = bytes.to_ne_bytes().to_vec();
    out.resize(8, 0);
    Ok(out)
}
