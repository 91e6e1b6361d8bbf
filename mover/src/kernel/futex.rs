//! Sleeping on, and waking, a word of memory (`futex(2)`), private to this process.

use std::time::{Duration, Instant};

#[cfg(not(all(test, feature = "loom")))]
use rustix::io::Errno;
#[cfg(not(all(test, feature = "loom")))]
use rustix::thread::futex::{Flags, Timespec, wait, wake};

use crate::sync::AtomicU32;

/// Sleeps while `word` holds `value`, for at most `timeout`. Returns as soon as the word is seen to differ, when the
/// time is over, or for no reason at all: callers look again.
#[cfg(not(all(test, feature = "loom")))]
pub(crate) fn sleep_while(word: &AtomicU32, value: u32, timeout: Duration) {
    // The kernel refuses absurd times; a day is for ever here.
    let timeout = timeout.min(Duration::from_secs(86_400));
    let until = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(86_400),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    match wait(word, Flags::PRIVATE, value, Some(&until)) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
        Err(other) => panic!("futex wait on a valid, aligned word of this process: {other}"),
    }
}

/// Wakes everyone who sleeps on `word`.
#[cfg(not(all(test, feature = "loom")))]
pub(crate) fn wake_all(word: &AtomicU32) {
    let everyone = u32::MAX >> 1;
    if let Err(error) = wake(word, Flags::PRIVATE, everyone) {
        panic!("futex wake on a valid, aligned word of this process: {error}");
    }
}

/// Sleeps until `word` differs from `value` or `timeout` has passed, however often the kernel wakes in between.
pub(crate) fn sleep_until_changed(word: &AtomicU32, value: u32, timeout: Duration) {
    use crate::sync::Ordering;
    let deadline = Instant::now().checked_add(timeout);
    while word.load(Ordering::SeqCst) == value {
        let left = match deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            None => timeout,
        };
        if left.is_zero() {
            return;
        }
        sleep_while(word, value, left);
    }
}

#[cfg(all(test, feature = "loom"))]
pub(crate) use modelled::{sleep_while, wake_all};

/// The kernel's side in a model: it looks at the word and falls asleep under the lock a waker takes. No sleep ends by
/// its time, so a wake-up that is lost is a deadlock.
#[cfg(all(test, feature = "loom"))]
mod modelled {
    use std::time::Duration;

    use loom::sync::{Condvar, Mutex};

    use crate::sync::{AtomicU32, Ordering};

    loom::lazy_static! {
        static ref BUCKET: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub(crate) fn sleep_while(word: &AtomicU32, value: u32, _timeout: Duration) {
        let asleep = BUCKET.0.lock().unwrap();
        if word.load(Ordering::Relaxed) == value {
            drop(BUCKET.1.wait(asleep).unwrap());
        }
    }

    pub(crate) fn wake_all(_word: &AtomicU32) {
        let _nobody_in_between = BUCKET.0.lock().unwrap();
        BUCKET.1.notify_all();
    }
}
