//! One migration in a simulated world, from its seed to its verdict.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{DiskWorld, SOURCE, Spindle, TARGET};
use super::faults;
use super::guest::Guest;
use super::index::SimIndex;
use super::net::{Network, Wire};
use super::oracle;
use super::rng::Rng;
use super::runtime::SimRuntime;
use super::scenario::Scenario;
use super::scheduler::{Failure, Group, Key, MILLI, Ran, SECOND, Scheduler};
use super::workload::Beginning;
use crate::error::Error;
use crate::journal::{Entry, Journal};
use crate::memory::OwnedPages;
use crate::report::{Event, Observer, Phase};
use crate::runtime::Runtime;
use crate::source::Cancel;
use crate::units::usize_of;

/// How long both ends may take for everything, faults included.
const PATIENCE: u64 = 3 * 3600 * SECOND;

/// How one end came out.
#[derive(Debug)]
pub(crate) enum EndOutcome {
    /// It was killed.
    Killed,
    /// It returned.
    Returned(Result<(), Error>),
}

/// What the world remembers of one end.
#[derive(Default)]
pub(crate) struct EndRecord {
    /// How it came out, once it has.
    pub(crate) outcome: Option<EndOutcome>,
    /// The last word in its journal; survives a kill.
    pub(crate) journal: Option<Entry>,
    /// When it came out.
    pub(crate) at: u64,
    /// Phases it entered.
    pub(crate) phases: Vec<Phase>,
}

/// What migrations have in common that go on at once between two hosts. Each has its own listener and its own images.
#[derive(Clone, Default)]
pub(crate) struct Ways {
    /// The wire all connections share; both directions.
    pub(crate) wire: Wire,
    /// The disk all images lie on, if it is one.
    pub(crate) spindle: Option<Spindle>,
}

/// The world of one migration.
pub(crate) struct World {
    /// Which one it is.
    pub(crate) number: usize,
    pub(crate) scenario: Scenario,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) network: Arc<Network>,
    pub(crate) disks: Arc<DiskWorld>,
    pub(crate) guest: Arc<Guest>,
    pub(crate) index: Arc<SimIndex>,
    pub(crate) runtimes: [Arc<dyn Runtime>; 2],
    pub(crate) cancels: [Arc<Cancel>; 2],
    ends: Mutex<[EndRecord; 2]>,
    /// An end has ended or entered a phase.
    pub(crate) news: Key,
    rng: Mutex<Rng>,
    /// What of the engine this run has reached.
    reached: Mutex<BTreeSet<String>>,
}

impl World {
    /// The world of `scenario`, everything at its start.
    pub(crate) fn new(scenario: Scenario, traced: bool) -> Arc<Self> {
        let stream = Rng::new(scenario.seed, "schedule");
        let scheduler = Scheduler::new(stream, scenario.tempo.clone(), traced);
        Self::among(&scheduler, scenario, 0, &Ways::default())
    }

    /// The world of `scenario` as the `number`-th of several that share `ways`.
    pub(crate) fn among(
        scheduler: &Arc<Scheduler>,
        scenario: Scenario,
        number: usize,
        ways: &Ways,
    ) -> Arc<Self> {
        let seed = scenario.seed;
        let stream = |name: &str| Rng::new(seed, name);
        let scheduler = Arc::clone(scheduler);
        let pages = usize_of(scenario.guest.pages);
        let memory = [Arc::new(OwnedPages::new(pages)), Arc::new(OwnedPages::new(pages))];
        let mut beginnings = stream("beginning");
        let beginning = Beginning::drawn(&mut beginnings, scenario.guest.pages, &scenario.disk.blocks);
        let disks = DiskWorld::new(
            &scheduler,
            stream("disk"),
            scenario.disk.clone(),
            &beginning.blocks,
            memory.to_vec(),
            ways.spindle.clone(),
        );
        let network =
            Network::new(&scheduler, stream("net"), scenario.link.clone(), vec![Arc::clone(&memory[SOURCE])]);
        network.share(&ways.wire);
        let index = Arc::new(SimIndex::new(stream("index"), &beginning.blocks, scenario.lies));
        let guest = Guest::new(
            &scheduler,
            stream("guest"),
            scenario.guest.clone(),
            memory,
            Arc::clone(&disks),
            beginning.pages,
            beginning.blocks,
        );
        guest.go(number, &mut beginnings);
        let runtime = |group, name| -> Arc<dyn Runtime> { SimRuntime::new(&scheduler, group, stream(name)) };
        Arc::new(Self {
            number,
            runtimes: [runtime(Group::Source(number), "source"), runtime(Group::Target(number), "target")],
            cancels: Default::default(),
            ends: Mutex::default(),
            news: scheduler.signal(),
            rng: Mutex::new(stream("world")),
            reached: Mutex::default(),
            scenario,
            scheduler,
            network,
            disks,
            guest,
            index,
        })
    }

    /// When an end came out.
    pub(crate) fn came_out_at(&self, end: usize) -> u64 {
        self.ends()[end].at
    }

    /// What of the engine this run has reached.
    pub(crate) fn reached(&self) -> BTreeSet<String> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends what is left of it once it has been judged: the guest itself.
    pub(crate) fn retire(&self) {
        self.scheduler.kill(Group::Guest(self.number));
    }

    /// What is known of the two ends.
    pub(crate) fn ends(&self) -> MutexGuard<'_, [EndRecord; 2]> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the run reached something worth reaching.
    pub(crate) fn reach(&self, what: impl Into<String>) {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).insert(what.into());
    }

    /// The source's phase, by name.
    pub(crate) fn phase(&self) -> String {
        self.ends()[SOURCE].phases.last().map_or("none".to_owned(), |phase| format!("{phase:?}"))
    }

    /// A number under `n`.
    pub(crate) fn below(&self, n: u64) -> u64 {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).below(n)
    }

    /// Whether both ends have come out.
    pub(crate) fn is_over(&self) -> bool {
        self.ends().iter().all(|end| end.outcome.is_some())
    }

    /// Records how `end` came out, if that is not settled yet.
    pub(crate) fn came_out(&self, end: usize, outcome: EndOutcome) {
        self.scheduler.note(|| format!("end {end} comes out: {outcome:?}"));
        let now = self.scheduler.now();
        let mut ends = self.ends();
        if ends[end].outcome.is_none() {
            (ends[end].outcome, ends[end].at) = (Some(outcome), now);
        }
        drop(ends);
        self.scheduler.wake(self.news);
    }

    /// Kills an end as kill -9 does: its tasks, its connections, its hold on the guest. Journal, guest and disks stay.
    pub(crate) fn kill(&self, end: usize) {
        if self.ends()[end].outcome.is_some() {
            return;
        }
        self.scheduler.note(|| format!("end {end} is killed"));
        self.scheduler.kill([Group::Source(self.number), Group::Target(self.number)][end]);
        self.network.kill_side(end);
        self.guest.engine_killed(end);
        self.came_out(end, EndOutcome::Killed);
    }

    /// Lives through the scenario and judges its outcome; the director's task.
    pub(crate) fn live(self: &Arc<Self>) {
        let scheduler = &self.scheduler;
        scheduler.sleep(self.below(10 * MILLI));
        super::ends::start_target(self);
        scheduler.sleep(self.below(5 * MILLI));
        super::ends::start_source(self);
        faults::plan(self);
        let deadline = scheduler.now() + PATIENCE;
        while !self.is_over() {
            if !scheduler.block(self.news, Some(deadline), "both ends to come out")
                && scheduler.now() >= deadline
            {
                scheduler.fail(format!("the ends do not come out:\n{}", scheduler.waits()));
            }
        }
        oracle::judge(self);
    }

    /// Runs the scenario. `snapshot_at`: notes what every task waits for at that millisecond.
    pub(crate) fn run(self: &Arc<Self>, snapshot_at: Option<u64>) -> Ran {
        let world = Arc::clone(self);
        if let Some(at) = snapshot_at {
            let scheduler = Arc::clone(&self.scheduler);
            let look = move || {
                scheduler.sleep(at * MILLI);
                let waits = scheduler.waits();
                scheduler.note(|| format!("who waits for what:\n{waits}"));
            };
            self.scheduler.spawn(Group::World, "look", Box::new(look));
        }
        self.scheduler.run(Box::new(move || world.live()))
    }
}

/// The durable record of an end, in the world's memory.
pub(crate) struct SimJournal {
    pub(crate) world: Arc<World>,
    pub(crate) end: usize,
}

impl Journal for SimJournal {
    fn record(&mut self, entry: Entry) -> Result<(), Error> {
        self.world.scheduler.interleave();
        let odds = self.world.scenario.failing_journal;
        if !self.world.scheduler.alive() || (odds > 0 && self.world.below(odds) == 0) {
            return Err(Error::Io {
                doing: "cannot write the migration's record".to_owned(),
                remedy: "It is simulated",
                source: std::io::Error::other("no space left"),
            });
        }
        self.world.scheduler.note(|| format!("the journal says {entry:?}"));
        self.world.ends()[self.end].journal = Some(entry);
        // The entry may be durable and its writer never live to know.
        self.world.scheduler.interleave();
        Ok(())
    }

    fn close(&mut self) -> Result<(), Error> {
        self.world.scheduler.interleave();
        if self.world.scheduler.alive() {
            self.world.ends()[self.end].journal = None;
        }
        Ok(())
    }
}

/// Passes an end's events on to whoever plans faults.
pub(crate) struct Watch {
    pub(crate) world: Arc<World>,
    pub(crate) end: usize,
}

impl Observer for Watch {
    fn event(&self, event: Event) {
        if !self.world.scheduler.alive() {
            return;
        }
        match event {
            Event::Phase { phase, .. } => {
                self.world.scheduler.note(|| format!("phase {phase:?}"));
                self.world.ends()[self.end].phases.push(phase);
                self.world.scheduler.wake(self.world.news);
            }
            Event::Notice { text, .. } => {
                if text.contains("dialling again") {
                    self.world.reach("redial");
                }
                self.world.scheduler.note(|| format!("notice: {text}"));
            }
            Event::Round { round, pages, .. } => {
                self.world.scheduler.note(|| format!("round {round}, {pages} pages"));
            }
            Event::Sample(_) => {}
        }
    }
}

/// A run's verdict, with what it takes to look into it.
pub(crate) struct Verdict {
    /// What the seed stood for.
    pub(crate) scenario: Scenario,
    /// How it ran.
    pub(crate) ran: Ran,
    /// What of the engine it reached.
    pub(crate) reached: BTreeSet<String>,
}

/// Runs what `seed` stands for. `traced`: keeps its last events; `snapshot_at`: what tasks wait for at that millisecond
/// is one of them.
pub(crate) fn run(seed: u64, traced: bool, snapshot_at: Option<u64>) -> Verdict {
    let scenario = Scenario::of(seed);
    let world = World::new(scenario.clone(), traced);
    let ran = world.run(snapshot_at);
    let reached = world.reached.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Verdict { scenario, ran, reached }
}

impl Verdict {
    /// The report of a failed run.
    pub(crate) fn report(&self) -> String {
        let what = match &self.ran.failure {
            None => "nothing failed".to_owned(),
            Some(Failure::Violation(text)) => format!("violation: {text}"),
            Some(Failure::Panicked(text)) => format!("panic: {text}"),
            Some(Failure::Deadlock(waits)) => format!("deadlock:\n{waits}"),
            Some(Failure::Endless(waits)) => format!("it never ends: {waits}"),
        };
        format!(
            "seed {}: {what}\n{:#?}\nlast events:\n{}\nsteps {}, time {} ms\nagain: PAGEFERRY_SEED={} cargo nextest run -p mover sim::seed --no-capture",
            self.scenario.seed,
            self.scenario,
            self.ran.trace.join("\n"),
            self.ran.steps,
            self.ran.time / MILLI,
            self.scenario.seed,
        )
    }
}

const _: () = assert!(SOURCE == 0 && TARGET == 1);
