//! The harness behind `cargo xtask bench`: each suite compares what the engine does with a plain reference in the same
//! run, interleaved, and reports medians with their range. A figure whose range hides the answer is reported as
//! undecided, not as a pass.
//!
//! Figures are ratios wherever they can be: machines differ, and a shared one differs from minute to minute.

#![forbid(unsafe_code)]

pub mod buffer;
pub mod command;
pub mod demo;
pub mod fio;
pub mod fleet;
pub mod fuse;
pub mod idle;
pub mod iperf3;
pub mod machine;
pub mod nas;
pub mod onlooker;
mod owned;
pub mod page;
pub mod program;
pub mod qemu;
pub mod report;
pub mod stats;
pub mod suite;
pub mod worker;
pub mod writer;
