//! The guest process's side of the control socket: a thread a connection, every request under one lock on the
//! guest's [`Life`], which holds the rules.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::client::{GuestClient, read_state, state_file};
use super::config::GuestConfig;
use super::control::{Attached, FaultFd, Phase, Reply, Request, Role};
use super::life::{Grant, Life};
use super::machine::Machine;
use super::packet::{self, PacketError};
use crate::error::GuestError;
use crate::kernel::uffd::{self, Reach};
use crate::limits::STATE_BYTES_MAX;
use crate::units::usize_of;

/// How long who comes to attach waits for an engine that has hung up to be noticed to have gone, and how often it looks.
const GONE_WITHIN: Duration = Duration::from_secs(5);
const GONE_STEP: Duration = Duration::from_millis(2);
/// How often the accepting thread looks whether the guest is to end.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A guest's name, as long as it has it: the files that stand for it. Given back once, since the next guest of that name may
/// come at once, and these files are that one's then.
struct Name {
    socket: PathBuf,
    /// What it has said; none where that is not a file of ours.
    log: Option<PathBuf>,
    given_back: AtomicBool,
}

impl Name {
    /// Another guest may have it; whether it was this one's until now.
    fn give_back(&self) -> bool {
        let first = !self.given_back.swap(true, Ordering::SeqCst);
        if first {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.socket);
        }
        first
    }

    /// As [`Self::give_back`], of a guest that ends as it was asked to: nothing in its log is worth keeping.
    fn give_back_with_log(&self) {
        if let (true, Some(log)) = (self.give_back(), &self.log) {
            let _ = std::fs::remove_file(log);
        }
    }
}

/// A bound control socket; its file is removed when this is dropped, unless its name was given back before.
pub(super) struct Socket {
    listener: OwnedFd,
    name: Arc<Name>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.name.give_back();
    }
}

impl Socket {
    /// Binds the control socket at `path`, of a guest whose standard error is `log`. A socket nobody listens at is replaced.
    pub(super) fn bind(path: &Path, log: Option<PathBuf>) -> Result<Self, GuestError> {
        let failed = |source: io::Error| GuestError::Os {
            doing: format!("cannot make the guest's control socket {}", path.display()),
            remedy: "Its directory must exist and be writable, its path shorter than 108 bytes",
            source,
        };
        if path.exists() {
            if GuestClient::connect(path).is_ok() {
                return Err(GuestError::State(format!(
                    "a guest is already running with its control socket at {}. Choose another name, or end that one",
                    path.display()
                )));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|e| failed(e.into()))?;
        rustix::net::bind(&listener, &address).map_err(|e| failed(e.into()))?;
        let name = Name { socket: path.to_owned(), log, given_back: AtomicBool::new(false) };
        let socket = Self { listener, name: Arc::new(name) };
        rustix::net::listen(&socket.listener, 16).map_err(|e| failed(e.into()))?;
        Ok(socket)
    }
}

struct Rules {
    life: Life,
    /// Our end of the connection that attached last.
    engine: Option<OwnedFd>,
    /// Our own copy of a target's userfaultfd, until no page is held back.
    kept_fault_fd: Option<OwnedFd>,
    /// What a target has put by for the next one, and its length; as long.
    keepsake: Option<(OwnedFd, u64)>,
}

impl Rules {
    /// Whether the engine that has the guest has hung up, and the thread that answers it has not come to that yet.
    fn engine_is_leaving(&self) -> bool {
        let Some(engine) = self.engine.as_ref().filter(|_| self.life.migration().is_some()) else {
            return false;
        };
        let mut poll = [PollFd::new(engine, PollFlags::empty())];
        let seen = rustix::event::poll(&mut poll, Some(&Timespec::default()));
        seen.is_ok() && poll[0].revents().contains(PollFlags::HUP)
    }
}

/// Serves one guest's control connections.
pub(super) struct Server {
    config: GuestConfig,
    machine: Machine,
    name: Arc<Name>,
    rules: Mutex<Rules>,
    ending: AtomicBool,
}

impl Server {
    /// Of a guest that is booted, or incoming, and answers at `socket`.
    pub(super) fn new(config: GuestConfig, machine: Machine, socket: &Socket) -> Arc<Self> {
        let phase = if config.incoming { Phase::Incoming } else { Phase::Running };
        let rules =
            Mutex::new(Rules { life: Life::new(phase), engine: None, kept_fault_fd: None, keepsake: None });
        let name = Arc::clone(&socket.name);
        Arc::new(Self { config, machine, name, rules, ending: AtomicBool::new(false) })
    }

    /// Whether pages are held back from the guest.
    pub(super) fn holding(&self) -> bool {
        self.rules().life.holding()
    }
    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Accepts connections until the guest is to end: by request, because its engine is gone, or because `stop` is
    /// set.
    pub(super) fn serve(self: &Arc<Self>, socket: &Socket, stop: &AtomicBool) -> Result<(), GuestError> {
        let failed = |e: rustix::io::Errno| GuestError::Os {
            doing: format!("cannot accept connections at {}", socket.name.socket.display()),
            remedy: "Raise the limit of open files (ulimit -n)",
            source: e.into(),
        };
        let born = Instant::now();
        let mut connections = 0u64;
        while !self.ending.load(Ordering::SeqCst) && !stop.load(Ordering::SeqCst) {
            let mut poll = [PollFd::new(&socket.listener, PollFlags::IN)];
            let wait = Timespec::try_from(LOOK_EVERY).ok();
            match rustix::event::poll(&mut poll, wait.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {
                    if self.nobody_came(born) {
                        return Err(GuestError::State(format!(
                            "no migration has come for guest {} in time, so it ends",
                            self.config.name
                        )));
                    }
                    continue;
                }
                Ok(_) => {}
                Err(e) => return Err(failed(e)),
            }
            let connection = match rustix::net::accept_with(&socket.listener, SocketFlags::CLOEXEC) {
                Ok(connection) => connection,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {
                    continue;
                }
                Err(e) => return Err(failed(e)),
            };
            connections += 1;
            let (server, number) = (Arc::clone(self), connections);
            let spawned = std::thread::Builder::new()
                .name(format!("control-{number}"))
                .stack_size(256 * 1024)
                .spawn(move || server.converse(number, &connection));
            if let Err(e) = spawned {
                // The connection is dropped with the closure: its other side sees it close.
                eprintln!("guest {}: no thread for a control connection: {e}", self.config.name);
            }
        }
        self.name.give_back_with_log();
        Ok(())
    }

    fn nobody_came(&self, born: Instant) -> bool {
        let rules = self.rules();
        rules.life.phase() == Phase::Incoming
            && rules.life.migration().is_none()
            && self.config.attach_within_seconds.is_some_and(|s| born.elapsed() > Duration::from_secs(s))
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        // A panic under the lock left the rules as they were before that request: they are changed last.
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rules, for who is refused while an engine has the guest: one that has ended does not stand in the way, however late the thread
    /// that answers it comes to hear of it.
    fn rules_for_the_next(&self) -> MutexGuard<'_, Rules> {
        let give_up = Instant::now() + GONE_WITHIN;
        loop {
            let rules = self.rules();
            if !rules.engine_is_leaving() || Instant::now() >= give_up {
                return rules;
            }
            drop(rules);
            std::thread::sleep(GONE_STEP);
        }
    }

    /// Answers one connection until it ends.
    fn converse(&self, number: u64, connection: &OwnedFd) {
        let socket = connection.as_fd();
        loop {
            match packet::receive::<Request>(socket) {
                Ok(Some((request, fds))) => {
                    if self.answer(number, socket, &request, &fds).is_err() {
                        break;
                    }
                }
                Ok(None) | Err(PacketError::Io(_)) => break,
                Err(PacketError::Garbage(sentence)) => {
                    // The other side may be gone already; the connection ends either way.
                    let _ = packet::send(socket, &Reply::Failed { sentence }, &[]);
                    break;
                }
            }
        }
        let mut rules = self.rules();
        let ends = rules.life.lost(number, &mut &self.machine);
        if rules.life.migration().is_none() {
            rules.engine = None;
        }
        if ends {
            self.name.give_back_with_log();
            self.ending.store(true, Ordering::SeqCst);
        }
    }

    fn answer(
        &self,
        number: u64,
        socket: BorrowedFd<'_>,
        request: &Request,
        fds: &[OwnedFd],
    ) -> io::Result<()> {
        let refuse = |sentence| packet::send(socket, &Reply::Failed { sentence }, &[]);
        if matches!(request, Request::Check) {
            let (phase, holding) = {
                let rules = self.rules();
                (rules.life.phase(), rules.life.holding())
            };
            if !matches!(phase, Phase::Running | Phase::Paused | Phase::Released) {
                return refuse(format!("this guest is {phase}: there is nothing to check yet"));
            }
            self.machine.check_all(holding);
        }
        if matches!(request, Request::Status | Request::Check) {
            return packet::send(socket, &self.status(), &[]);
        }
        if matches!(request, Request::Keep { .. }) && fds.is_empty() {
            return refuse("Keep came without its memory file".to_owned());
        }
        let state = match state_of(request, fds) {
            Ok(state) => state,
            Err(sentence) => return refuse(sentence),
        };
        let mut rules = match request {
            Request::Attach { .. } | Request::Destroy => self.rules_for_the_next(),
            _ => self.rules(),
        };
        match rules.life.handle(number, request, &state, &mut &self.machine) {
            Err(sentence) => refuse(sentence),
            Ok(Grant::Attached { again }) => {
                rules.engine = Some(socket.try_clone_to_owned()?);
                self.attached(&mut rules, request, again, socket)
            }
            Ok(Grant::State(state)) => match state_file(&state) {
                Ok(file) => {
                    let bytes = crate::units::u64_of(state.len());
                    packet::send(socket, &Reply::State { bytes }, &[file.as_fd()])
                }
                Err(e) => refuse(format!("cannot make a memory file for the state: {e}. Free some memory")),
            },
            Ok(Grant::Done) => {
                if !rules.life.holding() && matches!(request, Request::HoldsDone | Request::Start { .. }) {
                    rules.kept_fault_fd = None;
                    rules.keepsake = None;
                }
                if let (Request::Keep { bytes }, Some(file)) = (request, fds.first()) {
                    rules.keepsake = Some((file.try_clone()?, *bytes));
                }
                packet::send(socket, &Reply::Done, &[])
            }
            Ok(Grant::End) => {
                self.machine.halt();
                // Before the answer: who has it may have the guest come back under its name.
                self.name.give_back_with_log();
                self.ending.store(true, Ordering::SeqCst);
                packet::send(socket, &Reply::Done, &[])
            }
        }
    }

    fn status(&self) -> Reply {
        let rules = self.rules();
        let life = &rules.life;
        Reply::Status(Box::new(self.machine.status(life.phase(), life.migration(), life.holding())))
    }

    fn attached(
        &self,
        rules: &mut Rules,
        request: &Request,
        again: bool,
        socket: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let (fault_fd, file) = if again {
            let copy = rules.kept_fault_fd.as_ref().map(OwnedFd::try_clone).transpose()?;
            let absent = FaultFd::Absent { why: "it was absent when the migration began".to_owned() };
            (if copy.is_some() { FaultFd::Full } else { absent }, copy)
        } else {
            open_fault_fd()
        };
        if matches!(request, Request::Attach { role: Role::Target, .. }) && !again {
            rules.kept_fault_fd = file.as_ref().map(OwnedFd::try_clone).transpose()?;
        }
        let pagemap = std::fs::File::open("/proc/self/pagemap")?;
        let reply = Reply::Attached(Attached {
            guest: self.config.name.clone(),
            memory_bytes: self.machine.memory_bytes(),
            base_address: self.machine.base_address(),
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            disks: self.machine.disks().to_vec(),
            fault_fd,
            phase: rules.life.phase(),
            kept_bytes: rules.keepsake.as_ref().filter(|_| again).map(|kept| kept.1),
        });
        let [memory, writes, gate] = self.machine.files();
        let mut fds = vec![memory, pagemap.as_fd(), writes, gate];
        fds.extend(file.as_ref().map(AsFd::as_fd));
        fds.extend(rules.keepsake.as_ref().filter(|_| again).map(|kept| kept.0.as_fd()));
        packet::send(socket, &reply, &fds)
    }
}

fn open_fault_fd() -> (FaultFd, Option<OwnedFd>) {
    match uffd::open() {
        Ok((fd, Reach::Everything)) => (FaultFd::Full, Some(fd)),
        Ok((fd, Reach::UserOnly)) => (FaultFd::UserModeOnly, Some(fd)),
        Err(e) => {
            let why = format!(
                "the kernel refuses a userfaultfd ({e}). It needs CONFIG_USERFAULTFD and a sandbox that lets it through"
            );
            (FaultFd::Absent { why }, None)
        }
    }
}

/// The state that came with `LoadState`; nothing for other requests.
fn state_of(request: &Request, fds: &[OwnedFd]) -> Result<Vec<u8>, String> {
    let Request::LoadState { bytes } = request else { return Ok(Vec::new()) };
    let bytes = usize_of(*bytes);
    let Some(file) = fds.first() else { return Err("LoadState came without its memory file".to_owned()) };
    if bytes > STATE_BYTES_MAX {
        return Err(format!("a state of {bytes} bytes is over the limit of {STATE_BYTES_MAX}"));
    }
    read_state(file, bytes).map_err(|e| format!("cannot read the state's memory file: {e}"))
}
