//! The migrations: thousands of seeds, and one at will.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::scheduler::Failure;
use super::world;

/// Seeds run where no number is given.
const SEEDS: u64 = 1500;
/// Seeds that found something which the first [`SEEDS`] do not: a page that was held back between a lane's mapping it and its claim,
/// and was received where the guest never saw it; a connection that fell silent while the source came in again behind the commit,
/// and was waited for until there was no time left to dial another.
const FOUND: [u64; 2] = [4775, 41_349];
/// Failing seeds after which to stop looking for more.
const ENOUGH: usize = 20;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, and must be a number")))
}

/// What many seeds came to.
#[derive(Default)]
struct Tally {
    failed: Vec<(u64, Failure)>,
    reached: BTreeMap<String, u64>,
}

fn run_all(first: u64, count: u64) -> Tally {
    let next = AtomicU64::new(first);
    let tally = Mutex::new(Tally::default());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count || tally.lock().unwrap().failed.len() >= ENOUGH {
                        break;
                    }
                    let verdict = world::run(seed, false, None);
                    let mut tally = tally.lock().unwrap();
                    for what in verdict.reached {
                        *tally.reached.entry(what).or_default() += 1;
                    }
                    tally.failed.extend(verdict.ran.failure.map(|failure| (seed, failure)));
                }
            });
        }
    });
    let mut tally = tally.into_inner().unwrap();
    tally.failed.sort_by_key(|(seed, _)| *seed);
    tally
}

/// Every seed's migration keeps every invariant; and between them they reach what is there to reach.
#[test]
fn seeds() {
    let count = number("PAGEFERRY_SEEDS").unwrap_or(SEEDS);
    let tally = run_all(number("PAGEFERRY_FIRST_SEED").unwrap_or(0), count);
    for (what, seeds) in &tally.reached {
        eprintln!("reached by {seeds:>6} seeds: {what}");
    }
    for (seed, failure) in &tally.failed {
        let text: String = format!("{failure:?}").chars().take(300).collect();
        eprintln!("seed {seed}: {text}");
    }
    if let Some((seed, _)) = tally.failed.first() {
        panic!("{} seeds failed; the first:\n{}", tally.failed.len(), world::run(*seed, true, None).report());
    }
    if count >= SEEDS {
        for what in [
            "zero pages",
            "references",
            "refetches",
            "pages held back",
            "faults",
            "checks that fail",
            "verified pages",
            "direct loads",
            "redial",
            "an operator",
            "source Moved",
            "source Kept",
            "source InDoubt",
            "source Killed",
            "source killed in Commit",
            "target killed in Commit",
            "silent cut in Commit",
            "cut with notice in Commit",
            "source killed in Drain",
            "target killed in Drain",
        ] {
            assert!(tally.reached.contains_key(what), "no seed reaches: {what}");
        }
    }
}

/// What was mended stays so.
#[test]
fn seeds_that_found_something() {
    for seed in FOUND {
        let verdict = world::run(seed, true, None);
        assert_eq!(verdict.ran.failure, None, "{}", verdict.report());
    }
}

/// The seed in `PAGEFERRY_SEED`, with its story; `PAGEFERRY_WAITS_AT`: what every task waits for at that millisecond.
#[test]
fn seed() {
    let Some(seed) = number("PAGEFERRY_SEED") else { return };
    let verdict = world::run(seed, true, number("PAGEFERRY_WAITS_AT"));
    eprintln!("{}", verdict.report());
    assert_eq!(verdict.ran.failure, None);
}

/// The same seed is the same run, the engine included.
#[test]
fn a_seed_repeats_itself() {
    for seed in 0..40 {
        let (a, b) = (world::run(seed, false, None).ran, world::run(seed, true, None).ran);
        assert_eq!((a.hash, a.steps, a.time), (b.hash, b.steps, b.time), "seed {seed}");
    }
}
