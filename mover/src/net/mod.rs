//! Connections as the engine sees them: a control connection and 1..n lanes, each a reliable byte stream.
//!
//! `tcp` is the real one. TLS belongs here, as another implementation of [`Dialer`] and [`Acceptor`].

pub mod lab;
pub mod pace;
pub mod tcp;

use std::sync::Arc;
use std::time::Duration;

use crate::error::NetError;
use crate::memory::GuestPage;

/// How page bytes left this host; the summary says which path ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendPath {
    /// The kernel copied from guest memory into socket buffers (`sendmsg`).
    Copy,
    /// The NIC read guest memory (`MSG_ZEROCOPY`, or io_uring's SEND_ZC), as the kernel reported.
    ZeroCopy,
}

/// The sending half of a connection. Blocking, whole messages.
pub trait Sender: Send {
    /// Sends `head` and then the pages' bytes, all of them. `head` may be empty, `pages` too.
    fn send(&mut self, head: &[u8], pages: &[GuestPage<'_>]) -> Result<(), NetError>;
    /// Bytes accepted by the kernel but not yet acknowledged by the peer.
    fn backlog_bytes(&self) -> u64;
    /// What the kernel did with the pages so far.
    fn path(&self) -> SendPath;
}

/// The receiving half of a connection. Blocking, whole messages.
pub trait Receiver: Send {
    /// Fills `out`.
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError>;
    /// Fills the pages, in order, straight from the connection.
    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError>;
    /// How long a `recv` that has begun may wait for its next byte before it gives up as [`NetError::Stalled`].
    /// `None` waits for ever (a [`HangUp`] still ends it).
    fn set_patience(&mut self, patience: Option<Duration>);
}

/// Ends a connection from another task: both halves' blocked calls return [`NetError::HungUp`] or `Closed`.
pub trait HangUp: Send + Sync {
    /// Does it. Calling it again does nothing.
    fn hang_up(&self);
}

/// An open connection.
pub struct Connection {
    /// Where it leads, for messages.
    pub peer: String,
    /// Sending half.
    pub sender: Box<dyn Sender>,
    /// Receiving half.
    pub receiver: Box<dyn Receiver>,
    /// Ends it.
    pub hang_up: Arc<dyn HangUp>,
}

/// Opens connections to the target.
pub trait Dialer: Send + Sync {
    /// Opens one, within `timeout`.
    fn dial(&self, timeout: Duration) -> Result<Connection, NetError>;
}

/// Accepts connections on the target.
pub trait Acceptor: Send {
    /// The next one, or `None` when `timeout` has passed.
    fn accept(&mut self, timeout: Duration) -> Result<Option<Connection>, NetError>;
}
