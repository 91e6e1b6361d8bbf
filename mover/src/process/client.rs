//! The engine's and the tools' side of the control socket.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::control::{Attached, FaultFd, Reply, Request, Role, Status};
use super::packet::{self, PacketError};
use super::shared::{SharedGate, SharedWriteLog};
use crate::error::GuestError;
use crate::limits::STATE_BYTES_MAX;
use crate::units::{u64_of, usize_of};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long checking all of memory may take.
const CHECK_PATIENCE: Duration = Duration::from_secs(600);

/// A connection to a guest process. Dropping it ends the attachment, with the consequences that
/// [`super::control`] lists.
#[derive(Debug)]
pub struct GuestClient {
    socket: OwnedFd,
    path: PathBuf,
}

/// What an attached engine holds of a guest.
#[derive(Debug)]
pub struct Attachment {
    /// The guest's description.
    pub info: Attached,
    /// Its memory, `info.memory_bytes` long.
    pub memory: OwnedFd,
    /// `/proc/PID/pagemap` of the guest process, opened by it.
    pub pagemap: OwnedFd,
    /// The log of disk writes.
    pub writes: OwnedFd,
    /// The gate before the disks.
    pub gate: OwnedFd,
    /// A userfaultfd of the guest process, or why there is none.
    pub fault_fd: Result<OwnedFd, String>,
    /// What an earlier target had the guest keep ([`GuestClient::keep`]).
    pub kept: Option<Vec<u8>>,
}

impl Attachment {
    /// Sizes of the disks in bytes, in their order.
    #[must_use]
    pub fn disk_bytes(&self) -> Vec<u64> {
        self.info.disks.iter().map(|disk| disk.bytes).collect()
    }
    /// The log of disk writes, mapped.
    ///
    /// # Errors
    /// What the kernel says to the mapping.
    pub fn write_log(&self) -> Result<SharedWriteLog, GuestError> {
        SharedWriteLog::open(self.writes.as_fd(), &self.disk_bytes())
            .map_err(|e| cannot_map("disk-write log", e))
    }
    /// The gate, mapped.
    ///
    /// # Errors
    /// What the kernel says to the mapping.
    pub fn write_gate(&self) -> Result<SharedGate, GuestError> {
        SharedGate::open(self.gate.as_fd(), &self.disk_bytes()).map_err(|e| cannot_map("write gate", e))
    }
}

fn cannot_map(what: &str, source: io::Error) -> GuestError {
    GuestError::Os {
        doing: format!("cannot map the guest's {what}"),
        remedy: "Is there memory left, and is the guest of this version of pageferry?",
        source,
    }
}

impl GuestClient {
    /// Connects to the guest process whose control socket is at `path`.
    ///
    /// # Errors
    /// No guest there: a sentence that names the path.
    pub fn connect(path: &Path) -> Result<Self, GuestError> {
        let failed = |source: io::Error| GuestError::Os {
            doing: format!("cannot reach a guest at {}", path.display()),
            remedy: "Is it running, and is that its control socket? `pageferry guest list` shows the guests here",
            source,
        };
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|e| failed(e.into()))?;
        rustix::net::connect(&socket, &address).map_err(|e| failed(e.into()))?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Attaches as one end of `migration`.
    ///
    /// # Errors
    /// Another engine is attached, the guest is not in a phase for that role, or the socket failed.
    pub fn attach(&self, role: Role, migration: &str) -> Result<Attachment, GuestError> {
        let (reply, fds) =
            self.ask(&Request::Attach { role, migration: migration.to_owned() }, &[], PATIENCE)?;
        let Reply::Attached(info) = reply else { return Err(self.astray(&reply)) };
        let mut fds = fds.into_iter();
        let mut next = || {
            fds.next().ok_or_else(|| {
                GuestError::State(format!("the guest at {} sent too few descriptors", self.path.display()))
            })
        };
        let (memory, pagemap, writes, gate) = (next()?, next()?, next()?, next()?);
        let fault_fd = match &info.fault_fd {
            FaultFd::Absent { why } => Err(why.clone()),
            FaultFd::Full | FaultFd::UserModeOnly => Ok(next()?),
        };
        let kept = match info.kept_bytes.map(usize_of) {
            Some(bytes) if bytes > STATE_BYTES_MAX => {
                return Err(GuestError::State(format!(
                    "what the guest has kept, {bytes} bytes, is over the limit"
                )));
            }
            Some(bytes) => Some(read_state(&next()?, bytes).map_err(|e| self.broken(e))?),
            None => None,
        };
        Ok(Attachment { info, memory, pagemap, writes, gate, fault_fd, kept })
    }

    /// Has the guest keep these bytes for a target that attaches again while pages are held back.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn keep(&self, keepsake: &[u8]) -> Result<(), GuestError> {
        let file = state_file(keepsake).map_err(|e| self.broken(e))?;
        match self.ask(&Request::Keep { bytes: u64_of(keepsake.len()) }, &[&file], PATIENCE)?.0 {
            Reply::Done => Ok(()),
            other => Err(self.astray(&other)),
        }
    }

    /// Stops the vCPUs; when it returns, neither memory nor disk changes.
    ///
    /// # Errors
    /// Like every request: refused by the guest with a sentence, or the socket failed.
    pub fn pause(&self) -> Result<(), GuestError> {
        self.done(&Request::Pause)
    }
    /// Lets the paused guest go on.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn resume(&self) -> Result<(), GuestError> {
        self.done(&Request::Resume)
    }
    /// The paused guest's state outside memory.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn save_state(&self) -> Result<Vec<u8>, GuestError> {
        let (reply, fds) = self.ask(&Request::SaveState, &[], PATIENCE)?;
        let (Reply::State { bytes }, Some(file)) = (&reply, fds.first()) else {
            return Err(self.astray(&reply));
        };
        let bytes = usize_of(*bytes);
        if bytes > STATE_BYTES_MAX {
            return Err(GuestError::State(format!("the guest's state of {bytes} bytes is over the limit")));
        }
        read_state(file, bytes).map_err(|e| self.broken(e))
    }
    /// Gives the incoming guest its state outside memory.
    ///
    /// # Errors
    /// As for [`Self::pause`]; a state the guest does not understand.
    pub fn load_state(&self, state: &[u8]) -> Result<(), GuestError> {
        let file = state_file(state).map_err(|e| self.broken(e))?;
        let request = Request::LoadState { bytes: u64_of(state.len()) };
        match self.ask(&request, &[&file], PATIENCE)?.0 {
            Reply::Done => Ok(()),
            other => Err(self.astray(&other)),
        }
    }
    /// Starts the loaded guest; when it returns, its vCPUs are going. `holding` says whether pages are held back
    /// through the userfaultfd: [`Self::holds_done`] must follow once none is.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn start(&self, holding: bool) -> Result<(), GuestError> {
        self.done(&Request::Start { holding })
    }
    /// Ends a started guest at once.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn stop(&self) -> Result<(), GuestError> {
        self.done(&Request::Stop)
    }
    /// Slows the guest to `percent` of its rates.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.done(&Request::Throttle { percent })
    }
    /// Gives the paused guest up.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn release(&self) -> Result<(), GuestError> {
        self.done(&Request::Release)
    }
    /// Takes the released guest back, still paused.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn reclaim(&self) -> Result<(), GuestError> {
        self.done(&Request::Reclaim)
    }
    /// Ends the guest process.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn destroy(&self) -> Result<(), GuestError> {
        self.done(&Request::Destroy)
    }
    /// Tells the guest that no page is held back any more.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn holds_done(&self) -> Result<(), GuestError> {
        self.done(&Request::HoldsDone)
    }
    /// How the guest is. Needs no attachment.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn status(&self) -> Result<Status, GuestError> {
        self.status_by(&Request::Status, PATIENCE)
    }
    /// Has the guest check all its pages, and how it is then. Needs no attachment; seconds on a large guest.
    ///
    /// # Errors
    /// As for [`Self::pause`].
    pub fn check(&self) -> Result<Status, GuestError> {
        self.status_by(&Request::Check, CHECK_PATIENCE)
    }

    fn status_by(&self, request: &Request, patience: Duration) -> Result<Status, GuestError> {
        match self.ask(request, &[], patience)?.0 {
            Reply::Status(status) => Ok(*status),
            other => Err(self.astray(&other)),
        }
    }

    fn done(&self, request: &Request) -> Result<(), GuestError> {
        match self.ask(request, &[], PATIENCE)?.0 {
            Reply::Done => Ok(()),
            other => Err(self.astray(&other)),
        }
    }

    fn ask(
        &self,
        request: &Request,
        fds: &[&OwnedFd],
        patience: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), GuestError> {
        rustix::net::sockopt::set_socket_timeout(
            &self.socket,
            rustix::net::sockopt::Timeout::Recv,
            Some(patience),
        )
        .map_err(|e| self.broken(e.into()))?;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        packet::send(self.socket.as_fd(), request, &fds).map_err(|e| self.broken(e))?;
        match packet::receive(self.socket.as_fd()) {
            Ok(Some((Reply::Failed { sentence }, _))) => Err(GuestError::State(sentence)),
            Ok(Some(packet)) => Ok(packet),
            Ok(None) => Err(GuestError::State(format!(
                "the guest at {} has ended. Its standard error or log says why",
                self.path.display()
            ))),
            Err(PacketError::Io(e)) => Err(self.broken(e)),
            Err(PacketError::Garbage(why)) => Err(GuestError::State(why)),
        }
    }

    fn broken(&self, source: io::Error) -> GuestError {
        GuestError::Os {
            doing: format!("the guest at {} does not answer", self.path.display()),
            remedy: "Is its process still there, and not stopped?",
            source,
        }
    }

    fn astray(&self, reply: &Reply) -> GuestError {
        GuestError::State(format!(
            "the guest at {} gave an answer out of place: {reply:?}",
            self.path.display()
        ))
    }
}

/// A memory file with `state` in it.
pub(super) fn state_file(state: &[u8]) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("pageferry-state", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut at = 0;
    while at < state.len() {
        at += rustix::io::pwrite(&file, &state[at..], u64_of(at))?;
    }
    Ok(file)
}

/// `bytes` bytes of state from a memory file.
pub(super) fn read_state(file: &OwnedFd, bytes: usize) -> io::Result<Vec<u8>> {
    let mut state = vec![0; bytes];
    let mut at = 0;
    while at < bytes {
        match rustix::io::pread(file, &mut state[at..], u64_of(at))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => at += n,
        }
    }
    Ok(state)
}
