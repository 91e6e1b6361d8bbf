//! A PV guest's frames on the source: its own table and the hypervisor's, both mapped.
#![forbid(unsafe_code)]

use mover::units::{u64_of, usize_of};

use super::tables::frame_of;
use super::{ENTRIES, NO_FRAME, PFN_LIMIT};
use crate::abi::{Access, ForeignWindow, MachineToPhys, SharedInfo};
use crate::domain::DomainError;
use crate::domain::common::{Domain, LOG};
use crate::stream::P2mFrames;

/// Bits of an address that page tables translate.
const ADDRESS: u64 = (1 << 48) - 1;

/// Both tables.
#[derive(Debug)]
pub(super) struct GuestFrames {
    machine: MachineToPhys,
    /// The guest's, in the form of a list: a word a frame.
    list: ForeignWindow,
    shared: ForeignWindow,
    /// Frames it has.
    pages: u64,
    /// The guest's frames that hold the list.
    holders: Vec<u64>,
    /// How often the guest had changed where the list is.
    generation: u64,
}

impl GuestFrames {
    pub(super) fn new(domain: &mut Domain) -> Result<Self, DomainError> {
        let id = domain.id;
        let fail = || DomainError::call("map the tables of frames", id, LOG);
        let machine = MachineToPhys::map(&mut domain.xen).map_err(fail())?;
        let shared = map(domain, &[domain.info.shared_info_frame])?;
        let pages = shared_word(&shared, SharedInfo::MAX_PFN);
        if pages == 0 || pages > PFN_LIMIT {
            let what = format!("it says that it has {pages} frames; 1 to {PFN_LIMIT} can be moved");
            return Err(DomainError::Guest { domain: id, what });
        }
        if shared_word(&shared, SharedInfo::P2M_CR3) == 0 {
            return Err(DomainError::Unsupported {
                domain: id,
                why: "its kernel has its table of frames in the old form of a tree".into(),
                remedy: "Boot a Linux kernel from 4.0 on in it, or move it with Xen's own tools",
            });
        }
        let generation = shared_word(&shared, SharedInfo::P2M_GENERATION);
        let (leaves, pages) = walk(domain, &machine, &shared, pages)?;
        let list = map(domain, &leaves)?;
        let mut frames = Self { machine, list, shared, pages, holders: Vec::new(), generation };
        for (at, &leaf) in leaves.iter().enumerate() {
            let holder = frames.guest_frame(leaf).ok_or_else(|| DomainError::Guest {
                domain: id,
                what: format!("page {at} of its table of frames is no page of its own ({leaf:#x})"),
            })?;
            frames.holders.push(holder);
        }
        Ok(frames)
    }

    /// How many frames there are.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }
    /// The machine frame the guest says it has for its frame `pfn`.
    pub(super) fn machine_frame(&self, pfn: u64) -> u64 {
        self.list.word(usize_of(pfn)).unwrap_or(NO_FRAME)
    }
    /// The guest's frame for a machine frame, if both tables agree on it.
    pub(super) fn guest_frame(&self, machine: u64) -> Option<u64> {
        let pfn = self.machine.get(machine)?;
        (pfn < self.pages && self.machine_frame(pfn) == machine).then_some(pfn)
    }
    /// Where the list is, for the stream.
    pub(super) fn holders(&self) -> P2mFrames {
        let end = u32::try_from(self.pages - 1).unwrap_or(u32::MAX);
        P2mFrames { start: 0, end, frames: self.holders.clone() }
    }
    /// Whether the list is where it was. Guests move it when they get more memory than they were started for.
    pub(super) fn unmoved(&self) -> bool {
        shared_word(&self.shared, SharedInfo::P2M_GENERATION) == self.generation
    }
    /// The page shared with the hypervisor.
    pub(super) fn shared_info(&self) -> Box<[u8; 4096]> {
        let mut page = Box::new([0; 4096]);
        for (at, bytes) in page.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&self.shared.word(at).unwrap_or(0).to_le_bytes());
        }
        page
    }
}

fn shared_word(shared: &ForeignWindow, at: usize) -> u64 {
    shared.word(at / 8).unwrap_or(0)
}

/// Maps machine frames of the guest for reading, all of them.
fn map(domain: &Domain, frames: &[u64]) -> Result<ForeignWindow, DomainError> {
    let fail = || DomainError::call("map the tables of frames", domain.id, LOG);
    let mut window = ForeignWindow::reserve(&domain.xen, frames.len()).map_err(fail())?;
    let errors = window.map(domain.id, frames, Access::Read).map_err(fail())?;
    match errors.iter().position(|&error| error != 0) {
        None => Ok(window),
        Some(at) => {
            let error = std::io::Error::from_raw_os_error(-errors[at]);
            let what = format!("machine frame {:#x} of its tables can't be mapped: {error}", frames[at]);
            Err(DomainError::Guest { domain: domain.id, what })
        }
    }
}

/// Walks the guest's page tables over the list: the machine frames that hold it, and how many frames it is for, which
/// may be fewer than the guest says: where its end is one empty part again and again.
fn walk(
    domain: &Domain,
    machine: &MachineToPhys,
    shared: &ForeignWindow,
    mut pages: u64,
) -> Result<(Vec<u64>, u64), DomainError> {
    let bad = |what: String| DomainError::Guest { domain: domain.id, what };
    let start = shared_word(shared, SharedInfo::P2M_VADDR) & ADDRESS;
    let end = |pages: u64| start + (pages.div_ceil(ENTRIES) * 4096 - 1);
    if !start.is_multiple_of(4096) || end(pages) > ADDRESS {
        return Err(bad(format!("its table of frames can't be at {start:#x}")));
    }
    let mut tables = vec![frame_of(shared_word(shared, SharedInfo::P2M_CR3))];
    for level in (1..=4u32).rev() {
        let shift = 12 + 9 * (level - 1);
        let (first, last) = (start >> shift, end(pages) >> shift);
        // Tables of the level above cover whole runs of 512 entries; the window begins with the first such run.
        let base = first & !(ENTRIES - 1);
        let window = map(domain, &tables)?;
        let entries = (first..=last).map(|at| frame_of(window.word(usize_of(at - base)).unwrap_or(0)));
        tables = entries.collect();
        if let Some(at) = tables.iter().position(|&frame| frame == 0 || frame > machine.highest()) {
            let frame = tables[at];
            return Err(bad(format!(
                "level {level} of its table's page tables names machine frame {frame:#x}"
            )));
        }
        if level == 2 {
            let kept = without_repeated_end(&tables);
            tables.truncate(kept);
            // Each covers a run of pages of the list; the first may begin within one.
            let listed = (u64_of(kept) * ENTRIES - (start >> 12 & (ENTRIES - 1))) * ENTRIES;
            pages = pages.min(listed);
        }
    }
    Ok((tables, pages))
}

/// How many of `tables` there are before the last one repeats itself.
fn without_repeated_end(tables: &[u64]) -> usize {
    let Some(last) = tables.last() else { return 0 };
    let run = tables.iter().rev().take_while(|&table| table == last).count();
    // All the same: at least one is needed.
    if run > 1 { (tables.len() - run).max(1) } else { tables.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_repeats_itself_is_left_out() {
        for (tables, kept) in
            [(&[1][..], 1), (&[1, 2], 2), (&[1, 2, 2], 1), (&[1, 2, 3, 3, 3], 2), (&[4, 4], 1)]
        {
            assert_eq!(without_repeated_end(tables), kept, "{tables:?}");
        }
    }
}
