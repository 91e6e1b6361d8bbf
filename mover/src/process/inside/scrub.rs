//! The checker: goes through all of memory at a set rate, for ever, and in full on demand.
//!
//! Pages that are not in memory are left alone where they may be: free ones (they read as zero, and reading would
//! allocate them), and any page while some are held back (reading would ask for them as if a program had).

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::frames::Kind;
use super::layout::Layout;
use super::program::Inside;
use crate::kernel::resident;
use crate::memory::PageBuf;
use crate::units::{Pfn, u64_of, usize_of};

/// The scrubber's beat.
const BEAT: Duration = Duration::from_millis(50);
const BEATS_PER_SECOND: u64 = 20;

/// When the scrubber may work.
#[derive(Debug, Default)]
pub(crate) struct ScrubSwitch {
    /// There is something to check: booted, or started.
    pub(crate) on: AtomicBool,
    /// Pages are held back.
    pub(crate) holding: AtomicBool,
    ended: Mutex<bool>,
    ending: Condvar,
}

impl ScrubSwitch {
    /// Ends the scrubber's thread.
    pub(crate) fn end(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.ending.notify_all();
    }
    /// Waits a beat; whether to go on.
    fn beat(&self) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let (ended, _) = self
            .ending
            .wait_timeout_while(ended, BEAT, |ended| !*ended)
            .unwrap_or_else(PoisonError::into_inner);
        !*ended
    }
}

/// Starts the scrubber.
pub(crate) fn spawn(
    inside: &Arc<Inside>,
    switch: &Arc<ScrubSwitch>,
    pages_per_second: u64,
) -> std::io::Result<()> {
    let (inside, switch) = (Arc::clone(inside), Arc::clone(switch));
    std::thread::Builder::new().name("scrubber".to_owned()).spawn(move || {
        let mut at = 0;
        while switch.beat() {
            if switch.on.load(Ordering::SeqCst) {
                let pages = pages_per_second.div_ceil(BEATS_PER_SECOND);
                at = inside.scrub(at, pages, switch.holding.load(Ordering::SeqCst));
            }
        }
    })?;
    Ok(())
}

impl Inside {
    /// Checks so many pages from `at` on; where to go on.
    fn scrub(&self, mut at: u64, pages: u64, holding: bool) -> u64 {
        let all = self.frames.layout.pages;
        let mut left = pages.min(all);
        while left > 0 {
            let piece = left.min(u64_of(resident::PAGES_PER_CALL)).min(all - at);
            self.check_range(Pfn(at), piece, holding);
            left -= piece;
            at += piece;
            if at == all {
                at = 0;
                if !holding {
                    self.frames.ledger.count_full_check();
                }
            }
        }
        at
    }

    /// Checks all pages now.
    pub(crate) fn check_all(&self, holding: bool) {
        self.scrub(0, self.frames.layout.pages, holding);
    }

    fn check_range(&self, first: Pfn, pages: u64, holding: bool) {
        let frames = &self.frames;
        let mut scratch = PageBuf::zeroed();
        // Without an answer every page counts as there: then absent free pages are allocated, no more.
        let there = resident::resident(&frames.memory, first, usize_of(pages))
            .unwrap_or([true; resident::PAGES_PER_CALL]);
        let described = |pfn: Pfn| {
            let page = frames.layout.descriptor_page(pfn);
            resident::resident(&frames.memory, page, 1).is_ok_and(|there| there[0])
        };
        let mut known = (usize::MAX, false);
        for (n, pfn) in (first.0..first.0 + pages).map(Pfn).enumerate() {
            if holding {
                let zone = Layout::zone_of(pfn);
                if known.0 != zone {
                    known = (zone, described(pfn));
                }
                if !there[n] || !known.1 {
                    continue;
                }
            } else if !there[n] && pfn.0 >= frames.layout.metadata && frames.glance(pfn).kind == Kind::Free {
                continue;
            }
            frames.check(pfn, &mut scratch);
        }
    }
}
