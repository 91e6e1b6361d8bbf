//! Xen behind Pageferry: the stream `xc_domain_save` writes and `xc_domain_restore` reads, and what both ask of the
//! hypervisor, without a link to libxenctrl or libxenguest.

pub mod abi;
mod channel;
mod confine;
pub mod domain;
pub mod ferry;
mod frames;
pub mod helper;
mod library;
pub mod restore;
pub mod save;
pub mod settings;
#[cfg(test)]
mod simulated;
pub mod standby;
pub mod stream;
pub mod xenstore;
