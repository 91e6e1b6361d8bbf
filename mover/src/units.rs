//! Newtypes for what the engine counts: page frames, pages, sectors, bytes, versions.
//!
//! A page is 4 KiB. A sector is 512 bytes, the unit in which a disk is addressed on the wire (the block layer's
//! unit, `Documentation/block/` of Linux and `blkif.h` of Xen alike). A block is a page-sized, page-aligned piece
//! of a disk region; eight sectors.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a page, and of a disk block that may duplicate one.
pub const PAGE_BYTES: usize = 4096;
/// [`PAGE_BYTES`] for 64-bit arithmetic.
pub const PAGE_BYTES_U64: u64 = 4096;
/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a page-sized block.
pub const SECTORS_PER_PAGE: u64 = PAGE_BYTES_U64 / SECTOR_BYTES;

/// A guest page frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The frame's place in a table with an entry per page.
    #[inline]
    #[must_use]
    pub fn index(self) -> usize {
        usize_of(self.0)
    }
    /// The frame at place `index` of such a table.
    #[inline]
    #[must_use]
    pub fn at(index: usize) -> Self {
        Self(u64_of(index))
    }
    /// The frame `pages` further on.
    #[inline]
    #[must_use]
    pub fn plus(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageCount(pub u64);

impl PageCount {
    /// What these pages hold.
    #[must_use]
    pub fn bytes(self) -> ByteCount {
        ByteCount(self.0 * PAGE_BYTES_U64)
    }
    /// The same number, for a table with an entry per page.
    #[must_use]
    pub fn entries(self) -> usize {
        usize_of(self.0)
    }
}

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// Whole pages in it; what is left over does not count.
    #[must_use]
    pub fn whole_pages(self) -> PageCount {
        PageCount(self.0 / PAGE_BYTES_U64)
    }
}

/// A 512-byte sector of one disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sector(pub u64);

impl Sector {
    /// The sector's byte offset on its disk.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
    /// The sector that holds byte `offset`.
    #[must_use]
    pub fn holding(offset: u64) -> Self {
        Self(offset / SECTOR_BYTES)
    }
}

/// Which of a guest's disks: its place in the list both ends agreed on in the handshake.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(pub u8);

/// Where a page-sized block starts: a disk and a sector.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockAddress {
    /// The disk.
    pub disk: DiskId,
    /// Its first sector.
    pub sector: Sector,
}

/// The number every transmission of a page carries. One counter on the source, drawn before the page's bytes are
/// read, once for a whole frame of pages; 1 is the first, so that 0 can mean "nothing yet" in a table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Version(pub u32);

impl Version {
    /// The highest one: 30 bits, so that a version, a slot and a tag share one atomic word on the target. At 1 MiB
    /// a frame that is a pebibyte of traffic in one migration.
    pub const MAX: Self = Self((1 << 30) - 1);
}

/// A `usize` from a `u64`. Every target this builds for has 64-bit addresses.
#[inline]
#[must_use]
pub const fn usize_of(n: u64) -> usize {
    const _: () = assert!(size_of::<usize>() == size_of::<u64>());
    #[expect(clippy::as_conversions, reason = "checked at compile time just above")]
    {
        n as usize
    }
}

/// A `u64` from a `usize`.
#[inline]
#[must_use]
pub const fn u64_of(n: usize) -> u64 {
    #[expect(clippy::as_conversions, reason = "usize is 64 bits wide: checked in usize_of")]
    {
        n as u64
    }
}

/// A `f64` from a `u64`, for rates and predictions, where the last bits do not matter.
#[inline]
#[must_use]
pub const fn f64_of(n: u64) -> f64 {
    #[expect(clippy::as_conversions, reason = "a rate needs no more than 53 bits")]
    {
        n as f64
    }
}

/// A `u64` from a `f64` that is a count: rounded down, negative and not-a-number become 0.
#[inline]
#[must_use]
pub const fn u64_of_f64(n: f64) -> u64 {
    #[expect(clippy::as_conversions, reason = "`as` saturates, which is what a count wants")]
    {
        n as u64
    }
}
