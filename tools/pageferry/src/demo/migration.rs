//! One migration of a demonstration: a `receive` and a `send` process, what they tell, and how the guest fared.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use mover::ExitClass;
use mover::disk::image::ImageDisks;
use mover::index::commands;
use mover::process::backend::attach_source;
use mover::process::client::GuestClient;
use mover::report::{Event, Mode, Phase, Summary};
use mover::units::PAGE_BYTES_U64;
use zeroize::Zeroizing;

use super::child::{End, Heard, Process};
use super::progress::{Migration, Progress};
use super::speed::{Watch, Witnessed};
use super::stage::Stage;
use crate::cli::DemoArgs;
use crate::failure::{Failure, OrFail, Outcome};
use crate::index;
use crate::migrate::send;
use crate::plan::look;
use crate::results::{Figures, Run};
use crate::told::{Line, Told};

/// How long the guest's rate is taken before a migration.
const BEFORE: Duration = Duration::from_millis(1500);
/// How long it is watched for full speed after one.
const AFTER: Duration = Duration::from_secs(5);
/// How often a wait looks at what else there is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a target may take until it listens.
const LISTENS_WITHIN: Duration = Duration::from_secs(30);

/// What all migrations of a demonstration share.
pub(super) struct Scene<'a> {
    pub(super) stage: &'a Stage,
    pub(super) args: &'a DemoArgs,
    pub(super) ending: &'a AtomicBool,
    pub(super) progress: &'a Progress,
    pub(super) loud: bool,
}

impl Scene<'_> {
    /// An error once the user has asked for the end.
    pub(super) fn go_on(&self) -> Outcome {
        if self.ending.load(Ordering::SeqCst) {
            return Err(Failure::new(
                ExitClass::Cancelled,
                "cancelled; everything this demo started is gone",
            ));
        }
        Ok(())
    }

    /// Waits until `done`, or `limit` has passed; whether it was done.
    pub(super) fn wait(&self, limit: Duration, mut done: impl FnMut() -> bool) -> Outcome<bool> {
        let deadline = Instant::now() + limit;
        while !done() {
            self.go_on()?;
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(true)
    }

    /// Moves guest `from` to guest `to`.
    pub(super) fn migrate(&self, mode: Mode, from: &str, to: &str) -> Outcome<Run> {
        let named = |failure: Failure| {
            let message = match failure.class {
                ExitClass::Cancelled => failure.message,
                _ => format!("in mode {}: {}", mode.name(), failure.message),
            };
            Failure { message, ..failure }
        };
        if mode.refers() {
            self.progress.waiting(&format!("{}: bringing the disk's index up to date", mode.name()));
            index::bring_up_to_date(&self.stage.image(), &self.stage.index_dir(), self.ending)?;
            self.go_on()?;
        }
        let least = if self.args.closely { self.least_link_bytes(from)? } else { 0 };
        self.progress.waiting(&format!("{}: taking the guest's speed", mode.name()));
        let watch = self.watch(from)?;
        self.wait(BEFORE * 4, || watch.seen().lasted() >= BEFORE)?;
        let before = watch.seen().rate();
        // Who looks closely looks on.
        let there = self.args.closely.then_some(watch);

        let (heard, ear) = channel();
        let target = Process::start(self.receive(to)?, End::Target, heard.clone(), self.loud)?;
        let mut told = Tale::new(self.progress.begin(mode));
        let (address, token) = match self.listening(&ear) {
            Ok(listening) => listening,
            Err(failure) => return Err(named(target.finish()?.unwrap_or(failure))),
        };
        let watch = self.watch(to)?;
        let source = Process::start(self.send(mode, from, &address, &token)?, End::Source, heard, self.loud)?;
        let ended = self.follow(&ear, &source, &mut told).and_then(|()| finish(source, target));
        ended.map_err(named)?;
        let summary = told.summary.take().ok_or_else(|| {
            named(Failure::new(
                ExitClass::Internal,
                "the source ended well but told no figures; please report it",
            ))
        })?;
        self.progress.waiting(&format!("{}: waiting for the guest's full speed", mode.name()));
        self.wait(AFTER, || {
            let seen = watch.seen();
            seen.full_speed(before).is_some() || seen.lasted() >= AFTER
        })?;
        let full_speed_ms = watch.seen().full_speed(before).map(|time| time.as_secs_f64() * 1e3);
        let mut fared = None;
        if let (Some(there), Some(began), Some(ended)) = (there, told.began, told.ended) {
            self.wait(AFTER, || watch.seen().lasted_since(ended) >= BEFORE)?;
            let (source, target) = (there.seen(), watch.seen());
            fared = Witnessed { source, target, span: (began, ended), summary: &summary }.fared(least);
        }
        let result = Figures { summary: *summary, full_speed_ms, fared };
        told.progress.end(&result);
        Ok(Run { result, events: told.events, watched: true })
    }

    /// What the guest's memory holds that no disk holds, each content once.
    fn least_link_bytes(&self, guest: &str) -> Outcome<u64> {
        self.progress.waiting("looking at the guest's pages");
        index::bring_up_to_date(&self.stage.image(), &self.stage.index_dir(), self.ending)?;
        let attached = attach_source(GuestClient::connect(&self.stage.socket(guest))?, "demo")?;
        let disks = ImageDisks::open_images(&send::specs(&attached.info))?;
        let (tables, _) = commands::load(&disks, &self.stage.index_dir())?;
        let seen = look::classify(&*attached.with_disks(Arc::new(disks)).memory, &tables, self.ending)?;
        Ok(seen.unique * PAGE_BYTES_U64)
    }

    fn watch(&self, guest: &str) -> Outcome<Watch> {
        Watch::start(self.stage.socket(guest), self.args.look_every)
            .or_fail(|| "cannot start a thread".to_owned(), "Raise the limit on processes (`ulimit -u`)")
    }

    fn receive(&self, to: &str) -> Outcome<Command> {
        let mut command = self.stage.program_at(End::Target)?;
        command.args(["receive", "--json-events", "--name", to, "--listen", &self.stage.listen_address()]);
        if self.args.plaintext {
            command.arg("--plaintext");
        }
        Ok(command)
    }

    fn send(&self, mode: Mode, from: &str, address: &str, token: &str) -> Outcome<Command> {
        let mut command = self.stage.program_at(End::Source)?;
        command.args(["send", "--json-events", "--guest", from, "--to", address, "--mode", mode.name()]);
        command.args(["--lanes", &self.args.lanes.to_string()]);
        command.args(["--max-downtime", &format!("{}ms", self.args.max_downtime.as_millis())]);
        command.args(["--throttle", self.args.throttle.name()]);
        if self.args.plaintext {
            command.arg("--plaintext");
        }
        if !self.args.no_verify {
            command.arg("--verify");
        }
        // Not on the command line: that is for everybody to see.
        command.env("PAGEFERRY_TOKEN", token);
        Ok(command)
    }

    /// Waits until the target listens: its address and token.
    fn listening(&self, ear: &Receiver<Heard>) -> Outcome<(String, Zeroizing<String>)> {
        let deadline = Instant::now() + LISTENS_WITHIN;
        while Instant::now() < deadline {
            self.go_on()?;
            match ear.recv_timeout(LOOK_EVERY) {
                Ok(Heard::Line(End::Target, Line::Told(Told::Listening { address, token }))) => {
                    return Ok((address, token));
                }
                Ok(Heard::Silent(_)) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(Heard::Line(..)) | Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Err(Failure::new(ExitClass::Internal, "the target did not begin to listen; please report it"))
    }

    /// Listens to both until the source has nothing more to say.
    fn follow(&self, ear: &Receiver<Heard>, source: &Process, told: &mut Tale<'_>) -> Outcome {
        let mut interrupted = false;
        loop {
            match ear.recv_timeout(LOOK_EVERY) {
                Ok(Heard::Line(end, line)) => told.hear(end, line),
                Ok(Heard::Silent(End::Source)) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(Heard::Silent(End::Target)) | Err(RecvTimeoutError::Timeout) => {}
            }
            if !interrupted && self.ending.load(Ordering::SeqCst) {
                source.interrupt();
                interrupted = true;
            }
        }
    }
}

/// What both ends have told of a migration.
struct Tale<'a> {
    progress: Migration<'a>,
    events: Vec<Event>,
    summary: Option<Box<Summary>>,
    /// When the source's engine began, and when it was done.
    began: Option<Instant>,
    ended: Option<Instant>,
}

impl<'a> Tale<'a> {
    fn new(progress: Migration<'a>) -> Self {
        Self { progress, events: Vec::new(), summary: None, began: None, ended: None }
    }

    fn hear(&mut self, end: End, line: Line) {
        match (end, line) {
            (End::Source, Line::Event(event)) => {
                match event {
                    Event::Phase { phase: Phase::Connect, .. } => self.began = Some(Instant::now()),
                    Event::Phase { phase: Phase::Done, .. } => self.ended = Some(Instant::now()),
                    _ => {}
                }
                self.progress.event(&event);
                self.events.push(event);
            }
            (End::Source, Line::Told(Told::Ended { summary })) => self.summary = Some(summary),
            // The target sees the same migration from the other side; only what it alone knows is of interest.
            (End::Target, Line::Event(event @ Event::Notice { .. })) => self.progress.event(&event),
            (End::Target, _) | (End::Source, Line::Told(Told::Listening { .. })) => {}
        }
    }
}

/// Waits for both ends; the failure that says most.
fn finish(source: Process, target: Process) -> Outcome {
    let (source, target) = (source.finish()?, target.finish()?);
    match (source, target) {
        (None, None) => Ok(()),
        // The source only saw the connection end; the target knows why.
        (Some(Failure { class: ExitClass::Network, .. }) | None, Some(failure)) => Err(failure),
        (Some(failure), _) => Err(failure),
    }
}
