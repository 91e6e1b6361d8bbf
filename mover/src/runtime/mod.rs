//! Time, threads, waiting and randomness, behind one trait, so that the same engine code runs a thread a stage,
//! folded onto two cores, or as coroutines of one thread under `sim` with a seed.
//!
//! Rule for all engine code: block only through this trait or through the I/O traits, and hold no lock over such a
//! call. Then every interleaving is one the simulator can choose.

mod threads;

use std::time::Duration;

pub use threads::Threads;

use crate::sync::{AtomicU32, Ordering};

/// Nanoseconds since some fixed point in this process's (or simulation's) past. Never goes back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Moment(pub u64);

impl Moment {
    /// Time from `earlier` to this, zero if it is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
    /// This moment and `d` more.
    #[must_use]
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// An event counter to wait on: whoever changes something others wait for rings it afterwards; whoever waits reads
/// the count, looks, and waits for the count to change. No ring is lost, and ringing takes no lock.
#[derive(Debug, Default)]
pub struct Bell {
    /// Rings so far; wraps.
    pub rings: AtomicU32,
    /// Tasks waiting right now; lets a ring skip the system call where nobody does.
    pub waiters: AtomicU32,
}

impl Bell {
    /// The count to hand to [`Runtime::wait`], read before looking at what the bell announces.
    #[must_use]
    pub fn heard(&self) -> u32 {
        self.rings.load(Ordering::SeqCst)
    }
}

/// Where a task would best run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Anywhere.
    Any,
    /// Pinned to the n-th core this process may use, modulo their number.
    Core(usize),
}

/// A spawned task.
pub trait Task: Send {
    /// Waits for its end. `Err` holds the panic's message.
    fn join(self: Box<Self>) -> Result<(), String>;
}

/// A task that ended by a panic, or could not be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fallen {
    /// The task's name.
    pub task: String,
    /// What it said, or why it could not be started.
    pub what: String,
}

/// What a spawned task runs.
pub type Body = Box<dyn FnOnce() + Send + 'static>;

/// Time, threads, waiting, randomness.
pub trait Runtime: Send + Sync {
    /// Now.
    fn now(&self) -> Moment;
    /// Sleeps.
    fn sleep(&self, duration: Duration);
    /// Waits until `bell` has rung since it stood at `heard`, or until `timeout` has passed.
    fn wait(&self, bell: &Bell, heard: u32, timeout: Duration);
    /// Rings `bell` and wakes everyone who waits on it.
    fn ring(&self, bell: &Bell);
    /// Starts a task.
    fn spawn(&self, name: &str, placement: Placement, body: Body) -> Box<dyn Task>;
    /// The first of its tasks that fell, if one has. Nobody else tells of it before it is joined, and whoever waits for
    /// its work would wait for ever: control tasks look whenever they wake.
    fn fallen(&self) -> Option<&Fallen>;
    /// A point at which others may run first. Costs nothing with threads; under the simulator, a choice.
    fn interleave(&self);
    /// Fills `out` with bytes nobody can guess (under the simulator: from the seed).
    fn random(&self, out: &mut [u8]);
    /// CPU time this process has used so far.
    fn cpu_time(&self) -> Duration;
    /// CPU time the calling task has used so far; 0 where tasks take none.
    fn task_cpu_time(&self) -> Duration;
    /// Memory of this process alone, in bytes: without mapped guests, index files and other shared memory
    /// (`RssAnon` and huge pages of its own, proc_pid_status(5)). 0 where that can't be told.
    fn private_memory(&self) -> u64;
}
