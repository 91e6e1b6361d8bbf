//! A file system of three files, served by this process over `/dev/fuse`: a guest's disk that fails on demand, and the
//! two files that the ends of a migration write their events to. A process that writes an event waits for the write to be
//! answered; so it can be held just there, and a fault strikes exactly the phase it is meant for.
//!
//! ```text
//!   DIR/disk     the image, read and written; see [`Weather`] for what can be wrong with it
//!   DIR/source   events of `pageferry send`       DIR/target   events of `pageferry receive`
//! ```
//! Layouts are those of `linux/fuse.h`, protocol 7.31, in the machine's own byte order. All files are opened past the page cache
//! (`FOPEN_DIRECT_IO`), so that each read and write comes here. Reads and writes are answered on threads of their own: one
//! that waits holds up nobody else.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use mover::units::{u64_of, usize_of};

use crate::ear::Ear;
use crate::weather::{Verdict, Weather};

/// Bytes of the largest read or write: the kernel's default of 32 pages.
const PIECE_BYTES: u32 = 128 * 1024;
const REQUEST_HEADER: usize = 40;
const ANSWER_HEADER: usize = 16;
const ROOT: u64 = 1;
const DISK: u64 = 2;
const SOURCE: u64 = 3;
const TARGET: u64 = 4;
const ENOENT: i32 = 2;
const EIO: i32 = 5;
const ENOSYS: i32 = 38;

/// The mounted file system. Dropping it unmounts.
pub(crate) struct Fuse {
    directory: PathBuf,
    server: Option<JoinHandle<()>>,
}

/// What its files are.
pub(crate) struct Files {
    /// The image behind `disk`.
    pub(crate) image: File,
    /// What is wrong with it.
    pub(crate) weather: Arc<Weather>,
    /// Who listens to `source`.
    pub(crate) source: Arc<Ear>,
    /// Who listens to `target`.
    pub(crate) target: Arc<Ear>,
}

impl Fuse {
    /// Mounts it at `directory`, which is made.
    pub(crate) fn mount(directory: &Path, files: Files) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("cannot open /dev/fuse: the kernel needs CONFIG_FUSE_FS")?;
        let mut mount = Command::new("mount");
        // The descriptor is the one that mount has as its standard input.
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        mount.args(["-i", "-t", "fuse", "-o", options, "pageferry-trials"]).arg(directory);
        let output = mount.stdin(Stdio::from(device.try_clone()?)).output().context("cannot run mount")?;
        ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr).trim());
        let (device, files) = (Arc::new(device), Arc::new(files));
        let server = thread::Builder::new().name("fuse".into()).spawn(move || serve(&device, &files))?;
        Ok(Self { directory: directory.to_owned(), server: Some(server) })
    }

    /// One of its files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
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

fn serve(device: &Arc<File>, files: &Arc<Files>) {
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
                thread::spawn(move || answer(&device, &files, &request));
            }
            _ => answer(&device, &files, &request),
        }
    }
}

/// Answers a request; those that want none (forget, interrupt) get none.
fn answer(device: &File, files: &Files, request: &Request) {
    let answered = match request.opcode {
        2 | 36 | 42 => return,
        1 => lookup(files, request),
        3 => attributes(files, request.node).map(|bytes| [vec![0; 16], bytes].concat()),
        14 | 27 => Ok(opened()),
        15 => read(files, request),
        16 => write(files, request),
        17 => Ok(vec![0; 80]),
        20 => files.image.sync_data().map(|()| Vec::new()).map_err(|_| EIO),
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
fn lookup(files: &Files, request: &Request) -> Result<Vec<u8>, i32> {
    let name = request.body.split(|byte| *byte == 0).next().unwrap_or_default();
    let node = match name {
        b"disk" => DISK,
        b"source" => SOURCE,
        b"target" => TARGET,
        _ => return Err(ENOENT),
    };
    let mut out = node.to_ne_bytes().to_vec();
    out.resize(40, 0);
    out.extend(attributes(files, node)?);
    Ok(out)
}

/// `fuse_attr`.
fn attributes(files: &Files, node: u64) -> Result<Vec<u8>, i32> {
    let (size, mode) = match node {
        ROOT => (0, 0o40755u32),
        DISK => (files.image.metadata().map_err(|_| EIO)?.len(), 0o100_644),
        SOURCE | TARGET => (0, 0o100_644),
        _ => return Err(ENOENT),
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
fn read(files: &Files, request: &Request) -> Result<Vec<u8>, i32> {
    if request.node != DISK {
        return Ok(Vec::new());
    }
    let (place, bytes) = (u64_at(&request.body, 8), u32_at(&request.body, 16));
    let mut data = vec![0; usize_of(u64::from(bytes))];
    let verdict = files.weather.on_read(request.process);
    let mut there = 0;
    while there < data.len() {
        match files.image.read_at(&mut data[there..], place + u64_of(there)) {
            Ok(0) => break,
            Ok(more) => there += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(EIO),
        }
    }
    data.truncate(there);
    match verdict {
        Verdict::Good => {}
        Verdict::Error => return Err(EIO),
        Verdict::Garbled => data.iter_mut().skip(there / 2).for_each(|byte| *byte ^= 0xa5),
        Verdict::Short => data.truncate(there / 2 / 512 * 512),
    }
    Ok(data)
}

/// `fuse_write_in`: the file's handle, the place, the length; 40 bytes, the data behind them.
fn write(files: &Files, request: &Request) -> Result<Vec<u8>, i32> {
    let (place, bytes) = (u64_at(&request.body, 8), u32_at(&request.body, 16));
    let data = request.body.get(40..).unwrap_or_default();
    match request.node {
        DISK if files.weather.on_write() => files.image.write_all_at(data, place).map_err(|_| EIO)?,
        SOURCE => files.source.hear(data, &files.weather),
        TARGET => files.target.hear(data, &files.weather),
        _ => return Err(EIO),
    }
    let mut out = bytes.to_ne_bytes().to_vec();
    out.resize(8, 0);
    Ok(out)
}

/// The thread group that a thread belongs to: requests name threads.
pub(crate) fn process_of(thread: u32) -> Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    match status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok()) {
        Some(process) => Ok(process),
        None => bail!("/proc/{thread}/status has no Tgid"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weather::Trouble;

    fn mounted(directory: &Path) -> Result<(Fuse, Arc<Weather>, Arc<Ear>)> {
        let path = directory.join("image");
        std::fs::write(&path, vec![7; 1 << 20])?;
        let image = OpenOptions::new().read(true).write(true).open(path)?;
        let (weather, source) = (Arc::<Weather>::default(), Arc::<Ear>::default());
        let files = Files {
            image,
            weather: Arc::clone(&weather),
            source: Arc::clone(&source),
            target: Arc::default(),
        };
        Ok((Fuse::mount(&directory.join("mnt"), files)?, weather, source))
    }

    #[test]
    fn the_disk_reads_and_fails_as_it_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let (fuse, weather, _) = match mounted(directory.path()) {
            Ok(mounted) => mounted,
            Err(why) => return eprintln!("SKIPPED: no file system in user space here: {why:#}"),
        };
        let mut options = OpenOptions::new();
        let disk = options.read(true).write(true).open(fuse.path("disk")).expect("it opens");
        let mut block = [0; 4096];
        disk.read_exact_at(&mut block, 8192).expect("it reads");
        assert_eq!(block, [7; 4096]);
        disk.write_all_at(&[9; 4096], 8192).expect("it writes");
        weather.becomes(Trouble::Errors);
        assert_eq!(disk.read_at(&mut block, 8192).expect_err("an error").raw_os_error(), Some(EIO));
        weather.becomes(Trouble::Torn { processes: vec![std::process::id()] });
        let mut odd = 0;
        for _ in 0..2 {
            let bytes = disk.read_at(&mut block, 8192).expect("it reads");
            odd += u32::from(bytes < 4096 || block != [9; 4096]);
        }
        assert_eq!(odd, 2);
        weather.becomes(Trouble::Torn { processes: vec![1] });
        disk.read_exact_at(&mut block, 8192).expect("others read what stands there");
        assert_eq!(block, [9; 4096]);
    }

    #[test]
    fn who_writes_an_event_is_held_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let (fuse, _, ear) = match mounted(directory.path()) {
            Ok(mounted) => mounted,
            Err(why) => return eprintln!("SKIPPED: no file system in user space here: {why:#}"),
        };
        ear.hold_at(|line| line["phase"] == "commit");
        let mut out = OpenOptions::new().write(true).open(fuse.path("source")).expect("it opens");
        let writer = thread::spawn(move || {
            out.write_all(b"{\"phase\":\"arm\"}\n{\"pha").expect("it writes");
            out.write_all(b"se\":\"commit\"}\n").expect("it writes");
        });
        let held = ear.until_held(std::time::Duration::from_secs(20)).expect("it is held");
        assert_eq!(held["phase"], "commit");
        assert!(!writer.is_finished());
        ear.release();
        writer.join().expect("it goes on");
        assert_eq!(ear.lines().len(), 2);
    }
}
