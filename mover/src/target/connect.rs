//! The handshake: who may come in, for what, and what is made for them.
//!
//! What comes here has said its Hello, 64 bytes; the acceptor has seen to it that many can do so at once and that none
//! is waited for. One that has no right to come in is closed, and nothing of it is kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use zeroize::zeroize_stack;

use crate::error::Error;
use crate::guest::Session;
use crate::journal::Journal;
use crate::limits::LANES_MAX;
use crate::net::{Acceptor, Caller, Connection};
use crate::pipeline::control;
use crate::report::Event;
use crate::runtime::{Bell, Runtime};
use crate::source::Surroundings;
use crate::target::{Config, Host, Parts};
use crate::wire::control::{HEADER_BYTES, Message, Shape};
use crate::wire::hello::{HELLO_BYTES, Hello, MigrationId, Purpose, Secret, Verdict, Welcome};

/// How long to wait in accept before looking whether someone has cancelled.
const GLANCE: Duration = Duration::from_millis(50);
/// More of the stack than greeting somebody takes.
const SPENT_STACK_BYTES: usize = 64 * 1024;
/// While nobody is expected: how often strangers are looked at, and how many of them. They cost a running migration no
/// more than that, however many knock; the others wait in the kernel's queue, or are dropped from it.
const STRANGERS_AT_ONCE: usize = 16;

/// A source that has shown its token and told the guest's shape.
pub(super) struct Arrival {
    /// `None` where an engine takes over and waits for the source to come in again.
    pub(super) connection: Option<Connection>,
    pub(super) door: Arc<Door>,
    pub(super) acceptor: Box<dyn Acceptor>,
    pub(super) shape: Shape,
    pub(super) host: Host,
    pub(super) journal: Box<dyn Journal>,
}

/// Waits for the source with the token. `None` if cancelled meanwhile.
pub(super) fn arrive(parts: Parts, config: &Config, around: &Surroundings) -> Result<Option<Arrival>, Error> {
    let Parts { mut acceptor, token, host, journal } = parts;
    let runtime = &around.runtime;
    let greeted = greeted(&mut *acceptor, &token, config, around);
    // It is spent, or nobody came. What hashing and comparing it has left on this stack goes with it.
    drop(token);
    zeroize_stack::<SPENT_STACK_BYTES>();
    let Some((mut connection, migration, version)) = greeted? else { return Ok(None) };
    let session = Secret::made(|place| runtime.random(place));
    let door = Arc::new(Door::new(migration, session));
    let welcome = Welcome {
        version,
        oldest: crate::wire::VERSION_OLDEST,
        verdict: Verdict::Welcome,
        secret: door.session.clone(),
    };
    connection.sender.send(&welcome.encode(), &[])?;
    connection.receiver.set_patience(Some(config.patience));
    let refused = |connection: &mut Connection, error: Error| {
        // The error itself is what counts; telling it is a courtesy to the other end.
        let _ = control::send(&mut *connection.sender, &Message::Abort(error.class(), error.to_string()));
        error
    };
    let shape = match first_message(&mut connection) {
        Ok(shape) => shape,
        Err(error) => return Err(refused(&mut connection, error)),
    };
    let made = host(&shape).and_then(|host| Ok((host, journal(migration, &shape, &connection.peer)?)));
    match made {
        Ok((host, journal)) => {
            let connection = Some(connection);
            Ok(Some(Arrival { connection, door, acceptor, shape, host, journal }))
        }
        Err(error) => Err(refused(&mut connection, error)),
    }
}

/// Waits for the source that shows `token`: which migration is its, and the version both speak. A function of its own, never a
/// part of its caller's: what it leaves on the stack lies where the caller overwrites it.
#[inline(never)]
fn greeted(
    acceptor: &mut dyn Acceptor,
    token: &Secret,
    config: &Config,
    around: &Surroundings,
) -> Result<Option<(Connection, MigrationId, u16)>, Error> {
    let runtime = &around.runtime;
    let give_up = config.wait.map(|wait| runtime.now().plus(wait));
    loop {
        if around.cancel.asked() {
            return Ok(None);
        }
        if give_up.is_some_and(|moment| runtime.now() >= moment) {
            let seconds = config.wait.unwrap_or_default().as_secs();
            let doing = "a source was waited for";
            return Err(crate::error::NetError::Stalled { peer: "the network".into(), seconds, doing }.into());
        }
        let caller = acceptor.caller(token, GLANCE)?;
        tell_turned_away(acceptor, around);
        let Some(Caller { mut connection, hello }) = caller else { continue };
        match greet(&mut connection, &hello, token) {
            Ok(hello) => {
                let version = hello.common_version().unwrap_or(crate::wire::VERSION_NEWEST);
                return Ok(Some((connection, hello.migration, version)));
            }
            Err(why) => notice(around, format!("turned away {}: {why}", connection.peer)),
        }
    }
}

fn notice(around: &Surroundings, text: String) {
    around.observer.event(Event::Notice { at_ms: 0.0, text });
}

/// Tells of those who did not come as far as a Hello.
fn tell_turned_away(acceptor: &mut dyn Acceptor, around: &Surroundings) {
    if let Some(text) = acceptor.turned_away() {
        notice(around, text);
    }
}

/// Judges a connection's Hello; a refusal is answered.
fn greet(connection: &mut Connection, hello: &[u8; HELLO_BYTES], token: &Secret) -> Result<Hello, String> {
    // Who does not speak the protocol gets no answer.
    let hello = Hello::decode(hello).map_err(|e| e.to_string())?;
    let verdict = match hello.purpose {
        _ if hello.common_version().is_none() => Verdict::Version,
        Purpose::Control if hello.secret.same(token) => return Ok(hello),
        Purpose::Control => Verdict::WrongToken,
        Purpose::Lane(_) | Purpose::Resume => Verdict::NoSession,
    };
    Err(refuse(connection, verdict))
}

fn refuse(connection: &mut Connection, verdict: Verdict) -> String {
    let answer = match connection.sender.send(&Welcome::refuse(verdict).encode(), &[]) {
        Ok(()) => String::new(),
        Err(e) => format!(" ({e})"),
    };
    let why = match verdict {
        Verdict::WrongToken => "wrong token",
        Verdict::Busy => "a guest is being received already",
        Verdict::Version => "no common protocol version",
        Verdict::NoSession | Verdict::Welcome => "no such session",
    };
    format!("{why}{answer}")
}

fn first_message(connection: &mut Connection) -> Result<Shape, Error> {
    let mut header = [0; HEADER_BYTES];
    connection.receiver.recv(&mut header)?;
    let (kind, length) = Message::header(&header)?;
    let mut body = vec![0; length];
    connection.receiver.recv(&mut body)?;
    match Message::decode(kind, &body)? {
        Message::Shape(shape) => Ok(shape),
        other => {
            Err(crate::error::WireError::OutOfOrder { message: other.name(), phase: "the handshake" }.into())
        }
    }
}

/// Who else may come in while one guest is being received: lanes, and the source again after a cut.
pub(super) struct Door {
    migration: MigrationId,
    session: Secret,
    /// Lanes that may come in, one bit each; a bit is cleared when its lane does.
    lanes: AtomicU32,
    /// Whether the source may come in again.
    resumable: AtomicBool,
    /// Lanes that have come in.
    pub(super) new_lanes: ArrayQueue<(u8, Connection)>,
    /// A control connection that has come in again.
    pub(super) resumed: ArrayQueue<Connection>,
    /// Set to close the door.
    pub(super) closed: AtomicBool,
    /// Rung when somebody is expected.
    expected: Bell,
}

impl Door {
    pub(super) fn new(migration: MigrationId, session: Secret) -> Self {
        Self {
            migration,
            session,
            lanes: AtomicU32::new(0),
            resumable: AtomicBool::new(false),
            new_lanes: ArrayQueue::new(LANES_MAX),
            resumed: ArrayQueue::new(1),
            closed: AtomicBool::new(false),
            expected: Bell::default(),
        }
    }

    /// What the source shows to be let in again.
    pub(super) fn session(&self, lanes: u8) -> Session<'_> {
        Session { migration: self.migration, secret: &self.session, lanes }
    }

    /// Lets each of `lanes` lanes in once.
    pub(super) fn expect_lanes(&self, lanes: u8, runtime: &dyn Runtime) {
        self.lanes.store((1u32 << lanes) - 1, SeqCst);
        runtime.ring(&self.expected);
    }

    /// Lets the source in again.
    pub(super) fn expect_source(&self, runtime: &dyn Runtime) {
        self.resumable.store(true, SeqCst);
        runtime.ring(&self.expected);
    }

    /// Lets in whoever shows the session's secret, until closed. Runs as a task; an error is the acceptor's.
    pub(super) fn keep(
        &self,
        acceptor: &mut dyn Acceptor,
        around: &Surroundings,
        runtime: &dyn Runtime,
        ring: &Bell,
    ) -> Result<(), Error> {
        while !self.closed.load(SeqCst) {
            let heard = self.expected.heard();
            if self.expects_someone() {
                self.let_in(acceptor, around, runtime, ring, GLANCE)?;
                continue;
            }
            // Strangers are shown out, a few at once. Somebody may be expected from the next moment on, so that one of them may
            // be whom to let in.
            for _ in 0..STRANGERS_AT_ONCE {
                if !self.let_in(acceptor, around, runtime, ring, Duration::ZERO)? {
                    break;
                }
            }
            runtime.wait(&self.expected, heard, GLANCE);
        }
        Ok(())
    }

    /// Waits so long for a caller, and lets it in or turns it away. Whether there was one.
    fn let_in(
        &self,
        acceptor: &mut dyn Acceptor,
        around: &Surroundings,
        runtime: &dyn Runtime,
        ring: &Bell,
        patience: Duration,
    ) -> Result<bool, Error> {
        let caller = acceptor.caller(&self.session, patience)?;
        tell_turned_away(acceptor, around);
        let Some(caller) = caller else { return Ok(false) };
        self.receive(caller, around);
        runtime.ring(ring);
        Ok(true)
    }

    /// Lets a caller in, or turns it away.
    fn receive(&self, Caller { mut connection, hello }: Caller, around: &Surroundings) {
        match self.admit(&mut connection, &hello) {
            Ok(Purpose::Lane(number)) => {
                // At most one a bit, so there is room.
                let _ = self.new_lanes.push((number, connection));
            }
            Ok(_) => {
                self.resumed.force_push(connection);
            }
            Err(why) => notice(around, format!("turned away {}: {why}", connection.peer)),
        }
    }

    /// Whether there is a lane to come, or the source may come again.
    fn expects_someone(&self) -> bool {
        self.lanes.load(SeqCst) != 0 || self.resumable.load(SeqCst)
    }

    fn admit(&self, connection: &mut Connection, hello: &[u8; HELLO_BYTES]) -> Result<Purpose, String> {
        // Who does not speak the protocol gets no answer.
        let hello = Hello::decode(hello).map_err(|e| e.to_string())?;
        let ours = hello.migration == self.migration && hello.secret.same(&self.session);
        let verdict = match hello.purpose {
            _ if hello.common_version().is_none() => Verdict::Version,
            Purpose::Control => Verdict::Busy,
            Purpose::Lane(number) if ours && self.take_lane(number) => Verdict::Welcome,
            Purpose::Resume if ours && self.resumable.load(SeqCst) => Verdict::Welcome,
            Purpose::Lane(_) | Purpose::Resume => Verdict::NoSession,
        };
        if verdict != Verdict::Welcome {
            return Err(refuse(connection, verdict));
        }
        let version = hello.common_version().unwrap_or(crate::wire::VERSION_NEWEST);
        let secret = Secret::of(&[0; 32]);
        let welcome = Welcome { version, oldest: crate::wire::VERSION_OLDEST, verdict, secret };
        connection.sender.send(&welcome.encode(), &[]).map_err(|e| e.to_string())?;
        Ok(hello.purpose)
    }

    fn take_lane(&self, number: u8) -> bool {
        let bit = 1u32.checked_shl(number.into()).unwrap_or(0);
        bit != 0 && self.lanes.fetch_and(!bit, SeqCst) & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::NetError;
    use crate::memory::GuestPage;
    use crate::net::{HangUp, Receiver, SendPath, Sender};
    use crate::report::Observer;
    use crate::runtime::Threads;
    use crate::wire::hello::HelloBytes;

    struct Nothing;

    impl Sender for Nothing {
        fn send(&mut self, _: &[u8], _: &[GuestPage<'_>]) -> Result<(), NetError> {
            Ok(())
        }
        fn backlog_bytes(&self) -> u64 {
            0
        }
        fn path(&self) -> SendPath {
            SendPath::Copy
        }
    }
    impl Receiver for Nothing {
        fn recv(&mut self, _: &mut [u8]) -> Result<(), NetError> {
            Err(NetError::HungUp)
        }
        fn recv_pages(&mut self, _: &[GuestPage<'_>]) -> Result<(), NetError> {
            Err(NetError::HungUp)
        }
        fn set_patience(&mut self, _: Option<Duration>) {}
    }
    impl HangUp for Nothing {
        fn hang_up(&self) {}
    }
    impl Observer for Nothing {
        fn event(&self, event: Event) {
            panic!("{event:?}");
        }
    }

    /// A lane that calls just when lanes begin to be expected, while the door was looking at strangers still.
    struct Prompt {
        door: Arc<Door>,
        runtime: Arc<Threads>,
        called: bool,
    }

    impl Acceptor for Prompt {
        fn caller(&mut self, secret: &Secret, _: Duration) -> Result<Option<Caller>, NetError> {
            if std::mem::replace(&mut self.called, true) {
                self.door.closed.store(true, SeqCst);
                return Ok(None);
            }
            assert!(!self.door.expects_someone());
            self.door.expect_lanes(1, &*self.runtime);
            let said = Hello::new(Purpose::Lane(0), MigrationId([1; 16]), secret.clone()).encode();
            let mut hello = HelloBytes::zeroed();
            hello.copy_from_slice(&said);
            let (sender, receiver) = (Box::new(Nothing), Box::new(Nothing));
            let connection =
                Connection { peer: "the source".into(), sender, receiver, hang_up: Arc::new(Nothing) };
            Ok(Some(Caller { connection, hello }))
        }
    }

    #[test]
    fn a_lane_that_comes_while_strangers_are_shown_out_is_kept() {
        let door = Arc::new(Door::new(MigrationId([1; 16]), Secret::of(&[2; 32])));
        let runtime = Arc::new(Threads::new());
        let around = Surroundings {
            runtime: Arc::<Threads>::clone(&runtime),
            observer: Arc::new(Nothing),
            cancel: Arc::default(),
        };
        let mut acceptor = Prompt { door: Arc::clone(&door), runtime: Arc::clone(&runtime), called: false };
        door.keep(&mut acceptor, &around, &*runtime, &Bell::default()).unwrap();
        assert_eq!(door.new_lanes.pop().map(|(number, _)| number), Some(0));
    }
}
