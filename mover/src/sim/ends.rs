//! The two ends: the real [`source::migrate`] and [`target::receive`], each as a task of its own group, over this
//! world's traits.

use std::sync::Arc;
use std::time::Duration;

use super::disk::{SOURCE, TARGET};
use super::index::SimKeeper;
use super::scheduler::Group;
use super::world::{EndOutcome, SimJournal, Watch, World};
use crate::error::Error;
use crate::index::Keeper;
use crate::journal::Journal;
use crate::source::{self, Surroundings};
use crate::target;
use crate::units::u64_of;
use crate::wire::hello::{MigrationId, Secret};

/// The token of migration `number`.
pub(crate) fn token(number: usize) -> Secret {
    let mut token = [7; 32];
    token[..8].copy_from_slice(&u64_of(number).to_le_bytes());
    Secret::of(&token)
}

/// Its id.
pub(crate) fn id(number: usize) -> MigrationId {
    let mut id = [9; 16];
    id[..8].copy_from_slice(&u64_of(number).to_le_bytes());
    MigrationId(id)
}

fn surroundings(world: &Arc<World>, end: usize) -> Surroundings {
    Surroundings {
        runtime: Arc::clone(&world.runtimes[end]),
        observer: Arc::new(Watch { world: Arc::clone(world), end }),
        cancel: Arc::clone(&world.cancels[end]),
    }
}

/// Starts the source's end.
pub(crate) fn start_source(world: &Arc<World>) {
    let theirs = Arc::clone(world);
    world.scheduler.spawn(
        Group::Source(world.number),
        "source",
        Box::new(move || {
            let outcome = migrate(&theirs);
            theirs.came_out(SOURCE, EndOutcome::Returned(outcome));
        }),
    );
}

fn migrate(world: &Arc<World>) -> Result<(), Error> {
    let mut guest = world.guest.attach_source()?;
    let writes = std::mem::replace(&mut guest.writes, Box::new(super::index::NoWrites));
    let keeper: Option<Box<dyn Keeper>> = if world.scenario.kept {
        Some(Box::new(SimKeeper {
            index: Arc::clone(&world.index),
            disks: Arc::clone(&world.disks),
            writes,
            written: Vec::new(),
        }))
    } else {
        None
    };
    let index: Arc<dyn crate::index::Duplicates> = world.index.clone();
    let parts = source::Parts {
        guest,
        name: "simulated".to_owned(),
        index: Some(index),
        keeper,
        dialer: world.network.dialer(),
        token: token(world.number),
        migration: id(world.number),
        journal: Box::new(SimJournal { world: Arc::clone(world), end: SOURCE }),
    };
    let summary = source::migrate(parts, world.scenario.config.clone(), surroundings(world, SOURCE))?;
    for (what, count) in [
        ("zero pages", summary.pages_zero),
        ("references", summary.pages_by_reference),
        ("refetches", summary.pages_refetched),
        ("pages held back", summary.pages_lazy),
        ("faults", summary.faults_served),
        ("checks that fail", summary.check_failures),
        ("verified pages", summary.verified_pages),
        ("direct loads", u64::from(summary.load_path == "direct")),
    ] {
        if count > 0 {
            world.reach(what);
        }
    }
    Ok(())
}

/// Starts the target's end.
pub(crate) fn start_target(world: &Arc<World>) {
    let acceptor = world.network.listen();
    let theirs = Arc::clone(world);
    world.scheduler.spawn(
        Group::Target(world.number),
        "target",
        Box::new(move || {
            let (host, journal) = (Arc::clone(&theirs), Arc::clone(&theirs));
            let parts = target::Parts {
                acceptor,
                token: token(theirs.number),
                host: Box::new(move |_| {
                    host.guest.make_incoming();
                    let guest = host.guest.attach_target()?;
                    let disks = host.disks.on(TARGET);
                    let readable = disks.infos().iter().map(|_| Ok(())).collect();
                    Ok(target::Host { guest, disks: Some(disks), readable })
                }),
                journal: Box::new(move |_, _, _| -> Result<Box<dyn Journal>, Error> {
                    Ok(Box::new(SimJournal { world: journal, end: TARGET }))
                }),
            };
            let config = target::Config {
                wait: Some(Duration::from_secs(120)),
                patience: theirs.scenario.config.patience,
                redial_for: theirs.scenario.config.redial_for,
                direct: theirs.scenario.direct,
                depth: theirs.scenario.depth,
                ..target::Config::default()
            };
            let outcome = target::receive(parts, config, surroundings(&theirs, TARGET)).map(|_| ());
            theirs.came_out(TARGET, EndOutcome::Returned(outcome));
        }),
    );
}
