//! The vCPU threads and the gate they stop at.
//!
//! A vCPU holds its own state's lock for a turn, never while it waits. `stop` returns when all wait at the gate:
//! then no operation is under way, no disk I/O in flight, no page busy.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::program::{Clock, Inside};

/// How long vCPUs may take to stop: longer than any disk operation should.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Gate {
    open: bool,
    ended: bool,
    waiting: usize,
}

/// Stops and starts the vCPUs.
#[derive(Debug, Default)]
pub(crate) struct RunGate {
    gate: Mutex<Gate>,
    changed: Condvar,
    arrived: Condvar,
    /// Set while the gate is not open: seen between operations without the lock.
    halt: AtomicBool,
}

impl RunGate {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `deadline`, and as long as the gate is closed. `None`: the guest ends; else whether it was closed.
    fn pass(&self, deadline: Instant) -> Option<bool> {
        let mut gate = self.lock();
        let mut stopped = false;
        loop {
            if gate.ended {
                return None;
            }
            if !gate.open {
                gate.waiting += 1;
                self.arrived.notify_all();
                while !gate.open && !gate.ended {
                    gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
                }
                gate.waiting -= 1;
                stopped = true;
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || stopped {
                return Some(stopped);
            }
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the vCPUs run.
    pub(crate) fn start(&self) {
        self.halt.store(false, Ordering::SeqCst);
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Stops `vcpus` vCPUs; they run on if they can't be stopped.
    pub(crate) fn stop(&self, vcpus: usize) -> Result<(), String> {
        self.halt.store(true, Ordering::SeqCst);
        let mut gate = self.lock();
        gate.open = false;
        self.changed.notify_all();
        let begun = Instant::now();
        while gate.waiting < vcpus {
            let left = STOP_PATIENCE.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let busy = vcpus - gate.waiting;
                drop(gate);
                self.start();
                return Err(format!(
                    "{busy} of the guest's {vcpus} vCPUs have not stopped within {} s. Is its disk stuck? It runs on",
                    STOP_PATIENCE.as_secs()
                ));
            }
            gate = self.arrived.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Stops the vCPUs at their next chance, without waiting for it.
    pub(crate) fn halt(&self) {
        self.halt.store(true, Ordering::SeqCst);
        self.lock().open = false;
    }

    /// Ends the vCPUs' threads at their next chance.
    pub(crate) fn end(&self) {
        self.halt.store(true, Ordering::SeqCst);
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

/// Starts the vCPUs' threads, which wait at the gate.
pub(crate) fn spawn(inside: &Arc<Inside>, gate: &Arc<RunGate>) -> std::io::Result<()> {
    for number in 0..inside.vcpus().len() {
        let (inside, gate) = (Arc::clone(inside), Arc::clone(gate));
        let thread = std::thread::Builder::new().name(format!("vcpu-{number}"));
        thread.spawn(move || run(&inside, &gate, number))?;
    }
    Ok(())
}

fn run(inside: &Inside, gate: &RunGate, number: usize) {
    let mut due = Instant::now();
    let mut clock = Clock::new(due);
    while let Some(stopped) = gate.pass(due) {
        if stopped {
            clock.skip_to(Instant::now());
        }
        let mut vcpu = inside.vcpu(number);
        due = inside.turn(&mut vcpu, &mut clock, &gate.halt);
    }
}
