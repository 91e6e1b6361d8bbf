//! Connections as the engine sees them: a control connection and 1..n lanes, each a reliable byte stream.
//!
//! `tcp` is the real one, in the clear or, under `tls`, encrypted: which of the two is chosen where a connection is
//! dialled ([`tcp::TcpDialer::pinned`]) and where it is accepted ([`entrance::Lock`]), and nobody else sees a difference.

pub mod entrance;
pub mod lab;
pub mod pace;
pub mod pass;
pub mod tcp;
pub mod tls;

use std::sync::Arc;
use std::time::Duration;

use crate::error::NetError;
use crate::memory::GuestPage;
use crate::wire::hello::{Hello, HelloBytes, Secret};

/// How page bytes left this host; the summary says which path ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendPath {
    /// The kernel copied from guest memory into socket buffers (`sendmsg`).
    Copy,
    /// The NIC read guest memory (`MSG_ZEROCOPY`, or io_uring's SEND_ZC), as the kernel reported.
    ZeroCopy,
    /// This program copied and encrypted them (TLS), and the kernel copied what came of it.
    Encrypted,
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
    /// Opens one, within `timeout`, and says `hello`.
    fn call(&self, hello: &Hello, timeout: Duration) -> Result<Connection, NetError>;
}

/// A connection that has said its Hello, which is still to be judged.
pub struct Caller {
    /// The connection.
    pub connection: Connection,
    /// What it said.
    pub hello: HelloBytes,
}

/// Accepts connections on the target.
pub trait Acceptor: Send {
    /// The next one that has said a Hello, or `None` when `timeout` has passed. Where connections are encrypted, only
    /// who knows `secret` comes so far.
    fn caller(&mut self, secret: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError>;
    /// A sentence about those turned away since it was last asked for, if there is news; at most one a second, as
    /// anybody can knock.
    fn turned_away(&mut self) -> Option<String> {
        None
    }
}
