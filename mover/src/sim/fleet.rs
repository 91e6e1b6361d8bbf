//! Several guests among two to four hosts at once, in all directions: each migration is a world of its own, with the oracle of
//! its own, and all share one clock, one wire and one disk. A fleet's seed decides them all, and what strikes them: one
//! alone, a host with all that it sends and receives, its cable, or the whole wire.
//!
//! ```text
//!   A: source 0, target 1, source 2      B: target 0, source 1      C: target 2
//!           |                                    |                        |
//!        ===+======== one wire ==================+========================+===
//!           |                                    |                        |
//!        ---+-------- one disk ------------------+------------------------+---
//! ```
//! Also an hour of the simulated clock, in which guests go to and fro without end: what a migration leaves behind would pile up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::disk::SOURCE;
use super::rng::{Rng, mix};
use super::scenario::{Fault, Scenario, When};
use super::scheduler::{Group, MICRO, MILLI, Ran, SECOND, Scheduler, Tempo};
use super::world::{EndOutcome, Ways, World};
use crate::report::Mode;
use crate::source::NotConverging;
use crate::units::u64_of;

/// Fleets run where no number is given.
const FLEETS: u64 = 60;
/// Fleets that found something which the first [`FLEETS`] do not: a lane of the source's that was sending when the target, with all it
/// needed, closed its connections; the source took that for a migration that had failed.
const FOUND: [u64; 1] = [512];
/// Steps a migration may take.
const STEPS_EACH: u64 = 20_000_000;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, and must be a number")))
}

/// Between which of the fleet's hosts a guest moves.
#[derive(Clone, Copy)]
struct Route {
    from: u64,
    to: u64,
}

/// What strikes more than one migration.
#[derive(Clone, Copy)]
enum Blow {
    /// All connections, and all attempts to make new ones.
    Wire(Fault),
    /// The same, but only those of one host.
    Cable(u64, Fault),
    /// A host, with the ends of all migrations that run there.
    Host(u64),
}

impl Blow {
    fn of(rng: &mut Rng, hosts: u64) -> Option<Self> {
        let host = rng.below(hosts);
        let down = Fault::Down(rng.pick(&[500 * MILLI, 8 * SECOND, 40 * SECOND]));
        let cut = Fault::Cut { notice: rng.once_in(2), lasts: rng.pick(&[MILLI, 8 * SECOND]) };
        match rng.below(7) {
            0 => Some(Self::Wire(down)),
            1 => Some(Self::Wire(cut)),
            2 => Some(Self::Cable(host, rng.pick(&[down, cut]))),
            3 | 4 => Some(Self::Host(host)),
            _ => None,
        }
    }

    /// What a guest on this route has of it.
    fn on(self, route: Route) -> Option<Fault> {
        match self {
            Self::Wire(fault) => Some(fault),
            Self::Cable(host, fault) => (route.from == host || route.to == host).then_some(fault),
            Self::Host(host) if route.from == host => Some(Fault::KillSource),
            Self::Host(host) => (route.to == host).then_some(Fault::KillTarget),
        }
    }
}

/// A fleet: how many hosts there are, and its migrations.
struct Fleet {
    hosts: u64,
    migrations: Vec<Scenario>,
    /// Whether a host or its cable is struck and others go on beside it.
    spares_some: bool,
}

impl Fleet {
    fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed, "fleet");
        let (hosts, count) = (rng.range(2, 4), rng.range(2, 6));
        let mut migrations: Vec<_> = (0..count).map(|_| Scenario::of(rng.next())).collect();
        // One wire: all links are alike, and wide enough for as many.
        let mut link = migrations[0].link.clone();
        link.bandwidth = link.bandwidth.max(50_000_000);
        let delay = rng.magnitude(1, 3 * SECOND);
        let blow = Blow::of(&mut rng, hosts);
        let mut struck = 0;
        for scenario in &mut migrations {
            scenario.link = link.clone();
            let from = rng.below(hosts);
            let route = Route { from, to: (from + rng.range(1, hosts - 1)) % hosts };
            // What strikes many leaves no room for what strikes one: each fault has its turn.
            if let Some(blow) = blow {
                scenario.faults =
                    blow.on(route).map(|fault| (When::After(delay), fault)).into_iter().collect();
                struck += u64::from(!scenario.faults.is_empty());
            }
        }
        Self { hosts, migrations, spares_some: struck > 0 && struck < count }
    }
}

/// Lives through one migration of several, and leaves nothing of it.
fn sail(world: &Arc<World>) {
    world.live();
    world.retire();
}

/// Starts them together and waits for all.
fn run(seed: u64, traced: bool) -> (Ran, BTreeMap<String, u64>) {
    let Fleet { hosts, migrations: scenarios, spares_some } = Fleet::of(seed);
    let tempo = scenarios[0].tempo.clone();
    let scheduler = Scheduler::new(Rng::new(seed, "schedule"), tempo, traced);
    scheduler.allow_steps(STEPS_EACH * u64_of(scenarios.len()));
    let ways = Ways { spindle: Some(Default::default()), ..Ways::default() };
    let reached = Arc::new(Mutex::new(BTreeMap::new()));
    let (root, counts) = (Arc::clone(&scheduler), Arc::clone(&reached));
    let ran = scheduler.run(Box::new(move || {
        let worlds: Vec<_> = scenarios
            .into_iter()
            .enumerate()
            .map(|(at, scenario)| World::among(&root, scenario, at, &ways))
            .collect();
        let tasks: Vec<_> = worlds
            .iter()
            .map(|world| {
                let theirs = Arc::clone(world);
                root.spawn(Group::World, "captain", Box::new(move || sail(&theirs)))
            })
            .collect();
        for task in tasks {
            // What made it fall has ended the run.
            let _ = root.join(task);
        }
        let mut counts = counts.lock().unwrap();
        let running = worlds.iter().filter(|world| world.guest.runs_on().is_some()).count();
        *counts.entry(format!("{running} of {} guests run", worlds.len())).or_default() += 1;
        *counts.entry(format!("{hosts} hosts")).or_default() += 1;
        if spares_some {
            *counts.entry("one host suffers, others do not".to_owned()).or_default() += 1;
        }
        for what in worlds.iter().flat_map(|world| world.reached()) {
            *counts.entry(what).or_default() += 1;
        }
        // Faults whose moment has not come yet wait for it.
        let left: Vec<_> = root
            .living(Group::World)
            .into_iter()
            .filter(|name| !["director", "fault"].contains(&name.as_str()))
            .collect();
        if !left.is_empty() {
            root.fail(format!("all is over, and {left:?} are left:\n{}", root.waits()));
        }
    }));
    let reached = std::mem::take(&mut *reached.lock().unwrap());
    (ran, reached)
}

/// Every migration of every fleet keeps every invariant, whatever its neighbours suffer; and what is there to reach is.
#[test]
fn fleets() {
    let (first, count) =
        (number("PAGEFERRY_FIRST_FLEET").unwrap_or(0), number("PAGEFERRY_FLEETS").unwrap_or(FLEETS));
    let mut all: BTreeMap<String, u64> = BTreeMap::new();
    for seed in first..first + count {
        let (ran, reached) = run(seed, false);
        if let Some(failure) = ran.failure {
            let again = run(seed, true).0;
            panic!("fleet {seed}: {failure:?}\n{}", again.trace.join("\n"));
        }
        for (what, times) in reached {
            *all.entry(what).or_default() += times;
        }
    }
    for (what, times) in &all {
        eprintln!("reached {times:>6} times: {what}");
    }
    if count >= FLEETS {
        for what in [
            "source Moved",
            "source Kept",
            "source Killed",
            "refetches",
            "faults",
            "redial",
            "4 of 4 guests run",
            "4 hosts",
            "one host suffers, others do not",
        ] {
            assert!(all.contains_key(what), "no fleet reaches: {what}");
        }
    }
}

/// What was mended stays so.
#[test]
fn fleets_that_found_something() {
    for seed in FOUND {
        let (ran, _) = run(seed, true);
        assert_eq!(ran.failure, None, "fleet {seed}:\n{}", ran.trace.join("\n"));
    }
}

/// A fleet's seed is one run.
#[test]
fn a_fleet_repeats_itself() {
    for seed in 0..6 {
        let (a, b) = (run(seed, false).0, run(seed, true).0);
        assert_eq!((a.failure, a.hash, a.steps), (None, b.hash, b.steps), "fleet {seed}");
        assert_eq!(a.time, b.time, "fleet {seed}");
    }
}

/// Guests in a harbour where nothing goes wrong: of one size, writing slowly.
fn calm(seed: u64, bandwidth: u64, cap: Option<u64>) -> Scenario {
    let mut scenario = Scenario::of(seed);
    scenario.faults.clear();
    scenario.failing_journal = 0;
    scenario.guest.failing_harvest = 0;
    scenario.guest.pages = 384;
    scenario.guest.tasks = 1;
    scenario.guest.gap = 200 * MILLI;
    scenario.guest.state_bytes = 1000;
    scenario.disk.latency = 50 * MICRO;
    scenario.config.lanes = 2;
    scenario.link.refuse = 0;
    scenario.link.latency = 200 * MICRO;
    scenario.link.jitter = 10 * MICRO;
    scenario.link.bandwidth = bandwidth;
    scenario.link.buffer = 32 * 1024;
    scenario.link.piece = 9000;
    scenario.link.slow_lane = 0;
    scenario.link.late_accept = 1;
    scenario.config.bandwidth = cap;
    scenario.config.throttle = false;
    scenario.config.not_converging = NotConverging::Finish;
    scenario
}

fn calm_tempo() -> Tempo {
    Tempo { interleave: 8, jump: 0, freeze: 0, pause_max: MICRO, step: 200 }
}

/// Eight guests of one size start together, four each way, all pages as data, under one cap each that the wire carries for
/// half of them: none waits for the others to be done, and each gets its share.
#[test]
fn eight_share_a_wire_fairly_and_keep_to_their_caps() {
    const GUESTS: usize = 8;
    const CAP: u64 = 1_000_000;
    // With the wire as narrow, and as wide as all caps together.
    for (seed, wire) in [(1, CAP * 4), (2, CAP * 4), (3, CAP * 32)] {
        let scheduler = Scheduler::new(Rng::new(seed, "schedule"), calm_tempo(), false);
        scheduler.allow_steps(STEPS_EACH * 8);
        let took = Arc::new(Mutex::new([0; GUESTS]));
        let (root, times) = (Arc::clone(&scheduler), Arc::clone(&took));
        let ran = scheduler.run(Box::new(move || {
            let ways = Ways { spindle: Some(Default::default()), ..Ways::default() };
            let tasks: Vec<_> = (0..GUESTS)
                .map(|at| {
                    let mut scenario = calm(mix(seed * 100 + u64_of(at)), wire, Some(CAP));
                    scenario.config.mode = Mode::Stock;
                    scenario.config.max_rounds = 1;
                    scenario.config.verify = false;
                    let (scheduler, times) = (Arc::clone(&root), Arc::clone(&times));
                    let world = World::among(&root, scenario, at, &ways);
                    root.spawn(
                        Group::World,
                        "captain",
                        Box::new(move || {
                            let begun = scheduler.now();
                            sail(&world);
                            times.lock().unwrap()[at] = world.came_out_at(SOURCE) - begun;
                        }),
                    )
                })
                .collect();
            for task in tasks {
                let _ = root.join(task);
            }
        }));
        assert_eq!(ran.failure, None, "seed {seed}");
        let took = *took.lock().unwrap();
        let (least, most) = (took.iter().min().unwrap(), took.iter().max().unwrap());
        let bytes = 384 * 4096;
        let expected = bytes * SECOND / CAP.min(wire / u64_of(GUESTS));
        eprintln!("wire {wire}: {took:?} ns, {expected} expected");
        assert!(
            most * 2 < least * 3,
            "the slowest takes more than half as long again as the fastest: {took:?}"
        );
        // A burst and what is in the buffers goes before the cap.
        assert!(*least > expected * 3 / 4 && *most < expected * 3, "{took:?}, {expected} expected");
    }
}

/// Eight guests go to and fro, each on its own, for an hour (`PAGEFERRY_HOUR_SECONDS` of the simulated clock): nothing piles up,
/// and none is left behind.
#[test]
fn an_hour_of_eight_guests_leaves_nothing_behind() {
    const GUESTS: usize = 8;
    let length = number("PAGEFERRY_HOUR_SECONDS").unwrap_or(3600) * SECOND;
    let scheduler = Scheduler::new(Rng::new(1, "schedule"), calm_tempo(), false);
    scheduler.allow_steps(u64::MAX);
    let log: Arc<Mutex<Log>> = Arc::default();
    let (root, theirs) = (Arc::clone(&scheduler), Arc::clone(&log));
    let ran = scheduler.run(Box::new(move || {
        let ways = Ways { spindle: Some(Default::default()), ..Ways::default() };
        let end = root.now() + length;
        let tasks: Vec<_> = (0..GUESTS)
            .map(|at| {
                let (scheduler, ways, log) = (Arc::clone(&root), ways.clone(), Arc::clone(&theirs));
                let captain = move || {
                    for turn in 0.. {
                        if scheduler.now() >= end {
                            break;
                        }
                        let scenario = calm(mix(u64_of(at) << 32 | turn), 125_000_000, Some(20_000_000));
                        let world = World::among(&scheduler, scenario, at, &ways);
                        sail(&world);
                        let moved =
                            matches!(world.ends()[SOURCE].outcome, Some(EndOutcome::Returned(Ok(()))));
                        assert!(moved, "guest {at} did not move on turn {turn}");
                        assert_eq!(
                            world.network.left(),
                            (0, 0),
                            "guest {at}, turn {turn}: connections are left"
                        );
                        log.lock().unwrap().turns[at] += 1;
                        let left = (
                            Arc::downgrade(&world),
                            Arc::downgrade(&world.guest),
                            Arc::downgrade(&world.disks),
                        );
                        drop(world);
                        // Some time between.
                        scheduler.sleep(2 * SECOND + mix(turn ^ u64_of(at)) % (6 * SECOND));
                        let left = [left.0.strong_count(), left.1.strong_count(), left.2.strong_count()];
                        assert_eq!(
                            left, [0; 3],
                            "guest {at}, turn {turn}: somebody holds on to world, guest or disks"
                        );
                    }
                };
                root.spawn(Group::World, "captain", Box::new(captain))
            })
            .collect();
        while root.now() < end {
            root.sleep(length / 20);
            let (_, living, waits) = root.load();
            let memory = private_memory();
            theirs.lock().unwrap().samples.push((living, waits, memory));
        }
        for task in tasks {
            let _ = root.join(task);
        }
        let (_, living, _) = root.load();
        if living > 1 {
            root.fail(format!("{living} tasks are left:\n{}", root.waits()));
        }
    }));
    assert_eq!(ran.failure, None);
    let log = log.lock().unwrap();
    eprintln!("{} s in {} steps; migrations: {:?}", ran.time / SECOND, ran.steps, log.turns);
    for (living, waits, memory) in &log.samples {
        eprintln!("{living} tasks, {waits} timers and waits, {} KiB", memory >> 10);
    }
    let (fewest, most) = (log.turns.iter().min().unwrap(), log.turns.iter().max().unwrap());
    assert!(*fewest > 0 && *most <= fewest * 3 / 2 + 3, "one is left behind: {:?}", log.turns);
    // The first quarter is for filling pools; from then on nothing grows.
    let (early, late) = log.samples.split_at(log.samples.len() / 4);
    let peak = |samples: &[(usize, usize, u64)]| {
        let of = |pick: fn(&(usize, usize, u64)) -> u64| samples.iter().map(pick).max().unwrap();
        [of(|s| u64_of(s.0)), of(|s| u64_of(s.1)), of(|s| s.2)]
    };
    let (early, late) = (peak(early), peak(late));
    assert!(
        late[0] <= early[0] * 2 + 50 && late[1] <= early[1] * 2 + 50,
        "queues grow: {early:?} to {late:?}"
    );
    assert!(late[2] <= early[2] + (64 << 20), "memory grows: {early:?} to {late:?}");
}

#[derive(Default)]
struct Log {
    turns: [u64; 8],
    samples: Vec<(usize, usize, u64)>,
}

/// This process's own memory, which is this test's alone under nextest.
fn private_memory() -> u64 {
    use crate::runtime::{Runtime as _, Threads};
    Threads::new().private_memory()
}
