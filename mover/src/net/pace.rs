//! A bandwidth cap shared by all lanes: a token bucket in two atomic words, no lock.
//!
//! The bucket is kept as the moment up to which the link is spoken for. Whoever is about to send moves that moment on
//! by what its bytes cost and sleeps until its own turn; a moment in the past counts as at most [`BURST`] ago, which
//! is the bucket's depth. Sleeping too long is made up for by the next sender, so the mean rate holds exactly.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::runtime::{Bell, Moment, Runtime};
use crate::sync::{AtomicU64, Ordering};

/// What may be sent at once after a silence: as many bytes as the cap carries in this time.
pub const BURST: Duration = Duration::from_millis(5);

/// The cap. Lanes share one by reference.
#[derive(Debug)]
pub struct Pace {
    /// Bytes a second; 0 is no cap.
    rate: AtomicU64,
    /// The moment, in nanoseconds, up to which what has been let through fills the link.
    spoken_for: AtomicU64,
    /// Rung when the cap changes, so that a sleeping lane looks again.
    changed: Bell,
}

impl Pace {
    /// A cap of `bytes_per_second`, `None` for none.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            rate: AtomicU64::new(bytes_per_second.unwrap_or(0)),
            spoken_for: AtomicU64::new(0),
            changed: Bell::default(),
        }
    }

    /// Changes the cap at once, for who sleeps already too: lanes that wait for their turn when the cap is lifted, or
    /// when a migration is cancelled, go on.
    pub fn set(&self, runtime: &dyn Runtime, bytes_per_second: Option<u64>) {
        self.rate.store(bytes_per_second.unwrap_or(0), Ordering::SeqCst);
        self.spoken_for.store(0, Ordering::SeqCst);
        runtime.ring(&self.changed);
    }

    /// The cap in bytes a second.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Ordering::SeqCst)).filter(|rate| *rate != 0)
    }

    /// Waits until `bytes` more may be sent, headers included. Without a cap it costs one load.
    pub fn take(&self, runtime: &dyn Runtime, bytes: u64) {
        let heard = self.changed.heard();
        let Some(rate) = self.rate() else { return };
        let turn = self.book(runtime.now(), bytes, rate);
        loop {
            let left = turn.since(runtime.now());
            if left.is_zero() || self.changed.heard() != heard {
                return;
            }
            runtime.wait(&self.changed, heard, left);
        }
    }

    /// Moves the moment on by what `bytes` cost and returns the moment at which they may go.
    pub(crate) fn book(&self, now: Moment, bytes: u64, rate: u64) -> Moment {
        let oldest = now.0.saturating_sub(nanoseconds(BURST));
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let mut seen = self.spoken_for.load(Ordering::SeqCst);
        loop {
            let start = seen.max(oldest);
            let end = start.saturating_add(cost);
            match self.spoken_for.compare_exchange_weak(seen, end, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Moment(start),
                Err(other) => seen = other,
            }
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Placement, Threads};
    use std::sync::Arc;

    const SECOND: u64 = 1_000_000_000;

    /// Whatever the sizes and gaps, no stretch of time carries more than the rate, one burst and one message.
    #[test]
    fn never_more_than_the_rate_and_one_burst() {
        let rate = 125_000_000;
        let pace = Pace::new(Some(rate));
        let mut now = Moment(10 * SECOND);
        let mut sent = Vec::new();
        let mut state = 1_u64;
        for _ in 0..5_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bytes = 1 + (state >> 33) % 1_048_576;
            let turn = pace.book(now, bytes, rate);
            let at = now.0.max(turn.0);
            sent.push((at, bytes));
            now = Moment(at + (state >> 20) % 1_000_000);
        }
        let mut total = 0_u128;
        let (first, largest) = (sent[0].0, 1_048_576_u128);
        for (at, bytes) in sent {
            total += u128::from(bytes);
            let allowed = u128::from(at - first + nanoseconds(BURST)) * u128::from(rate) / u128::from(SECOND);
            // A nanosecond a message is lost to rounding.
            assert!(total <= allowed + largest + 1_000, "{total} bytes by {at}, allowed {allowed}");
        }
    }

    /// A busy link is used in full: turns follow each other without a gap.
    #[test]
    fn a_full_link_stays_full() {
        let pace = Pace::new(Some(1_000_000));
        let now = Moment(SECOND);
        let mut last = pace.book(now, 1_000, 1_000_000);
        for _ in 0..100 {
            let turn = pace.book(now, 1_000, 1_000_000);
            assert_eq!(turn.since(last), Duration::from_millis(1));
            last = turn;
        }
    }

    #[test]
    fn lanes_share_one_cap() {
        let runtime = Arc::new(Threads::new());
        let pace = Arc::new(Pace::new(Some(10_000_000)));
        let before = runtime.now();
        let tasks: Vec<_> = (0..4)
            .map(|lane| {
                let (runtime_there, pace) = (runtime.clone(), pace.clone());
                let body = move || (0..10).for_each(|_| pace.take(&*runtime_there, 10_000));
                runtime.spawn(&format!("lane {lane}"), Placement::Any, Box::new(body))
            })
            .collect();
        for task in tasks {
            task.join().unwrap();
        }
        // 400 kB at 10 MB/s are 40 ms, less the burst and the last message, which need not have left.
        let took = runtime.now().since(before);
        assert!(took >= Duration::from_millis(33), "the cap did not hold: {took:?}");
    }

    #[test]
    fn lifting_the_cap_wakes_who_sleeps() {
        let runtime = Arc::new(Threads::new());
        let pace = Arc::new(Pace::new(Some(1)));
        pace.take(&*runtime, 1_000_000);
        let (runtime_there, pace_there) = (runtime.clone(), pace.clone());
        let body = move || pace_there.take(&*runtime_there, 1);
        let sleeper = runtime.spawn("sleeper", Placement::Any, Box::new(body));
        pace.set(&*runtime, None);
        sleeper.join().unwrap();
        assert_eq!(pace.rate(), None);
    }
}
