//! What goes on when the guest runs on the target and pages of it are still at the source: each end's engine works on, and
//! whoever has started it keeps the process until it has ended.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

use mover::journal::Role;
use mover::report::Event;
use mover::wire::hello::MigrationId;

use crate::domain::Guarded;

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
    guard: Guarded,
}

impl Lingering {
    pub(crate) fn new(migration: MigrationId, role: Role, work: Work) -> Self {
        Self { migration, role, work, guard: None }
    }

    /// With somebody who goes on if this process is killed.
    pub(crate) fn guarded(self, guard: Guarded) -> Self {
        Self { guard, ..self }
    }

    /// From here on a standby goes on if this process is killed: the guest is as good as restored. A sentence where there is to be
    /// one, and none is.
    #[must_use]
    pub fn arm(&self) -> Option<String> {
        let why = match self.guard.as_ref()? {
            Ok(guard) => guard.arm().err()?,
            Err(why) => why.clone(),
        };
        Some(format!("nothing takes over if this process is killed while pages are outstanding: {why}"))
    }

    /// Waits for its end, and tells `each` how it goes meanwhile; a sentence about what it came to.
    ///
    /// # Errors
    /// A sentence: pages can't be had any more, and the guest has been stopped.
    pub fn finish(self, mut each: impl FnMut(&Event)) -> Result<String, String> {
        let outcome = (self.work)(&mut each);
        if let Some(Ok(guard)) = &self.guard {
            guard.dismiss();
        }
        outcome
    }
}

impl fmt::Debug for Lingering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lingering({:?}, {})", self.role, self.migration)
    }
}
