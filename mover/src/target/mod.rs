//! The target end: what `pageferry receive` runs. [`receive`] reads as the list of phases.
//!
//! Nothing runs here before the source's commit has arrived and been recorded; until then every way out leaves nothing
//! behind on this host, and the source is told why.
#![forbid(unsafe_code)]

mod ahead;
mod connect;
mod drain;
mod prepare;
mod reception;
mod take_over;

use std::sync::Arc;
use std::time::Duration;

use crate::disk::Disks;
use crate::error::Error;
use crate::guest::TargetGuest;
use crate::journal::Journal;
use crate::net::Acceptor;
use crate::source::Surroundings;
use crate::wire::control::{Account, Shape};
use crate::wire::hello::{MigrationId, Secret};

pub use take_over::{Orphan, take_over};

/// How to receive.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long to wait for a source; `None` for ever.
    pub wait: Option<Duration>,
    /// How long a connected peer may be silent.
    pub patience: Duration,
    /// How long to wait for a source that was lost after everything had arrived, or while pages are outstanding that
    /// only it has.
    pub redial_for: Duration,
    /// A toolstack decides who has the guest: a source that is lost while the guest changes hands is not waited for. One that
    /// is lost during the drain is.
    pub toolstack: bool,
    /// Whether to load straight into guest memory where that can be done.
    pub direct: bool,
    /// Reads in flight to the disks.
    pub depth: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            wait: None,
            patience: Duration::from_secs(10),
            redial_for: Duration::from_secs(300),
            toolstack: false,
            direct: false,
            depth: crate::limits::READ_DEPTH,
        }
    }
}

/// What this host offers for the guest that is coming.
pub struct Host {
    /// The guest to be.
    pub guest: TargetGuest,
    /// Its disks as they can be read here, in the source's order; `None` where it has none that can.
    pub disks: Option<Arc<dyn Disks>>,
    /// For each of the source's disks, whether its references can be loaded, or why not.
    pub readable: Vec<Result<(), String>>,
}

/// Makes the guest once its shape is known. An error refuses the migration and is told to the source.
pub type MakeHost = Box<dyn FnOnce(&Shape) -> Result<Host, Error> + Send>;
/// Opens the durable record once the migration's id, its shape and the peer's address are known.
pub type MakeJournal = Box<dyn FnOnce(MigrationId, &Shape, &str) -> Result<Box<dyn Journal>, Error> + Send>;

/// What receives, and from where.
pub struct Parts {
    /// Where sources dial.
    pub acceptor: Box<dyn Acceptor>,
    /// The one-time token.
    pub token: Secret,
    /// Makes the guest.
    pub host: MakeHost,
    /// Makes the record.
    pub journal: MakeJournal,
}

/// Receives one guest. On success it runs here and everything of it is here. On an error before the commit nothing is
/// left of it; after the commit it runs here unless the error says that it was stopped.
pub fn receive(parts: Parts, config: Config, surroundings: Surroundings) -> Result<Account, Error> {
    let Some(arrival) = connect::arrive(parts, &config, &surroundings)? else {
        return Err(Error::Cancelled { by: "here" });
    };
    let mut reception = reception::Reception::new(arrival, config, surroundings)?;
    let outcome = reception.run();
    reception.wind_up(outcome)
}
