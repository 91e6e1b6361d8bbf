//! Where connections come in: many are greeted at once, by one task, none is waited for, and nobody holds more of this
//! program than a socket and 64 bytes before it has shown that it knows the secret.
//!
//! ```text
//!   accept -> 64 bytes -> (in the clear) that is the Hello -> Caller
//!                     `-> (TLS) a knock by who knows the secret? -> handshake -> the record with the Hello -> Caller
//! ```
//! Invariants: at most [`GREETINGS_MAX`] connections are being greeted, at most [`GREETINGS_PER_ADDRESS_MAX`] of them
//! from one address; when there is no room, the oldest that has shown nothing goes. A greeting takes `GREETING_TIME`
//! at most, its first 64 bytes `FIRST_TIME`, however the bytes trickle in. Reads and writes here never block.

#![forbid(unsafe_code)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::time::Timespec;
use socket2::Socket;
use zeroize::Zeroizing;

use super::pass::Fingerprint;
use super::tcp::{TcpAcceptor, halves};
use super::tls::handshake::{Handshake, Keys};
use super::tls::{Identity, judged};
use super::{Acceptor, Caller, Connection};
use crate::error::NetError;
use crate::limits::{GREETINGS_MAX, GREETINGS_PER_ADDRESS_MAX};
use crate::wire::hello::{self, HELLO_BYTES, HelloBytes, Secret};
use crate::wire::knock;

/// How long a new connection may take for its first 64 bytes.
const FIRST_TIME: Duration = Duration::from_secs(2);
/// How long it may take until it has said its Hello.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Connections accepted before those that are being greeted are looked at again.
const ACCEPTED_AT_ONCE: usize = 16;
/// How often those turned away are told of.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// How long the entrance rests where the system has no descriptor or memory left for another connection.
const REST: Duration = Duration::from_millis(50);
/// Bytes of a TLS record's header.
const RECORD_HEADER_BYTES: usize = 5;

/// How connections are protected.
#[derive(Debug)]
pub enum Lock {
    /// Not at all: whoever sees or changes what crosses the network sees and changes the guest. For links that nobody
    /// else is on, and for measuring.
    Plain,
    /// TLS 1.3, by a key made for this.
    Tls(Identity),
}

impl Lock {
    /// What a source pins.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        match self {
            Self::Plain => None,
            Self::Tls(identity) => Some(identity.fingerprint()),
        }
    }
}

/// A listening address behind a lock.
pub struct Entrance {
    acceptor: TcpAcceptor,
    lock: Lock,
    greetings: Vec<Greeting>,
    turned: Turned,
}

/// A connection that has not said its Hello.
struct Greeting {
    socket: Socket,
    peer: SocketAddr,
    came: Instant,
    stage: Stage,
}

/// How far it has come.
enum Stage {
    /// It has shown nothing.
    First { bytes: [u8; HELLO_BYTES], have: usize },
    /// It has knocked right.
    Shaking(Box<(Handshake, Inward)>),
    /// The handshake is over.
    Hello(Box<(Keys, Inward)>),
}

/// What became of a greeting.
enum Became {
    Waiting,
    Greeted(HelloBytes),
    Turned(String),
}

/// Those turned away since somebody was told.
struct Turned {
    count: u64,
    last: String,
    told: Option<Instant>,
}

impl Entrance {
    /// Puts `lock` on that address.
    #[must_use]
    pub fn new(acceptor: TcpAcceptor, lock: Lock) -> Self {
        let turned = Turned { count: 0, last: String::new(), told: None };
        Self { acceptor, lock, greetings: Vec::with_capacity(GREETINGS_MAX), turned }
    }

    /// The address it listens on, the port filled in.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.acceptor.local()
    }

    /// What a source pins.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.lock.fingerprint()
    }

    /// Takes in what waits in the kernel's queue, a few.
    fn let_in(&mut self) -> Result<(), NetError> {
        for _ in 0..ACCEPTED_AT_ONCE {
            match self.acceptor.take() {
                Ok(Some((socket, peer))) => {
                    self.make_room(peer.ip());
                    let stage = Stage::First { bytes: [0; HELLO_BYTES], have: 0 };
                    self.greetings.push(Greeting { socket, peer, came: Instant::now(), stage });
                }
                Ok(None) => return Ok(()),
                Err(error) => match Errno::from_io_error(&error) {
                    // Of this moment: connections end all the time. They wait in the kernel's queue.
                    Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        self.turned.last = format!("no room for another connection: {error}");
                        std::thread::sleep(REST);
                        return Ok(());
                    }
                    _ => return Err(self.acceptor.cannot_accept(error)),
                },
            }
        }
        Ok(())
    }

    /// Makes room for one more from `address`.
    fn make_room(&mut self, address: IpAddr) {
        let of = |greetings: &[Greeting], address| {
            greetings.iter().filter(|greeting| greeting.peer.ip() == address).count()
        };
        if of(&self.greetings, address) >= GREETINGS_PER_ADDRESS_MAX {
            self.drop_oldest(Some(address));
        }
        if self.greetings.len() >= GREETINGS_MAX {
            self.drop_oldest(None);
        }
    }

    /// Drops the oldest (of `address`), rather one that has shown nothing.
    fn drop_oldest(&mut self, address: Option<IpAddr>) {
        let ours = |greeting: &&Greeting| address.is_none_or(|address| greeting.peer.ip() == address);
        let shown = |greeting: &Greeting| !matches!(greeting.stage, Stage::First { .. });
        let oldest = self
            .greetings
            .iter()
            .enumerate()
            .filter(|(_, greeting)| ours(greeting))
            .min_by_key(|(_, greeting)| (shown(greeting), greeting.came))
            .map(|(at, _)| at);
        if let Some(at) = oldest {
            let gone = self.greetings.swap_remove(at);
            self.turned.add(gone.peer, "it was silent, and others wanted in");
        }
    }

    /// Goes on with those from whom something has come.
    fn go_on(&mut self, secret: &Secret) -> Result<Option<Caller>, NetError> {
        let now = Instant::now();
        let mut at = 0;
        while at < self.greetings.len() {
            let greeting = &mut self.greetings[at];
            match greeting.step(secret, &self.lock, now) {
                Became::Waiting => at += 1,
                Became::Turned(why) => {
                    let gone = self.greetings.swap_remove(at);
                    self.turned.add(gone.peer, &why);
                }
                Became::Greeted(hello) => {
                    let greeting = self.greetings.swap_remove(at);
                    let peer = greeting.peer;
                    match greeting.into_connection(self.acceptor.settings()) {
                        Ok(connection) => return Ok(Some(Caller { connection, hello })),
                        // One caller that is gone already must not end the wait for the right one.
                        Err(error) => self.turned.add(peer, &error.to_string()),
                    }
                }
            }
        }
        Ok(None)
    }

    /// Waits until something comes in, at most for `limit`.
    fn wait(&self, limit: Duration) -> Result<bool, NetError> {
        let now = Instant::now();
        let until = self.greetings.iter().map(|greeting| greeting.deadline());
        let limit = until.map(|until| until.saturating_duration_since(now)).fold(limit, Duration::min);
        let mut list = Vec::with_capacity(self.greetings.len() + 1);
        list.push(PollFd::new(self.acceptor.socket(), PollFlags::IN));
        list.extend(self.greetings.iter().map(|greeting| PollFd::new(&greeting.socket, PollFlags::IN)));
        match poll(&mut list, Timespec::try_from(limit).ok().as_ref()) {
            Ok(_) => Ok(!list[0].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(self.acceptor.cannot_accept(error.into())),
        }
    }
}

impl Acceptor for Entrance {
    fn caller(&mut self, secret: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.wait(left)? {
                self.let_in()?;
            }
            if let Some(caller) = self.go_on(secret)? {
                return Ok(Some(caller));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    }

    fn turned_away(&mut self) -> Option<String> {
        let now = Instant::now();
        if self.turned.last.is_empty() || self.turned.told.is_some_and(|told| now - told < TOLD_EVERY) {
            return None;
        }
        self.turned.told = Some(now);
        let last = std::mem::take(&mut self.turned.last);
        Some(match std::mem::take(&mut self.turned.count) {
            0 => last,
            1 => format!("turned away {last}"),
            count => format!("turned away {count} connections, the last from {last}"),
        })
    }
}

impl Turned {
    fn add(&mut self, peer: SocketAddr, why: &str) {
        self.count += 1;
        // No address is formatted for every one of a hundred thousand.
        if self.last.is_empty() {
            self.last = format!("{peer}: {why}");
        }
    }
}

impl Greeting {
    fn deadline(&self) -> Instant {
        match self.stage {
            Stage::First { .. } => self.came + FIRST_TIME,
            _ => self.came + GREETING_TIME,
        }
    }

    /// Takes what has come, and does what is to be done with it.
    fn step(&mut self, secret: &Secret, lock: &Lock, now: Instant) -> Became {
        loop {
            let next = match &mut self.stage {
                Stage::First { bytes, have } => match read_on(&self.socket, bytes, have) {
                    Ok(true) => first(bytes, secret, lock),
                    Ok(false) if *have >= 4 && !begins_right(bytes, lock) => Err(STRANGE.to_owned()),
                    Ok(false) => Ok(None),
                    Err(why) => Err(why),
                },
                Stage::Shaking(shaking) => shake(&self.socket, shaking),
                Stage::Hello(last) => {
                    let (keys, inward) = &mut **last;
                    match inward.read(&self.socket, Keys::hello_record_bytes) {
                        Ok(true) => match keys.open_hello(&mut inward.bytes) {
                            Ok(hello) => return Became::Greeted(hello),
                            Err(broken) => Err(broken.0.to_owned()),
                        },
                        Ok(false) => Ok(None),
                        Err(why) => Err(why),
                    }
                }
            };
            match next {
                Ok(Some(Forward::Greeted(hello))) => return Became::Greeted(hello),
                Ok(Some(Forward::Handshake(handshake))) => {
                    self.stage = Stage::Shaking(Box::new((handshake, Inward::default())));
                }
                Ok(Some(Forward::Shaken)) => {
                    let before = std::mem::replace(&mut self.stage, EMPTY);
                    let Stage::Shaking(shaking) = before else { return Became::Turned(STRANGE.to_owned()) };
                    match shaking.0.into_keys() {
                        Ok(keys) => self.stage = Stage::Hello(Box::new((keys, Inward::default()))),
                        Err(why) => return Became::Turned(why),
                    }
                }
                Ok(None) if now >= self.deadline() => return Became::Turned("it was too slow".to_owned()),
                Ok(None) => return Became::Waiting,
                Err(why) => return Became::Turned(why),
            }
        }
    }

    fn into_connection(self, settings: &super::tcp::Settings) -> Result<Connection, NetError> {
        let halves = halves(self.socket, self.peer, settings)?;
        Ok(match self.stage {
            Stage::Hello(last) => last.0.connection(halves),
            _ => halves.into(),
        })
    }
}

/// What a stage ends with.
enum Forward {
    Greeted(HelloBytes),
    Handshake(Handshake),
    Shaken,
}

const EMPTY: Stage = Stage::First { bytes: [0; HELLO_BYTES], have: 0 };
const STRANGE: &str = "it does not speak pageferry's protocol";

fn begins_right(bytes: &[u8; HELLO_BYTES], lock: &Lock) -> bool {
    let magic = match lock {
        Lock::Plain => hello::MAGIC,
        Lock::Tls(_) => knock::MAGIC,
    };
    bytes.starts_with(&magic)
}

/// Judges the first 64 bytes.
fn first(bytes: &[u8; HELLO_BYTES], secret: &Secret, lock: &Lock) -> Result<Option<Forward>, String> {
    match lock {
        Lock::Plain if bytes.starts_with(&hello::MAGIC) => {
            let mut hello = HelloBytes::zeroed();
            hello.copy_from_slice(bytes);
            Ok(Some(Forward::Greeted(hello)))
        }
        Lock::Plain if bytes.starts_with(&knock::MAGIC) => {
            Err("it came for TLS, and this target waits in the clear".to_owned())
        }
        Lock::Plain => Err(STRANGE.to_owned()),
        Lock::Tls(_) if bytes.starts_with(&hello::MAGIC) => {
            Err("it came in the clear, and this target takes TLS alone".to_owned())
        }
        Lock::Tls(identity) if knock::is_right(bytes, secret) => {
            let handshake = Handshake::acceptor(identity).map_err(|error| error.to_string())?;
            Ok(Some(Forward::Handshake(handshake)))
        }
        Lock::Tls(_) if bytes.starts_with(&knock::MAGIC) => Err("wrong token".to_owned()),
        Lock::Tls(_) => Err(STRANGE.to_owned()),
    }
}

/// Goes on with a handshake as far as what has come allows.
fn shake(socket: &Socket, (handshake, inward): &mut (Handshake, Inward)) -> Result<Option<Forward>, String> {
    while inward.read(socket, |header| handshake.body_bytes(header))? {
        let mut out = Vec::new();
        let over = match handshake.advance(&inward.bytes, &mut out) {
            Ok(over) => over,
            Err(error) => {
                // It has knocked right: it may hear what is wrong with its certificate. If it does not, it sees that it is
                // hung up on.
                if handshake.asks_for_certificates() {
                    let words = handshake.last_words();
                    let _ = rustix::net::send(socket, &words, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
                }
                return Err(in_words(&error));
            }
        };
        inward.clear();
        if !out.is_empty() {
            // Its socket is new: what is less than a kilobyte goes in, or it has been made not to.
            let sent = rustix::net::send(socket, &out, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            if sent != Ok(out.len()) {
                return Err("it takes no answer".to_owned());
            }
        }
        if over {
            return Ok(Some(Forward::Shaken));
        }
    }
    Ok(None)
}

/// Why a handshake failed, as the target's user reads it.
fn in_words(error: &rustls::Error) -> String {
    match error {
        rustls::Error::NoCertificatesPresented => {
            "it showed no certificate, and this target asks for one".to_owned()
        }
        rustls::Error::InvalidCertificate(error) => {
            format!("its certificate can't be taken: {}", judged(error))
        }
        other => other.to_string(),
    }
}

/// A TLS record as it comes in; it is opened in its place.
#[derive(Default)]
struct Inward {
    bytes: Zeroizing<Vec<u8>>,
    have: usize,
}

impl Inward {
    fn clear(&mut self) {
        self.bytes.clear();
        self.have = 0;
    }

    /// Reads on; true once the record is whole. `body_bytes` says from its header how long the rest is.
    fn read<E>(
        &mut self,
        socket: &Socket,
        body_bytes: impl Fn(&[u8; RECORD_HEADER_BYTES]) -> Result<usize, E>,
    ) -> Result<bool, String>
    where
        E: Into<String>,
    {
        if self.have < RECORD_HEADER_BYTES {
            self.bytes.resize(RECORD_HEADER_BYTES, 0);
            if !read_on(socket, &mut self.bytes, &mut self.have)? {
                return Ok(false);
            }
            let header = self.bytes.first_chunk().expect("just read");
            let body = body_bytes(header).map_err(Into::into)?;
            self.bytes.resize(RECORD_HEADER_BYTES + body, 0);
        }
        read_on(socket, &mut self.bytes, &mut self.have)
    }
}

/// Fills `bytes` from `have` on with what is there; true once it is full.
fn read_on(socket: &Socket, bytes: &mut [u8], have: &mut usize) -> Result<bool, String> {
    while *have < bytes.len() {
        match rustix::net::recv(socket, &mut bytes[*have..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err("it hung up".to_owned()),
            Ok((came, _)) => *have += came,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).to_string()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
