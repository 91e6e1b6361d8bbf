//! The real runtime: tasks are threads, a [`Bell`] is a futex, time is the kernel's monotonic clock.
//!
//! Invariant of the bell: a waiter counts itself before it looks at the rings for the last time, a ringer counts its
//! ring before it looks for waiters, all sequentially consistent. So one of the two sees the other, and a ring is
//! never lost; where nobody waits, ringing is two atomic operations and no system call.

#![forbid(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use core_affinity::CoreId;
use rustix::thread::CpuSet;
use rustix::time::{ClockId, Timespec, clock_gettime};

use super::{Bell, Body, Fallen, Moment, Placement, Runtime, Task};
use crate::kernel::futex;
use crate::sync::Ordering;

/// The runtime of a real process.
pub struct Threads {
    /// Cores this process may use, as found when this was made.
    cores: Vec<CoreId>,
    /// The same for tasks that may run anywhere: a thread inherits the pin of the one that starts it.
    everywhere: Option<CpuSet>,
    fallen: Arc<OnceLock<Fallen>>,
}

impl Threads {
    /// Looks which cores the calling thread may use; make it before any thread is pinned.
    #[must_use]
    pub fn new() -> Self {
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let everywhere = rustix::thread::sched_getaffinity(None).ok();
        if cores.is_empty() || everywhere.is_none() {
            tracing::warn!("the kernel does not tell which cores may be used; threads run unpinned");
        }
        Self { cores, everywhere, fallen: Arc::default() }
    }

    /// Cores this process may use, at least 1.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.cores.len().max(1)
    }
}

impl Default for Threads {
    fn default() -> Self {
        Self::new()
    }
}

impl Runtime for Threads {
    fn now(&self) -> Moment {
        Moment(nanoseconds(clock_gettime(ClockId::Monotonic)))
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    fn wait(&self, bell: &Bell, heard: u32, timeout: Duration) {
        wait_in_steps(bell, heard, timeout, || ());
    }

    fn ring(&self, bell: &Bell) {
        ring_in_steps(bell, || ());
    }

    fn spawn(&self, name: &str, placement: Placement, body: Body) -> Box<dyn Task> {
        let core = match placement {
            Placement::Core(wish) if !self.cores.is_empty() => Some(self.cores[wish % self.cores.len()]),
            Placement::Core(_) | Placement::Any => None,
        };
        let everywhere = self.everywhere;
        let (task, fallen) = (name.to_owned(), Arc::clone(&self.fallen));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            place(core, everywhere.as_ref());
            if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
                fallen.get_or_init(|| Fallen { task, what: message_of(&*panic) });
                resume_unwind(panic);
            }
        });
        match thread {
            Ok(handle) => Box::new(Thread { handle }),
            Err(error) => {
                let why = format!(
                    "cannot start thread {name}: {error}. Is the limit on processes (ulimit -u) or memory used up?"
                );
                self.fallen.get_or_init(|| Fallen { task: name.to_owned(), what: why.clone() });
                Box::new(NeverStarted { why })
            }
        }
    }

    fn fallen(&self) -> Option<&Fallen> {
        self.fallen.get()
    }

    fn interleave(&self) {}

    fn random(&self, out: &mut [u8]) {
        getrandom::fill(out)
            .expect("getrandom(2) can't fail once the kernel has booted (Linux 3.17 and later)");
    }

    fn cpu_time(&self) -> Duration {
        Duration::from_nanos(nanoseconds(clock_gettime(ClockId::ProcessCPUTime)))
    }
    fn task_cpu_time(&self) -> Duration {
        Duration::from_nanos(nanoseconds(clock_gettime(ClockId::ThreadCPUTime)))
    }
    fn private_memory(&self) -> u64 {
        let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return 0 };
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        (kib("RssAnon:").unwrap_or(0) + kib("HugetlbPages:").unwrap_or(0)) * 1024
    }
}

/// Waits for `bell`; `between` runs between the steps, where another thread could come in.
fn wait_in_steps(bell: &Bell, heard: u32, timeout: Duration, between: impl Fn()) {
    if bell.heard() != heard {
        return;
    }
    between();
    bell.waiters.fetch_add(1, Ordering::SeqCst);
    between();
    futex::sleep_until_changed(&bell.rings, heard, timeout);
    between();
    bell.waiters.fetch_sub(1, Ordering::SeqCst);
}

/// Rings `bell`; `between` runs between the steps, where another thread could come in.
fn ring_in_steps(bell: &Bell, between: impl Fn()) {
    bell.rings.fetch_add(1, Ordering::SeqCst);
    between();
    if bell.waiters.load(Ordering::SeqCst) != 0 {
        futex::wake_all(&bell.rings);
    }
}

/// Pins the calling thread to `core`, or lets it run on every core of the process.
fn place(core: Option<CoreId>, everywhere: Option<&CpuSet>) {
    match core {
        Some(core) => {
            if !core_affinity::set_for_current(core) {
                tracing::warn!("thread could not be pinned to core {}; it runs anywhere", core.id);
            }
        }
        None => {
            if let Some(set) = everywhere
                && let Err(error) = rustix::thread::sched_setaffinity(None, set)
            {
                tracing::warn!("thread keeps the pin of the one that started it: {error}");
            }
        }
    }
}

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// A running thread.
struct Thread {
    handle: JoinHandle<()>,
}

impl Task for Thread {
    fn join(self: Box<Self>) -> Result<(), String> {
        self.handle.join().map_err(|panic| message_of(&*panic))
    }
}

/// A thread the kernel refused; whoever joins it hears why.
struct NeverStarted {
    why: String,
}

impl Task for NeverStarted {
    fn join(self: Box<Self>) -> Result<(), String> {
        Err(self.why)
    }
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    const LONG: Duration = Duration::from_secs(10);

    /// Spins for a time that differs from turn to turn, so that every step of a ring meets every step of a wait.
    fn dawdle(turn: u64, shift: u32) {
        for _ in 0..turn.wrapping_mul(6_364_136_223_846_793_005) >> shift {
            std::hint::spin_loop();
        }
    }

    /// Two threads hand a number to and fro; if a ring were lost, one would sleep until the timeout.
    #[test]
    fn no_ring_is_lost_between_two() {
        const TURNS: u64 = 6_000;
        let runtime = Arc::new(Threads::new());
        let state = Arc::new((AtomicU64::new(0), Bell::default(), Bell::default()));
        let slow = Arc::new(AtomicBool::new(false));
        let (there, state_there, slow_there) = (runtime.clone(), state.clone(), slow.clone());
        let await_turn =
            |runtime: &Threads, bell: &Bell, number: &AtomicU64, turn: u64, slow: &AtomicBool| {
                loop {
                    let heard = bell.heard();
                    if number.load(Ordering::SeqCst) == turn {
                        return;
                    }
                    let before = runtime.now();
                    wait_in_steps(bell, heard, LONG, || dawdle(turn * 5, 56));
                    if runtime.now().since(before) >= LONG / 2 {
                        slow.store(true, Ordering::SeqCst);
                    }
                }
            };
        let partner = runtime.spawn(
            "partner",
            Placement::Core(1),
            Box::new(move || {
                for turn in 0..TURNS {
                    await_turn(&there, &state_there.1, &state_there.0, 2 * turn + 1, &slow_there);
                    state_there.0.store(2 * turn + 2, Ordering::SeqCst);
                    ring_in_steps(&state_there.2, || dawdle(turn, 51));
                }
            }),
        );
        for turn in 0..TURNS {
            state.0.store(2 * turn + 1, Ordering::SeqCst);
            ring_in_steps(&state.1, || dawdle(turn + 7, 51));
            await_turn(&runtime, &state.2, &state.0, 2 * turn + 2, &slow);
        }
        partner.join().unwrap();
        assert!(!slow.load(Ordering::SeqCst), "a ring was lost: somebody slept until the timeout");
        assert_eq!(state.1.waiters.load(Ordering::SeqCst), 0);
    }

    /// Many ringers, many waiters, one counter: everyone sees its last value without a timeout.
    #[test]
    fn no_ring_is_lost_among_many() {
        const RINGERS: u64 = 4;
        const RINGS: u64 = 5_000;
        let runtime = Arc::new(Threads::new());
        let shared = Arc::new((AtomicU64::new(0), Bell::default()));
        let mut tasks = Vec::new();
        for waiter in 0..4 {
            let (runtime_there, shared) = (runtime.clone(), shared.clone());
            let body = move || {
                loop {
                    let heard = shared.1.heard();
                    if shared.0.load(Ordering::SeqCst) == RINGERS * RINGS {
                        return;
                    }
                    let before = runtime_there.now();
                    runtime_there.wait(&shared.1, heard, LONG);
                    assert!(runtime_there.now().since(before) < LONG / 2, "a ring was lost");
                }
            };
            tasks.push(runtime.spawn(&format!("waiter {waiter}"), Placement::Any, Box::new(body)));
        }
        for ringer in 0..RINGERS {
            let (runtime_there, shared) = (runtime.clone(), shared.clone());
            let body = move || {
                for _ in 0..RINGS {
                    shared.0.fetch_add(1, Ordering::SeqCst);
                    runtime_there.ring(&shared.1);
                }
            };
            tasks.push(runtime.spawn(&format!("ringer {ringer}"), Placement::Any, Box::new(body)));
        }
        for task in tasks {
            task.join().unwrap();
        }
    }

    #[test]
    fn waiting_ends_with_the_timeout_and_at_once_when_it_rang_before() {
        let runtime = Threads::new();
        let bell = Bell::default();
        let before = runtime.now();
        runtime.wait(&bell, bell.heard(), Duration::from_millis(5));
        assert!(runtime.now().since(before) >= Duration::from_millis(5));
        let heard = bell.heard();
        runtime.ring(&bell);
        runtime.wait(&bell, heard, Duration::MAX);
    }

    #[test]
    fn a_panic_is_seen_and_comes_back_from_join() {
        let runtime = Threads::new();
        assert_eq!(runtime.fallen(), None);
        let plain = runtime.spawn("plain", Placement::Any, Box::new(|| panic!("this and that")));
        assert_eq!(plain.join(), Err("this and that".to_owned()));
        assert_eq!(
            runtime.fallen(),
            Some(&Fallen { task: "plain".to_owned(), what: "this and that".to_owned() })
        );
        let number = 7;
        let formatted =
            runtime.spawn("formatted", Placement::Any, Box::new(move || panic!("number {number}")));
        assert_eq!(formatted.join(), Err("number 7".to_owned()));
        assert_eq!(runtime.spawn("fine", Placement::Any, Box::new(|| ())).join(), Ok(()));
    }

    /// Core n is taken modulo the cores there are, and a pin is not inherited by tasks that may run anywhere.
    #[test]
    fn pins_hold_and_are_not_inherited() {
        let runtime = Arc::new(Threads::new());
        let cores = runtime.cores();
        let all = rustix::thread::sched_getaffinity(None).unwrap().count();
        let (inner, seen) = (runtime.clone(), Arc::new(std::sync::Mutex::new(Vec::new())));
        let seen_there = seen.clone();
        let body = move || {
            seen_there.lock().unwrap().push(rustix::thread::sched_getaffinity(None).unwrap().count());
            let seen_inside = seen_there.clone();
            let free = inner.spawn(
                "free",
                Placement::Any,
                Box::new(move || {
                    seen_inside
                        .lock()
                        .unwrap()
                        .push(rustix::thread::sched_getaffinity(None).unwrap().count());
                }),
            );
            free.join().unwrap();
        };
        runtime.spawn("pinned", Placement::Core(cores + 1), Box::new(body)).join().unwrap();
        assert_eq!(*seen.lock().unwrap(), [1, all]);
    }

    #[test]
    fn a_task_is_told_its_own_work_alone() {
        let runtime = Arc::new(Threads::new());
        let there = Arc::clone(&runtime);
        let before = runtime.task_cpu_time();
        let body = move || {
            let begin = there.task_cpu_time();
            while there.task_cpu_time() < begin + Duration::from_millis(20) {
                std::hint::spin_loop();
            }
        };
        runtime.spawn("worker", Placement::Any, Box::new(body)).join().unwrap();
        let mine = runtime.task_cpu_time() - before;
        assert!(mine < Duration::from_millis(20), "the other task's work was counted: {mine:?}");
    }

    #[test]
    fn cpu_time_counts_work_and_random_bytes_differ() {
        let runtime = Threads::new();
        let before = runtime.cpu_time();
        let mut x = 1_u64;
        while runtime.cpu_time() < before + Duration::from_millis(2) {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        let (mut a, mut b) = ([0; 32], [0; 32]);
        runtime.random(&mut a);
        runtime.random(&mut b);
        assert_ne!(a, b);
    }
}
