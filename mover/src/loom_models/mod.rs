//! Models of every lock-free piece of the engine, for loom: it runs each under all interleavings of its threads, and lets
//! each load return every value that its ordering allows (`cargo xtask models`). What one thread writes under a claim
//! and another reads later stands in a cell that loom watches: an ordering that is too weak shows as a race, a wake-up
//! that is lost as a deadlock, and what a piece promises is compared with a plain model of it.
//!
//! Threads of a model number two or three and do little each: the number of interleavings grows beyond all bounds.
//! `LOOM_MAX_PREEMPTIONS` bounds how often a thread is interrupted; what is found is nearly always found with two.
#![forbid(unsafe_code)]

mod bell;
mod bitmap;
mod index;
mod landing;
mod lanes;
mod table;

use crate::fingerprint::Check;
use crate::units::{BlockAddress, DiskId, Sector};

/// A block and a check that belong together, told by their number.
fn reference(number: u8) -> (BlockAddress, Check) {
    (BlockAddress { disk: DiskId(number), sector: Sector(u64::from(number) * 8) }, Check([number; 16]))
}
