//! The worker's half of a standby, and what is said between the two.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::memory::Mapping;
use mover::pipeline::table::PageTable;
use mover::units::{PAGE_BYTES, PageCount, u64_of};
use mover::wire::control::Shape;
use mover::wire::hello::Secret;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::io::{FdFlags, dup, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use zeroize::Zeroizing;

use super::{ARGUMENT, TERMS_BYTES_MAX, Terms};
use crate::abi::DomainId;
use crate::stream::Offer;

/// How long the standby may take to map the ring: the guest does not run yet, and the source waits.
const MAPPED_WITHIN: Duration = Duration::from_secs(10);
/// What it says then; anything else is a sentence.
const MAPPED: u8 = 1;
/// What says that the guest is the worker's alone to serve from here on.
const ARMED: u8 = 2;

/// The standby, as its worker has it.
#[derive(Debug)]
pub struct Guard {
    process: Mutex<Option<Child>>,
    socket: UnixStream,
    table: Arc<Mapping>,
    /// What is told of the source, until the session is known too.
    told: Mutex<Option<(Offer, Shape)>>,
    /// The hypervisor's port.
    port: u32,
    /// Why the terms have not been handed over.
    missing: Mutex<Option<String>>,
}

/// Memory for the table of a guest with so many pages, which nobody can make shorter.
pub(crate) fn make_table(pages: u64) -> io::Result<OwnedFd> {
    let bytes = PageTable::bytes(PageCount(pages)).next_multiple_of(PAGE_BYTES);
    let file = memfd_create("pageferry-table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, u64_of(bytes))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

impl Guard {
    /// Starts one for `domain`, whose ring is at `frame` and rings `port`.
    ///
    /// # Errors
    /// A sentence about why nobody takes over.
    pub(crate) fn start(domain: DomainId, frame: u64, pages: u64, port: u32) -> Result<Self, String> {
        let failed = |error: io::Error| format!("it could not be started: {error}");
        let file = make_table(pages).map_err(failed)?;
        let table = map_table(&file, pages).map_err(failed)?;
        let socket = Self::pair().map_err(failed)?;
        let this = Self::over(socket.0, table, port);
        let process = Self::spawn(&socket.1, &file, [domain.0.into(), frame, pages]).map_err(failed)?;
        *this.process() = Some(process);
        drop(socket.1);
        this.hear_mapped()?;
        Ok(this)
    }

    /// Over this socket and table, whoever is at the other end.
    pub(crate) fn over(socket: UnixStream, table: Arc<Mapping>, port: u32) -> Self {
        let (process, told, missing) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { process, socket, table, told, port, missing }
    }

    /// Of one end each, the other one to get through exec.
    fn pair() -> io::Result<(UnixStream, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)?;
        fcntl_setfd(&ours, FdFlags::CLOEXEC)?;
        Ok((UnixStream::from(ours), theirs))
    }

    fn spawn(socket: &OwnedFd, table: &OwnedFd, numbers: [u64; 3]) -> io::Result<Child> {
        // Copies get through exec.
        let (table, us) = (dup(table)?, dup(&pidfd_open(getpid(), PidfdFlags::empty())?)?);
        Command::new("/proc/self/exe")
            .arg0(std::env::args_os().next().unwrap_or_default())
            .arg(ARGUMENT)
            .args([socket, &table, &us].map(|descriptor| descriptor.as_raw_fd().to_string()))
            .args(numbers.map(|number| number.to_string()))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear_mapped(&self) -> Result<(), String> {
        let failed = |error: io::Error| format!("it does not say whether it has the ring: {error}");
        self.socket.set_read_timeout(Some(MAPPED_WITHIN)).map_err(failed)?;
        let mut said = [0; 1];
        (&self.socket).read_exact(&mut said).map_err(failed)?;
        if said == [MAPPED] {
            return Ok(());
        }
        let mut sentence = Vec::from(said);
        let _ = (&self.socket).take(1024).read_to_end(&mut sentence);
        Err(String::from_utf8_lossy(&sentence).into_owned())
    }

    /// Where the engine's table of pages is to be.
    pub(crate) fn table(&self) -> Arc<Mapping> {
        Arc::clone(&self.table)
    }

    /// Notes what the source has told.
    pub(crate) fn told(&self, offer: &Offer, shape: &Shape) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some((offer.clone(), shape.clone()));
    }

    /// Hands over what is needed to go on. Whether that has worked, [`Self::arm`] says.
    pub(crate) fn hand_over(&self, session: &Secret) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).take();
        let missing = match told {
            None => Some("it has not been told of the source".to_owned()),
            Some((offer, shape)) => {
                let terms = Terms::encode(self.port, session, &offer, &shape);
                let length = u32::try_from(terms.len()).unwrap_or(u32::MAX).to_le_bytes();
                let sent = (&self.socket).write_all(&length).and_then(|()| (&self.socket).write_all(&terms));
                sent.err().map(|error| format!("it can't be told of the migration: {error}"))
            }
        };
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = missing;
    }

    /// From here on it takes over if this process ends before it is dismissed.
    ///
    /// # Errors
    /// A sentence about why it does not.
    pub(crate) fn arm(&self) -> Result<(), String> {
        if let Some(why) = self.missing.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(why);
        }
        (&self.socket).write_all(&[ARMED]).map_err(|error| format!("it has ended: {error}"))
    }

    /// It is needed no more.
    pub(crate) fn dismiss(&self) {
        if let Some(mut process) = self.process().take() {
            // It takes over when this process has ended, which it has not: whatever it is doing, it is waiting.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.dismiss();
    }
}

/// The table of a guest with so many pages, which the worker has made.
pub(crate) fn map_table(table: &OwnedFd, pages: u64) -> io::Result<Arc<Mapping>> {
    let bytes = PageTable::bytes(PageCount(pages)).next_multiple_of(PAGE_BYTES);
    if u64::try_from(fstat(table)?.st_size).ok() != Some(u64_of(bytes)) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the table is another guest's"));
    }
    Mapping::shared(table.as_fd(), bytes, false).map(Arc::new)
}

/// Says at the standby's end of `socket` that it has the ring, or why not.
pub(crate) fn say_mapped(mut socket: &UnixStream, failed: Option<&io::Error>) -> io::Result<()> {
    match failed {
        None => socket.write_all(&[MAPPED]),
        Some(error) => socket.write_all(format!("it can't have the ring: {error}").as_bytes()),
    }
}

/// The terms, waiting for them; none if there is nothing to take over.
pub(crate) fn take_terms(mut socket: &UnixStream) -> Option<Terms> {
    let mut length = [0; 4];
    socket.read_exact(&mut length).ok()?;
    let length =
        usize::try_from(u32::from_le_bytes(length)).ok().filter(|length| *length <= TERMS_BYTES_MAX)?;
    let mut bytes = Zeroizing::new(vec![0; length]);
    socket.read_exact(&mut bytes).ok()?;
    Terms::decode(&bytes)
}

/// Waits until it is armed; whether it has been.
pub(crate) fn wait_armed(mut socket: &UnixStream) -> bool {
    let mut said = [0; 1];
    socket.read_exact(&mut said).is_ok() && said == [ARMED]
}
