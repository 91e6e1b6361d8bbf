//! Pages of a domain that has never run, lent to disks' reads by grants: entries that we write into the domain's own table
//! let this host's kernel map the pages in a way that it can pin them.
//!
//! ```text
//!     the domain's grant table               lend       entries for a read's pages, in the order of the disk -> map them
//!     frame 0     console, xenstore: not     take_back  unmap -> empty each entry, once nobody uses it
//!                 touched                    close      nothing is lent; every entry reads back empty; the table's frames
//!     frames 1..  read 0's entries, read               are unmapped. The domain gets its last state only then, so that
//!                 1's entries, ...                     none runs with a grant of ours
//! ```
//! Threads: the loader lends and takes back, a read (of up to 1 MiB) at a time; whoever restores the domain closes. Both hold one
//! lock, which the other wants once, in the end: nobody waits for it.
//!
//! Invariants: an entry is not empty only while its page is claimed by the loader and the read that it was lent to is under way;
//! a page is given back as claimed only when its entry is empty again. If this process dies, the kernel unmaps what it had
//! mapped, and the toolstack destroys the domain, which was never finished, with its table.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mover::error::GuestError;
use mover::guest::Lender;
use mover::limits::READ_BYTES_MAX;
use mover::memory::Window;
use mover::units::{PAGE_BYTES, Pfn, u64_of};

use super::lanes::lock;
use crate::abi::{DomainId, Gntdev, GrantEntry, GrantWindow, Resource, Xen};

/// Pages lent to a read.
const READ_PAGES: usize = READ_BYTES_MAX / PAGE_BYTES;
/// The first entry that is ours: those of the table's first frame are for others.
pub(crate) const FIRST: usize = GrantEntry::A_PAGE;
/// How long an entry may stay in use when it has been unmapped, and the pause between two looks: a kernel that still has the
/// page pinned unmaps it a little later.
const UNUSED_WITHIN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_micros(100);

/// The entries of a domain's table, and mappings by them.
pub(crate) trait Grants: Send {
    /// A window to map into.
    fn window(&self) -> Window;
    /// Lets this domain map `frame` by entry `at`.
    fn permit(&mut self, at: usize, frame: u32);
    /// Empties entry `at`; false while somebody has its frame mapped.
    fn clear(&mut self, at: usize) -> bool;
    /// Whether it is empty.
    fn is_clear(&self, at: usize) -> bool;
    /// Maps entries into the empty `window`, one for each place of `there` that says so, from entry `first` on. An error: none.
    fn map(&mut self, window: &mut Window, first: usize, there: &[bool]) -> io::Result<()>;
    /// Unmaps what `window` has.
    fn unmap(&mut self, window: &mut Window) -> io::Result<()>;
}

/// Those of a real one.
struct DomainGrants {
    table: Resource,
    device: Gntdev,
}

impl Grants for DomainGrants {
    fn window(&self) -> Window {
        GrantWindow::open(READ_PAGES)
    }
    fn permit(&mut self, at: usize, frame: u32) {
        // The control domain, which this is, is number 0.
        self.table.set_grant(at, GrantEntry { flags: GrantEntry::PERMIT_ACCESS, domain: 0, frame });
    }
    fn clear(&mut self, at: usize) -> bool {
        self.table.clear_grant(at)
    }
    fn is_clear(&self, at: usize) -> bool {
        self.table.grant(at) == GrantEntry::default()
    }
    fn map(&mut self, window: &mut Window, first: usize, there: &[bool]) -> io::Result<()> {
        GrantWindow::map(window, &mut self.device, first, there)
    }
    fn unmap(&mut self, window: &mut Window) -> io::Result<()> {
        GrantWindow::unmap(window, &self.device)
    }
}

/// What lending has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lent {
    /// Pages lent, each as often as it was.
    pub pages: u64,
    /// Nanoseconds that lending took, and taking back.
    pub out_ns: u64,
    /// The same of taking back.
    pub back_ns: u64,
}

impl fmt::Display for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = |ns: u64| ns / self.pages.max(1);
        let (pages, out, back) = (self.pages, each(self.out_ns), each(self.back_ns));
        write!(
            f,
            "{pages} pages lent to the disk by grants, {out} ns a page to lend and {back} ns to take back; none is left"
        )
    }
}

#[derive(Debug, Default)]
struct Figures {
    pages: AtomicU64,
    out_ns: AtomicU64,
    back_ns: AtomicU64,
}

fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The loans of one domain.
pub(crate) struct Loans {
    domain: DomainId,
    book: Mutex<Option<Book>>,
    figures: Figures,
}

impl fmt::Debug for Loans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loans({}, {:?})", self.domain, self.figures)
    }
}

/// What is lent now.
struct Book {
    grants: Box<dyn Grants>,
    /// Entries in use, a read.
    lent: Box<[usize]>,
}

impl Book {
    fn first(slot: usize) -> usize {
        FIRST + slot * READ_PAGES
    }
    /// All entries that are ours.
    fn all(&self) -> Range<usize> {
        FIRST..FIRST + self.lent.len() * READ_PAGES
    }

    /// Empties the entries of `slot`, for whose pages there is no mapping any more.
    fn empty(&mut self, slot: usize) -> Result<(), String> {
        let begun = Instant::now();
        let first = Self::first(slot);
        for at in first..first + self.lent[slot] {
            while !self.grants.clear(at) {
                if begun.elapsed() > UNUSED_WITHIN {
                    return Err(format!("grant {at} stays in use after it was unmapped"));
                }
                std::thread::sleep(LOOK);
            }
        }
        self.lent[slot] = 0;
        Ok(())
    }
}

impl Loans {
    /// Of `domain`, to so many reads at a time.
    ///
    /// # Errors
    /// A sentence: why its pages can't be lent.
    pub(super) fn open(domain: DomainId, slots: usize) -> Result<Arc<Self>, String> {
        let mut xen =
            Xen::open().map_err(|error| format!("the hypervisor can't be reached for grants: {error}"))?;
        let device = Gntdev::open(domain).map_err(|error| {
            format!("this host's kernel maps no grants (/dev/xen/gntdev: {error}; `modprobe xen-gntdev`)")
        })?;
        let frames = (FIRST + slots * READ_PAGES).div_ceil(GrantEntry::A_PAGE);
        let table = Resource::grant_table(&xen, domain, frames).map_err(|error| {
            format!("the guest's grant table can't have {frames} pages ({error}; `max_grant_frames` of its configuration)")
        })?;
        match xen.grant_table(domain) {
            Ok((_, 1)) => {}
            Ok((_, version)) => {
                return Err(format!("the guest's grant table is one of version {version}, not 1"));
            }
            Err(error) => return Err(format!("the guest's grant table can't be read: {error}")),
        }
        Self::with(domain, slots, Box::new(DomainGrants { table, device }))
    }

    /// The same over these entries.
    pub(crate) fn with(domain: DomainId, slots: usize, grants: Box<dyn Grants>) -> Result<Arc<Self>, String> {
        let book = Book { grants, lent: vec![0; slots].into_boxed_slice() };
        if let Some(at) = book.all().find(|at| !book.grants.is_clear(*at)) {
            return Err(format!("grant {at} of a guest that has never run is somebody's"));
        }
        Ok(Arc::new(Self { domain, book: Mutex::new(Some(book)), figures: Figures::default() }))
    }

    /// What lends pages, of those that `lendable` says can be.
    pub(crate) fn lender(
        self: &Arc<Self>,
        lendable: impl Fn(Pfn) -> bool + Send + 'static,
    ) -> Box<dyn Lender> {
        Box::new(ByGrants { loans: Arc::clone(self), lendable: Box::new(lendable) })
    }

    /// Nothing is lent any more, as has to be seen from outside: what the entries were; then lets go of the table.
    ///
    /// # Errors
    /// Something is: a sentence. The domain must not run.
    pub(crate) fn close(&self) -> Result<(), String> {
        let Some(book) = lock(&self.book).take() else { return Ok(()) };
        if let Some(slot) = book.lent.iter().position(|lent| *lent > 0) {
            return Err(format!(
                "{} of its pages are lent to a read of a disk that is under way",
                book.lent[slot]
            ));
        }
        let left = book.all().filter(|at| !book.grants.is_clear(*at)).count();
        if left > 0 {
            return Err(format!("{left} grants of ours are left in its table"));
        }
        Ok(())
    }

    /// What it has come to.
    pub(crate) fn figures(&self) -> Lent {
        let Figures { pages, out_ns, back_ns } = &self.figures;
        Lent { pages: pages.load(Relaxed), out_ns: out_ns.load(Relaxed), back_ns: back_ns.load(Relaxed) }
    }
}

/// Lends pages of one domain.
struct ByGrants {
    loans: Arc<Loans>,
    lendable: Box<dyn Fn(Pfn) -> bool + Send>,
}

impl ByGrants {
    fn stuck(&self, why: &str) -> GuestError {
        let domain = self.loans.domain;
        GuestError::State(format!("pages of {domain} that were lent to the disk can't be had back: {why}"))
    }
}

impl Lender for ByGrants {
    fn window(&mut self) -> Result<Window, GuestError> {
        let book = lock(&self.loans.book);
        let window = book.as_ref().map(|book| book.grants.window());
        window.ok_or_else(|| GuestError::State("the guest is about to run".to_owned()))
    }

    fn lend(&mut self, slot: usize, pages: &[Pfn], window: &mut Window) -> Result<(), String> {
        let began = Instant::now();
        let mut book = lock(&self.loans.book);
        let Some(book) = book.as_mut() else { return Err("the guest is about to run".to_owned()) };
        assert_eq!(book.lent[slot], 0, "a read has one loan");
        let mut there = [false; READ_PAGES];
        for (there, pfn) in there.iter_mut().zip(pages).filter(|(_, pfn)| (self.lendable)(**pfn)) {
            if let Ok(frame) = u32::try_from(pfn.0) {
                book.grants.permit(Book::first(slot) + book.lent[slot], frame);
                book.lent[slot] += 1;
                *there = true;
            }
        }
        if book.lent[slot] == 0 {
            return Ok(());
        }
        if let Err(error) = book.grants.map(window, Book::first(slot), &there[..pages.len()]) {
            let emptied = book.empty(slot);
            return Err(match emptied {
                Ok(()) => format!("the guest's pages can't be mapped by grants: {error}"),
                Err(why) => why,
            });
        }
        self.loans.figures.pages.fetch_add(u64_of(book.lent[slot]), Relaxed);
        self.loans.figures.out_ns.fetch_add(since(began), Relaxed);
        Ok(())
    }

    fn take_back(&mut self, slot: usize, window: &mut Window) -> Result<(), GuestError> {
        let began = Instant::now();
        let mut book = lock(&self.loans.book);
        let Some(book) = book.as_mut() else {
            return Err(self.stuck("the guest was about to run before they were"));
        };
        book.grants.unmap(window).map_err(|error| self.stuck(&error.to_string()))?;
        book.empty(slot).map_err(|why| self.stuck(&why))?;
        self.loans.figures.back_ns.fetch_add(since(began), Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulated::{SimGrants, grant_world};
    use mover::memory::PageBuf;

    const DOMAIN: DomainId = DomainId(7);

    fn loans(grants: &SimGrants) -> (Arc<Loans>, Box<dyn Lender>) {
        let loans = Loans::with(DOMAIN, 2, Box::new(grants.clone())).unwrap();
        let lender = loans.lender(|pfn| pfn != Pfn(5));
        (loans, lender)
    }

    #[test]
    fn pages_are_lent_in_the_order_of_the_disk_and_nothing_is_left() {
        let (grants, memory) = grant_world(64);
        let (loans, mut lender) = loans(&grants);
        let mut window = lender.window().unwrap();
        lender.lend(1, &[Pfn(9), Pfn(5), Pfn(3)], &mut window).unwrap();
        assert!(window.page(1).is_none(), "it has no memory to be lent");
        window.page(0).unwrap().copy_from(&PageBuf([9; PAGE_BYTES]));
        window.page(2).unwrap().copy_from(&PageBuf([3; PAGE_BYTES]));
        assert_eq!(grants.in_use(), [FIRST + READ_PAGES, FIRST + READ_PAGES + 1]);
        let why = loans.close().unwrap_err();
        assert!(why.contains("2 of its pages are lent"), "{why}");
        let mut now = PageBuf::zeroed();
        for pfn in [3, 9] {
            memory.page(Pfn(pfn)).copy_to(&mut now);
            assert!(now.0 == [u8::try_from(pfn).unwrap(); PAGE_BYTES]);
        }
    }

    #[test]
    fn what_is_taken_back_is_waited_for_until_nobody_uses_it() {
        let (grants, _) = grant_world(64);
        let (loans, mut lender) = loans(&grants);
        let mut window = lender.window().unwrap();
        grants.linger(3);
        for slot in [0, 1, 0] {
            lender.lend(slot, &[Pfn(1), Pfn(2)], &mut window).unwrap();
            lender.take_back(slot, &mut window).unwrap();
            assert!(grants.in_use().is_empty() && grants.written().is_empty() && window.is_empty());
        }
        loans.close().unwrap();
        assert_eq!(loans.figures().pages, 6);
        let why = lender.lend(0, &[Pfn(1)], &mut window).unwrap_err();
        assert!(why.contains("about to run") && grants.written().is_empty(), "{why}");
    }

    #[test]
    fn a_mapping_that_is_refused_leaves_no_entry() {
        let (grants, _) = grant_world(64);
        let (loans, mut lender) = loans(&grants);
        let mut window = lender.window().unwrap();
        grants.refuse_after(1);
        lender.lend(0, &[Pfn(1)], &mut window).unwrap();
        let mut other = lender.window().unwrap();
        let why = lender.lend(1, &[Pfn(2), Pfn(3)], &mut other).unwrap_err();
        assert!(why.contains("can't be mapped by grants") && other.is_empty(), "{why}");
        assert_eq!(grants.written(), [FIRST], "the other read's");
        lender.take_back(0, &mut window).unwrap();
        loans.close().unwrap();
    }

    /// What is seen in the end is what is in the table, not what we think is there.
    #[test]
    fn a_grant_that_was_forgotten_keeps_the_guest_from_running() {
        let (grants, _) = grant_world(64);
        let (loans, _lender) = loans(&grants);
        grants.clone().permit(FIRST + 300, 4);
        let why = loans.close().unwrap_err();
        assert!(why.contains("1 grants of ours are left"), "{why}");
    }

    #[test]
    fn entries_of_somebody_else_are_left_alone() {
        let (grants, _) = grant_world(64);
        grants.clone().permit(FIRST + 7, 4);
        assert!(Loans::with(DOMAIN, 2, Box::new(grants.clone())).unwrap_err().contains("somebody's"));
        assert_eq!(grants.written(), [FIRST + 7]);
    }
}
