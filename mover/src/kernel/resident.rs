//! Which pages of a mapping are in memory (`mincore(2)`), without touching them: a read of a shared memory file's
//! hole would fill it.

use std::io;

use crate::memory::Mapping;
use crate::units::{PAGE_BYTES, Pfn};

/// Pages asked about in one call.
pub(crate) const PAGES_PER_CALL: usize = 256;

/// Whether each of `count` pages from `first` is there; at most [`PAGES_PER_CALL`], inside the mapping.
pub(crate) fn resident(mapping: &Mapping, first: Pfn, count: usize) -> io::Result<[bool; PAGES_PER_CALL]> {
    assert!(count <= PAGES_PER_CALL && first.index() + count <= mapping.pages().entries());
    let mut bytes = [0u8; PAGES_PER_CALL];
    let address = mapping.page(first).address();
    // SAFETY: asks about mapped pages and writes a byte for each into a buffer with room for PAGES_PER_CALL.
    // Worth it: the guest's checker would otherwise allocate all memory the guest never used.
    let result = unsafe { libc::mincore(address.as_ptr().cast(), count * PAGE_BYTES, bytes.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.map(|byte| byte & 1 != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn holes_stay_holes() {
        let file = rustix::fs::memfd_create("resident-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 16 * 4096).unwrap();
        let map = Mapping::shared(file.as_fd(), 16 * 4096, false).unwrap();
        map.page(Pfn(3)).touch();
        for _ in 0..2 {
            let there = resident(&map, Pfn(2), 14).unwrap();
            assert_eq!(there.iter().position(|there| *there), Some(1));
            assert_eq!(there.iter().filter(|there| **there).count(), 1);
        }
    }
}
