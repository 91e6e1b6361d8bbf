//! Memory for a domain that is being restored: as many pages a call as come together, superpages where 512 aligned
//! frames come in one batch.
#![forbid(unsafe_code)]

use std::io;

use mover::units::u64_of;

use super::DomainError;
use super::common::{Domain, LOG, fill_words};
use super::pages::BATCH_PAGES;
use crate::abi::{HypercallBuffer, Xen};
use crate::frames::{FrameSet, REGION_FRAMES};

/// Pages of a superpage, and its order.
const SUPER_PAGES: u64 = REGION_FRAMES;
const SUPER_ORDER: u32 = 9;

/// Populates frames.
#[derive(Debug)]
pub(super) struct Populate {
    populated: FrameSet,
    extents: HypercallBuffer,
    /// Most pages the domain may have.
    max: u64,
    fresh: Vec<u64>,
    single: Vec<u64>,
    whole: Vec<u64>,
}

impl Populate {
    /// For a domain that may have `max` pages.
    pub(super) fn new(xen: &Xen, max: u64) -> io::Result<Self> {
        Ok(Self {
            populated: FrameSet::default(),
            extents: xen.buffer(BATCH_PAGES * size_of::<u64>())?,
            max,
            fresh: Vec::with_capacity(BATCH_PAGES),
            single: Vec::with_capacity(BATCH_PAGES),
            whole: Vec::new(),
        })
    }

    /// Gives memory to those of `frames` that have none, superpages included if `superpages`. `placed` is told of
    /// every page: the guest's frame and, for a PV guest, the machine frame.
    pub(super) fn ensure(
        &mut self,
        domain: &mut Domain,
        frames: impl Iterator<Item = u64>,
        superpages: bool,
        mut placed: impl FnMut(u64, u64),
    ) -> Result<(), DomainError> {
        self.fresh.clear();
        let populated = &self.populated;
        self.fresh.extend(frames.filter(|&frame| !populated.has(frame)));
        if self.fresh.is_empty() {
            return Ok(());
        }
        if self.populated.count() + u64_of(self.fresh.len()) > self.max {
            return Err(DomainError::TooMany { domain: domain.id, max: self.max });
        }
        self.split(superpages);
        if !self.whole.is_empty() {
            self.populate_whole(domain)?;
        }
        if !self.single.is_empty() {
            fill_words(&mut self.extents, &self.single);
            let wanted = self.single.len();
            let done = domain
                .xen
                .populate(domain.id, &mut self.extents, wanted, 0)
                .map_err(DomainError::call("allocate memory", domain.id, LOG))?;
            if done < wanted {
                return Err(DomainError::NoMemory { domain: domain.id, done, wanted });
            }
            for (&frame, &machine) in self.single.iter().zip(self.extents.words()) {
                self.populated.insert(frame);
                placed(frame, machine);
            }
        }
        Ok(())
    }

    /// Sorts the fresh frames into whole superpages and single pages.
    fn split(&mut self, superpages: bool) {
        self.single.clear();
        self.whole.clear();
        let mut at = 0;
        while let Some(&first) = self.fresh.get(at) {
            let run = self.fresh[at..].iter().zip(first..).take_while(|(frame, next)| *frame == next).count();
            let aligned = first.is_multiple_of(SUPER_PAGES) && u64_of(run) >= SUPER_PAGES;
            if superpages && aligned && self.populated.is_empty_in(first / SUPER_PAGES) {
                self.whole.push(first);
                at += mover::units::usize_of(SUPER_PAGES);
            } else {
                // Up to where a superpage could begin.
                let until = (SUPER_PAGES - first % SUPER_PAGES).min(u64_of(run));
                self.single.extend(first..first + until);
                at += mover::units::usize_of(until);
            }
        }
    }

    /// Populates whole superpages; those for which the host has no contiguous memory go to the single pages.
    fn populate_whole(&mut self, domain: &mut Domain) -> Result<(), DomainError> {
        fill_words(&mut self.extents, &self.whole);
        let done = domain
            .xen
            .populate(domain.id, &mut self.extents, self.whole.len(), SUPER_ORDER)
            .map_err(DomainError::call("allocate memory", domain.id, LOG))?;
        for &first in &self.whole[..done] {
            (first..first + SUPER_PAGES).for_each(|frame| self.populated.insert(frame));
        }
        for &first in &self.whole[done..] {
            self.single.extend(first..first + SUPER_PAGES);
        }
        Ok(())
    }

    /// Whether a frame has memory.
    pub(super) fn has(&self, frame: u64) -> bool {
        self.populated.has(frame)
    }
}
