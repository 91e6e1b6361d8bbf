//! The engine's world, driven by one seed.
//!
//! The same [`crate::source`] and [`crate::target`] code as everywhere runs here as coroutines of one thread, over a
//! simulated clock, link, disks and guest. A seed decides every interleaving, every delay, the workload and what goes
//! wrong; the oracle knows what each byte must be. Built for tests only.
//!
//! ```text
//!   scenario (all a seed decides)        scheduler (coroutines, clock)   rng
//!      |                                      |
//!   world ---- ends ---- source::migrate, target::receive
//!      |  faults               |  runtime  net  disk  backend  index     the traits, simulated
//!      |                       v
//!   oracle <---------------- guest, workload (a guest that checks itself), content
//! ```
//! `fleet` runs several such worlds at once, between two hosts, over one wire and one disk.
//!
//! `PAGEFERRY_SEEDS=5000 cargo nextest run -p mover sim::seeds` runs that many seeds (`PAGEFERRY_FIRST_SEED` where to
//! begin); `PAGEFERRY_SEED=N cargo nextest run -p mover sim::seed --no-capture` runs one and tells its story.
#![forbid(unsafe_code)]

mod backend;
mod content;
mod disk;
mod ends;
mod faults;
mod fleet;
mod guest;
mod guest_tests;
mod index;
mod net;
mod oracle;
mod rng;
mod runtime;
mod scenario;
mod scheduler;
mod seeds;
mod tests;
mod workload;
mod world;
