//! Pages of our own that are handed out as guest pages: a simulated guest's memory. For tests only.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use super::{GuestPage, Window};
use crate::units::PAGE_BYTES;

/// A guest's memory on the heap: `pages` pages, zero at first. Kept alive by every window that names its pages.
pub(crate) struct OwnedPages {
    base: NonNull<u8>,
    pages: usize,
}

// SAFETY: OwnedPages is an address range it owns alone; all access goes through GuestPage's racy copies, as with a
// guest's mapping. Worth it: it stands in for guest memory, which every thread of the engine touches.
unsafe impl Send for OwnedPages {}
// SAFETY: as above.
unsafe impl Sync for OwnedPages {}

impl OwnedPages {
    /// Memory of `pages` pages, all zero.
    ///
    /// # Panics
    /// If `pages` is 0 or more than the address space holds.
    #[must_use]
    pub(crate) fn new(pages: usize) -> Self {
        let layout = Self::layout(pages);
        // SAFETY: the layout's size is not 0 (checked in `layout`). Worth it: a Vec of pages would be written, and
        // its bytes would be Rust's to assume unchanged.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
        Self { base, pages }
    }

    fn layout(pages: usize) -> Layout {
        assert!(pages > 0, "a guest has pages");
        let bytes = pages.checked_mul(PAGE_BYTES).expect("a guest fits the address space");
        Layout::from_size_align(bytes, PAGE_BYTES).expect("a guest fits the address space")
    }

    /// Pages.
    #[must_use]
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The page at `index`.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub(crate) fn page(&self, index: usize) -> GuestPage<'_> {
        // SAFETY: the address is page-aligned, inside the allocation, which lives as long as the borrow of self.
        unsafe { GuestPage::new(self.address(index)) }
    }

    /// Which page of this memory `page` is, if it is one.
    #[must_use]
    pub(crate) fn index_of(&self, page: GuestPage<'_>) -> Option<usize> {
        let offset = page.address().addr().get().checked_sub(self.base.addr().get())?;
        (offset / PAGE_BYTES < self.pages).then_some(offset / PAGE_BYTES)
    }

    /// Fills `window` with the pages at `indexes`, instead of what it held; `None` stays a page that is not there.
    /// The window keeps the memory alive.
    ///
    /// # Panics
    /// If there is no such page, or the window has no room.
    pub(crate) fn map(self: &Arc<Self>, indexes: impl Iterator<Item = Option<usize>>, window: &mut Window) {
        window.clear();
        window.backing = Some(Box::new(Arc::clone(self)));
        for index in indexes {
            let address = index.map(|i| self.address(i));
            // SAFETY: as in `page`; the allocation lives as long as the window's backing, set just above.
            unsafe { window.push(address) };
        }
    }

    fn address(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.pages, "page {index} of {}", self.pages);
        // SAFETY: inside the allocation: index < pages. Worth it: NonNull's arithmetic is unsafe as such.
        unsafe { self.base.add(index * PAGE_BYTES) }
    }
}

impl Drop for OwnedPages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout, and not freed before.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.pages)) };
    }
}

mod tests {
    use super::*;
    use crate::memory::PageBuf;

    #[test]
    fn a_window_keeps_the_memory_it_names() {
        let memory = Arc::new(OwnedPages::new(3));
        let mut window = Window::with_capacity(2);
        memory.map([Some(2), None].into_iter(), &mut window);
        let page = window.page(0).unwrap();
        assert_eq!(memory.index_of(page), Some(2));
        drop(memory);
        assert!(page.is_zero());
        page.copy_part_from(4090, &[7; 6]);
        let mut buf = PageBuf::zeroed();
        page.copy_to(&mut buf);
        assert_eq!(buf.0[4088..], [0, 0, 7, 7, 7, 7, 7, 7]);
        assert!(window.page(1).is_none());
        assert_eq!(OwnedPages::new(1).index_of(page), None);
    }
}
