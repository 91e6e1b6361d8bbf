//! Simulated links: byte streams with latency, bandwidth, bounded buffers and everything that goes wrong on the way.
//! Order is kept within a connection and nothing else is promised.
//!
//! A link that is *down* keeps what is on its way (TCP sends it again) and delivers it when the link is up again. A
//! link that is *cut* takes its connections with it: with notice both ends learn of it, without they never do.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::rng::Rng;
use super::runtime::nanos;
use super::scheduler::{Key, MICRO, MILLI, SECOND, Scheduler};
use crate::error::NetError;
use crate::memory::{GuestPage, OwnedPages};
use crate::net::{Acceptor, Caller, Connection, Dialer, HangUp, Receiver, SendPath, Sender};
use crate::units::{PAGE_BYTES, u64_of, usize_of};
use crate::wire::hello::{Hello, HelloBytes, Secret};

/// How long a send may stand still before the kernel gives the connection up (TCP_USER_TIMEOUT).
const SEND_PATIENCE: u64 = 30 * SECOND;

/// What a link is like.
#[derive(Clone, Debug)]
pub(crate) struct LinkShape {
    /// One way, nanoseconds.
    pub(crate) latency: u64,
    /// On top of it, up to.
    pub(crate) jitter: u64,
    /// Bytes a second.
    pub(crate) bandwidth: u64,
    /// Bytes a connection buffers on the way.
    pub(crate) buffer: usize,
    /// Largest piece that travels as one.
    pub(crate) piece: usize,
    /// Page bytes are read when they leave instead of when they are sent, as zero-copy does.
    pub(crate) late_pages: bool,
    /// A dial is refused once in so many.
    pub(crate) refuse: u64,
    /// A connection reaches the acceptor this much late, up to.
    pub(crate) late_accept: u64,
    /// A lane is slower than the link by this much latency, once in a while, up to.
    pub(crate) slow_lane: u64,
}

impl LinkShape {
    /// One of many.
    pub(crate) fn drawn(rng: &mut Rng) -> Self {
        Self {
            latency: rng.pick(&[20 * MICRO, 200 * MICRO, 5 * MILLI, 40 * MILLI]),
            jitter: rng.pick(&[1, 10 * MICRO, MILLI]),
            bandwidth: rng.pick(&[10, 50, 125, 1250, 5000]) * 1_000_000,
            buffer: usize_of(rng.pick(&[4, 32, 256, 2048]) * 1024),
            piece: usize_of(rng.pick(&[1000, 1448, 9000, 65_536])),
            late_pages: rng.once_in(3),
            refuse: if rng.once_in(10) { 6 } else { 0 },
            late_accept: rng.pick(&[1, MILLI, 300 * MILLI]),
            slow_lane: rng.pick(&[0, 0, 10 * MILLI, 400 * MILLI]),
        }
    }
}

/// The state of the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Up,
    Down,
}

enum Bytes {
    Own(Vec<u8>),
    /// A part of a guest page, read when it arrives.
    Page {
        memory: Arc<OwnedPages>,
        page: usize,
        from: usize,
        len: usize,
    },
}

struct Segment {
    bytes: Bytes,
    read: usize,
    arrives: u64,
}

impl Segment {
    fn len(&self) -> usize {
        match &self.bytes {
            Bytes::Own(bytes) => bytes.len() - self.read,
            Bytes::Page { len, .. } => len - self.read,
        }
    }
    fn take(&mut self, out: &mut [u8]) {
        match &self.bytes {
            Bytes::Own(bytes) => out.copy_from_slice(&bytes[self.read..self.read + out.len()]),
            Bytes::Page { memory, page, from, .. } => memory.page(*page).copy_part_to(from + self.read, out),
        }
        self.read += out.len();
    }
}

/// One direction of a connection.
struct Pipe {
    segments: VecDeque<Segment>,
    queued: usize,
    last_arrival: u64,
    lag: u64,
    changed: Key,
    /// When the reader learns that no more will come.
    end: Option<u64>,
}

#[derive(Default)]
struct End {
    handles: u8,
    hung_up: bool,
    closed: bool,
    /// When this end learns that the connection is gone, everything in flight with it.
    reset: Option<u64>,
}

struct Line {
    /// The dialler's, the acceptor's.
    ends: [End; 2],
    /// From the dialler, from the acceptor.
    pipes: [Pipe; 2],
    /// Nothing passes any more and nobody will ever be told.
    dead: bool,
    /// Dialled by a stranger, not by the source.
    strange: bool,
}

struct State {
    rng: Rng,
    shape: LinkShape,
    link: Link,
    wire: Wire,
    lines: Vec<Line>,
    listening: bool,
    backlog: Vec<(u64, usize)>,
    memories: Vec<Arc<OwnedPages>>,
}

/// When the last piece that has been put on it has left. Of one link, or of all that share a wire.
#[derive(Clone, Default)]
pub(crate) struct Wire(Arc<AtomicU64>);

/// The link between two hosts.
pub(crate) struct Network {
    scheduler: Arc<Scheduler>,
    state: Mutex<State>,
    arrived: Key,
    link_changed: Key,
}

impl Network {
    /// A link of that shape; page bytes of `memories` may be read late.
    pub(crate) fn new(
        scheduler: &Arc<Scheduler>,
        rng: Rng,
        shape: LinkShape,
        memories: Vec<Arc<OwnedPages>>,
    ) -> Arc<Self> {
        let state = State {
            rng,
            shape,
            link: Link::Up,
            wire: Wire::default(),
            lines: Vec::new(),
            listening: false,
            backlog: Vec::new(),
            memories,
        };
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            state: Mutex::new(state),
            arrived: scheduler.signal(),
            link_changed: scheduler.signal(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts everything on `wire`, where others' bytes are too.
    pub(crate) fn share(&self, wire: &Wire) {
        self.state().wire = wire.clone();
    }

    /// Connections nobody has accepted, and those that are open at either end: none, of a migration that is over.
    pub(crate) fn left(&self) -> (usize, usize) {
        let state = self.state();
        let live = |line: &&Line| line.ends.iter().any(|end| end.handles > 0 && !end.closed);
        (state.backlog.len(), state.lines.iter().filter(live).count())
    }

    /// What the source dials with.
    pub(crate) fn dialer(self: &Arc<Self>) -> Arc<SimDialer> {
        Arc::new(SimDialer { network: Arc::clone(self), strange: false })
    }

    /// What a stranger dials with.
    pub(crate) fn strange_dialer(self: &Arc<Self>) -> Arc<SimDialer> {
        Arc::new(SimDialer { network: Arc::clone(self), strange: true })
    }

    /// What the target accepts with; one at a time.
    pub(crate) fn listen(self: &Arc<Self>) -> Box<SimAcceptor> {
        self.state().listening = true;
        Box::new(SimAcceptor { network: Arc::clone(self) })
    }

    /// Connections that one end still holds open.
    pub(crate) fn open(&self, side: usize) -> usize {
        let open = |l: &&Line| l.ends[side].handles > 0 && !l.ends[side].closed && !(side == 0 && l.strange);
        self.state().lines.iter().filter(open).count()
    }

    /// Takes the link down; what is on its way waits.
    pub(crate) fn down(&self) {
        let now = self.scheduler.now();
        let mut state = self.state();
        state.link = Link::Down;
        for pipe in state.lines.iter_mut().flat_map(|l| &mut l.pipes) {
            for segment in pipe.segments.iter_mut().filter(|s| s.arrives > now) {
                segment.arrives = u64::MAX;
            }
            pipe.end = pipe.end.map(|at| if at > now { u64::MAX } else { at });
        }
        self.scheduler.note(|| "the link is down".to_owned());
    }

    /// Brings it up again; TCP sends again what was lost.
    pub(crate) fn up(&self) {
        let now = self.scheduler.now();
        let keys: Vec<Key> = {
            let mut guard = self.state();
            let state = &mut *guard;
            state.link = Link::Up;
            state.wire.0.store(now, SeqCst);
            for line in state.lines.iter_mut().filter(|l| !l.dead) {
                for pipe in &mut line.pipes {
                    let mut at = now + state.shape.latency + state.rng.below(200 * MILLI);
                    for segment in pipe.segments.iter_mut().filter(|s| s.arrives == u64::MAX) {
                        at += 1 + u64_of(segment.len()) * SECOND / state.shape.bandwidth;
                        segment.arrives = at;
                    }
                    pipe.last_arrival = pipe.last_arrival.max(at);
                    pipe.end = pipe.end.map(|end| if end == u64::MAX { at + 1 } else { end });
                }
            }
            state.lines.iter().flat_map(|l| [l.pipes[0].changed, l.pipes[1].changed]).collect()
        };
        self.scheduler.note(|| "the link is up".to_owned());
        for key in keys {
            self.scheduler.wake(key);
        }
        self.scheduler.wake(self.link_changed);
    }

    /// Ends every connection at both ends, what is in flight with it. Without `notice` nobody is told.
    pub(crate) fn cut(&self, notice: bool) {
        let lines = self.state().lines.len();
        self.scheduler
            .note(|| format!("every connection is cut, {}", if notice { "with notice" } else { "silently" }));
        for line in 0..lines {
            self.cut_line(line, notice);
        }
    }

    /// Ends one connection, any of those open.
    pub(crate) fn cut_any(&self, notice: bool) {
        let line = {
            let mut state = self.state();
            let open: Vec<usize> = (0..state.lines.len())
                .filter(|l| state.lines[*l].ends.iter().all(|e| e.handles > 0 && !e.closed))
                .collect();
            if open.is_empty() { None } else { Some(state.rng.pick(&open)) }
        };
        if let Some(line) = line {
            self.scheduler.note(|| format!("connection {line} is cut"));
            self.cut_line(line, notice);
        }
    }

    fn cut_line(&self, line: usize, notice: bool) {
        let now = self.scheduler.now();
        let keys = {
            let mut guard = self.state();
            let state = &mut *guard;
            let line = &mut state.lines[line];
            line.dead = true;
            for pipe in &mut line.pipes {
                for segment in pipe.segments.iter_mut().filter(|s| s.arrives > now) {
                    segment.arrives = u64::MAX;
                }
                pipe.end = pipe.end.filter(|at| *at <= now);
            }
            if notice {
                for end in &mut line.ends {
                    end.reset.get_or_insert(now + state.rng.below(20 * MILLI));
                }
            }
            [line.pipes[0].changed, line.pipes[1].changed]
        };
        for key in keys {
            self.scheduler.wake(key);
        }
    }

    /// What the kernel does when the processes of one side are gone: their connections are closed, their listener
    /// too. With the link down or a connection dead the peer does not hear of it.
    pub(crate) fn kill_side(&self, side: usize) {
        let lines = self.state().lines.len();
        for line in 0..lines {
            if side == 0 && self.state().lines[line].strange {
                continue;
            }
            self.close(line, side);
            self.state().lines[line].ends[side].handles = 0;
        }
        if side == 1 {
            self.stop_listening();
        }
    }

    fn stop_listening(&self) {
        let backlog = {
            let mut state = self.state();
            state.listening = false;
            std::mem::take(&mut state.backlog)
        };
        for (_, line) in backlog {
            self.close(line, 1);
        }
    }

    /// One end closes: the peer gets what is on its way and then the end, or, if it is rude, a reset.
    fn close(&self, line: usize, side: usize) {
        let now = self.scheduler.now();
        let keys = {
            let mut guard = self.state();
            let state = &mut *guard;
            let (latency, up) = (state.shape.latency, state.link == Link::Up);
            let rude = state.rng.once_in(3);
            let line = &mut state.lines[line];
            if line.ends[side].closed {
                return;
            }
            line.ends[side].closed = true;
            let unread = line.pipes[1 - side].segments.iter().any(|s| s.arrives <= now);
            let keys = [line.pipes[0].changed, line.pipes[1].changed];
            if !line.dead {
                let pipe = &mut line.pipes[side];
                let at = if up { pipe.last_arrival.max(now + latency) } else { u64::MAX };
                pipe.end.get_or_insert(at);
                if (rude || unread) && up {
                    line.ends[1 - side].reset.get_or_insert(now + latency);
                }
            }
            keys
        };
        for key in keys {
            self.scheduler.wake(key);
        }
    }

    fn release(&self, line: usize, side: usize) {
        let last = {
            let mut state = self.state();
            let end = &mut state.lines[line].ends[side];
            end.handles = end.handles.saturating_sub(1);
            end.handles == 0
        };
        if last {
            self.close(line, side);
        }
    }

    fn connect(&self, strange: bool) -> usize {
        let now = self.scheduler.now();
        let changed = [self.scheduler.signal(), self.scheduler.signal()];
        let mut guard = self.state();
        let state = &mut *guard;
        let lag = if state.shape.slow_lane > 0 && state.rng.once_in(2) {
            state.rng.below(state.shape.slow_lane)
        } else {
            0
        };
        let pipe = |changed| Pipe {
            segments: VecDeque::new(),
            queued: 0,
            last_arrival: now,
            lag,
            changed,
            end: None,
        };
        let end = || End { handles: 3, ..End::default() };
        state.lines.push(Line { ends: [end(), end()], pipes: changed.map(pipe), dead: false, strange });
        state.lines.len() - 1
    }

    fn connection(self: &Arc<Self>, line: usize, side: usize) -> Connection {
        let handle = || Handle { network: Arc::clone(self), line, side };
        let peer = format!("{} (connection {line})", ["the target", "the source"][side]);
        Connection {
            peer: peer.clone(),
            sender: Box::new(SimSender { handle: handle(), peer: peer.clone(), pages: 0 }),
            receiver: Box::new(SimReceiver { handle: handle(), peer, patience: None }),
            hang_up: Arc::new(SimHangUp { handle: handle() }),
        }
    }
}

impl State {
    /// Puts one piece on the link; whether there was room.
    fn put(&mut self, now: u64, line: usize, side: usize, bytes: Bytes, len: usize) {
        let depart = self.wire.0.load(SeqCst).max(now);
        let gone = depart + u64_of(len) * SECOND / self.shape.bandwidth;
        self.wire.0.store(gone, SeqCst);
        let jitter = self.rng.below(self.shape.jitter);
        let line = &mut self.lines[line];
        let pipe = &mut line.pipes[side];
        let arrives = (gone + self.shape.latency + jitter + pipe.lag).max(pipe.last_arrival);
        let lost = line.dead || self.link == Link::Down;
        if !lost {
            pipe.last_arrival = arrives;
        }
        pipe.segments.push_back(Segment { bytes, read: 0, arrives: if lost { u64::MAX } else { arrives } });
        pipe.queued += len;
    }
}

/// One of the three handles of an end of a connection; the last one to go closes it.
struct Handle {
    network: Arc<Network>,
    line: usize,
    side: usize,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.network.scheduler.alive() {
            self.network.release(self.line, self.side);
        }
    }
}

impl Handle {
    /// What keeps this end from going on, if something does.
    fn trouble(&self, state: &mut State, now: u64, peer: &str, doing: &'static str) -> Result<(), NetError> {
        let os_error = state.rng.once_in(2);
        let line = &state.lines[self.line];
        let end = &line.ends[self.side];
        if end.hung_up {
            return Err(NetError::HungUp);
        }
        if end.reset.is_some_and(|at| at <= now) {
            return Err(if os_error {
                NetError::Os {
                    doing: format!("{doing} {peer}"),
                    remedy: "Look at the other end's output",
                    source: io::Error::from(io::ErrorKind::ConnectionReset),
                }
            } else {
                NetError::Closed { peer: peer.to_owned(), doing }
            });
        }
        Ok(())
    }

    /// Sends all of `len` bytes; `cut` makes the piece of them from its first argument on, of its second's length.
    fn send(
        &self,
        peer: &str,
        len: usize,
        cut: &dyn Fn(&State, usize, usize) -> Bytes,
    ) -> Result<(), NetError> {
        const DOING: &str = "sending to it";
        let scheduler = &self.network.scheduler;
        let (mut done, mut moved_at) = (0, scheduler.now());
        while done < len {
            if !scheduler.alive() {
                return Err(NetError::HungUp);
            }
            let now = scheduler.now();
            let changed = {
                let mut guard = self.network.state();
                let state = &mut *guard;
                self.trouble(state, now, peer, DOING)?;
                let line = &state.lines[self.line];
                // The peer has closed: its kernel answers data with a reset.
                if line.ends[1 - self.side].closed
                    && line.pipes[1 - self.side].end.is_some_and(|at| at <= now)
                {
                    return Err(NetError::Closed { peer: peer.to_owned(), doing: DOING });
                }
                let pipe = &line.pipes[self.side];
                let room = state.shape.buffer.saturating_sub(pipe.queued);
                if room == 0 {
                    Some((pipe.changed, line.ends[self.side].reset))
                } else {
                    let piece = (len - done).min(room).min(1 + state.rng.index(state.shape.piece));
                    let bytes = cut(state, done, piece);
                    state.put(now, self.line, self.side, bytes, piece);
                    scheduler.wake(state.lines[self.line].pipes[self.side].changed);
                    done += piece;
                    moved_at = now;
                    None
                }
            };
            match changed {
                None => scheduler.interleave(),
                Some((changed, reset)) => {
                    if now >= moved_at + SEND_PATIENCE {
                        let seconds = (now - moved_at) / SECOND;
                        return Err(NetError::Stalled { peer: peer.to_owned(), seconds, doing: DOING });
                    }
                    let until = (moved_at + SEND_PATIENCE).min(reset.unwrap_or(u64::MAX));
                    scheduler.block(changed, Some(until), "room to send");
                }
            }
        }
        Ok(())
    }

    fn recv(
        &self,
        peer: &str,
        patience: Option<Duration>,
        len: usize,
        put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), NetError> {
        const DOING: &str = "receiving from it";
        let scheduler = &self.network.scheduler;
        let (mut done, mut moved_at) = (0, scheduler.now());
        let mut buffer = [0; PAGE_BYTES];
        while done < len {
            if !scheduler.alive() {
                return Err(NetError::HungUp);
            }
            let now = scheduler.now();
            let mut guard = self.network.state();
            let state = &mut *guard;
            self.trouble(state, now, peer, DOING)?;
            let line = &mut state.lines[self.line];
            let reset = line.ends[self.side].reset;
            let pipe = &mut line.pipes[1 - self.side];
            let changed = pipe.changed;
            if let Some(segment) = pipe.segments.front_mut().filter(|s| s.arrives <= now) {
                let piece = segment.len().min(len - done).min(PAGE_BYTES);
                segment.take(&mut buffer[..piece]);
                if segment.len() == 0 {
                    pipe.segments.pop_front();
                }
                pipe.queued -= piece;
                drop(guard);
                put(done, &buffer[..piece]);
                scheduler.wake(changed);
                done += piece;
                moved_at = now;
                scheduler.interleave();
                continue;
            }
            let ended = pipe.end.is_some_and(|at| at <= now) && pipe.segments.is_empty();
            let next = pipe.segments.front().map_or(pipe.end, |s| Some(s.arrives));
            drop(guard);
            if ended {
                return Err(NetError::Closed { peer: peer.to_owned(), doing: DOING });
            }
            let limit = patience.map(|p| moved_at.saturating_add(nanos(p)));
            if limit.is_some_and(|at| at <= now) {
                let seconds = (now - moved_at) / SECOND;
                return Err(NetError::Stalled { peer: peer.to_owned(), seconds, doing: DOING });
            }
            let until = [next, limit, reset].into_iter().flatten().min().filter(|at| *at < u64::MAX);
            scheduler.block(changed, until, "bytes to arrive");
        }
        Ok(())
    }
}

struct SimSender {
    handle: Handle,
    peer: String,
    pages: u64,
}

impl Sender for SimSender {
    fn send(&mut self, head: &[u8], pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        self.handle.network.scheduler.interleave();
        self.handle.send(&self.peer, head.len(), &|_, at, len| Bytes::Own(head[at..at + len].to_vec()))?;
        self.pages += u64_of(pages.len());
        for page in pages {
            self.handle.send(&self.peer, PAGE_BYTES, &|state, at, len| {
                let late = state.shape.late_pages;
                let home = state.memories.iter().filter(|_| late).find_map(|m| Some((m, m.index_of(*page)?)));
                match home {
                    Some((memory, page)) => Bytes::Page { memory: Arc::clone(memory), page, from: at, len },
                    None => {
                        let mut bytes = vec![0; len];
                        page.copy_part_to(at, &mut bytes);
                        Bytes::Own(bytes)
                    }
                }
            })?;
        }
        Ok(())
    }

    fn backlog_bytes(&self) -> u64 {
        let now = self.handle.network.scheduler.now();
        let state = self.handle.network.state();
        let pipe = &state.lines[self.handle.line].pipes[self.handle.side];
        u64_of(pipe.segments.iter().filter(|s| s.arrives > now).map(Segment::len).sum())
    }

    fn path(&self) -> SendPath {
        if self.handle.network.state().shape.late_pages { SendPath::ZeroCopy } else { SendPath::Copy }
    }
}

struct SimReceiver {
    handle: Handle,
    peer: String,
    patience: Option<Duration>,
}

impl Receiver for SimReceiver {
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        self.handle.network.scheduler.interleave();
        let len = out.len();
        self.handle.recv(&self.peer, self.patience, len, &mut |at, bytes| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
        })
    }

    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        self.handle.network.scheduler.interleave();
        for page in pages {
            self.handle.recv(&self.peer, self.patience, PAGE_BYTES, &mut |at, bytes| {
                page.copy_part_from(at, bytes)
            })?;
        }
        Ok(())
    }

    fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }
}

struct SimHangUp {
    handle: Handle,
}

impl HangUp for SimHangUp {
    fn hang_up(&self) {
        let Handle { network, line, side } = &self.handle;
        if !network.scheduler.alive() {
            return;
        }
        network.state().lines[*line].ends[*side].hung_up = true;
        network.close(*line, *side);
        network.scheduler.interleave();
    }
}

pub(crate) struct SimDialer {
    network: Arc<Network>,
    strange: bool,
}

impl Dialer for SimDialer {
    fn call(&self, hello: &Hello, timeout: Duration) -> Result<Connection, NetError> {
        let mut connection = self.dial(timeout)?;
        connection.sender.send(&hello.encode(), &[])?;
        Ok(connection)
    }
}

impl SimDialer {
    pub(crate) fn dial(&self, timeout: Duration) -> Result<Connection, NetError> {
        let network = &self.network;
        let scheduler = &network.scheduler;
        scheduler.interleave();
        let deadline = scheduler.now().saturating_add(nanos(timeout));
        let failed = |kind: io::ErrorKind| NetError::Os {
            doing: "cannot connect to the target".to_owned(),
            remedy: "Is it running?",
            source: io::Error::from(kind),
        };
        loop {
            if !scheduler.alive() {
                return Err(NetError::HungUp);
            }
            let (latency, up, refused) = {
                let mut state = network.state();
                let odds = state.shape.refuse;
                (state.shape.latency, state.link == Link::Up, state.rng.once_in(odds))
            };
            if !up {
                if !scheduler.block(network.link_changed, Some(deadline), "the link, to dial") {
                    return Err(failed(io::ErrorKind::TimedOut));
                }
                continue;
            }
            scheduler.sleep(2 * latency);
            if refused || !network.state().listening {
                return Err(failed(io::ErrorKind::ConnectionRefused));
            }
            let line = network.connect(self.strange);
            let late = {
                let mut state = network.state();
                let late = state.shape.late_accept;
                scheduler.now() + state.rng.below(late)
            };
            network.state().backlog.push((late, line));
            scheduler.wake(network.arrived);
            return Ok(network.connection(line, 0));
        }
    }
}

pub(crate) struct SimAcceptor {
    network: Arc<Network>,
}

/// How long a connection may take for its first 64 bytes.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);

impl Acceptor for SimAcceptor {
    fn caller(&mut self, _: &Secret, timeout: Duration) -> Result<Option<Caller>, NetError> {
        let Some(mut connection) = self.accept(timeout)? else { return Ok(None) };
        connection.receiver.set_patience(Some(HELLO_PATIENCE));
        let mut hello = HelloBytes::zeroed();
        match connection.receiver.recv(&mut hello[..]) {
            Ok(()) => Ok(Some(Caller { connection, hello })),
            Err(error) => {
                self.network.scheduler.note(|| format!("somebody came and said nothing: {error}"));
                Ok(None)
            }
        }
    }
}

impl SimAcceptor {
    pub(crate) fn accept(&mut self, timeout: Duration) -> Result<Option<Connection>, NetError> {
        let network = &self.network;
        let scheduler = &network.scheduler;
        scheduler.interleave();
        let deadline = scheduler.now().saturating_add(nanos(timeout));
        loop {
            if !scheduler.alive() {
                return Err(NetError::HungUp);
            }
            let now = scheduler.now();
            let next = {
                let mut state = network.state();
                let due = (0..state.backlog.len()).min_by_key(|i| state.backlog[*i]);
                match due {
                    Some(i) if state.backlog[i].0 <= now => {
                        let (_, line) = state.backlog.swap_remove(i);
                        drop(state);
                        return Ok(Some(network.connection(line, 1)));
                    }
                    Some(i) => state.backlog[i].0,
                    None => u64::MAX,
                }
            };
            if now >= deadline {
                return Ok(None);
            }
            scheduler.block(network.arrived, Some(next.min(deadline)), "a connection to accept");
        }
    }
}

impl Drop for SimAcceptor {
    fn drop(&mut self) {
        if self.network.scheduler.alive() {
            self.network.stop_listening();
        }
    }
}
