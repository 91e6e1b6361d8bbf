//! The source's control task: its state, its one place to wait, and its ways out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::bitmap::{Bitmap, SharedBitmap};
use crate::disk::Disks;
use crate::error::Error;
use crate::fingerprint::CheckKey;
use crate::guest::{DirtyLog, GuestMemory, SourceLife};
use crate::index::Keeper;
use crate::journal::Journal;
use crate::limits::LANES_MAX;
use crate::net::pace::Pace;
use crate::net::{Dialer, HangUp, Sender};
use crate::pipeline::Failure;
use crate::pipeline::control::{self, Mail};
use crate::pipeline::judge::{Backlog, link_rate};
use crate::pipeline::send::{Pipes, Sending, Sent};
use crate::pipeline::work::Round;
use crate::report::{Event, Mode, PageCounts, Part, Phase, Sample, Summary};
use crate::runtime::{Bell, Fallen, Moment, Task};
use crate::source::{Config, Parts, Surroundings};
use crate::units::{PAGE_BYTES_U64, f64_of, u64_of};
use crate::wire::control::{Account, DiskName, Feedback, Message, Offer, Standing};
use crate::wire::hello::{MigrationId, Secret};

/// How often the control task looks around at least.
const TICK: Duration = Duration::from_millis(20);
/// How often it samples, and tells the target that it is there.
const SAMPLE: Duration = Duration::from_millis(100);
/// Urgent refetches waiting; more wait their turn with the others.
const URGENT: usize = 1024;
/// What a disk is taken to deliver before the target has told, bytes a second.
const DISK_RATE_GUESS: f64 = 400e6;

/// What the target has said so far.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) placed: u32,
    pub(super) ready: bool,
    pub(super) started: bool,
    pub(super) feedback: Feedback,
    pub(super) account: Option<Account>,
    pub(super) accept: Option<Offer>,
    pub(super) standing: Option<Standing>,
}

/// The control connection.
pub(super) struct Peer {
    pub(super) sender: Box<dyn Sender>,
    pub(super) mail: Mail,
    pub(super) hang_up: Arc<dyn HangUp>,
}

/// A lane's task and the way to stop it.
pub(super) struct LaneHandle {
    pub(super) task: Box<dyn Task>,
    pub(super) hang_up: Arc<dyn HangUp>,
    pub(super) jobs: Arc<ArrayQueue<Arc<Round>>>,
}

/// Whose the guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hold {
    /// Ours, running.
    Running,
    /// Ours, paused.
    Paused,
    /// Given up; the target may have started it.
    Released,
    /// The target's, and it said so.
    Theirs,
}

/// A running migration.
pub(super) struct Migration {
    pub(super) config: Config,
    pub(super) around: Surroundings,
    pub(super) name: String,
    pub(super) id: MigrationId,
    pub(super) dialer: Arc<dyn Dialer>,
    pub(super) token: Secret,
    pub(super) session: Option<Secret>,
    pub(super) dirty: Box<dyn DirtyLog>,
    pub(super) life: Box<dyn SourceLife>,
    pub(super) disks: Arc<dyn Disks>,
    pub(super) keeper: Option<Box<dyn Keeper>>,
    pub(super) journal: Box<dyn Journal>,
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) failure: Arc<Failure>,
    /// Rung by lanes and by the mail; the control task waits on it.
    pub(super) bell: Arc<Bell>,
    pub(super) sending: Arc<Sending>,
    pub(super) peer: Option<Peer>,
    pub(super) lanes: Vec<LaneHandle>,
    pub(super) heard: Heard,
    /// Pages to send in the next round.
    pub(super) next: Bitmap,
    pub(super) hold: Hold,
    pub(super) armed: bool,
    pub(super) speed: u8,
    pub(super) round: Option<Arc<Round>>,
    pub(super) rounds: u32,
    pub(super) link_rate: f64,
    /// Bytes a second that the guest dirtied at the begin of this round; 0 until it is known.
    pub(super) write_rate: f64,
    pub(super) control_bytes: u64,
    pub(super) began: Moment,
    pub(super) summary: Summary,
    pub(super) paused_at: Moment,
    pub(super) last_peek: Moment,
    last_sample: Moment,
    last: Sample,
}

/// What the lanes share.
fn new_sending(parts: &Parts, config: &Config, around: &Surroundings) -> Arc<Sending> {
    let mut key = [0; 32];
    around.runtime.random(&mut key);
    let bits = parts.guest.memory.pages().entries();
    Arc::new(Sending {
        memory: Arc::clone(&parts.guest.memory),
        runtime: Arc::clone(&around.runtime),
        failure: Arc::default(),
        index: parts.index.clone().filter(|_| config.mode.refers()),
        usable: AtomicU32::new(0),
        key: CheckKey::new(key),
        elide_zero: config.mode != Mode::Stock,
        pace: Pace::new(config.bandwidth),
        dirty_again: SharedBitmap::new(bits),
        refetch: SharedBitmap::new(bits),
        referred: SharedBitmap::new(bits),
        urgent: ArrayQueue::new(URGENT),
        refetch_asked: AtomicBool::new(false),
        version: AtomicU32::new(0),
        pipes: Pipes::default(),
        patience: config.patience,
        sent: Sent::default(),
        work: Bell::default(),
        done: Arc::default(),
        finish: AtomicBool::new(false),
    })
}

impl Migration {
    pub(super) fn new(parts: Parts, config: Config, around: Surroundings) -> Self {
        let now = around.runtime.now();
        let pages = parts.guest.memory.pages();
        let summary = Summary {
            mode: config.mode.name().into(),
            workload: config.workload.clone(),
            guest_bytes: pages.bytes().0,
            index_bytes: parts.index.as_ref().map_or(0, |index| index.mapped_bytes()),
            ..Summary::default()
        };
        let sending = new_sending(&parts, &config, &around);
        Self {
            name: parts.name,
            id: parts.migration,
            dialer: parts.dialer,
            token: parts.token,
            session: None,
            dirty: parts.guest.dirty,
            life: parts.guest.life,
            disks: parts.guest.disks,
            keeper: parts.keeper.filter(|_| config.mode.refers()),
            journal: parts.journal,
            memory: parts.guest.memory,
            failure: Arc::clone(&sending.failure),
            bell: Arc::clone(&sending.done),
            sending,
            peer: None,
            lanes: Vec::new(),
            heard: Heard::default(),
            next: Bitmap::new(pages.entries()),
            hold: Hold::Running,
            armed: false,
            speed: 100,
            round: None,
            rounds: 0,
            link_rate: 0.0,
            write_rate: 0.0,
            control_bytes: 0,
            began: now,
            summary,
            paused_at: now,
            last_peek: now,
            last_sample: now,
            last: Sample::default(),
            config,
            around,
        }
    }

    /// The phases.
    pub(super) fn run(&mut self) -> Result<(), Error> {
        self.phase(Phase::Connect, Self::connect)?;
        self.phase(Phase::Arm, Self::arm)?;
        self.phase(Phase::Rounds, Self::live_rounds)?;
        self.phase(Phase::Stop, Self::stop)?;
        if self.config.verify {
            self.phase(Phase::Verify, Self::verify)?;
        }
        self.phase(Phase::Commit, Self::commit)?;
        self.account_downtime();
        self.phase(Phase::Drain, Self::drain)?;
        self.phase(Phase::Done, Self::finish)
    }

    fn phase(&mut self, phase: Phase, work: fn(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let event = Event::Phase { at_ms: self.at_ms(), phase };
        self.around.observer.event(event);
        let began = self.around.runtime.now();
        work(self)?;
        if matches!(phase, Phase::Stop | Phase::Commit) {
            let name = if phase == Phase::Stop { "last round and state" } else { "handing over" };
            self.part(name, began);
        }
        Ok(())
    }

    /// Notes a piece of the downtime that began then and ends now.
    pub(super) fn part(&mut self, name: &str, began: Moment) {
        let ms = ms(self.around.runtime.now().since(began));
        self.summary.downtime_parts.push(Part { name: name.into(), ms });
    }

    fn account_downtime(&mut self) {
        let now = self.around.runtime.now();
        self.summary.downtime_ms = ms(now.since(self.paused_at)) - self.summary.verify_ms;
        self.summary.restart_ms = ms(now.since(self.began)) - self.summary.verify_ms;
    }

    /// Milliseconds since the migration began.
    pub(super) fn at_ms(&self) -> f64 {
        ms(self.around.runtime.now().since(self.began))
    }

    pub(super) fn notice(&self, text: String) {
        self.around.observer.event(Event::Notice { at_ms: self.at_ms(), text });
    }

    pub(super) fn tell(&mut self, message: &Message) -> Result<(), Error> {
        let peer = self.peer.as_mut().expect("a peer is told something only while there is one");
        let sent = control::send(&mut *peer.sender, message);
        self.control_bytes += sent.map_err(|error| peer.mail.explain(error))?;
        Ok(())
    }

    pub(super) fn shape(&self, lazy: bool) -> Result<Message, Error> {
        let identities = self.disks.identities()?;
        let disks = self.disks.infos().iter().zip(identities).map(|(disk, identity)| DiskName {
            name: disk.name.clone(),
            path: disk.path.clone(),
            identity,
            bytes: disk.bytes,
        });
        Ok(Message::Shape(crate::wire::control::Shape {
            guest: self.name.clone(),
            pages: self.memory.pages().0,
            lanes: u8::try_from(self.config.lanes.min(LANES_MAX)).unwrap_or(1),
            refers: self.config.mode.refers(),
            lazy,
            verify: self.config.verify,
            key: self.sending.key.clone(),
            disks: disks.collect(),
        }))
    }

    /// Waits until `enough` of what has been heard, keeping everything else going meanwhile.
    pub(super) fn wait_for(&mut self, enough: impl Fn(&Self) -> bool) -> Result<(), Error> {
        loop {
            let heard = self.bell.heard();
            self.look_around()?;
            if enough(self) {
                return Ok(());
            }
            self.around.runtime.wait(&self.bell, heard, TICK);
        }
    }

    /// Takes the mail, notices failures and a cancel, samples now and then.
    pub(super) fn look_around(&mut self) -> Result<(), Error> {
        self.take_mail()?;
        self.failure.check()?;
        if let Some(Fallen { task, what }) = self.around.runtime.fallen().cloned() {
            return Err(Error::Panicked { task, what });
        }
        if self.around.cancel.asked() && matches!(self.hold, Hold::Running | Hold::Paused) {
            return Err(Error::Cancelled { by: "here" });
        }
        if self.hold == Hold::Running {
            self.peek()?;
        }
        self.inform_judges();
        if self.around.runtime.now().since(self.last_sample) >= SAMPLE {
            self.sample();
            if self.peer.is_some() {
                self.tell(&Message::Ping)?;
            }
        }
        Ok(())
    }

    fn take_mail(&mut self) -> Result<(), Error> {
        while let Some(message) = self.peer.as_ref().and_then(|peer| peer.mail.next()) {
            match message {
                Message::Accept(offer) => self.heard.accept = Some(offer),
                Message::Feedback(feedback) => self.heard.feedback = feedback,
                Message::Placed(round) => self.heard.placed = self.heard.placed.max(round),
                Message::Ready => self.heard.ready = true,
                Message::Started => self.heard.started = true,
                Message::Standing(standing) => self.heard.standing = Some(standing),
                Message::Drained(account) => {
                    self.heard.feedback = account.feedback;
                    self.heard.account = Some(account);
                }
                Message::Abort(class, reason) => return Err(control::aborted(class, reason)),
                other => {
                    let phase = "the source listens";
                    return Err(crate::error::WireError::OutOfOrder { message: other.name(), phase }.into());
                }
            }
        }
        match &self.peer {
            Some(peer) if peer.mail.is_lost() => Err(peer.mail.why_lost()),
            _ => Ok(()),
        }
    }

    /// Pages still to be sent: of this round, and known dirty again.
    pub(super) fn pages_left(&self) -> u64 {
        self.round.as_ref().map_or(0, |round| round.left()) + self.next.count()
    }

    /// What a referenced page has cost the disks so far, read-through gaps and all, not what its bytes would.
    pub(super) fn disk_seconds_a_page(&self) -> f64 {
        let feedback = &self.heard.feedback;
        let seconds = f64_of(feedback.disk_busy_us) / 1e6;
        if seconds > 0.01 && feedback.checked > 256 {
            seconds / f64_of(feedback.checked)
        } else {
            f64_of(PAGE_BYTES_U64) / DISK_RATE_GUESS
        }
    }

    /// Tells the lanes' judges how long the pipes still have to work. In the last round that is no longer a matter of
    /// balance: with `lazy` a reference costs no downtime, with `refer` the disks may take a part of what is allowed.
    pub(super) fn inform_judges(&self) {
        let sending = &self.sending;
        let feedback = &self.heard.feedback;
        let per_page = self.disk_seconds_a_page();
        let references = sending.sent.references.load(SeqCst);
        let unsettled = references.saturating_sub(feedback.checked).min(references);
        let left = self.round.as_ref().map_or(0, |round| round.left());
        let link_s = f64_of(left * PAGE_BYTES_U64) / self.pipe_rate();
        let last = self.hold == Hold::Paused;
        let disk_limit_s = match self.config.mode {
            Mode::Refer if last => self.config.max_downtime.as_secs_f64() / 4.0,
            // No reference at all: what the guest has written last it wants first.
            Mode::Lazy if last && self.config.holds_ahead => -1.0,
            _ => f64::INFINITY,
        };
        // A reference that may be outstanding at the restart costs nothing before it: one of the last round, or, where pages are
        // held back while the rounds run, one of the first.
        let may_wait = if self.config.holds_ahead { self.rounds <= 1 } else { last };
        let per_page = if may_wait && self.config.mode == Mode::Lazy { 0.0 } else { per_page };
        sending.pipes.set(Backlog { link_s, disk_s: f64_of(unsettled) * per_page, disk_limit_s }, per_page);
    }

    /// What the lanes carry, bytes a second, whether or not they always have something to send.
    fn pipe_rate(&self) -> f64 {
        let sent = &self.sending.sent;
        let busy_s = f64_of(sent.busy_ns.load(SeqCst)) / 1e9 / f64_of(u64_of(self.config.lanes.max(1)));
        link_rate(sent.bytes.load(SeqCst), busy_s, self.sending.pace.rate())
    }

    fn sample(&mut self) {
        let now = self.around.runtime.now();
        let seconds = now.since(self.last_sample).as_secs_f64().max(1e-3);
        self.last_sample = now;
        let link_bytes = self.link_bytes();
        let disk_bytes = self.heard.feedback.disk_bytes;
        let pages_left = self.pages_left();
        let live = matches!(self.hold, Hold::Running | Hold::Paused);
        let restart = f64_of(pages_left * PAGE_BYTES_U64) / self.link_rate * 1e3;
        let sample = Sample {
            at_ms: self.at_ms(),
            round: self.rounds,
            pages_left,
            link_bytes,
            disk_bytes,
            link_rate: f64_of(link_bytes.saturating_sub(self.last.link_bytes)) / seconds,
            disk_rate: f64_of(disk_bytes.saturating_sub(self.last.disk_bytes)) / seconds,
            outstanding: self.heard.feedback.outstanding,
            restart_in_ms: (live && restart.is_finite()).then_some(restart),
            paused: matches!(self.hold, Hold::Paused | Hold::Released),
            pages: self.page_counts(),
            downtime_ms: (self.hold == Hold::Theirs && self.summary.restart_ms > 0.0)
                .then_some(self.summary.downtime_ms),
        };
        self.last = sample;
        self.around.observer.event(Event::Sample(sample));
    }

    fn page_counts(&self) -> PageCounts {
        let (sent, feedback) = (&self.sending.sent, &self.heard.feedback);
        PageCounts {
            zero: sent.zero.load(SeqCst),
            data: sent.data.load(SeqCst),
            by_reference: sent.references.load(SeqCst),
            refetched: sent.refetched.load(SeqCst),
            checked: feedback.checked,
            check_failures: feedback.failed,
            faults_served: feedback.faults,
        }
    }

    /// Bytes sent so far, all connections.
    pub(super) fn link_bytes(&self) -> u64 {
        self.control_bytes + self.sending.sent.bytes.load(SeqCst)
    }

    /// Ends tasks and connections, sees to the guest, and turns the outcome into what the caller gets.
    pub(super) fn wind_up(mut self, outcome: Result<(), Error>) -> Result<Summary, Error> {
        // What a lane came to does not matter to a migration that has succeeded: the target has everything, and closes its
        // connections when it likes, under a lane that answers a request of before too.
        let outcome = outcome.map_err(|error| match (&error, &self.peer) {
            (Error::Net(_), Some(peer)) if matches!(self.hold, Hold::Running | Hold::Paused) => {
                peer.mail.last_words(&*self.around.runtime).unwrap_or(error)
            }
            _ => error,
        });
        if let Err(error) = &outcome
            && self.peer.is_some()
            && !matches!(error, Error::Net(_) | Error::Peer { .. })
        {
            // The link may be what failed; the error that matters is the first one.
            let _ = self.tell(&Message::Abort(error.class(), error.to_string()));
        }
        let joined = self.end_tasks();
        let restored = self.restore_guest();
        outcome.and(joined).map_err(|error| self.doubt(error))?;
        restored?;
        Ok(self.summary)
    }

    /// An error after the guest was given up and before the target answered is a doubt.
    fn doubt(&self, error: Error) -> Error {
        if self.hold == Hold::Released && !matches!(error, Error::InDoubt { .. }) {
            return Error::InDoubt { migration: self.id.to_string(), detail: error.to_string() };
        }
        error
    }

    fn end_tasks(&mut self) -> Result<(), Error> {
        self.sending.finish.store(true, SeqCst);
        self.sending.pace.set(&*self.around.runtime, None);
        self.around.runtime.ring(&self.sending.work);
        self.end_lanes()?;
        match self.peer.take() {
            Some(mut peer) => {
                peer.hang_up.hang_up();
                peer.mail.end()
            }
            None => Ok(()),
        }
    }

    /// Hangs up all lanes and waits for their tasks.
    pub(super) fn end_lanes(&mut self) -> Result<(), Error> {
        self.lanes.iter().for_each(|lane| lane.hang_up.hang_up());
        let ends: Vec<_> = self.lanes.drain(..).map(|lane| lane.task.join()).collect();
        ends.into_iter()
            .collect::<Result<(), _>>()
            .map_err(|what| Error::Panicked { task: "a lane".into(), what })
    }

    /// Before the commit: the guest runs here as before. After it: it stays as it is.
    fn restore_guest(&mut self) -> Result<(), Error> {
        if self.armed {
            self.armed = false;
            self.dirty.disarm()?;
        }
        if matches!(self.hold, Hold::Running | Hold::Paused) {
            if self.speed != 100 {
                self.life.throttle(100)?;
            }
            if self.hold == Hold::Paused {
                self.life.resume()?;
                self.hold = Hold::Running;
            }
            self.journal.close()?;
        }
        Ok(())
    }
}

/// Milliseconds as the summary has them.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
