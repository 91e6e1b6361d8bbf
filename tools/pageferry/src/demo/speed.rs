//! How fast the guest works, seen from outside: its own counters, asked for regularly.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mover::process::client::GuestClient;
use mover::process::control::Phase;
use mover::units::f64_of;

use crate::results::WATCHED_EVERY_MS;

/// Its rate is that over so much time: bursts and pauses of a workload even out.
const WINDOW: Duration = Duration::from_millis(500);
/// Of its rate before, what counts as full speed.
const FULL: f64 = 0.95;

/// A look at a running guest: when, and the operations it had done by then.
type Look = (Instant, u64);

/// A thread that looks at one guest; dropping it ends it.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    looks: Arc<Mutex<Vec<Look>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to look at the guest with that control socket, which need not be there yet.
    pub(super) fn start(socket: PathBuf) -> std::io::Result<Self> {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (their_stop, theirs) = (Arc::clone(&stop), Arc::clone(&looks));
        let body = move || watch(&socket, &their_stop, &theirs);
        let thread = thread::Builder::new().name("watch".to_owned()).spawn(body)?;
        Ok(Self { stop, looks, thread: Some(thread) })
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        Seen { looks: self.looks.lock().unwrap_or_else(PoisonError::into_inner).clone() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic in it has printed itself.
            let _ = thread.join();
        }
    }
}

fn watch(socket: &Path, stop: &AtomicBool, looks: &Mutex<Vec<Look>>) {
    let mut client = None;
    while !stop.load(Ordering::SeqCst) {
        if client.is_none() {
            client = GuestClient::connect(socket).ok();
        }
        match client.as_ref().map(GuestClient::status) {
            Some(Ok(status)) if status.phase == Phase::Running => {
                let look = (Instant::now(), status.work.operations);
                looks.lock().unwrap_or_else(PoisonError::into_inner).push(look);
            }
            Some(Ok(_)) | None => {}
            Some(Err(_)) => client = None,
        }
        thread::sleep(Duration::from_secs_f64(WATCHED_EVERY_MS / 1e3));
    }
}

/// What a watch has seen while the guest ran.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    looks: Vec<Look>,
}

impl Seen {
    /// How long the guest has been seen running.
    pub(super) fn lasted(&self) -> Duration {
        match (self.looks.first(), self.looks.last()) {
            (Some(first), Some(last)) => last.0 - first.0,
            _ => Duration::ZERO,
        }
    }

    /// Operations a second over all of it; 0 if that is too little to tell.
    pub(super) fn rate(&self) -> f64 {
        match (self.looks.first(), self.looks.last()) {
            (Some(first), Some(last)) if last.0 - first.0 >= WINDOW => rate(*first, *last),
            _ => 0.0,
        }
    }

    /// From the first look at the guest running until the beginning of the first [`WINDOW`] in which it worked at
    /// full speed, `before` being its rate until then. `None` if there was none.
    pub(super) fn full_speed(&self, before: f64) -> Option<Duration> {
        let first = self.looks.first()?.0;
        let begins = self.looks.iter().enumerate().find(|(at, begin)| {
            let end = self.looks[*at..].iter().find(|look| look.0 - begin.0 >= WINDOW);
            end.is_some_and(|end| rate(**begin, *end) >= FULL * before)
        });
        begins.map(|(_, begin)| begin.0 - first)
    }
}

fn rate(from: Look, to: Look) -> f64 {
    f64_of(to.1.saturating_sub(from.1)) / (to.0 - from.0).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every 100 ms; `steps` are the operations between them.
    fn seen(steps: &[u64]) -> Seen {
        let begin = Instant::now();
        let mut looks = vec![(begin, 1000)];
        for (n, step) in (1..).zip(steps) {
            let last = looks.last().map_or(0, |look| look.1);
            looks.push((begin + Duration::from_millis(100) * n, last + step));
        }
        Seen { looks }
    }

    #[test]
    fn full_speed_is_the_first_window_at_the_old_rate() {
        let steady = seen(&[10; 20]);
        assert!((steady.rate() - 100.0).abs() < 0.01);
        assert_eq!(steady.full_speed(100.0), Some(Duration::ZERO));
        let slow_start = [[0; 4].as_slice(), &[5; 3], &[10; 10]].concat();
        assert_eq!(seen(&slow_start).full_speed(100.0), Some(Duration::from_millis(700)));
        assert_eq!(seen(&[5; 20]).full_speed(100.0), None);
        assert_eq!(seen(&[10; 3]).full_speed(100.0), None, "too short to tell");
        assert_eq!(Seen::default().full_speed(100.0), None);
    }
}
