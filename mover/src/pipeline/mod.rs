//! The stages a page passes: scan, judge, gather and send on the source; receive, place, load and check on the
//! target. Each stage is a task's loop over traits; `source` and `target` put them together.
#![forbid(unsafe_code)]

pub mod control;
pub mod failure;
pub mod faults;
pub mod gate;
pub mod judge;
pub mod landing;
pub mod load;
pub mod receive;
mod run;
pub mod send;
pub mod table;
pub mod work;

pub use failure::Failure;
