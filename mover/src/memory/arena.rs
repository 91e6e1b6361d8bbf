//! The engine's own staging memory: slots of equal size in one mapping, in huge pages where the machine has them.
//!
//! A read into memory of 4 KiB pages pins a page table entry for each; into huge pages, one for 512. So the arena
//! asks for reserved huge pages first, then for transparent ones, then takes what every machine has, and says which
//! it got. All of it is faulted in at once: first touch of cold memory costs more than a disk read.
//!
//! An arena knows nothing of reads under way. Whoever hands its addresses to the kernel (`kernel::uring`) answers for
//! not looking at a slot while the kernel writes it. Owner: the thread of the reader it belongs to.

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::units::usize_of;

/// Bytes of the huge pages asked for.
const HUGE_BYTES: usize = 2 << 20;

/// What an arena's memory consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Reserved huge pages of 2 MiB (`vm.nr_hugepages`).
    Reserved,
    /// Transparent huge pages, at least in part.
    Transparent,
    /// Pages of 4 KiB.
    Small,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved 2 MiB pages",
            Self::Transparent => "transparent huge pages",
            Self::Small => "4 KiB pages",
        })
    }
}

/// Slots of equal size, page-aligned, faulted in.
pub struct Arena {
    base: NonNull<u8>,
    mapped_bytes: usize,
    slots: usize,
    slot_bytes: usize,
    backing: Backing,
}

// SAFETY: the arena is a mapping of its own that lives until it is dropped; access to its bytes goes through `unsafe`
// methods whose callers answer for exclusion. Worth it: a reader is made on one thread and moved to its owner.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps and faults in `slots` slots of `slot_bytes`, a multiple of 4096. Fails only where the machine has no
    /// memory for them at all.
    ///
    /// # Panics
    /// If `slots` or `slot_bytes` is zero or `slot_bytes` not a multiple of 4096.
    pub fn new(slots: usize, slot_bytes: usize) -> io::Result<Self> {
        assert!(
            slots > 0 && slot_bytes > 0 && slot_bytes.is_multiple_of(4096),
            "{slots} slots of {slot_bytes}"
        );
        let wanted = slots.checked_mul(slot_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapped_bytes = wanted.checked_next_multiple_of(HUGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        if let Ok(base) = map(mapped_bytes, MapFlags::HUGETLB | MapFlags::HUGE_2MB) {
            let arena = Self { base, mapped_bytes, slots, slot_bytes, backing: Backing::Reserved };
            // A control group may forbid what was reserved; that shows when the pages are faulted in.
            if arena.fault_in().is_ok() {
                return Ok(arena);
            }
        }
        let base = map_aligned(mapped_bytes)?;
        let mut arena = Self { base, mapped_bytes, slots, slot_bytes, backing: Backing::Small };
        // SAFETY: the range is this arena's own mapping; the advice changes no contents. Worth it: one page table
        // entry in place of 512 for every read. Refused where transparent huge pages are off; the rest still works.
        let advised =
            unsafe { madvise(arena.base.as_ptr().cast::<c_void>(), mapped_bytes, Advice::LinuxHugepage) }
                .is_ok();
        arena.fault_in()?;
        if advised && huge_kib_at(arena.base) > 0 {
            arena.backing = Backing::Transparent;
        }
        Ok(arena)
    }

    /// What it consists of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }
    /// Slots it has.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }
    /// Bytes of a slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }
    /// Bytes it has mapped, slots and rounding.
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        self.mapped_bytes
    }
    /// Its first byte.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Where slot `slot` begins.
    ///
    /// # Panics
    /// If there is no such slot.
    #[must_use]
    pub fn address(&self, slot: usize) -> NonNull<u8> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        // SAFETY: slot < slots, so the offset is inside the mapping. Worth it: an address for the kernel.
        unsafe { self.base.add(slot * self.slot_bytes) }
    }

    /// The bytes of slot `slot`.
    ///
    /// # Safety
    /// Nothing, the kernel included, writes the slot while the slice lives.
    #[must_use]
    pub unsafe fn bytes(&self, slot: usize) -> &[u8] {
        // SAFETY: the slot is inside the mapping, faulted in and initialised by the kernel; the caller excludes
        // writers. Worth it: loaded pages are checked where the disk put them.
        unsafe { std::slice::from_raw_parts(self.address(slot).as_ptr(), self.slot_bytes) }
    }

    fn fault_in(&self) -> io::Result<()> {
        let address = self.base.as_ptr().cast::<c_void>();
        // SAFETY: the range is this arena's own mapping and holds nothing yet. Worth it: see the module head.
        match unsafe { madvise(address, self.mapped_bytes, Advice::LinuxPopulateWrite) } {
            Ok(()) => Ok(()),
            // Before Linux 5.14 there is no such advice: touch each page. Reserved pages would answer a limit with
            // a signal there, so they are not taken.
            Err(rustix::io::Errno::INVAL) if self.backing != Backing::Reserved => {
                for page in (0..self.mapped_bytes).step_by(4096) {
                    // SAFETY: inside this arena's own mapping. Worth it: as above.
                    unsafe { self.base.add(page).write_volatile(0) };
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        unmap(self.base, self.mapped_bytes);
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} slots of {} bytes in {})", self.slots, self.slot_bytes, self.backing)
    }
}

fn map(bytes: usize, flags: MapFlags) -> io::Result<NonNull<u8>> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new private mapping at an address of the kernel's choice disturbs nothing. Worth it: the allocator
    // gives no huge pages and no say over alignment that large.
    let address = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, MapFlags::PRIVATE | flags) }?;
    NonNull::new(address.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Maps `bytes` at a multiple of [`HUGE_BYTES`], without which the kernel uses no transparent huge page at the edges.
fn map_aligned(bytes: usize) -> io::Result<NonNull<u8>> {
    let whole = bytes.checked_add(HUGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
    let start = map(whole, MapFlags::empty())?;
    let before = start.as_ptr().align_offset(HUGE_BYTES);
    // SAFETY: before < HUGE_BYTES, and `whole` has HUGE_BYTES more than `bytes`.
    let base = unsafe { start.add(before) };
    if before > 0 {
        unmap(start, before);
    }
    if before < HUGE_BYTES {
        // SAFETY: base + bytes is inside the mapping, whose rest is HUGE_BYTES - before long.
        unmap(unsafe { base.add(bytes) }, HUGE_BYTES - before);
    }
    Ok(base)
}

fn unmap(address: NonNull<u8>, bytes: usize) {
    // SAFETY: callers pass page-aligned parts of mappings they own and never use again. Worth it: the pair of `map`.
    let result = unsafe { munmap(address.as_ptr().cast::<c_void>(), bytes) };
    assert!(result.is_ok(), "unmapping our own memory can't fail: {result:?}");
}

/// KiB of huge pages in the mapping that holds `address`, from `/proc/self/smaps` (proc(5)); 0 where it can't be read.
fn huge_kib_at(address: NonNull<u8>) -> usize {
    let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps") else { return 0 };
    let wanted = address.addr().get();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            let parse = |hex| u64::from_str_radix(hex, 16).map(usize_of);
            if let (Ok(start), Ok(end)) = (parse(start), parse(end)) {
                inside = (start..end).contains(&wanted);
                continue;
            }
        }
        if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
            return rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_aligned_and_zero() {
        let arena = Arena::new(5, 12288).unwrap();
        assert!(arena.mapped_bytes() >= 5 * 12288);
        for slot in 0..5 {
            let address = arena.address(slot);
            assert_eq!(address.as_ptr().align_offset(4096), 0);
            // SAFETY: nobody else has the arena.
            assert!(unsafe { arena.bytes(slot) }.iter().all(|b| *b == 0));
            // SAFETY: as above, and the slice above is gone.
            unsafe { address.write_bytes(u8::try_from(slot).unwrap() + 1, 12288) };
        }
        for slot in 0..5 {
            // SAFETY: as above.
            let bytes = unsafe { arena.bytes(slot) };
            assert!(bytes.iter().all(|b| usize::from(*b) == slot + 1), "slot {slot} was written by another");
        }
    }

    #[test]
    #[should_panic(expected = "slot 5 of 5")]
    fn there_is_no_slot_past_the_last() {
        let _ = Arena::new(5, 4096).unwrap().address(5);
    }

    #[test]
    fn says_what_it_got_and_it_is_resident() {
        let arena = Arena::new(4, 1 << 20).unwrap();
        let huge = huge_kib_at(arena.base());
        match arena.backing() {
            Backing::Reserved => {}
            Backing::Transparent => assert!(huge > 0),
            Backing::Small => assert_eq!(huge, 0),
        }
        let mut resident = [0_u8; 1024];
        // SAFETY: the vector has a byte for each of the mapping's pages.
        let result = unsafe { libc::mincore(arena.base().as_ptr().cast(), 4 << 20, resident.as_mut_ptr()) };
        assert_eq!(result, 0);
        assert!(resident.iter().all(|page| page & 1 == 1), "every page is faulted in");
        eprintln!("{arena:?}");
    }
}
