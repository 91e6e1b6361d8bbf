//! PAGEMAP_SCAN (`linux/fs.h`, Linux 6.7): which pages of a process were written since they were last protected,
//! found and protected again in one pass. Together with [`super::uffd`]'s `WP_ASYNC` this is the dirty log of a
//! guest that is a process.
//!
//! Owning thread: whoever holds the [`Scanner`]; the kernel locks the scanned process's memory map for reading.
//!
//! What a scan says, and what it does not:
//! - A page that is not mapped and not protected counts as written: a shared page can be unmapped by reclaim after a
//!   write, and then its empty table entry is all that is left to tell. Asking for more than `PAGE_IS_WRITTEN` would
//!   take another path in the kernel, which is not sure to report those.
//! - Ranges without a page table count as written too, and the first `protect` gives them one, so that a later touch
//!   reports one page and not its neighbours: 8 bytes a page of the guest, in the guest's process.
//! - Writes by DMA into pages pinned *before* the scan (an O_DIRECT read in flight, registered io_uring buffers) are
//!   not seen: whoever reads into tracked memory so writes to it once more afterwards (`GuestPage::mark_written`).
//! - At most [`REGIONS`] regions a call: with more than 512, a scan on 6.18 that does not protect can report ranges
//!   twice.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::SeekFrom;

use super::ioctl::{call, exchanging};
use super::uffd::Span;
use crate::bitmap::Bitmap;
use crate::units::{PAGE_BYTES_U64, u64_of, usize_of};

/// Regions one system call may report.
pub const REGIONS: usize = 512;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: u32 = exchanging::<ScanArgument>(b'f', 16);
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const _: () = assert!(size_of::<Region>() == 24 && size_of::<ScanArgument>() == 96);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// Scans one process's pages.
pub struct Scanner {
    pagemap: OwnedFd,
    regions: Box<[Region; REGIONS]>,
}

impl Scanner {
    /// Over a `/proc/PID/pagemap` that is open here. It names the address space, not the number: a descriptor that
    /// the process opened itself and passed on needs no permission to trace it.
    #[must_use]
    pub fn new(pagemap: OwnedFd) -> Self {
        Self { pagemap, regions: Box::new([Region::default(); REGIONS]) }
    }

    /// This process's own pagemap, to scan or to pass on.
    ///
    /// # Errors
    /// What open(2) answers.
    pub fn open_own() -> io::Result<OwnedFd> {
        Ok(File::open("/proc/self/pagemap")?.into())
    }

    /// Protects every page of `span`, those that are not there included, and reports none: the start of a log.
    ///
    /// # Errors
    /// `EPERM` where some of `span` is not watched for writes by a userfaultfd with `WP_ASYNC`, `ENOTTY` before
    /// Linux 6.7; where the process is gone `EPERM` or nothing, by kernel.
    pub fn protect(&mut self, span: Span) -> io::Result<()> {
        let mut argument = request(span);
        // SAFETY: as the request's struct says; no vector, so that nothing is written but the struct itself.
        unsafe { call(self.pagemap.as_fd(), PAGEMAP_SCAN, &mut argument) }.map(drop)
    }

    /// Gives each run of pages of `span` written since the last scan (or `protect`) to `written`, as first address
    /// and the address after the last, ascending, and protects them again: a write is in this scan or in the next.
    ///
    /// # Errors
    /// As [`Self::protect`]. What was given until then is protected already, and some pages may be that were not
    /// given: after an error the caller has to take all of `span` as written.
    pub fn written(&mut self, span: Span, mut written: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut from = span.start;
        while from < span.end() {
            let mut argument = request(Span { start: from, bytes: span.end() - from });
            #[expect(clippy::as_conversions, reason = "the ABI takes the address as a number")]
            {
                argument.vec = self.regions.as_mut_ptr() as u64;
            }
            argument.vec_len = u64_of(REGIONS);
            argument.return_mask = PAGE_IS_WRITTEN;
            // SAFETY: `vec` is ours, `vec_len` regions long, of plain integers. Worth it: there is no other log.
            let found = unsafe { call(self.pagemap.as_fd(), PAGEMAP_SCAN, &mut argument) }?;
            for region in &self.regions[..usize_of(found.into())] {
                written(region.start, region.end);
            }
            assert!(argument.walk_end > from, "a scan that found room for its regions has gone forward");
            from = argument.walk_end;
        }
        Ok(())
    }
}

fn request(span: Span) -> ScanArgument {
    ScanArgument {
        size: u64_of(size_of::<ScanArgument>()),
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start: span.start,
        end: span.end(),
        category_mask: PAGE_IS_WRITTEN,
        ..ScanArgument::default()
    }
}

/// Calls `holes` with each run of pages of the memfd that was never touched (or given back) among pages `from..to`,
/// as first page and the page after the last, ascending. Touches none: lseek(2) with SEEK_DATA and SEEK_HOLE.
///
/// # Errors
/// What lseek(2) answers.
///
/// # Panics
/// If the file is not `to` pages long: the caller made sure when it mapped it.
pub fn holes(memfd: BorrowedFd<'_>, from: u64, to: u64, mut holes: impl FnMut(u64, u64)) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let data =
            next(memfd, SeekFrom::Data(at * PAGE_BYTES_U64))?.map_or(to, |bytes| bytes / PAGE_BYTES_U64);
        let data = data.min(to);
        if data > at {
            holes(at, data);
        }
        if data == to {
            break;
        }
        let hole = next(memfd, SeekFrom::Hole(data * PAGE_BYTES_U64))?;
        at = hole.expect("a file ends in a hole").div_ceil(PAGE_BYTES_U64);
        assert!(at > data, "data is at least a page long");
    }
    Ok(())
}

/// Where data starts at or after page `from` of the memfd, if there is any.
///
/// # Errors
/// What lseek(2) answers.
pub fn next_data(memfd: BorrowedFd<'_>, from: u64) -> io::Result<Option<u64>> {
    Ok(next(memfd, SeekFrom::Data(from * PAGE_BYTES_U64))?.map(|bytes| bytes / PAGE_BYTES_U64))
}

fn next(memfd: BorrowedFd<'_>, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(memfd, to) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Sets in `into` the pages of the memfd that were never touched, from page 0 to the bitmap's length.
///
/// # Errors
/// As [`holes`].
pub fn untouched(memfd: BorrowedFd<'_>, into: &mut Bitmap) -> io::Result<()> {
    holes(memfd, 0, u64_of(into.len()), |from, to| {
        into.set_range(usize_of(from), usize_of(to));
    })
}

#[cfg(test)]
#[path = "pagemap_tests.rs"]
mod tests;
