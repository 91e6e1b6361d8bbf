//! The guest's clocks: none may go backwards, on whatever processor and host it is read.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The latest reading anybody took.
pub(crate) struct Clock {
    begin: Instant,
    latest: Mutex<Instant>,
}

impl Clock {
    /// Starts now.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self { begin: now, latest: Mutex::new(now) }
    }

    /// Reads the clock; an error where it is behind what was read before, on any thread.
    ///
    /// Read under the lock: two readings are in order, so the clock has to be.
    pub(crate) fn check(&self) -> Result<Duration, String> {
        let mut latest = self.latest.lock().map_err(|_| "clock: a thread has died")?;
        let now = Instant::now();
        let back = latest.duration_since(now);
        if !back.is_zero() {
            return Err(format!("clock: it went back by {back:?}"));
        }
        *latest = now;
        Ok(now.duration_since(self.begin))
    }
}
