//! The fault matrix: every fault, at every moment of a migration, in every mode, on real processes.
//!
//! After each case: two guests never ran at once; exactly one runs once link and ends are back, after `pageferry resolve` where
//! only an operator can tell; it works and finds every page right; and no process, file, record or listener is left.

#![forbid(unsafe_code)]

pub(crate) mod case;
mod plan;
mod strike;

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};

use case::Outcome;
use plan::Case;

use crate::world::{World, name_of};

/// Bits a second on the cable.
const LINK: u64 = 2_000_000_000;

/// What to try.
#[derive(Args)]
pub(crate) struct Arguments {
    /// How much of the matrix
    #[arg(long, value_enum, default_value_t = Tier::Ci)]
    tier: Tier,
    /// Cases at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Only cases whose names (fault/moment/mode) contain each of these
    filter: Vec<String>,
}

/// How much of the matrix.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tier {
    /// Each fault once or twice
    Ci,
    /// All of it
    Full,
}

/// Tries the cases; an error if any of them shows what must not be.
pub(crate) fn run(program: &Path, arguments: &Arguments) -> Result<()> {
    let full = arguments.tier == Tier::Full || !arguments.filter.is_empty();
    let cases = plan::cases(full, &arguments.filter);
    ensure!(!cases.is_empty(), "no case has these words in its name");
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: the fault matrix takes root, for network namespaces and a file system of its own");
        return Ok(());
    }
    let begun = Instant::now();
    println!(
        "{:<14} {:<9} {:<6} {:>6} {:>6}  {:<7} {:>5}  what an operator did",
        "fault", "moment", "mode", "source", "target", "runs at", "s"
    );
    let queue = Mutex::new(cases.iter().copied());
    let bad = Mutex::new(Vec::new());
    let worked: Result<Vec<()>> = thread::scope(|scope| {
        let hands: Vec<_> =
            (0..arguments.jobs.max(1)).map(|_| scope.spawn(|| work(program, &queue, &bad))).collect();
        hands.into_iter().map(|hand| hand.join().unwrap_or_else(|_| bail!("a worker fell"))).collect()
    });
    worked?;
    let bad = bad.into_inner().unwrap_or_else(PoisonError::into_inner);
    let took = begun.elapsed().as_secs_f64();
    println!("{} cases in {took:.0} s, {} with a violation", cases.len(), bad.len());
    ensure!(bad.is_empty(), "violations in: {}", bad.join(", "));
    Ok(())
}

fn work(program: &Path, queue: &Mutex<impl Iterator<Item = Case>>, bad: &Mutex<Vec<String>>) -> Result<()> {
    let world = World::new(program, LINK)?;
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some(case) = next else { return Ok(()) };
        let outcome = case::run(&world, case);
        show(&outcome);
        if !outcome.violations.is_empty() {
            bad.lock().unwrap_or_else(PoisonError::into_inner).push(case.to_string());
        }
    }
}

fn show(outcome: &Outcome) {
    let Outcome { case, ended: [source, target], runs, settled, violations, seconds, .. } = outcome;
    let runs = runs.map_or("nobody", name_of);
    let settled = settled.join(", ");
    let mut line = format!(
        "{:<14} {:<9} {:<6} {source:>6} {target:>6}  {runs:<7} {seconds:>5.1}  {settled}",
        case.fault,
        case.moment,
        case.mode.name()
    );
    for violation in violations {
        line.push_str(&format!("\n  VIOLATION: {violation}"));
    }
    println!("{line}");
}
