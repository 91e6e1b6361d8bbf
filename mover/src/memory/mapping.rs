//! A shared mapping of a memory file: a guest's memory in its own process, the same memory in the engine's, the
//! bitmaps between the two. `unsafe` is allowed here.
//!
//! Everything in it may be written by another process at any time, so it is only reachable as [`GuestPage`]s (opaque
//! copies) and as atomic words.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{GuestPage, Window};
use crate::units::{PAGE_BYTES, PageCount, Pfn, u64_of};

/// A shared mapping of a whole number of pages; unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to no thread, and is reached through opaque copies and atomics only.
// Worth it: every thread of a guest or an engine works on one mapping.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of `file` (a memory file), shared, readable and writable. With `prefault` every page is
    /// there on return; without, pages come at their first touch.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    ///
    /// # Panics
    /// If `bytes` is 0 or no whole number of pages.
    pub fn shared(file: BorrowedFd<'_>, bytes: usize, prefault: bool) -> io::Result<Self> {
        let flags = if prefault { MapFlags::SHARED | MapFlags::POPULATE } else { MapFlags::SHARED };
        Self::map(file, bytes, flags, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Maps the first `bytes` of `file` (a memory file), shared, for reading: writing to one of its pages is a broken
    /// invariant, and ends the process with SIGSEGV.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    ///
    /// # Panics
    /// If `bytes` is 0 or no whole number of pages.
    pub fn read_only(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        Self::map(file, bytes, MapFlags::SHARED, ProtFlags::READ)
    }

    fn map(file: BorrowedFd<'_>, bytes: usize, flags: MapFlags, access: ProtFlags) -> io::Result<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES), "{bytes} bytes are no whole number of pages");
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        // Worth it: there is no other way to share memory between processes.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0)? };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { address, bytes })
    }

    /// Enters pages `from..to` into this process's page tables, writable where the mapping is. Pages the file does not
    /// have yet are made: name only those it has. Worth it before writing (73 ms a GiB where touching each page to write
    /// takes 300; a read fault enters 16 pages, a write fault one), not before reading (122 ms against 56).
    /// Linux 5.14 (`madvise(2)`).
    ///
    /// # Errors
    /// What `madvise(2)` says; nothing is lost then, pages come at their first touch.
    ///
    /// # Panics
    /// If it has no such pages.
    pub fn populate(&self, from: Pfn, to: Pfn) -> io::Result<()> {
        assert!(from <= to && to.0 <= self.pages().0, "{from} to {to} of {} pages", self.pages().0);
        // SAFETY: inside the mapping; populating changes no byte. Worth it: a fault a page is a tenth of a lane's time.
        unsafe {
            let start = self.address.add(from.index() * PAGE_BYTES);
            rustix::mm::madvise(
                start.as_ptr().cast(),
                (to.index() - from.index()) * PAGE_BYTES,
                Advice::LinuxPopulateRead,
            )?;
        }
        Ok(())
    }

    /// Maps the first `bytes` of `file` for itself: what is stored through it stays in this process and never reaches
    /// the file. The file must keep its length while it is mapped.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    ///
    /// # Panics
    /// If `bytes` is 0 or no whole number of pages.
    pub fn private(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        Self::map(file, bytes, MapFlags::PRIVATE, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Its first byte's address, page-aligned.
    #[must_use]
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its length in pages.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(u64_of(self.bytes / PAGE_BYTES))
    }

    /// One of its pages.
    ///
    /// # Panics
    /// If it has no such page.
    #[must_use]
    pub fn page(&self, pfn: Pfn) -> GuestPage<'_> {
        assert!(pfn.0 < self.pages().0, "{pfn} of {} pages", self.pages().0);
        // SAFETY: inside the mapping, which lives as long as the borrow of `self`.
        unsafe { GuestPage::new(self.address.add(pfn.index() * PAGE_BYTES)) }
    }

    /// A window for pages of this mapping, which it keeps mapped.
    #[must_use]
    pub fn window(self: &Arc<Self>, capacity: usize) -> Window {
        let mut window = Window::with_capacity(capacity);
        window.backing = Some(Box::new(Arc::clone(self)));
        window
    }

    /// Puts `pages` into `window` instead of what it held, in order; `None` stays none. Only addresses are computed:
    /// no system call, no allocation.
    ///
    /// # Panics
    /// If the window is another mapping's, has no room, or there is no such page.
    pub fn fill(self: &Arc<Self>, pages: impl Iterator<Item = Option<Pfn>>, window: &mut Window) {
        let backing = window.backing.as_ref().and_then(|b| b.downcast_ref::<Arc<Self>>());
        assert!(
            backing.is_some_and(|b| Arc::ptr_eq(b, self)),
            "a window is filled by the mapping that made it"
        );
        window.clear();
        for page in pages {
            let address = page.map(|pfn| self.page(pfn).address());
            // SAFETY: a page of this mapping, which the window's backing keeps.
            // Worth it: a window costs a batch of pages nothing but their addresses.
            unsafe { window.push(address) };
        }
    }

    /// All of it as atomic words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped, aligned to a page, and any bytes are an AtomicU64; other writers are the kernel and other
        // processes. Worth it: bitmaps and page tables are shared word by word.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.bytes / 8) }
    }

    /// All of it as atomic half words.
    #[must_use]
    pub fn half_words(&self) -> &[AtomicU32] {
        // SAFETY: as for `words`.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.bytes / 4) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing borrows any more.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
        assert!(unmapped.is_ok(), "a mapping of our own can always be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageBuf;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_of_one_file_see_each_other() {
        let file = rustix::fs::memfd_create("mapping-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let one = Mapping::shared(file.as_fd(), 8192, true).unwrap();
        let two = Mapping::shared(file.as_fd(), 8192, false).unwrap();
        one.page(Pfn(1)).copy_from(&PageBuf([7; PAGE_BYTES]));
        assert_eq!(two.words()[512].load(Ordering::Relaxed), 0x0707_0707_0707_0707);
        assert!(two.page(Pfn(0)).is_zero());
        two.words()[0].store(1, Ordering::Relaxed);
        assert!(!one.page(Pfn(0)).is_zero());
    }

    #[test]
    fn a_window_outlives_the_mapping_it_was_made_from() {
        let file = rustix::fs::memfd_create("mapping-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 16384).unwrap();
        let mapping = Arc::new(Mapping::shared(file.as_fd(), 16384, false).unwrap());
        mapping.page(Pfn(3)).copy_from(&PageBuf([3; PAGE_BYTES]));
        mapping.populate(Pfn(0), Pfn(4)).unwrap();
        let read_only = Arc::new(Mapping::read_only(file.as_fd(), 16384).unwrap());
        read_only.populate(Pfn(0), Pfn(4)).unwrap();
        for mapping in [mapping, read_only] {
            let mut window = mapping.window(3);
            mapping.fill([Some(Pfn(3)), None, Some(Pfn(1))].into_iter(), &mut window);
            drop(mapping);
            assert!(window.page(1).is_none() && window.page(2).unwrap().is_zero());
            let mut copy = PageBuf::zeroed();
            window.page(0).unwrap().copy_to(&mut copy);
            assert!(copy.0 == [3; PAGE_BYTES]);
        }
    }
}
