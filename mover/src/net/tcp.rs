//! The network over TCP, with page bytes going between sockets and guest memory without a copy of ours.
//!
//! A connection is one socket that three objects share: the sending half, the receiving half (each used by one task
//! at a time) and the handle to hang up, which any task may use. Calls block in the kernel in steps, so that a peer
//! that is silent ([`NetError::Stalled`]), one that has closed ([`NetError::Closed`]) and our own hanging up
//! ([`NetError::HungUp`]) are told apart. After any error the stream stands at no known place: the caller hangs up.
//!
//! Settings that matter: no Nagle; the kernel holds at most [`Settings::unsent`] bytes that it could not send yet, so
//! that what is sent last in a migration does not queue behind megabytes; keepalive and `TCP_USER_TIMEOUT` notice a
//! dead peer even while nobody sends.

#![forbid(unsafe_code)]

use std::io::{self, ErrorKind};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::time::Timespec;
use rustls::pki_types::ServerName;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use super::pass::Fingerprint;
use super::tls::{Authority, Wanted, handshake};
use super::{Connection, Dialer, HangUp, Receiver, SendPath, Sender};
use crate::error::NetError;
use crate::kernel::net::{
    How, Pieces, allow_zero_copy, completions, receive_more, send_more, unacknowledged,
};
use crate::memory::GuestPage;
use crate::units::PAGE_BYTES;
use crate::wire::hello::Hello;

/// Below this many bytes of pages the bookkeeping of a zero-copy send costs more than the copy (the kernel's
/// `msg_zerocopy.rst` says around 10 KiB).
const ZERO_COPY_FROM: usize = 16 * 1024;
/// Connections that may wait to be accepted. Far more than there are lanes: strangers who knock at the port must not
/// keep the right one out of the kernel's queue.
const BACKLOG: i32 = 1024;

/// How connections behave. Both ends have their own.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long the peer may take no byte of a message, or, once [`Receiver::set_patience`] has not said otherwise,
    /// send none; also when the kernel gives a peer up that acknowledges nothing.
    pub patience: Duration,
    /// Bytes the kernel may hold that it could not send yet (`TCP_NOTSENT_LOWAT`). With no limit, what two lanes send
    /// last waits about 28 ms at 1 Gbit/s behind what they sent before; with 128 KiB about 2 ms, at the same rate
    /// (`cargo xtask bench link`). With 64 KiB, one segment at its largest, it is still in the processor's cache when it
    /// is sent on: over loopback that takes a fifth less CPU time than 128 KiB or 32 (`cargo xtask bench tcp`).
    pub unsent: u32,
    /// Try to let the NIC read guest pages (`MSG_ZEROCOPY`); falls back where the kernel copies or refuses.
    pub zero_copy: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { patience: Duration::from_secs(10), unsent: 64 * 1024, zero_copy: false }
    }
}

/// What the halves of a connection share.
pub(super) struct Link {
    socket: Socket,
    peer: String,
    hung_up: AtomicBool,
}

impl Link {
    /// Where the connection leads, for messages.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// The error to return for what the kernel said.
    fn error(&self, doing: &'static str, patience: Duration, source: io::Error) -> NetError {
        if self.hung_up.load(Ordering::SeqCst) {
            return NetError::HungUp;
        }
        match Errno::from_io_error(&source) {
            Some(Errno::PIPE | Errno::CONNRESET | Errno::CONNABORTED) => self.closed(doing),
            Some(Errno::TIMEDOUT) => self.stalled(doing, patience),
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN | Errno::HOSTDOWN) => NetError::Os {
                doing: format!("{} can't be reached any more while {doing}", self.peer),
                remedy: "Is the link down, or has a route or firewall changed?",
                source,
            },
            _ => NetError::Os {
                doing: format!("connection with {} failed while {doing}", self.peer),
                remedy: "Migrating again starts from the beginning; the guest is left as it was",
                source,
            },
        }
    }

    /// The end of the stream: theirs or our own doing.
    fn closed(&self, doing: &'static str) -> NetError {
        if self.hung_up.load(Ordering::SeqCst) {
            return NetError::HungUp;
        }
        NetError::Closed { peer: self.peer.clone(), doing }
    }

    fn stalled(&self, doing: &'static str, silent: Duration) -> NetError {
        let seconds = silent.as_millis().div_ceil(1000);
        NetError::Stalled {
            peer: self.peer.clone(),
            seconds: u64::try_from(seconds).unwrap_or(u64::MAX),
            doing,
        }
    }
}

impl HangUp for Link {
    fn hang_up(&self) {
        if !self.hung_up.swap(true, Ordering::SeqCst)
            && let Err(error) = self.socket.shutdown(Shutdown::Both)
            && error.kind() != ErrorKind::NotConnected
        {
            tracing::warn!("connection with {} could not be shut down: {error}", self.peer);
        }
    }
}

/// How long one call may block in the kernel: short enough that `patience` is kept to about a quarter.
fn step_of(patience: Duration) -> Duration {
    (patience / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
}

/// Counts the time without a byte, in steps.
struct Silence {
    patience: Option<Duration>,
    step: Duration,
    lasted: Duration,
}

impl Silence {
    fn new(patience: Option<Duration>) -> Self {
        Self { patience, step: patience.map_or(Duration::ZERO, step_of), lasted: Duration::ZERO }
    }
    /// A byte moved.
    fn broken(&mut self) {
        self.lasted = Duration::ZERO;
    }
    /// One more step without a byte; whether that is enough.
    fn goes_on(&mut self) -> bool {
        self.lasted += self.step;
        self.patience.is_some_and(|patience| self.lasted >= patience)
    }
}

/// A connected socket, set up, and not yet hidden behind traits.
pub(super) struct Halves {
    pub(super) sender: TcpSender,
    pub(super) receiver: TcpReceiver,
    pub(super) link: Arc<Link>,
}

impl From<Halves> for Connection {
    fn from(Halves { sender, receiver, link }: Halves) -> Self {
        Self {
            peer: link.peer.clone(),
            sender: Box::new(sender),
            receiver: Box::new(receiver),
            hang_up: link,
        }
    }
}

/// Sets up a connected socket.
pub(super) fn halves(socket: Socket, peer: SocketAddr, settings: &Settings) -> Result<Halves, NetError> {
    let peer = peer.to_string();
    let patience = settings.patience.max(Duration::from_millis(20));
    let silence = Silence::new(Some(patience));
    let keepalive = TcpKeepalive::new()
        .with_time((patience / 2).max(Duration::from_secs(1)))
        .with_interval((patience / 8).max(Duration::from_secs(1)));
    let zero_copy = socket
        .set_nonblocking(false)
        .and_then(|()| socket.set_tcp_nodelay(true))
        .and_then(|()| socket.set_tcp_keepalive(&keepalive))
        .and_then(|()| socket.set_tcp_user_timeout(Some(patience)))
        .and_then(|()| socket.set_tcp_notsent_lowat(settings.unsent))
        .and_then(|()| socket.set_write_timeout(Some(silence.step)))
        .and_then(|()| socket.set_read_timeout(Some(silence.step)))
        .map(|()| settings.zero_copy && allow_zero_copy(socket.as_fd()).is_ok())
        .map_err(|source| NetError::Os {
            doing: format!("cannot set up the connection with {peer}"),
            remedy: "It may have been closed at once; is it a pageferry?",
            source,
        })?;
    let link = Arc::new(Link { socket, peer: peer.clone(), hung_up: AtomicBool::new(false) });
    let sender = TcpSender {
        link: link.clone(),
        pieces: Pieces::new(),
        silence,
        zero_copy,
        in_flight: 0,
        went_uncopied: false,
    };
    let receiver =
        TcpReceiver { link: link.clone(), pieces: Pieces::new(), silence: Silence::new(Some(patience)) };
    Ok(Halves { sender, receiver, link })
}

/// Takes over a connection that was made by another way than [`TcpDialer`] and [`TcpAcceptor`], in the clear.
///
/// # Errors
/// It has been closed already, or is none.
pub fn take_over(stream: TcpStream, settings: &Settings) -> Result<Connection, NetError> {
    let peer = stream.peer_addr().map_err(|source| NetError::Os {
        doing: "a connection has no other end".to_owned(),
        remedy: "It was closed at once; has the other end failed?",
        source,
    })?;
    halves(Socket::from(stream), peer, settings).map(Connection::from)
}

/// The sending half.
pub(super) struct TcpSender {
    link: Arc<Link>,
    pieces: Pieces,
    silence: Silence,
    /// Whether the next pages are sent without a copy.
    zero_copy: bool,
    /// Zero-copy sends whose completion has not come.
    in_flight: u64,
    /// Whether the kernel has confirmed that it did not copy.
    went_uncopied: bool,
}

const SENDING: &str = "data was sent to it";

impl TcpSender {
    /// The error for a peer that is not to be trusted any further.
    pub(super) fn untrusted(&self, why: String) -> NetError {
        NetError::Untrusted { peer: self.link.peer.clone(), why }
    }

    /// Sends bytes `from..to` of the message.
    fn transmit(
        &mut self,
        head: &[u8],
        pages: &[GuestPage<'_>],
        (from, to): (usize, usize),
        how: How,
    ) -> Result<(), NetError> {
        let mut how = how;
        let mut done = from;
        // After EFAULT: never past the end of a page, so that the page that can't be read is found.
        let mut careful = false;
        self.silence.broken();
        while done < to {
            let limit = if careful { to_page_end(head.len(), done).min(to - done) } else { to - done };
            match send_more(self.link.socket.as_fd(), &mut self.pieces, (head, pages), (done, limit), how) {
                Ok(bytes) => {
                    done += bytes;
                    self.silence.broken();
                    if how.zero_copy {
                        self.in_flight += 1;
                        self.settle();
                        how.zero_copy = self.zero_copy;
                    }
                }
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN) => {
                        if self.silence.goes_on() {
                            return Err(self.link.stalled(SENDING, self.silence.lasted));
                        }
                    }
                    // Too much pinned, or memory that can't be: these pages are copied.
                    Some(Errno::NOBUFS | Errno::FAULT) if how.zero_copy => {
                        self.settle();
                        how.zero_copy = false;
                    }
                    Some(Errno::FAULT) if !careful => careful = true,
                    Some(Errno::FAULT) => return Err(self.unreadable(head.len(), done, pages)),
                    _ => {
                        let patience = self.silence.patience.unwrap_or_default();
                        return Err(self.link.error(SENDING, patience, error));
                    }
                },
            }
        }
        Ok(())
    }

    /// Reads what the kernel says of zero-copy sends that are done, and stops asking for them where it copies.
    fn settle(&mut self) {
        let done = completions(self.link.socket.as_fd());
        self.in_flight = self.in_flight.saturating_sub(done.sends);
        if done.copied {
            self.zero_copy = false;
            self.went_uncopied = false;
        } else if done.sends > 0 {
            self.went_uncopied = true;
        }
    }

    fn unreadable(&self, head: usize, done: usize, pages: &[GuestPage<'_>]) -> NetError {
        let index = done.saturating_sub(head) / PAGE_BYTES;
        NetError::Page {
            peer: self.link.peer.clone(),
            index,
            address: pages.get(index).map_or(0, |page| page.address().addr().get()),
            access: "read",
        }
    }
}

/// Bytes from `done` to the end of the head or of the page that it lies in.
fn to_page_end(head: usize, done: usize) -> usize {
    if done < head { head - done } else { PAGE_BYTES - (done - head) % PAGE_BYTES }
}

impl Sender for TcpSender {
    fn send(&mut self, head: &[u8], pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        let page_bytes = pages.len() * PAGE_BYTES;
        let all = head.len() + page_bytes;
        if self.zero_copy && page_bytes >= ZERO_COPY_FROM {
            // The head is the caller's to overwrite as soon as this returns, so it is copied.
            self.transmit(head, pages, (0, head.len()), How { more: true, zero_copy: false })?;
            self.transmit(head, pages, (head.len(), all), How { more: false, zero_copy: true })
        } else {
            self.transmit(head, pages, (0, all), How::default())
        }
    }

    fn backlog_bytes(&self) -> u64 {
        unacknowledged(self.link.socket.as_fd())
    }

    fn path(&self) -> SendPath {
        if self.went_uncopied && self.zero_copy { SendPath::ZeroCopy } else { SendPath::Copy }
    }
}

/// The receiving half.
pub(super) struct TcpReceiver {
    link: Arc<Link>,
    pieces: Pieces,
    silence: Silence,
}

const AWAITING: &str = "a message was awaited";
const AMID: &str = "a message was half here";

impl TcpReceiver {
    /// The error for a peer that is not to be trusted any further.
    pub(super) fn untrusted(&self, why: String) -> NetError {
        NetError::Untrusted { peer: self.link.peer.clone(), why }
    }

    /// The error for what the other end says of our certificate.
    pub(super) fn refused(&self, why: &'static str) -> NetError {
        NetError::Refused { peer: self.link.peer.clone(), why }
    }

    /// The error for the end of the stream.
    pub(super) fn closed(&self, amid: bool) -> NetError {
        self.link.closed(if amid { AMID } else { AWAITING })
    }

    /// Patience begins anew: a message is awaited from now on.
    pub(super) fn begin(&mut self) {
        self.silence.broken();
    }

    /// Takes what is there, a byte at least. `amid`: whether some of the message was there before.
    pub(super) fn recv_some(&mut self, out: &mut [u8], amid: bool) -> Result<usize, NetError> {
        loop {
            match rustix::net::recv(&self.link.socket, &mut *out, RecvFlags::empty()) {
                Ok((0, _)) => return Err(self.closed(amid)),
                Ok((bytes, _)) => {
                    self.silence.broken();
                    return Ok(bytes);
                }
                Err(error) => self.nothing_came(usize::from(amid), error.into())?,
            }
        }
    }

    /// What to do about a call that brought no byte: go on, or end with an error.
    fn nothing_came(&mut self, done: usize, error: io::Error) -> Result<(), NetError> {
        let doing = if done == 0 { AWAITING } else { AMID };
        match Errno::from_io_error(&error) {
            Some(Errno::INTR) => Ok(()),
            Some(Errno::AGAIN) if self.silence.goes_on() => {
                Err(self.link.stalled(doing, self.silence.lasted))
            }
            Some(Errno::AGAIN) => Ok(()),
            _ => Err(self.link.error(doing, self.silence.patience.unwrap_or_default(), error)),
        }
    }
}

impl Receiver for TcpReceiver {
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        let mut done = 0;
        self.silence.broken();
        while done < out.len() {
            match rustix::net::recv(&self.link.socket, &mut out[done..], RecvFlags::WAITALL) {
                Ok((0, _)) => return Err(self.link.closed(if done == 0 { AWAITING } else { AMID })),
                Ok((bytes, _)) => {
                    done += bytes;
                    self.silence.broken();
                }
                Err(error) => self.nothing_came(done, error.into())?,
            }
        }
        Ok(())
    }

    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        let all = pages.len() * PAGE_BYTES;
        let mut done = 0;
        let mut careful = false;
        self.silence.broken();
        while done < all {
            let limit = if careful { to_page_end(0, done) } else { all - done };
            match receive_more(self.link.socket.as_fd(), &mut self.pieces, pages, (done, limit)) {
                Ok(0) => return Err(self.link.closed(AMID)),
                Ok(bytes) => {
                    done += bytes;
                    self.silence.broken();
                }
                Err(error) if Errno::from_io_error(&error) == Some(Errno::FAULT) => {
                    if careful {
                        let index = done / PAGE_BYTES;
                        return Err(NetError::Page {
                            peer: self.link.peer.clone(),
                            index,
                            address: pages[index].address().addr().get(),
                            access: "write",
                        });
                    }
                    careful = true;
                }
                Err(error) => self.nothing_came(done.max(1), error)?,
            }
        }
        Ok(())
    }

    fn set_patience(&mut self, patience: Option<Duration>) {
        let patience = patience.map(|patience| patience.max(Duration::from_millis(20)));
        self.silence = Silence::new(patience);
        let step = patience.map(step_of);
        if let Err(error) = self.link.socket.set_read_timeout(step) {
            tracing::warn!("connection with {} keeps its old patience: {error}", self.link.peer);
        }
    }
}

/// Dials a target by address or host name.
pub struct TcpDialer {
    target: String,
    settings: Settings,
    wanted: Option<Wanted>,
}

impl TcpDialer {
    /// A dialer for `target`, `HOST:PORT`; an IPv6 address in brackets. The name is resolved at each dial.
    #[must_use]
    pub fn new(target: &str, settings: Settings) -> Self {
        Self { target: target.to_owned(), settings, wanted: None }
    }

    /// From now on over TLS, to the target that has the key with that fingerprint; `None`: in the clear.
    #[must_use]
    pub fn pinned(self, pin: Option<Fingerprint>) -> Self {
        Self { wanted: pin.map(|pin| Wanted { pin, authority: None }), ..self }
    }

    /// And with certificates of an authority's: ours is shown, and the target's has to be for `name`, a DNS name or an
    /// address, where one is given. Without effect in the clear.
    ///
    /// # Errors
    /// That is no name.
    pub fn certified(self, authority: Authority, name: Option<&str>) -> Result<Self, NetError> {
        let parsed = name.map(|name| ServerName::try_from(name.to_owned())).transpose();
        let name = parsed.map_err(|_| NetError::Credentials {
            path: name.unwrap_or_default().to_owned(),
            why: "a host has no such name. Say which one its certificate is for with --peer-name".to_owned(),
        })?;
        let wanted = self.wanted.map(|wanted| Wanted { authority: Some((authority, name)), ..wanted });
        Ok(Self { wanted, ..self })
    }
}

impl TcpDialer {
    /// Opens a connection in the clear, within `timeout`, and says nothing.
    ///
    /// # Errors
    /// When nobody answers there.
    pub fn dial(&self, timeout: Duration) -> Result<Connection, NetError> {
        self.connect(timeout).map(Connection::from)
    }

    fn connect(&self, timeout: Duration) -> Result<Halves, NetError> {
        let deadline = Instant::now() + timeout;
        let addresses = resolve(&self.target)?;
        let mut last = None;
        for (place, address) in addresses.iter().enumerate() {
            // What is left is shared among the addresses left, so that a dead first one leaves time for the others.
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let share = left / u32::try_from(addresses.len() - place).unwrap_or(u32::MAX);
            match connect(*address, share.max(Duration::from_millis(1))) {
                Ok(socket) => return halves(socket, *address, &self.settings),
                Err(source) => last = Some(cannot_connect(*address, &self.target, source)),
            }
        }
        Err(last.unwrap_or_else(|| no_such_name(&self.target, io::Error::other("the name has no address"))))
    }
}

impl Dialer for TcpDialer {
    fn call(&self, hello: &Hello, timeout: Duration) -> Result<Connection, NetError> {
        let halves = self.connect(timeout)?;
        match &self.wanted {
            Some(wanted) => handshake::dial(halves, wanted, hello),
            None => {
                let mut connection = Connection::from(halves);
                connection.sender.send(&hello.encode(), &[])?;
                Ok(connection)
            }
        }
    }
}

fn connect(address: SocketAddr, timeout: Duration) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.connect_timeout(&SockAddr::from(address), timeout)?;
    Ok(socket)
}

/// The addresses of `HOST:PORT`.
fn resolve(target: &str) -> Result<Vec<SocketAddr>, NetError> {
    let addresses: Vec<_> = match target.to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(source) if source.kind() == ErrorKind::InvalidInput => {
            return Err(NetError::Os {
                doing: format!("{target} is not an address"),
                remedy: "Give HOST:PORT, an IPv6 address in brackets: [fd00::2]:7700",
                source,
            });
        }
        Err(source) => return Err(no_such_name(target, source)),
    };
    Ok(addresses)
}

fn no_such_name(target: &str, source: io::Error) -> NetError {
    NetError::Os {
        doing: format!("the host of {target} is not known"),
        remedy: "Is the name right? An address works where names do not",
        source,
    }
}

fn cannot_connect(address: SocketAddr, target: &str, source: io::Error) -> NetError {
    let whom =
        if target == address.to_string() { target.to_owned() } else { format!("{target} ({address})") };
    let remedy = match Errno::from_io_error(&source) {
        Some(Errno::CONNREFUSED) => "Is `pageferry receive` running there, and on that port?",
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN) => {
            "There is no way to that host: is the address right, is the link up, is there a route?"
        }
        Some(Errno::ACCESS | Errno::PERM) => "A firewall on this host forbids it",
        Some(Errno::ADDRNOTAVAIL) => "This host has no address of that kind, or no free port",
        _ => "Is the address right, and does a firewall on the way let that port through?",
    };
    NetError::Os { doing: format!("cannot connect to {whom}"), remedy, source }
}

/// Listens for a source.
pub struct TcpAcceptor {
    socket: Socket,
    local: SocketAddr,
    settings: Settings,
}

impl TcpAcceptor {
    /// Listens on `address`, `HOST:PORT`; port 0 takes any free one, `[::]:PORT` serves IPv4 too.
    ///
    /// # Errors
    /// A sentence with a remedy where the address is taken, is not this host's, or needs privileges.
    pub fn listen(address: &str, settings: Settings) -> Result<Self, NetError> {
        let addresses = resolve(address)?;
        let Some(wanted) = addresses.first().copied() else {
            return Err(no_such_name(address, io::Error::other("the name has no address")));
        };
        let failed = |source: io::Error| {
            let remedy = match Errno::from_io_error(&source) {
                Some(Errno::ADDRINUSE) => {
                    "Another program (another `pageferry receive`?) listens there: stop it, or choose another port"
                }
                Some(Errno::ADDRNOTAVAIL) => {
                    "That is not an address of this host; 0.0.0.0 or [::] is any of them"
                }
                Some(Errno::ACCESS) => "Ports below 1024 need root; choose another port",
                _ => "Choose another address or port",
            };
            NetError::Os { doing: format!("cannot listen on {address}"), remedy, source }
        };
        let (socket, local) = listen_on(wanted).map_err(failed)?;
        Ok(Self { socket, local, settings })
    }

    /// The address it listens on, the port filled in.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }
}

fn listen_on(wanted: SocketAddr) -> io::Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(wanted), Type::STREAM, Some(Protocol::TCP))?;
    if wanted.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // A target that starts again at once gets its port back; a port somebody listens on stays taken.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(wanted))?;
    socket.listen(BACKLOG)?;
    // Between poll and accept the connection may go away again; accept must not block then.
    socket.set_nonblocking(true)?;
    let local = socket.local_addr()?.as_socket().unwrap_or(wanted);
    Ok((socket, local))
}

impl TcpAcceptor {
    /// The next connection, in the clear and whoever it is, or `None` when `timeout` has passed. [`super::entrance`]
    /// is what lets nobody in but who may.
    ///
    /// # Errors
    /// When the system accepts no more.
    pub fn accept(&mut self, timeout: Duration) -> Result<Option<Connection>, NetError> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if !readable(&self.socket, left).map_err(|source| self.cannot_accept(source))? {
                return Ok(None);
            }
            let Some((socket, peer)) = self.take().map_err(|source| self.cannot_accept(source))? else {
                continue;
            };
            match halves(socket, peer, &self.settings) {
                Ok(halves) => return Ok(Some(halves.into())),
                // One caller that is gone already must not end the wait for the right one.
                Err(error) => tracing::warn!("{error}"),
            }
        }
    }

    /// A connection that waits, without waiting for one.
    pub(super) fn take(&self) -> io::Result<Option<(Socket, SocketAddr)>> {
        match self.socket.accept() {
            Ok((socket, address)) => Ok(Some((socket, address.as_socket().unwrap_or(self.local)))),
            // It went away before it was accepted: errors of that connection, not of the listener (accept(2)).
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock
                        | ErrorKind::ConnectionAborted
                        | ErrorKind::ConnectionReset
                        | ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(source),
        }
    }

    /// Its socket, to be polled.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// How its connections behave.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn cannot_accept(&self, source: io::Error) -> NetError {
        NetError::Os {
            doing: format!("cannot accept a connection on {}", self.local),
            remedy: "If it says that too many files are open, raise the limit (ulimit -n)",
            source,
        }
    }
}

/// Waits until `socket` has something to read, `None` for ever; whether it has.
fn readable(socket: &Socket, timeout: Option<Duration>) -> io::Result<bool> {
    let until = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let mut list = [PollFd::new(socket, PollFlags::IN)];
    match poll(&mut list, until.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        // The caller's loop looks at the clock again.
        Err(Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
