//! Guest memory as the engine may touch it, and the engine's own buffers.
//!
//! Guest memory changes under us while the guest runs, so it is never a `&[u8]`: a [`GuestPage`] is an address with
//! a lifetime, whose bytes are copied out or in, tested for zero, or handed to the kernel. `unsafe` is allowed here.

mod mapping;
mod page;

pub use mapping::Mapping;
pub use page::{GuestPage, PageBuf, Window};
