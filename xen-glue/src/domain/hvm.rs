//! HVM and PVH guests: guest frames are what the hypervisor takes, contents pass as they are.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use mover::bitmap::Bitmap;
use mover::guest::GuestMemory;
use mover::memory::{GuestPage, PageBuf};
use mover::units::{Pfn, usize_of};

use super::common::{Domain, LOG};
use super::lanes::{RestoredMemory, SavedMemory, lock, populated};
use super::pages::{BATCH_PAGES, Pages};
use super::populate::Populate;
use super::{
    Absent, Batch, DomainError, FinalState, Frames, KindState, Lazy, Lent, Life, LogRead, Source,
    StaticState, Target, Wiring, difference, grants,
};
use crate::abi::{Access, ForeignWindow, Kept, Part};
use crate::stream::{DomainHeader, GuestType, HvmParam, P2mFrames, PageEntry};

/// Parameters (`HVM_PARAM_*` of `hvm/params.h`).
mod param {
    pub(super) const STORE_PFN: u32 = 1;
    pub(super) const STORE_PORT: u32 = 2;
    pub(super) const PAE_ENABLED: u32 = 4;
    pub(super) const IOREQ_PFN: u32 = 5;
    pub(super) const BUFIOREQ_PFN: u32 = 6;
    pub(super) const CONSOLE_PFN: u32 = 17;
    pub(super) const CONSOLE_PORT: u32 = 18;
    /// Those a stream carries where they are not zero, in stock's order: besides the pages above the paging, monitor
    /// and sharing rings, the TSS for real mode, ACPI ports, Viridian, identity page tables, the generation id's
    /// address, the ioreq servers' pages and their number, the x87 pointer's width and machine check capabilities.
    pub(super) const SAVED: [u32; 16] =
        [STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, 27, 28, 29, 37, CONSOLE_PFN, 19, 9, 12, 34, 32, 33, 36, 38];
}

/// A guest to be saved.
#[derive(Debug)]
pub struct HvmSource {
    domain: Domain,
    header: DomainHeader,
    frames: u64,
    pages: Pages,
}

impl HvmSource {
    /// Prepares to save `domain`.
    ///
    /// # Errors
    /// The hypervisor refused, or there is no memory.
    pub fn new(mut domain: Domain) -> Result<Self, DomainError> {
        let (xen_major, xen_minor) = domain.release_of_xen()?;
        let frames = domain.frames()?;
        let pages =
            Pages::new(&domain.xen).map_err(DomainError::call("make room for pages", domain.id, LOG))?;
        let header = DomainHeader { guest: GuestType::Hvm, xen_major, xen_minor };
        Ok(Self { domain, header, frames, pages })
    }
}

impl Source for HvmSource {
    fn header(&self) -> DomainHeader {
        self.header
    }
    fn pages(&self) -> u64 {
        self.frames
    }
    fn batch_pages(&self) -> usize {
        BATCH_PAGES
    }
    fn static_state(&mut self) -> Result<StaticState, DomainError> {
        let (cpuid, msrs) = self.domain.policies()?;
        Ok(StaticState { cpuid, msrs, pv: None })
    }
    fn table_frames(&self) -> Option<P2mFrames> {
        None
    }
    fn life(&mut self) -> Result<Life, DomainError> {
        self.domain.life()
    }
    fn check(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn log_on(&mut self) -> Result<(), DomainError> {
        self.domain.log_on(self.frames)
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
        self.pages.ask(&mut self.domain, pfns)?;
        // Pages without contents need not be named: what is not populated on the target stays so.
        self.pages.map(&self.domain, pfns, pfns, still, false, batch)
    }
    fn content(&self, at: usize) -> Part<'_> {
        let page = self.pages.page(at);
        assert!(page.is_some(), "page {at} is not in the batch");
        page.map_or(Part::Bytes(&[]), Part::Page)
    }
    fn release(&mut self) -> Result<(), DomainError> {
        self.pages.release().map_err(DomainError::call("unmap pages", self.domain.id, LOG))
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, absent: &Arc<Absent>) -> Result<Arc<dyn GuestMemory>, DomainError> {
        let absent = Arc::clone(absent);
        let kept = Kept::new(self.frames);
        Ok(Arc::new(SavedMemory { domain: self.domain.id, frames: self.frames, absent, kept }))
    }
    fn populated(&mut self) -> Result<Vec<Range<u64>>, DomainError> {
        populated(&mut self.domain, self.frames)
    }
    fn granted(&mut self, into: &mut Bitmap) -> Result<(), DomainError> {
        for frame in grants::granted(&mut self.domain)?.into_iter().filter(|frame| *frame < self.frames) {
            into.set(usize_of(frame));
        }
        Ok(())
    }
    fn final_state(&mut self) -> Result<FinalState, DomainError> {
        let tsc = self.domain.tsc()?;
        let id = self.domain.id;
        let xen = &mut self.domain.xen;
        let fail = || DomainError::call("read the virtual CPUs and devices", id, LOG);
        let bytes = xen.hvm_context_bytes(id).map_err(fail())?;
        let mut buffer = xen.buffer(bytes).map_err(fail())?;
        let bytes = xen.hvm_context(id, &mut buffer).map_err(fail())?;
        let context = buffer.as_bytes()[..bytes].to_vec();
        let mut params = Vec::with_capacity(param::SAVED.len());
        for index in param::SAVED {
            let value = xen.hvm_param(id, index).map_err(DomainError::call("read parameters", id, LOG))?;
            if value != 0 {
                params.push(HvmParam { index: index.into(), value });
            }
        }
        Ok(FinalState { tsc, kind: KindState::Hvm { context, params } })
    }
}

/// A guest to be restored.
#[derive(Debug)]
pub struct HvmTarget {
    domain: Domain,
    /// Lanes populate what comes up late.
    populate: Arc<Mutex<Populate>>,
    window: ForeignWindow,
    frames: Vec<u64>,
    /// For lanes, once there are some.
    memory: Option<Arc<RestoredMemory>>,
}

impl HvmTarget {
    /// Prepares to restore into `domain`.
    ///
    /// # Errors
    /// The hypervisor refused, or there is no memory.
    pub fn new(mut domain: Domain) -> Result<Self, DomainError> {
        let max = domain.pages_max()?;
        let fail = || DomainError::call("make room for pages", domain.id, LOG);
        let populate = Populate::new(&domain.xen, max).map_err(fail())?;
        let window = ForeignWindow::reserve(&domain.xen, BATCH_PAGES).map_err(fail())?;
        let populate = Arc::new(Mutex::new(populate));
        Ok(Self { domain, populate, window, frames: Vec::with_capacity(BATCH_PAGES), memory: None })
    }

    /// Maps `self.frames` for writing.
    fn map(&mut self) -> Result<(), DomainError> {
        let id = self.domain.id;
        let errors = self.window.map(id, &self.frames, Access::Write).map_err(DomainError::call(
            "map pages",
            id,
            LOG,
        ))?;
        match errors.iter().zip(&self.frames).find(|(error, _)| **error != 0) {
            None => Ok(()),
            Some((error, &frame)) => {
                let source = std::io::Error::from_raw_os_error(-error);
                Err(DomainError::Map { pfn: Pfn(frame), domain: id, source })
            }
        }
    }

    /// Zeroes the page at `frame`, which a parameter names.
    fn zero(&mut self, frame: u64) -> Result<(), DomainError> {
        if !lock(&self.populate).has(frame) {
            let what = format!("a parameter names frame {frame:#x}, which it has no page for");
            return Err(DomainError::Stream { what });
        }
        self.frames.clear();
        self.frames.push(frame);
        self.map()?;
        if let Some(page) = self.window.page(0) {
            page.fill_zero();
        }
        Ok(())
    }

    /// Sets the parameters; the frames of the store and the console.
    fn set_params(&mut self, params: &[HvmParam]) -> Result<Frames, DomainError> {
        let mut frames = Frames::default();
        for HvmParam { index, value } in params {
            let (Ok(index), value) = (u32::try_from(*index), *value) else {
                return Err(DomainError::Stream { what: format!("there is no parameter {index}") });
            };
            match index {
                param::CONSOLE_PFN => frames.console = value,
                param::STORE_PFN => frames.store = value,
                // Meant for toolstacks long gone; the hypervisor has no use for it.
                param::PAE_ENABLED => continue,
                _ => {}
            }
            if matches!(index, param::CONSOLE_PFN | param::STORE_PFN | param::IOREQ_PFN | param::BUFIOREQ_PFN)
            {
                self.zero(value)?;
            }
            self.set_param(index, value)?;
        }
        Ok(frames)
    }

    fn set_param(&mut self, index: u32, value: u64) -> Result<(), DomainError> {
        let id = self.domain.id;
        self.domain.xen.set_hvm_param(id, index, value).map_err(DomainError::call("set parameters", id, LOG))
    }
}

impl Target for HvmTarget {
    fn guest(&self) -> GuestType {
        GuestType::Hvm
    }
    fn batch_pages(&self) -> usize {
        BATCH_PAGES
    }
    fn vcpus(&self) -> u32 {
        0
    }
    fn set_static_state(&mut self, state: &StaticState) -> Result<(), DomainError> {
        self.domain.set_policies(&state.cpuid, &state.msrs)
    }
    fn set_table_frames(&mut self, _: P2mFrames) -> Result<(), DomainError> {
        Err(DomainError::Stream { what: "it names a PV guest's table for an HVM guest".into() })
    }
    fn place(&mut self, entries: &[PageEntry]) -> Result<usize, DomainError> {
        let populated = entries.iter().filter(|entry| entry.page_type().is_populated());
        let populated = populated.map(|entry| entry.pfn().0);
        lock(&self.populate).ensure(&mut self.domain, populated, true, |_, _| {})?;
        self.frames.clear();
        self.frames.extend(entries.iter().filter(|entry| entry.has_data()).map(|entry| entry.pfn().0));
        self.map()?;
        Ok(self.frames.len())
    }
    fn page(&self, at: usize) -> GuestPage<'_> {
        match self.window.page(at) {
            Some(page) => page,
            None => unreachable!("page {at} is not in the batch"),
        }
    }
    fn settle(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn difference(&self, at: usize, expected: &mut PageBuf) -> Result<Option<Range<usize>>, DomainError> {
        let mut found = PageBuf::zeroed();
        self.page(at).copy_to(&mut found);
        Ok(difference(&found, expected))
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, pages: u64, populated: &[Range<u64>]) -> Result<Arc<dyn GuestMemory>, DomainError> {
        // What is mapped can't be paged out.
        self.window.clear().map_err(DomainError::call("unmap pages", self.domain.id, LOG))?;
        let memory = Arc::new(RestoredMemory::new(&mut self.domain, &self.populate, pages, populated)?);
        self.memory = Some(Arc::clone(&memory));
        Ok(memory)
    }
    fn hold_back(&self) -> Lazy {
        match self.memory.clone() {
            Some(memory) => Box::new(move || memory.hold_back()),
            None => Box::new(|| Err("there is no memory yet".to_owned())),
        }
    }
    fn lent(&self) -> Option<Lent> {
        self.memory.as_ref()?.lent()
    }
    fn finish(&mut self, state: &FinalState, wiring: &Wiring) -> Result<Frames, DomainError> {
        let KindState::Hvm { context, params } = &state.kind else {
            return Err(DomainError::Stream {
                what: "it ends with a PV guest's state for an HVM guest".into(),
            });
        };
        if let Some(memory) = &self.memory {
            memory.end_loans()?;
        }
        self.domain.set_tsc(&state.tsc)?;
        let frames = self.set_params(params)?;
        self.set_param(param::STORE_PORT, wiring.store_port.into())?;
        self.set_param(param::CONSOLE_PORT, wiring.console_port.into())?;
        let id = self.domain.id;
        let remedy =
            "The hypervisors of the two hosts may be too far apart; `xl dmesg` here says what it objects to";
        let fail = || DomainError::call("set the virtual CPUs and devices", id, remedy);
        let context = self.domain.filled(context).map_err(fail())?;
        self.domain.xen.set_hvm_context(id, &context).map_err(fail())?;
        grants::seed(&self.domain, frames, wiring)?;
        self.window.clear().map_err(DomainError::call("unmap pages", id, LOG))?;
        Ok(frames)
    }
}
