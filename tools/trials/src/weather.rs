//! What is wrong with the disk that [`crate::files`] has, and for whom.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::files::process_of;

/// What is wrong.
#[derive(Clone, Default, Debug)]
pub(crate) enum Trouble {
    /// Nothing.
    #[default]
    None,
    /// Every read and write fails.
    Errors,
    /// Every read takes so much longer.
    Slow(Duration),
    /// Reads of these processes bring something else in their second half, or stop short, in turns.
    Torn {
        /// By number.
        processes: Vec<u32>,
    },
}

/// How a read is answered.
pub(crate) enum Verdict {
    /// With what stands there.
    Good,
    /// With an error.
    Error,
    /// With something else in its second half.
    Garbled,
    /// With its first half.
    Short,
}

/// The disk's condition.
#[derive(Default)]
pub(crate) struct Weather {
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Default)]
struct Now {
    trouble: Trouble,
    /// Reads of this process wait.
    waiting: Option<u32>,
    torn: u64,
}

impl Weather {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on.
    pub(crate) fn becomes(&self, trouble: Trouble) {
        self.now().trouble = trouble;
    }

    /// Lets reads of `process` wait; nobody's with `None`.
    pub(crate) fn keep_waiting(&self, process: Option<u32>) {
        self.now().waiting = process;
        self.changed.notify_all();
    }

    /// How a read that `thread` has asked for is answered, and when.
    pub(crate) fn on_read(&self, thread: u32) -> Verdict {
        let mut now = self.now();
        let process = match (&now.trouble, now.waiting) {
            (Trouble::Torn { .. }, _) | (_, Some(_)) => process_of(thread).unwrap_or(thread),
            _ => thread,
        };
        while now.waiting == Some(process) {
            now = self.changed.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
        match now.trouble.clone() {
            Trouble::None => Verdict::Good,
            Trouble::Errors => Verdict::Error,
            Trouble::Slow(longer) => {
                drop(now);
                thread::sleep(longer);
                Verdict::Good
            }
            Trouble::Torn { processes } if processes.contains(&process) => {
                now.torn += 1;
                if now.torn.is_multiple_of(2) { Verdict::Garbled } else { Verdict::Short }
            }
            Trouble::Torn { .. } => Verdict::Good,
        }
    }

    /// Whether a write is carried out.
    pub(crate) fn on_write(&self) -> bool {
        !matches!(self.now().trouble, Trouble::Errors)
    }
}
