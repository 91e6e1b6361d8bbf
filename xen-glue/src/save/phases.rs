//! The phases of a save.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mover::bitmap::Bitmap;
use mover::policy::{Decision, Observation};
use mover::units::{PAGE_BYTES_U64, f64_of, u64_of, usize_of};

use super::ferry;
use super::frozen::Referrer;
use super::records::Records;
use super::{Event, Options, Phase, SaveError, Summary, Toolstack, Verdict};
use crate::domain::{Batch, Life, LogRead, Source};
use crate::ferry::{Harbour, Lingering};
use crate::stream::GuestType;

/// What stopping a guest costs besides its pages: suspending itself, its state, starting on the other side.
const FIXED: Duration = Duration::from_millis(50);

/// A save under way.
pub(super) struct Save<'a, S: Source, T: Toolstack> {
    pub(super) source: S,
    pub(super) toolstack: &'a mut T,
    pub(super) options: &'a Options,
    pub(super) stop: &'a AtomicBool,
    pub(super) records: Records<'a>,
    /// The stream goes into a regular file.
    pub(super) to_file: bool,
    /// Where the other end may dial back, as long as it may.
    pub(super) harbour: Option<Harbour>,
    /// Page contents leave the stream, from this page of the round on.
    crossing: Option<u64>,
    /// Pages to be sent in this round.
    pub(super) dirty: Bitmap,
    /// Pages to be sent again when the guest stands still.
    pub(super) deferred: Bitmap,
    /// Where the log is read into at the end.
    last: Bitmap,
    pfns: Vec<u64>,
    pub(super) batch: Batch,
    /// Leaves pages on disks, where that is wanted and can be.
    pub(super) referrer: Option<Referrer>,
    logging: bool,
    device_logging: bool,
    /// Percent of its processor time the guest gets; 0 if it can't be slowed down.
    speed: u8,
    begun: Instant,
    pub(super) suspended_at: Option<Instant>,
    /// The engine works on.
    pub(super) lingering: Option<Lingering>,
    pub(super) summary: Summary,
}

impl<'a, S: Source, T: Toolstack> Save<'a, S, T> {
    pub(super) fn new(
        source: S,
        to: BorrowedFd<'a>,
        options: &'a Options,
        toolstack: &'a mut T,
        stop: &'a AtomicBool,
    ) -> Self {
        let pages = usize_of(source.pages());
        Self {
            pfns: Vec::with_capacity(source.batch_pages()),
            records: Records::new(to, stop),
            to_file: ferry::is_file(to),
            harbour: None,
            crossing: None,
            dirty: Bitmap::new(pages),
            deferred: Bitmap::new(pages),
            last: Bitmap::new(if options.live { pages } else { 0 }),
            batch: Batch::default(),
            referrer: None,
            logging: false,
            device_logging: false,
            speed: 100,
            begun: Instant::now(),
            suspended_at: None,
            lingering: None,
            summary: Summary::default(),
            source,
            toolstack,
            options,
            stop,
        }
    }

    /// All of it.
    pub(super) fn run(mut self) -> Result<Summary, SaveError> {
        let outcome = self.phases();
        self.clean_up();
        let outcome = outcome.and_then(|()| match self.lingering.take() {
            Some(left) => self.toolstack.lingers(left).map_err(|what| SaveError::Ferry { what }),
            None => Ok(()),
        });
        match outcome {
            // Whatever a stop has made fail, it is the reason.
            Err(_) if self.stop.load(Ordering::Relaxed) => Err(SaveError::Cancelled),
            Err(error) => Err(error),
            Ok(()) => {
                self.summary.bytes = self.records.bytes();
                self.summary.total = self.begun.elapsed();
                self.summary.stopped = self.suspended_at.map_or(Duration::ZERO, |at| at.elapsed());
                Ok(self.summary)
            }
        }
    }

    fn phases(&mut self) -> Result<(), SaveError> {
        self.phase(Phase::Prepare, Self::prepare)?;
        self.phase(Phase::StaticState, Self::static_state)?;
        if self.options.live {
            self.phase(Phase::Rounds, Self::rounds)?;
            if self.suspended_at.is_some() {
                // Page contents have gone another way, and the stream has been written to its end with them.
                return Ok(());
            }
        }
        self.phase(Phase::Suspend, Self::suspend)?;
        self.freeze()?;
        self.phase(Phase::LastPages, Self::last_pages)?;
        self.refer()?;
        if self.options.verify {
            self.phase(Phase::Verify, Self::verify)?;
        }
        self.phase(Phase::FinalState, Self::final_state)?;
        self.phase(Phase::End, Self::end)
    }

    pub(super) fn phase(
        &mut self,
        phase: Phase,
        run: impl FnOnce(&mut Self) -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        self.toolstack.report(&Event::Phase(phase));
        self.cancelled()?;
        run(self)
    }

    fn prepare(&mut self) -> Result<(), SaveError> {
        self.records.start(self.source.header())
    }

    fn static_state(&mut self) -> Result<(), SaveError> {
        let state = self.source.static_state()?;
        self.records.static_state(&state, self.source.table_frames().as_ref())?;
        self.offer()
    }

    /// Sends memory while the guest runs, as often as the policy wants. What was written since the last round is in
    /// `dirty` afterwards.
    fn rounds(&mut self) -> Result<(), SaveError> {
        self.start_logging()?;
        self.dirty.set_all();
        let (mut dirty_before, mut fitted_at) = (None, None);
        loop {
            let begun = Instant::now();
            let sent = self.send(false)?;
            self.summary.rounds += 1;
            if let Some(from) = self.crossing.take() {
                return self.cross(from);
            }
            // Whoever dials back from now on is turned away.
            self.harbour = None;
            self.source.check()?;
            let dirty = self.source.log_read(LogRead::Round, &mut self.dirty)?;
            let link_rate = f64_of(sent * PAGE_BYTES_U64) / begun.elapsed().as_secs_f64().max(1e-6);
            let rounds = self.summary.rounds;
            let waited = fitted_at.map_or(Duration::ZERO, |at: Instant| at.elapsed());
            let speed = self.speed;
            let seen = Observation {
                rounds,
                dirty,
                dirty_before,
                link_rate,
                fixed: FIXED,
                speed,
                written: None,
                waited,
            };
            let (rate, downtime) = (link_rate, seen.predicted());
            self.toolstack.report(&Event::Round { round: rounds, dirty, rate, downtime });
            match self.toolstack.judge(&seen, self.summary.pages) {
                Some(Verdict::Stop) => return Ok(()),
                Some(Verdict::GiveUp) => return Err(SaveError::GivenUp { rounds }),
                Some(Verdict::GoOn) => {}
                None => match self.options.policy.decide(&seen) {
                    Decision::Stop => return Ok(()),
                    Decision::GiveUp => return Err(SaveError::NotConverging { rounds, dirty }),
                    Decision::Throttle(percent) => self.slow_down(percent),
                    Decision::Round => {}
                },
            }
            fitted_at = fitted_at.or(self.options.policy.fits(&seen).then(Instant::now));
            dirty_before = Some(dirty);
        }
    }

    /// Slows the guest down, or notes that this can't be.
    fn slow_down(&mut self, percent: u8) {
        let told = match self.source.slow_down(percent) {
            Ok(()) => {
                self.speed = percent;
                format!("the guest writes faster than the stream carries; it is slowed down to {percent} %")
            }
            Err(error) => {
                self.speed = 0;
                error.to_string()
            }
        };
        self.toolstack.report(&Event::Note(&told));
    }

    fn start_logging(&mut self) -> Result<(), SaveError> {
        if self.source.header().guest == GuestType::Hvm {
            self.device_logging = true;
            asked("log what the device model writes", self.toolstack.device_log(true))?;
        }
        self.source.log_on()?;
        self.logging = true;
        Ok(())
    }

    pub(super) fn suspend(&mut self) -> Result<(), SaveError> {
        self.suspended_at = Some(Instant::now());
        asked("suspend the guest", self.toolstack.suspend())?;
        match self.source.life()? {
            Life::Suspended => Ok(()),
            life => Err(SaveError::NotSuspended(life)),
        }
    }

    /// Sends what was written since the last round, or all if there was none.
    fn last_pages(&mut self) -> Result<(), SaveError> {
        if self.options.live {
            self.source.check()?;
            self.source.log_read(LogRead::Last, &mut self.last)?;
            self.dirty.union(&self.last);
            self.dirty.union(&self.deferred);
        } else {
            self.dirty.set_all();
        }
        self.send(true).map(drop)
    }

    fn verify(&mut self) -> Result<(), SaveError> {
        self.records.verify()?;
        self.dirty.set_all();
        self.send(true).map(drop)
    }

    pub(super) fn final_state(&mut self) -> Result<(), SaveError> {
        let state = self.source.final_state()?;
        self.records.final_state(&state)
    }

    pub(super) fn end(&mut self) -> Result<(), SaveError> {
        self.records.end()
    }

    /// Sends the pages of `dirty`, batch by batch; how many had contents.
    fn send(&mut self, still: bool) -> Result<u64, SaveError> {
        let dirty = std::mem::take(&mut self.dirty);
        let outcome = self.send_all(&dirty, still);
        self.dirty = dirty;
        outcome
    }

    fn send_all(&mut self, dirty: &Bitmap, still: bool) -> Result<u64, SaveError> {
        let total = dirty.count();
        let (mut looked_at, mut sent, mut from) = (0, 0, 0);
        loop {
            from = self.collect(dirty, from);
            if self.pfns.is_empty() {
                break;
            }
            self.cancelled()?;
            self.source.fetch(&self.pfns, still, &mut self.batch)?;
            for &pfn in &self.batch.deferred {
                self.deferred.set(usize_of(pfn));
            }
            sent += self.write()?;
            looked_at += u64_of(self.pfns.len());
            let round = self.summary.rounds + 1;
            self.toolstack.report(&Event::Frames { round, sent: looked_at, total });
            if !still && self.may_cross() {
                self.crossing = Some(u64_of(from));
                break;
            }
        }
        self.source.release()?;
        self.summary.pages += sent;
        Ok(sent)
    }

    /// Writes the batch; how many pages had contents.
    fn write(&mut self) -> Result<u64, SaveError> {
        let source = &self.source;
        let Some(referrer) = &mut self.referrer else {
            return self.records.pages(&self.batch.entries, |at| source.content(at));
        };
        referrer.judge(&self.batch.entries, source);
        let (entries, written) = referrer.batch();
        self.records.pages(entries, |at| source.content(written[at]))
    }

    /// Whether to go on.
    pub(super) fn cancelled(&self) -> Result<(), SaveError> {
        if self.stop.load(Ordering::Relaxed) { Err(SaveError::Cancelled) } else { Ok(()) }
    }

    /// Fills `pfns` with the next batch from `from` on; where the one after that begins.
    fn collect(&mut self, dirty: &Bitmap, mut from: usize) -> usize {
        self.pfns.clear();
        let room = self.source.batch_pages();
        while self.pfns.len() < room
            && let Some((first, end)) = dirty.next_run(from)
        {
            let end = end.min(first + room - self.pfns.len());
            self.pfns.extend(u64_of(first)..u64_of(end));
            from = end;
        }
        from
    }

    /// Turns off what was turned on. Said, not returned: what the save has come to does not change.
    fn clean_up(&mut self) {
        if std::mem::replace(&mut self.speed, 100) != 100
            && let Err(error) = self.source.full_speed()
        {
            self.toolstack.report(&Event::Note(&error.to_string()));
        }
        if std::mem::take(&mut self.logging)
            && let Err(error) = self.source.log_off()
        {
            self.toolstack.report(&Event::Note(&error.to_string()));
        }
        if std::mem::take(&mut self.device_logging)
            && let Err(error) =
                asked("stop logging what the device model writes", self.toolstack.device_log(false))
        {
            self.toolstack.report(&Event::Note(&error.to_string()));
        }
    }
}

impl<S: Source, T: Toolstack> Drop for Save<'_, S, T> {
    /// A panic must not leave the log on either.
    fn drop(&mut self) {
        self.clean_up();
    }
}

/// What the toolstack's answer comes to.
fn asked(doing: &'static str, answer: io::Result<bool>) -> Result<(), SaveError> {
    match answer {
        Ok(true) => Ok(()),
        Ok(false) => Err(SaveError::Refused { doing }),
        Err(source) => Err(SaveError::Toolstack { doing, source }),
    }
}
