//! Rounds while the guest runs.

use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::error::Error;
use crate::pipeline::work::{Purpose, Round};
use crate::policy::{self, Decision, Observation, Wish};
use crate::report::{Event, Mode};
use crate::source::NotConverging;
use crate::source::migration::Migration;
use crate::units::{PAGE_BYTES_U64, f64_of};
use crate::wire::control::Message;

/// How often the dirty log is looked at within a round: a page that is dirty again is not sent for nothing.
const PEEK: Duration = Duration::from_millis(50);
/// A round with fewer bytes says nothing about the link's rate.
const TELLING_BYTES: u64 = 1 << 20;
/// What a pause is taken to cost besides pages.
const FIXED_DOWNTIME: Duration = Duration::from_millis(5);

impl Migration {
    /// Round after round until the policy says stop.
    pub(super) fn live_rounds(&mut self) -> Result<(), Error> {
        let (mut dirty_before, mut fitted_at) = (None, None);
        let mut sent_before: Option<Bitmap> = None;
        loop {
            let pages = self.take_next();
            let hot = sent_before.take().map(|mut before| {
                before.intersect(&pages);
                before
            });
            let hot = hot.filter(|_| self.rounds > 1 && self.config.mode != Mode::Stock);
            self.live_round(&pages, hot.as_ref())?;
            self.keep_referred()?;
            self.harvest()?;
            let dirty = self.next.count();
            let now = self.around.runtime.now();
            let waited = fitted_at.map_or(Duration::ZERO, |at| now.since(at));
            let seen = self.observe(dirty, dirty_before, waited);
            match self.decide(&seen) {
                Decision::Stop if !self.disks_lag() || self.rounds >= self.config.max_rounds => return Ok(()),
                // All is to be loaded before the restart: the guest had better run while it is.
                Decision::Stop => {
                    self.wait_for(|m| !m.disks_lag())?;
                    self.harvest()?;
                }
                Decision::Round => {}
                Decision::Throttle(percent) => {
                    self.life.throttle(percent)?;
                    self.speed = percent;
                    self.notice(format!(
                        "the guest writes faster than the link carries; slowed to {percent} %"
                    ));
                }
                Decision::GiveUp => {
                    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
                    return Err(Error::NotConverging {
                        rounds: self.rounds,
                        predicted_ms: millis(seen.predicted()),
                        allowed_ms: millis(self.config.max_downtime),
                    });
                }
            }
            fitted_at = fitted_at.or(seen.fits(&self.wish()).then_some(now));
            dirty_before = Some(dirty);
            sent_before = Some(pages);
        }
    }

    fn live_round(&mut self, pages: &Bitmap, hot: Option<&Bitmap>) -> Result<(), Error> {
        let (began, bytes) = (self.around.runtime.now(), self.link_bytes());
        let number = self.post(Purpose::Live, pages, hot)?;
        self.wait_for(|m| m.heard.placed >= number)?;
        let bytes = self.link_bytes() - bytes;
        let seconds = self.around.runtime.now().since(began).as_secs_f64();
        if bytes >= TELLING_BYTES || self.link_rate == 0.0 {
            self.link_rate = f64_of(bytes.max(1)) / seconds.max(1e-6);
        }
        Ok(())
    }

    /// Whether the target holds pages back while the rounds run.
    pub(super) fn is_held_ahead(&self) -> bool {
        self.config.mode == Mode::Lazy && self.config.holds_ahead
    }

    /// Keeps the pages that the target may ask for when the guest is gone from here.
    pub(super) fn keep_referred(&self) -> Result<(), Error> {
        if self.config.mode == Mode::Lazy {
            self.memory.keep(&self.sending.referred.snapshot())?;
        }
        Ok(())
    }

    /// Gives the lanes a round and tells the target; returns its number.
    pub(super) fn post(
        &mut self,
        purpose: Purpose,
        pages: &Bitmap,
        hot: Option<&Bitmap>,
    ) -> Result<u32, Error> {
        let number = self.round.as_ref().map_or(0, |round| round.number) + 1;
        if purpose != Purpose::Digests {
            self.rounds += 1;
            let event = Event::Round { at_ms: self.at_ms(), round: self.rounds, pages: pages.count() };
            self.around.observer.event(event);
        }
        let round = Arc::new(Round::new(number, purpose, pages, hot));
        for lane in &self.lanes {
            assert!(lane.jobs.push(Arc::clone(&round)).is_ok(), "a lane gets one round at a time");
        }
        self.round = Some(round);
        self.around.runtime.ring(&self.sending.work);
        if purpose == Purpose::Live {
            self.tell(&Message::Round(number, pages.count()))?;
        }
        Ok(number)
    }

    /// Whether loading what is outstanding would make the downtime longer: where all is loaded before the restart.
    fn disks_lag(&self) -> bool {
        let seconds = f64_of(self.heard.feedback.outstanding) * self.disk_seconds_a_page();
        let waits = self.config.mode == Mode::Refer || self.is_held_ahead();
        waits && seconds > self.config.max_downtime.as_secs_f64() / 4.0
    }

    fn observe(&self, dirty: u64, dirty_before: Option<u64>, waited: Duration) -> Observation {
        let written = (self.write_rate > 0.0).then_some(self.write_rate);
        Observation {
            rounds: self.rounds,
            dirty,
            dirty_before,
            link_rate: self.link_rate,
            fixed: FIXED_DOWNTIME,
            speed: self.speed,
            written,
            waited,
        }
    }

    fn decide(&self, seen: &Observation) -> Decision {
        match self.config.mode {
            Mode::Stock => policy::stock(seen.rounds, seen.dirty),
            Mode::Plain | Mode::Refer | Mode::Lazy => policy::decide(seen, &self.wish()),
        }
    }

    fn wish(&self) -> Wish {
        Wish {
            max_downtime: self.config.max_downtime,
            max_rounds: self.config.max_rounds,
            throttle: self.config.throttle,
            finish: self.config.not_converging == NotConverging::Finish,
        }
    }

    /// The pages of the next round; from now on the next round is the one after.
    pub(super) fn take_next(&mut self) -> Bitmap {
        self.write_rate = 0.0;
        self.last_peek = self.around.runtime.now();
        let empty = Bitmap::new(self.next.len());
        self.sending.dirty_again.copy_from(&empty);
        std::mem::replace(&mut self.next, empty)
    }

    /// Adds what the guest has dirtied to the next round.
    pub(super) fn harvest(&mut self) -> Result<(), Error> {
        self.dirty.harvest(&mut self.next)?;
        self.last_peek = self.around.runtime.now();
        Ok(())
    }

    /// While a round is under way, notes now and then what is dirty again, and keeps the index fresh.
    pub(super) fn peek(&mut self) -> Result<(), Error> {
        if let Some(keeper) = &mut self.keeper {
            keeper.forget_written()?;
            keeper.learn(self.around.runtime.now())?;
        }
        let due = self.around.runtime.now().since(self.last_peek) >= PEEK;
        let peeks = self.config.mode != Mode::Stock && self.dirty.is_cheap();
        if due && peeks && self.armed && self.round.is_some() {
            let since = self.around.runtime.now().since(self.last_peek);
            self.harvest()?;
            // Of a round's peeks the first: later ones find pages dirty that are dirty already.
            if self.write_rate == 0.0 {
                self.write_rate = f64_of(self.next.count() * PAGE_BYTES_U64) / since.as_secs_f64();
            }
            self.sending.dirty_again.copy_from(&self.next);
        }
        Ok(())
    }
}
