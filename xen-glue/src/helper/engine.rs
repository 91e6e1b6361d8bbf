//! What does the work between the helper's two ends.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

use super::arguments::Invocation;
use super::session::Session;
use crate::abi::{DomainId, Scheduling};

/// Saves and restores domains.
pub trait Engine {
    /// Does the job of `invocation` over the stream `io`, until it is done or `stop` is set; a call that waits is
    /// interrupted by a signal then. Returns with nothing left behind: no mapping, no log of written pages.
    ///
    /// # Errors
    /// It could not be done.
    fn run(
        &self,
        invocation: &Invocation,
        io: BorrowedFd<'_>,
        session: &mut Session,
        stop: &AtomicBool,
    ) -> Result<Outcome, Failure>;

    /// The share of the processors that `domain` has before it is saved, for [`Self::put_back`]; nothing where nobody is
    /// going to cap it: it is not asked for, or its scheduler knows no cap.
    fn share(&self, domain: DomainId) -> Option<Scheduling>;

    /// Puts back what a worker that was killed while it saved `domain` has left behind: the log of written pages, and a cap
    /// in the place of `share`.
    ///
    /// # Errors
    /// It could not be put back.
    fn put_back(&self, domain: DomainId, share: Option<Scheduling>) -> Result<(), Failure>;
}

/// What libxl is told of a restored guest; zeroes of a saved one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// The frame of its store.
    pub store: u64,
    /// The frame of its console.
    pub console: u64,
}

/// Why a job was not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The error's number, for libxl.
    pub errno: i32,
    /// A sentence, for its log.
    pub message: String,
}
