//! How fast the guest works and how it fares, seen from outside: its own counters, asked for regularly.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bench::onlooker::{Access, Fared};
use mover::process::client::GuestClient;
use mover::process::control::{AccessTimes, Phase};
use mover::report::Summary;
use mover::units::f64_of;

/// Its rate is that over so much time: bursts and pauses of a workload even out.
const WINDOW: Duration = Duration::from_millis(500);
/// Of its rate before, what counts as full speed.
const FULL: f64 = 0.95;

/// A look at a running guest.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    /// Operations done by then.
    operations: u64,
    /// Page accesses by then, in this process, and those to pages that were not there.
    access: Arc<AccessTimes>,
    waits: Arc<AccessTimes>,
}

/// A thread that looks at one guest; dropping it ends it.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    looks: Arc<Mutex<Vec<Look>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to look at the guest with that control socket, which need not be there yet.
    pub(super) fn start(socket: PathBuf, every: Duration) -> std::io::Result<Self> {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (their_stop, theirs) = (Arc::clone(&stop), Arc::clone(&looks));
        let body = move || watch(&socket, every, &their_stop, &theirs);
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

fn watch(socket: &Path, every: Duration, stop: &AtomicBool, looks: &Mutex<Vec<Look>>) {
    let mut client = None;
    while !stop.load(Ordering::SeqCst) {
        if client.is_none() {
            client = GuestClient::connect(socket).ok();
        }
        match client.as_ref().map(GuestClient::status) {
            Some(Ok(status)) if status.phase == Phase::Running => {
                let look = Look {
                    at: Instant::now(),
                    operations: status.work.operations,
                    access: Arc::new(status.access),
                    waits: Arc::new(status.waits),
                };
                looks.lock().unwrap_or_else(PoisonError::into_inner).push(look);
            }
            Some(Ok(_)) | None => {}
            Some(Err(_)) => client = None,
        }
        thread::sleep(every);
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
            (Some(first), Some(last)) => last.at - first.at,
            _ => Duration::ZERO,
        }
    }

    /// Operations a second over all of it; 0 if that is too little to tell.
    pub(super) fn rate(&self) -> f64 {
        match (self.looks.first(), self.looks.last()) {
            (Some(first), Some(last)) if last.at - first.at >= WINDOW => rate(first, last),
            _ => 0.0,
        }
    }

    /// From the first look at the guest running until the beginning of the first [`WINDOW`] in which it worked at
    /// full speed, `before` being its rate until then. `None` if there was none.
    pub(super) fn full_speed(&self, before: f64) -> Option<Duration> {
        let first = self.looks.first()?.at;
        let begins = self.looks.iter().enumerate().find(|(at, begin)| {
            let end = self.looks[*at..].iter().find(|look| look.at - begin.at >= WINDOW);
            end.is_some_and(|end| rate(begin, end) >= FULL * before)
        });
        begins.map(|(_, begin)| begin.at - first)
    }

    /// How long the guest has been seen running behind `moment`.
    pub(super) fn lasted_since(&self, moment: Instant) -> Duration {
        self.looks.last().map_or(Duration::ZERO, |last| last.at.saturating_duration_since(moment))
    }

    /// The first look at or behind `moment`, else the last of all.
    fn behind(&self, moment: Instant) -> Option<&Look> {
        self.looks.iter().find(|look| look.at >= moment).or(self.looks.last())
    }
}

fn rate(from: &Look, to: &Look) -> f64 {
    f64_of(to.operations.saturating_sub(from.operations)) / (to.at - from.at).as_secs_f64().max(1e-9)
}

/// A migration that two watches have seen.
pub(super) struct Witnessed<'a> {
    /// What was seen at the source, from some time before the begin.
    pub(super) source: Seen,
    /// What was seen at the target, until some time behind the end.
    pub(super) target: Seen,
    /// When it began, and when it was over.
    pub(super) span: (Instant, Instant),
    /// The engine's account.
    pub(super) summary: &'a Summary,
}

impl Witnessed<'_> {
    /// How the guest fared. `None` if it was not seen on both ends.
    pub(super) fn fared(&self, least_link_bytes: u64) -> Option<Fared> {
        let (source, target) = (&self.source, &self.target);
        let (first, begin) = (source.looks.first()?, source.behind(self.span.0)?);
        let (stop, go) = (source.looks.last()?, target.looks.first()?);
        let (end, last) = (target.behind(self.span.1)?, target.looks.last()?);
        let seconds = |from: &Look, to: &Look| (to.at - from.at).as_secs_f64() - self.summary.verify_ms / 1e3;
        let done = f64_of(end.operations.saturating_sub(begin.operations));
        Some(Fared {
            work_before: rate(first, begin),
            work_during: done / seconds(begin, end).max(1e-9),
            work_after: rate(end, last),
            access_before: Access::of(&begin.access.since(&first.access)),
            access_during: Access::of(&stop.access.since(&begin.access).plus(&end.access)),
            access_after: Access::of(&last.access.since(&end.access)),
            waits: Access::of(&end.waits),
            silent_ms: seconds(stop, go) * 1e3,
            least_link_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every 100 ms; `steps` are the operations between them.
    fn seen(steps: &[u64]) -> Seen {
        seen_from(Instant::now(), 1000, steps)
    }

    fn seen_from(begin: Instant, so_far: u64, steps: &[u64]) -> Seen {
        let mut looks = Vec::new();
        let mut operations = so_far;
        for (n, step) in (0..).zip([&[0], steps].concat()) {
            operations += step;
            let buckets = vec![operations - so_far];
            looks.push(Look {
                at: begin + Duration::from_millis(100) * n,
                operations,
                access: Arc::new(AccessTimes { buckets, total_ns: 0 }),
                waits: Arc::default(),
            });
        }
        Seen { looks }
    }

    #[test]
    fn a_guests_work_is_counted_across_both_ends() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        // 100 a second, from the migration's begin at 0.5 s 50; it stops after 1 s, goes on 200 ms later with 80, and
        // with 100 from the end at 1.7 s on.
        let source = seen_from(begin, 1000, &[10, 10, 10, 10, 10, 5, 5, 5, 5, 5]);
        let target = seen_from(at(1200), 1075, &[8, 8, 8, 8, 8, 10, 10, 10]);
        let summary = Summary { verify_ms: 100.0, ..Summary::default() };
        let span = (at(500), at(1700));
        let fared = Witnessed { source, target, span, summary: &summary }.fared(7).unwrap();
        let is = |value: f64, wanted: f64| assert!((value - wanted).abs() < 0.01, "{value}, not {wanted}");
        is(fared.work_before, 100.0);
        is(fared.work_during, (25.0 + 40.0) / 1.1);
        is(fared.work_after, 100.0);
        is(fared.silent_ms, 100.0);
        let counts =
            [fared.access_before, fared.access_during, fared.access_after].map(|access| access.count);
        assert_eq!((counts, fared.least_link_bytes), ([50, 25 + 40, 30], 7));
        let unseen = Witnessed { source: Seen::default(), target: Seen::default(), span, summary: &summary };
        assert!(unseen.fared(0).is_none());
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
