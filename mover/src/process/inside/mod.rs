//! The inside of a guest: what its own kernel and programs do. The engine knows nothing of it.
//!
//! ```text
//!   guest memory   | free bits | dirty bits | descriptors | block tables | anonymous | page cache ...   ... free |
//!                    `-------------- metadata -----------------------'
//! ```
//! Every page has a 16-byte descriptor, itself in guest memory, that says what the page is and what its content hashes
//! to. Descriptors are summed up per descriptor page in a small accumulator outside memory, which moves with the
//! vCPUs' state: so a stale page is noticed whatever it is. [`frames`] keeps these, [`cache`] is the page cache over
//! the disks ([`drive`]), [`program`] what the workload does with them, [`vcpu`] the threads that run it, [`scrub`]
//! the checker, [`state`] what moves outside memory.

pub(super) mod accounts;
pub(super) mod boot;
pub(super) mod cache;
pub(super) mod content;
pub(super) mod drive;
pub(super) mod frames;
pub(super) mod layout;
pub(super) mod ledger;
pub(super) mod program;
pub(super) mod scrub;
pub(super) mod state;
pub(super) mod vcpu;
pub mod workload;

#[cfg(test)]
pub(super) mod tests;
