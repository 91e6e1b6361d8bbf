//! The source end: what `pageferry send` runs. [`migrate`] runs the list of phases.
//!
//! Until the guest is given up in the commit, every way out leaves it running here as if nothing had happened.
#![forbid(unsafe_code)]

mod commit;
mod connect;
mod migration;
mod rounds;
mod stop;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::Error;
use crate::guest::SourceGuest;
use crate::index::{Duplicates, Keeper};
use crate::journal::Journal;
use crate::net::Dialer;
use crate::report::{Mode, Summary};
use crate::runtime::{Bell, Runtime};
use crate::wire::hello::{MigrationId, Secret};

/// Asks a running migration to stop; from a signal handler's thread or another task. Before the commit the guest
/// goes on where it was; after it there is nothing to cancel any more.
#[derive(Default)]
pub struct Cancel {
    asked: AtomicBool,
    /// Rung when asked, so that waiting phases notice at once.
    pub bell: Bell,
}

impl Cancel {
    /// Asks.
    pub fn ask(&self, runtime: &dyn Runtime) {
        self.asked.store(true, Ordering::SeqCst);
        runtime.ring(&self.bell);
    }
    /// Whether someone has asked.
    #[must_use]
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

/// What to do with a guest that writes faster than the link carries, once the rounds are used up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotConverging {
    /// Stop and copy anyway, however long that takes.
    Finish,
    /// Give up; the guest goes on at the source.
    Abort,
}

/// How to migrate.
#[derive(Clone, Debug)]
pub struct Config {
    /// How pages travel.
    pub mode: Mode,
    /// Name in the summary.
    pub workload: String,
    /// Data connections.
    pub lanes: usize,
    /// Longest downtime to aim for.
    pub max_downtime: Duration,
    /// Most rounds while the guest runs.
    pub max_rounds: u32,
    /// Bandwidth cap in bytes a second over all lanes.
    pub bandwidth: Option<u64>,
    /// Slow the guest down when it does not converge.
    pub throttle: bool,
    /// What else to do then.
    pub not_converging: NotConverging,
    /// Holding pages back takes the target long (paging on Xen): it does so while the rounds run, the pause waits for that,
    /// and the stopped guest's pages are sent rather than referred to.
    pub holds_ahead: bool,
    /// Compare a digest of every page before the restart.
    pub verify: bool,
    /// How long the peer may be silent.
    pub patience: Duration,
    /// How often to try to reach the target again when the link is lost after the commit, and for how long.
    pub redial_for: Duration,
    /// A toolstack decides who has the guest, and has its own way to find out: a link that is lost while the guest changes
    /// hands is not made again. One that is lost during the drain is.
    pub toolstack: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Lazy,
            workload: String::new(),
            lanes: 2,
            max_downtime: Duration::from_millis(50),
            max_rounds: 30,
            bandwidth: None,
            throttle: false,
            not_converging: NotConverging::Finish,
            holds_ahead: false,
            verify: false,
            patience: Duration::from_secs(10),
            redial_for: Duration::from_secs(300),
            toolstack: false,
        }
    }
}

/// What every migration needs besides the guest.
pub struct Surroundings {
    /// Time and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Where events go.
    pub observer: Arc<dyn crate::report::Observer>,
    /// The cancel request.
    pub cancel: Arc<Cancel>,
}

/// What is migrated, and where to.
pub struct Parts {
    /// The guest.
    pub guest: SourceGuest,
    /// Its name, for the target and the summary.
    pub name: String,
    /// Where its pages may stand on disks; `None` refers to nothing.
    pub index: Option<Arc<dyn Duplicates>>,
    /// What keeps that fresh.
    pub keeper: Option<Box<dyn Keeper>>,
    /// The way to the target.
    pub dialer: Arc<dyn Dialer>,
    /// The right to it.
    pub token: Secret,
    /// The migration's id.
    pub migration: MigrationId,
    /// The durable record of who has the guest.
    pub journal: Box<dyn Journal>,
}

/// Migrates the guest. On success it runs on the target, and nothing of it is needed here any more. On an error it
/// runs here as before; only [`Error::InDoubt`] leaves it paused here, for `pageferry resolve`.
pub fn migrate(parts: Parts, config: Config, surroundings: Surroundings) -> Result<Summary, Error> {
    let mut migration = migration::Migration::new(parts, config, surroundings);
    let outcome = migration.run();
    migration.wind_up(outcome)
}
