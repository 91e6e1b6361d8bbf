//! The system's allocator with a count of what chosen threads allocate: how tests see that the hot path does not
//! (invariant 6). A program that wants it names it as its `#[global_allocator]`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Longest name of a thread, with its end (`prctl(2)`, `PR_GET_NAME`).
const NAME_BYTES: usize = 16;

/// Counts allocations of threads whose names begin with one of its prefixes.
pub struct Counting {
    prefixes: &'static [&'static str],
    allocations: AtomicU64,
}

impl Counting {
    /// Counts for names that begin with one of `prefixes`.
    #[must_use]
    pub const fn new(prefixes: &'static [&'static str]) -> Self {
        Self { prefixes, allocations: AtomicU64::new(0) }
    }

    /// Allocations so far, reallocations included.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.allocations.load(SeqCst)
    }

    fn count(&self) {
        let mut name = [0_u8; NAME_BYTES];
        // SAFETY: the request writes at most 16 bytes, which `name` has. Worth it: asking for the name in any safe way
        // allocates.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        if self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_bytes())) {
            self.allocations.fetch_add(1, SeqCst);
        }
    }
}

// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing. Worth it: there is no
// other way to see an allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, bytes) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) };
    }
}
