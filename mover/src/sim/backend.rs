//! The guest traits over a simulated guest: what a source's and a target's engine get to hold.

use std::sync::Arc;
use std::time::Duration;

use super::disk::{Host, SOURCE, TARGET};
use super::guest::{Guest, SourcePhase, TargetPhase, digest, refused};
use super::runtime::nanos;
use crate::bitmap::Bitmap;
use crate::error::GuestError;
use crate::guest::{
    DirtyLog, GuestMemory, HoldBack, SourceGuest, SourceLife, TargetGuest, TargetLife, WriteGate,
};
use crate::memory::{GuestPage, PageBuf, Window};
use crate::units::{DiskId, PAGE_BYTES, PageCount, Pfn, usize_of};

/// An engine's attachment; the last of its handles to go lets the guest go.
struct Hold {
    guest: Arc<Guest>,
    host: Host,
    number: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.guest.scheduler.alive() {
            self.guest.detach(self.host, self.number);
        }
    }
}

impl Hold {
    fn check(&self) -> Result<(), GuestError> {
        let state = self.guest.state();
        let attached = &state.attached[self.host];
        if attached.active && attached.number == self.number {
            Ok(())
        } else {
            Err(refused("the guest's control connection is gone"))
        }
    }
    /// Lets others run, then says whether this engine still has the guest.
    fn enter(&self) -> Result<(), GuestError> {
        if !self.guest.scheduler.alive() {
            return Err(refused("the engine is being torn down"));
        }
        self.guest.scheduler.interleave();
        self.check()
    }
}

impl Guest {
    fn hold(self: &Arc<Self>, host: Host) -> Result<Arc<Hold>, GuestError> {
        let mut state = self.state();
        let attached = &mut state.attached[host];
        if attached.active {
            return Err(refused("another migration has this guest already"));
        }
        attached.active = true;
        attached.number += 1;
        Ok(Arc::new(Hold { guest: Arc::clone(self), host, number: attached.number }))
    }

    /// Attaches the source's engine.
    pub(crate) fn attach_source(self: &Arc<Self>) -> Result<SourceGuest, GuestError> {
        if !matches!(self.phases().0, SourcePhase::Running | SourcePhase::Released) {
            return Err(refused("the guest is neither running nor released"));
        }
        let hold = self.hold(SOURCE)?;
        Ok(SourceGuest {
            memory: Arc::new(SimMemory { hold: Arc::clone(&hold) }),
            dirty: Box::new(SimDirty { hold: Arc::clone(&hold) }),
            life: Box::new(SimSource { hold }),
            disks: self.disks.on(SOURCE),
            writes: self.disks.write_log(),
        })
    }

    /// Attaches the target's engine, to an incoming guest or to one that runs with pages held back.
    pub(crate) fn attach_target(self: &Arc<Self>) -> Result<TargetGuest, GuestError> {
        let again = self.phases().1 == TargetPhase::Running && (self.held() > 0 || self.is_gated());
        if self.phases().1 != TargetPhase::Incoming && !again {
            return Err(refused("there is no incoming guest"));
        }
        let hold = self.hold(TARGET)?;
        let (lazy, gate) = {
            let state = self.state();
            (state.shape.lazy, state.shape.gate)
        };
        Ok(TargetGuest {
            memory: Arc::new(SimMemory { hold: Arc::clone(&hold) }),
            life: Box::new(SimTarget { hold: Arc::clone(&hold) }),
            lazy: if lazy {
                Ok(Arc::new(SimHoldBack { hold: Arc::clone(&hold) }))
            } else {
                Err("this simulated host has no userfaultfd".to_owned())
            },
            gate: gate.then(|| -> Arc<dyn WriteGate> { Arc::new(SimGate { hold }) }),
        })
    }
}

struct SimMemory {
    hold: Arc<Hold>,
}

impl GuestMemory for SimMemory {
    fn pages(&self) -> PageCount {
        self.hold.guest.count()
    }

    fn pinnable(&self) -> bool {
        self.hold.guest.state().shape.pinnable
    }

    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(Window::with_capacity(capacity))
    }

    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        let guest = &self.hold.guest;
        guest.scheduler.interleave();
        for pfn in pfns {
            guest.in_range(*pfn)?;
        }
        let state = guest.state();
        let absent = |at: usize| self.hold.host == TARGET && state.shape.ahead && state.held.get(at);
        let there = |pfn: &Pfn| Some(usize_of(pfn.0)).filter(|at| !absent(*at));
        guest.memory[self.hold.host].map(pfns.iter().map(there), window);
        Ok(())
    }

    fn untouched(&self, into: &mut Bitmap) -> Result<(), GuestError> {
        self.hold.enter()?;
        let state = self.hold.guest.state();
        if state.shape.knows_untouched && self.hold.host == SOURCE {
            for at in (0..into.len()).filter(|at| !state.touched.get(*at)) {
                into.set(at);
            }
        }
        Ok(())
    }
}

struct SimDirty {
    hold: Arc<Hold>,
}

impl DirtyLog for SimDirty {
    fn arm(&mut self) -> Result<(), GuestError> {
        self.hold.enter()?;
        let mut state = self.hold.guest.state();
        state.dirty.clear_all();
        state.armed = true;
        Ok(())
    }

    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError> {
        let guest = &self.hold.guest;
        self.hold.enter()?;
        if !guest.state().armed {
            guest.scheduler.fail("a harvest of a dirty log that is not armed".to_owned());
        }
        let failing = {
            let mut state = guest.state();
            let odds = state.shape.failing_harvest;
            state.rng.once_in(odds)
        };
        let (pages, mut fresh, mut from) = (into.len(), 0, 0);
        while from < pages {
            // The kernel walks the page tables while the guest writes on.
            guest.scheduler.interleave();
            self.hold.check()?;
            let mut state = guest.state();
            let step = state.rng.range(16, 256);
            let to = pages.min(from + usize_of(step));
            for at in from..to {
                let dirty = if failing { state.dirty.get(at) } else { state.dirty.clear(at) };
                if dirty && into.set(at) {
                    fresh += 1;
                }
            }
            from = to;
            if failing && state.rng.once_in(2) {
                drop(state);
                return Err(refused("a simulated harvest failed"));
            }
        }
        if failing { Err(refused("a simulated harvest failed")) } else { Ok(PageCount(fresh)) }
    }

    fn disarm(&mut self) -> Result<(), GuestError> {
        if self.hold.enter().is_ok() {
            self.hold.guest.state().armed = false;
        }
        Ok(())
    }
}

struct SimSource {
    hold: Arc<Hold>,
}

impl SimSource {
    fn be(&self, allowed: &[SourcePhase], what: &str) -> Result<(), GuestError> {
        self.hold.enter()?;
        let phase = self.hold.guest.phases().0;
        if allowed.contains(&phase) {
            Ok(())
        } else {
            Err(refused(format!("the guest is {phase:?}, it can't be {what}")))
        }
    }
}

impl SourceLife for SimSource {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Running], "paused")?;
        let guest = &self.hold.guest;
        guest.state().source = SourcePhase::Paused;
        while guest.state().io_in_flight > 0 {
            guest.scheduler.block(guest.io_done, None, "the guest's I/O to end");
            self.hold.check()?;
        }
        let mut state = guest.state();
        let state_bytes = usize_of(state.shape.state_bytes);
        let mut saved = vec![0; state_bytes];
        state.rng.fill(&mut saved);
        state.saved = saved;
        state.snapshot =
            (0..guest.memory[SOURCE].pages()).map(|at| digest(guest.memory[SOURCE].page(at))).collect();
        drop(state);
        guest.scheduler.note(|| "the guest is paused".to_owned());
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Paused], "resumed")?;
        self.hold.guest.resume_source();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.be(&[SourcePhase::Paused, SourcePhase::Released], "saved")?;
        Ok(self.hold.guest.state().saved.clone())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Running, SourcePhase::Paused], "throttled")?;
        if !(1..=100).contains(&percent) {
            return Err(refused(format!("throttled to {percent} %")));
        }
        self.hold.guest.state().throttle = u64::from(percent);
        Ok(())
    }

    fn release(&mut self) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Paused], "released")?;
        self.hold.guest.state().source = SourcePhase::Released;
        self.hold.guest.scheduler.note(|| "the source gives the guest up".to_owned());
        Ok(())
    }

    fn reclaim(&mut self) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Released], "reclaimed")?;
        let guest = &self.hold.guest;
        if matches!(guest.phases().1, TargetPhase::Running | TargetPhase::Stopped) {
            guest.scheduler.fail("the source takes back what the target has started".to_owned());
        }
        guest.state().source = SourcePhase::Paused;
        guest.scheduler.note(|| "the source takes the guest back".to_owned());
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), GuestError> {
        self.be(&[SourcePhase::Released], "destroyed")?;
        let guest = &self.hold.guest;
        let (target, held) = (guest.phases().1, guest.held());
        if !matches!(target, TargetPhase::Running | TargetPhase::Stopped) {
            guest.scheduler.fail(format!("the source ends the guest while the target's is {target:?}"));
        }
        if held > 0 && target == TargetPhase::Running {
            guest
                .scheduler
                .fail(format!("the source ends the guest while the target still lacks {held} pages"));
        }
        guest.state().source = SourcePhase::Destroyed;
        for at in 0..guest.memory[SOURCE].pages() {
            let bytes = [0xdd; PAGE_BYTES];
            guest.memory[SOURCE].page(at).copy_from_slice(&bytes);
        }
        guest.scheduler.note(|| "the source ends the guest".to_owned());
        Ok(())
    }
}

struct SimTarget {
    hold: Arc<Hold>,
}

impl SimTarget {
    fn be(&self, allowed: TargetPhase, what: &str) -> Result<(), GuestError> {
        self.hold.enter()?;
        let phase = self.hold.guest.phases().1;
        if phase == allowed {
            Ok(())
        } else {
            Err(refused(format!("the guest is {phase:?}, it can't be {what}")))
        }
    }
}

impl TargetLife for SimTarget {
    fn load_state(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.be(TargetPhase::Incoming, "loaded")?;
        let mut state = self.hold.guest.state();
        state.loaded = bytes.to_vec();
        state.target = TargetPhase::Loaded;
        Ok(())
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.be(TargetPhase::Loaded, "started")?;
        self.hold.guest.start_target();
        self.hold.guest.scheduler.interleave();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        self.be(TargetPhase::Running, "stopped")?;
        self.hold.guest.state().target = TargetPhase::Stopped;
        self.hold.guest.scheduler.note(|| "the guest on the target is stopped".to_owned());
        Ok(())
    }
}

struct SimHoldBack {
    hold: Arc<Hold>,
}

impl SimHoldBack {
    fn take_away(&self, at: usize) -> Result<(), GuestError> {
        self.hold.enter()?;
        let guest = &self.hold.guest;
        if guest.phases().1 == TargetPhase::Running {
            guest.scheduler.fail("pages are taken away from a running guest".to_owned());
        }
        guest.state().held.set(at);
        guest.memory[TARGET].page(at).copy_from_slice(&[0xee; PAGE_BYTES]);
        Ok(())
    }
}

impl HoldBack for SimHoldBack {
    fn hold_back(&self, outstanding: &Bitmap) -> Result<(), GuestError> {
        outstanding.iter().try_for_each(|at| self.take_away(at))
    }

    fn holds_ahead(&self) -> bool {
        self.hold.guest.state().shape.ahead
    }

    fn hold_ahead(&self, pfn: Pfn) -> Result<bool, GuestError> {
        let at = self.hold.guest.in_range(pfn)?;
        self.hold.guest.scheduler.interleave();
        let refused = self.hold.guest.state().rng.once_in(8);
        if !refused {
            self.take_away(at)?;
        }
        Ok(!refused)
    }

    fn is_held(&self, pfn: Pfn) -> bool {
        self.hold.guest.state().held.get(usize_of(pfn.0))
    }

    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError> {
        self.hold.enter()?;
        let guest = &self.hold.guest;
        let at = guest.in_range(pfn)?;
        let (held, right) = {
            let state = guest.state();
            // What is newer may still come as long as the guest runs on the source.
            let early = state.shape.ahead && state.target == TargetPhase::Incoming;
            (state.held.get(at), early || state.snapshot.get(at) == Some(&digest(page)))
        };
        if !held {
            return Err(refused(format!("{pfn} is not held back")));
        }
        if !right {
            guest
                .scheduler
                .fail(format!("{pfn} is given to the guest with bytes that it did not have at the pause"));
        }
        let mut bytes = PageBuf::zeroed();
        page.copy_to(&mut bytes);
        guest.memory[TARGET].page(at).copy_from(&bytes);
        guest.state().held.clear(at);
        guest.scheduler.wake(guest.released);
        Ok(())
    }

    fn wake(&self, pfn: Pfn) -> Result<(), GuestError> {
        self.hold.enter()?;
        self.hold.guest.in_range(pfn)?;
        self.hold.guest.scheduler.wake(self.hold.guest.released);
        Ok(())
    }

    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError> {
        self.hold.enter()?;
        let guest = &self.hold.guest;
        let deadline = guest.scheduler.now().saturating_add(nanos(timeout));
        loop {
            if let Some(pfn) = guest.state().faults.pop_front() {
                return Ok(Some(pfn));
            }
            if guest.scheduler.now() >= deadline {
                return Ok(None);
            }
            guest.scheduler.block(guest.faulted, Some(deadline), "a fault");
            self.hold.check()?;
        }
    }

    fn finish(&self) -> Result<(), GuestError> {
        self.hold.enter()?;
        let guest = &self.hold.guest;
        let held = guest.held();
        if held > 0 {
            guest.scheduler.fail(format!("holding back ends with {held} pages never given to the guest"));
        }
        guest.state().gated.iter_mut().for_each(Bitmap::clear_all);
        guest.scheduler.wake(guest.gate_opened);
        Ok(())
    }
}

struct SimGate {
    hold: Arc<Hold>,
}

impl WriteGate for SimGate {
    fn hold(&self, disk: DiskId, blocks: &Bitmap) -> Result<(), GuestError> {
        self.hold.enter()?;
        let mut state = self.hold.guest.state();
        let gated = &mut state.gated[usize::from(disk.0)];
        for block in blocks.iter() {
            gated.set(block);
        }
        Ok(())
    }

    fn open(&self, disk: DiskId, block: u64) {
        if self.hold.enter().is_err() {
            return;
        }
        let guest = &self.hold.guest;
        guest.state().gated[usize::from(disk.0)].clear(usize_of(block));
        guest.scheduler.wake(guest.gate_opened);
    }

    fn wanted(&self) -> Option<(DiskId, u64)> {
        self.hold.enter().ok()?;
        let state = self.hold.guest.state();
        let waits = |(disk, block): &&(usize, u64)| state.gated[*disk].get(usize_of(*block));
        let (disk, block) = *state.wanted.iter().find(waits)?;
        Some((DiskId(u8::try_from(disk).unwrap_or(u8::MAX)), block))
    }
}
