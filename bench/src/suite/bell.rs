//! What waking another task costs: a bell rung where nobody waits, and a turn to and fro between two sleeping tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mover::runtime::{Bell, Placement, Runtime, Threads};
use mover::units::f64_of;

use super::{Context, Suite};
use crate::report::Row;
use crate::stats::Runs;

/// The suite.
pub(crate) struct Bells;

impl Suite for Bells {
    fn name(&self) -> &'static str {
        "bell"
    }

    fn about(&self) -> &'static str {
        "what ringing and waking cost"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let (mut unheard, mut wake) = (Runs::default(), Runs::default());
        for _ in 0..context.runs {
            unheard.push(ring_unheard());
            wake.push(wake_latency(if context.quick { 2_000 } else { 20_000 })?);
        }
        Ok(vec![
            Row::new("nobody waits", "one ring", "ns", unheard.figure()),
            Row::new("two tasks on two cores", "from ring to running", "µs", wake.figure()),
        ])
    }
}

/// Nanoseconds of a ring that wakes nobody.
fn ring_unheard() -> f64 {
    const RINGS: u32 = 1_000_000;
    let (runtime, bell) = (Threads::new(), Bell::default());
    let began = Instant::now();
    (0..RINGS).for_each(|_| runtime.ring(&bell));
    began.elapsed().as_secs_f64() * 1e9 / f64::from(RINGS)
}

/// Two tasks in turns.
#[derive(Default)]
struct Turns {
    number: AtomicU64,
    odd: Bell,
    even: Bell,
}

/// Waits for number `turn`.
fn wait_for(runtime: &Threads, turns: &Turns, bell: &Bell, turn: u64) {
    loop {
        let heard = bell.heard();
        if turns.number.load(Ordering::SeqCst) >= turn {
            return;
        }
        runtime.wait(bell, heard, Duration::from_secs(10));
    }
}

/// Microseconds from a ring until the sleeper runs: half of a turn to and fro.
fn wake_latency(count: u64) -> Result<f64> {
    let runtime = Arc::new(Threads::new());
    let turns = Arc::new(Turns::default());
    let (runtime_there, turns_there) = (runtime.clone(), turns.clone());
    let partner = runtime.spawn(
        "partner",
        Placement::Core(1),
        Box::new(move || {
            for turn in 0..count {
                wait_for(&runtime_there, &turns_there, &turns_there.odd, 2 * turn + 1);
                turns_there.number.store(2 * turn + 2, Ordering::SeqCst);
                runtime_there.ring(&turns_there.even);
            }
        }),
    );
    let (runtime_here, turns_here) = (runtime.clone(), turns.clone());
    let began = Instant::now();
    let caller = runtime.spawn(
        "caller",
        Placement::Core(0),
        Box::new(move || {
            for turn in 0..count {
                turns_here.number.store(2 * turn + 1, Ordering::SeqCst);
                runtime_here.ring(&turns_here.odd);
                wait_for(&runtime_here, &turns_here, &turns_here.even, 2 * turn + 2);
            }
        }),
    );
    for task in [caller, partner] {
        if let Err(panic) = task.join() {
            bail!("a task panicked: {panic}");
        }
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64_of(2 * count))
}
