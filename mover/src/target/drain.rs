//! The guest starts; what is outstanding is loaded behind it; the source is let go.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::error::Error;
use crate::journal::Entry;
use crate::target::reception::{Reception, Stage};
use crate::wire::control::Message;

impl Reception {
    /// Waits for the commit, records it, and starts the guest.
    pub(super) fn start(&mut self) -> Result<(), Error> {
        let redial_for = if self.config.toolstack { Duration::ZERO } else { self.config.redial_for };
        self.wait_for(|r| r.heard.commit || r.lost_for(redial_for))?;
        if !self.heard.commit {
            // Nothing has been started, and the record will say that nothing will be.
            let doing = "the commit was waited for; the guest is given up here and stays with the source";
            let seconds = redial_for.as_secs();
            return Err(crate::error::NetError::Stalled { peer: "the source".into(), seconds, doing }.into());
        }
        self.journal.record(Entry::Started)?;
        // If it can't be started it has not run, and the way out records and tells that it never will.
        self.life.start()?;
        self.stage = Stage::Started;
        self.landing.hushed.store(false, SeqCst);
        self.around.runtime.ring(&self.landing.work);
        self.tell_if_there(&Message::Started)
    }

    pub(super) fn lost_for(&self, limit: Duration) -> bool {
        self.lost_at.is_some_and(|lost| self.around.runtime.now().since(lost) >= limit)
    }

    /// Until nothing is outstanding; then until the source knows.
    pub(super) fn drain(&mut self) -> Result<(), Error> {
        if let Err(error) = self.load_rest() {
            // A guest whose pages can't be had any more is stopped; it never runs on wrong ones.
            self.life.stop()?;
            return Err(error);
        }
        self.let_source_go()
    }

    /// Tells the source that it is not needed any more, and waits until it knows.
    pub(super) fn let_source_go(&mut self) -> Result<(), Error> {
        self.stage = Stage::Drained;
        let account = self.account();
        self.tell_if_there(&Message::Drained(account))?;
        // The source may have gone by itself, or dial again as long as it does that; it is given the time to hear that all is
        // well, so that no operator has to tell it.
        let patience = self.config.patience.max(self.config.redial_for);
        self.wait_for(|r| r.heard.finished || r.lost_for(patience))
    }

    fn load_rest(&mut self) -> Result<(), Error> {
        let redial_for = self.config.redial_for;
        self.wait_for(|r| r.landing.table.outstanding() == 0 || r.lost_for(redial_for) && r.needs_source())?;
        if self.landing.table.outstanding() > 0 {
            let pfn = (0..self.landing.table.pages().0).map(crate::units::Pfn).find(|pfn| {
                self.landing.table.ask.get(pfn.index()) || self.landing.table.asked.get(pfn.index())
            });
            let text = format!(
                "{} pages can't be had any more, the first is {}: their blocks on disk have changed and the source has \
                 not been reached for {} s. The guest is stopped and keeps its memory",
                self.landing.table.outstanding(),
                pfn.unwrap_or_default(),
                redial_for.as_secs()
            );
            return Err(crate::error::GuestError::State(text).into());
        }
        self.all_loaded()
    }

    /// Nothing is outstanding: nothing is held back any more.
    pub(super) fn all_loaded(&mut self) -> Result<(), Error> {
        self.no_mismatch("the guest was stopped")?;
        self.finish.store(true, SeqCst);
        if let (true, Ok(hold)) = (self.shape.lazy, &self.lazy) {
            hold.finish()?;
        }
        Ok(())
    }

    /// Whether some outstanding page can only come from the source.
    fn needs_source(&self) -> bool {
        !self.landing.table.ask.is_clear() || !self.landing.table.asked.is_clear()
    }

    fn tell_if_there(&mut self, message: &Message) -> Result<(), Error> {
        match self.tell(message) {
            // A lost source hears it when it dials again.
            Err(Error::Net(_)) | Ok(()) => Ok(()),
            Err(other) => Err(other),
        }
    }
}
