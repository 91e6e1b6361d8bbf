//! An engine at work on threads of its own, and its end.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mover::error::Error;
use mover::journal::{Entry, Journal};
use mover::net::HangUp;
use mover::report::{Event, Observer};
use mover::runtime::{Runtime, Threads};
use mover::source::{Cancel, Surroundings};

/// How long an engine may take to say good-bye to its peer before its connections are closed.
const GOOD_BYE: Duration = Duration::from_secs(2);
/// Events waiting to be looked at. The engine waits for room: it reports some ten a second.
pub(super) const WORDS: usize = 64;

/// A running engine.
pub(crate) struct Engine<T> {
    thread: JoinHandle<Result<T, Error>>,
    cancel: Arc<Cancel>,
    runtime: Arc<Threads>,
    connections: Vec<Arc<dyn HangUp>>,
}

impl<T: Send + 'static> Engine<T> {
    /// Starts `work`, whose connections end with `connections`, and is told of a cancel by its surroundings.
    pub(super) fn start(
        connections: Vec<Arc<dyn HangUp>>,
        observer: Arc<dyn Observer>,
        work: impl FnOnce(Surroundings) -> Result<T, Error> + Send + 'static,
    ) -> io::Result<Self> {
        let (runtime, cancel) = (Arc::new(Threads::new()), Arc::new(Cancel::default()));
        let around: Arc<dyn Runtime> = Arc::<Threads>::clone(&runtime);
        let around = Surroundings { runtime: around, observer, cancel: Arc::clone(&cancel) };
        let thread = std::thread::Builder::new().name("pf-engine".to_owned()).spawn(move || work(around))?;
        Ok(Self { thread, cancel, runtime, connections })
    }
}

impl<T> Engine<T> {
    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Asks it to end.
    pub(crate) fn cancel(&self) {
        self.cancel.ask(&*self.runtime);
    }

    /// Has it end, and what it came to. Whoever serves it must have stopped, or go on elsewhere.
    pub(crate) fn stop(self) -> Result<T, Error> {
        self.cancel();
        let begun = Instant::now();
        while !self.thread.is_finished() && begun.elapsed() < GOOD_BYE {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.hang_up();
        self.end()
    }

    /// Closes its connections.
    pub(crate) fn hang_up(&self) {
        self.connections.iter().for_each(|connection| connection.hang_up());
    }

    /// Waits for its end.
    pub(crate) fn end(self) -> Result<T, Error> {
        self.thread.join().unwrap_or_else(|panic| {
            let what = panic.downcast_ref::<String>().cloned();
            let what = what.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(Error::Panicked { task: "the engine".into(), what: what.unwrap_or_default() })
        })
    }
}

/// Under a toolstack nobody but that decides who has the guest: nothing is recorded.
pub(super) struct Unrecorded;

impl Journal for Unrecorded {
    fn record(&mut self, _: Entry) -> Result<(), Error> {
        Ok(())
    }
    fn close(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// Hands events on to the thread of the phases, as something it understands.
pub(super) struct HandedOn<W>(pub(super) SyncSender<W>, pub(super) fn(Event) -> W);

impl<W: Send> Observer for HandedOn<W> {
    fn event(&self, event: Event) {
        // Whoever does not listen any more has given up.
        let _ = self.0.send((self.1)(event));
    }
}

/// What has been said and not looked at.
pub(super) fn drain<W>(words: &Receiver<W>) -> Vec<W> {
    words.try_iter().collect()
}
