//! Reads from files into slots of an arena, or straight into guest pages, many at once.
//!
//! ```text
//!     SlotReads -- owns --> Arena (slots), one Flight a slot (what is under way in it)
//!         |
//!         +---- drives ---> Engine: Uring (uring.rs), or a few threads with preadv2 (pread.rs) where there is none
//! ```
//!
//! Owner: one thread from the first read on (the ring is bound to it); it may be made on another.
//! Invariants: a slot has at most one read under way; its bytes can be looked at only when it has none; the arena
//! outlives every read: dropping waits for those under way, and where that is not possible, gives the memory up.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::iovec;

use super::pread::Threads;
use super::uring::Uring;
use crate::limits::READ_BYTES_MAX;
use crate::memory::{Arena, GuestPage};
use crate::units::{PAGE_BYTES, u64_of};

/// How long a drop waits for reads under way before it gives their memory up.
const DROP_WAIT: Duration = Duration::from_secs(10);
/// How often one read is tried again when the kernel says "again" or "interrupted".
const TRIES_MAX: u32 = 16;

/// `RWF_DONTCACHE` of linux/fs.h (Linux 6.14): a buffered read that leaves nothing in the page cache.
pub const RWF_DONTCACHE: i32 = 0x80;

/// A file reads are made from.
#[derive(Debug)]
pub struct ReadFile {
    /// The open file.
    pub fd: OwnedFd,
    /// RWF_* flags for each read, 0 for none.
    pub flags: i32,
}

/// Where the bytes of one request go. Addresses, because the kernel writes there behind the compiler's back.
#[derive(Clone, Copy)]
pub(super) enum Destination {
    /// Contiguous, inside the arena.
    Arena(NonNull<u8>, usize),
    /// A list of pieces that stays where it is until the request has completed.
    Pieces(NonNull<iovec>, usize),
}

/// One request to an engine.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) slot: usize,
    pub(super) file: usize,
    pub(super) offset: u64,
    pub(super) to: Destination,
}

// SAFETY: a request is addresses and numbers; the memory behind them outlives it by SlotReads' invariant. Worth it:
// the fallback's threads take requests from a queue.
unsafe impl Send for Request {}

/// What an engine says about one request.
pub(super) struct Answer {
    pub(super) slot: usize,
    pub(super) result: io::Result<usize>,
}

enum Engine {
    Uring(Box<Uring>),
    Threads(Threads),
}

impl Engine {
    fn push(&mut self, request: Request) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.push(request),
            Self::Threads(threads) => {
                threads.push(request);
                Ok(())
            }
        }
    }
    fn wait(&mut self, answers: &mut Vec<Answer>, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.wait(answers, timeout),
            Self::Threads(threads) => {
                threads.wait(answers, timeout);
                Ok(())
            }
        }
    }
}

/// What is under way in one slot.
struct Flight {
    active: bool,
    file: usize,
    offset: u64,
    /// Bytes asked for.
    bytes: usize,
    /// Bytes that complete it; fewer than `bytes` where the file ends in between.
    enough: usize,
    got: usize,
    tries: u32,
    /// Pieces in use, 0 for a read into the slot itself.
    pieces: usize,
    iovecs: Box<[iovec]>,
}

/// A completed read.
#[derive(Debug)]
pub struct Done {
    /// Its slot.
    pub slot: usize,
    /// Bytes read: what was enough, or fewer where the file ended.
    pub result: io::Result<usize>,
}

/// Reads into slots.
pub struct SlotReads {
    engine: Engine,
    files: Arc<[ReadFile]>,
    arena: ManuallyDrop<Arena>,
    flights: ManuallyDrop<Box<[Flight]>>,
    answers: Vec<Answer>,
    in_flight: usize,
    notes: Vec<String>,
}

// SAFETY: the raw addresses in here (iovecs, requests) name memory that belongs to the arena or, for direct reads, to
// guest pages whose owner keeps them mapped until the completion; none is bound to a thread. Worth it: a reader is made
// on one thread and moved to the task that uses it.
unsafe impl Send for SlotReads {}

impl SlotReads {
    /// Reads from `files` into `slots` slots of [`READ_BYTES_MAX`]. Where the kernel has no io_uring, or forbids it,
    /// threads read instead; [`Self::notes`] says so. Fails only where there is no memory or no thread to be had.
    pub fn new(files: Arc<[ReadFile]>, slots: usize) -> io::Result<Self> {
        let arena = Arena::new(slots, READ_BYTES_MAX)?;
        let mut notes = Vec::new();
        let engine = match Uring::new(&files, &arena, &mut notes) {
            Ok(ring) => Engine::Uring(Box::new(ring)),
            Err(why) => {
                notes.push(format!("disk reads go through threads, which costs speed: {why}"));
                Engine::Threads(Threads::new(Arc::clone(&files), slots)?)
            }
        };
        Ok(Self::with(engine, files, arena, notes))
    }

    /// The same without trying io_uring at all.
    pub fn with_threads(files: Arc<[ReadFile]>, slots: usize) -> io::Result<Self> {
        let arena = Arena::new(slots, READ_BYTES_MAX)?;
        let engine = Engine::Threads(Threads::new(Arc::clone(&files), slots)?);
        Ok(Self::with(engine, files, arena, Vec::new()))
    }

    fn with(engine: Engine, files: Arc<[ReadFile]>, arena: Arena, notes: Vec<String>) -> Self {
        let slots = arena.slots();
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let flight = || Flight {
            active: false,
            file: 0,
            offset: 0,
            bytes: 0,
            enough: 0,
            got: 0,
            tries: 0,
            pieces: 0,
            iovecs: vec![empty; READ_BYTES_MAX / PAGE_BYTES].into_boxed_slice(),
        };
        Self {
            engine,
            files,
            arena: ManuallyDrop::new(arena),
            flights: ManuallyDrop::new((0..slots).map(|_| flight()).collect()),
            answers: Vec::with_capacity(slots),
            in_flight: 0,
            notes,
        }
    }

    /// Slots there are.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.flights.len()
    }
    /// Reads under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
    /// What could not be had, a sentence each.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
    /// How reads are made, in a few words: "io_uring, registered buffers and files, 4 KiB pages".
    #[must_use]
    pub fn path(&self) -> String {
        let backing = self.arena.backing();
        match &self.engine {
            Engine::Uring(ring) => format!("io_uring{}, {backing}", ring.registered()),
            Engine::Threads(_) => format!("threads, {backing}"),
        }
    }

    /// Queues a read of `bytes` at `offset` of file number `file` into slot `slot`; `enough` bytes complete it (fewer
    /// than `bytes` where the file is known to end before).
    ///
    /// # Panics
    /// If the slot has a read under way, or a number is out of range.
    pub fn read(
        &mut self,
        slot: usize,
        file: usize,
        offset: u64,
        bytes: usize,
        enough: usize,
    ) -> io::Result<()> {
        let flight = self.start(slot, file, offset, bytes, enough);
        flight.pieces = 0;
        self.issue(slot)
    }

    /// Queues a read into guest pages, in this order; what has none goes to its place in the slot. They must stay mapped
    /// until it has completed.
    ///
    /// # Panics
    /// As [`Self::read`]; also if `pages` do not hold `bytes`.
    pub fn read_direct(
        &mut self,
        slot: usize,
        file: usize,
        offset: u64,
        enough: usize,
        pages: &[Option<GuestPage<'_>>],
    ) -> io::Result<()> {
        let own = self.arena.address(slot);
        let flight = self.start(slot, file, offset, pages.len() * PAGE_BYTES, enough);
        flight.pieces = 0;
        for (at, page) in pages.iter().enumerate() {
            let address =
                page.map_or(own.as_ptr().wrapping_add(at * PAGE_BYTES), |page| page.address().as_ptr());
            // Neighbours in memory share a piece: fewer for the kernel to walk.
            if let Some(last) = flight.pieces.checked_sub(1) {
                let piece = &mut flight.iovecs[last];
                if piece.iov_base.cast::<u8>().wrapping_add(piece.iov_len) == address {
                    piece.iov_len += PAGE_BYTES;
                    continue;
                }
            }
            flight.iovecs[flight.pieces] = iovec { iov_base: address.cast(), iov_len: PAGE_BYTES };
            flight.pieces += 1;
        }
        self.issue(slot)
    }

    fn start(&mut self, slot: usize, file: usize, offset: u64, bytes: usize, enough: usize) -> &mut Flight {
        assert!(file < self.files.len(), "file {file} of {}", self.files.len());
        assert!(
            bytes > 0 && bytes <= READ_BYTES_MAX && enough <= bytes,
            "a read of {enough} of {bytes} bytes"
        );
        let flight = &mut self.flights[slot];
        assert!(!flight.active, "slot {slot} has a read under way");
        (flight.file, flight.offset, flight.bytes) = (file, offset, bytes);
        (flight.enough, flight.got, flight.tries) = (enough, 0, 0);
        flight
    }

    /// Hands what is left of a slot's read to the engine.
    fn issue(&mut self, slot: usize) -> io::Result<()> {
        let flight = &mut self.flights[slot];
        let to = if flight.pieces == 0 {
            // SAFETY: got <= bytes <= a slot's length, so the address stays inside the slot.
            let address = unsafe { self.arena.address(slot).add(flight.got) };
            Destination::Arena(address, flight.bytes - flight.got)
        } else {
            Destination::Pieces(NonNull::from(&mut flight.iovecs[0]), flight.pieces)
        };
        self.engine.push(Request {
            slot,
            file: flight.file,
            offset: flight.offset + u64_of(flight.got),
            to,
        })?;
        if !flight.active {
            flight.active = true;
            self.in_flight += 1;
        }
        Ok(())
    }

    /// Submits what is queued and adds what has completed to `done`; waits at most `timeout` for the first. With
    /// nothing under way it returns at once.
    pub fn complete(&mut self, done: &mut Vec<Done>, timeout: Duration) -> io::Result<()> {
        if self.in_flight == 0 {
            return Ok(());
        }
        let (before, begin) = (done.len(), Instant::now());
        loop {
            let waited = self.collect(done, timeout.saturating_sub(begin.elapsed()));
            // All there was may have been the first part of a short read.
            if waited.is_err() || done.len() > before || self.in_flight == 0 || begin.elapsed() >= timeout {
                return waited;
            }
        }
    }

    fn collect(&mut self, done: &mut Vec<Done>, timeout: Duration) -> io::Result<()> {
        let mut answers = std::mem::take(&mut self.answers);
        let waited = self.engine.wait(&mut answers, timeout);
        for answer in answers.drain(..) {
            let slot = answer.slot;
            let ended = self.settle(answer).or_else(|| self.issue(slot).err().map(Err));
            if let Some(result) = ended {
                self.flights[slot].active = false;
                self.in_flight -= 1;
                done.push(Done { slot, result });
            }
        }
        self.answers = answers;
        waited
    }

    /// What an answer means for its slot's read: its end, or `None` where the rest must be asked for.
    fn settle(&mut self, answer: Answer) -> Option<io::Result<usize>> {
        let flight = &mut self.flights[answer.slot];
        assert!(flight.active, "an answer for slot {} that has no read", answer.slot);
        match answer.result {
            Ok(0) => Some(Ok(flight.got)),
            Ok(bytes) => {
                flight.got += bytes;
                // A read that ends inside a sector ended with the file.
                if flight.got >= flight.enough || !bytes.is_multiple_of(512) {
                    return Some(Ok(flight.got));
                }
                skip(&mut flight.iovecs, &mut flight.pieces, bytes);
                None
            }
            Err(error) => {
                flight.tries += 1;
                let again = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
                if again && flight.tries < TRIES_MAX { None } else { Some(Err(error)) }
            }
        }
    }

    /// The bytes of slot `slot`.
    ///
    /// # Panics
    /// If a read is under way there.
    #[must_use]
    pub fn bytes(&self, slot: usize) -> &[u8] {
        assert!(!self.flights[slot].active, "slot {slot} has a read under way");
        // SAFETY: no read is under way in the slot, and none can be queued while `self` is borrowed. Worth it: loaded
        // pages are checked where the disk put them.
        unsafe { self.arena.bytes(slot) }
    }

    /// Waits for everything under way; whether nothing is left.
    fn settle_all(&mut self) -> bool {
        let deadline = Instant::now() + DROP_WAIT;
        let mut done = Vec::with_capacity(self.in_flight);
        while self.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.complete(&mut done, left).is_err() {
                return false;
            }
        }
        true
    }
}

/// Takes `bytes` off the front of the first `pieces` pieces.
fn skip(iovecs: &mut [iovec], pieces: &mut usize, mut bytes: usize) {
    let whole = iovecs[..*pieces].iter().take_while(|piece| {
        let fits = piece.iov_len <= bytes;
        bytes -= if fits { piece.iov_len } else { 0 };
        fits
    });
    let whole = whole.count();
    iovecs.copy_within(whole..*pieces, 0);
    *pieces -= whole;
    if *pieces > 0 {
        iovecs[0].iov_base = iovecs[0].iov_base.cast::<u8>().wrapping_add(bytes).cast();
        iovecs[0].iov_len -= bytes;
    }
}

impl Drop for SlotReads {
    fn drop(&mut self) {
        if self.settle_all() {
            // SAFETY: dropped once, here, and nothing is under way in them.
            unsafe { ManuallyDrop::drop(&mut self.arena) };
            // SAFETY: as above.
            unsafe { ManuallyDrop::drop(&mut self.flights) };
        } else {
            // A disk that does not answer, or a drop on another thread than the ring's. The kernel may still write
            // the slots, so their memory is never given back.
            tracing::warn!(reads = self.in_flight, "disk reads did not end; their buffers are given up");
        }
    }
}

impl fmt::Debug for SlotReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotReads({}, {} of {} under way)", self.path(), self.in_flight, self.slots())
    }
}
