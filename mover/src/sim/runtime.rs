//! [`Runtime`] over the scheduler: the engine's view of simulated time and tasks. One for each end, so that what an
//! end spawns belongs to it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::rng::Rng;
use super::scheduler::{Group, Key, Scheduler};
use crate::runtime::{Bell, Body, Fallen, Moment, Placement, Runtime, Task};

/// A duration as virtual nanoseconds.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The runtime of one end.
pub(crate) struct SimRuntime {
    scheduler: Arc<Scheduler>,
    group: Group,
    secrets: Mutex<Rng>,
}

impl SimRuntime {
    /// The runtime of `group`, with its own stream of random bytes.
    pub(crate) fn new(scheduler: &Arc<Scheduler>, group: Group, secrets: Rng) -> Arc<Self> {
        Arc::new(Self { scheduler: Arc::clone(scheduler), group, secrets: Mutex::new(secrets) })
    }
}

fn key(bell: &Bell) -> Key {
    Key::Bell(std::ptr::from_ref(bell).addr())
}

struct SimTask {
    scheduler: Arc<Scheduler>,
    id: usize,
}

impl Task for SimTask {
    fn join(self: Box<Self>) -> Result<(), String> {
        self.scheduler.join(self.id)
    }
}

impl Runtime for SimRuntime {
    fn now(&self) -> Moment {
        Moment(self.scheduler.now())
    }

    fn sleep(&self, duration: Duration) {
        self.scheduler.sleep(nanos(duration));
    }

    fn wait(&self, bell: &Bell, heard: u32, timeout: Duration) {
        self.scheduler.interleave();
        if bell.heard() != heard {
            return;
        }
        let until = self.scheduler.now().saturating_add(nanos(timeout));
        self.scheduler.block(key(bell), Some(until), "a bell");
    }

    fn ring(&self, bell: &Bell) {
        if !self.scheduler.alive() {
            return;
        }
        bell.rings.fetch_add(1, Ordering::SeqCst);
        self.scheduler.wake(key(bell));
        self.scheduler.interleave();
    }

    fn spawn(&self, name: &str, _: Placement, body: Body) -> Box<dyn Task> {
        let id = self.scheduler.spawn(self.group, name, body);
        self.scheduler.interleave();
        Box::new(SimTask { scheduler: Arc::clone(&self.scheduler), id })
    }

    /// A task's panic ends a simulation as a whole.
    fn fallen(&self) -> Option<&Fallen> {
        None
    }
    fn interleave(&self) {
        self.scheduler.interleave();
    }

    fn random(&self, out: &mut [u8]) {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner).fill(out);
    }

    fn cpu_time(&self) -> Duration {
        Duration::from_nanos(self.scheduler.now() / 2)
    }

    fn task_cpu_time(&self) -> Duration {
        Duration::ZERO
    }

    fn private_memory(&self) -> u64 {
        0
    }
}
