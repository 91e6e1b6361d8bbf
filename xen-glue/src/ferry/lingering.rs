//! What goes on when the guest runs on the target and pages of it are still at the source: each end's engine works on, and
//! whoever has started it keeps the process until it has ended.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

use mover::journal::Role;
use mover::report::Event;
use mover::wire::hello::MigrationId;

/// How long an engine whose guest runs may take before the toolstack is told to go on without waiting for it.
pub(crate) const GRACE: Duration = Duration::from_millis(20);

type Work = Box<dyn FnOnce(&mut dyn FnMut(&Event)) -> Result<String, String> + Send>;

/// An engine that works on.
pub struct Lingering {
    /// The migration's number.
    pub migration: MigrationId,
    /// Which end this is.
    pub role: Role,
    work: Work,
}

impl Lingering {
    pub(crate) fn new(migration: MigrationId, role: Role, work: Work) -> Self {
        Self { migration, role, work }
    }

    /// Waits for its end, and tells `each` how it goes meanwhile; a sentence about what it came to.
    ///
    /// # Errors
    /// A sentence: pages can't be had any more, and the guest has been stopped.
    pub fn finish(self, mut each: impl FnMut(&Event)) -> Result<String, String> {
        (self.work)(&mut each)
    }
}

impl fmt::Debug for Lingering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lingering({:?}, {})", self.role, self.migration)
    }
}
