//! The engine of a standby, whose worker was killed: it goes on with the drain where that one has stopped, and dials the source.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use mover::disk::Disks;
use mover::error::GuestError;
use mover::guest::{TargetGuest, TargetLife};
use mover::report::Observer;
use mover::target::{self, Config, Host, Orphan};
use mover::wire::control::DiskName;
use mover::wire::hello::MigrationId;

use super::again::{Return, Returner};
use super::engine::{Engine, HandedOn, Unrecorded, WORDS};
use super::lingering::Lingering;
use super::net::Quiet;
use super::tally::Tally;
use super::target::draining;
use super::{SILENCE_MAX, disks};
use crate::confine;
use crate::domain::Orphaned;
use crate::standby::Terms;

/// The source's disks as they are open here.
pub(crate) struct Shelves {
    disks: Option<Arc<dyn Disks>>,
    readable: Vec<Result<(), String>>,
    /// What an operator should know of that.
    pub(crate) notes: Vec<String>,
}

impl Shelves {
    /// Opens what the worker has opened too. What can't be read is left to the source.
    pub(crate) fn open(named: &[DiskName]) -> Self {
        let none = |error: mover::error::Error| {
            let readable = named.iter().map(|_| Err(error.to_string())).collect();
            (None, readable)
        };
        let (disks, readable) = disks::open(named).unwrap_or_else(none);
        let left_out = |(disk, why): (&DiskName, &Result<(), String>)| {
            let why = why.as_ref().err()?;
            Some(format!("disk {} is left out: {why}", disk.name))
        };
        let mut notes: Vec<String> = named.iter().zip(&readable).filter_map(left_out).collect();
        notes.extend(disks.iter().flat_map(|disks| disks.notes()));
        Self { disks, readable, notes }
    }
}

/// Takes the place of the engine that is no more.
///
/// # Errors
/// No thread could be started.
pub(crate) fn take_over(
    terms: Terms,
    how: Return,
    guest: Orphaned,
    shelves: Shelves,
) -> io::Result<Lingering> {
    let Terms { session, offer, shape, .. } = terms;
    let Orphaned { memory, held } = guest;
    let migration = MigrationId(offer.migration);
    let (say, words) = mpsc::sync_channel(WORDS);
    let observer: Arc<dyn Observer> = Arc::new(HandedOn(say, std::convert::identity));
    let redial_for = how.redial_for;
    let acceptor = Quiet::again(&Tally::new(offer.lanes), Returner::new(offer, how));
    let cost = Arc::clone(&held.cost);
    let engine = Engine::start(Vec::new(), observer, move |around| {
        // The process has given up what it could before, and says so itself where that has failed.
        let _ = confine::faces_the_network();
        let life = Box::new(Running(held.stop));
        let guest = TargetGuest { memory, life, lazy: Ok(held.hold), gate: None };
        let orphan = Orphan {
            acceptor: Box::new(acceptor),
            migration,
            session,
            shape,
            host: Host { guest, disks: shelves.disks, readable: shelves.readable },
            journal: Box::new(Unrecorded),
        };
        let config = Config { patience: SILENCE_MAX, redial_for, toolstack: true, ..Config::default() };
        target::take_over(orphan, config, around)
    })?;
    Ok(draining(engine, words, migration, cost))
}

/// What stops the running domain.
type Stop = Box<dyn FnMut() -> Result<(), GuestError> + Send>;

/// A guest that runs, and can be stopped.
struct Running(Stop);

impl TargetLife for Running {
    fn load_state(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn stop(&mut self) -> Result<(), GuestError> {
        (self.0)()
    }
}
