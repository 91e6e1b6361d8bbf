//! Vectored reads and writes straight between a file and guest pages (`preadv(2)`, `pwritev(2)`): the bytes never
//! become a Rust slice, since other processes may write those pages meanwhile.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::GuestPage;
use crate::units::{PAGE_BYTES, u64_of, usize_of};

/// Pages in one call; what a longer run is cut into.
pub(crate) const PAGES_PER_CALL: usize = 256;

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// Reads the file from byte `offset` into `pages`, in their order. Returns whole pages read: fewer than asked only at
/// the file's end.
pub(crate) fn read_pages(file: BorrowedFd<'_>, offset: u64, pages: &[GuestPage<'_>]) -> io::Result<usize> {
    transfer(file, offset, pages, Direction::Read)
}

/// Writes `pages`, in their order, to the file from byte `offset`. Returns whole pages written.
pub(crate) fn write_pages(file: BorrowedFd<'_>, offset: u64, pages: &[GuestPage<'_>]) -> io::Result<usize> {
    transfer(file, offset, pages, Direction::Write)
}

fn transfer(
    file: BorrowedFd<'_>,
    offset: u64,
    pages: &[GuestPage<'_>],
    direction: Direction,
) -> io::Result<usize> {
    let mut done = 0;
    while done < pages.len() {
        let part = &pages[done..pages.len().min(done + PAGES_PER_CALL)];
        let moved = one_call(file, offset + u64_of(done * PAGE_BYTES), part, direction)? / PAGE_BYTES;
        if moved == 0 {
            break;
        }
        done += moved;
    }
    Ok(done)
}

fn one_call(
    file: BorrowedFd<'_>,
    offset: u64,
    pages: &[GuestPage<'_>],
    direction: Direction,
) -> io::Result<usize> {
    let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut vectors = [empty; PAGES_PER_CALL];
    let mut used: usize = 0;
    for page in pages {
        let address = page.address().as_ptr();
        // Neighbours in memory become one vector.
        if let Some(last) = used.checked_sub(1)
            && vectors[last].iov_base.addr() + vectors[last].iov_len == address.addr()
        {
            vectors[last].iov_len += PAGE_BYTES;
            continue;
        }
        vectors[used] = libc::iovec { iov_base: address.cast(), iov_len: PAGE_BYTES };
        used += 1;
    }
    let count = libc::c_int::try_from(used).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    loop {
        // SAFETY: every vector is a mapped, writable run of guest pages that its GuestPages keep mapped for the call;
        // nothing in Rust holds references into them. Worth it: O_DIRECT into guest memory is what a guest's disk does.
        let moved = unsafe {
            match direction {
                Direction::Read => libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, offset),
                Direction::Write => libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, offset),
            }
        };
        match u64::try_from(moved) {
            Ok(moved) => return Ok(usize_of(moved)),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Mapping, PageBuf};
    use crate::units::Pfn;
    use std::os::fd::AsFd;

    #[test]
    fn runs_of_pages_go_out_and_come_back_in_order() {
        let memory = rustix::fs::memfd_create("direct-io-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 1 << 22).unwrap();
        let map = Mapping::shared(memory.as_fd(), 1 << 22, false).unwrap();
        let file = tempfile::tempfile().unwrap();
        for pfn in 0..600u16 {
            let mut page = PageBuf::zeroed();
            page.0[..2].copy_from_slice(&pfn.to_le_bytes());
            map.page(Pfn(u64::from(pfn))).copy_from(&page);
        }
        // 400 pages out in reverse, so that no two are neighbours, then back in forward.
        let out: Vec<_> = (0..400).rev().map(|n| map.page(Pfn(n))).collect();
        assert_eq!(write_pages(file.as_fd(), 4096, &out).unwrap(), 400);
        let back: Vec<_> = (600..1010).map(|n| map.page(Pfn(n))).collect();
        assert_eq!(read_pages(file.as_fd(), 4096, &back).unwrap(), 400, "the file's end");
        let mut page = PageBuf::zeroed();
        for n in 0..400u16 {
            back[usize::from(n)].copy_to(&mut page);
            assert_eq!(u16::from_le_bytes([page.0[0], page.0[1]]), 399 - n);
        }
    }
}
