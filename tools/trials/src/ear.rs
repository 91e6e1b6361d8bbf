//! Who listens to one end's events, and holds it where it is wanted.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::weather::Weather;

type Wanted = Box<dyn FnMut(&Value) -> bool + Send>;

/// Hears an end's events, a JSON object a line.
#[derive(Default)]
pub(crate) struct Ear {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Default)]
struct Heard {
    partial: Vec<u8>,
    lines: Vec<Value>,
    wanted: Option<Wanted>,
    held: Option<Value>,
    /// Once the event of this phase is heard, reads of that process wait.
    reads_wait: Option<(&'static str, u32)>,
}

impl Ear {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything, for the next migration.
    pub(crate) fn clear(&self) {
        *self.heard() = Heard::default();
        self.changed.notify_all();
    }

    /// The first event that `wanted` says yes to is held.
    pub(crate) fn hold_at(&self, wanted: impl FnMut(&Value) -> bool + Send + 'static) {
        self.heard().wanted = Some(Box::new(wanted));
    }

    /// Lets reads of `process` wait from the event of `phase` on.
    pub(crate) fn let_reads_wait(&self, phase: &'static str, process: u32) {
        self.heard().reads_wait = Some((phase, process));
    }

    /// Takes what was written; returns when the writer may go on.
    pub(crate) fn hear(&self, bytes: &[u8], weather: &Weather) {
        let mut heard = self.heard();
        heard.partial.extend_from_slice(bytes);
        while let Some(end) = heard.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.partial.drain(..=end).collect();
            let Ok(event) = serde_json::from_slice::<Value>(&line) else { continue };
            if let Some((phase, process)) = heard.reads_wait
                && event["phase"] == phase
            {
                weather.keep_waiting(Some(process));
            }
            heard.lines.push(event.clone());
            if heard.wanted.as_mut().is_some_and(|wanted| wanted(&event)) {
                heard.wanted = None;
                heard.held = Some(event);
            }
            self.changed.notify_all();
            while heard.held.is_some() {
                heard = self.changed.wait(heard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Waits until an event is held, so long at most.
    pub(crate) fn until_held(&self, limit: Duration) -> Option<Value> {
        self.until(limit, |heard| heard.held.clone())
    }

    /// Waits for the first line with that event.
    pub(crate) fn until_event(&self, event: &str, limit: Duration) -> Option<Value> {
        self.until(limit, |heard| heard.lines.iter().find(|line| line["event"] == event).cloned())
    }

    fn until<T>(&self, limit: Duration, there: impl Fn(&Heard) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut heard = self.heard();
        loop {
            if let Some(found) = there(&heard) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the writer that is held go on, and holds nobody any more.
    pub(crate) fn release(&self) {
        let mut heard = self.heard();
        heard.held = None;
        heard.wanted = None;
        drop(heard);
        self.changed.notify_all();
    }

    /// All it has heard.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.heard().lines.clone()
    }
}
