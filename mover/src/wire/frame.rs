//! Frames on a lane: a header of 32 bytes, a table, and for page data the pages' bytes.
//!
//! ```text
//!   0      4    5    6      8       12      16             24             32
//!   | magic|kind| 0  | lane | count | round | version      | sequence      |   header
//!   | Data:       count x pfn u64             | count x 4096 bytes         |
//!   | Zero:       count x { pfn u64, pages u64 }                           |
//!   | References: count x { pfn u64, disk u8 + sector u56, check [16] }    |
//!   | Digests:    count x { pfn u64, reserved u64, check [16] }            |
//!   | Barrier:    nothing: all pages of the round on this lane are before it |
//! ```
//! Behind the table zeros fill up to a multiple of [`ALIGNMENT`] bytes from the frame's start. The version counts for every page in the frame. The sequence counts a lane's frames from 0.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;
use crate::fingerprint::Check;
use crate::limits::{
    DIGESTS_PER_FRAME, DISKS_MAX, PAGES_PER_FRAME, REFERENCES_PER_FRAME, ZERO_RUNS_PER_FRAME,
};
use crate::units::{BlockAddress, DiskId, PageCount, Pfn, Sector, Version};
use crate::wire::within;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PGFR";
/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;
/// Header and table together are filled up to a multiple of this, and everything else on a lane is one anyway. So page
/// bytes lie in the kernel's socket buffers as they do in memory, by cache lines: copying them in and out of buffers
/// where they are shifted took up to 1.4 times as much CPU time for the whole transfer (`cargo xtask bench tcp`).
pub const ALIGNMENT: usize = 64;
/// Longest table of any frame, with what fills it up.
pub const TABLE_BYTES_MAX: usize =
    (HEADER_BYTES + 32 * DIGESTS_PER_FRAME).next_multiple_of(ALIGNMENT) - HEADER_BYTES;

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Pages' bytes.
    Data,
    /// Runs of zero pages.
    Zero,
    /// Pages that stand on a disk.
    References,
    /// Digests of all pages at the pause.
    Digests,
    /// The end of a round on this lane.
    Barrier,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Zero => 2,
            Self::References => 3,
            Self::Digests => 4,
            Self::Barrier => 5,
        }
    }
    /// Most entries in a frame of this kind.
    #[must_use]
    pub fn limit(self) -> usize {
        match self {
            Self::Data => PAGES_PER_FRAME,
            Self::Zero => ZERO_RUNS_PER_FRAME,
            Self::References => REFERENCES_PER_FRAME,
            Self::Digests => DIGESTS_PER_FRAME,
            Self::Barrier => 0,
        }
    }
    /// Bytes of one entry of its table.
    #[must_use]
    pub fn entry_bytes(self) -> usize {
        match self {
            Self::Data => size_of::<U64>(),
            Self::Zero => size_of::<ZeroRun>(),
            Self::References => size_of::<Reference>(),
            Self::Digests => size_of::<Digest>(),
            Self::Barrier => 0,
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderLayout {
    magic: [u8; 4],
    kind: u8,
    reserved: u8,
    lane: U16,
    count: U32,
    round: U32,
    version: U64,
    sequence: U64,
}
const _: () = assert!(size_of::<HeaderLayout>() == HEADER_BYTES);

/// A decoded header whose count and version are within their limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// The lane it was sent on.
    pub lane: u16,
    /// Entries of its table.
    pub count: usize,
    /// The source's round.
    pub round: u32,
    /// Version of every page in it.
    pub version: Version,
    /// The lane's frames before it.
    pub sequence: u64,
}

impl Header {
    /// As bytes.
    ///
    /// # Panics
    /// If the count is over the kind's limit: frames are built to it.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        assert!(self.count <= self.kind.limit());
        zerocopy::transmute!(HeaderLayout {
            magic: MAGIC,
            kind: self.kind.code(),
            reserved: 0,
            lane: self.lane.into(),
            count: u32::try_from(self.count).unwrap_or(u32::MAX).into(),
            round: self.round.into(),
            version: u64::from(self.version.0).into(),
            sequence: self.sequence.into(),
        })
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let layout: HeaderLayout = zerocopy::transmute!(*bytes);
        if layout.magic != MAGIC {
            return Err(WireError::NotPageferry { found: layout.magic });
        }
        let kind = match layout.kind {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::References,
            4 => Kind::Digests,
            5 => Kind::Barrier,
            n => return Err(WireError::Invalid { what: "the kind of a frame", found: n.into() }),
        };
        let count = within("the count of a frame", layout.count.get().into(), kind.limit())?;
        if count == 0 && kind != Kind::Barrier {
            return Err(WireError::Invalid { what: "the count of a frame", found: 0 });
        }
        let version = match u32::try_from(layout.version.get()) {
            Ok(v) if (1..=Version::MAX.0).contains(&v) => Version(v),
            _ => {
                return Err(WireError::Invalid {
                    what: "the version of a frame",
                    found: layout.version.get(),
                });
            }
        };
        Ok(Self {
            kind,
            lane: layout.lane.get(),
            count,
            round: layout.round.get(),
            version,
            sequence: layout.sequence.get(),
        })
    }

    /// Bytes of the table that follows.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.count * self.kind.entry_bytes()
    }
    /// Bytes of the table and of what fills it up.
    #[must_use]
    pub fn filled_table_bytes(&self) -> usize {
        (HEADER_BYTES + self.table_bytes()).next_multiple_of(ALIGNMENT) - HEADER_BYTES
    }
}

/// A run of zero pages.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZeroRun {
    first: U64,
    pages: U64,
}
const _: () = assert!(size_of::<ZeroRun>() == 16);

impl ZeroRun {
    /// `pages` from `first` on.
    #[must_use]
    pub fn new(first: Pfn, pages: u64) -> Self {
        Self { first: first.0.into(), pages: pages.into() }
    }
    /// Its pfns, if all of them lie in a guest of `guest` pages.
    pub fn range(&self, guest: PageCount) -> Result<std::ops::Range<u64>, WireError> {
        let (first, pages) = (self.first.get(), self.pages.get());
        match first.checked_add(pages) {
            Some(end) if pages > 0 && end <= guest.0 => Ok(first..end),
            _ => Err(WireError::Invalid { what: "a run of zero pages from pfn", found: first }),
        }
    }
}

/// A page that stands on a disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Reference {
    pfn: U64,
    place: U64,
    check: Check,
}
const _: () = assert!(size_of::<Reference>() == 32);

impl Reference {
    /// Page `pfn`, with check value `check`, stands at `block`.
    #[must_use]
    pub fn new(pfn: Pfn, block: BlockAddress, check: Check) -> Self {
        Self { pfn: pfn.0.into(), place: pack_place(block).into(), check }
    }
    /// Its parts, if the page lies in a guest of `guest` pages and the disk is one of `disks`.
    pub fn parts(&self, guest: PageCount, disks: usize) -> Result<(Pfn, BlockAddress, Check), WireError> {
        let pfn = pfn_within(self.pfn, guest)?;
        let block = unpack_place(self.place.get());
        if usize::from(block.disk.0) >= disks {
            return Err(WireError::Invalid { what: "the disk of a reference", found: block.disk.0.into() });
        }
        Ok((pfn, block, self.check))
    }
}

/// A block address in one word: disk in the top byte, sector below.
#[must_use]
pub fn pack_place(block: BlockAddress) -> u64 {
    const _: () = assert!(DISKS_MAX <= 256);
    debug_assert!(block.sector.0 < 1 << 56);
    u64::from(block.disk.0) << 56 | block.sector.0
}

/// The reverse of [`pack_place`].
#[must_use]
pub fn unpack_place(word: u64) -> BlockAddress {
    let [.., disk] = word.to_le_bytes();
    BlockAddress { disk: DiskId(disk), sector: Sector(word & ((1 << 56) - 1)) }
}

/// A page's digest at the pause.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Digest {
    pfn: U64,
    reserved: U64,
    check: Check,
}
const _: () = assert!(size_of::<Digest>() == 32);

impl Digest {
    /// Of page `pfn`.
    #[must_use]
    pub fn new(pfn: Pfn, check: Check) -> Self {
        Self { pfn: pfn.0.into(), reserved: 0.into(), check }
    }
    /// Its parts, if the page lies in a guest of `guest` pages.
    pub fn parts(&self, guest: PageCount) -> Result<(Pfn, Check), WireError> {
        Ok((pfn_within(self.pfn, guest)?, self.check))
    }
}

/// A pfn of a data frame's table, if it lies in a guest of `guest` pages.
pub fn pfn_within(word: U64, guest: PageCount) -> Result<Pfn, WireError> {
    let pfn = word.get();
    if pfn < guest.0 {
        Ok(Pfn(pfn))
    } else {
        Err(WireError::Invalid { what: "a page frame number", found: pfn })
    }
}

/// A table of a received frame as entries; `bytes` is just [`Header::table_bytes`] long.
///
/// # Panics
/// If it is not: the receiver reads it to that length.
#[must_use]
pub fn table<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> &[T] {
    match <[T]>::ref_from_bytes(bytes) {
        Ok(entries) => entries,
        Err(e) => panic!("a table of {} bytes is not whole entries: {e}", bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reference_outside_the_guest_or_its_disks_is_refused() {
        let block = BlockAddress { disk: DiskId(1), sector: Sector(63) };
        let reference = Reference::new(Pfn(9), block, Check([3; 16]));
        assert_eq!(reference.parts(PageCount(10), 2).unwrap(), (Pfn(9), block, Check([3; 16])));
        assert!(reference.parts(PageCount(9), 2).is_err());
        assert!(reference.parts(PageCount(10), 1).is_err());
    }

    #[test]
    fn a_run_past_the_guests_end_is_refused() {
        assert_eq!(ZeroRun::new(Pfn(4), 6).range(PageCount(10)).unwrap(), 4..10);
        for run in [ZeroRun::new(Pfn(4), 7), ZeroRun::new(Pfn(u64::MAX), 2), ZeroRun::new(Pfn(1), 0)] {
            assert!(run.range(PageCount(10)).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_header_decodes_to_itself_or_an_error(bytes in proptest::array::uniform32(any::<u8>()), valid in any::<bool>(), kind in 0u8..8) {
            let mut bytes = bytes;
            if valid {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] = kind;
                bytes[5] = 0;
                bytes[9..12].fill(0);
                bytes[20..24].fill(0);
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.count <= header.kind.limit());
                prop_assert!(header.table_bytes() <= header.filled_table_bytes());
                prop_assert!(header.filled_table_bytes() <= TABLE_BYTES_MAX);
                prop_assert_eq!((HEADER_BYTES + header.filled_table_bytes()) % ALIGNMENT, 0);
                prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
            }
        }
    }
}
