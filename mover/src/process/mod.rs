//! A guest that is an ordinary process: its memory in a memory file, its vCPUs threads, its disks image files.
//!
//! The guest process and the engine are two processes. They share three memory files (guest memory, the log of disk
//! writes, the gate before them) and talk over a unix socket:
//!
//! ```text
//!   engine                                          guest process
//!   GuestClient ── Attach, Pause, SaveState ... ──> Server ── Life (what may happen when)
//!               <── Attached + descriptors ──────          └─ Machine (memory, vCPUs, disks)
//!   userfaultfd, pagemap, memory files: used by the engine directly, without asking
//! ```
//!
//! [`control`] has the messages and the rules of that protocol, [`client`] the engine's side of it, [`shared`] the
//! layout of the shared bitmaps.

pub mod backend;
pub mod client;
pub mod config;
pub mod control;
pub mod image;
mod inside;
pub mod keepsake;
pub mod launch;
mod life;
mod machine;
mod packet;
mod server;
pub mod shared;

pub use inside::workload;

#[cfg(test)]
mod tests;
