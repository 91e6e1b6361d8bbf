//! PV guests: they know their memory by machine frames, which are others on every host.
//!
//! Where a machine frame stands in what they hand over (page tables, virtual CPUs, start info), the stream has the
//! guest's own frame number instead. Two tables translate: the hypervisor's, from machine to guest frames, and the
//! guest's, the other way. The guest writes its own and may lie, so a frame counts only where both agree.
//!
//! Guests of 64 bits whose table has the form of a list, which is all Linux has written since 4.0.
#![forbid(unsafe_code)]

mod frames;
mod source;
mod start_info;
mod tables;
mod target;
mod vcpu;

pub use source::PvSource;
pub use target::PvTarget;

/// No machine frame.
const NO_FRAME: u64 = u64::MAX;
/// First guest frame number that is one too many: 1 TiB of memory. The table of a guest of that size has 2 GiB.
const PFN_LIMIT: u64 = 1 << 28;
/// Entries of a page of the guest's table, and of a page table.
const ENTRIES: u64 = 512;

/// The word at byte `at` of `bytes`.
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Replaces it.
fn set_word(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
