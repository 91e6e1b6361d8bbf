//! An entry of a PAGE_DATA record: a frame and its type in 64 bits.
//!
//! ```text
//!   63  60 59      52 51                                        0
//!   +-----+----------+------------------------------------------+
//!   | type| reserved | pfn                                      |
//!   +-----+----------+------------------------------------------+
//! ```
//!
//! Source: `libxc-migration-stream`, "PAGE_DATA"; the types are `XEN_DOMCTL_PFINFO_*` of `public/domctl.h` shifted
//! from bit 28 to bit 60.
#![forbid(unsafe_code)]

use mover::units::Pfn;

use super::error::Fault;
use super::limits::PFN_END;

const TYPE_SHIFT: u32 = 60;
const PFINFO_SHIFT: u32 = 28;
const PFN_MASK: u64 = (1 << 52) - 1;
const RESERVED_MASK: u64 = ((1 << TYPE_SHIFT) - 1) & !PFN_MASK;
const PINNED: u8 = 8;

/// What a frame is to Xen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageType {
    /// An ordinary page.
    Normal,
    /// A page table of a PV guest.
    Table {
        /// 1 to 4.
        level: u8,
        /// Whether the guest has pinned it.
        pinned: bool,
    },
    /// Broken memory: no contents, not populated.
    Broken,
    /// Populated on restore, without contents. Not a zero page: what Xen hands out need not be zero.
    AllocateOnly,
    /// Not there: no contents, not populated.
    Invalid,
}

impl PageType {
    /// From the four bits; none for the reserved 5 to 8.
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Normal,
            1..=4 => Self::Table { level: bits, pinned: false },
            9..=12 => Self::Table { level: bits & !PINNED, pinned: true },
            13 => Self::Broken,
            14 => Self::AllocateOnly,
            15 => Self::Invalid,
            _ => return None,
        })
    }

    /// The four bits.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::Normal => 0,
            Self::Table { level, pinned } => {
                assert!((1..=4).contains(&level), "page tables have levels 1 to 4, not {level}");
                if pinned { level | PINNED } else { level }
            }
            Self::Broken => 13,
            Self::AllocateOnly => 14,
            Self::Invalid => 15,
        }
    }

    /// From what `XEN_DOMCTL_getpageframeinfo3` puts into bits 31 to 28 of an entry.
    #[must_use]
    pub fn from_pfinfo(pfinfo: u32) -> Option<Self> {
        u8::try_from(pfinfo >> PFINFO_SHIFT).ok().and_then(Self::from_bits)
    }

    /// Whether 4,096 bytes of contents follow in the record.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, Self::Normal | Self::Table { .. })
    }

    /// Whether the restored guest gets memory for the frame.
    #[must_use]
    pub fn is_populated(self) -> bool {
        self.has_data() || self == Self::AllocateOnly
    }

    /// The name the specification gives it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "NOTAB",
            Self::Table { level, pinned } => match (level, pinned) {
                (1, false) => "L1TAB",
                (2, false) => "L2TAB",
                (3, false) => "L3TAB",
                (_, false) => "L4TAB",
                (1, true) => "L1TAB_PIN",
                (2, true) => "L2TAB_PIN",
                (3, true) => "L3TAB_PIN",
                (_, true) => "L4TAB_PIN",
            },
            Self::Broken => "BROKEN",
            Self::AllocateOnly => "XALLOC",
            Self::Invalid => "XTAB",
        }
    }
}

/// A frame and its type, as they stand in a record; only ones that exist.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageEntry {
    pfn: Pfn,
    page_type: PageType,
}

impl PageEntry {
    /// One of these. Asserts that `pfn` is under [`PFN_END`].
    #[must_use]
    pub fn new(pfn: Pfn, page_type: PageType) -> Self {
        assert!(pfn.0 < PFN_END, "{pfn} is beyond 52 bits of physical address");
        Self { pfn, page_type }
    }

    /// From the 64 bits of entry `index` of a record.
    ///
    /// # Errors
    /// Reserved bits, a reserved type, or a frame no guest can have.
    pub fn decode(raw: u64, index: usize) -> Result<Self, Fault> {
        if raw & RESERVED_MASK != 0 {
            return Err(Fault::Reserved { field: "a PAGE_DATA entry", found: raw & RESERVED_MASK });
        }
        let pfn = Pfn(raw & PFN_MASK);
        if pfn.0 >= PFN_END {
            return Err(Fault::Limit {
                what: "a frame number in PAGE_DATA",
                found: pfn.0,
                limit: PFN_END - 1,
            });
        }
        let [bits, ..] = (raw >> TYPE_SHIFT).to_le_bytes();
        let page_type = PageType::from_bits(bits).ok_or(Fault::PageType { pfn, index, found: bits })?;
        Ok(Self { pfn, page_type })
    }

    /// The 64 bits.
    #[must_use]
    pub fn encode(self) -> u64 {
        u64::from(self.page_type.bits()) << TYPE_SHIFT | self.pfn.0
    }

    /// The frame.
    #[must_use]
    pub fn pfn(self) -> Pfn {
        self.pfn
    }

    /// Its type.
    #[must_use]
    pub fn page_type(self) -> PageType {
        self.page_type
    }

    /// Whether 4,096 bytes of contents follow in the record.
    #[must_use]
    pub fn has_data(self) -> bool {
        self.page_type.has_data()
    }
}

/// The first frame that stands in `entries` more than once. `scratch` is kept for the next call.
pub(crate) fn repeated(entries: &[PageEntry], scratch: &mut Vec<u64>) -> Option<Pfn> {
    // Savers walk memory upwards, so that the common case needs no sorting.
    if entries.is_sorted_by(|a, b| a.pfn < b.pfn) {
        return None;
    }
    scratch.clear();
    scratch.extend(entries.iter().map(|entry| entry.pfn.0));
    scratch.sort_unstable();
    scratch.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| Pfn(pair[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_the_numbers_of_domctl_h() {
        let known = [
            (0, "NOTAB", true, true),
            (1, "L1TAB", true, true),
            (2, "L2TAB", true, true),
            (3, "L3TAB", true, true),
            (4, "L4TAB", true, true),
            (9, "L1TAB_PIN", true, true),
            (10, "L2TAB_PIN", true, true),
            (11, "L3TAB_PIN", true, true),
            (12, "L4TAB_PIN", true, true),
            (13, "BROKEN", false, false),
            (14, "XALLOC", false, true),
            (15, "XTAB", false, false),
        ];
        for (bits, name, data, populated) in known {
            let page_type = PageType::from_bits(bits).unwrap();
            assert_eq!(page_type.bits(), bits);
            assert_eq!(page_type.name(), name);
            assert_eq!((page_type.has_data(), page_type.is_populated()), (data, populated), "{name}");
            assert_eq!(PageType::from_pfinfo(u32::from(bits) << 28 | 0x123), Some(page_type));
        }
        for bits in [5, 6, 7, 8, 16] {
            assert_eq!(PageType::from_bits(bits), None);
        }
    }

    #[test]
    fn entries_come_back_as_they_went_and_bad_ones_do_not() {
        let entry = PageEntry::new(Pfn(0xabcde), PageType::Table { level: 4, pinned: true });
        assert_eq!(entry.encode(), 0xc000_0000_000a_bcde);
        assert_eq!(PageEntry::decode(entry.encode(), 0).unwrap(), entry);
        assert!(matches!(
            PageEntry::decode(0x6000_0000_0000_0001, 3),
            Err(Fault::PageType { index: 3, found: 6, .. })
        ));
        assert!(matches!(PageEntry::decode(1 << 52, 0), Err(Fault::Reserved { .. })));
        assert!(matches!(PageEntry::decode(1 << 59, 0), Err(Fault::Reserved { .. })));
        assert!(matches!(PageEntry::decode(PFN_END, 0), Err(Fault::Limit { .. })));
        assert!(PageEntry::decode(PFN_END - 1, 0).is_ok());
    }

    #[test]
    fn repeated_frames_are_found_in_any_order() {
        let entries = |pfns: &[u64]| -> Vec<PageEntry> {
            pfns.iter().map(|&pfn| PageEntry::new(Pfn(pfn), PageType::Normal)).collect()
        };
        let mut scratch = Vec::new();
        assert_eq!(repeated(&entries(&[1, 2, 9]), &mut scratch), None);
        assert_eq!(repeated(&entries(&[9, 2, 1]), &mut scratch), None);
        assert_eq!(repeated(&entries(&[1, 1]), &mut scratch), Some(Pfn(1)));
        assert_eq!(repeated(&entries(&[7, 3, 9, 3]), &mut scratch), Some(Pfn(3)));
    }
}
