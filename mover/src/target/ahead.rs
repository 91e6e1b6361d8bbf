//! Holds outstanding pages back while the rounds still come in, where doing so takes long: at the pause nothing is left to be
//! done but to load those that can't be held back, or should not be.
//!
//! One task. It begins at the end of the guest's memory, the loader at the beginning of its disks. Pages that were
//! referenced again after the first round are the loader's: the guest will want them at once.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::bitmap::{SharedBitmap, bits_of};
use crate::error::Error;
use crate::pipeline::landing::Landing;
use crate::pipeline::table::State;
use crate::units::Pfn;

/// How long to wait for references before looking whether the rounds are over.
const GLANCE: Duration = Duration::from_millis(100);

/// The task.
pub(super) struct Ahead {
    landing: Arc<Landing>,
    finish: Arc<AtomicBool>,
    /// Pages that could not be held back when they were tried.
    refused: SharedBitmap,
}

impl Ahead {
    /// For the guest that lands on `landing`.
    pub(super) fn new(landing: Arc<Landing>, finish: Arc<AtomicBool>) -> Self {
        let refused = SharedBitmap::new(landing.table.pages().entries());
        Self { landing, finish, refused }
    }

    /// Works until the guest is being started, or the migration is over.
    pub(super) fn run(self) -> Result<(), Error> {
        while self.goes_on() {
            let heard = self.landing.work.heard();
            if !self.sweep()? {
                self.landing.runtime.wait(&self.landing.work, heard, GLANCE);
            }
        }
        Ok(())
    }

    fn goes_on(&self) -> bool {
        self.landing.is_early() && !self.finish.load(SeqCst) && !self.landing.failure.is_set()
    }

    /// Looks at every page that is wanted; whether any was held back.
    fn sweep(&self) -> Result<bool, Error> {
        let table = &self.landing.table;
        let mut some = false;
        for word in (0..table.wanted.words()).rev() {
            let candidates = table.wanted.word(word) & !table.hot.word(word) & !self.refused.word(word);
            for pfn in bits_of(candidates).map(|bit| Pfn::at(word * 64 + bit)) {
                if !self.goes_on() {
                    return Ok(true);
                }
                some |= self.hold(pfn)?;
            }
        }
        Ok(some)
    }

    fn hold(&self, pfn: Pfn) -> Result<bool, Error> {
        let State::Outstanding(version) = self.landing.table.state(pfn) else { return Ok(false) };
        if self.landing.is_ahead(pfn) {
            return Ok(false);
        }
        let held = self.landing.hold_ahead(pfn, version)?;
        if !held {
            self.refused.set(pfn.index());
        } else if self.landing.in_the_way() == 0 {
            self.landing.runtime.ring(&self.landing.work);
        }
        Ok(held)
    }
}
