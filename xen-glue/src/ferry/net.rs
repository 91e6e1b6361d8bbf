//! The engine's connections, which were all made before it began, by the target: what its source "dials" is the next of them,
//! and what its target "accepts" is one on which something has come.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::error::NetError;
use mover::net::tcp::{self, Settings};
use mover::net::{Acceptor, Caller, Connection, Dialer};
use mover::wire::hello::{HELLO_BYTES, Hello, Secret};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::NETWORK_PATIENCE;
use super::tally::{CountedReceiver, CountedSender, Tally};

/// How long a Hello may take that has begun.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);

fn settings() -> Settings {
    Settings { patience: NETWORK_PATIENCE, ..Settings::default() }
}

/// Connections by number: the first is for control, the others are lanes.
struct Next {
    number: usize,
    left: VecDeque<TcpStream>,
}

/// What the source dials.
pub(super) struct Ready {
    next: Mutex<Next>,
    tally: Arc<Tally>,
}

impl Ready {
    pub(super) fn new(streams: Vec<TcpStream>, tally: &Arc<Tally>) -> Self {
        Self { next: Mutex::new(Next { number: 0, left: streams.into() }), tally: Arc::clone(tally) }
    }
}

impl Dialer for Ready {
    fn call(&self, hello: &Hello, _: Duration) -> Result<Connection, NetError> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // What has been lost is not made again: the toolstack has both guests.
        let stream = next.left.pop_front().ok_or(NetError::HungUp)?;
        let mut connection = tcp::take_over(stream, &settings())?;
        if next.number > 0 {
            connection.sender = CountedSender::around(connection.sender, &self.tally);
        }
        next.number += 1;
        connection.sender.send(&hello.encode(), &[])?;
        Ok(connection)
    }
}

/// What the target accepts.
pub(super) struct Quiet {
    waiting: Vec<(usize, TcpStream)>,
    tally: Arc<Tally>,
}

impl Quiet {
    pub(super) fn new(streams: Vec<TcpStream>, tally: &Arc<Tally>) -> Self {
        Self { waiting: streams.into_iter().enumerate().collect(), tally: Arc::clone(tally) }
    }

    /// The place of a connection on which something has come.
    fn spoken(&self, timeout: Duration) -> Option<usize> {
        let until = Timespec::try_from(timeout).ok();
        let mut watched: Vec<_> =
            self.waiting.iter().map(|(_, stream)| PollFd::new(stream, PollFlags::IN)).collect();
        // An interrupted wait is one in which nothing came.
        poll(&mut watched, until.as_ref()).ok()?;
        watched.iter().position(|stream| !stream.revents().is_empty())
    }
}

impl Acceptor for Quiet {
    fn caller(&mut self, _: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError> {
        let Some(place) = self.spoken(timeout) else { return Ok(None) };
        let (number, stream) = self.waiting.remove(place);
        let mut connection = tcp::take_over(stream, &settings())?;
        if number > 0 {
            connection.receiver = CountedReceiver::around(connection.receiver, &self.tally);
        }
        connection.receiver.set_patience(Some(HELLO_PATIENCE));
        let mut hello = [0; HELLO_BYTES];
        connection.receiver.recv(&mut hello)?;
        Ok(Some(Caller { connection, hello }))
    }
}
