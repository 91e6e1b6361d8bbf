//! A save whose page contents leave the stream: the offer, the switch at the end of a record, and the service of the engine
//! until it is through.
//!
//! The engine's rounds take the place of ours from the switch on. What it needs of the domain, the toolstack and the stream it
//! asks for, and that is done here, by the phases' own means.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use mover::bitmap::Bitmap;
use mover::error::Error;
use mover::journal::Role;
use mover::policy::Wish;
use mover::report::{Event as Told, Mode, Phase as Step, Summary};
use mover::runtime::Threads;
use mover::units::usize_of;
use mover::wire::hello::MigrationId;
use rustix::fs::FileType;

use super::phases::Save;
use super::{Event, Phase, Policy, SaveError, Toolstack};
use crate::domain::{Absent, LogRead, Source};
use crate::ferry::{Answer, Call, Departure, Ferried, GRACE, Harbour, Lingering, Plan, Terms, Word, depart};
use crate::stream::limits::RUNS_MAX;
use crate::stream::{Lanes, Offer};

/// How long to wait for the engine before looking whether this is cancelled.
const GLANCE: Duration = Duration::from_millis(50);
/// How long a cancelled engine may take before its connections are closed.
const GOOD_BYE: Duration = Duration::from_secs(2);

/// Whether a stream goes to where nobody can dial back from.
pub(super) fn is_file(to: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(to).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

/// A live save under a policy that the engine has too.
fn wish(policy: &Policy) -> Option<Wish> {
    match policy {
        Policy::Predict(wish) => Some(*wish),
        Policy::Stock => None,
    }
}

impl<S: Source, T: Toolstack> Save<'_, S, T> {
    /// Offers to move page contents another way, where that is wanted and can be.
    pub(super) fn offer(&mut self) -> Result<(), SaveError> {
        let can = self.options.live && !self.options.verify && !self.to_file && self.source.ferries();
        let Some(plan) = self.options.ferry.as_ref().filter(|_| can && wish(&self.options.policy).is_some())
        else {
            return Ok(());
        };
        let terms = Terms {
            addresses: &plan.addresses,
            lanes: plan.lanes,
            plaintext: plan.plaintext,
            authority: plan.credentials.as_ref().map(|credentials| &credentials.authority),
        };
        match Harbour::open(terms, &Threads::new()) {
            Ok(harbour) => {
                self.records.offer(harbour.offer())?;
                self.harbour = Some(harbour);
            }
            Err(error) => {
                let text = format!(
                    "{error}; pages stay in the stream (`lanes_address` in /etc/pageferry.toml names addresses of this host \
                     to listen on for the other end)"
                );
                self.toolstack.report(&Event::Note(&text));
            }
        }
        Ok(())
    }

    /// Whether page contents may leave the stream here, at the end of a record.
    pub(super) fn may_cross(&self) -> bool {
        self.harbour.as_ref().is_some_and(Harbour::is_full)
    }

    /// Sends what is left of this round, from `from` on, and all that follows on the lanes; the stream to its end.
    pub(super) fn cross(&mut self, from: u64) -> Result<(), SaveError> {
        let (Some(harbour), Some(plan), Some(wish)) =
            (self.harbour.take(), self.options.ferry.clone(), wish(&self.options.policy))
        else {
            unreachable!("only where there was an offer");
        };
        let offer = harbour.offer().clone();
        let connections = harbour.leave();
        let pages = self.source.pages();
        let absent = Absent::new(pages);
        let memory = self.source.memory(&absent)?;
        let mut populated = self.source.populated()?;
        let first = self.not_sent(from, &populated);
        populated.truncate(RUNS_MAX);
        self.records.lanes(&Lanes { migration: offer.migration, pages, populated })?;
        let doing = "start threads for the lanes";
        let departure = depart(&plan, &wish, &offer, connections, memory, &absent, first)
            .map_err(|source| SaveError::Toolstack { doing, source })?;
        self.say(&plan, &offer);
        if wish.throttle {
            let text = "the guest is not slowed down while its pages go by lanes (`throttle` in /etc/pageferry.toml)";
            self.toolstack.report(&Event::Note(text));
        }
        self.toolstack.report(&Event::Lanes(MigrationId(offer.migration)));
        self.serve(departure, &absent, MigrationId(offer.migration))
    }

    fn say(&mut self, plan: &Plan, offer: &Offer) {
        let what = match plan.mode {
            Mode::Refer => "pages go by lanes, those that stand on disks by reference",
            Mode::Lazy => "pages go by lanes, those that stand on disks by reference, and late",
            _ => "pages go by lanes",
        };
        let how = if plan.plaintext { "in the clear" } else { "under TLS" };
        self.toolstack.report(&Event::Detail(&format!("{what}: {} lanes {how}", offer.lanes)));
    }

    /// Pages of this round from `from` on that have memory, and those that could not be had.
    fn not_sent(&self, from: u64, populated: &[std::ops::Range<u64>]) -> Bitmap {
        let mut there = Bitmap::new(self.dirty.len());
        for run in populated {
            there.set_range(usize_of(run.start), usize_of(run.end));
        }
        let mut first = self.dirty.clone();
        first.clear_range(0, usize_of(from).min(first.len()));
        first.intersect(&there);
        first.union(&self.deferred);
        first
    }

    /// Does what the engine asks for until it has ended.
    fn serve(
        &mut self,
        departure: Departure,
        absent: &Arc<Absent>,
        migration: MigrationId,
    ) -> Result<(), SaveError> {
        let Departure { engine, words, tally } = departure;
        let (mut trouble, mut cancelled, mut round) = (None, None, (0, 0));
        let mode = self.options.ferry.as_ref().map_or(Mode::Plain, |plan| plan.mode);
        let mut draining: Option<Instant> = None;
        loop {
            match words.recv_timeout(if draining.is_some() { GRACE } else { GLANCE }) {
                Ok(Word::Told(event)) => {
                    if let Told::Phase { phase: Step::Drain, .. } = event {
                        draining = Some(Instant::now());
                    }
                    self.told(event, &mut round);
                }
                Ok(Word::Asks(call, answer)) => {
                    let done = match call {
                        Call::Harvest => self.harvest(),
                        Call::Pause => self.phase(Phase::Suspend, Self::suspend).map(|()| {
                            absent.stand_still();
                            Bitmap::new(0)
                        }),
                        Call::Whole => self.whole(&tally.total()).map(|()| Bitmap::new(0)),
                    };
                    let told: Answer = done.map_err(|error| {
                        let text = error.to_string();
                        trouble.get_or_insert(error);
                        text
                    });
                    // An engine that has failed meanwhile does not listen; its own error follows.
                    let _ = answer.send(told);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if mode == Mode::Lazy && draining.is_some_and(|since| since.elapsed() >= GRACE) {
                let work = Box::new(move |each: &mut dyn FnMut(&Told)| {
                    for word in words.iter() {
                        if let Word::Told(event) = word {
                            each(&event);
                        }
                    }
                    let summary = engine.end().map_err(|error| error.to_string())?;
                    Ok(ferried(mode, &summary).to_string())
                });
                self.lingering = Some(Lingering::new(migration, Role::Source, work));
                return Ok(());
            }
            if self.stop.load(Ordering::Relaxed) {
                engine.cancel();
                let since = *cancelled.get_or_insert_with(Instant::now);
                if since.elapsed() > GOOD_BYE {
                    engine.hang_up();
                }
            }
        }
        let outcome = engine.end();
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        let summary = outcome.map_err(ferry_error)?;
        self.summary.rounds += summary.rounds.saturating_sub(1);
        self.summary.pages += summary.pages_data;
        self.summary.ferried = Some(ferried(mode, &summary));
        Ok(())
    }

    fn told(&mut self, event: Told, round: &mut (u32, u64)) {
        if !matches!(event, Told::Notice { .. }) {
            self.toolstack.report(&Event::Engine(&event));
        }
        match event {
            Told::Notice { text, .. } => self.toolstack.report(&Event::Note(&text)),
            Told::Round { round: number, pages, .. } => *round = (number, pages),
            Told::Sample(sample) => {
                let (number, total) = *round;
                let sent = total.saturating_sub(sample.pages_left);
                self.toolstack.report(&Event::Frames { round: number.max(1), sent, total });
            }
            Told::Phase { .. } => {}
        }
    }

    /// What was written since the last harvest.
    fn harvest(&mut self) -> Result<Bitmap, SaveError> {
        self.source.check()?;
        let which = if self.suspended_at.is_some() { LogRead::Last } else { LogRead::Round };
        self.source.log_read(which, &mut self.dirty)?;
        if which == LogRead::Last && self.options.ferry.as_ref().is_some_and(|plan| plan.mode == Mode::Lazy) {
            // They are sent, and so are there when a backend asks for them again on the target.
            self.source.granted(&mut self.dirty)?;
        }
        Ok(self.dirty.clone())
    }

    /// Everything is there: the rest of the stream, to its end.
    fn whole(&mut self, done: &crate::stream::LanesDone) -> Result<(), SaveError> {
        self.records.lanes_done(done)?;
        self.phase(Phase::FinalState, Self::final_state)?;
        self.phase(Phase::End, Self::end)
    }
}

fn ferried(mode: Mode, summary: &Summary) -> Ferried {
    Ferried {
        mode,
        lanes: summary.lanes,
        zero: summary.pages_zero,
        data: summary.pages_data,
        references: summary.pages_by_reference,
        refetched: summary.pages_refetched,
        link_bytes: summary.link_bytes,
        disk_bytes: summary.disk_bytes,
    }
}

/// What the engine's error is to a save.
fn ferry_error(error: Error) -> SaveError {
    let what = match error {
        Error::InDoubt { detail, .. } => {
            format!("the other end did not confirm that all has arrived: {detail}")
        }
        Error::NotConverging { rounds, predicted_ms, allowed_ms } => format!(
            "after {rounds} rounds the downtime would still be {predicted_ms} ms, more than the {allowed_ms} ms allowed. \
             Allow more (max_downtime), or on_no_convergence = \"finish\""
        ),
        error => error.to_string(),
    };
    SaveError::Ferry { what }
}
