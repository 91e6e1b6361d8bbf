//! Batches of another domain's pages: their types, and a window over those with contents.
#![forbid(unsafe_code)]

use std::io;

use mover::memory::GuestPage;
use mover::units::Pfn;

use super::common::{Domain, LOG, fill_words};
use super::{Batch, DomainError};
use crate::abi::{Access, ForeignWindow, HypercallBuffer, Xen};
use crate::stream::{PageEntry, PageType};

/// Pages of a batch: four records' worth, 16 MiB. What a mapping costs besides its pages is paid once for all of
/// them, and a cancelled save still ends within moments.
pub const BATCH_PAGES: usize = 4096;
/// Pages whose types are asked for at once (the hypervisor's limit).
const TYPES: usize = 1024;

/// Types of pages and a window over them, for one batch after the other.
#[derive(Debug)]
pub(super) struct Pages {
    frames: HypercallBuffer,
    window: ForeignWindow,
    types: Vec<PageType>,
    /// Frames to be mapped.
    wanted: Vec<u64>,
    /// For each page with contents, where in the window it is.
    slots: Vec<usize>,
}

impl Pages {
    /// For batches of [`BATCH_PAGES`].
    pub(super) fn new(xen: &Xen) -> io::Result<Self> {
        Ok(Self {
            frames: xen.buffer(TYPES * size_of::<u64>())?,
            window: ForeignWindow::reserve(xen, BATCH_PAGES)?,
            types: Vec::with_capacity(BATCH_PAGES),
            wanted: Vec::with_capacity(BATCH_PAGES),
            slots: Vec::with_capacity(BATCH_PAGES),
        })
    }

    /// Asks for the types of `frames`.
    pub(super) fn ask(&mut self, domain: &mut Domain, frames: &[u64]) -> Result<(), DomainError> {
        self.types.clear();
        for some in frames.chunks(TYPES) {
            fill_words(&mut self.frames, some);
            domain.xen.page_types(domain.id, &mut self.frames, some.len()).map_err(DomainError::call(
                "find out the types of pages",
                domain.id,
                LOG,
            ))?;
            self.types.extend(self.frames.words()[..some.len()].iter().map(|&answer| {
                let bits = u32::try_from(answer & 0xffff_ffff).unwrap_or(u32::MAX);
                // Types this program does not know have contents like any other page.
                PageType::from_pfinfo(bits).unwrap_or(PageType::Normal)
            }));
        }
        Ok(())
    }

    /// Maps those of `frames` whose types, last asked for, have contents; `pfns` are what the guest calls them.
    /// Fills in `batch`. With `named` pages without contents stand in the batch too.
    pub(super) fn map(
        &mut self,
        domain: &Domain,
        pfns: &[u64],
        frames: &[u64],
        still: bool,
        named: bool,
        batch: &mut Batch,
    ) -> Result<(), DomainError> {
        self.wanted.clear();
        self.wanted.extend(frames.iter().zip(&self.types).filter(|(_, t)| t.has_data()).map(|(f, _)| *f));
        self.slots.clear();
        batch.entries.clear();
        batch.deferred.clear();
        let errors = self.window.map(domain.id, &self.wanted, Access::Read).map_err(DomainError::call(
            "map pages",
            domain.id,
            LOG,
        ))?;
        let mut slot = 0;
        for (&pfn, &page_type) in pfns.iter().zip(&self.types) {
            let mut page_type = page_type;
            if page_type.has_data() {
                match errors[slot] {
                    0 => self.slots.push(slot),
                    // Gone since its type was asked for, as when the guest gives memory back.
                    _ if !still => {
                        batch.deferred.push(pfn);
                        page_type = PageType::Invalid;
                    }
                    error => {
                        let source = io::Error::from_raw_os_error(-error);
                        return Err(DomainError::Map { pfn: Pfn(pfn), domain: domain.id, source });
                    }
                }
                slot += 1;
            }
            if named || page_type.has_data() {
                batch.entries.push(PageEntry::new(Pfn(pfn), page_type));
            }
        }
        Ok(())
    }

    /// Page `at` of the batch, counted over those with contents.
    pub(super) fn page(&self, at: usize) -> Option<GuestPage<'_>> {
        self.window.page(*self.slots.get(at)?)
    }

    /// Unmaps the batch.
    pub(super) fn release(&mut self) -> io::Result<()> {
        self.slots.clear();
        self.window.clear()
    }
}
