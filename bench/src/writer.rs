//! A guest that writes: a thread in the sender's process that rewrites pages of the buffer at a rate and keeps its own log of
//! them. It stops where the guest is paused, so that both ends hold the same in the end.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mover::bitmap::{Bitmap, SharedBitmap, bits_of};
use mover::error::GuestError;
use mover::guest::DirtyLog;
use mover::memory::Mapping;
use mover::units::{PAGE_BYTES, PAGE_BYTES_U64, PageCount, u64_of, usize_of};

/// How often it writes what is due.
const BEAT: Duration = Duration::from_millis(2);

/// What it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Writes {
    /// Bytes a second.
    pub rate: u64,
    /// Over so many bytes from the buffer's begin, at random.
    pub over: u64,
}

/// Whether it may write. A beat's writes are done under the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Gate {
    Open,
    Closed,
    Ended,
}

/// The writing guest.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    gate: Mutex<Gate>,
    written: SharedBitmap,
}

impl Shared {
    fn set(&self, to: Gate) {
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = to;
    }
}

impl Writer {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(buffer: &Arc<Mapping>, writes: Writes) -> std::io::Result<Self> {
        let written = SharedBitmap::new(buffer.pages().entries());
        let shared = Arc::new(Shared { gate: Mutex::new(Gate::Open), written });
        let (theirs, buffer) = (Arc::clone(&shared), Arc::clone(buffer));
        let body = move || write(&theirs, &buffer, writes);
        let thread = thread::Builder::new().name("writer".to_owned()).spawn(body)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Its log of writes.
    #[must_use]
    pub fn log(&self) -> WriterLog {
        WriterLog(Arc::clone(&self.shared))
    }

    /// Its life.
    #[must_use]
    pub fn life(&self) -> WriterLife {
        WriterLife(Arc::clone(&self.shared))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.set(Gate::Ended);
        if let Some(thread) = self.thread.take() {
            // A panic in it has printed itself.
            let _ = thread.join();
        }
    }
}

fn write(shared: &Shared, buffer: &Mapping, writes: Writes) {
    let pages = (writes.over / PAGE_BYTES_U64).clamp(1, buffer.pages().0);
    let (mut state, mut last) = (88_172_645_463_325_252_u64, Instant::now());
    let mut owed = 0;
    loop {
        let gate = shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if *gate == Gate::Ended {
            return;
        }
        let now = Instant::now();
        let passed = now.duration_since(last).min(10 * BEAT);
        last = now;
        if *gate == Gate::Open {
            owed += u64::try_from(u128::from(writes.rate) * passed.as_nanos() / 1_000_000_000).unwrap_or(0);
            while owed >= PAGE_BYTES_U64 {
                owed -= PAGE_BYTES_U64;
                let page = usize_of(next(&mut state) % pages);
                for word in &buffer.words()[page * (PAGE_BYTES / 8)..(page + 1) * (PAGE_BYTES / 8)] {
                    word.store(next(&mut state), Ordering::Relaxed);
                }
                // Behind the write: whoever takes the mark sends the page anew.
                shared.written.set(page);
            }
        }
        drop(gate);
        thread::sleep(BEAT);
    }
}

/// Marsaglia's xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// What it has written.
pub struct WriterLog(Arc<Shared>);

impl DirtyLog for WriterLog {
    fn arm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError> {
        let mut found = 0;
        for word in 0..self.0.written.words() {
            found += bits_of(self.0.written.take_word(word)).filter(|bit| into.set(word * 64 + bit)).count();
        }
        Ok(PageCount(u64_of(found)))
    }
    fn disarm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Stops it and lets it go on.
pub struct WriterLife(Arc<Shared>);

impl WriterLife {
    /// When this returns, it writes no more.
    pub fn pause(&self) {
        self.0.set(Gate::Closed);
    }
    /// It goes on.
    pub fn resume(&self) {
        self.0.set(Gate::Open);
    }
}
