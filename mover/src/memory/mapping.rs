//! A shared mapping of a memory file: a guest's memory in its own process, the same memory in the engine's, the
//! bitmaps between the two. `unsafe` is allowed here.
//!
//! Everything in it may be written by another process at any time, so it is only reachable as [`GuestPage`]s (opaque
//! copies) and as atomic words.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use super::GuestPage;
use crate::units::{PAGE_BYTES, PageCount, Pfn, u64_of};

/// A readable, writable, shared mapping of a whole number of pages; unmapped on drop.
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
    /// Maps the first `bytes` of `file` (a memory file), shared. With `prefault` every page is there on return;
    /// without, pages come at their first touch.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    ///
    /// # Panics
    /// If `bytes` is 0 or no whole number of pages.
    pub fn shared(file: BorrowedFd<'_>, bytes: usize, prefault: bool) -> io::Result<Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE_BYTES), "{bytes} bytes are no whole number of pages");
        let flags = if prefault { MapFlags::SHARED | MapFlags::POPULATE } else { MapFlags::SHARED };
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        // Worth it: there is no other way to share memory between processes.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0)?
        };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { address, bytes })
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

    /// All of it as atomic words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped, aligned to a page, and any bytes are an AtomicU64; other writers are the kernel and other
        // processes. Worth it: bitmaps and page tables are shared word by word.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.bytes / 8) }
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
}
