//! The migrations: thousands of seeds, and one at will.

use std::sync::atomic::{AtomicU64, Ordering};

use super::world;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, and must be a number")))
}

/// Every seed's migration keeps every invariant.
#[test]
fn seeds() {
    let first = number("PAGEFERRY_FIRST_SEED").unwrap_or(0);
    let count = number("PAGEFERRY_SEEDS").unwrap_or(1500);
    let next = AtomicU64::new(first);
    let failed = std::sync::Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count || failed.lock().unwrap().len() >= 20 {
                        break;
                    }
                    if let Some(failure) = world::run(seed, false, None).ran.failure {
                        failed.lock().unwrap().push((seed, failure));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort_by_key(|(seed, _)| *seed);
    for (seed, failure) in &failed {
        let text: String = format!("{failure:?}").chars().take(300).collect();
        eprintln!("seed {seed}: {text}");
    }
    if let Some((seed, _)) = failed.first() {
        panic!("{} seeds failed; the first:\n{}", failed.len(), world::run(*seed, true, None).report());
    }
}

/// The seed in `PAGEFERRY_SEED`, with its story.
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
