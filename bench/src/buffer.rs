//! A memory file filled with bytes that nothing can compress, every page of it there.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use mover::memory::Mapping;
use mover::units::{u64_of, usize_of};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// What the kernel makes a buffer of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Pages {
    /// Pages of 4 KiB.
    Small,
    /// Pages of 2 MiB, which an operator reserves.
    Huge,
}

impl Pages {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Huge => "huge",
        }
    }

    /// Why `bytes` of them can't be had; none if they can.
    #[must_use]
    pub fn obstacle(self, bytes: usize) -> Option<String> {
        let needed = bytes.div_ceil(2 << 20);
        if self == Self::Small || needed == 0 {
            return None;
        }
        let text = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let free: usize = text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        (free < needed).then(|| {
            format!("{needed} huge pages are needed, {free} are reserved and free (sysctl vm.nr_hugepages={needed})")
        })
    }
}

/// Makes one of `bytes`, a whole number of pages. Two with the same `seed` hold the same.
///
/// # Errors
/// When memory is short.
pub fn incompressible(bytes: usize, seed: u64) -> io::Result<Mapping> {
    incompressible_on(bytes, seed, Pages::Small)
}

/// The same made of such pages.
///
/// # Errors
/// When memory is short.
pub fn incompressible_on(bytes: usize, seed: u64, pages: Pages) -> io::Result<Mapping> {
    let kind = match pages {
        Pages::Small => MemfdFlags::empty(),
        Pages::Huge => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
    };
    let file = memfd_create("pageferry-bench", MemfdFlags::CLOEXEC | kind)?;
    ftruncate(&file, u64_of(bytes))?;
    let mapping = Mapping::shared(file.as_fd(), bytes, true)?;
    fill(&mapping, seed);
    Ok(mapping)
}

/// Fills `mapping` with what nothing can compress, drawn from `seed`.
pub fn fill(mapping: &Mapping, seed: u64) {
    let mut state = seed | 1;
    for word in mapping.words() {
        state = next(state);
        word.store(state, Ordering::Relaxed);
    }
}

/// A digest that differs when any word does.
#[must_use]
pub fn digest(mapping: &Mapping) -> u64 {
    mapping.words().iter().fold(0, |sum: u64, word| {
        (sum ^ word.load(Ordering::Relaxed)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    })
}

/// Marsaglia's xorshift.
fn next(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    state
}

/// The `place`-th of `parts` equal pieces of `bytes`, the last one with what is left over.
#[must_use]
pub fn part(bytes: usize, parts: usize, place: usize) -> std::ops::Range<usize> {
    let size = bytes / parts / 4096 * 4096;
    let end = if place + 1 == parts { bytes } else { size * (place + 1) };
    size * place..end
}

/// GiB as bytes.
#[must_use]
pub fn gib(count: u64) -> usize {
    usize_of(count << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_differ_by_seed_and_parts_cover_them() {
        let (a, b, c) = (incompressible(8192, 1), incompressible(8192, 1), incompressible(8192, 4));
        assert_eq!(digest(&a.unwrap()), digest(b.as_ref().unwrap()));
        assert_ne!(digest(&b.unwrap()), digest(&c.unwrap()));
        assert_eq!(
            [0, 1, 2].map(|place| part(40960 + 4096, 3, place)),
            [0..12288, 12288..24576, 24576..45056]
        );
    }
}
