//! A PV guest to be saved.
#![forbid(unsafe_code)]

use mover::bitmap::Bitmap;
use mover::memory::PageBuf;

use super::frames::GuestFrames;
use super::{NO_FRAME, tables, vcpu};
use crate::abi::Part;
use crate::domain::common::{Domain, LOG};
use crate::domain::pages::{BATCH_PAGES, Pages};
use crate::domain::{Batch, DomainError, FinalState, KindState, Life, LogRead, Source, StaticState};
use crate::stream::{DomainHeader, GuestType, P2mFrames, PageEntry, PageType, PvWidth};

/// A PV guest to be saved.
pub struct PvSource {
    domain: Domain,
    header: DomainHeader,
    frames: GuestFrames,
    pages: Pages,
    machine: Vec<u64>,
    contents: Vec<Content>,
    /// Page tables of the batch, with the guest's frames in them; used from the start for every batch.
    tables: Vec<PageBuf>,
}

/// Where a page's content is.
#[derive(Clone, Copy, Debug)]
enum Content {
    /// In the window, counted over pages with contents.
    Mapped(usize),
    /// Among the translated page tables.
    Table(usize),
}

impl PvSource {
    /// Prepares to save `domain`.
    ///
    /// # Errors
    /// The hypervisor refused, there is no memory, or the guest's tables can't be followed.
    pub fn new(mut domain: Domain) -> Result<Self, DomainError> {
        refuse_32_bits(&mut domain)?;
        let (xen_major, xen_minor) = domain.release_of_xen()?;
        let header = DomainHeader { guest: GuestType::Pv, xen_major, xen_minor };
        let frames = GuestFrames::new(&mut domain)?;
        let fail = DomainError::call("make room for pages", domain.id, LOG);
        let pages = Pages::new(&domain.xen).map_err(fail)?;
        let machine = Vec::with_capacity(BATCH_PAGES);
        let contents = Vec::with_capacity(BATCH_PAGES);
        Ok(Self { domain, header, frames, pages, machine, contents, tables: Vec::new() })
    }

    /// Has the batch's page tables translated, and notes where every content is.
    fn translate(&mut self, still: bool, batch: &mut Batch) -> Result<(), DomainError> {
        self.contents.clear();
        let (mut mapped, mut used) = (0, 0);
        for entry in batch.entries.iter_mut().filter(|entry| entry.has_data()) {
            let PageType::Table { level, .. } = entry.page_type() else {
                self.contents.push(Content::Mapped(mapped));
                mapped += 1;
                continue;
            };
            if used == self.tables.len() {
                self.tables.push(PageBuf::zeroed());
            }
            let table = &mut self.tables[used];
            if let Some(page) = self.pages.page(mapped) {
                page.copy_to(table);
            }
            mapped += 1;
            match tables::normalise(table, level, |machine| self.frames.guest_frame(machine)) {
                Ok(()) => {
                    self.contents.push(Content::Table(used));
                    used += 1;
                }
                // A table being changed while it is read, or a page that is a table no more.
                Err(_) if !still => {
                    batch.deferred.push(entry.pfn().0);
                    *entry = PageEntry::new(entry.pfn(), PageType::Invalid);
                }
                Err(error) => {
                    let what = format!("page table at {} (level {level}): {error}", entry.pfn());
                    return Err(DomainError::Guest { domain: self.domain.id, what });
                }
            }
        }
        Ok(())
    }
}

/// Fails for a guest of 32 bits.
pub(super) fn refuse_32_bits(domain: &mut Domain) -> Result<(), DomainError> {
    let id = domain.id;
    match domain.xen.address_size(id).map_err(DomainError::call("read the address size", id, LOG))? {
        64 => Ok(()),
        bits => Err(DomainError::Unsupported {
            domain: id,
            why: format!("it is a PV guest of {bits} bits"),
            remedy: "Move it with Xen's own tools, or run it as PVH",
        }),
    }
}

impl Source for PvSource {
    fn header(&self) -> DomainHeader {
        self.header
    }
    fn pages(&self) -> u64 {
        self.frames.pages()
    }
    fn batch_pages(&self) -> usize {
        BATCH_PAGES
    }
    fn static_state(&mut self) -> Result<StaticState, DomainError> {
        let (cpuid, msrs) = self.domain.policies()?;
        Ok(StaticState { cpuid, msrs, pv: Some(PvWidth::Bits64) })
    }
    fn table_frames(&self) -> Option<P2mFrames> {
        Some(self.frames.holders())
    }
    fn life(&mut self) -> Result<Life, DomainError> {
        self.domain.life()
    }
    fn check(&mut self) -> Result<(), DomainError> {
        if self.frames.unmoved() {
            return Ok(());
        }
        let what =
            "it moved its table of frames while it was being moved itself, as when memory is added".into();
        Err(DomainError::Guest { domain: self.domain.id, what })
    }
    fn log_on(&mut self) -> Result<(), DomainError> {
        self.domain.log_on(self.frames.pages())
    }
    fn log_read(&mut self, which: LogRead, into: &mut Bitmap) -> Result<u64, DomainError> {
        self.domain.log_read(which, into)
    }
    fn log_off(&mut self) -> Result<(), DomainError> {
        self.domain.log_off()
    }
    fn slow_down(&mut self, percent: u8) -> Result<(), DomainError> {
        self.domain.slow_down(percent)
    }
    fn full_speed(&mut self) -> Result<(), DomainError> {
        self.domain.full_speed()
    }
    fn fetch(&mut self, pfns: &[u64], still: bool, batch: &mut Batch) -> Result<(), DomainError> {
        self.machine.clear();
        self.machine.extend(pfns.iter().map(|&pfn| self.frames.machine_frame(pfn)));
        self.pages.ask(&mut self.domain, &self.machine)?;
        // Pages without contents are named: one may have been a page table in an earlier round.
        self.pages.map(&self.domain, pfns, &self.machine, still, true, batch)?;
        if !still {
            // Given back now, but the guest may have memory there again before it stops; no log tells.
            let gone = pfns.iter().zip(&self.machine).filter(|(_, machine)| **machine == NO_FRAME);
            batch.deferred.extend(gone.map(|(pfn, _)| *pfn));
        }
        self.translate(still, batch)
    }
    fn content(&self, at: usize) -> Part<'_> {
        match self.contents[at] {
            Content::Table(table) => Part::Bytes(&self.tables[table].0),
            Content::Mapped(slot) => {
                let page = self.pages.page(slot);
                assert!(page.is_some(), "page {at} is not in the batch");
                page.map_or(Part::Bytes(&[]), Part::Page)
            }
        }
    }
    fn release(&mut self) -> Result<(), DomainError> {
        self.contents.clear();
        self.pages.release().map_err(DomainError::call("unmap pages", self.domain.id, LOG))
    }
    fn final_state(&mut self) -> Result<FinalState, DomainError> {
        let tsc = self.domain.tsc()?;
        let shared_info = self.frames.shared_info();
        let vcpus = vcpu::read_all(&mut self.domain, &self.frames)?;
        Ok(FinalState { tsc, kind: KindState::Pv { shared_info, vcpus } })
    }
}
