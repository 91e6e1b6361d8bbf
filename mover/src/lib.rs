//! Pageferry's engine: moves a running guest's memory from one host to another, and leaves behind what the
//! other host can load for itself from the guest's disk.
//!
//! The engine knows no hypervisor. It reaches the outside only through traits: a guest ([`guest`]), a network
//! ([`net`]), disks ([`disk`]), and time, threads and randomness ([`runtime`]). [`process`] implements them for a
//! guest that is an ordinary process, `sim` for a world driven by a seed.
//!
//! Imports run one way, from the end of this list to its start: a module may use those above it.

pub mod units;
pub mod error;
pub mod limits;
pub mod kernel;
pub mod memory;
pub mod bitmap;
pub mod runtime;
pub mod fingerprint;
pub mod wire;
pub mod disk;
pub mod index;
pub mod net;
pub mod guest;
pub mod report;
pub mod policy;
pub mod pipeline;
pub mod source;
pub mod target;
pub mod process;
pub mod sim;

pub use error::{Error, ExitClass};
