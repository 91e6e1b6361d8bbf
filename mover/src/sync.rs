//! The atomics of what is lock-free here: bitmaps, the page table, the landing's mode, a round's cursor, bells, the
//! bandwidth cap, the index. They are the standard library's, but for the models of `loom_models`, where they are loom's:
//! then every interleaving is tried that these orderings allow, and every value an ordering lets a load return.
//!
//! loom has no sequentially consistent accesses: it takes them for acquire and release, and finds what can't happen. So in
//! a model such a load is a read-modify-write that changes nothing, and such a store a swap: both work on the newest
//! value, so all of them lie in one order, and they synchronise with each other no more than acquire and release do.
#![forbid(unsafe_code)]

#[cfg(not(all(test, feature = "loom")))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

#[cfg(all(test, feature = "loom"))]
pub(crate) use modelled::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// `count` words of zero; pages of the kernel's that are shared and zero until they are first used. `None` without
/// address space for them.
#[cfg(not(all(test, feature = "loom")))]
pub(crate) fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    <[AtomicU64] as zerocopy::FromZeros>::new_box_zeroed_with_elems(count).ok()
}

/// As [`zeroed`], of half words.
#[cfg(not(all(test, feature = "loom")))]
pub(crate) fn zeroed_halves(count: usize) -> Option<Box<[AtomicU32]>> {
    <[AtomicU32] as zerocopy::FromZeros>::new_box_zeroed_with_elems(count).ok()
}

#[cfg(all(test, feature = "loom"))]
pub(crate) fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    Some((0..count).map(|_| AtomicU64::new(0)).collect())
}

#[cfg(all(test, feature = "loom"))]
pub(crate) fn zeroed_halves(count: usize) -> Option<Box<[AtomicU32]>> {
    Some((0..count).map(|_| AtomicU32::new(0)).collect())
}

#[cfg(all(test, feature = "loom"))]
#[allow(unreachable_pub, reason = "as visible as the atomics they stand for, which public types have")]
mod modelled {
    use loom::sync::atomic as raw;
    pub(crate) use loom::sync::atomic::{Ordering, fence};
    use std::sync::atomic::Ordering::{AcqRel, Acquire, Release, SeqCst};

    /// What a read-modify-write's ordering is in a model.
    fn both(order: Ordering) -> Ordering {
        if order == SeqCst { AcqRel } else { order }
    }

    macro_rules! modelled {
        ($name:ident, $value:ty, $nothing:expr) => {
            #[derive(Debug, Default)]
            pub struct $name(raw::$name);

            #[allow(dead_code, reason = "each is as whole as the other")]
            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(raw::$name::new(value))
                }
                pub fn load(&self, order: Ordering) -> $value {
                    if order == SeqCst { self.0.fetch_or($nothing, Acquire) } else { self.0.load(order) }
                }
                pub fn store(&self, value: $value, order: Ordering) {
                    if order == SeqCst {
                        self.0.swap(value, Release);
                    } else {
                        self.0.store(value, order);
                    }
                }
                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    self.0.swap(value, both(order))
                }
                pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_or(value, both(order))
                }
                pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_and(value, both(order))
                }
                pub fn compare_exchange(
                    &self,
                    from: $value,
                    to: $value,
                    order: Ordering,
                    failed: Ordering,
                ) -> Result<$value, $value> {
                    let failed = if failed == SeqCst { Acquire } else { failed };
                    self.0.compare_exchange(from, to, both(order), failed)
                }
                pub fn compare_exchange_weak(
                    &self,
                    from: $value,
                    to: $value,
                    order: Ordering,
                    failed: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(from, to, order, failed)
                }
            }
        };
    }

    modelled!(AtomicBool, bool, false);
    modelled!(AtomicU8, u8, 0);
    modelled!(AtomicU32, u32, 0);
    modelled!(AtomicU64, u64, 0);
    modelled!(AtomicUsize, usize, 0);

    macro_rules! counting {
        ($($name:ident $value:ty),*) => {$(
            #[allow(dead_code, reason = "each is as whole as the other")]
            impl $name {
                pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_add(value, both(order))
                }
                pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_sub(value, both(order))
                }
            }
        )*};
    }

    counting!(AtomicU8 u8, AtomicU32 u32, AtomicU64 u64, AtomicUsize usize);
}
