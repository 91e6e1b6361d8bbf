//! Page tables between machine frames and the guest's own.
#![forbid(unsafe_code)]

use mover::memory::PageBuf;

use super::{ENTRIES, set_word, word};

/// The entry is in use.
const PRESENT: u64 = 1;
/// Above the lowest level: it maps a superpage.
const SUPERPAGE: u64 = 1 << 7;
/// Bits 12 to 51: the frame.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Entries of a top-level table that are the hypervisor's own (`HYPERVISOR_VIRT_START` to `HYPERVISOR_VIRT_END`).
const XEN: std::ops::Range<usize> = 256..272;

/// An entry that can't be translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BadEntry {
    /// Which.
    pub(super) index: usize,
    /// Its value.
    pub(super) entry: u64,
}

impl std::fmt::Display for BadEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "entry {} is {:#x}, which can't be translated", self.index, self.entry)
    }
}

/// Replaces machine frames by the guest's in a table of this level; the hypervisor's own entries become 0.
pub(super) fn normalise(
    table: &mut PageBuf,
    level: u8,
    to_guest: impl Fn(u64) -> Option<u64>,
) -> Result<(), BadEntry> {
    for index in 0..mover::units::usize_of(ENTRIES) {
        let entry = word(&table.0, index * 8);
        if level == 4 && XEN.contains(&index) {
            set_word(&mut table.0, index * 8, 0);
        } else if entry & PRESENT != 0 {
            let superpage = level > 1 && entry & SUPERPAGE != 0;
            let frame = if superpage { None } else { to_guest((entry & FRAME) >> 12) };
            let frame = frame.ok_or(BadEntry { index, entry })?;
            set_word(&mut table.0, index * 8, entry & !FRAME | frame << 12);
        }
    }
    Ok(())
}

/// Replaces the guest's frames by machine frames.
pub(super) fn localise(table: &mut PageBuf, to_machine: impl Fn(u64) -> Option<u64>) -> Result<(), BadEntry> {
    for index in 0..mover::units::usize_of(ENTRIES) {
        let entry = word(&table.0, index * 8);
        if entry & PRESENT != 0 {
            let frame = to_machine((entry & FRAME) >> 12).ok_or(BadEntry { index, entry })?;
            set_word(&mut table.0, index * 8, entry & !FRAME | frame << 12 & FRAME);
        }
    }
    Ok(())
}

/// Frames a table's entries name.
pub(super) fn named(table: &PageBuf) -> impl Iterator<Item = u64> {
    let entries = table.0.chunks_exact(8).map(|entry| word(entry, 0));
    entries.filter(|entry| entry & PRESENT != 0).map(|entry| (entry & FRAME) >> 12)
}

/// The frame a page table register names.
pub(super) fn frame_of(register: u64) -> u64 {
    (register & FRAME) >> 12
}

#[cfg(test)]
mod tests {
    use super::*;

    const NX: u64 = 1 << 63;

    fn table(entries: &[(usize, u64)]) -> PageBuf {
        let mut table = PageBuf::zeroed();
        entries.iter().for_each(|&(index, entry)| set_word(&mut table.0, index * 8, entry));
        table
    }

    #[test]
    fn a_table_normalised_and_localised_elsewhere_keeps_its_flags() {
        let mut page = table(&[(0, 0x5067), (511, NX | 0x9_9999_9025), (7, 0x1234_5000)]);
        normalise(&mut page, 1, |machine| Some(machine + 1)).unwrap();
        // What is not present is not a frame: the guest may keep anything there.
        assert!(page == table(&[(0, 0x6067), (511, NX | 0x9_9999_a025), (7, 0x1234_5000)]));
        assert_eq!(named(&page).collect::<Vec<_>>(), [6, 0x99_999a]);
        localise(&mut page, |guest| Some(guest + 0x100)).unwrap();
        assert!(page == table(&[(0, 0x10_6067), (511, NX | 0x9_99a9_a025), (7, 0x1234_5000)]));
    }

    #[test]
    fn the_hypervisors_entries_do_not_travel() {
        let mut page = table(&[(255, 0x1007), (256, 0x2007), (271, 0x3007), (272, 0x4007)]);
        normalise(&mut page, 4, Some).unwrap();
        assert!(page == table(&[(255, 0x1007), (272, 0x4007)]));
        let mut lower = table(&[(256, 0x2007)]);
        normalise(&mut lower, 3, Some).unwrap();
        assert!(lower == table(&[(256, 0x2007)]));
    }

    #[test]
    fn foreign_frames_and_superpages_are_refused() {
        let bad =
            |level, entry| normalise(&mut table(&[(3, entry)]), level, |frame| (frame < 9).then_some(frame));
        assert_eq!(bad(1, 0x9007), Err(BadEntry { index: 3, entry: 0x9007 }));
        assert_eq!(bad(2, 0x2087), Err(BadEntry { index: 3, entry: 0x2087 }));
        // The same bit is a cache attribute at the lowest level.
        assert_eq!(bad(1, 0x2087), Ok(()));
        assert!(localise(&mut table(&[(0, 0x9007)]), |_| None).is_err());
    }
}
