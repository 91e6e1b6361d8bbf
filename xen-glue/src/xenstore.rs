//! Reads xenstore, over the daemon's socket or the kernel's device.
//!
//! ```text
//!   request, answer:  type u32 | request u32 | transaction u32 | length u32 | that many bytes
//! ```
//! Source: `xen/include/public/io/xs_wire.h` and `docs/misc/xenstore.txt` of Xen; integers are in the host's order.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Where the daemon listens.
const SOCKET: &str = "/var/run/xenstored/socket";
/// The way to a daemon that is no process of this domain's.
const DEVICE: &str = "/dev/xen/xenbus";
/// `XS_DIRECTORY`.
const DIRECTORY: u32 = 1;
/// `XS_READ`.
const READ: u32 = 2;
/// `XS_WATCH_EVENT`, which nobody here asks for.
const WATCH_EVENT: u32 = 15;
/// `XS_ERROR`: the bytes are an error's name.
const ERROR: u32 = 16;
/// `XENSTORE_PAYLOAD_MAX`.
const PAYLOAD_MAX: usize = 4096;
/// `XENSTORE_ABS_PATH_MAX`.
const PATH_MAX: usize = 3072;
/// How long the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Both directions of a connection.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connection to xenstore.
pub struct Xenstore {
    stream: Box<dyn Stream>,
    request: u32,
}

impl std::fmt::Debug for Xenstore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xenstore").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Xenstore {
    /// Opens one.
    ///
    /// # Errors
    /// There is no xenstore here.
    pub fn open() -> io::Result<Self> {
        Self::at(Path::new(SOCKET)).or_else(|_| {
            let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
            Ok(Self { stream: Box::new(device), request: 0 })
        })
    }

    /// Over the socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn at(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream: Box::new(stream), request: 0 })
    }

    /// Over a connection that somebody else has made.
    #[must_use]
    pub fn over(stream: impl Read + Write + 'static) -> Self {
        Self { stream: Box::new(stream), request: 0 }
    }

    /// What stands at `path`; none if nothing does.
    ///
    /// # Errors
    /// Xenstore does not answer, or refuses.
    pub fn read(&mut self, path: &str) -> io::Result<Option<String>> {
        let Some(bytes) = self.ask(READ, path)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|_| invalid(path, "is no text"))
    }

    /// The names below `path`; none if there are none.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn list(&mut self, path: &str) -> io::Result<Vec<String>> {
        let bytes = self.ask(DIRECTORY, path)?.unwrap_or_default();
        let text = String::from_utf8(bytes).map_err(|_| invalid(path, "has names that are no text"))?;
        Ok(text.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
    }

    fn ask(&mut self, kind: u32, path: &str) -> io::Result<Option<Vec<u8>>> {
        if path.len() >= PATH_MAX || path.contains('\0') {
            return Err(invalid(path, "is no path"));
        }
        self.request = self.request.wrapping_add(1);
        let length = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let mut message: Vec<u8> =
            [kind, self.request, 0, length].iter().flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(path.as_bytes());
        message.push(0);
        // In one piece: the device takes no message apart.
        self.stream.write_all(&message)?;
        loop {
            let (found, request, bytes) = self.message()?;
            match found {
                WATCH_EVENT => {}
                _ if request != self.request => return Err(invalid(path, "got another question's answer")),
                ERROR if bytes == b"ENOENT\0" => return Ok(None),
                ERROR => {
                    let name = String::from_utf8_lossy(&bytes);
                    return Err(io::Error::other(format!(
                        "xenstore says {} of {path}",
                        name.trim_end_matches('\0')
                    )));
                }
                _ if found == kind => return Ok(Some(bytes)),
                _ => return Err(invalid(path, "got an answer of another kind")),
            }
        }
    }

    fn message(&mut self) -> io::Result<(u32, u32, Vec<u8>)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&head[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        let length = usize::try_from(word(12)).unwrap_or(usize::MAX);
        if length > PAYLOAD_MAX {
            return Err(invalid("an answer", "is longer than xenstore's can be"));
        }
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok((word(0), word(4), bytes))
    }
}

fn invalid(what: &str, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} {why}"))
}

/// A daemon made up for tests.
#[cfg(test)]
pub(crate) mod made_up {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::net::UnixListener;

    /// Serves `tree` at `path` to one client, until that goes.
    pub(crate) fn serve(path: &Path, tree: &[(&str, &str)]) {
        let tree: BTreeMap<String, String> =
            tree.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 16];
            while stream.read_exact(&mut head).is_ok() {
                let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
                let mut path = vec![0; usize::try_from(word(12)).unwrap()];
                stream.read_exact(&mut path).unwrap();
                let path = String::from_utf8(path).unwrap().trim_end_matches('\0').to_owned();
                let (kind, payload) = answer(&tree, word(0), &path);
                let length = u32::try_from(payload.len()).unwrap();
                // Something nobody asked for comes in between.
                for word in [WATCH_EVENT, 0, 0, 4, 0x61, kind, word(4), 0, length] {
                    stream.write_all(&word.to_ne_bytes()).unwrap();
                }
                stream.write_all(&payload).unwrap();
            }
        });
    }

    fn answer(tree: &BTreeMap<String, String>, kind: u32, path: &str) -> (u32, Vec<u8>) {
        let below = format!("{path}/");
        let mut names: Vec<&str> = tree
            .keys()
            .filter_map(|key| key.strip_prefix(&below))
            .filter_map(|rest| rest.split('/').next())
            .collect();
        names.dedup();
        match (kind, tree.get(path)) {
            (READ, Some(value)) if value == "forbidden" => (ERROR, b"EACCES\0".to_vec()),
            (READ, Some(value)) => (READ, value.clone().into_bytes()),
            (DIRECTORY, _) if !names.is_empty() => {
                (DIRECTORY, names.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect())
            }
            _ => (ERROR, b"ENOENT\0".to_vec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_there_is_read_and_what_does_not_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        made_up::serve(&path, &[("/a/b", "one"), ("/a/c/d", "two"), ("/a/x", "forbidden")]);
        let mut store = Xenstore::at(&path).unwrap();
        assert_eq!(store.read("/a/b").unwrap().as_deref(), Some("one"));
        assert_eq!(store.read("/a/none").unwrap(), None);
        assert_eq!(store.list("/a").unwrap(), ["b", "c", "x"]);
        assert_eq!(store.list("/nowhere").unwrap(), [""; 0]);
        let error = store.read("/a/x").unwrap_err();
        assert!(error.to_string().contains("EACCES of /a/x"), "{error}");
        assert!(store.read("/a\0b").is_err() && store.read(&"/".repeat(4000)).is_err());
        assert_eq!(store.read("/a/c/d").unwrap().as_deref(), Some("two"), "an error ends nothing");
    }
}
