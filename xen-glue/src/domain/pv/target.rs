//! A PV guest to be restored.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;

use mover::memory::{GuestPage, PageBuf};
use mover::units::{Pfn, u64_of, usize_of};
use zerocopy::IntoBytes;

use super::source::refuse_32_bits;
use super::{ENTRIES, NO_FRAME, PFN_LIMIT, start_info, tables, vcpu, word};
use crate::abi::{Access, ForeignWindow, HypercallBuffer, MmuextOp, SharedInfo, VcpuContext};
use crate::domain::common::{Domain, LOG};
use crate::domain::pages::BATCH_PAGES;
use crate::domain::populate::Populate;
use crate::domain::{
    DomainError, FinalState, Frames, KindState, StaticState, Target, Wiring, difference, grants,
};
use crate::stream::{GuestType, P2mFrames, PageEntry, PageType, PvWidth, VcpuKind, VcpuState};

/// Page tables pinned with one hypercall.
const PINS: usize = 1024;

/// A PV guest to be restored.
#[derive(Debug)]
pub struct PvTarget {
    domain: Domain,
    populate: Populate,
    window: ForeignWindow,
    /// A machine frame for each of the guest's, 0 where it has none: the machine's first belongs to no guest. Not
    /// touched where nothing is, so that a guest said to be large takes no memory for it.
    machine: Vec<u64>,
    /// What each of them is: the four bits of the stream.
    types: Vec<u8>,
    /// The guest's frames that hold its own table.
    holders: Vec<u64>,
    /// Of the batch: frames with contents, and the machine frames they are at.
    batch: Vec<(u64, PageType)>,
    mapped: Vec<u64>,
}

impl PvTarget {
    /// Prepares to restore into `domain`.
    ///
    /// # Errors
    /// The hypervisor refused, or there is no memory.
    pub fn new(mut domain: Domain) -> Result<Self, DomainError> {
        refuse_32_bits(&mut domain)?;
        let max = domain.pages_max()?;
        let id = domain.id;
        let fail = || DomainError::call("make room for pages", id, LOG);
        let populate = Populate::new(&domain.xen, max).map_err(fail())?;
        let window = ForeignWindow::reserve(&domain.xen, BATCH_PAGES).map_err(fail())?;
        Ok(Self {
            domain,
            populate,
            window,
            machine: Vec::new(),
            types: Vec::new(),
            holders: Vec::new(),
            batch: Vec::with_capacity(BATCH_PAGES),
            mapped: Vec::with_capacity(BATCH_PAGES),
        })
    }

    /// The machine frame of a frame of the guest's that is an ordinary page, or a page table of this level.
    fn machine_frame(&self, pfn: u64, what: &str, level: u8) -> Result<u64, DomainError> {
        let machine = machine_at(&self.machine, pfn);
        let kind = self.types.get(usize_of(pfn)).and_then(|&bits| PageType::from_bits(bits));
        let fits = match kind {
            Some(PageType::Normal) => level == 0,
            Some(PageType::Table { level: found, .. }) => level == found,
            _ => false,
        };
        machine.filter(|_| fits).ok_or_else(|| DomainError::Stream {
            what: format!("frame {pfn:#x}, which is to be {what}, is no page of that kind"),
        })
    }

    /// Gives memory to those of `frames` that have none.
    fn populate(&mut self, frames: impl Iterator<Item = u64>) -> Result<(), DomainError> {
        let machine = &mut self.machine;
        self.populate.ensure(&mut self.domain, frames, false, |pfn, at| machine[usize_of(pfn)] = at)
    }

    /// Maps machine frames for writing, all of them.
    fn map(&mut self, frames: &[u64]) -> Result<(), DomainError> {
        let id = self.domain.id;
        let errors =
            self.window.map(id, frames, Access::Write).map_err(DomainError::call("map pages", id, LOG))?;
        match errors.iter().position(|&error| error != 0) {
            None => Ok(()),
            Some(at) => {
                let source = io::Error::from_raw_os_error(-errors[at]);
                Err(DomainError::Map { pfn: Pfn(frames[at]), domain: id, source })
            }
        }
    }

    /// A page table with this host's frames instead of the guest's, those that have not come yet included.
    fn localise(&mut self, table: &mut PageBuf, pfn: u64) -> Result<(), DomainError> {
        let mut missing: Vec<u64> =
            tables::named(table).filter(|&named| self.machine.get(usize_of(named)) == Some(&0)).collect();
        missing.sort_unstable();
        missing.dedup();
        self.populate(missing.into_iter())?;
        self.localised(table, pfn)
    }

    /// The same for a table whose frames all have come.
    fn localised(&self, table: &mut PageBuf, pfn: u64) -> Result<(), DomainError> {
        tables::localise(table, |named| machine_at(&self.machine, named))
            .map_err(|error| DomainError::Stream { what: format!("page table at {}: {error}", Pfn(pfn)) })
    }

    fn set_vcpus(&mut self, vcpus: &[VcpuState], wiring: &Wiring) -> Result<Frames, DomainError> {
        let first = vcpus.iter().find(|state| state.vcpu == 0 && state.kind == VcpuKind::Basic);
        let Some(first) = first else {
            return Err(DomainError::Stream { what: "it has no registers of the first virtual CPU".into() });
        };
        let start = self.machine_frame(word(&first.context, VcpuContext::RDX), "the start info", 0)?;
        self.map(&[start])?;
        let (pages, shared) = (u64_of(self.machine.len()), self.domain.info.shared_info_frame);
        let empty = self.empty_window()?;
        let mut window = std::mem::replace(&mut self.window, empty);
        let frames = start_info::rewrite(&mut window, pages, shared, wiring, |pfn, what| {
            self.machine_frame(pfn, what, 0)
        });
        self.window = window;
        for state in vcpus {
            let mut context = state.context.clone();
            if state.kind == VcpuKind::Basic {
                let to_machine = |pfn, what: &str, level| self.machine_frame(pfn, what, level);
                let bad = |what| DomainError::Stream { what };
                vcpu::translate(&mut context, state.vcpu == 0, to_machine, bad)?;
                // The hypervisor wants to know of the user page table without the mark that there is one.
                let user = VcpuContext::CONTROL + 8;
                let value = word(&context, user) & !1;
                super::set_word(&mut context, user, value);
                let flags = word(&context, VcpuContext::FLAGS) | VcpuContext::ONLINE;
                super::set_word(&mut context, VcpuContext::FLAGS, flags);
            }
            vcpu::write(&mut self.domain, state, &context)?;
        }
        frames
    }

    fn empty_window(&self) -> Result<ForeignWindow, DomainError> {
        ForeignWindow::reserve(&self.domain.xen, 1).map_err(DomainError::call(
            "map pages",
            self.domain.id,
            LOG,
        ))
    }

    /// Has the hypervisor check and keep the page tables that the guest had it keep.
    fn pin(&mut self) -> Result<(), DomainError> {
        let id = self.domain.id;
        let fail = || DomainError::call("pin the page tables", id, LOG);
        let mut list = self.domain.xen.buffer(PINS * size_of::<MmuextOp>()).map_err(fail())?;
        let mut count = 0;
        for (at, &bits) in self.types.iter().enumerate() {
            if let Some(PageType::Table { level, pinned: true }) = PageType::from_bits(bits)
                && let Some(frame) = machine_at(&self.machine, u64_of(at))
            {
                let pin = MmuextOp { command: u32::from(level) - 1, frame, ..MmuextOp::default() };
                put(&mut list, count, &pin);
                count += 1;
            }
            if count == PINS {
                self.domain.xen.page_table_operations(id, &mut list, count).map_err(fail())?;
                count = 0;
            }
        }
        if count > 0 {
            self.domain.xen.page_table_operations(id, &mut list, count).map_err(fail())?;
        }
        Ok(())
    }

    /// Writes the guest's own table of frames.
    fn write_table(&mut self) -> Result<(), DomainError> {
        let holders = std::mem::take(&mut self.holders);
        let entries = usize_of(ENTRIES);
        for (some, frames) in holders.chunks(BATCH_PAGES).zip(0..) {
            let machine: Result<Vec<u64>, _> =
                some.iter().map(|&pfn| self.machine_frame(pfn, "part of the table of frames", 0)).collect();
            self.map(&machine?)?;
            let from: usize = frames * BATCH_PAGES * entries;
            let until = (from + some.len() * entries).min(self.machine.len());
            for pfn in from..until {
                let frame = machine_at(&self.machine, u64_of(pfn)).unwrap_or(NO_FRAME);
                self.window.set_word(pfn - from, frame);
            }
        }
        Ok(())
    }

    /// Fills in the page shared with the hypervisor: virtual CPUs and table as they were, no event channels yet.
    fn write_shared_info(&mut self, page: &[u8; 4096]) -> Result<(), DomainError> {
        self.map(&[self.domain.info.shared_info_frame])?;
        let vcpu_words = SharedInfo::VCPUS * SharedInfo::VCPU_BYTES / 8;
        for at in (0..vcpu_words).chain(SharedInfo::MAX_PFN / 8..SharedInfo::BYTES / 8) {
            let pending =
                at < vcpu_words && at * 8 % SharedInfo::VCPU_BYTES == SharedInfo::VCPU_PENDING_WORDS;
            let list = at * 8 == SharedInfo::FRAME_LIST_LIST;
            self.window.set_word(at, if pending || list { 0 } else { word(page, at * 8) });
        }
        for at in 0..SharedInfo::EVENTS_BYTES / 8 {
            self.window.set_word(SharedInfo::EVENTS_PENDING / 8 + at, 0);
            self.window.set_word(SharedInfo::EVENTS_MASKED / 8 + at, u64::MAX);
        }
        Ok(())
    }
}

/// The machine frame of a frame of the guest's, if it has one.
fn machine_at(machine: &[u64], pfn: u64) -> Option<u64> {
    machine.get(usize_of(pfn)).copied().filter(|&frame| frame != 0)
}

/// Puts entry `at` into a list for the hypervisor.
fn put(list: &mut HypercallBuffer, at: usize, entry: &MmuextOp) {
    let bytes = entry.as_bytes();
    list.as_mut_bytes()[at * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
}

impl Target for PvTarget {
    fn guest(&self) -> GuestType {
        GuestType::Pv
    }
    fn batch_pages(&self) -> usize {
        BATCH_PAGES
    }
    fn vcpus(&self) -> u32 {
        self.domain.info.max_vcpu_id.wrapping_add(1)
    }
    fn set_static_state(&mut self, state: &StaticState) -> Result<(), DomainError> {
        if state.pv != Some(PvWidth::Bits64) {
            return Err(DomainError::Unsupported {
                domain: self.domain.id,
                why: "the stream is of a PV guest of 32 bits".into(),
                remedy: "Restore it with Xen's own tools",
            });
        }
        self.domain.set_policies(&state.cpuid, &state.msrs)
    }
    fn set_table_frames(&mut self, frames: P2mFrames) -> Result<(), DomainError> {
        let pages = u64::from(frames.end) + 1;
        if frames.start != 0 || pages > PFN_LIMIT {
            let what = format!(
                "its table is of frames {:#x} to {:#x}; 0 to {:#x} can be restored",
                frames.start,
                frames.end,
                PFN_LIMIT - 1
            );
            return Err(DomainError::Stream { what });
        }
        self.machine = vec![0; usize_of(pages)];
        self.types = vec![0; usize_of(pages)];
        self.holders = frames.frames;
        Ok(())
    }
    fn place(&mut self, entries: &[PageEntry]) -> Result<usize, DomainError> {
        if let Some(outside) = entries.iter().find(|entry| entry.pfn().index() >= self.machine.len()) {
            let what = format!("{} is outside the guest's {} frames", outside.pfn(), self.machine.len());
            return Err(DomainError::Stream { what });
        }
        let populated = entries.iter().filter(|entry| entry.page_type().is_populated());
        self.populate(populated.map(|entry| entry.pfn().0))?;
        self.batch.clear();
        let mut mapped = std::mem::take(&mut self.mapped);
        mapped.clear();
        for entry in entries {
            let pfn = entry.pfn().0;
            self.types[usize_of(pfn)] = entry.page_type().bits();
            if entry.has_data() {
                self.batch.push((pfn, entry.page_type()));
                mapped.push(self.machine[usize_of(pfn)]);
            }
        }
        let done = self.map(&mapped);
        self.mapped = mapped;
        done.map(|()| self.batch.len())
    }
    fn page(&self, at: usize) -> GuestPage<'_> {
        match self.window.page(at) {
            Some(page) => page,
            None => unreachable!("page {at} is not in the batch"),
        }
    }
    fn settle(&mut self) -> Result<(), DomainError> {
        let batch = std::mem::take(&mut self.batch);
        let mut table = PageBuf::zeroed();
        for (at, &(pfn, page_type)) in batch.iter().enumerate() {
            if matches!(page_type, PageType::Table { .. }) {
                self.page(at).copy_to(&mut table);
                self.localise(&mut table, pfn)?;
                self.page(at).copy_from(&table);
            }
        }
        self.batch = batch;
        Ok(())
    }
    fn difference(&self, at: usize, expected: &mut PageBuf) -> Result<Option<Range<usize>>, DomainError> {
        let (pfn, page_type) = self.batch[at];
        if matches!(page_type, PageType::Table { .. }) {
            self.localised(expected, pfn)?;
        }
        let mut found = PageBuf::zeroed();
        self.page(at).copy_to(&mut found);
        Ok(difference(&found, expected))
    }
    fn finish(&mut self, state: &FinalState, wiring: &Wiring) -> Result<Frames, DomainError> {
        let KindState::Pv { shared_info, vcpus } = &state.kind else {
            return Err(DomainError::Stream {
                what: "it ends with an HVM guest's state for a PV guest".into(),
            });
        };
        self.domain.set_tsc(&state.tsc)?;
        self.write_shared_info(shared_info)?;
        let frames = self.set_vcpus(vcpus, wiring)?;
        self.pin()?;
        self.write_table()?;
        self.window.clear().map_err(DomainError::call("unmap pages", self.domain.id, LOG))?;
        grants::seed(&self.domain, frames, wiring)?;
        Ok(frames)
    }
}
