//! The guest is paused: the last round, the state outside memory, and where asked for a digest of every page.

use crate::error::Error;
use crate::pipeline::work::Purpose;
use crate::source::migration::{Hold, Migration, ms};
use crate::wire::control::{Message, STATE_CHUNK_BYTES};

impl Migration {
    /// Pauses the guest and sends all that the target does not have yet.
    pub(super) fn stop(&mut self) -> Result<(), Error> {
        // What the guest has written so far is readable by the other host before any page refers to it; what it writes
        // from here on is not referred to.
        if self.config.mode.refers() {
            self.disks.flush()?;
        }
        let began = self.around.runtime.now();
        self.paused_at = began;
        // Set before the call: even a pause that fails half-way is to be undone.
        self.hold = Hold::Paused;
        self.life.pause()?;
        // The guest reads on the target what it wrote here, referred to or not.
        self.disks.flush()?;
        self.part("pause", began);
        let began = self.around.runtime.now();
        self.harvest()?;
        if let Some(keeper) = &mut self.keeper {
            keeper.forget_written()?;
        }
        let pages = self.take_next();
        self.part("last harvest", began);
        self.inform_judges();
        let number = self.post(Purpose::Last, &pages, None)?;
        let state = self.life.save_state()?;
        let length = u32::try_from(state.len()).unwrap_or(u32::MAX);
        self.summary.state_bytes = length.into();
        self.tell(&Message::Final(number, length))?;
        for chunk in state.chunks(STATE_CHUNK_BYTES) {
            self.tell(&Message::State(chunk.to_vec()))?;
        }
        self.wait_for(|m| m.heard.placed >= number)
    }

    /// Has the target compare every page with what it is here. The time is taken out of the downtime in the summary,
    /// for only verification spends it, and told apart.
    pub(super) fn verify(&mut self) -> Result<(), Error> {
        let began = self.around.runtime.now();
        let number = self.round.as_ref().map_or(0, |round| round.number) + 1;
        self.tell(&Message::Verify(number))?;
        let mut all = crate::bitmap::Bitmap::new(self.next.len());
        all.set_all();
        let posted = self.post(Purpose::Digests, &all, None)?;
        debug_assert_eq!(posted, number);
        self.wait_for(|m| m.heard.placed >= number)?;
        self.summary.verify_ms = ms(self.around.runtime.now().since(began));
        Ok(())
    }
}
