//! What happens with a fault: the first one ends a restore; a verification goes on and keeps them all.
#![forbid(unsafe_code)]

use super::error::{Fault, StreamError};
use super::limits::FAULTS_KEPT_MAX;

/// Decides over faults after which the records can still be told apart.
#[derive(Debug)]
pub(crate) struct Judge {
    strict: bool,
    faults: Vec<StreamError>,
    uncounted: u64,
}

impl Judge {
    /// The first fault is an error.
    pub(crate) fn strict() -> Self {
        Self { strict: true, faults: Vec::new(), uncounted: 0 }
    }

    /// Faults are kept, up to [`FAULTS_KEPT_MAX`], and counted beyond.
    pub(crate) fn lenient() -> Self {
        Self { strict: false, ..Self::strict() }
    }

    pub(crate) fn fault(&mut self, offset: u64, fault: Fault) -> Result<(), StreamError> {
        let error = StreamError::new(offset, fault);
        if self.strict {
            return Err(error);
        }
        self.keep(error);
        Ok(())
    }

    fn keep(&mut self, error: StreamError) {
        if self.faults.len() < FAULTS_KEPT_MAX {
            self.faults.push(error);
        } else {
            self.uncounted += 1;
        }
    }

    /// The faults kept, and how many more there were.
    pub(crate) fn into_faults(self) -> (Vec<StreamError>, u64) {
        (self.faults, self.uncounted)
    }
}
