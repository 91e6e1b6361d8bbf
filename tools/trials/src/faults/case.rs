//! One case: a guest migrates, the fault strikes, the ends end, an operator settles what is left to settle, and everything
//! is looked at.

#![forbid(unsafe_code)]

use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mover::net::lab::End;
use mover::process::control::Phase;
use mover::report::Mode;

use super::plan::{Case, Moment};
use super::strike::{Engines, PATIENCE, strike};
use crate::settle::{settle, take_over};
use crate::world::{ENDS, World, complaint, name_of};

/// How long the ends dial again, or wait to be dialled.
const REDIAL: Duration = Duration::from_secs(8);
/// How long anything may take that is only waited for.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a migration may take to the moment at which the fault strikes.
const COMES_WITHIN: Duration = Duration::from_secs(25);
/// How often a case is begun that does not come to its moment.
const ATTEMPTS: u32 = 3;
/// How often the watch looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How a case ended.
pub(crate) struct Outcome {
    pub(crate) case: Case,
    /// How the ends' programs ended: exit code, or the signal.
    pub(crate) ended: [String; 2],
    /// Who runs the guest.
    pub(crate) runs: Option<End>,
    /// What the operator had to do.
    pub(crate) settled: Vec<String>,
    /// What must not be.
    pub(crate) violations: Vec<String>,
    /// Whether the fault was put in place.
    pub(crate) struck: bool,
    pub(crate) seconds: f64,
}

/// Runs it; again where the migration broke off before its moment had come, as on a machine that stands still for seconds.
pub(crate) fn run(world: &World, case: Case) -> Outcome {
    let begun = Instant::now();
    let mut outcome = attempt(world, case);
    for _ in 1..ATTEMPTS {
        if outcome.violations.is_empty() || outcome.struck {
            break;
        }
        outcome = attempt(world, case);
    }
    outcome.seconds = begun.elapsed().as_secs_f64();
    outcome
}

fn attempt(world: &World, case: Case) -> Outcome {
    let mut outcome = Outcome {
        case,
        ended: [String::new(), String::new()],
        runs: None,
        settled: Vec::new(),
        violations: Vec::new(),
        struck: false,
        seconds: 0.0,
    };
    if let Err(error) = play(world, case, &mut outcome) {
        outcome.violations.push(format!("{error:#}"));
    }
    let left = world.left(Duration::from_secs(3));
    match left {
        Ok(left) if outcome.violations.is_empty() => {
            outcome.violations.extend(left.into_iter().map(|what| format!("left: {what}")))
        }
        Ok(_) => {}
        Err(error) => outcome.violations.push(format!("{error:#}")),
    }
    if let Err(error) = world.sweep() {
        outcome.violations.push(format!("{error:#}"));
    }
    outcome
}

/// A program of this case; ended with it.
pub(crate) struct Ending(pub(crate) Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // Ended already, mostly.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn play(world: &World, case: Case, outcome: &mut Outcome) -> Result<()> {
    world.calm()?;
    world.must(
        End::Source,
        &["guest", "start", "desk", "--memory", "32M", "--disk", &world.disk(), "--quiet"],
    )?;
    let (patience, redial) = (format!("{}s", PATIENCE.as_secs()), format!("{}s", REDIAL.as_secs()));
    let shared = ["--patience", patience.as_str(), "--redial-for", redial.as_str()];
    let listen = format!("{}:0", End::Target.address());
    let receive = ["receive", "--listen", &listen, "--wait", "12s"];
    let mut target = Ending(world.start(End::Target, &[&receive[..], &shared].concat())?);
    let listening = world.ears[1].until_event("listening", LIMIT).context("the target never listened")?;
    let word = |key: &str| listening[key].as_str().context("an address and a token").map(str::to_owned);
    let (to, token) = (word("address")?, word("token")?);
    let ear = &world.ears[usize::from(case.moment.end() == End::Target)];
    ear.hold_at(case.moment.event());
    if case.mode == Mode::Lazy && case.moment.is_late() {
        // So that there is something outstanding when it strikes.
        world.ears[0].let_reads_wait("arm", target.0.id());
    }
    let mode = case.mode.name();
    let send =
        ["send", "--guest", "desk", "--to", &to, "--token", &token, "--mode", mode, "--bandwidth", "64MiB/s"];
    let mut source = Ending(world.start(End::Source, &[&send[..], &shared].concat())?);

    let over = AtomicBool::new(false);
    let (ended, twice) = thread::scope(|scope| {
        let watch = scope.spawn(|| watch(world, &over));
        let ended = until_struck(world, case, &source, &target, &mut outcome.struck).and_then(|()| {
            let resumed = take_over(world)?;
            let ended = [until_ended(&mut source.0)?, until_ended(&mut target.0)?];
            outcome.ended = ended.map(shown);
            Ok(resumed)
        });
        let settled = ended.and_then(|resumed| {
            outcome.settled = settle(world)?;
            if resumed {
                outcome.settled.insert(0, "target resume".to_owned());
            }
            look(world, outcome)
        });
        over.store(true, SeqCst);
        (settled, watch.join())
    });
    match twice {
        Ok(false) => {}
        Ok(true) => outcome.violations.push("TWO GUESTS RAN AT ONCE".to_owned()),
        Err(_) => bail!("the watch fell"),
    }
    ended.with_context(|| {
        format!("said: {} | {}", world.last_words(End::Source), world.last_words(End::Target))
    })
}

/// Waits for the moment, strikes, and lets everything go on.
fn until_struck(
    world: &World,
    case: Case,
    source: &Ending,
    target: &Ending,
    was_struck: &mut bool,
) -> Result<()> {
    let ear = &world.ears[usize::from(case.moment.end() == End::Target)];
    ear.until_held(COMES_WITHIN).context("its moment never came")?;
    match case.moment {
        Moment::Handover => until(|| world.status(End::Source).is_some_and(|s| s.phase == Phase::Released))
            .context("the source never gave the guest up")?,
        Moment::Started => until(|| world.runs(End::Target)).context("the guest never ran at the target")?,
        _ => {}
    }
    let struck = strike(world, case.fault, &Engines { source: &source.0, target: &target.0 })?;
    *was_struck = true;
    ear.release();
    thread::sleep(Duration::from_millis(200));
    world.weather.keep_waiting(None);
    struck.pass()
}

pub(crate) fn until(mut there: impl FnMut() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !there() {
        ensure!(begun.elapsed() < LIMIT, "waited for {} s", LIMIT.as_secs());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

pub(crate) fn until_ended(child: &mut Child) -> Result<ExitStatus> {
    let mut status = None;
    until(|| {
        status = child.try_wait().ok().flatten();
        status.is_some()
    })
    .context("a program never ended")?;
    status.context("it has ended")
}

fn shown(status: ExitStatus) -> String {
    status.code().map_or_else(|| "killed".to_owned(), |code| code.to_string())
}

/// Whether two guests ever ran. One end is looked at before and after the other: a guest that changes hands meanwhile, either way,
/// is seen at one of them once.
pub(crate) fn watch(world: &World, over: &AtomicBool) -> bool {
    let mut twice = false;
    while !over.load(SeqCst) {
        twice |= world.runs(End::Target) && world.runs(End::Source) && world.runs(End::Target);
        thread::sleep(LOOK_EVERY);
    }
    twice
}

/// Exactly one guest runs, works, and finds nothing wrong in its memory; it is ended then.
fn look(world: &World, outcome: &mut Outcome) -> Result<()> {
    // One that was told to end frees its memory first.
    until(|| ENDS.iter().filter(|end| world.status(**end).is_some()).count() <= 1)
        .context("a guest that was given up is still there")?;
    let running: Vec<End> = ENDS.into_iter().filter(|end| world.runs(*end)).collect();
    let [end] = running[..] else { bail!("{} guests run", running.len()) };
    outcome.runs = Some(end);
    let status = world.status(end).context("it answered just now")?;
    ensure!(!status.holding, "the guest waits for pages that nobody loads");
    ensure!(status.migration.is_none(), "a migration still has the guest");
    ensure!(status.throttle_percent == 100, "it is still slowed down to {} %", status.throttle_percent);
    let check = world.run(end, &["guest", "check", "desk"])?;
    ensure!(check.status.success(), "its check at the {}: {}", name_of(end), complaint(&check));
    let operations = |world: &World| world.status(end).map_or(0, |status| status.work.operations);
    let before = operations(world);
    until(|| operations(world) > before).context("the guest does nothing any more")?;
    world.must(end, &["guest", "stop", "desk", "--quiet"]).map(drop)
}
