//! Storage on the link that guests are moved over: a file at the source's end, read and written from the target's end by a
//! few connections of their own, and shown here as a file that both ends open (FUSE, past the page cache).
//!
//! ```text
//!   namespace "source"                  namespace "target"
//!   the file <- server ===== link ===== connections <- /dev/fuse <- DIR/disk.img <- guests, engines
//! ```
//! So what the target loads shares the direction and the rate of what the source sends, as where a host has one network card
//! for both. What a guest reads while it is still on the source comes the same way: the link has nobody else to charge it to.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use mover::net::lab::{End, Lab};
use mover::units::{u64_of, usize_of};

use crate::fuse::{EIO, Files, Fuse};

/// The file's name.
const NAME: &str = "disk.img";
/// Its number.
const FILE: u64 = 2;
/// Requests under way at a time, each on a connection of its own.
const CONNECTIONS: usize = 16;
/// How long a request may wait for a connection: on a link that is full, each takes its time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a request: what, where, how many.
const REQUEST: usize = 16;

/// The storage. Dropping it unmounts.
pub struct Nas {
    fuse: Fuse,
}

impl Nas {
    /// Serves `image` over the link of `lab`, and shows it in `directory`, which is made.
    ///
    /// # Errors
    /// Without root or `/dev/fuse`.
    pub fn mount(lab: &Lab, image: &Path, directory: &Path) -> Result<Self> {
        let open = || File::options().read(true).write(true).open(image);
        let file = open().with_context(|| format!("cannot open {}", image.display()))?;
        let bytes = file.metadata()?.len();
        let listener =
            lab.inside(End::Source, || TcpListener::bind(SocketAddr::from((End::Source.address(), 0))))??;
        let address = listener.local_addr()?;
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let near = lab.inside(End::Target, || TcpStream::connect(address))??;
            let (far, _) = listener.accept()?;
            for end in [&near, &far] {
                end.set_nodelay(true)?;
            }
            let file = file.try_clone()?;
            // Ends when the other side hangs up.
            thread::Builder::new().name("nas".to_owned()).spawn(move || serve(&file, far))?;
            connections.push(near);
        }
        let shown = Shown { bytes, connections: Mutex::new(connections), returned: Condvar::new() };
        Ok(Self { fuse: Fuse::mount(directory, shown)? })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.fuse.path(NAME)
    }
}

/// Answers requests: the bytes read, or nothing behind what was written. An error of the file ends the connection, which
/// those who wait for it take for one.
fn serve(file: &File, mut stream: TcpStream) -> Option<()> {
    let mut data = Vec::new();
    loop {
        let mut request = [0; REQUEST];
        stream.read_exact(&mut request).ok()?;
        let (place, what) = request.split_at(8);
        let place = u64::from_le_bytes(place.try_into().ok()?);
        let what = u64::from_le_bytes(what.try_into().ok()?);
        data.resize(usize_of(what / 2), 0);
        if what.is_multiple_of(2) {
            file.read_exact_at(&mut data, place).ok()?;
            stream.write_all(&data).ok()?;
        } else {
            stream.read_exact(&mut data).ok()?;
            file.write_all_at(&data, place).ok()?;
            stream.write_all(&[1]).ok()?;
        }
    }
}

/// The file system of one file.
struct Shown {
    bytes: u64,
    connections: Mutex<Vec<TcpStream>>,
    returned: Condvar,
}

impl Shown {
    /// Has a connection do something, when one is free; one that failed is not used again.
    fn over<T>(&self, work: impl FnOnce(&mut TcpStream) -> io::Result<T>) -> Result<T, i32> {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.returned.wait_timeout_while(connections, PATIENCE, |free| free.is_empty());
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut stream = free.pop().ok_or(EIO)?;
        drop(free);
        let done = work(&mut stream).map_err(|_| EIO)?;
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        self.returned.notify_one();
        Ok(done)
    }
}

fn request(place: u64, bytes: usize, writes: bool) -> [u8; REQUEST] {
    let mut out = [0; REQUEST];
    let (front, back) = out.split_at_mut(8);
    front.copy_from_slice(&place.to_le_bytes());
    back.copy_from_slice(&(u64_of(bytes) * 2 + u64::from(writes)).to_le_bytes());
    out
}

impl Files for Shown {
    fn node(&self, name: &[u8]) -> Option<u64> {
        (name == NAME.as_bytes()).then_some(FILE)
    }

    fn bytes(&self, node: u64) -> Option<u64> {
        (node == FILE).then_some(self.bytes)
    }

    fn read(&self, _: u64, _: u32, place: u64, bytes: usize) -> Result<Vec<u8>, i32> {
        let bytes = bytes.min(usize_of(self.bytes.saturating_sub(place)));
        self.over(|stream| {
            let mut data = vec![0; bytes];
            stream.write_all(&request(place, bytes, false))?;
            stream.read_exact(&mut data)?;
            Ok(data)
        })
    }

    fn write(&self, _: u64, place: u64, data: &[u8]) -> Result<(), i32> {
        if place + u64_of(data.len()) > self.bytes {
            // It stays as long as it is.
            return Err(EIO);
        }
        self.over(|stream| {
            stream.write_all(&request(place, data.len(), true))?;
            stream.write_all(data)?;
            stream.read_exact(&mut [0])
        })
    }

    fn flush(&self) -> Result<(), i32> {
        // Every write was answered by the server, whose host does not fail here.
        Ok(())
    }
}
