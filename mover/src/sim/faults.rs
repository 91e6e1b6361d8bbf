//! What goes wrong, carried out: a task of the world for each planned fault, waiting for its moment.

use std::sync::Arc;
use std::time::Duration;

use super::disk::{SOURCE, TARGET};
use super::scenario::{Fault, Stranger, When};
use super::scheduler::{Group, SECOND};
use super::world::World;
use crate::wire::hello::{Hello, MigrationId, Purpose, Secret};

/// How long a stranger stays.
const STAY: u64 = 20 * SECOND;

/// Starts the tasks of all planned faults.
pub(crate) fn plan(world: &Arc<World>) {
    for (when, fault) in world.scenario.faults.clone() {
        let theirs = Arc::clone(world);
        world.scheduler.spawn(
            Group::World,
            "fault",
            Box::new(move || {
                if await_moment(&theirs, when) {
                    theirs.reach(format!("{} in {}", fault.name(), theirs.phase()));
                    theirs.scheduler.note(|| format!("fault: {fault:?}"));
                    strike(&theirs, fault);
                }
            }),
        );
    }
}

/// Waits for the moment; `false` if it never comes.
fn await_moment(world: &World, when: When) -> bool {
    let delay = match when {
        When::After(delay) => delay,
        When::In(phase, delay) => {
            while !world.ends()[SOURCE].phases.contains(&phase) {
                if world.is_over() {
                    return false;
                }
                world.scheduler.block(world.news, None, "a phase, for a fault");
            }
            delay
        }
    };
    world.scheduler.sleep(delay);
    !world.is_over()
}

fn strike(world: &Arc<World>, fault: Fault) {
    let (scheduler, network) = (&world.scheduler, &world.network);
    match fault {
        Fault::Down(lasts) => {
            network.down();
            scheduler.sleep(lasts);
            network.up();
        }
        Fault::Cut { notice, lasts } => {
            network.down();
            network.cut(notice);
            scheduler.sleep(lasts);
            network.up();
        }
        Fault::CutOne { notice } => network.cut_any(notice),
        Fault::KillSource => world.kill(SOURCE),
        Fault::KillTarget => world.kill(TARGET),
        Fault::CancelSource => world.cancels[SOURCE].ask(&*world.runtimes[SOURCE]),
        Fault::CancelTarget => world.cancels[TARGET].ask(&*world.runtimes[TARGET]),
        Fault::SlowDisks(times, lasts) => {
            world.disks.slow(times);
            scheduler.sleep(lasts);
            world.disks.slow(1);
        }
        Fault::BrokenDisks(lasts) => {
            world.disks.broken(true);
            scheduler.sleep(lasts);
            world.disks.broken(false);
        }
        Fault::Stranger(how) => stranger(world, how),
    }
}

/// Connects to the target and misbehaves; whatever it meets is its own problem.
fn stranger(world: &Arc<World>, how: Stranger) {
    let Ok(mut line) = world.network.strange_dialer().dial(Duration::from_secs(1)) else { return };
    line.receiver.set_patience(Some(Duration::from_nanos(STAY)));
    let mut answer = [0; 64];
    let bytes = match how {
        Stranger::Silent => Vec::new(),
        Stranger::Garbage => (0..200).map(|_| u8::try_from(world.below(256)).unwrap_or(0)).collect(),
        Stranger::WrongToken => {
            Hello::new(Purpose::Control, MigrationId([1; 16]), Secret::of(&[2; 32])).encode().to_vec()
        }
        Stranger::Half => {
            Hello::new(Purpose::Control, MigrationId([1; 16]), Secret::of(&[2; 32])).encode()[..32].to_vec()
        }
    };
    let said = line.sender.send(&bytes, &[]);
    if how == Stranger::Half {
        return;
    }
    let heard = said.and_then(|()| line.receiver.recv(&mut answer));
    world.scheduler.note(|| format!("the stranger heard {heard:?}"));
}
