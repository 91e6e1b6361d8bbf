//! Where on a disk page-sized blocks may begin: regions, each with its own phase and stride, and the numbering of
//! their blocks.
//!
//! ```text
//!     sector  0            63                    2097151
//!             |  gap       | partition           |  gap
//!     units   0 1 2 .. 6   | 7   8   9   ...     | ...         unit = one place where a block may begin
//!                            ^ at sectors 63, 71, 79, ...
//! ```
//!
//! A region's blocks begin every `stride` sectors from its start: 8 (a page) in general, 2 where a file system of 1 KiB
//! blocks lays out file content at any 1 KiB. Units are numbered through all regions in order, so a growing last region
//! only adds numbers at the end. Pure; [`crate::disk::partition`] finds the regions.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::units::{SECTORS_PER_PAGE, Sector};

/// Regions a disk may have; more partitions than that are treated as one stretch without a phase of its own.
pub const REGIONS_MAX: usize = 256;
/// Units a disk may have: the forward table keeps 40 bits for them. 4 PiB of 4 KiB blocks.
pub const UNITS_MAX: u64 = (1 << 40) - 2;

/// A stretch of a disk with one phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Region {
    /// Sector at which its first block begins.
    pub start: u64,
    /// First sector after it.
    pub end: u64,
    /// Sectors from one block to the next: 1 to 8.
    pub stride: u64,
}

impl Region {
    /// Places in it where a whole block fits.
    #[must_use]
    pub fn units(&self) -> u64 {
        let sectors = self.end.saturating_sub(self.start);
        sectors.checked_sub(SECTORS_PER_PAGE).map_or(0, |rest| rest / self.stride + 1)
    }
}

/// All regions of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    regions: Vec<Region>,
    /// First unit of each region, and the number of all units at the end.
    firsts: Vec<u64>,
}

impl Layout {
    /// From regions in order of their sectors. `Err` is a clause that says what is wrong with them.
    pub fn new(regions: Vec<Region>) -> Result<Self, &'static str> {
        if regions.len() > REGIONS_MAX {
            return Err("it has too many regions");
        }
        let mut firsts = vec![0];
        let (mut units, mut end) = (0_u64, 0);
        for region in &regions {
            if !(1..=SECTORS_PER_PAGE).contains(&region.stride) {
                return Err("a region's stride is no part of a page");
            }
            if region.start < end || region.end < region.start {
                return Err("its regions overlap");
            }
            end = region.end;
            units = units.saturating_add(region.units());
            firsts.push(units);
        }
        if units > UNITS_MAX || end > 1 << 50 {
            return Err("it is too large");
        }
        Ok(Self { regions, firsts })
    }

    /// One region over a whole disk of `bytes`, phase 0.
    #[must_use]
    pub fn plain(bytes: u64) -> Self {
        let end = Sector::holding(bytes).0.min(1 << 42);
        let region = Region { start: 0, end, stride: SECTORS_PER_PAGE };
        Self { firsts: vec![0, region.units()], regions: vec![region] }
    }

    /// The regions, in order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
    /// Units of all regions.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.firsts.last().copied().unwrap_or(0)
    }
    /// The numbers of the units of region number `region`.
    #[must_use]
    pub fn units_of(&self, region: usize) -> Range<u64> {
        self.firsts[region]..self.firsts[region + 1]
    }

    /// The sector at which unit `unit` begins; `None` if there is no such unit.
    #[must_use]
    pub fn sector(&self, unit: u64) -> Option<Sector> {
        // Most disks have a handful of regions, and most blocks are in the last large one.
        let region = self.firsts.partition_point(|first| *first <= unit).checked_sub(1)?;
        let found = self.regions.get(region)?;
        Some(Sector(found.start + (unit - self.firsts[region]) * found.stride))
    }

    /// The unit that begins just at `sector`, if one does.
    #[must_use]
    pub fn unit(&self, sector: Sector) -> Option<u64> {
        let region = self.regions.partition_point(|region| region.start <= sector.0).checked_sub(1)?;
        let found = self.regions[region];
        let after = sector.0 - found.start;
        let number = after / found.stride;
        (after.is_multiple_of(found.stride) && number < found.units()).then(|| self.firsts[region] + number)
    }

    /// The units whose blocks have a sector in common with `sectors`, a range of numbers for each region they are in.
    pub fn touching(&self, sectors: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.regions.partition_point(|region| region.end <= sectors.start);
        let touched = self.regions[first..].iter().take_while({
            let end = sectors.end;
            move |region| region.start < end
        });
        touched.enumerate().filter_map(move |(n, region)| {
            // A block at `s` covers s..s+8: it touches if s < sectors.end and s + 8 > sectors.start.
            let from =
                (sectors.start + 1).saturating_sub(region.start + SECTORS_PER_PAGE).div_ceil(region.stride);
            let to = (sectors.end - region.start).div_ceil(region.stride).min(region.units());
            let base = self.firsts[first + n];
            (from < to).then(|| base + from..base + to)
        })
    }

    /// Whether all that is known by unit under `older` holds under this layout too: the same regions, except that
    /// its last one may have grown and more may follow.
    #[must_use]
    pub fn extends(&self, older: &Self) -> bool {
        let Some((last, before)) = older.regions.split_last() else { return true };
        let Some(mine) = self.regions.get(before.len()) else { return false };
        self.regions[..before.len()] == *before
            && (mine.start, mine.stride) == (last.start, last.stride)
            && mine.end >= last.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layouts() -> impl Strategy<Value = Layout> {
        proptest::collection::vec(
            (0_u64..20, 0_u64..60, prop_oneof![Just(1_u64), Just(2), Just(4), Just(8)]),
            1..6,
        )
        .prop_map(|parts| {
            let mut at = 0;
            let regions = parts.into_iter().map(|(gap, length, stride)| {
                let start = at + gap;
                at = start + length;
                Region { start, end: at, stride }
            });
            Layout::new(regions.collect()).unwrap()
        })
    }

    proptest! {
        #[test]
        fn units_and_sectors_are_one_to_one(layout in layouts()) {
            let mut oracle = Vec::new();
            for region in layout.regions() {
                let mut sector = region.start;
                while sector + 8 <= region.end {
                    oracle.push(sector);
                    sector += region.stride;
                }
            }
            let found: Vec<u64> = (0..layout.units()).map(|unit| layout.sector(unit).unwrap().0).collect();
            prop_assert_eq!(&found, &oracle);
            prop_assert_eq!(layout.sector(layout.units()), None);
            for sector in 0..500 {
                let unit = oracle.iter().position(|s| *s == sector).map(crate::units::u64_of);
                prop_assert_eq!(layout.unit(Sector(sector)), unit);
            }
        }

        #[test]
        fn a_write_touches_the_blocks_it_overlaps(layout in layouts(), from in 0_u64..400, length in 1_u64..40) {
            let sectors = from..from + length;
            let oracle: Vec<u64> = (0..layout.units())
                .filter(|unit| {
                    let start = layout.sector(*unit).unwrap().0;
                    start < sectors.end && start + 8 > sectors.start
                })
                .collect();
            let found: Vec<u64> = layout.touching(sectors).flatten().collect();
            prop_assert_eq!(found, oracle);
        }
    }

    #[test]
    fn only_growth_at_the_end_keeps_numbers() {
        let region = |start, end, stride| Region { start, end, stride };
        let layout = |regions| Layout::new(regions).unwrap();
        let old = layout(vec![region(0, 63, 8), region(63, 1000, 8)]);
        assert!(old.extends(&old));
        assert!(layout(vec![region(0, 63, 8), region(63, 2000, 8)]).extends(&old));
        assert!(layout(vec![region(0, 63, 8), region(63, 1000, 8), region(1000, 2000, 2)]).extends(&old));
        assert!(!layout(vec![region(0, 63, 8), region(63, 999, 8)]).extends(&old));
        assert!(!layout(vec![region(0, 63, 8), region(63, 1000, 2)]).extends(&old));
        assert!(!layout(vec![region(0, 64, 8), region(64, 1000, 8)]).extends(&old));
        assert!(!layout(vec![region(0, 63, 8)]).extends(&old));
    }
}
