//! The end of a scenario: links and ends are back, an operator settles what is in doubt, and then exactly one guest
//! runs, every page of it right, and nothing is left over.

use std::sync::Arc;

use super::disk::{SOURCE, TARGET};
use super::guest::{SourcePhase, TargetPhase};
use super::scenario::Fault;
use super::scheduler::{Group, SECOND};
use super::world::{EndOutcome, World};
use crate::error::Error;
use crate::journal::Entry;
use crate::report::Phase;

/// How the source's end came out, in the terms of its contract.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// The guest runs on the target, all of it.
    Moved,
    /// The guest runs here as before.
    Kept,
    /// Not known.
    InDoubt,
    /// Killed.
    Killed,
}

/// Judges the world once both ends have come out.
pub(crate) fn judge(world: &Arc<World>) {
    let scheduler = &world.scheduler;
    world.network.up();
    // What is closing closes.
    scheduler.sleep(2 * SECOND);
    let source = source_of(world);
    world.reach(format!("source {source:?}"));
    world.reach(format!("guest {:?} and {:?}", world.guest.phases().0, world.guest.phases().1));
    leftovers(world);
    promises(world, source);
    settle(world, source);
    one_runs(world);
}

fn source_of(world: &World) -> Source {
    match &world.ends()[SOURCE].outcome {
        Some(EndOutcome::Returned(Ok(_))) => Source::Moved,
        Some(EndOutcome::Returned(Err(Error::InDoubt { .. }))) => Source::InDoubt,
        Some(EndOutcome::Returned(Err(_))) => Source::Kept,
        Some(EndOutcome::Killed) | None => Source::Killed,
    }
}

/// No task, connection or attachment outlives its end.
fn leftovers(world: &World) {
    for (end, group) in [(SOURCE, Group::Source(world.number)), (TARGET, Group::Target(world.number))] {
        let tasks = world.scheduler.living(group);
        if !tasks.is_empty() {
            world.scheduler.fail(format!("end {end} has come out and still runs {tasks:?}"));
        }
        let open = world.network.open(end);
        if open > 0 {
            world.scheduler.fail(format!("end {end} has come out and holds {open} connections open"));
        }
        if world.guest.is_attached(end) {
            world.scheduler.fail(format!("end {end} has come out and holds on to the guest"));
        }
    }
    if !world.guest.is_at_ease() {
        world.scheduler.fail("the guest is left throttled or its dirty log armed".to_owned());
    }
}

/// What an end said must be so.
fn promises(world: &World, source: Source) {
    let (here, there) = world.guest.phases();
    let fail = |text: String| world.scheduler.fail(format!("{text} (source {here:?}, target {there:?})"));
    match source {
        Source::Moved => {
            if there != TargetPhase::Running || here != SourcePhase::Destroyed || world.guest.held() > 0 {
                fail(format!("the source says it is done, {} pages are held back", world.guest.held()));
            }
        }
        Source::Kept => {
            if here != SourcePhase::Running {
                fail("the source says the guest runs there as before".to_owned());
            }
            if there != TargetPhase::None {
                fail("a failed migration leaves something on the target".to_owned());
            }
        }
        Source::InDoubt => {
            if here != SourcePhase::Released {
                fail("the source is in doubt and has not given the guest up".to_owned());
            }
        }
        Source::Killed => {}
    }
    let ends = world.ends();
    let target_is_well = matches!(ends[TARGET].outcome, Some(EndOutcome::Returned(Ok(_))));
    if target_is_well && (there != TargetPhase::Running || world.guest.held() > 0) {
        drop(ends);
        fail("the target says the guest runs there".to_owned());
    } else if world.scenario.is_fair() && source != Source::Moved {
        let outcomes = format!("{:?}, {:?}", ends[SOURCE].outcome, ends[TARGET].outcome);
        drop(ends);
        fail(format!("nothing was in the way and yet: {outcomes}"));
    }
}

/// The operator's part: `pageferry resolve`, with both hosts in view.
fn settle(world: &Arc<World>, source: Source) {
    let (here, there) = world.guest.phases();
    if here != SourcePhase::Released {
        return;
    }
    if !matches!(source, Source::InDoubt | Source::Killed) {
        world.scheduler.fail(format!("the guest is given up and yet the source is {source:?}"));
    }
    match there {
        TargetPhase::Running | TargetPhase::Stopped => {}
        TargetPhase::None => {
            let journal = world.ends()[TARGET].journal;
            // Recorded first, started next: a kill in between leaves a record of a guest that never ran.
            let killed = matches!(world.ends()[TARGET].outcome, Some(EndOutcome::Killed));
            if journal == Some(Entry::Started) && !killed {
                world.scheduler.fail("the target's record says started, and no guest is there".to_owned());
            }
            world.reach("an operator");
            world.scheduler.note(|| "an operator gives the guest back to the source".to_owned());
            match world.guest.attach_source() {
                Ok(mut guest) => {
                    if let Err(error) = guest.life.reclaim().and_then(|()| guest.life.resume()) {
                        world.scheduler.fail(format!("the source can't take the guest back: {error}"));
                    }
                }
                Err(error) => {
                    world.scheduler.fail(format!("nobody can attach to the source's guest: {error}"))
                }
            }
        }
        TargetPhase::Incoming | TargetPhase::Loaded => {
            world.scheduler.fail(format!("the target has come out and its guest is {there:?}"));
        }
    }
}

/// Exactly one runs, and it is right. Only where post-copy's own risk struck may there be none: pages outstanding and
/// an end that had them, or the way to it, gone for good.
fn one_runs(world: &World) {
    let scheduler = &world.scheduler;
    let held = world.guest.held();
    match world.guest.runs_on() {
        None if world.guest.phases().1 == TargetPhase::Stopped && risky(world) => return,
        None => scheduler.fail(format!("no guest runs: {:?}", world.guest.phases())),
        Some(TARGET) if held > 0 && risky(world) => return,
        Some(TARGET) if held > 0 => scheduler.fail(format!("{held} pages are held back for ever")),
        Some(_) => {}
    }
    if world.guest.is_gated() {
        if !matches!(world.ends()[TARGET].outcome, Some(EndOutcome::Killed)) {
            scheduler.fail("the gate before the disks is left closed".to_owned());
        }
        // The target was killed between the last page and the end of the drain.
        let opened = world.guest.attach_target().map(|guest| guest.lazy.map(|hold| hold.finish()));
        world.reach("an operator opens the gate");
        scheduler.note(|| format!("an operator opens the gate: {opened:?}"));
    }
    let before = world.guest.operations();
    for _ in 0..60 {
        if world.guest.operations() > before {
            break;
        }
        scheduler.sleep(SECOND);
    }
    if world.guest.operations() == before {
        scheduler.fail("the guest runs and does nothing".to_owned());
    }
    world.guest.check_all();
}

/// Whether something happened after the restart that can cost a guest whose pages are still outstanding.
fn risky(world: &World) -> bool {
    let patience = u64::try_from(world.scenario.config.redial_for.as_nanos()).unwrap_or(u64::MAX);
    let (mut away, mut killed) = (0, false);
    for (_, fault) in &world.scenario.faults {
        match fault {
            Fault::KillSource | Fault::KillTarget => killed = true,
            Fault::Cut { lasts, .. } | Fault::Down(lasts) => away += lasts,
            // Who cancels while the source dials again tells it to give up.
            Fault::CancelSource => away += patience / 2,
            _ => {}
        }
    }
    let committed = world.ends()[SOURCE].phases.contains(&Phase::Commit);
    committed && (killed || away >= patience)
}
