//! Restores a domain from a stream.
//!
//! ```text
//! headers -> records, in the stream's order -> finish
//!            (static state, pages, the rest collected)
//! ```
//!
//! The toolstack has created the domain, without memory, and destroys it if this fails. Nothing is mapped afterwards,
//! and nothing behind the END record has been read.
#![forbid(unsafe_code)]

mod error;
mod ferry;
#[cfg(test)]
mod hostile_tests;
mod phases;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

pub use error::RestoreError;
use mover::wire::hello::MigrationId;

use crate::abi::DomainId;
pub use crate::domain::Wiring;
use crate::domain::{Domain, Frames, HvmTarget, Lent, PvTarget, Target};
use crate::ferry::{Credentials, Lingering};

/// The toolstack that wants the domain restored.
pub trait Toolstack {
    /// Is told that the guest's unchanging state has been set, and what the stream had none of, so that it makes it
    /// up: bit 0 CPUID, bit 1 model-specific registers. False if it failed.
    ///
    /// # Errors
    /// The toolstack can't be asked.
    fn static_data_done(&mut self, missing: u32) -> io::Result<bool>;
    /// Is told that the domain can run while pages of it are outstanding. As it stands, it waits until none are.
    ///
    /// # Errors
    /// A sentence: they can't be had.
    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        left.finish(|_| {}).map(drop)
    }
    /// Is told how it goes.
    fn report(&mut self, event: &Event<'_>);
}

/// How it goes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Event<'a> {
    /// A phase begins.
    Phase(Phase),
    /// So many pages have arrived.
    Pages(u64),
    /// Pages come by the lanes of this migration.
    Lanes(MigrationId),
    /// What the engine of the lanes tells, notices excepted.
    Engine(&'a mover::report::Event),
    /// Something an operator may want to know.
    Note(&'a str),
    /// Something for who wants to read more.
    Detail(&'a str),
}

/// How a restore is to be done.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Take page contents another way where the source offers it.
    pub dial_back: bool,
    /// In the clear too, where the source offers that.
    pub plaintext: bool,
    /// From a source alone that this authority has certified.
    pub credentials: Option<Credentials>,
    /// Load what stands on disks straight into the guest's memory, where that can be done.
    pub direct: bool,
    /// Why no page may be outstanding when the guest runs, where none may.
    pub not_lazy: Option<String>,
}

/// What a restore is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Reads the headers.
    Headers,
    /// Reads records: memory most of the time.
    Records,
    /// Gives the guest the rest of its state.
    Finish,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Headers => "Start of stream",
            Self::Records => "Frames",
            Self::Finish => "Final state",
        })
    }
}

/// What a restore has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Restored {
    /// Frames the toolstack wants to know.
    pub frames: Frames,
    /// Pages read, each as often as it came.
    pub pages: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Pages that a verifying stream had compared.
    pub compared: u64,
    /// Those of them that were different.
    pub different: u64,
    /// Pages that were loaded from disks and checked.
    pub references: u64,
    /// Bytes read for that.
    pub disk_bytes: u64,
    /// Milliseconds with such a read under way.
    pub disk_busy_ms: u64,
    /// Milliseconds of processor time the engine took.
    pub cpu_ms: u64,
    /// What came of lending pages to those reads, where that was done.
    pub lent: Option<Lent>,
}

/// Restores domain `id` from the stream `from`, until it is done or `stop` is set. A call that waits on the stream
/// sees `stop` when a signal interrupts it.
///
/// # Errors
/// It could not be restored; see [`RestoreError`].
pub fn domain(
    id: DomainId,
    from: BorrowedFd<'_>,
    wiring: &Wiring,
    options: &Options,
    toolstack: &mut impl Toolstack,
    stop: &AtomicBool,
) -> Result<Restored, RestoreError> {
    let domain = Domain::open(id)?;
    if domain.is_hvm() {
        run(HvmTarget::new(domain)?, from, wiring, options, toolstack, stop)
    } else {
        run(PvTarget::new(domain)?, from, wiring, options, toolstack, stop)
    }
}

/// Restores into `target`, as [`domain`] does into a domain.
///
/// # Errors
/// It could not be restored; see [`RestoreError`].
pub fn run(
    target: impl Target,
    from: BorrowedFd<'_>,
    wiring: &Wiring,
    options: &Options,
    toolstack: &mut impl Toolstack,
    stop: &AtomicBool,
) -> Result<Restored, RestoreError> {
    phases::Restore::new(target, wiring, options, toolstack, stop).run(from)
}
