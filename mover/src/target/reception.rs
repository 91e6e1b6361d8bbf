//! The target's control task: its state, its one place to wait, and its ways out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::bitmap::bits_of;
use crate::disk::Disks;
use crate::error::{Error, WireError};
use crate::guest::{HoldBack, TargetLife, WriteGate};
use crate::journal::{Entry, Journal};
use crate::limits::REFETCHES_PER_MESSAGE;
use crate::net::{Connection, HangUp, Sender};
use crate::pipeline::Failure;
use crate::pipeline::control::{self, Mail};
use crate::pipeline::faults::SmallLoader;
use crate::pipeline::landing::Landing;
use crate::pipeline::receive::{self, Lane, LaneProgress};
use crate::pipeline::table::PageTable;
use crate::report::{Event, PageCounts, Phase, Sample};
use crate::runtime::{Fallen, Moment, Placement, Task};
use crate::source::Surroundings;
use crate::target::Config;
use crate::target::connect::{Arrival, Door};
use crate::units::{Pfn, f64_of};
use crate::wire::control::{Account, Feedback, Message, Offer, Shape, Standing};

/// How often the control task looks around at least.
const TICK: Duration = Duration::from_millis(20);
/// How often it tells the source its counts.
const REPORT: Duration = Duration::from_millis(50);
/// How often it tells this end's observer.
const SAMPLE: Duration = Duration::from_millis(100);
/// Pages the guest waits for that only the source has.
const URGENT: usize = 1024;

/// How far the guest has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Stage {
    /// Its pages are coming in.
    Filling,
    /// It could start.
    Ready,
    /// It runs, pages are outstanding.
    Started,
    /// It runs, and all is here.
    Drained,
}

/// What the source has said so far.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) last_round: Option<u32>,
    pub(super) verify_round: Option<u32>,
    pub(super) state_bytes: usize,
    pub(super) state: Vec<u8>,
    pub(super) commit: bool,
    pub(super) finished: bool,
}

/// The control connection, while there is one.
pub(super) struct Peer {
    pub(super) sender: Box<dyn Sender>,
    pub(super) mail: Mail,
    pub(super) hang_up: Arc<dyn HangUp>,
}

pub(super) struct LaneHandle {
    task: Box<dyn Task>,
    hang_up: Arc<dyn HangUp>,
}

/// A guest being received.
pub(super) struct Reception {
    pub(super) config: Config,
    pub(super) around: Surroundings,
    pub(super) shape: Shape,
    pub(super) life: Box<dyn TargetLife>,
    pub(super) lazy: Result<Arc<dyn HoldBack>, String>,
    pub(super) gate: Option<Arc<dyn WriteGate>>,
    pub(super) disks: Option<Arc<dyn Disks>>,
    pub(super) readable: Vec<Result<(), String>>,
    pub(super) journal: Box<dyn Journal>,
    pub(super) landing: Arc<Landing>,
    pub(super) failure: Arc<Failure>,
    pub(super) urgent: Arc<ArrayQueue<Pfn>>,
    /// Set when nothing is outstanding and nothing more can be.
    pub(super) finish: Arc<AtomicBool>,
    pub(super) heard: Heard,
    pub(super) stage: Stage,
    pub(super) lazy_pages: u64,
    /// Loaders for single pages, made while the guest still runs at the source: making one takes a while.
    pub(super) small: Vec<SmallLoader>,
    pub(super) tasks: Vec<(&'static str, Box<dyn Task>)>,
    pub(super) lost_at: Option<Moment>,
    shared: Arc<receive::Reception>,
    peer: Option<Peer>,
    lanes: Vec<LaneHandle>,
    pub(super) door: Arc<Door>,
    placed_told: u32,
    last_report: Moment,
    last_sample: Moment,
    sampled_bytes: u64,
    last_feedback: Feedback,
    ask_word: usize,
    began: Moment,
}

impl Reception {
    pub(super) fn new(arrival: Arrival, config: Config, around: Surroundings) -> Result<Self, Error> {
        let Arrival { connection, door, mut acceptor, shape, host, journal } = arrival;
        let now = around.runtime.now();
        let failure: Arc<Failure> = Arc::default();
        let (memory, pages) = (Arc::clone(&host.guest.memory), host.guest.memory.pages());
        let kept = host.guest.lazy.as_ref().ok().filter(|_| shape.lazy).and_then(|hold| hold.table());
        let table = kept.map_or_else(|| PageTable::new(pages), |memory| PageTable::within(&memory, pages));
        let landing =
            Arc::new(Landing::with(table, memory, Arc::clone(&around.runtime), Arc::clone(&failure)));
        let shared = Arc::new(receive::Reception {
            landing: Arc::clone(&landing),
            key: shape.key.clone(),
            disks: if shape.refers { shape.disks.len() } else { 0 },
            lanes: (0..shape.lanes).map(|_| LaneProgress::default()).collect(),
            patience: config.patience,
            vital: AtomicBool::new(true),
            checks: connection.is_some() || shape.refers,
        });
        let mut reception = Self {
            lazy: host.guest.lazy,
            gate: host.guest.gate,
            life: host.guest.life,
            disks: host.disks,
            readable: host.readable,
            journal,
            landing,
            failure,
            urgent: Arc::new(ArrayQueue::new(URGENT)),
            finish: Arc::default(),
            heard: Heard::default(),
            stage: Stage::Filling,
            lazy_pages: 0,
            small: Vec::new(),
            tasks: Vec::new(),
            lost_at: None,
            shared,
            peer: None,
            lanes: Vec::new(),
            door: Arc::clone(&door),
            placed_told: 0,
            last_report: now,
            last_sample: now,
            sampled_bytes: 0,
            last_feedback: Feedback::default(),
            ask_word: 0,
            began: now,
            shape,
            config,
            around,
        };
        if let Some(connection) = connection {
            reception.listen(connection);
        }
        let (observer, cancel) =
            (Arc::clone(&reception.around.observer), Arc::clone(&reception.around.cancel));
        let around = Surroundings { runtime: Arc::clone(&reception.around.runtime), observer, cancel };
        reception.spawn("pf-door", move |landing| {
            door.keep(&mut *acceptor, &around, &*landing.runtime, &landing.work)
        });
        Ok(reception)
    }

    /// The phases.
    pub(super) fn run(&mut self) -> Result<(), Error> {
        self.phase(Phase::Connect, Self::accept)?;
        self.phase(Phase::Rounds, Self::fill)?;
        self.phase(Phase::Stop, Self::prepare)?;
        self.phase(Phase::Commit, Self::start)?;
        self.phase(Phase::Drain, Self::drain)
    }

    pub(super) fn phase(
        &mut self,
        phase: Phase,
        work: fn(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let at_ms = self.around.runtime.now().since(self.began).as_secs_f64() * 1e3;
        self.around.observer.event(Event::Phase { at_ms, phase });
        work(self)
    }

    /// Starts a task that ends on `finish` or on a failure; its error is the migration's.
    pub(super) fn spawn(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&Landing) -> Result<(), Error> + Send + 'static,
    ) {
        let landing = Arc::clone(&self.landing);
        let body = Box::new(move || {
            if let Err(error) = body(&landing) {
                landing.failure.set(&*landing.runtime, &landing.work, error);
            }
        });
        self.tasks.push((name, self.around.runtime.spawn(name, Placement::Any, body)));
    }

    fn listen(&mut self, connection: Connection) {
        let Connection { sender, mut receiver, hang_up, .. } = connection;
        receiver.set_patience(Some(self.config.patience));
        let landing = Arc::clone(&self.landing);
        let ring = Box::new(move || landing.runtime.ring(&landing.work));
        let mail = Mail::start(&self.around.runtime, receiver, Arc::clone(&hang_up), Box::new(Some), ring);
        self.peer = Some(Peer { sender, mail, hang_up });
    }

    pub(super) fn tell(&mut self, message: &Message) -> Result<(), Error> {
        match &mut self.peer {
            Some(peer) => match control::send(&mut *peer.sender, message) {
                Ok(_) => Ok(()),
                Err(error) => Err(peer.mail.explain(error)),
            },
            None => Ok(()),
        }
    }

    /// Tells the source what this end can do, and waits for its lanes.
    fn accept(&mut self) -> Result<(), Error> {
        let lazy = self.lazy.as_ref().map(|_| ()).map_err(Clone::clone);
        self.door.expect_lanes(self.shape.lanes, &*self.around.runtime);
        self.tell(&Message::Accept(Offer { disks: self.readable.clone(), lazy }))?;
        let lanes = usize::from(self.shape.lanes);
        self.wait_for(|r| r.lanes.len() == lanes)
    }

    /// Waits until `enough`, keeping everything else going meanwhile.
    pub(super) fn wait_for(&mut self, enough: impl Fn(&Self) -> bool) -> Result<(), Error> {
        loop {
            let heard = self.landing.work.heard();
            self.look_around()?;
            if enough(self) {
                return Ok(());
            }
            self.around.runtime.wait(&self.landing.work, heard, TICK);
        }
    }

    /// Takes the mail and new connections, notices failures and a cancel, tells the source what it should know.
    fn look_around(&mut self) -> Result<(), Error> {
        self.admit()?;
        if let Err(error) = self.take_mail().and_then(|()| self.report()) {
            self.peer_lost(error)?;
        }
        self.failure.check()?;
        self.sample();
        if let Some(Fallen { task, what }) = self.around.runtime.fallen().cloned() {
            return Err(Error::Panicked { task, what });
        }
        if self.around.cancel.asked() && self.stage < Stage::Started && !self.heard.commit {
            return Err(Error::Cancelled { by: "here" });
        }
        Ok(())
    }

    /// Without its source, a guest that is not complete yet is given up; one that is waits for it.
    fn peer_lost(&mut self, error: Error) -> Result<(), Error> {
        if self.stage == Stage::Filling || !matches!(error, Error::Net(_)) {
            return Err(error);
        }
        if let Some(mut peer) = self.peer.take() {
            if self.stage == Stage::Drained && !self.heard.finished {
                self.heard.finished = peer.mail.said_finished(&*self.around.runtime);
            }
            peer.hang_up.hang_up();
            peer.mail.end()?;
            self.lost_at = Some(self.around.runtime.now());
            if self.heard.finished {
                return Ok(());
            }
            self.notice(format!("{error}; waiting for it to be there again"));
        }
        Ok(())
    }

    fn notice(&self, text: String) {
        let at_ms = self.around.runtime.now().since(self.began).as_secs_f64() * 1e3;
        self.around.observer.event(Event::Notice { at_ms, text });
    }

    fn take_mail(&mut self) -> Result<(), Error> {
        while let Some(message) = self.peer.as_ref().and_then(|peer| peer.mail.next()) {
            let phase = "the target listens";
            match message {
                Message::Ping | Message::Round(..) => {}
                Message::Final(round, bytes) => {
                    self.heard.last_round = Some(round);
                    // Where pages are held back ahead, the others are still to be loaded.
                    let waits = self.lazy.as_ref().is_ok_and(|hold| !hold.holds_ahead());
                    self.landing.hushed.store(self.shape.lazy && waits, SeqCst);
                    self.heard.state_bytes = crate::units::usize_of(bytes.into());
                }
                Message::State(chunk) => {
                    if self.heard.state.len() + chunk.len() > self.heard.state_bytes {
                        return Err(WireError::OutOfOrder { message: "State", phase }.into());
                    }
                    self.heard.state.extend_from_slice(&chunk);
                }
                Message::Verify(round) => self.heard.verify_round = Some(round),
                Message::Commit if self.stage >= Stage::Ready => self.heard.commit = true,
                Message::Finished if self.stage == Stage::Drained => self.heard.finished = true,
                // Behind the commit the guest is ours whatever the source says.
                Message::Abort(class, reason) if self.stage < Stage::Started && !self.heard.commit => {
                    return Err(control::aborted(class, reason));
                }
                Message::Abort(..) => {}
                other => return Err(WireError::OutOfOrder { message: other.name(), phase }.into()),
            }
        }
        match &self.peer {
            Some(peer) if peer.mail.is_lost() => Err(peer.mail.why_lost()),
            _ => Ok(()),
        }
    }

    /// Starts lanes that have come in; takes the source back in after a cut.
    fn admit(&mut self) -> Result<(), Error> {
        if let Some(connection) = self.door.resumed.pop() {
            self.hang_up_all()?;
            self.lost_at = None;
            self.notice("the source is there again".to_owned());
            self.listen(connection);
            let standing = match self.stage {
                Stage::Filling | Stage::Ready => Standing::Ready,
                Stage::Started => Standing::Started,
                Stage::Drained => Standing::Drained,
            };
            self.door.expect_lanes(self.shape.lanes, &*self.around.runtime);
            self.ask_again();
            let told = self.tell(&Message::Standing(standing));
            let told = match self.stage {
                Stage::Drained => told.and_then(|()| self.tell(&Message::Drained(self.account()))),
                _ => told,
            };
            if let Err(error) = told {
                self.peer_lost(error)?;
            }
        }
        while let Some((number, connection)) = self.door.new_lanes.pop() {
            self.start_lane(number, connection)?;
        }
        Ok(())
    }

    fn start_lane(&mut self, number: u8, connection: Connection) -> Result<(), Error> {
        let Connection { receiver, hang_up, .. } = connection;
        let lane = Lane::new(Arc::clone(&self.shared), number.into(), receiver)?;
        let shared = Arc::clone(&self.shared);
        let body = Box::new(move || {
            let error = lane.run();
            // A wrong page is the end of it at any time.
            if shared.vital.load(SeqCst) || !matches!(error, Error::Net(_)) {
                let landing = &shared.landing;
                landing.failure.set(&*landing.runtime, &landing.work, error);
            }
        });
        let task =
            self.around.runtime.spawn(&format!("pf-lane{number}"), Placement::Core(number.into()), body);
        self.lanes.push(LaneHandle { task, hang_up });
        Ok(())
    }

    /// References that did not hold and were asked for over the old link are asked for again.
    fn ask_again(&self) {
        let table = &self.landing.table;
        for word in 0..table.asked.words() {
            for bit in bits_of(table.asked.take_word(word)) {
                table.ask.set(word * 64 + bit);
            }
        }
    }

    fn report(&mut self) -> Result<(), Error> {
        if self.peer.is_none() {
            return Ok(());
        }
        let placed = self.shared.finished_round();
        if placed > self.placed_told {
            self.placed_told = placed;
            // Counts first: whoever hears that the round is placed knows what is still at the disks.
            self.tell(&Message::Feedback(self.feedback()))?;
            self.tell(&Message::Placed(placed))?;
        }
        self.ask_source()?;
        let now = self.around.runtime.now();
        if now.since(self.last_report) >= REPORT {
            self.last_report = now;
            self.last_feedback = self.feedback();
            self.tell(&Message::Feedback(self.last_feedback))?;
        }
        Ok(())
    }

    /// Asks for pages whose references did not hold, those the guest waits for first.
    fn ask_source(&mut self) -> Result<(), Error> {
        let landing = Arc::clone(&self.landing);
        let table = &landing.table;
        let mut pfns = Vec::new();
        while let Some(pfn) = self.urgent.pop() {
            // What landed meanwhile needs no asking; what was asked for before is asked for again, but first.
            if table.ask.clear(pfn.index()) | table.asked.get(pfn.index()) {
                table.asked.set(pfn.index());
                pfns.push(pfn);
            }
        }
        if !pfns.is_empty() {
            self.tell(&Message::Refetch { urgent: true, pfns })?;
        }
        let words = table.ask.words();
        let mut pfns = Vec::new();
        for _ in 0..words {
            if pfns.len() + 64 > REFETCHES_PER_MESSAGE {
                break;
            }
            let word = self.ask_word;
            self.ask_word = (word + 1) % words;
            pfns.extend(bits_of(table.ask.take_word(word)).map(|bit| Pfn::at(word * 64 + bit)));
        }
        if !pfns.is_empty() {
            pfns.iter().for_each(|pfn| {
                table.asked.set(pfn.index());
            });
            self.tell(&Message::Refetch { urgent: false, pfns })?;
        }
        Ok(())
    }

    /// What this end knows of how far it is, about ten times a second.
    fn sample(&mut self) {
        let now = self.around.runtime.now();
        let seconds = now.since(self.last_sample).as_secs_f64();
        if seconds < SAMPLE.as_secs_f64() {
            return;
        }
        self.last_sample = now;
        let feedback = self.feedback();
        let disk_bytes = feedback.disk_bytes;
        let sample = Sample {
            at_ms: now.since(self.began).as_secs_f64() * 1e3,
            disk_bytes,
            disk_rate: f64_of(disk_bytes.saturating_sub(self.sampled_bytes)) / seconds,
            outstanding: feedback.outstanding,
            pages: PageCounts {
                checked: feedback.checked,
                check_failures: feedback.failed,
                faults_served: feedback.faults,
                ..PageCounts::default()
            },
            ..Sample::default()
        };
        self.sampled_bytes = disk_bytes;
        self.around.observer.event(Event::Sample(sample));
    }

    fn feedback(&self) -> Feedback {
        let counts = &self.landing.counts;
        let ahead = self.stage == Stage::Filling && self.holds_ahead().is_some();
        let outstanding = if ahead { self.landing.in_the_way() } else { self.landing.table.outstanding() };
        Feedback {
            outstanding,
            checked: counts.checked.load(SeqCst),
            failed: counts.failed.load(SeqCst),
            disk_bytes: counts.disk_bytes.load(SeqCst),
            disk_busy_us: counts.disk_busy_us.load(SeqCst),
            faults: counts.faults.load(SeqCst),
            verified: counts.verified.load(SeqCst),
            mismatched: counts.mismatched.load(SeqCst),
        }
    }

    /// The closing account.
    pub(super) fn account(&self) -> Account {
        Account {
            feedback: self.feedback(),
            lazy: self.lazy_pages,
            cpu_us: u64::try_from(self.around.runtime.cpu_time().as_micros()).unwrap_or(u64::MAX),
            memory_bytes: self.around.runtime.private_memory(),
            direct: self.landing.counts.direct.load(SeqCst) > 0,
        }
    }

    /// The round that all lanes have finished.
    pub(super) fn finished_round(&self) -> u32 {
        self.shared.finished_round()
    }

    /// Everything has arrived: from here on the source may be lost and come in again.
    pub(super) fn expect_source(&self) {
        self.shared.vital.store(false, SeqCst);
        self.door.expect_source(&*self.around.runtime);
    }

    fn hang_up_all(&mut self) -> Result<(), Error> {
        self.lanes.iter().for_each(|lane| lane.hang_up.hang_up());
        let mut ends: Vec<_> = self.lanes.drain(..).map(|lane| lane.task.join()).collect();
        if let Some(mut peer) = self.peer.take() {
            peer.hang_up.hang_up();
            ends.push(peer.mail.end().map_err(|error| error.to_string()));
        }
        ends.into_iter()
            .collect::<Result<(), _>>()
            .map_err(|what| Error::Panicked { task: "a lane".into(), what })
    }

    /// Ends tasks and connections and sees to the guest. Dropping a guest that was not started leaves nothing.
    pub(super) fn wind_up(mut self, outcome: Result<(), Error>) -> Result<Account, Error> {
        let outcome =
            outcome.and_then(|()| self.failure.check()).map_err(|error| match (&error, &self.peer) {
                (Error::Net(_), Some(peer)) if self.stage < Stage::Started => {
                    peer.mail.last_words(&*self.around.runtime).unwrap_or(error)
                }
                _ => error,
            });
        if let Err(error) = &outcome {
            if self.stage < Stage::Started {
                // The record first: from here on a commit that still arrives is answered with "discarded".
                let recorded = self.journal.record(Entry::Discarded);
                if self.stage == Stage::Ready && recorded.is_ok() {
                    let _ = self.tell(&Message::Standing(Standing::Discarded));
                }
            }
            if !matches!(error, Error::Peer { .. } | Error::Cancelled { by: "by the other end" }) {
                // The link may be what failed; the error that matters is the first one.
                let _ = self.tell(&Message::Abort(error.class(), error.to_string()));
            }
            let text = error.to_string();
            self.failure.set(
                &*self.around.runtime,
                &self.landing.work,
                Error::Peer { reason: text, class: error.class() },
            );
        }
        self.finish.store(true, SeqCst);
        self.door.closed.store(true, SeqCst);
        self.around.runtime.ring(&self.landing.work);
        let mut ended = self.hang_up_all();
        for (name, task) in self.tasks.drain(..) {
            let end = task.join().map_err(|what| Error::Panicked { task: name.into(), what });
            ended = ended.and(end);
        }
        let account = self.account();
        outcome.and(ended)?;
        self.journal.close()?;
        Ok(account)
    }
}
