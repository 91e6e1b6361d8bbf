//! The engine's world, driven by one seed.
#![forbid(unsafe_code)]

mod backend;
mod content;
mod disk;
mod guest;
mod guest_tests;
mod index;
mod net;
mod rng;
mod runtime;
mod scheduler;
mod tests;
mod workload;
