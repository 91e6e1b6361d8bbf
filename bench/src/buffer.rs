//! A memory file filled with bytes that nothing can compress, every page of it there.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use mover::memory::Mapping;
use mover::units::{u64_of, usize_of};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Makes one of `bytes`, a whole number of pages. Two with the same `seed` hold the same.
///
/// # Errors
/// When memory is short.
pub fn incompressible(bytes: usize, seed: u64) -> io::Result<Mapping> {
    let file = memfd_create("pageferry-bench", MemfdFlags::CLOEXEC)?;
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
