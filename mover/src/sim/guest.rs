//! A simulated guest: one entity with memory on two hosts, of which at most one runs it. Its rules of life are those
//! of a guest process ([`crate::process`]); every step that would break an invariant is a violation and ends the run.
//!
//! The guest's tasks go on wherever it runs: a store that was half done at the pause is finished on the other host.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::content::{Content, difference};
use super::disk::{DiskWorld, Host, SOURCE, TARGET};
use super::rng::Rng;
use super::scheduler::{Key, Scheduler};
use crate::bitmap::Bitmap;
use crate::error::GuestError;
use crate::fingerprint::hint;
use crate::memory::{GuestPage, OwnedPages, PageBuf};
use crate::units::{PAGE_BYTES, PageCount, Pfn, u64_of, usize_of};

/// What the guest and its backend are like.
#[derive(Clone, Debug)]
pub(crate) struct GuestShape {
    /// Pages.
    pub(crate) pages: u64,
    /// Tasks that use them.
    pub(crate) tasks: u64,
    /// Longest pause between two operations of a task, nanoseconds.
    pub(crate) gap: u64,
    /// Bytes of state outside memory.
    pub(crate) state_bytes: u64,
    /// The target can hold pages back.
    pub(crate) lazy: bool,
    /// It does so while the rounds come in, page by page.
    pub(crate) ahead: bool,
    /// The target has a gate before its disks.
    pub(crate) gate: bool,
    /// Memory can be pinned.
    pub(crate) pinnable: bool,
    /// The backend knows untouched pages.
    pub(crate) knows_untouched: bool,
    /// A harvest fails once in so many.
    pub(crate) failing_harvest: u64,
}

impl GuestShape {
    /// One of many.
    pub(crate) fn drawn(rng: &mut Rng) -> Self {
        Self {
            pages: rng.range(64, 512),
            tasks: rng.range(1, 4),
            gap: rng.pick(&[20_000, 200_000, 2_000_000, 20_000_000]),
            state_bytes: rng.magnitude(1, 200_000),
            lazy: !rng.once_in(8),
            ahead: false,
            gate: rng.once_in(2),
            pinnable: rng.once_in(2),
            knows_untouched: rng.once_in(2),
            failing_harvest: if rng.once_in(16) { 20 } else { 0 },
        }
    }
}

/// The guest on the source's host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SourcePhase {
    /// It runs there.
    Running,
    /// It is stopped; it goes on when its engine is gone.
    Paused,
    /// It is given up; it stays stopped.
    Released,
    /// It is no more.
    Destroyed,
}

/// The guest on the target's host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TargetPhase {
    /// There is none, or no more.
    None,
    /// Memory is there, nothing runs.
    Incoming,
    /// The state is there too.
    Loaded,
    /// It runs there.
    Running,
    /// It was stopped since pages could not be had.
    Stopped,
}

/// An engine's hold on the guest; one at a time on each host.
#[derive(Default)]
pub(super) struct Attachment {
    pub(super) number: u64,
    pub(super) active: bool,
}

pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) shape: GuestShape,
    pub(super) source: SourcePhase,
    pub(super) target: TargetPhase,
    pub(super) attached: [Attachment; 2],
    /// What the guest last wrote, page by page.
    pub(super) expected: Vec<Content>,
    /// A task is changing the page or block.
    pub(super) busy: Vec<bool>,
    pub(super) disk_expected: Vec<Vec<Content>>,
    pub(super) disk_busy: Vec<Vec<bool>>,
    pub(super) armed: bool,
    pub(super) dirty: Bitmap,
    pub(super) touched: Bitmap,
    pub(super) throttle: u64,
    pub(super) io_in_flight: u64,
    pub(super) saved: Vec<u8>,
    pub(super) loaded: Vec<u8>,
    /// A digest of every page at the last pause.
    pub(super) snapshot: Vec<u64>,
    pub(super) held: Bitmap,
    pub(super) faults: VecDeque<Pfn>,
    pub(super) gated: Vec<Bitmap>,
    pub(super) wanted: VecDeque<(usize, u64)>,
    pub(super) operations: u64,
    pub(super) starts: u64,
}

/// The guest.
pub(crate) struct Guest {
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) disks: Arc<DiskWorld>,
    /// Its memory on either host.
    pub(super) memory: [Arc<OwnedPages>; 2],
    pub(super) state: Mutex<State>,
    /// Where it runs has changed.
    pub(super) moved: Key,
    pub(super) io_done: Key,
    pub(super) released: Key,
    pub(super) faulted: Key,
    pub(super) gate_opened: Key,
}

/// A refusal of the backend.
pub(super) fn refused(text: impl Into<String>) -> GuestError {
    GuestError::State(text.into())
}

pub(super) fn digest(page: GuestPage<'_>) -> u64 {
    let mut bytes = PageBuf::zeroed();
    page.copy_to(&mut bytes);
    hint(&bytes.0)
}

impl Guest {
    /// A running guest on the source, its memory as `pages` says, its disks as `blocks` says.
    pub(crate) fn new(
        scheduler: &Arc<Scheduler>,
        rng: Rng,
        shape: GuestShape,
        memory: [Arc<OwnedPages>; 2],
        disks: Arc<DiskWorld>,
        pages: Vec<Content>,
        blocks: Vec<Vec<Content>>,
    ) -> Arc<Self> {
        let count = pages.len();
        let mut touched = Bitmap::new(count);
        for (at, content) in pages.iter().enumerate() {
            if *content != Content::ZERO {
                memory[SOURCE].page(at).copy_from(&content.page());
                touched.set(at);
            }
        }
        let state = State {
            rng,
            shape,
            source: SourcePhase::Running,
            target: TargetPhase::None,
            attached: Default::default(),
            busy: vec![false; count],
            expected: pages,
            disk_busy: blocks.iter().map(|d| vec![false; d.len()]).collect(),
            gated: blocks.iter().map(|d| Bitmap::new(d.len())).collect(),
            disk_expected: blocks,
            armed: false,
            dirty: Bitmap::new(count),
            touched,
            throttle: 100,
            io_in_flight: 0,
            saved: Vec::new(),
            loaded: Vec::new(),
            snapshot: Vec::new(),
            held: Bitmap::new(count),
            faults: VecDeque::new(),
            wanted: VecDeque::new(),
            operations: 0,
            starts: 0,
        };
        Arc::new(Self {
            scheduler: Arc::clone(scheduler),
            disks,
            memory,
            state: Mutex::new(state),
            moved: scheduler.signal(),
            io_done: scheduler.signal(),
            released: scheduler.signal(),
            faulted: scheduler.signal(),
            gate_opened: scheduler.signal(),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it stands on the two hosts.
    pub(crate) fn phases(&self) -> (SourcePhase, TargetPhase) {
        let state = self.state();
        (state.source, state.target)
    }

    /// The host it runs on.
    pub(crate) fn runs_on(&self) -> Option<Host> {
        self.state().runs_on()
    }

    /// Pages held back from it on the target.
    pub(crate) fn held(&self) -> u64 {
        self.state().held.count()
    }

    /// Whether writes to some blocks are held back from it.
    pub(crate) fn is_gated(&self) -> bool {
        self.state().gated.iter().any(|blocks| blocks.count() > 0)
    }

    /// Operations its tasks have done.
    pub(crate) fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Whether an engine is attached on `host`.
    pub(crate) fn is_attached(&self, host: Host) -> bool {
        self.state().attached[host].active
    }

    /// Whether it is neither slowed down nor watched.
    pub(crate) fn is_at_ease(&self) -> bool {
        let state = self.state();
        state.throttle == 100 && !state.armed
    }

    /// Makes a guest on the target's host, to receive into.
    pub(crate) fn make_incoming(&self) {
        let mut state = self.state();
        assert_eq!(state.target, TargetPhase::None, "one incoming guest at a time");
        state.target = TargetPhase::Incoming;
        state.loaded.clear();
        state.held.clear_all();
        state.faults.clear();
        for at in 0..self.memory[TARGET].pages() {
            self.memory[TARGET].page(at).fill_zero();
        }
    }

    /// What an engine's end means, however it ends.
    pub(super) fn detach(&self, host: Host, number: u64) {
        {
            let mut state = self.state();
            if !state.attached[host].active || state.attached[host].number != number {
                return;
            }
            state.attached[host].active = false;
            if host == SOURCE {
                state.armed = false;
                state.throttle = 100;
            }
        }
        self.scheduler.note(|| format!("the engine of host {host} lets go of the guest"));
        let phases = self.phases();
        match (host, phases) {
            (SOURCE, (SourcePhase::Paused, _)) => self.resume_source(),
            (TARGET, (_, TargetPhase::Incoming | TargetPhase::Loaded)) => {
                let mut state = self.state();
                state.target = TargetPhase::None;
                state.held.clear_all();
                state.gated.iter_mut().for_each(Bitmap::clear_all);
                state.faults.clear();
            }
            _ => {}
        }
    }

    /// The kernel's part of a kill: whoever was attached on `host` is no more.
    pub(crate) fn engine_killed(&self, host: Host) {
        let number = self.state().attached[host].number;
        self.detach(host, number);
    }

    pub(super) fn resume_source(&self) {
        let target = {
            let mut state = self.state();
            state.source = SourcePhase::Running;
            state.throttle = 100;
            state.target
        };
        if matches!(target, TargetPhase::Running | TargetPhase::Stopped) {
            self.scheduler.fail("two guests run: the source resumed what the target had started".to_owned());
        }
        self.scheduler.note(|| "the guest runs on the source".to_owned());
        self.scheduler.wake(self.moved);
    }

    /// Starts the guest on the target, every invariant of that moment checked.
    pub(super) fn start_target(&self) {
        let broken = {
            let state = self.state();
            match state.source {
                SourcePhase::Running => {
                    Some("two guests run: the target started what the source runs".to_owned())
                }
                SourcePhase::Paused => Some("the target started what the source had not given up".to_owned()),
                SourcePhase::Released | SourcePhase::Destroyed => (state.saved != state.loaded)
                    .then(|| "the state outside memory is not what was saved".to_owned())
                    .or_else(|| self.wrong_page(&state)),
            }
        };
        if let Some(text) = broken {
            self.scheduler.fail(text);
        }
        {
            let mut state = self.state();
            state.target = TargetPhase::Running;
            state.starts += 1;
        }
        self.scheduler.note(|| "the guest runs on the target".to_owned());
        self.scheduler.wake(self.moved);
    }

    /// The first page on the target that is not held back and not what it was at the pause.
    fn wrong_page(&self, state: &State) -> Option<String> {
        (0..state.snapshot.len())
            .find(|at| {
                !state.held.get(*at)
                    && !state.busy[*at]
                    && digest(self.memory[TARGET].page(*at)) != state.snapshot[*at]
            })
            .map(|at| {
                let mut found = PageBuf::zeroed();
                self.memory[TARGET].page(at).copy_to(&mut found);
                let what = difference(&found, state.expected[at]);
                format!("{} on the target is not what it was at the pause: {what}", Pfn::at(at))
            })
            .or_else(|| {
                (0..state.snapshot.len())
                    .find(|at| {
                        !state.held.get(*at) && digest(self.memory[TARGET].page(*at)) != state.snapshot[*at]
                    })
                    .map(|at| {
                        format!("{}, half written at the pause, is not the same on the target", Pfn::at(at))
                    })
            })
    }

    /// Every page of the guest where it runs, compared with what the guest last wrote; pages held back or being
    /// written apart.
    pub(crate) fn check_all(&self) {
        let wrong = {
            let state = self.state();
            let Some(host) = state.runs_on() else { return };
            (0..state.expected.len())
                .filter(|at| !state.busy[*at] && (host == SOURCE || !state.held.get(*at)))
                .find_map(|at| self.wrong_on(&state, host, at))
        };
        if let Some(text) = wrong {
            self.scheduler.fail(text);
        }
    }

    pub(super) fn wrong_on(&self, state: &State, host: Host, at: usize) -> Option<String> {
        let mut found = PageBuf::zeroed();
        self.memory[host].page(at).copy_to(&mut found);
        let mut due = [0; PAGE_BYTES];
        state.expected[at].fill(&mut due);
        (found.0 != due).then(|| {
            let what = difference(&found, state.expected[at]);
            format!("the guest on host {host} finds {} wrong: {what}", Pfn::at(at))
        })
    }

    pub(super) fn count(&self) -> PageCount {
        PageCount(u64_of(self.memory[SOURCE].pages()))
    }

    pub(super) fn in_range(&self, pfn: Pfn) -> Result<usize, GuestError> {
        let pages = self.count().0;
        if pfn.0 < pages { Ok(usize_of(pfn.0)) } else { Err(GuestError::NoSuchPage { pfn, pages }) }
    }
}

impl State {
    pub(super) fn runs_on(&self) -> Option<Host> {
        match (self.source, self.target) {
            (SourcePhase::Running, _) => Some(SOURCE),
            (_, TargetPhase::Running) => Some(TARGET),
            _ => None,
        }
    }
}
