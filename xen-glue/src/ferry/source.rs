//! The engine's source, over a domain that another thread saves.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use mover::bitmap::Bitmap;
use mover::disk::image::{DiskSpec, ImageDisks, Role};
use mover::disk::observer::{Observed, Observer as Writes};
use mover::disk::{Disks, WriteLog};
use mover::error::{DiskError, Error, GuestError};
use mover::guest::{DirtyLog, GuestMemory, SourceGuest, SourceLife};
use mover::index::Keeper;
use mover::index::commands;
use mover::index::keeper::{DiskKeeper, Habits};
use mover::net::Connection;
use mover::policy::Wish;
use mover::report::{Event, Mode, Observer, Summary};
use mover::source::{self, Config, NotConverging, Parts, Surroundings};
use mover::units::{DiskId, PageCount};
use mover::wire::hello::{MigrationId, Secret};

use super::again::Returning;
use super::engine::{Engine, HandedOn, Unrecorded, WORDS};
use super::net::Ready;
use super::tally::Tally;
use super::{Plan, SILENCE_MAX};
use crate::confine;
use crate::domain::Absent;
use crate::stream::Offer;

/// What the engine asks of the thread that has the domain, the toolstack and the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    /// The pages written since the last time.
    Harvest,
    /// Stop the guest.
    Pause,
    /// All pages are there: write the rest of the stream, to its end.
    Whole,
}

/// The answer: the pages, or none where none are asked for; the sentence of what failed.
pub(crate) type Answer = Result<Bitmap, String>;

/// What that thread hears.
pub(crate) enum Word {
    /// A call, and where its answer goes.
    Asks(Call, SyncSender<Answer>),
    /// How it goes.
    Told(Event),
}

/// A running engine, and what it says.
pub(crate) struct Departure {
    /// The engine.
    pub(crate) engine: Engine<Summary>,
    /// What it says; ends with it.
    pub(crate) words: Receiver<Word>,
    /// What has gone over the lanes.
    pub(crate) tally: Arc<Tally>,
}

/// Starts moving the pages of `first`, and whatever is written from now on, over `connections`; the target comes back by
/// `returning`.
pub(crate) fn depart(
    plan: &Plan,
    wish: &Wish,
    offer: &Offer,
    (connections, returning): (Vec<Connection>, Returning),
    memory: Arc<dyn GuestMemory>,
    absent: &Arc<Absent>,
    first: Bitmap,
) -> io::Result<Departure> {
    let (say, words) = mpsc::sync_channel(WORDS);
    let tally = Tally::new(offer.lanes);
    let observer: Arc<dyn Observer> = Arc::new(HandedOn(say.clone(), Word::Told));
    let asks = Asks(say);
    let log = Log { asks: asks.clone(), first: Some(first), absent: Arc::clone(absent) };
    let work =
        Work { plan: plan.clone(), offer: offer.clone(), config: config(plan, wish), memory, log, asks };
    let hang_ups: Vec<_> = connections.iter().map(|connection| Arc::clone(&connection.hang_up)).collect();
    let counted = Arc::clone(&tally);
    // Only where pages may be outstanding is anything heard of who comes back.
    let returning = (plan.mode == Mode::Lazy).then_some(returning);
    let run = move |around| work.run(Ready::new(connections, &counted, returning), around);
    let engine = Engine::start(hang_ups, observer, run)?;
    Ok(Departure { engine, words, tally })
}

fn config(plan: &Plan, wish: &Wish) -> Config {
    Config {
        mode: plan.mode,
        lanes: plan.lanes.into(),
        max_downtime: wish.max_downtime,
        max_rounds: wish.max_rounds,
        // Pages are held back by paging them out.
        holds_ahead: true,
        not_converging: if wish.finish { NotConverging::Finish } else { NotConverging::Abort },
        patience: SILENCE_MAX,
        redial_for: if plan.mode == Mode::Lazy { plan.redial_for } else { Duration::ZERO },
        toolstack: true,
        ..Config::default()
    }
}

/// All that the engine's thread needs.
struct Work {
    plan: Plan,
    offer: Offer,
    config: Config,
    memory: Arc<dyn GuestMemory>,
    log: Log,
    asks: Asks,
}

impl Work {
    fn run(self, dialer: Ready, around: Surroundings) -> Result<Summary, Error> {
        let Self { plan, offer, config, memory, log, asks } = self;
        let specs = if config.mode.refers() { open(&plan.disks, &around) } else { Vec::new() };
        // Before anything is read of the disks: what is written from here on is known.
        let writes = observe(&specs, &around);
        let disks = ImageDisks::open_images(&specs)?;
        let (tables, notes) = commands::load(&disks, &plan.indexes)?;
        for text in notes {
            around.observer.event(Event::Notice { at_ms: 0.0, text });
        }
        if let Some(text) = confine::faces_the_network() {
            around.observer.event(Event::Notice { at_ms: 0.0, text });
        }
        let keeper = match specs.is_empty() {
            true => None,
            false => Some(DiskKeeper::new(tables.clone(), &disks, Box::new(writes), Habits::default())?),
        };
        let keeper = keeper.map(|keeper| -> Box<dyn Keeper> { Box::new(keeper) });
        let disks: Arc<dyn Disks> = Arc::new(disks);
        let guest = SourceGuest {
            memory,
            dirty: Box::new(log),
            life: Box::new(Life(asks)),
            disks,
            writes: Box::new(TakenLog),
        };
        let parts = Parts {
            guest,
            name: plan.guest,
            index: Some(Arc::new(tables)),
            keeper,
            dialer: Arc::new(dialer),
            token: Secret(offer.token),
            migration: MigrationId(offer.migration),
            journal: Box::new(Unrecorded),
        };
        source::migrate(parts, config, around)
    }
}

/// Those of `disks` that can be read here; a line for each that can't.
fn open(disks: &[DiskSpec], around: &Surroundings) -> Vec<DiskSpec> {
    let readable = |disk: &&DiskSpec| match ImageDisks::open_images(std::slice::from_ref(disk)) {
        Ok(_) => true,
        Err(error) => {
            let text = format!("disk {} is left out: {error}", disk.name);
            around.observer.event(Event::Notice { at_ms: 0.0, text });
            false
        }
    };
    disks.iter().filter(readable).cloned().collect()
}

/// Watches the writes to those of `disks` that the guest writes; a line for each that can't be watched.
fn observe(disks: &[DiskSpec], around: &Surroundings) -> Observed {
    let watch = |disk: &DiskSpec| match Writes::start(&disk.path) {
        Ok(writes) => Some(writes),
        Err(error) => {
            let text = format!(
                "disk {}: what the guest writes is not watched, and found by checks only: {error}",
                disk.name
            );
            around.observer.event(Event::Notice { at_ms: 0.0, text });
            None
        }
    };
    Observed::new(disks.iter().map(|disk| if disk.role == Role::Own { watch(disk) } else { None }).collect())
}

/// Asks the thread of the phases, and waits for its answer.
#[derive(Clone)]
struct Asks(SyncSender<Word>);

impl Asks {
    fn call(&self, call: Call) -> Result<Bitmap, GuestError> {
        let gone = || GuestError::State("the save has been given up".to_owned());
        let (answer, answered) = mpsc::sync_channel(1);
        self.0.send(Word::Asks(call, answer)).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?.map_err(GuestError::State)
    }
}

/// The log of written pages, which is on already.
struct Log {
    asks: Asks,
    /// Pages that have not travelled in-band.
    first: Option<Bitmap>,
    /// Pages that could not be had when they were looked at, and are to be looked at again.
    absent: Arc<Absent>,
}

impl DirtyLog for Log {
    fn arm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn first_round(&mut self, into: &mut Bitmap) -> Result<(), GuestError> {
        match self.first.take() {
            Some(first) => *into = first,
            None => into.set_all(),
        }
        Ok(())
    }
    fn is_cheap(&self) -> bool {
        // Each reading pauses the domain, and makes it fault on every page it writes again.
        false
    }
    fn harvest(&mut self, into: &mut Bitmap) -> Result<PageCount, GuestError> {
        let before = into.count();
        into.union(&self.asks.call(Call::Harvest)?);
        self.absent.take(into);
        Ok(PageCount(into.count() - before))
    }
    fn disarm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// The guest, as its toolstack lets us.
struct Life(Asks);

impl SourceLife for Life {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.call(Call::Pause).map(drop)
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        // The toolstack's, which hears that this has failed.
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        // In-band.
        Ok(Vec::new())
    }
    fn throttle(&mut self, _: u8) -> Result<(), GuestError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), GuestError> {
        self.0.call(Call::Whole).map(drop)
    }
    fn reclaim(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Stands where the log of disk writes was before the index's keeper took it.
struct TakenLog;

impl WriteLog for TakenLog {
    fn harvest(&mut self, _: DiskId, _: &mut Bitmap) -> Result<u64, DiskError> {
        Ok(0)
    }
}
