//! A guest whose pages are held back, as a standby has it: the ring's page, mapped while that can be done, and the rest when the
//! worker has ended.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use mover::bitmap::Bitmap;
use mover::error::GuestError;
use mover::guest::GuestMemory;
use mover::memory::{Mapping, Window};
use mover::units::{PageCount, Pfn};

use super::Held;
use super::lanes::held;
use super::paging::Paging;
use super::requests::Requests;
use crate::abi::{Access, Beside, DomainId, EventChannels, LaneWindow, PagingRing, Xen};

/// What is to be had before the worker ends, and can't be had behind that.
pub(crate) struct Watch {
    domain: DomainId,
    frames: u64,
    ring: PagingRing,
    channels: EventChannels,
    table: Arc<Mapping>,
}

/// The guest.
pub(crate) struct Orphaned {
    /// Its memory, of which nothing is mapped: what is outstanding is given to it page by page.
    pub(crate) memory: Arc<dyn GuestMemory>,
    /// What holds its pages back.
    pub(crate) held: Held,
}

impl Watch {
    /// Of `domain`, a guest of so many frames, whose ring is in `frame`, and the worker's table of its pages.
    pub(crate) fn begin(domain: DomainId, frame: u64, frames: u64, table: Arc<Mapping>) -> io::Result<Self> {
        let ring = PagingRing::map_too(&Xen::open()?, domain, frame)?;
        Ok(Self { domain, frames, ring, channels: EventChannels::open()?, table })
    }

    /// The worker has ended: answers the guest from here on, whose ring rings `port` of the hypervisor's.
    pub(crate) fn take_over(self, port: u32) -> io::Result<Orphaned> {
        let Self { domain, frames, ring, channels, table } = self;
        let requests = Requests::after(ring, frames);
        let paging = Arc::new(Paging::after(domain, frames, requests, (channels, port), table)?);
        let memory = Arc::new(Unmapped { domain, frames });
        Ok(Orphaned { memory, held: held(domain, paging) })
    }
}

/// Memory that nobody here maps: a page of a running guest is its own, and one that is out can't be mapped.
#[derive(Debug)]
struct Unmapped {
    domain: DomainId,
    frames: u64,
}

impl GuestMemory for Unmapped {
    fn pages(&self) -> PageCount {
        PageCount(self.frames)
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        LaneWindow::open(capacity, Beside::NothingPagedOut)
            .map_err(|error| GuestError::State(format!("cannot make room for pages: {error}")))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        LaneWindow::fill(window, self.domain, pfns, Access::Write, |_| true)
            .map_err(|error| GuestError::State(format!("cannot leave pages out of a window: {error}")))
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
    fn starts_zero(&self) -> bool {
        false
    }
}
