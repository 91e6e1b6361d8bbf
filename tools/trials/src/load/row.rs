//! One guest migrates to and fro, again and again. At random, something goes wrong at a random moment; where it does not pass by
//! itself, an operator settles it. There is one guest all the time, and its memory is right all the time.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mover::net::lab::End;
use rustix::process::{Pid, Signal, kill_process};

use super::{Dice, across};
use crate::faults::case::{Ending, until, until_ended, watch};
use crate::settle::{settle, take_over};
use crate::weather::Trouble;
use crate::world::{ENDS, World, name_of};

/// Bits a second on the cable.
const LINK: u64 = 4_000_000_000;
const LIMIT: Duration = Duration::from_secs(60);
/// A fault strikes within so many milliseconds of the begin of `send`.
const WITHIN_MS: u64 = 500;
/// All of memory is checked after so many migrations; the guest itself checks what it touches, and the rest in the background.
const CHECK_EVERY: u64 = 25;

/// How often.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Migrations that have to succeed
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// One in so many is struck by a fault; 0 for none
    #[arg(long, default_value_t = 8)]
    one_in: u64,
    /// Where the faults' kinds and moments start from
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What went well and what did not.
#[derive(Default)]
struct Tally {
    moved: u64,
    stayed: u64,
    faults: u64,
    settled: u64,
    /// Milliseconds, of those without a fault.
    took: Vec<u128>,
}

/// Does it.
pub(crate) fn run(program: &Path, arguments: &Arguments) -> Result<()> {
    let world = World::new(program, LINK)?;
    let disk = world.disk();
    world.must(End::Source, &["guest", "start", "desk", "--memory", "16M", "--disk", &disk, "--quiet"])?;
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let mut tally = Tally::default();
    let (outcome, twice) = thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&world, &over));
        let outcome = back_and_forth(&world, arguments, &mut tally);
        over.store(true, SeqCst);
        (outcome, watching.join().unwrap_or(true))
    });
    let minutes = begun.elapsed().as_secs_f64() / 60.0;
    tally.took.sort_unstable();
    let median = tally.took.get(tally.took.len() / 2).copied().unwrap_or_default();
    println!(
        "{} migrations succeeded in {minutes:.1} min (median {median} ms with its two programs, no fault), {} faults, the guest \
         stayed after {}, {} were settled by an operator",
        tally.moved, tally.faults, tally.stayed, tally.settled
    );
    let end = outcome.with_context(|| {
        format!("said: {} | {}", world.last_words(End::Source), world.last_words(End::Target))
    })?;
    ensure!(!twice, "TWO GUESTS RAN AT ONCE");
    world.must(end, &["guest", "check", "desk"])?;
    let work = world.status(end).context("it runs")?.work;
    println!("the guest has done {} operations, every page is right", work.operations);
    world.must(end, &["guest", "stop", "desk", "--quiet"])?;
    let left = world.left(Duration::from_secs(3))?;
    ensure!(left.is_empty(), "left: {}", left.join(", "));
    Ok(())
}

/// Until enough have succeeded; the end that has the guest then.
fn back_and_forth(world: &World, arguments: &Arguments, tally: &mut Tally) -> Result<End> {
    let mut dice = Dice(arguments.seed);
    let mut from = End::Source;
    while tally.moved < arguments.count {
        let fault = arguments.one_in > 0 && dice.throw(arguments.one_in) == 0;
        let begun = Instant::now();
        let mode = ["plain", "refer", "lazy"][usize::try_from(dice.throw(3))?];
        once(world, from, mode, fault.then_some(&mut dice))
            .with_context(|| format!("{mode}, after {} that succeeded", tally.moved))?;
        if fault {
            tally.faults += 1;
        } else {
            tally.took.push(begun.elapsed().as_millis());
        }
        tally.settled += u64::from(!settle(world)?.is_empty());
        until(|| ENDS.iter().filter(|end| world.status(**end).is_some()).count() == 1)
            .context("there is not one guest")?;
        let now = if world.runs(End::Source) { End::Source } else { End::Target };
        let status = world.status(now).context("no guest answers any more")?;
        ensure!(status.wrong_pages == 0, "the guest has found {} wrong pages", status.wrong_pages);
        ensure!(!status.holding && world.runs(now), "the guest does not run at the {}", name_of(now));
        ensure!(fault || now != from, "nothing went wrong, and the guest stayed");
        if now == from {
            tally.stayed += 1;
        } else {
            tally.moved += 1;
            if tally.moved.is_multiple_of(CHECK_EVERY) {
                world.must(now, &["guest", "check", "desk", "--quiet"])?;
            }
            if tally.moved.is_multiple_of(100) {
                println!("{} moved, {} stayed, {} settled", tally.moved, tally.stayed, tally.settled);
            }
        }
        from = now;
    }
    Ok(from)
}

/// One migration, with a fault where there are dice for one.
fn once(world: &World, from: End, mode: &str, fault: Option<&mut Dice>) -> Result<()> {
    world.calm()?;
    let to = across(from);
    let listen = format!("{}:0", to.address());
    let shared = ["--patience", "5s", "--redial-for", "8s"];
    let receive = ["receive", "--listen", &listen, "--wait", "20s"];
    let mut target = Ending(world.start(to, &[&receive[..], &shared].concat())?);
    let ear = &world.ears[usize::from(to == End::Target)];
    let listening = ear.until_event("listening", LIMIT).context("the target never listened")?;
    let word = |key: &str| listening[key].as_str().context("an address and a token").map(str::to_owned);
    let (address, token) = (word("address")?, word("token")?);
    let send = [
        "send",
        "--guest",
        "desk",
        "--to",
        &address,
        "--token",
        &token,
        "--mode",
        mode,
        "--max-downtime",
        "20ms",
    ];
    let mut source = Ending(world.start(from, &[&send[..], &shared].concat())?);
    if let Some(dice) = fault {
        thread::sleep(Duration::from_millis(dice.throw(WITHIN_MS)));
        strike(world, dice, &source, &target)?;
    }
    until_ended(&mut source.0)?;
    until_ended(&mut target.0)?;
    Ok(())
}

/// Something goes wrong, and passes.
fn strike(world: &World, dice: &mut Dice, source: &Ending, target: &Ending) -> Result<()> {
    // Mostly for a moment; at times for longer than the ends are patient.
    let while_ms = Duration::from_millis(if dice.throw(8) == 0 { 6500 } else { 100 + dice.throw(1400) });
    let pid = |child: &Ending| {
        i32::try_from(child.0.id()).ok().and_then(Pid::from_raw).context("a process has a number")
    };
    // It may have ended before: as good. Nobody else has that number, for it has not been waited for.
    let tell = |child: &Ending, signal| -> Result<()> {
        let _ = kill_process(pid(child)?, signal);
        Ok(())
    };
    match dice.throw(7) {
        0 => tell(source, Signal::KILL)?,
        1 => {
            tell(target, Signal::KILL)?;
            // Its end is seen by the guest a moment later.
            thread::sleep(Duration::from_millis(100));
            take_over(world)?;
        }
        2 => {
            world.cut(End::Source, true)?;
            world.cut(End::Target, true)?;
            thread::sleep(while_ms);
            world.cut(End::Source, false)?;
            world.cut(End::Target, false)?;
        }
        side @ (3 | 4) => {
            let child = if side == 3 { source } else { target };
            tell(child, Signal::STOP)?;
            thread::sleep(while_ms);
            tell(child, Signal::CONT)?;
        }
        5 => {
            world.weather.becomes(Trouble::Errors);
            thread::sleep(while_ms);
        }
        6 => {
            world.weather.becomes(Trouble::Torn { processes: vec![source.0.id(), target.0.id()] });
            thread::sleep(while_ms);
        }
        other => bail!("a die has no side {other}"),
    }
    world.weather.becomes(Trouble::None);
    Ok(())
}
