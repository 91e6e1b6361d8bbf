//! A restore of pages that were left on disks: they are loaded in sweeps along the disks, checked one by one, and placed.
//!
//! libxl attaches the guest's disks only behind the stream, so they are opened here, by the paths they had at the save or those
//! that the settings name. A page that does not stand there any more ends the restore: nobody has it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mover::disk::Disks;
use mover::disk::identity::open_same;
use mover::error::DiskError;
use mover::limits::READ_DEPTH;
use mover::memory::PageBuf;
use mover::pipeline::load::SWEEP_PAGES;
use mover::pipeline::sweep::{End, Found, Sweeper};
use mover::pipeline::table::Wanted;
use mover::units::{PAGE_BYTES, u64_of};

use super::phases::Restore;
use super::{Event, RestoreError, Toolstack};
use crate::domain::Target;
use crate::stream::{FrozenDisks, PageEntry, PageType, Reference};

/// What to do about a page that is not on its disk any more.
const REMEDY: &str = "The disk has been written since the save: bring it, or its snapshot, back to what it was then. `pageferry \
                      stream verify --disks` says whether a file and its disks still go together";

/// The disks, open, and what is to be loaded from them.
pub(super) struct Thawing {
    disks: FrozenDisks,
    sweeper: Sweeper,
    pending: Vec<Wanted>,
}

/// Opens the disks that `frozen` names on this host, at `paths` where those name them.
///
/// # Errors
/// One is missing, can't be read, or is another one.
pub fn open(frozen: &FrozenDisks, paths: &BTreeMap<String, PathBuf>) -> Result<Arc<dyn Disks>, DiskError> {
    Ok(Arc::new(open_same(&frozen.disks, paths)?))
}

/// A sentence about a reference that does not hold; none for one that does.
#[must_use]
pub fn fault(frozen: &FrozenDisks, page: &Wanted, found: &Found<'_>) -> Option<String> {
    let place = frozen.words(page.block);
    match found {
        Found::Right(_) => None,
        Found::Other => Some(format!("{} does not stand at {place} any more", page.pfn)),
        Found::Unreadable(error) => Some(format!("{} can't be read from {place}: {error}", page.pfn)),
    }
}

impl<T: Target, K: Toolstack> Restore<'_, T, K> {
    /// Pages will come from these disks.
    pub(super) fn begin_thawing(&mut self, disks: FrozenDisks) -> Result<(), RestoreError> {
        let names = disks.names().collect::<Vec<_>>().join(", ");
        let opened = open(&disks, &self.options.disk_paths).map_err(|error| RestoreError::Frozen {
            what: format!(
                "pages of the guest were left on {names} when it was saved, and can't be loaded from there: {error}"
            ),
        })?;
        for note in opened.notes() {
            self.toolstack.report(&Event::Note(&note));
        }
        self.toolstack.report(&Event::Detail(&format!("pages are loaded from {names}")));
        let sweeper = Sweeper::new(opened, disks.check_key(), READ_DEPTH)?;
        self.thawing = Some(Thawing { disks, sweeper, pending: Vec::new() });
        Ok(())
    }

    /// Takes references in, and loads when there are enough for a sweep.
    pub(super) fn thaw(&mut self, references: &[Reference]) -> Result<(), RestoreError> {
        let Some(thawing) = &mut self.thawing else {
            unreachable!("the reader lets no references pass before their disks")
        };
        thawing.pending.extend(references.iter().map(|reference| reference.wanted()));
        if thawing.pending.len() >= SWEEP_PAGES { self.load() } else { Ok(()) }
    }

    /// Loads, checks and places what is pending.
    pub(super) fn load(&mut self) -> Result<(), RestoreError> {
        let Some(mut thawing) = self.thawing.take() else { return Ok(()) };
        let Thawing { disks, sweeper, pending } = &mut thawing;
        pending.sort_unstable_by_key(|page| (page.block, page.pfn));
        let stop = self.stop;
        let go_on = || !stop.load(Ordering::Relaxed);
        let mut page = PageBuf::zeroed();
        let ended = sweeper.sweep(pending, &go_on, &mut |pages, found| {
            for (page, found) in pages.iter().zip(found) {
                if let Some(what) = fault(disks, page, found) {
                    return Err(RestoreError::Frozen { what: format!("{what}. {REMEDY}") });
                }
            }
            let size = self.target.batch_pages();
            pages.chunks(size).zip(found.chunks(size)).try_for_each(|(p, f)| self.put(p, f, &mut page))
        })?;
        if ended == End::Stopped {
            return Err(RestoreError::Cancelled);
        }
        pending.clear();
        self.toolstack.report(&Event::Pages(self.restored.pages + self.restored.references));
        self.thawing = Some(thawing);
        Ok(())
    }

    /// Places pages that are right.
    fn put(&mut self, pages: &[Wanted], found: &[Found<'_>], page: &mut PageBuf) -> Result<(), RestoreError> {
        let entries: Vec<_> = pages.iter().map(|page| PageEntry::new(page.pfn, PageType::Normal)).collect();
        self.target.place(&entries)?;
        for (at, found) in found.iter().enumerate() {
            if let Found::Right(bytes) = found {
                page.0.copy_from_slice(&bytes[..]);
                self.target.page(at).copy_from(page);
            }
        }
        self.target.settle()?;
        self.restored.references += u64_of(pages.len());
        self.restored.disk_bytes += u64_of(pages.len() * PAGE_BYTES);
        Ok(())
    }
}
