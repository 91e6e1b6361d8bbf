//! The process that does the work: in a session of its own, with the stream and a socket to the front, without capabilities
//! (`crate::confine`), and with nothing else of what the front was started with.
//!
//! ```text
//!   main thread       the engine; asks through the session and waits for answers
//!   control thread    reads notes from the front: answers go to the session; "cancel", the end of the socket
//!                     and signals to end set `stop` and interrupt the main thread until it is through
//! ```
//!
//! The front's death, by `kill -9` included, is the end of the socket. Invariant: whatever ends the worker short of
//! `kill -9`, the engine returns first.
#![forbid(unsafe_code)]

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Signal, getpid, kill_process, setsid};

use super::arguments::{Invocation, Job};
use super::engine::{Engine, Failure, Outcome};
use super::lingering;
use super::messages::{Level, Message, Note};
use super::session::Session;
use super::{ENDING, PROGRAM, errno_of};
use crate::abi::process;
use crate::confine;

/// Between two attempts to interrupt a call that waits. One may come just before the call.
const INTERRUPT_EVERY: Duration = Duration::from_millis(20);

/// Does the job; tells the front how it ended.
pub(crate) fn run(engine: &dyn Engine, socket: RawFd, invocation: Invocation) -> ExitCode {
    let Ok([socket, io]) = process::take_over([socket, invocation.io_fd]) else {
        // Nobody to tell it to: this was not started by a front.
        return ExitCode::from(2);
    };
    // Fails where it leads its session already, which is as good.
    let _ = setsid();
    let kept = confine::worker();
    let socket = UnixStream::from(socket);
    match prepare(socket, invocation) {
        Ok((mut session, stop, over)) => {
            kept.iter().for_each(|what| session.log(Level::Warning, what));
            let result = guarded(engine, &invocation, &io, &mut session, &stop);
            let left = session.take_left().filter(|_| result.is_ok());
            let noted = session.take_noted();
            if let Some(left) = &left {
                // Before libxl hears that the guest is restored, and lets it run: it is never without who serves it.
                let alone = left.arm();
                alone.iter().for_each(|why| session.log(Level::Warning, why));
                let _ = session.tell(&Message::GoesOn);
            }
            end(&mut session, &invocation, &result, stop.load(Ordering::SeqCst));
            // The front takes the end of the socket for the end of the conversation; the stream is libxl's alone from here on.
            over.store(true, Ordering::SeqCst);
            session.hang_up();
            drop((session, io));
            if let Some(left) = left {
                lingering::finish(left, invocation.domain, noted, &["pages are outstanding".to_owned()]);
            }
            ExitCode::SUCCESS
        }
        Err(()) => ExitCode::FAILURE,
    }
}

/// The conversation, what stops the engine, and what ends the control thread.
type Prepared = (Session, Arc<AtomicBool>, Arc<AtomicBool>);

/// Signals, the control thread, and the conversation. What fails here leaves the front without a worker, which it
/// reports.
fn prepare(socket: UnixStream, invocation: Invocation) -> Result<Prepared, ()> {
    let stop = Arc::new(AtomicBool::new(false));
    let (wake, woken) = UnixStream::pair().map_err(drop)?;
    for signal in ENDING {
        let wake = wake.try_clone().map_err(drop)?;
        signal_hook::low_level::pipe::register(signal, wake).map_err(drop)?;
    }
    process::interrupt_by(signal_hook::consts::SIGUSR1).map_err(drop)?;
    let (answer, answers) = mpsc::channel();
    let notes = socket.try_clone().map_err(drop)?;
    let over = Arc::new(AtomicBool::new(false));
    let (stopping, ended) = (Arc::clone(&stop), Arc::clone(&over));
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control(notes, &woken, answer, &stopping, &ended))
        .map_err(drop)?;
    Ok((Session::new(invocation, socket, answers), stop, over))
}

/// Runs the engine; a panic is a failure like another, told to libxl.
fn guarded(
    engine: &dyn Engine,
    invocation: &Invocation,
    io: &OwnedFd,
    session: &mut Session,
    stop: &AtomicBool,
) -> Result<Outcome, Failure> {
    let attempt = AssertUnwindSafe(|| engine.run(invocation, io.as_fd(), session, stop));
    catch_unwind(attempt).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<String>().map(String::as_str);
        let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        let message = format!("internal error: {what}. Please report it; the guest is left as it was");
        Err(Failure { errno: errno_of(rustix::io::Errno::IO), message })
    })
}

/// Says how it ended. Who is not there any more to hear it has ended this by going.
fn end(session: &mut Session, invocation: &Invocation, result: &Result<Outcome, Failure>, cancelled: bool) {
    let (retval, errno) = match result {
        Ok(_) => (0, 0),
        Err(failure) => {
            let level = if cancelled { Level::Notice } else { Level::Error };
            session.log(level, &failure.message);
            (-1, failure.errno)
        }
    };
    if let Job::Restore { .. } = invocation.job {
        let Outcome { store, console } = result.as_ref().copied().unwrap_or_default();
        let _ = session.tell(&Message::RestoreResults { store, console });
    }
    let text = format!("complete r={retval}");
    let errno_told = (errno != 0).then_some(errno);
    let _ =
        session.tell(&Message::Log { level: Level::Debug, errno: errno_told, context: PROGRAM, text: &text });
    let _ = session.tell(&Message::Complete { retval, errno });
}

/// The control thread; ends with the process, or when the conversation is over.
fn control(
    mut notes: UnixStream,
    woken: &UnixStream,
    answer: Sender<i32>,
    stop: &AtomicBool,
    over: &AtomicBool,
) {
    let mut answer = Some(answer);
    while !over.load(Ordering::SeqCst) {
        let timeout = stop.load(Ordering::SeqCst).then_some(INTERRUPT_EVERY);
        let timeout = timeout.and_then(|time| rustix::event::Timespec::try_from(time).ok());
        let watched = PollFlags::IN;
        let notes_fd = notes.as_fd();
        let mut fds = [PollFd::new(woken, watched), PollFd::new(&notes_fd, watched)];
        // Once the front is gone there is nothing to read from it.
        let count = if answer.is_some() { 2 } else { 1 };
        let ready = poll(&mut fds[..count], timeout.as_ref()).unwrap_or(0) > 0;
        let [signalled, noted] = fds.map(|fd| ready && !fd.revents().is_empty());
        if over.load(Ordering::SeqCst) {
            return;
        }
        if signalled {
            let _ = (&*woken).read(&mut [0; 16]);
            stop.store(true, Ordering::SeqCst);
        }
        if noted {
            match Note::read(&mut notes) {
                Ok(Some(Note::Answer(value))) => {
                    let _ = answer.as_ref().map(|answer| answer.send(value));
                }
                Ok(Some(Note::Cancel)) => stop.store(true, Ordering::SeqCst),
                Ok(None) | Err(_) => {
                    // Whoever waits for an answer is told that none will come.
                    answer = None;
                    stop.store(true, Ordering::SeqCst);
                }
            }
        }
        if stop.load(Ordering::SeqCst) {
            // The kernel gives a process's signal to its main thread, where that can take it.
            let _ = kill_process(getpid(), Signal::USR1);
        }
    }
}
