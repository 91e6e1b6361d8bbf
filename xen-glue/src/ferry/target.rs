//! The engine's target, over a domain that another thread restores.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mover::error::{Error, GuestError};
use mover::guest::{GuestMemory, TargetGuest, TargetLife};
use mover::journal::{Journal, Role};
use mover::net::Connection;
use mover::report::{Event, Observer, Phase};
use mover::target::{self, Config, Host, Parts};
use mover::wire::control::{Account, Shape};
use mover::wire::hello::{MigrationId, Secret};

use super::again::{Return, Returner};
use super::engine::{Engine, HandedOn, Unrecorded, WORDS, drain};
use super::lingering::{GRACE, Lingering};
use super::net::Quiet;
use super::tally::Tally;
use super::{SILENCE_MAX, disks};
use crate::confine;
use crate::domain::{Guarded, Lazy, PagingCost};
use crate::stream::{LanesDone, Offer};

/// A running engine, and what it says.
pub(crate) struct Arrival {
    engine: Engine<Account>,
    words: Receiver<Event>,
    go: SyncSender<()>,
    tally: Arc<Tally>,
    migration: MigrationId,
    /// What it costs to hold pages back, and who goes on if this process is killed, once pages are.
    held: Arc<OnceLock<(Arc<PagingCost>, Guarded)>>,
}

/// The source knows that the domain could run.
pub(crate) enum Started {
    /// And everything is there.
    Whole(Account),
    /// Pages are outstanding.
    Draining(Lingering),
}

impl Arrival {
    /// What it has told since this was asked the last time.
    pub(crate) fn told(&self) -> Vec<Event> {
        drain(&self.words)
    }

    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.engine.is_over()
    }

    /// What has come over the lanes.
    pub(crate) fn total(&self) -> LanesDone {
        self.tally.total()
    }

    /// The stream is whole and the domain could run: has the source told, and waits for the engine's end where all pages
    /// are there.
    pub(crate) fn go(self) -> Result<Started, Error> {
        // It may have failed meanwhile, and says so itself.
        let _ = self.go.send(());
        let mut started = None;
        loop {
            match self.words.recv_timeout(GRACE) {
                Ok(Event::Phase { phase: Phase::Drain, .. }) => started = Some(Instant::now()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.engine.end().map(Started::Whole),
            }
            if let Some((cost, guard)) = self.held.get().cloned()
                && started.is_some_and(|since: Instant| since.elapsed() >= GRACE)
            {
                let Self { engine, words, migration, .. } = self;
                let lingering = draining(engine, words, migration, cost);
                return Ok(Started::Draining(lingering.guarded(guard)));
            }
        }
    }

    /// The restore is over without a domain: ends the engine. Its own error, if it has failed by itself.
    pub(crate) fn stop(self) -> Option<Error> {
        drop((self.go, self.words));
        match self.engine.stop() {
            Err(Error::Cancelled { by: "here" }) | Ok(_) => None,
            Err(error) => Some(error),
        }
    }
}

/// An engine whose guest runs, until all of it is there.
pub(super) fn draining(
    engine: Engine<Account>,
    words: Receiver<Event>,
    migration: MigrationId,
    cost: Arc<PagingCost>,
) -> Lingering {
    let work = Box::new(move |each: &mut dyn FnMut(&Event)| {
        words.iter().for_each(|event| each(&event));
        let account = engine.end().map_err(|error| error.to_string())?;
        Ok(format!("{}; {cost}", account_words(&account)))
    });
    Lingering::new(migration, Role::Target, work)
}

fn account_words(account: &Account) -> String {
    let feedback = &account.feedback;
    format!(
        "the guest is whole: {} pages were outstanding when it restarted, {} accesses to them answered, {} pages loaded from \
         disks and checked, {} of them had to be sent",
        account.lazy, feedback.faults, feedback.checked, feedback.failed
    )
}

/// Starts receiving into `memory` over `connections`, which `lazy` can have held back. Lost while pages are outstanding they are
/// made anew, `how`.
pub(crate) fn arrive(
    offer: &Offer,
    connections: Vec<Connection>,
    how: Return,
    memory: Arc<dyn GuestMemory>,
    lazy: Lazy,
) -> io::Result<Arrival> {
    let (say, words) = mpsc::sync_channel(WORDS);
    // Of these two one is there when the other asks: neither waits.
    let (go, told_to_go) = mpsc::sync_channel(1);
    let tally = Tally::new(offer.lanes);
    let observer: Arc<dyn Observer> = Arc::new(HandedOn(say.clone(), std::convert::identity));
    let counted = Arc::clone(&tally);
    let token = Secret::of(&offer.token);
    let (held, told) = (Arc::new(OnceLock::new()), MigrationId(offer.migration));
    let holding = Arc::clone(&held);
    let hang_ups = connections.iter().map(|connection| Arc::clone(&connection.hang_up)).collect();
    let redial_for = how.redial_for;
    let returner = Returner::new(offer.clone(), how);
    let offered = offer.clone();
    let engine = Engine::start(hang_ups, observer, move |around| {
        let outstanding = Arc::default();
        let acceptor = Box::new(Quiet::new(connections, &counted, returner, &outstanding));
        let life = Life { told_to_go, stop: None, outstanding };
        let parts = Parts {
            acceptor,
            token,
            host: Box::new(move |shape| host(shape, &offered, memory, lazy, &holding, life, &say)),
            journal: Box::new(|_, _, _| {
                let journal: Box<dyn Journal> = Box::new(Unrecorded);
                Ok(journal)
            }),
        };
        let config = Config {
            wait: Some(SILENCE_MAX),
            patience: SILENCE_MAX,
            redial_for,
            toolstack: true,
            ..Config::default()
        };
        target::receive(parts, config, around)
    })?;
    Ok(Arrival { engine, words, go, tally, migration: told, held })
}

/// The guest that is there already, and its disks as far as they can be read here.
fn host(
    shape: &Shape,
    offer: &Offer,
    memory: Arc<dyn GuestMemory>,
    lazy: Lazy,
    holding: &OnceLock<(Arc<PagingCost>, Guarded)>,
    mut life: Life,
    say: &SyncSender<Event>,
) -> Result<Host, Error> {
    if shape.pages != memory.pages().0 {
        let (lanes, stream) = (shape.pages, memory.pages().0);
        let text =
            format!("the lanes are of a guest with {lanes} frames, the stream is of one with {stream}");
        return Err(GuestError::State(text).into());
    }
    let (disks, readable) = disks::open(&shape.disks)?;
    // A standby opens the disks for itself, and is started with what this thread may still do.
    let lazy = match shape.lazy {
        true => lazy().map(|held| {
            if let Some(Ok(guard)) = &held.guard {
                guard.told(offer, shape);
            }
            holding.get_or_init(|| (held.cost, held.guard));
            life.stop = Some(held.stop);
            held.hold
        }),
        false => Err("it was not asked for".to_owned()),
    };
    if let Some(text) = confine::faces_the_network() {
        let _ = say.send(Event::Notice { at_ms: 0.0, text });
    }
    for note in disks.iter().flat_map(|disks| mover::disk::Disks::notes(&**disks)) {
        let _ = say.send(Event::Notice { at_ms: 0.0, text: note });
    }
    for (disk, why) in
        shape.disks.iter().zip(&readable).filter_map(|(disk, r)| Some((disk, r.as_ref().err()?)))
    {
        let text = format!("disk {} is left out: {why}", disk.name);
        let _ = say.send(Event::Notice { at_ms: 0.0, text });
    }
    let guest = TargetGuest { memory, life: Box::new(life), lazy, gate: None };
    Ok(Host { guest, disks, readable })
}

/// The guest, whose state comes in-band and which the toolstack lets run.
struct Life {
    told_to_go: Receiver<()>,
    /// Stops the running domain.
    stop: Option<Box<dyn FnMut() -> Result<(), GuestError> + Send>>,
    /// Set when it runs and pages may be outstanding.
    outstanding: Arc<AtomicBool>,
}

impl TargetLife for Life {
    fn load_state(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    /// Waits until the rest of the stream has come and the domain has been finished.
    fn start(&mut self) -> Result<(), GuestError> {
        let failed = |_| GuestError::State("the rest of the stream did not make it whole".to_owned());
        self.told_to_go.recv().map_err(failed)?;
        self.outstanding.store(self.stop.is_some(), SeqCst);
        Ok(())
    }
    fn stop(&mut self) -> Result<(), GuestError> {
        self.stop.as_mut().map_or(Ok(()), |stop| stop())
    }
}
