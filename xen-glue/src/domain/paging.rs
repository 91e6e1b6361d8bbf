//! Pages held back from an HVM or PVH guest by the hypervisor's own memory paging.
//!
//! ```text
//!   begin       a ring in a frame that is not the guest's -> paging on -> the frame is taken from the guest
//!   hold_ahead  nominate, evict: the page's memory is the hypervisor's, and claimed for this guest
//!   an access   a request on the ring: next_fault; a virtual CPU stands still, a backend tries again
//!   release     a page with these bytes, in one step; then responses to all who wait for it
//!   finish      nothing is held -> paging off, the claim given back
//! ```
//! A worker has a standby ([`crate::standby`]), which maps the ring's frame while it is there and goes on with all of this if the
//! worker is killed ([`Paging::after`]).
//!
//! Threads: pages are held back by one and released by any; `next_fault` is one's. Invariants:
//! - A page that is held is in nobody's mapping: it could not have been evicted else, and a mapping made since waits for it.
//! - Every request gets its response, in the ring's order (`super::requests`).
//! - A held page that the guest gives back is gone: its release finds nothing to be given, and that is right.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mover::bitmap::{Bitmap, SharedBitmap};
use mover::error::GuestError;
use mover::guest::{HoldBack, Session};
use mover::memory::{GuestPage, Mapping};
use mover::units::{PAGE_BYTES, Pfn, usize_of};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::common::{Domain, LOG, fill_words};
use super::lanes::{lock, told};
use super::populate::Populate;
use super::requests::Requests;
use super::{DomainError, PagingCost};
use crate::abi::paging::RING_PARAM;
use crate::abi::{DomainId, EventChannels, HypercallBuffer, PagingRing, Xen};
use crate::confine;
use crate::standby::Guard;

/// Frames above the guest's highest at which the ring stands while it is made.
const RING_ABOVE: u64 = 16;
/// Pages evicted before their memory is claimed; until then somebody else may be given it.
const CLAIM_EVERY: u64 = 64;
/// How long turning paging off may be refused because virtual CPUs wait for room on the ring.
const OFF_WITHIN: Duration = Duration::from_secs(30);
/// How long a worker that has ended may keep its end of the event channel: the kernel closes it behind the last thread.
const PARTED_WITHIN: Duration = Duration::from_secs(30);

/// Paging of one guest.
#[derive(Debug)]
pub(super) struct Paging {
    domain: DomainId,
    held: SharedBitmap,
    calls: Mutex<Calls>,
    requests: Mutex<Requests>,
    channels: EventChannels,
    port: u32,
    /// Pages held; those claimed for.
    holds: AtomicU64,
    claimed: AtomicU64,
    /// What was claimed is claimed still, by who was here before.
    inherited: bool,
    finished: AtomicBool,
    cost: Arc<PagingCost>,
    guard: Guarded,
    table: Option<Arc<Mapping>>,
}

/// Who takes over, or why nobody does; nothing where nobody is meant to.
pub type Guarded = Option<Result<Arc<Guard>, String>>;

/// What hypercalls need.
#[derive(Debug)]
struct Calls {
    xen: Xen,
    page: HypercallBuffer,
}

impl Calls {
    /// Whether `pfn` is paged out. Asked to page it in with nothing, the hypervisor says for what is paged out that there is nothing,
    /// and for what is not, that it is not.
    fn is_out(&mut self, domain: DomainId, pfn: Pfn) -> io::Result<bool> {
        match self.xen.page_in(domain, pfn.0, None) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(true),
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(false),
        }
    }
}

/// Why a hypervisor or a guest has no paging, and what it would take.
fn why_not(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            "the hypervisor has no memory paging. It takes one built with CONFIG_UNSUPPORTED and \
                               CONFIG_MEM_PAGING, which no distribution ships"
                .to_owned()
        }
        Some(libc::EMLINK) => "the guest has a device of the host's, which can't wait for a page".to_owned(),
        Some(libc::EXDEV) => "the guest's memory is populated on demand (maxmem above memory)".to_owned(),
        Some(libc::ENODEV) => "the guest runs without nested paging (hap=1)".to_owned(),
        Some(libc::EOPNOTSUPP) => "the control domain is PVH, under which Xen pages nothing".to_owned(),
        Some(libc::EBUSY) => "somebody else pages this guest already".to_owned(),
        _ => format!("the hypervisor refuses to page the guest's memory: {error}"),
    }
}

impl Paging {
    /// Turns it on, for a guest of so many frames.
    pub(super) fn begin(domain: &mut Domain, populate: &mut Populate, frames: u64) -> Result<Self, String> {
        let frame = frames + RING_ABOVE;
        populate
            .ensure(domain, std::iter::once(frame), false, |_, _| {})
            .map_err(|error| error.to_string())?;
        let (id, no) = (domain.id, |error: io::Error| why_not(&error));
        let ring = PagingRing::map(&domain.xen, id, frame).map_err(no)?;
        domain.xen.set_hvm_param(id, RING_PARAM, frame).map_err(no)?;
        let on = domain.xen.paging_on(id);
        let guard = match &on {
            Ok(remote) if confine::is_worker() => {
                Some(Guard::start(id, frame, frames, *remote).map(Arc::new))
            }
            _ => None,
        };
        // Whatever comes of it, the frame is none of the guest's.
        let mut extents = domain.xen.buffer(size_of::<u64>()).map_err(no)?;
        fill_words(&mut extents, &[frame]);
        let taken = domain.xen.take_frame(id, &mut extents);
        let remote = on.map_err(no)?;
        taken.map_err(no)?;
        let channels = EventChannels::open().map_err(no)?;
        let port = channels.bind(id, remote).map_err(no)?;
        let held = SharedBitmap::new(usize_of(frames));
        let requests = Requests::new(ring, frames);
        let table = guard.as_ref().and_then(|guard| Some(guard.as_ref().ok()?.table()));
        let this = Self::over(id, held, requests, (channels, port)).map_err(no)?;
        Ok(Self { guard, table, ..this })
    }

    /// Goes on in the place of a worker that has ended: with its ring, and the hypervisor's port for it.
    pub(super) fn after(
        domain: DomainId,
        frames: u64,
        requests: Requests,
        (channels, remote): (EventChannels, u32),
        table: Arc<Mapping>,
    ) -> io::Result<Self> {
        let port = bind_again(&channels, domain, remote)?;
        let held = SharedBitmap::new(usize_of(frames));
        let this = Self::over(domain, held, requests, (channels, port))?;
        // The worker may have answered somebody and not have come to ringing.
        this.channels.notify(port)?;
        Ok(Self { inherited: true, table: Some(table), ..this })
    }

    fn over(
        domain: DomainId,
        held: SharedBitmap,
        requests: Requests,
        (channels, port): (EventChannels, u32),
    ) -> io::Result<Self> {
        let xen = Xen::open()?;
        let page = xen.buffer(PAGE_BYTES)?;
        Ok(Self {
            domain,
            held,
            calls: Mutex::new(Calls { xen, page }),
            requests: Mutex::new(requests),
            channels,
            port,
            holds: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            inherited: false,
            finished: AtomicBool::new(false),
            cost: Arc::default(),
            guard: None,
            table: None,
        })
    }

    /// Who takes over.
    pub(super) fn guard(&self) -> Guarded {
        self.guard.clone()
    }

    /// What it costs.
    pub(super) fn cost(&self) -> Arc<PagingCost> {
        Arc::clone(&self.cost)
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> GuestError {
        let domain = self.domain;
        move |source| told(DomainError::call(doing, domain, LOG)(source))
    }

    /// Takes what has come over the ring: who waits for a page that is not held any more goes on at once.
    fn take_in(&self) -> Result<(), GuestError> {
        let answered = lock(&self.requests).take_in(&self.held, |pfn| self.forget(pfn));
        if answered { self.notify() } else { Ok(()) }
    }

    /// `pfn` is held no more; whether it was. What was claimed for it has been used, or is another page's.
    fn forget(&self, pfn: Pfn) -> bool {
        let was = self.held.clear(pfn.index());
        if was {
            self.holds.fetch_sub(1, SeqCst);
            // At most an early claim more than is needed.
            let _ = self.claimed.fetch_update(SeqCst, SeqCst, |claimed| claimed.checked_sub(1));
        }
        was
    }

    fn notify(&self) -> Result<(), GuestError> {
        self.channels.notify(self.port).map_err(self.failed("answer who waits for a page"))
    }

    /// Lets all go on who wait for `pfn`, which is held no more.
    fn answer(&self, pfn: Pfn) -> Result<(), GuestError> {
        self.forget(pfn);
        let answered = lock(&self.requests).settle(&self.held);
        if answered { self.notify() } else { Ok(()) }
    }

    /// Sets memory aside for all that is held.
    fn claim(&self) -> Result<(), GuestError> {
        let holds = self.holds.load(SeqCst);
        let mut calls = lock(&self.calls);
        let info = calls.xen.domain_info(self.domain).map_err(self.failed("read the state"))?;
        // One claim at a time: between the two calls the memory is anybody's.
        let claimed = calls.xen.claim(self.domain, 0).and_then(|()| {
            if holds == 0 { Ok(()) } else { calls.xen.claim(self.domain, info.tot_pages + holds) }
        });
        self.claimed.store(holds, SeqCst);
        claimed.map_err(|error| {
            GuestError::State(format!(
                "the memory of {holds} pages that are paged out can't be claimed for the guest: {error}. Somebody else on this \
                 host was given it meanwhile; free some, or use mode = \"refer\""
            ))
        })
    }

    /// Pages `pfn` out; whether the hypervisor did.
    fn page_out(&self, pfn: Pfn) -> Result<bool, GuestError> {
        let mut calls = lock(&self.calls);
        match calls.xen.page_nominate(self.domain, pfn.0) {
            Ok(()) => match calls.xen.page_evict(self.domain, pfn.0) {
                Ok(()) => Ok(true),
                Err(_) => {
                    self.take_back(&mut calls, pfn).map_err(self.failed("page a page in again"))?;
                    Ok(false)
                }
            },
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) => Err(self.failed("page a page out")(error)),
        }
    }

    /// Pages `pfn` in, with these bytes, unless the guest has given it back; whether it was still there.
    fn page_in(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<bool, GuestError> {
        let mut calls = lock(&self.calls);
        let Calls { xen, page: buffer } = &mut *calls;
        page.copy_part_to(0, &mut buffer.as_mut_bytes()[..PAGE_BYTES]);
        match xen.page_in(self.domain, pfn.0, Some(buffer)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(self.failed("page a page in")(error)),
        }
    }

    /// A nominated page that could not be evicted is the guest's again.
    fn take_back(&self, calls: &mut Calls, pfn: Pfn) -> io::Result<()> {
        match calls.xen.page_in(self.domain, pfn.0, None) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                // Nobody has touched it yet. A touch makes it ready to be taken back.
                let mut window = crate::abi::ForeignWindow::reserve(&calls.xen, 1)?.impatient();
                window.map(self.domain, &[pfn.0], crate::abi::Access::Write)?;
                drop(window);
                match calls.xen.page_in(self.domain, pfn.0, None) {
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                    other => other,
                }
            }
            other => other,
        }
    }
}

/// Binds a port to `remote`, which a process that is ending may have to be parted from first.
fn bind_again(channels: &EventChannels, domain: DomainId, remote: u32) -> io::Result<u32> {
    let begun = Instant::now();
    loop {
        match channels.bind(domain, remote) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && begun.elapsed() < PARTED_WITHIN => {
                std::thread::sleep(Duration::from_millis(5));
            }
            bound => return bound,
        }
    }
}

impl HoldBack for Paging {
    fn hold_back(&self, _: &Bitmap) -> Result<(), GuestError> {
        if self.inherited { Ok(()) } else { self.claim() }
    }
    fn keep(&self, session: &Session<'_>) -> Result<(), GuestError> {
        if let Some(Ok(guard)) = &self.guard {
            guard.hand_over(session.secret);
        }
        Ok(())
    }
    fn table(&self) -> Option<Arc<Mapping>> {
        self.table.clone()
    }
    fn take_up(&self, left: &mut Bitmap) -> Result<(), GuestError> {
        let mut calls = lock(&self.calls);
        let all: Vec<usize> = left.iter().collect();
        for at in all {
            if calls.is_out(self.domain, Pfn::at(at)).map_err(self.failed("ask whether a page is there"))? {
                self.held.set(at);
                self.holds.fetch_add(1, SeqCst);
                self.claimed.fetch_add(1, SeqCst);
            } else {
                left.clear(at);
            }
        }
        Ok(())
    }
    fn holds_ahead(&self) -> bool {
        true
    }
    fn hold_ahead(&self, pfn: Pfn) -> Result<bool, GuestError> {
        let held = self.cost.out.timed(|| self.page_out(pfn), |held| *held)?;
        if held {
            self.held.set(pfn.index());
            let holds = self.holds.fetch_add(1, SeqCst) + 1;
            if holds.saturating_sub(self.claimed.load(SeqCst)) >= CLAIM_EVERY {
                self.claim()?;
            }
        }
        // What somebody has asked for meanwhile is not to take the ring's places.
        self.take_in()?;
        Ok(held)
    }
    fn is_held(&self, pfn: Pfn) -> bool {
        self.held.get(pfn.index())
    }
    fn given_up(&self) -> Option<Pfn> {
        lock(&self.requests).given_up()
    }
    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError> {
        self.cost.back.timed(|| self.page_in(pfn, page), |there| *there)?;
        self.answer(pfn)
    }
    fn wake(&self, pfn: Pfn) -> Result<(), GuestError> {
        self.answer(pfn)
    }
    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError> {
        let deadline = Instant::now() + timeout;
        loop {
            self.take_in()?;
            while let Some(pfn) = lock(&self.requests).fault() {
                if self.held.get(pfn.index()) {
                    return Ok(Some(pfn));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || lock(&self.requests).has_given_up() {
                return Ok(None);
            }
            let descriptor = self.channels.descriptor();
            let mut fds = [PollFd::new(&descriptor, PollFlags::IN)];
            let left = Timespec::try_from(left).ok();
            // Interrupted: it is looked again.
            if poll(&mut fds, left.as_ref()).is_ok_and(|ready| ready > 0) {
                let rung = self.channels.pending().and_then(|port| self.channels.unmask(port));
                rung.map_err(self.failed("hear who waits for a page"))?;
            }
        }
    }
    fn finish(&self) -> Result<(), GuestError> {
        if self.finished.swap(true, SeqCst) {
            return Ok(());
        }
        let begun = Instant::now();
        loop {
            self.take_in()?;
            let off = lock(&self.calls).xen.paging_off(self.domain);
            match off {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < OFF_WITHIN => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(self.failed("turn paging off")(error)),
                Ok(()) => break,
            }
        }
        let claim = lock(&self.calls).xen.claim(self.domain, 0);
        claim.map_err(self.failed("give back claimed memory"))?;
        self.channels.unbind(self.port).map_err(self.failed("close an event channel"))
    }
}
