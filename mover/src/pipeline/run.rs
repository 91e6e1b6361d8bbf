//! Runs: references that are read from a disk at once, and how they stand in that read. Pure.

use std::ops::Range;

use crate::limits::READ_BYTES_MAX;
use crate::pipeline::table::Wanted;
use crate::units::{PAGE_BYTES, PAGE_BYTES_U64, u64_of, usize_of};

/// Gaps up to this are read through: at 64 KiB a read costs about as much as another operation.
const GAP_BYTES_MAX: u64 = 64 * 1024;
/// A stretch of a sorted sweep that is read at once.
pub(super) struct Run {
    pub(super) members: Range<usize>,
    /// First byte on disk, and the one behind the last.
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Run {
    /// The longest run from place `first` on: same disk, gaps within [`GAP_BYTES_MAX`], within a read's limit, its
    /// ends moved out to the disk's alignment.
    pub(super) fn at(sweep: &[Wanted], first: usize, alignment: u64) -> Self {
        let down = |at: u64| at / alignment * alignment;
        let up = |at: u64| at.div_ceil(alignment) * alignment;
        let disk = sweep[first].block.disk;
        let start = down(sweep[first].block.sector.bytes());
        let mut end = sweep[first].block.sector.bytes() + PAGE_BYTES_U64;
        let mut last = first + 1;
        while let Some(next) = sweep.get(last) {
            let from = next.block.sector.bytes();
            let to = end.max(from + PAGE_BYTES_U64);
            let fits = up(to) - start <= u64_of(READ_BYTES_MAX);
            if next.block.disk != disk || from > end + GAP_BYTES_MAX || !fits {
                break;
            }
            end = to;
            last += 1;
        }
        Self { members: first..last, start, end: up(end) }
    }

    /// Pages on disk.
    pub(super) fn pages(&self) -> usize {
        usize_of(self.end - self.start) / PAGE_BYTES
    }

    /// Which of them `wanted` stands on.
    pub(super) fn page_of(&self, wanted: &Wanted) -> usize {
        usize_of(wanted.block.sector.bytes() - self.start) / PAGE_BYTES
    }

    /// Whether it is made up of whole pages, so that each wanted block is one of them.
    pub(super) fn is_aligned(&self, sweep: &[Wanted]) -> bool {
        let whole = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES_U64);
        let mut members = sweep[self.members.clone()].iter();
        whole(self.end - self.start) && members.all(|w| whole(w.block.sector.bytes() - self.start))
    }

    /// Whether no other page wants the block of member `at`.
    pub(super) fn is_alone(&self, sweep: &[Wanted], at: usize) -> bool {
        let same = |other: usize| self.members.contains(&other) && sweep[other].block == sweep[at].block;
        !same(at + 1) && !at.checked_sub(1).is_some_and(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::Check;
    use crate::units::{BlockAddress, DiskId, Pfn, Sector, Version};

    fn sweep(sectors: &[u64]) -> Vec<Wanted> {
        let wanted = |(at, sector): (usize, &u64)| Wanted {
            pfn: Pfn::at(at),
            version: Version(1),
            block: BlockAddress { disk: DiskId(0), sector: Sector(*sector) },
            check: Check::default(),
        };
        sectors.iter().enumerate().map(wanted).collect()
    }

    #[test]
    fn neighbours_are_one_run_and_far_ones_are_not() {
        let s = sweep(&[8, 16, 24, 24 + 8 + 128, 10_000]);
        let run = Run::at(&s, 0, 512);
        assert_eq!((run.members.clone(), run.start, run.end), (0..4, 8 * 512, (24 + 8 + 128 + 8) * 512));
        assert!(run.is_aligned(&s) && run.pages() == 20 && run.page_of(&s[3]) == 19);
        assert!((0..4).all(|at| run.is_alone(&s, at)));
        assert_eq!(Run::at(&s, 4, 512).members, 4..5);
    }

    #[test]
    fn a_run_is_widened_to_the_disks_alignment() {
        let s = sweep(&[63, 71]);
        let run = Run::at(&s, 0, 4096);
        assert_eq!((run.start, run.end), (56 * 512, 80 * 512));
        assert!(!run.is_aligned(&s));
        let s = sweep(&[8, 17, 33]);
        assert!(!Run::at(&s, 0, 512).is_aligned(&s), "two blocks that share bytes");
    }

    #[test]
    fn duplicates_of_one_block_share_a_read() {
        let s = sweep(&[8, 8, 8]);
        let run = Run::at(&s, 0, 512);
        assert_eq!((run.members.clone(), run.end - run.start), (0..3, 4096));
        assert!(run.is_aligned(&s) && (0..3).all(|at| !run.is_alone(&s, at)));
        let s = sweep(&[8, 16, 16, 24]);
        let run = Run::at(&s, 0, 512);
        assert_eq!([0, 1, 2, 3].map(|at| run.is_alone(&s, at)), [true, false, false, true]);
    }

    #[test]
    fn no_run_is_longer_than_a_slot() {
        let sectors: Vec<u64> = (0..600).map(|i| 1 + i * 8).collect();
        let s = sweep(&sectors);
        let mut first = 0;
        while first < s.len() {
            let run = Run::at(&s, first, 4096);
            assert!(run.end - run.start <= u64_of(READ_BYTES_MAX));
            assert!(run.members.end > first);
            first = run.members.end;
        }
    }
}
