//! A single-threaded world of coroutines with a virtual clock. At every suspension the seed picks who runs next, so
//! one seed is one interleaving, and every interleaving of the engine's trait calls has a seed.
//!
//! Everything runs on the thread that called [`Scheduler::run`]; the mutex only makes the handles `Send`. It is never
//! held across a suspension. A task that has been killed never runs again: its frames are unwound with every trait
//! call inert ([`Scheduler::alive`] says so to the implementations).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rng::{Rng, mix};
use crate::kernel::coroutine::{self, Coroutine, Step};
use crate::runtime::Body;
use crate::units::u64_of;

/// One microsecond of the virtual clock.
pub(crate) const MICRO: u64 = 1_000;
/// One millisecond.
pub(crate) const MILLI: u64 = 1_000_000;
/// One second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Steps after which a run counts as never ending.
const STEPS_MAX: u64 = 20_000_000;
/// Virtual time after which it does.
const TIME_MAX: u64 = 6 * 3600 * SECOND;
/// Events kept for the report of a failed run.
const TRACE_EVENTS: usize = 400;

/// Who a task belongs to; a group can be killed as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    /// The simulator itself: devices, faults, the director.
    World,
    /// The own tasks of the guest of that migration.
    Guest(usize),
    /// The source's engine of that migration.
    Source(usize),
    /// The target's engine of that migration.
    Target(usize),
}

/// Something tasks wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Key {
    /// A bell of the engine's, by address.
    Bell(usize),
    /// The end of a task.
    End(usize),
    /// A signal of the world's own.
    Signal(u32),
    /// Nothing but time.
    Time,
}

/// How a run went wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Failure {
    /// An invariant does not hold.
    Violation(String),
    /// A task panicked.
    Panicked(String),
    /// Nobody can go on.
    Deadlock(String),
    /// It never ends.
    Endless(String),
}

/// How the seed schedules.
#[derive(Clone, Debug)]
pub(crate) struct Tempo {
    /// An interleaving point suspends once in so many.
    pub(crate) interleave: u64,
    /// Time jumps once in so many steps.
    pub(crate) jump: u64,
    /// A task that becomes ready sleeps on for a while once in so many.
    pub(crate) freeze: u64,
    /// Longest jump or freeze, nanoseconds.
    pub(crate) pause_max: u64,
    /// A step takes up to so long, nanoseconds.
    pub(crate) step: u64,
}

impl Tempo {
    /// One of many tempers.
    pub(crate) fn drawn(rng: &mut Rng) -> Self {
        Self {
            interleave: rng.pick(&[1, 2, 4, 8]),
            jump: rng.pick(&[0, 0, 2_000, 20_000]),
            freeze: rng.pick(&[0, 100, 1_000, 10_000]),
            pause_max: rng.pick(&[100 * MICRO, 2 * MILLI, 50 * MILLI]),
            step: rng.pick(&[200, MICRO, 10 * MICRO]),
        }
    }
}

struct Wait {
    key: Key,
    what: &'static str,
    since: u64,
}

struct Task {
    name: String,
    group: Group,
    killed: bool,
    done: bool,
    panicked: Option<String>,
    /// Goes up with every wake-up, so that old timers are known.
    stamp: u64,
    wait: Option<Wait>,
    by_time: bool,
    /// Woken already, and sleeping on as on a busy machine.
    frozen: bool,
}

struct State {
    rng: Rng,
    tempo: Tempo,
    now: u64,
    steps: u64,
    steps_max: u64,
    tasks: Vec<Task>,
    fresh: VecDeque<Body>,
    doomed: Vec<usize>,
    ready: Vec<usize>,
    waiting: Vec<(Key, usize)>,
    timers: BinaryHeap<Reverse<(u64, u64, usize, u64)>>,
    timer_count: u64,
    /// The task whose end is the run's.
    root: usize,
    current: Option<usize>,
    unwinding: bool,
    failure: Option<Failure>,
    signals: u32,
    trace: Option<VecDeque<String>>,
    hash: u64,
}

/// The scheduler and its clock.
pub(crate) struct Scheduler {
    state: Mutex<State>,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub(crate) struct Ran {
    /// What went wrong, if something did.
    pub(crate) failure: Option<Failure>,
    /// Steps taken.
    pub(crate) steps: u64,
    /// Virtual time at the end, nanoseconds.
    pub(crate) time: u64,
    /// A digest of every scheduling decision: the same seed gives the same.
    pub(crate) hash: u64,
    /// The last events, if they were recorded.
    pub(crate) trace: Vec<String>,
}

impl Scheduler {
    /// A world at time 1 s (so that time zero never looks like "not set").
    pub(crate) fn new(mut rng: Rng, tempo: Tempo, traced: bool) -> Arc<Self> {
        let hash = rng.next();
        let state = State {
            rng,
            tempo,
            now: SECOND,
            steps: 0,
            steps_max: STEPS_MAX,
            tasks: Vec::new(),
            fresh: VecDeque::new(),
            doomed: Vec::new(),
            ready: Vec::new(),
            waiting: Vec::new(),
            timers: BinaryHeap::new(),
            timer_count: 0,
            root: 0,
            current: None,
            unwinding: false,
            failure: None,
            signals: 0,
            trace: traced.then(VecDeque::new),
            hash,
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic inside a task may have poisoned it; the state is consistent between calls all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `root` as a task of the world and everything it starts, until `root` has ended or something failed.
    pub(crate) fn run(&self, root: Body) -> Ran {
        let root = self.spawn(Group::World, "director", root);
        self.state().root = root;
        let mut stacks: Vec<Option<Coroutine>> = Vec::new();
        while let Some(id) = self.next(&mut stacks) {
            let stack = stacks[id].as_mut().expect("a ready task has a stack");
            match stack.resume() {
                Step::Suspended => {}
                Step::Done => self.ended(id, None),
                Step::Panicked(what) => self.ended(id, Some(what)),
            }
        }
        self.state().unwinding = true;
        stacks.clear();
        let mut state = self.state();
        let fresh = std::mem::take(&mut state.fresh);
        drop(state);
        drop(fresh);
        let mut state = self.state();
        Ran {
            failure: state.failure.clone(),
            steps: state.steps,
            time: state.now,
            hash: state.hash,
            trace: state.trace.take().map(Vec::from).unwrap_or_default(),
        }
    }

    /// Makes stacks for new tasks, unwinds killed ones and picks who runs next.
    fn next(&self, stacks: &mut Vec<Option<Coroutine>>) -> Option<usize> {
        let mut state = self.state();
        while let Some(body) = state.fresh.pop_front() {
            stacks.push(Some(Coroutine::new(body)));
        }
        while let Some(id) = state.doomed.pop() {
            state.current = Some(id);
            drop(state);
            drop(stacks[id].take());
            state = self.state();
        }
        state.current = None;
        if state.failure.is_some() || state.tasks[state.root].done {
            return None;
        }
        let id = state.pick()?;
        state.current = Some(id);
        Some(id)
    }

    fn ended(&self, id: usize, panicked: Option<String>) {
        let mut state = self.state();
        if let Some(what) = &panicked {
            let text = format!("task {} panicked: {what}", state.tasks[id].name);
            state.failure.get_or_insert(Failure::Panicked(text));
        }
        state.tasks[id].done = true;
        state.tasks[id].panicked = panicked;
        state.wake(Key::End(id));
    }

    /// Starts a task.
    pub(crate) fn spawn(&self, group: Group, name: &str, body: Body) -> usize {
        let mut state = self.state();
        let id = state.tasks.len();
        let killed = state.unwinding;
        state.tasks.push(Task {
            name: name.to_owned(),
            group,
            killed,
            done: killed,
            panicked: None,
            stamp: 0,
            wait: None,
            by_time: false,
            frozen: false,
        });
        state.fresh.push_back(body);
        if !killed {
            state.make_ready(id);
        }
        id
    }

    /// Waits until task `id` has ended; its panic's message, or that it was killed.
    pub(crate) fn join(&self, id: usize) -> Result<(), String> {
        loop {
            {
                let state = self.state();
                let task = &state.tasks[id];
                if task.done {
                    return task.panicked.clone().map_or(Ok(()), Err);
                }
            }
            if !self.alive() {
                return Err("killed".to_owned());
            }
            self.block(Key::End(id), None, "the end of a task");
        }
    }

    /// Whether the running code may act on the world. Not while a killed or panicking task is unwound: its
    /// destructors' calls must then do nothing. A killed task that runs on anyway does not come back from here.
    pub(crate) fn alive(&self) -> bool {
        if std::thread::panicking() {
            return false;
        }
        let state = self.state();
        let Some(current) = state.current else { return !state.unwinding };
        if !state.unwinding && !state.tasks[current].killed && state.failure.is_none() {
            return true;
        }
        drop(state);
        if coroutine::inside() {
            coroutine::suspend();
        }
        false
    }

    /// Suspends the running task until `key` is woken or the clock shows `until`. Whether it was woken.
    pub(crate) fn block(&self, key: Key, until: Option<u64>, what: &'static str) -> bool {
        if !self.alive() {
            return false;
        }
        let mut state = self.state();
        let id = state.current.expect("only tasks block");
        let since = state.now;
        state.tasks[id].wait = Some(Wait { key, what, since });
        if key != Key::Time {
            state.waiting.push((key, id));
        }
        if let Some(at) = until.filter(|at| *at < u64::MAX) {
            state.timer(at, id);
        }
        drop(state);
        coroutine::suspend();
        !self.state().tasks[id].by_time
    }

    /// Wakes everyone who waits for `key`.
    pub(crate) fn wake(&self, key: Key) {
        self.state().wake(key);
    }

    /// A point at which others may run first.
    pub(crate) fn interleave(&self) {
        let suspends = {
            let mut state = self.state();
            let odds = state.tempo.interleave;
            state.current.is_some() && state.rng.once_in(odds)
        };
        if suspends {
            self.step();
        }
    }

    /// Lets others run first, always.
    pub(crate) fn step(&self) {
        if !self.alive() {
            return;
        }
        let mut state = self.state();
        let id = state.current.expect("only tasks suspend");
        state.make_ready(id);
        drop(state);
        coroutine::suspend();
    }

    /// Sleeps for `nanos` of the virtual clock.
    pub(crate) fn sleep(&self, nanos: u64) {
        let until = self.now().saturating_add(nanos);
        self.block(Key::Time, Some(until), "sleep");
    }

    /// Now, in virtual nanoseconds.
    pub(crate) fn now(&self) -> u64 {
        self.state().now
    }

    /// A new signal to wait for.
    pub(crate) fn signal(&self) -> Key {
        let mut state = self.state();
        state.signals += 1;
        Key::Signal(state.signals)
    }

    /// Kills every task of `group`, as kill -9 does: none runs another step of its own. If the caller is one of
    /// them, its next call into the world does not return.
    pub(crate) fn kill(&self, group: Group) {
        let mut state = self.state();
        for id in 0..state.tasks.len() {
            let task = &mut state.tasks[id];
            if task.group == group && !task.done && !task.killed {
                task.killed = true;
                task.done = true;
                task.panicked = Some("killed".to_owned());
                state.ready.retain(|r| *r != id);
                state.waiting.retain(|(_, w)| *w != id);
                state.doomed.push(id);
                state.wake(Key::End(id));
            }
        }
    }

    /// Records that an invariant does not hold; the run ends.
    pub(crate) fn fail(&self, text: String) {
        let mut state = self.state();
        state.note(&text);
        state.failure.get_or_insert(Failure::Violation(text));
    }

    /// Records an event, if this run is traced; `text` is only made then, and may not call the scheduler.
    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        let mut state = self.state();
        if state.trace.is_some() {
            let text = text();
            state.note(&text);
        }
    }

    /// Steps taken, tasks that have not ended, and what they wait for, times included: what must not grow for ever.
    pub(crate) fn load(&self) -> (u64, usize, usize) {
        let state = self.state();
        let living = state.tasks.iter().filter(|task| !task.done).count();
        let due = |Reverse((_, _, id, stamp)): &&Reverse<(u64, u64, usize, u64)>| {
            state.tasks[*id].stamp == *stamp && !state.tasks[*id].done
        };
        (state.steps, living, state.timers.iter().filter(due).count() + state.waiting.len())
    }

    /// Lets a run take so many steps more than others: it holds many migrations.
    pub(crate) fn allow_steps(&self, steps: u64) {
        self.state().steps_max = steps;
    }

    /// The names of the tasks of `group` that have not ended.
    pub(crate) fn living(&self, group: Group) -> Vec<String> {
        let state = self.state();
        state.tasks.iter().filter(|t| t.group == group && !t.done).map(|t| t.name.clone()).collect()
    }

    /// What every task that has not ended waits for, a line each.
    pub(crate) fn waits(&self) -> String {
        self.state().waits()
    }
}

impl State {
    fn pick(&mut self) -> Option<usize> {
        self.steps += 1;
        self.now += self.rng.below(self.tempo.step) + 1;
        let (jump, pause_max) = (self.tempo.jump, self.tempo.pause_max);
        if self.rng.once_in(jump) {
            self.now += self.rng.below(pause_max);
        }
        self.expire();
        while self.ready.is_empty() {
            let Some(Reverse((at, ..))) = self.timers.peek() else {
                self.failure.get_or_insert(Failure::Deadlock(self.waits()));
                return None;
            };
            self.now = self.now.max(*at);
            self.expire();
        }
        if self.steps > self.steps_max || self.now > TIME_MAX {
            let text = format!("{} steps, {} s:\n{}", self.steps, self.now / SECOND, self.waits());
            self.failure.get_or_insert(Failure::Endless(text));
            return None;
        }
        let place = self.rng.index(self.ready.len());
        let id = self.ready.swap_remove(place);
        self.hash = mix(self.hash ^ self.now ^ (u64_of(id) << 48));
        self.tasks[id].wait = None;
        Some(id)
    }

    /// Makes everyone ready whose time has come.
    fn expire(&mut self) {
        while let Some(Reverse((at, _, id, stamp))) = self.timers.peek().copied() {
            if at > self.now {
                break;
            }
            self.timers.pop();
            if self.tasks[id].stamp != stamp || self.tasks[id].done {
                continue;
            }
            self.waiting.retain(|(_, w)| *w != id);
            self.tasks[id].by_time = !std::mem::take(&mut self.tasks[id].frozen);
            self.tasks[id].stamp += 1;
            self.ready.push(id);
        }
    }

    fn wake(&mut self, key: Key) {
        let mut at = 0;
        while at < self.waiting.len() {
            if self.waiting[at].0 == key {
                let (_, id) = self.waiting.swap_remove(at);
                self.tasks[id].by_time = false;
                self.make_ready(id);
            } else {
                at += 1;
            }
        }
    }

    /// Makes task `id` ready, now or, as a busy machine would, a while later.
    fn make_ready(&mut self, id: usize) {
        if self.tasks[id].done {
            return;
        }
        self.tasks[id].stamp += 1;
        let (freeze, pause_max) = (self.tempo.freeze, self.tempo.pause_max);
        if self.rng.once_in(freeze) {
            let at = self.now + self.rng.below(pause_max);
            self.tasks[id].frozen = true;
            self.timer(at, id);
        } else {
            self.ready.push(id);
        }
    }

    fn timer(&mut self, at: u64, id: usize) {
        self.timer_count += 1;
        self.timers.push(Reverse((at, self.timer_count, id, self.tasks[id].stamp)));
    }

    fn note(&mut self, text: &str) {
        let who = self.current.map_or("-", |id| self.tasks[id].name.as_str());
        let line = format!("{:>14.6} ms  {who}: {text}", crate::units::f64_of(self.now - SECOND) / 1e6);
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE_EVENTS {
                trace.pop_front();
            }
            trace.push_back(line);
        }
    }

    fn waits(&self) -> String {
        let mut out = String::new();
        for (id, task) in self.tasks.iter().enumerate().filter(|(_, t)| !t.done) {
            let _infallible = match &task.wait {
                Some(w) => writeln!(
                    out,
                    "  {id} {} ({:?}) waits for {} ({:?}) since {:.3} ms",
                    task.name,
                    task.group,
                    w.what,
                    w.key,
                    crate::units::f64_of(w.since - SECOND) / 1e6
                ),
                None => writeln!(out, "  {id} {} ({:?}) is running or ready", task.name, task.group),
            };
        }
        out
    }
}
