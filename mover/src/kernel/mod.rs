//! System calls that need `unsafe` or raw structures, each behind a function that is safe to call.
//!
//! Nothing here knows what a migration is. Each file is one kernel interface.

pub mod bare;
#[cfg(test)]
pub(crate) mod coroutine;
pub mod counting;
pub(crate) mod direct_io;
pub(crate) mod futex;
mod ioctl;
pub(crate) mod namespace;
pub(crate) mod net;
pub mod pagemap;
mod pread;
pub mod priority;
pub mod probe;
pub mod reads;
pub(crate) mod resident;
pub mod seccomp;
pub mod uffd;
mod uring;
