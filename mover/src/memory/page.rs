//! One guest page, a window of them, and a page-sized buffer of our own.

use std::any::Any;
use std::marker::PhantomData;
use std::ptr::NonNull;

use super::raw;
use crate::units::PAGE_BYTES;

/// A page of our own, aligned as O_DIRECT wants it.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct PageBuf(pub [u8; PAGE_BYTES]);

impl PageBuf {
    /// All zero.
    #[must_use]
    pub const fn zeroed() -> Self {
        Self([0; PAGE_BYTES])
    }
    /// This page as one that connections and disks take; it is borrowed as long as that is around.
    #[must_use]
    pub fn as_guest_page(&mut self) -> GuestPage<'_> {
        // SAFETY: a PageBuf is aligned and a page long, and mutably borrowed for as long as the GuestPage lives.
        // Worth it: staging buffers go through the same calls as guest memory.
        unsafe { GuestPage::new(NonNull::from(&mut self.0).cast()) }
    }
}

impl Default for PageBuf {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// One mapped page of a guest, for as long as its [`Window`] holds it.
#[derive(Clone, Copy)]
pub struct GuestPage<'w> {
    address: NonNull<u8>,
    window: PhantomData<&'w Window>,
}

// SAFETY: a GuestPage is an address inside a mapping that its window keeps alive; every access through it is a
// racy copy by design (the guest writes at any time) and made with opaque or raw copies, never through references.
// Worth it: lanes on several threads send from and write to one guest.
unsafe impl Send for GuestPage<'_> {}
// SAFETY: as above.
unsafe impl Sync for GuestPage<'_> {}

impl GuestPage<'_> {
    /// Names the page at `address`.
    ///
    /// # Safety
    /// `address` is page-aligned and stays mapped and readable for `PAGE_BYTES`, for the lifetime of the value, which
    /// the caller ties to a window or a mapping. It is writable too, or writing to it ends the process (SIGSEGV).
    #[must_use]
    pub unsafe fn new(address: NonNull<u8>) -> Self {
        Self { address, window: PhantomData }
    }

    /// The page's address, for the kernel.
    #[must_use]
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Reads a byte from user mode, so that the page is there afterwards: the kernel can then be handed its address
    /// even where only faults from user mode are served.
    pub fn touch(&self) {
        let mut byte = 0;
        // SAFETY: the page is mapped as `new` was promised, `byte` is ours alone; a copy, since the guest may write meanwhile.
        // Worth it: a fault taken here waits, one taken inside a system call would fail.
        unsafe { raw::copy_bytes(self.address.as_ptr(), &raw mut byte, 1) };
    }

    /// Copies the page's bytes out. While the guest writes, the copy may be torn; it is still just bytes.
    pub fn copy_to(&self, out: &mut PageBuf) {
        // SAFETY: the page is mapped as `new` was promised, `out` is ours alone.
        unsafe { raw::copy(self.address.as_ptr(), out.0.as_mut_ptr()) };
    }

    /// Overwrites the page.
    pub fn copy_from(&self, bytes: &PageBuf) {
        // SAFETY: as in `copy_to`, the other way.
        unsafe { raw::copy(bytes.0.as_ptr(), self.address.as_ptr()) };
    }

    /// Overwrites the page from a slice of our own of just a page's length, past the cache: for placing many pages
    /// that this thread will not read again. What it does afterwards (a store, a system call) is after these bytes.
    ///
    /// # Panics
    /// If `bytes` is not a page long.
    pub fn copy_from_slice(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), PAGE_BYTES);
        // SAFETY: as in `copy_to`, the other way; the length is checked just above.
        unsafe { raw::stream(bytes.as_ptr(), self.address.as_ptr()) };
    }

    /// Copies the bytes from `offset` on out, as many as `out` takes.
    ///
    /// # Panics
    /// If they reach past the page's end.
    pub fn copy_part_to(&self, offset: usize, out: &mut [u8]) {
        assert!(offset <= PAGE_BYTES && out.len() <= PAGE_BYTES - offset, "{} bytes at {offset}", out.len());
        // SAFETY: both ranges are valid for the length, which was checked; they do not overlap, as `out` is ours alone.
        // Worth it: an encrypted connection gathers pages where its records begin and end.
        unsafe { raw::copy_bytes(self.address.as_ptr().add(offset), out.as_mut_ptr(), out.len()) };
    }

    /// Overwrites the bytes from `offset` on.
    ///
    /// # Panics
    /// If they reach past the page's end.
    pub fn copy_part_from(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset <= PAGE_BYTES && bytes.len() <= PAGE_BYTES - offset,
            "{} bytes at {offset}",
            bytes.len()
        );
        // SAFETY: as in `copy_part_to`, the other way.
        unsafe { raw::copy_bytes(bytes.as_ptr(), self.address.as_ptr().add(offset), bytes.len()) };
    }

    /// Zeroes the page.
    pub fn fill_zero(&self) {
        static ZERO: PageBuf = PageBuf::zeroed();
        self.copy_from(&ZERO);
    }

    /// Writes to the page without changing it, so that a log of written pages has it. Whoever lets a device write to
    /// tracked memory (a read with O_DIRECT) does this once the device has finished: a log armed or harvested while
    /// the read was in flight has seen the page pinned, not written.
    pub fn mark_written(&self) {
        // SAFETY: mapped, writable and aligned, as `new` was promised; adding 0 atomically changes nothing under a
        // concurrent writer. Worth it: the alternative is to copy the page onto itself.
        let word = unsafe { std::sync::atomic::AtomicU64::from_ptr(self.address.as_ptr().cast()) };
        // The optimiser turns an addition of a 0 it can see into a load, which no log would notice.
        word.fetch_add(std::hint::black_box(0), std::sync::atomic::Ordering::SeqCst);
    }

    /// Has the processor fetch the page's first bytes while it does something else: [`Self::is_zero`] mostly looks at
    /// no others, and no processor foresees steps of a page.
    #[inline]
    pub fn prefetch(&self) {
        raw::prefetch(self.address.as_ptr());
    }

    /// Whether all its bytes are zero. Most pages that are not say so within their first 128 bytes.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        // SAFETY: mapped and aligned to a page, as `new` was promised.
        unsafe { raw::is_zero(self.address.as_ptr()) }
    }
}

/// A batch of mapped guest pages. Made once by [`crate::guest::GuestMemory::window`] and used again for every
/// batch, so that mapping allocates nothing.
pub struct Window {
    pages: Vec<Option<NonNull<u8>>>,
    /// What the backend keeps for this window (a reserved address range, a batch of frame numbers).
    pub backing: Option<Box<dyn Any + Send>>,
}

// SAFETY: the addresses belong to mappings that the backend keeps for the window's life; the window only names them.
// Worth it: a window is made on one thread and moved to the lane that uses it.
unsafe impl Send for Window {}

impl Window {
    /// An empty window with room for `capacity` pages.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { pages: Vec::with_capacity(capacity), backing: None }
    }
    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.pages.clear();
    }
    /// Adds the next page, `None` where it could not be mapped.
    ///
    /// # Safety
    /// As for [`GuestPage::new`], until the window is cleared or dropped.
    ///
    /// # Panics
    /// If the window is full.
    pub unsafe fn push(&mut self, address: Option<NonNull<u8>>) {
        assert!(self.pages.len() < self.pages.capacity(), "a window never grows");
        self.pages.push(address);
    }
    /// Pages in the window.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
    /// Room for pages.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages.capacity()
    }
    /// The page at place `index`, `None` where it could not be mapped.
    #[must_use]
    pub fn page(&self, index: usize) -> Option<GuestPage<'_>> {
        // SAFETY: pushed under the promise of `push`, which holds while `self` is borrowed.
        self.pages[index].map(|address| unsafe { GuestPage::new(address) })
    }
}
