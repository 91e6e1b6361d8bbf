//! Guest memory as the engine may touch it, and the engine's own buffers.
//!
//! Guest memory changes under us while the guest runs, so it is never a `&[u8]`: a [`GuestPage`] is an address with
//! a lifetime, whose bytes are copied out or in, tested for zero, or handed to the kernel. `unsafe` is allowed here.

mod arena;
mod mapping;
pub mod nh;
#[cfg(test)]
mod owned;
mod page;
mod raw;
#[cfg(all(test, feature = "loom"))]
pub(crate) mod watched;

pub use arena::{Arena, Backing};
pub use mapping::Mapping;
#[cfg(test)]
pub(crate) use owned::OwnedPages;
pub use page::{GuestPage, PageBuf, Window};

/// Adds a page that the test keeps alive, for tests in modules that forbid `unsafe`.
#[cfg(test)]
pub(crate) fn push_for_test(window: &mut Window, address: std::ptr::NonNull<u8>) {
    // SAFETY: tests pass pages of their own that outlive the window.
    unsafe { window.push(Some(address)) };
}
