//! The process libxl has started: holds the control pipes, starts the worker, and passes on what the two say.
//!
//! ```text
//!   libxl == fd 0, 1 == front ---- socket ---- worker == stream, hypervisor
//!         <- messages --        <- messages --
//!         -- answers ->         -- notes: answers, cancel ->
//! ```
//!
//! - SIGTERM, SIGINT or SIGHUP, or libxl's death: the worker is told to cancel; it puts everything back and says so.
//!   A save then ends as one that failed; a restore dies of the signal, as the stock helper does, but only behind the
//!   worker.
//! - The worker's death without a word: what it has left behind is put back here, and libxl is told.
//! - The last message is passed on when the worker has gone: libxl goes on as soon as it has that, and nothing may
//!   be mapped any more. Unless the worker says that it goes on: then pages are outstanding, and what it has mapped is meant to
//!   outlive the domain.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::arguments::{Invocation, Job};
use super::engine::Engine;
use super::messages::{COMPLETE, GOES_ON, Level, Message, Note, Passed};
use super::{ENDING, PROGRAM, WORKER_ARGUMENT, errno_of};
use crate::abi::{Scheduling, process};

/// How long a worker may take to put everything back before it is killed.
const CANCEL_MAX: Duration = Duration::from_secs(30);

/// Does what libxl wants done; the exit code is for libxl.
pub(crate) fn run(engine: &dyn Engine, invocation: &Invocation, arguments: &[OsString]) -> ExitCode {
    let share = match invocation.job {
        Job::Save { .. } => engine.share(invocation.domain),
        Job::Restore { .. } => None,
    };
    match Front::start(invocation, arguments) {
        Ok(front) => front.serve(engine, invocation, share),
        Err(error) => {
            let text =
                format!("cannot start a worker: {error}. Is /proc mounted, and is there room for a process?");
            log(Level::Error, &text);
            finish(invocation, &failed(&error))
        }
    }
}

fn failed(error: &io::Error) -> Message<'static> {
    Message::Complete { retval: -1, errno: error.raw_os_error().unwrap_or(errno_of(rustix::io::Errno::IO)) }
}

/// A line for libxl's log, in the program's own name. If libxl is gone nobody reads it.
fn log(level: Level, text: &str) {
    let _ = to_libxl(&Message::Log { level, errno: None, context: PROGRAM, text }.encode());
}

fn to_libxl(mut bytes: &[u8]) -> io::Result<()> {
    let out = io::stdout();
    while !bytes.is_empty() {
        match rustix::io::write(&out, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// libxl's answer; none if it is gone. Read past any buffer, since libxl may write more than one.
fn from_libxl() -> Option<i32> {
    let input = io::stdin();
    let mut bytes = [0; 4];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::read(&input, &mut bytes[done..]) {
            Ok(0) => return None,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(i32::from_ne_bytes(bytes))
}

/// Says the last words and waits for the answer; restores have results in front of them, failed ones too.
fn finish(invocation: &Invocation, complete: &Message<'_>) -> ExitCode {
    if let Job::Restore { .. } = invocation.job {
        let _ = to_libxl(&Message::RestoreResults { store: 0, console: 0 }.encode());
    }
    say_last(&complete.encode())
}

fn say_last(complete: &[u8]) -> ExitCode {
    match to_libxl(complete).map(|()| from_libxl()) {
        Ok(Some(_)) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

struct Front {
    worker: Child,
    socket: UnixStream,
    woken: UnixStream,
    signal: Arc<AtomicUsize>,
    /// libxl owes an answer.
    asked: bool,
    libxl_gone: bool,
    cancelled: Option<Instant>,
    complete: Option<Vec<u8>>,
    /// The worker ends later.
    goes_on: bool,
}

impl Front {
    fn start(invocation: &Invocation, arguments: &[OsString]) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        let signal = Arc::new(AtomicUsize::new(0));
        for number in ENDING {
            let value = usize::try_from(number).unwrap_or_default();
            signal_hook::flag::register_usize(number, Arc::clone(&signal), value)?;
            signal_hook::low_level::pipe::register(number, wake.try_clone()?)?;
        }
        process::unblock(&ENDING)?;
        // The worker's end is to get through exec, and only it.
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)?;
        rustix::io::fcntl_setfd(&ours, FdFlags::CLOEXEC)?;
        log(Level::Debug, &format!("starting {}", invocation.job.name()));
        let worker = Command::new("/proc/self/exe")
            .arg0(PROGRAM)
            .arg(WORKER_ARGUMENT)
            .arg(theirs.as_raw_fd().to_string())
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let socket = UnixStream::from(ours);
        Ok(Self {
            worker,
            socket,
            woken,
            signal,
            asked: false,
            libxl_gone: false,
            cancelled: None,
            complete: None,
            goes_on: false,
        })
    }

    /// `share` is the guest's share of the processors before the worker began.
    fn serve(mut self, engine: &dyn Engine, invocation: &Invocation, share: Option<Scheduling>) -> ExitCode {
        while self.step() {}
        let complete = match self.complete.take() {
            // Nothing of it stands in libxl's way: what it still has of the domain is meant to outlive this.
            Some(complete) if self.goes_on => complete,
            Some(complete) => {
                // It has said all it had to say.
                let _ = self.worker.wait();
                complete
            }
            None => {
                let status = self.worker.wait();
                self.worker_died(engine, invocation, share, status)
            }
        };
        let signal = i32::try_from(self.signal.load(Ordering::SeqCst)).unwrap_or_default();
        if signal != 0 && matches!(invocation.job, Job::Restore { .. }) {
            // As the stock helper, which has no handler for it; libxl expects the one it has sent.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        if self.libxl_gone { ExitCode::FAILURE } else { say_last(&complete) }
    }

    /// Waits for something to happen and deals with it; false when the worker is gone.
    fn step(&mut self) -> bool {
        let ready = self.wait();
        if self.signal.load(Ordering::SeqCst) != 0 {
            self.cancel();
        }
        if self.cancelled.is_some_and(|since| since.elapsed() > CANCEL_MAX) {
            log(Level::Error, "the worker does not end; it is killed");
            let _ = self.worker.kill();
        }
        if ready.libxl {
            self.answer();
        }
        !ready.worker || self.pass_on()
    }

    fn wait(&self) -> Ready {
        let (input, socket, woken) = (io::stdin(), self.socket.as_fd(), self.woken.as_fd());
        // Hang-up is told even where nothing is asked for.
        let wanted = if self.asked { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(&socket, PollFlags::IN),
            PollFd::new(&woken, PollFlags::IN),
            PollFd::new(&input, wanted),
        ];
        let count = if self.libxl_gone { 2 } else { 3 };
        let left = self.cancelled.map(|since| CANCEL_MAX.saturating_sub(since.elapsed()));
        let timeout = left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        // Interrupted: the signal has set its flag.
        if poll(&mut fds[..count], timeout.as_ref()).is_err() {
            return Ready::default();
        }
        let [worker, signalled, libxl] = fds.map(|fd| !fd.revents().is_empty());
        if signalled {
            let _ = rustix::io::read(self.woken.as_fd(), &mut [0u8; 16]);
        }
        Ready { worker, libxl: libxl && !self.libxl_gone }
    }

    /// Tells the worker to cancel, once.
    fn cancel(&mut self) {
        if self.cancelled.is_none() {
            self.cancelled = Some(Instant::now());
            // A worker that is gone needs no telling.
            let _ = Note::Cancel.write(&mut self.socket);
        }
    }

    /// libxl has answered, or is gone.
    fn answer(&mut self) {
        match self.asked.then(from_libxl).flatten() {
            Some(value) => {
                self.asked = false;
                let _ = Note::Answer(value).write(&mut self.socket);
            }
            None => self.without_libxl(),
        }
    }

    /// Nobody is left to answer: the worker is told so by the end of the socket.
    fn without_libxl(&mut self) {
        self.libxl_gone = true;
        self.cancel();
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Passes a message on; false at the end of the worker's.
    fn pass_on(&mut self) -> bool {
        match Passed::read(&mut self.socket) {
            Ok(Some(message)) if message.number == COMPLETE => self.complete = Some(message.bytes),
            Ok(Some(message)) if message.number == GOES_ON => self.goes_on = true,
            Ok(Some(message)) if !self.libxl_gone => {
                self.asked |= message.is_answered();
                if to_libxl(&message.bytes).is_err() {
                    self.without_libxl();
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return false,
        }
        true
    }

    /// The worker has ended without a word: puts back what it may have left, and says what libxl is to be told.
    fn worker_died(
        &self,
        engine: &dyn Engine,
        invocation: &Invocation,
        share: Option<Scheduling>,
        status: io::Result<ExitStatus>,
    ) -> Vec<u8> {
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        log(Level::Error, &format!("the worker has ended unexpectedly ({how})"));
        if let Job::Save { .. } = invocation.job
            && let Err(failure) = engine.put_back(invocation.domain, share)
        {
            log(Level::Error, &failure.message);
        } else if let Job::Restore { .. } = invocation.job
            && !self.libxl_gone
        {
            let _ = to_libxl(&Message::RestoreResults { store: 0, console: 0 }.encode());
        }
        let errno = errno_of(rustix::io::Errno::IO);
        Message::Complete { retval: -1, errno }.encode()
    }
}

/// Who has something to say.
#[derive(Default)]
struct Ready {
    worker: bool,
    libxl: bool,
}
