//! Pageferry's engine: moves a running guest's memory from one host to another, and leaves behind what the
//! other host can load for itself from the guest's disk.
//!
//! The engine knows no hypervisor. It reaches the outside only through traits: a guest ([`guest`]), a network
//! ([`net`]), disks ([`disk`]), and time, threads and randomness ([`runtime`]). [`process`] implements them for a
//! guest that is an ordinary process, `sim`, built for tests only, for a world driven by a seed.
//!
//! Imports run one way, each group uses only those before it: units, error, limits, sync | confine, kernel, memory, bitmap, runtime, fingerprint,
//! wire | disk, index, net | guest, report, policy, evacuation, journal, state | pipeline | source, target | process, sim.

pub mod bitmap;
pub mod confine;
pub mod disk;
pub mod error;
pub mod evacuation;
pub mod fingerprint;
pub mod guest;
pub mod index;
pub mod journal;
pub mod kernel;
pub mod limits;
#[cfg(all(test, feature = "loom"))]
mod loom_models;
pub mod memory;
pub mod net;
pub mod pipeline;
pub mod policy;
pub mod process;
pub mod report;
pub mod runtime;
#[cfg(test)]
mod sim;
pub mod source;
pub mod state;
mod sync;
pub mod target;
pub mod units;
pub mod wire;

pub use error::{Error, ExitClass};
