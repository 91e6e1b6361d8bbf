//! The first error of a migration, shared by its tasks: whoever fails says so here, everyone else sees it and ends.

use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::runtime::{Bell, Runtime};
use crate::sync::{AtomicBool, Ordering};

/// A place for the first error.
#[derive(Default)]
pub struct Failure {
    failed: AtomicBool,
    first: Mutex<Option<Error>>,
}

impl Failure {
    /// Records `error` if it is the first, and rings `bell`, on which the control task waits.
    pub fn set(&self, runtime: &dyn Runtime, bell: &Bell, error: Error) {
        {
            let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
        }
        self.failed.store(true, Ordering::SeqCst);
        runtime.ring(bell);
    }
    /// Whether any task has failed.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }
    /// Takes the error, if there is one; the flag stays.
    pub fn take(&self) -> Option<Error> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
    /// Forgets it all; for a link that is made anew, once every task that used the old one has ended.
    pub fn reset(&self) {
        self.take();
        self.failed.store(false, Ordering::SeqCst);
    }
    /// `Err` with the error, if there is one to take.
    pub fn check(&self) -> Result<(), Error> {
        if !self.is_set() {
            return Ok(());
        }
        self.take().map_or(Ok(()), Err)
    }
}
