//! The Xen lab: two hosts under QEMU's software emulation of an AMD processor, each with the real hypervisor, a Debian
//! dom0 and the real toolstack; one raw disk both reach, as a LUN on a SAN; one wire between them.
//!
//! ```text
//!            lab (this machine)
//!      agent's line |         | agent's line          commands and their output, files, shells
//!             +-----+--+   +--+-----+
//!             | host 1 |---| host 2 |                 10.77.0.1, 10.77.0.2: the wire; migrations take it
//!             +-----+--+   +--+-----+
//!                   +--- LUN --+                      /dev/vdb on both
//! ```
//!
//! - [`cache`]: what takes long to build, kept by content. [`lab`]: a running pair of hosts. [`host`]: one of them.
//! - [`guest`]: domains with a program in them that checks itself. [`moves`]: save, restore, migrate.
//! - [`tests`]: the tests, and what runs them.
//!
//! Every wait has a limit (`wait::limit`); every failure leaves its logs and says where.

#![forbid(unsafe_code)]

mod agent;
mod beats;
pub mod cache;
mod calls;
mod clean_root;
pub mod cli;
mod compare;
mod cpio;
pub mod guest;
pub mod headers;
pub mod host;
mod hypervisor;
mod image;
pub mod lab;
mod machine;
mod modules;
pub mod moves;
mod pattern;
mod payload;
mod place;
mod probe;
mod qemu;
mod qmp;
mod root;
mod run;
mod shell;
pub mod spec;
mod speed;
pub mod tests;
pub mod wait;

pub use agent::Output;
