//! The control connection on either end: handshakes, sending, and a task that receives messages into a queue, so that
//! the control task waits in one place for messages, lanes and time alike.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::error::{Error, ExitClass, NetError};
use crate::limits::CONTROL_MESSAGE_BYTES_MAX;
use crate::net::{Connection, Dialer, HangUp, Receiver, Sender};
use crate::runtime::{Placement, Runtime, Task};
use crate::wire::control::{HEADER_BYTES, Message};
use crate::wire::hello::{HELLO_BYTES, Hello, Verdict, Welcome};

/// Messages received and not yet looked at; a peer that sends more waits.
const QUEUE: usize = 256;
/// How long the reason for a broken link is waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a full queue is left alone.
const PAUSE: Duration = Duration::from_millis(1);

/// Dials, says `hello`, and returns the connection if it is welcome.
pub fn open(dialer: &dyn Dialer, hello: &Hello, patience: Duration) -> Result<(Connection, Welcome), Error> {
    let mut connection = dialer.call(hello, patience)?;
    connection.receiver.set_patience(Some(patience));
    let mut answer = [0; HELLO_BYTES];
    connection.receiver.recv(&mut answer)?;
    let welcome = Welcome::decode(&answer)?;
    let reason = match welcome.verdict {
        Verdict::Welcome => return Ok((connection, welcome)),
        Verdict::WrongToken => {
            "the token is wrong, already used or expired. Copy it again from the `pageferry receive` that is waiting now"
        }
        Verdict::Busy => "it is receiving another guest. Start a second `pageferry receive` on another port",
        Verdict::Version => "no common protocol version. Update the older end",
        Verdict::NoSession => "it knows no such migration. Was `pageferry receive` restarted in between?",
    };
    Err(Error::Peer { reason: reason.into(), class: ExitClass::Peer })
}

/// Sends one message; returns its bytes.
pub fn send(sender: &mut dyn Sender, message: &Message) -> Result<u64, Error> {
    let bytes = message.encode();
    sender.send(&bytes, &[])?;
    Ok(crate::units::u64_of(bytes.len()))
}

/// The error that an abort of the peer's stands for.
#[must_use]
pub fn aborted(class: ExitClass, reason: String) -> Error {
    match class {
        ExitClass::Cancelled => Error::Cancelled { by: "by the other end" },
        class => Error::Peer { reason, class },
    }
}

/// Looks at a message before it is queued; `None` means that it has been dealt with.
pub type Divert = Box<dyn FnMut(Message) -> Option<Message> + Send>;

struct Shared {
    messages: ArrayQueue<Message>,
    lost: AtomicBool,
    error: Mutex<Option<Error>>,
}

/// Messages as they come in.
pub struct Mail {
    shared: Arc<Shared>,
    task: Option<Box<dyn Task>>,
}

impl Mail {
    /// Starts receiving. `ring` is called after everything that happens. When no more can come in, the connection is
    /// hung up: a send that is blocked on it would notice much later, and who dials again would wait for that.
    #[must_use]
    pub fn start(
        runtime: &Arc<dyn Runtime>,
        receiver: Box<dyn Receiver>,
        hang_up: Arc<dyn HangUp>,
        mut divert: Divert,
        ring: Box<dyn Fn() + Send>,
    ) -> Self {
        let messages = ArrayQueue::new(QUEUE);
        let shared = Arc::new(Shared { messages, lost: AtomicBool::new(false), error: Mutex::new(None) });
        let (theirs, pause) = (Arc::clone(&shared), Arc::clone(runtime));
        let body = Box::new(move || {
            let mut inbox = Inbox { receiver, body: vec![0; CONTROL_MESSAGE_BYTES_MAX] };
            let error = loop {
                match inbox.next() {
                    Ok(message) => {
                        let mut waiting = divert(message);
                        while let Some(message) = waiting.take() {
                            if theirs.lost.load(SeqCst) {
                                break;
                            }
                            if let Err(message) = theirs.messages.push(message) {
                                waiting = Some(message);
                                pause.sleep(PAUSE);
                            }
                        }
                        ring();
                    }
                    Err(error) => break error,
                }
            };
            theirs.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            theirs.lost.store(true, SeqCst);
            hang_up.hang_up();
            ring();
        });
        Self { shared, task: Some(runtime.spawn("pf-control", Placement::Any, body)) }
    }

    /// The reason for a failed send: where it failed because nothing came in any more, that is it.
    #[must_use]
    pub fn explain(&self, error: Error) -> Error {
        match error {
            Error::Net(NetError::HungUp) if self.shared.lost.load(SeqCst) => self.why_lost(),
            error => error,
        }
    }

    /// The next message that has come in, if any.
    #[must_use]
    pub fn next(&self) -> Option<Message> {
        self.shared.messages.pop()
    }

    /// Whether no more messages can come in and all that came have been taken.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.shared.lost.load(SeqCst) && self.shared.messages.is_empty()
    }

    /// Why; asked once.
    #[must_use]
    pub fn why_lost(&self) -> Error {
        let error = self.shared.error.lock().unwrap_or_else(PoisonError::into_inner).take();
        error.unwrap_or(Error::Net(NetError::HungUp))
    }

    /// The reason the peer gave for ending it, where the link has failed under us and what it said last may still be
    /// on its way: waits a moment for it.
    #[must_use]
    pub fn last_words(&self, runtime: &dyn Runtime) -> Option<Error> {
        self.look_for(runtime, |message| match message {
            Message::Abort(class, reason) => Some(aborted(class, reason)),
            _ => None,
        })
    }

    /// Whether the peer has said that it is through, where the link has failed under us: in the same way. It hangs up behind that,
    /// which a send may notice before the receiving task has been listened to.
    #[must_use]
    pub fn said_finished(&self, runtime: &dyn Runtime) -> bool {
        self.look_for(runtime, |message| matches!(message, Message::Finished).then_some(())).is_some()
    }

    fn look_for<T>(&self, runtime: &dyn Runtime, is_it: impl Fn(Message) -> Option<T>) -> Option<T> {
        let patience = runtime.now().plus(LAST_WORDS);
        loop {
            if let Some(found) = std::iter::from_fn(|| self.next()).find_map(&is_it) {
                return Some(found);
            }
            if self.is_lost() || runtime.now() >= patience {
                return None;
            }
            runtime.sleep(PAUSE);
        }
    }

    /// Waits for the receiving task, whose connection has been hung up.
    pub fn end(&mut self) -> Result<(), Error> {
        self.shared.lost.store(true, SeqCst);
        let Some(task) = self.task.take() else { return Ok(()) };
        task.join().map_err(|what| Error::Panicked { task: "control".into(), what })
    }
}

struct Inbox {
    receiver: Box<dyn Receiver>,
    body: Vec<u8>,
}

impl Inbox {
    fn next(&mut self) -> Result<Message, Error> {
        let mut header = [0; HEADER_BYTES];
        self.receiver.recv(&mut header)?;
        let (kind, length) = Message::header(&header)?;
        self.receiver.recv(&mut self.body[..length])?;
        Ok(Message::decode(kind, &self.body[..length])?)
    }
}
