//! Memory paging: a domain's pages taken out of it one by one, and the ring over which the hypervisor tells who waits for one.
//!
//! ```text
//!   nominate -> evict      the page is the hypervisor's; its frame is "paged"
//!   an access to it        a request on the ring; the virtual CPU stands still, a backend's mapping is told to try again
//!   prep with a buffer     a new page with these bytes; then a response on the ring, and the virtual CPU goes on
//! ```
//! Source: `xen/arch/x86/mm/mem_paging.c`, `xen/common/vm_event.c`, `public/vm_event.h`, `public/io/ring.h`; the same from 4.17 to
//! 4.20. The ring is a page of 64 bytes of counters and eight entries of 400; counters run on, entries are at their remainder.
//! Every request takes its place until it has a response.
//!
//! A response is its request, unchanged, in the same place: so requests are answered in the order in which they came, by one store
//! to one counter, and what stands in the page is at any instant the whole record of who waits. Who takes the ring up behind a
//! process that was killed needs nothing else. That is worth an early answer now and then: a virtual CPU whose page is not there
//! yet looks again, and asks again. More responses than requests stop the hypervisor (`vm_event_ring_available`).

use std::io;
use std::sync::atomic::{Ordering, fence};

use mover::memory::PageBuf;
use mover::units::PAGE_BYTES;

use super::domctl::command;
use super::layout::abi;
use super::memory::{Reservation, hypercall, operation};
use super::{Access, DomainId, ForeignWindow, HypercallBuffer, Xen};

/// The parameter that names the ring's frame (`HVM_PARAM_PAGING_RING_PFN`).
pub const RING_PARAM: u32 = 27;
/// `XEN_DOMCTL_VM_EVENT_OP_PAGING`, `XEN_VM_EVENT_ENABLE` and `XEN_VM_EVENT_DISABLE`.
const MODE_PAGING: u32 = 1;
const ENABLE: u32 = 0;
const DISABLE: u32 = 1;

abi! {
    /// Turns a ring of events on or off (`XEN_DOMCTL_vm_event_op`).
    VmEventOp = "struct xen_domctl_vm_event_op", 12 {
        /// What to do.
        op: u32 = "op" @ 0,
        /// With which ring.
        mode: u32 = "mode" @ 4,
        /// The hypervisor's port.
        port: u32 = "u.enable.port" @ 8,
    }
}

abi! {
    /// Pages a frame out or in (`XENMEM_paging_op`).
    PagingOp = "struct xen_mem_paging_op", 24 {
        /// `XENMEM_paging_op_*`.
        op: u8 = "op" @ 0,
        /// Zero.
        pad: u8 = "" @ 1,
        /// Whose.
        domain: u16 = "domain" @ 2,
        /// Zero.
        pad2: u32 = "" @ 4,
        /// Its bytes, or none.
        buffer: u64 = "buffer" @ 8,
        /// The frame.
        frame: u64 = "gfn" @ 16,
    }
}

abi! {
    /// An entry of the ring: a request, and as its response the same.
    PagingEvent = "vm_event_request_t", 400 {
        /// Of this interface; ours is what came.
        version: u32 = "version" @ 0,
        /// `VM_EVENT_FLAG_*`.
        flags: u32 = "flags" @ 4,
        /// `VM_EVENT_REASON_*`.
        reason: u32 = "reason" @ 8,
        /// The virtual CPU; of another domain if the flags say so.
        vcpu: u32 = "vcpu_id" @ 12,
        /// Not used here.
        altp2m: [u16; 4] = "altp2m_idx" @ 16,
        /// The frame.
        frame: u64 = "u.mem_paging.gfn" @ 24,
        /// Its type in the hypervisor's table.
        kind: u32 = "u.mem_paging.p2mt" @ 32,
        /// `MEM_PAGING_*`.
        paging_flags: u32 = "u.mem_paging.flags" @ 36,
        /// Other reasons' and registers.
        rest: [u64; 45] = "" @ 40,
    }
}

impl PagingEvent {
    /// `MEM_PAGING_DROP_PAGE`.
    const DROP_PAGE: u32 = 1 << 0;

    /// Whether the guest has given the frame back.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.paging_flags & Self::DROP_PAGE != 0
    }
}

/// Paging a frame (`XENMEM_paging_op_*`).
mod step {
    pub(super) const NOMINATE: u8 = 0;
    pub(super) const EVICT: u8 = 1;
    pub(super) const PREP: u8 = 2;
}

/// Errors of all of these are what the hypervisor says.
#[expect(clippy::missing_errors_doc, reason = "said once, above: they all return what the hypervisor says")]
impl Xen {
    /// Turns a domain's paging on, whose ring is in the frame of [`RING_PARAM`]; the hypervisor's port. `ENOSYS` where the
    /// hypervisor has none, `ENODEV` for a domain without nested paging, `EMLINK` for one with a device of the host's, `EXDEV`
    /// for one populated on demand, `EOPNOTSUPP` under a control domain that is HVM itself.
    pub fn paging_on(&mut self, domain: DomainId) -> io::Result<u32> {
        let argument = VmEventOp { op: ENABLE, mode: MODE_PAGING, port: 0 };
        // SAFETY: the sub-command's own struct, without addresses. Worth it: see `Xen::call`.
        let (_, after) = unsafe { self.domctl(command::VM_EVENT_OP, domain, &argument)? };
        Ok(after.port)
    }
    /// Turns it off. `EBUSY` while virtual CPUs wait for room on the ring.
    pub fn paging_off(&mut self, domain: DomainId) -> io::Result<()> {
        let argument = VmEventOp { op: DISABLE, mode: MODE_PAGING, port: 0 };
        // SAFETY: as above.
        unsafe { self.domctl(command::VM_EVENT_OP, domain, &argument) }.map(drop)
    }
    /// Marks a frame as about to be paged out. `EBUSY` if somebody has it mapped, or it is not ordinary memory.
    pub fn page_nominate(&mut self, domain: DomainId, frame: u64) -> io::Result<()> {
        let argument = PagingOp { op: step::NOMINATE, domain: domain.0, frame, ..PagingOp::default() };
        // SAFETY: the operation's own struct; its buffer is none. Worth it: see `Xen::call`.
        unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::PAGING_OP), &argument) }.map(drop)
    }
    /// Takes the memory of a nominated frame. `EBUSY` if somebody has touched it meanwhile.
    pub fn page_evict(&mut self, domain: DomainId, frame: u64) -> io::Result<()> {
        let argument = PagingOp { op: step::EVICT, domain: domain.0, frame, ..PagingOp::default() };
        // SAFETY: as above.
        unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::PAGING_OP), &argument) }.map(drop)
    }
    /// Gives a frame that is paged out a page with the bytes of `buffer`, or one that was touched before it was evicted its
    /// own one back. `ENOENT` if it is neither.
    ///
    /// # Panics
    /// If the buffer is shorter than a page.
    pub fn page_in(
        &mut self,
        domain: DomainId,
        frame: u64,
        buffer: Option<&HypercallBuffer>,
    ) -> io::Result<()> {
        assert!(buffer.is_none_or(|buffer| buffer.len() >= PAGE_BYTES), "a page's bytes");
        let buffer = buffer.map_or(0, HypercallBuffer::address);
        let argument = PagingOp { op: step::PREP, domain: domain.0, buffer, frame, ..PagingOp::default() };
        // SAFETY: the operation's own struct; the buffer is borrowed, read only, and a page long. Worth it: see `Xen::call`.
        unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::PAGING_OP), &argument) }.map(drop)
    }
    /// Sets memory aside so that `domain` can come to have `pages` in all; 0 gives back what was. There is one claim at a time.
    /// `ENOMEM` if there is not as much.
    pub fn claim(&mut self, domain: DomainId, pages: u64) -> io::Result<()> {
        let argument = Reservation { count: pages, domain: domain.0, ..Reservation::default() };
        // SAFETY: the operation's own struct; it has no list. Worth it: see `Xen::call`.
        unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::CLAIM_PAGES), &argument) }.map(drop)
    }
    /// Takes the one frame named in `extents` out of the domain's memory; who has it mapped keeps it.
    pub fn take_frame(&mut self, domain: DomainId, extents: &mut HypercallBuffer) -> io::Result<()> {
        let argument =
            Reservation { extents: extents.address(), count: 1, domain: domain.0, ..Reservation::default() };
        // SAFETY: the operation's own struct; the list is mutably borrowed and longer than one frame. Worth it: see `Xen::call`.
        unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::DECREASE_RESERVATION), &argument) }
            .map(drop)
    }
}

/// Where the ring is.
#[derive(Debug)]
enum RingPage {
    Guest(ForeignWindow),
    #[cfg(test)]
    Made(std::sync::Arc<mover::memory::Mapping>),
}

/// This end of the ring.
#[derive(Debug)]
pub struct PagingRing {
    page: RingPage,
    /// Requests taken.
    taken: u32,
    /// Requests answered.
    answered: u32,
}

impl PagingRing {
    const COUNTERS: usize = 64;
    const ENTRIES: u32 = 8;
    const REQUESTS_PUT: usize = 0;
    const RESPONSES_PUT: usize = 8;

    /// Maps the page at `frame` of `domain`, and clears it.
    ///
    /// # Errors
    /// What `mmap(2)` or privcmd says.
    pub fn map(xen: &Xen, domain: DomainId, frame: u64) -> io::Result<Self> {
        let ring = Self::map_too(xen, domain, frame)?;
        if let RingPage::Guest(page) = &ring.page
            && let Some(page) = page.page(0)
        {
            page.copy_from(&PageBuf::zeroed());
        }
        Ok(ring)
    }

    /// Maps the page at `frame` of `domain`, which is another process's ring. Nothing is to be done with it before
    /// [`Self::take_up`].
    ///
    /// # Errors
    /// As for [`Self::map`].
    pub fn map_too(xen: &Xen, domain: DomainId, frame: u64) -> io::Result<Self> {
        let mut page = ForeignWindow::reserve(xen, 1)?;
        if let Some(error) = page.map(domain, &[frame], Access::Write)?.iter().find(|error| **error != 0) {
            return Err(io::Error::from_raw_os_error(-error));
        }
        Ok(Self { page: RingPage::Guest(page), taken: 0, answered: 0 })
    }

    /// A ring in a page of the test's own.
    #[cfg(test)]
    pub(crate) fn made(page: std::sync::Arc<mover::memory::Mapping>) -> Self {
        Self { page: RingPage::Made(page), taken: 0, answered: 0 }
    }

    /// Goes on where another process has stopped, which is no more: its requests without a response are the next.
    pub fn take_up(&mut self) {
        // SAFETY: as in `take`.
        self.answered = unsafe { self.counter(Self::RESPONSES_PUT).read_volatile() };
        self.taken = self.answered;
    }

    fn counter(&self, at: usize) -> *mut u32 {
        let address = match &self.page {
            RingPage::Guest(page) => page.page_address(0),
            #[cfg(test)]
            RingPage::Made(page) => Some(page.address()),
        };
        // SAFETY: inside the page, which is mapped for as long as this lives. Worth it: the hypervisor counts there.
        address.map_or(std::ptr::null_mut(), |page| unsafe { page.add(at) }.cast().as_ptr())
    }

    fn entry(&self, number: u32) -> *mut PagingEvent {
        let at = mover::units::usize_of((number % Self::ENTRIES).into()) * size_of::<PagingEvent>();
        self.counter(Self::COUNTERS + at).cast()
    }

    /// The next request, if there is one.
    pub fn take(&mut self) -> Option<PagingEvent> {
        // SAFETY: aligned, inside the page that `map` has mapped; volatile, as the hypervisor writes it. Worth it: as above.
        let there = unsafe { self.counter(Self::REQUESTS_PUT).read_volatile() };
        if there == self.taken {
            return None;
        }
        fence(Ordering::SeqCst);
        // SAFETY: as above; eight entries fit into the page, and the hypervisor does not write one before it has its response.
        let event = unsafe { self.entry(self.taken).read_volatile() };
        self.taken = self.taken.wrapping_add(1);
        Some(event)
    }

    /// Answers the first `count` of the requests taken and not answered; the hypervisor looks at it when its port is rung.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn answer(&mut self, count: usize) {
        let open = self.taken.wrapping_sub(self.answered);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        assert!(count <= open, "{count} responses to {open} requests");
        self.answered = self.answered.wrapping_add(count);
        fence(Ordering::SeqCst);
        // SAFETY: as in `take`.
        unsafe { self.counter(Self::RESPONSES_PUT).write_volatile(self.answered) };
    }
}

const _: () = assert!(
    PagingRing::COUNTERS + 8 * size_of::<PagingEvent>() <= PAGE_BYTES && PAGE_BYTES < 64 + 16 * 400,
    "eight entries, the largest power of two that fits"
);
