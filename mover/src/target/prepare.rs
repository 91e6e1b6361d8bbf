//! Rounds come in; then everything that is not outstanding is there, and the guest is made ready to start.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use crate::disk::Disks;
use crate::error::Error;
use crate::guest::HoldBack;
use crate::pipeline::faults::{FaultServer, SmallLoader};
use crate::pipeline::gate::{self, GateKeeper};
use crate::pipeline::load::Loader;
use crate::target::ahead::Ahead;
use crate::target::reception::{Reception, Stage};
use crate::units::Pfn;
use crate::wire::control::Message;

impl Reception {
    /// Loads and places until the source has paused the guest and its last round and state are here.
    pub(super) fn fill(&mut self) -> Result<(), Error> {
        if let (true, Ok(hold)) = (self.shape.lazy, &self.lazy) {
            hold.keep(&self.door.session(self.shape.lanes))?;
        }
        if let Some(disks) = self.disks.clone().filter(|_| self.shape.refers) {
            self.load_from(&disks)?;
            if let Some(hold) = self.holds_ahead() {
                self.landing.hold_ahead_with(&hold);
                let ahead = Ahead::new(Arc::clone(&self.landing), Arc::clone(&self.finish));
                self.spawn("pf-ahead", |_| ahead.run());
            }
            if self.shape.lazy && self.lazy.is_ok() {
                for _ in 0..1 + usize::from(self.gate.is_some()) {
                    let (landing, disks) = (Arc::clone(&self.landing), Arc::clone(&disks));
                    self.small.push(SmallLoader::new(landing, disks, self.shape.key.clone())?);
                }
            }
        }
        self.wait_for(|r| {
            r.heard.last_round.is_some_and(|round| r.finished_round() >= round)
                && r.heard.state.len() == r.heard.state_bytes
        })
    }

    /// Starts the loader.
    pub(super) fn load_from(&mut self, disks: &Arc<dyn Disks>) -> Result<(), Error> {
        let loader = Loader::new(
            Arc::clone(&self.landing),
            Arc::clone(disks),
            self.shape.key.clone(),
            self.config.depth,
            self.config.direct,
            Arc::clone(&self.finish),
        )?;
        self.spawn("pf-load", |_| loader.run());
        Ok(())
    }

    /// Verifies where asked for, makes sure of every page, and says that the guest could start.
    pub(super) fn prepare(&mut self) -> Result<(), Error> {
        if self.shape.verify {
            self.wait_for(|r| r.heard.verify_round.is_some_and(|round| r.finished_round() >= round))?;
            self.no_mismatch("the guest goes on at the source")?;
        }
        match self.lazy.clone() {
            Ok(hold) if self.shape.lazy => {
                if hold.holds_ahead() {
                    self.wait_for(|r| r.landing.in_the_way() == 0)?;
                    self.landing.hushed.store(true, SeqCst);
                }
                self.hold_back(&hold)?;
            }
            _ => {
                self.wait_for(|r| r.landing.table.outstanding() == 0)?;
                self.landing.seal()?;
            }
        }
        self.life.load_state(&self.heard.state)?;
        self.stage = Stage::Ready;
        self.expect_source();
        self.tell(&Message::Ready).or_else(|error| match error {
            // It may dial again: what it then hears is the same.
            Error::Net(_) => Ok(()),
            other => Err(other),
        })
    }

    /// What holds pages back while the rounds come in, where that is how it is done.
    pub(super) fn holds_ahead(&self) -> Option<Arc<dyn HoldBack>> {
        let hold = self.lazy.as_ref().ok().filter(|hold| self.shape.lazy && hold.holds_ahead())?;
        // Without disks there are no references, and nothing is ever outstanding.
        self.disks.as_ref().map(|_| Arc::clone(hold))
    }

    /// Holds back what is outstanding and starts those who will load it for the running guest.
    fn hold_back(&mut self, hold: &Arc<dyn HoldBack>) -> Result<(), Error> {
        let outstanding = self.landing.hold_back(hold)?;
        self.lazy_pages = outstanding.count();
        let Some(disks) = self.disks.clone().filter(|_| self.lazy_pages > 0) else { return Ok(()) };
        let mut small = || self.small.pop().expect("made while the rounds came in");
        let server = FaultServer {
            landing: Arc::clone(&self.landing),
            hold: Arc::clone(hold),
            loader: Some(small()),
            urgent: Arc::clone(&self.urgent),
            finish: Arc::clone(&self.finish),
        };
        let keeper = match self.gate.clone() {
            Some(gate) => {
                gate::close(&*gate, &*disks, &self.landing, &outstanding)?;
                let landing = Arc::clone(&self.landing);
                let finish = Arc::clone(&self.finish);
                Some(GateKeeper { gate, landing, loader: small(), outstanding, finish })
            }
            None => None,
        };
        self.spawn("pf-faults", |_| server.run());
        if let Some(keeper) = keeper {
            self.spawn("pf-gate", |_| keeper.run());
        }
        Ok(())
    }

    /// An error if any page differed from its digest.
    pub(super) fn no_mismatch(&self, outcome: &'static str) -> Result<(), Error> {
        match self.landing.counts.mismatched.load(SeqCst) {
            0 => Ok(()),
            count => {
                let first = Pfn(self.landing.counts.first_mismatch.load(SeqCst).saturating_sub(1));
                Err(Error::Mismatch { count, first, outcome })
            }
        }
    }
}
