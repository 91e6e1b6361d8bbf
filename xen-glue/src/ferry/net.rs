//! The engine's connections, which were all made before it began, by the target: what its source "dials" is the next of them,
//! and what its target "accepts" is the next one on which a Hello has come. The source says Hello on them in their order. Those
//! that are lost while pages are outstanding are made anew ([`super::again`]).
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::error::NetError;
use mover::memory::GuestPage;
use mover::net::tcp::Settings;
use mover::net::{Acceptor, Caller, Connection, Dialer, Receiver};
use mover::wire::hello::{Hello, HelloBytes, Secret};

use super::NETWORK_PATIENCE;
use super::again::{Returner, Returning};
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
    /// Who comes back; nobody where nothing can be outstanding.
    returning: Option<Mutex<Returning>>,
}

impl Ready {
    pub(super) fn new(
        connections: Vec<Connection>,
        tally: &Arc<Tally>,
        returning: Option<Returning>,
    ) -> Self {
        let left = Mutex::new(numbered(connections));
        Self { left, tally: Arc::clone(tally), returning: returning.map(Mutex::new) }
    }
}

impl Dialer for Ready {
    fn call(&self, hello: &Hello, _: Duration) -> Result<Connection, NetError> {
        let next = self.left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let mut connection = match (next, &self.returning) {
            (Some((0, connection)), _) => connection,
            (Some((_, mut lane)), _) => {
                lane.sender = CountedSender::around(lane.sender, &self.tally);
                lane
            }
            // The engine dials from one task. What goes over these is not counted: the count was over with the stream.
            (None, Some(returning)) => {
                returning.lock().unwrap_or_else(PoisonError::into_inner).connection(hello)?
            }
            (None, None) => return Err(NetError::HungUp),
        };
        connection.sender.send(&hello.encode(), &[])?;
        Ok(connection)
    }
}

/// Says whether a control connection is of any use still.
struct Watched {
    inner: Box<dyn Receiver>,
    lost: Arc<AtomicBool>,
}

impl Receiver for Watched {
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        self.inner.recv(out).inspect_err(|_| self.lost.store(true, SeqCst))
    }
    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        self.inner.recv_pages(pages)
    }
    fn set_patience(&mut self, patience: Option<Duration>) {
        self.inner.set_patience(patience);
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.lost.store(true, SeqCst);
    }
}

/// What the target accepts.
pub(super) struct Quiet {
    left: Left,
    tally: Arc<Tally>,
    returner: Returner,
    /// Set once lost connections are to be made anew: the guest may run, and pages be outstanding.
    may_return: Arc<AtomicBool>,
    /// Whether the control connection is lost.
    lost: Arc<AtomicBool>,
    /// These are not the first connections.
    anew: bool,
}

impl Quiet {
    pub(super) fn new(
        connections: Vec<Connection>,
        tally: &Arc<Tally>,
        returner: Returner,
        may_return: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            left: numbered(connections),
            tally: Arc::clone(tally),
            returner,
            may_return: Arc::clone(may_return),
            lost: Arc::default(),
            anew: false,
        }
    }

    /// Of an engine that takes the place of one that is no more: all connections are to be made anew.
    pub(super) fn again(tally: &Arc<Tally>, returner: Returner) -> Self {
        let this = Self::new(Vec::new(), tally, returner, &Arc::new(AtomicBool::new(true)));
        this.lost.store(true, SeqCst);
        this
    }

    /// Dials, as far as that is due, until there are connections again.
    fn come_back(&mut self, session: &Secret) {
        if !self.may_return.load(SeqCst) {
            return;
        }
        if self.lost.load(SeqCst) {
            self.lost = Arc::default();
            self.left.clear();
            self.returner.begin();
        }
        if let Some(connections) = self.returner.step(session) {
            (self.left, self.anew) = (numbered(connections), true);
        }
    }
}

impl Acceptor for Quiet {
    fn caller(&mut self, session: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError> {
        self.come_back(session);
        let Some((_, next)) = self.left.front_mut() else {
            // Nobody else will come; whoever waits for somebody waits.
            std::thread::sleep(timeout);
            return Ok(None);
        };
        let mut hello = HelloBytes::zeroed();
        next.receiver.set_patience(Some(timeout.max(GLANCE_MIN)));
        match next.receiver.recv(&mut hello[..]) {
            // Nothing of it has come: a Hello comes in one piece.
            Err(NetError::Stalled { .. }) => return Ok(None),
            Err(_) if self.anew => {
                self.lost.store(true, SeqCst);
                return Ok(None);
            }
            came => came?,
        }
        let Some((number, mut connection)) = self.left.pop_front() else { return Ok(None) };
        if number == 0 {
            self.lost = Arc::default();
            let (inner, lost) = (connection.receiver, Arc::clone(&self.lost));
            connection.receiver = Box::new(Watched { inner, lost });
        } else if !self.anew {
            connection.receiver = CountedReceiver::around(connection.receiver, &self.tally);
        }
        Ok(Some(Caller { connection, hello }))
    }
}
