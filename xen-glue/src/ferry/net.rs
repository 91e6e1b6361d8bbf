//! The engine's connections, which were all made before it began, by the target: what its source "dials" is the next of them,
//! and what its target "accepts" is the next one on which a Hello has come. The source says Hello on them in their order.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::error::NetError;
use mover::net::tcp::Settings;
use mover::net::{Acceptor, Caller, Connection, Dialer};
use mover::wire::hello::{HELLO_BYTES, Hello, Secret};

use super::NETWORK_PATIENCE;
use super::tally::{CountedReceiver, CountedSender, Tally};

/// The least time a Hello is waited for.
const GLANCE_MIN: Duration = Duration::from_millis(20);

/// How connections behave.
pub(super) fn settings() -> Settings {
    Settings { patience: NETWORK_PATIENCE, ..Settings::default() }
}

/// Connections by number: the first is for control, the others are lanes.
type Left = VecDeque<(usize, Connection)>;

fn numbered(connections: Vec<Connection>) -> Left {
    connections.into_iter().enumerate().collect()
}

/// What the source dials.
pub(super) struct Ready {
    left: Mutex<Left>,
    tally: Arc<Tally>,
}

impl Ready {
    pub(super) fn new(connections: Vec<Connection>, tally: &Arc<Tally>) -> Self {
        Self { left: Mutex::new(numbered(connections)), tally: Arc::clone(tally) }
    }
}

impl Dialer for Ready {
    fn call(&self, hello: &Hello, _: Duration) -> Result<Connection, NetError> {
        let next = self.left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        // What has been lost is not made again: the toolstack has both guests.
        let (number, mut connection) = next.ok_or(NetError::HungUp)?;
        if number > 0 {
            connection.sender = CountedSender::around(connection.sender, &self.tally);
        }
        connection.sender.send(&hello.encode(), &[])?;
        Ok(connection)
    }
}

/// What the target accepts.
pub(super) struct Quiet {
    left: Left,
    tally: Arc<Tally>,
}

impl Quiet {
    pub(super) fn new(connections: Vec<Connection>, tally: &Arc<Tally>) -> Self {
        Self { left: numbered(connections), tally: Arc::clone(tally) }
    }
}

impl Acceptor for Quiet {
    fn caller(&mut self, _: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError> {
        let Some((_, next)) = self.left.front_mut() else {
            // Nobody else will come; whoever waits for somebody waits.
            std::thread::sleep(timeout);
            return Ok(None);
        };
        let mut hello = [0; HELLO_BYTES];
        next.receiver.set_patience(Some(timeout.max(GLANCE_MIN)));
        match next.receiver.recv(&mut hello) {
            // Nothing of it has come: a Hello comes in one piece.
            Err(NetError::Stalled { .. }) => return Ok(None),
            came => came?,
        }
        let Some((number, mut connection)) = self.left.pop_front() else { return Ok(None) };
        if number > 0 {
            connection.receiver = CountedReceiver::around(connection.receiver, &self.tally);
        }
        Ok(Some(Caller { connection, hello }))
    }
}
