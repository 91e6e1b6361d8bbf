//! The two memory files of bitmaps that a guest and an engine share: what the guest has written to its disks, and
//! which blocks it may not write yet. A bit is a 4 KiB block of a disk. Both sides use them through this module, with
//! atomic operations only.
//!
//! ```text
//!   log of disk writes:                  | bits of disk 0 | bits of disk 1 | ...
//!   gate:   | page 0: word 0 = wanted    | bits of disk 0 | bits of disk 1 | ...
//! ```
//! Each disk's bits start at a page. The wanted word is 0, or 1 + block + 2^56 * disk of a write that waits.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::Mapping;
use crate::units::{DiskId, PAGE_BYTES, PAGE_BYTES_U64, u64_of, usize_of};

const WORDS_PER_PAGE: usize = PAGE_BYTES / 8;

/// Bitmaps of disks in a shared memory file.
#[derive(Debug)]
struct DiskBits {
    mapping: Mapping,
    /// First word and blocks of each disk.
    disks: Vec<(usize, u64)>,
}

fn layout(disk_bytes: &[u64], header_pages: usize) -> (Vec<(usize, u64)>, usize) {
    let mut pages = header_pages;
    let mut disks = Vec::new();
    for bytes in disk_bytes {
        let blocks = bytes.div_ceil(PAGE_BYTES_U64);
        disks.push((pages * WORDS_PER_PAGE, blocks));
        pages += usize_of(blocks.div_ceil(PAGE_BYTES_U64 * 8));
    }
    (disks, pages.max(1))
}

fn create(name: &str, pages: usize) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, u64_of(pages * PAGE_BYTES))?;
    Ok(file)
}

impl DiskBits {
    fn map(file: BorrowedFd<'_>, disk_bytes: &[u64], header_pages: usize) -> io::Result<Self> {
        let (disks, pages) = layout(disk_bytes, header_pages);
        let bytes = usize_of(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0));
        if bytes < pages * PAGE_BYTES {
            return Err(io::Error::other(format!(
                "shared bitmaps have {bytes} bytes where {pages} pages are due"
            )));
        }
        Ok(Self { mapping: Mapping::shared(file, pages * PAGE_BYTES, false)?, disks })
    }

    /// The words of one disk's bits; none for a disk there is not.
    fn words(&self, disk: DiskId) -> &[AtomicU64] {
        let Some(&(first, blocks)) = self.disks.get(usize::from(disk.0)) else { return &[] };
        &self.mapping.words()[first..first + usize_of(blocks.div_ceil(64))]
    }

    fn word(&self, disk: DiskId, block: u64) -> Option<(&AtomicU64, u64)> {
        self.words(disk).get(usize_of(block / 64)).map(|word| (word, 1 << (block % 64)))
    }
}

/// The log of disk writes. The guest sets a block's bit before a write to it is submitted and again when the write has
/// ended, so that whoever harvests in between hears of the new content too.
#[derive(Debug)]
pub struct SharedWriteLog(DiskBits);

impl SharedWriteLog {
    /// A new one, all clear, for disks of these sizes.
    ///
    /// # Errors
    /// What the kernel says to a memory file or its mapping.
    pub fn create(disk_bytes: &[u64]) -> io::Result<(Self, OwnedFd)> {
        let file = create("pageferry-disk-writes", layout(disk_bytes, 0).1)?;
        Ok((Self::open(file.as_fd(), disk_bytes)?, file))
    }
    /// The one in `file`, made for disks of the same sizes.
    ///
    /// # Errors
    /// What the kernel says to the mapping; a file that is too short.
    pub fn open(file: BorrowedFd<'_>, disk_bytes: &[u64]) -> io::Result<Self> {
        DiskBits::map(file, disk_bytes, 0).map(Self)
    }
    /// Says that block `block` of `disk` is written. No such block: nothing.
    pub fn mark(&self, disk: DiskId, block: u64) {
        if let Some((word, bit)) = self.0.word(disk, block) {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }
    /// Whether block `block` is marked.
    #[must_use]
    pub fn marked(&self, disk: DiskId, block: u64) -> bool {
        self.0.word(disk, block).is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }
    /// Takes the marks away and hands each word with any to `take`: its place (64 blocks each) and its bits.
    pub fn harvest(&self, disk: DiskId, mut take: impl FnMut(usize, u64)) {
        for (at, word) in self.0.words(disk).iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::SeqCst);
                if bits != 0 {
                    take(at, bits);
                }
            }
        }
    }
}

/// The gate before the disks: a set bit holds writes to that block back.
#[derive(Debug)]
pub struct SharedGate(DiskBits);

impl SharedGate {
    /// A new one, all open, for disks of these sizes.
    ///
    /// # Errors
    /// What the kernel says to a memory file or its mapping.
    pub fn create(disk_bytes: &[u64]) -> io::Result<(Self, OwnedFd)> {
        let file = create("pageferry-write-gate", layout(disk_bytes, 1).1)?;
        Ok((Self::open(file.as_fd(), disk_bytes)?, file))
    }
    /// The one in `file`, made for disks of the same sizes.
    ///
    /// # Errors
    /// What the kernel says to the mapping; a file that is too short.
    pub fn open(file: BorrowedFd<'_>, disk_bytes: &[u64]) -> io::Result<Self> {
        DiskBits::map(file, disk_bytes, 1).map(Self)
    }
    /// Holds writes to the blocks set in `bits`, 64 blocks from `64 * at`.
    pub fn hold_word(&self, disk: DiskId, at: usize, bits: u64) {
        if let Some(word) = self.0.words(disk).get(at) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }
    /// Lets writes to block `block` through.
    pub fn open_block(&self, disk: DiskId, block: u64) {
        if let Some((word, bit)) = self.0.word(disk, block) {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }
    /// Lets all writes through.
    pub fn open_all(&self) {
        for disk in 0..self.0.disks.len() {
            for word in self.0.words(DiskId(u8::try_from(disk).unwrap_or(u8::MAX))) {
                word.store(0, Ordering::SeqCst);
            }
        }
    }
    /// Whether writes to block `block` are held.
    #[must_use]
    pub fn held(&self, disk: DiskId, block: u64) -> bool {
        self.0.word(disk, block).is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }
    /// A block that a write waits for.
    #[must_use]
    pub fn wanted(&self) -> Option<(DiskId, u64)> {
        let word = self.wanted_word().load(Ordering::SeqCst).checked_sub(1)?;
        let disk = u8::try_from(word >> 56).unwrap_or(u8::MAX);
        Some((DiskId(disk), word & ((1 << 56) - 1)))
    }
    /// Announces that a write waits for block `block`, unless another one is announced; the guest's side.
    pub fn want(&self, disk: DiskId, block: u64) {
        let word = 1 + block + (u64::from(disk.0) << 56);
        // Another waiter's word stays: it is served first, and this one is announced again a moment later.
        let _ = self.wanted_word().compare_exchange(0, word, Ordering::SeqCst, Ordering::SeqCst);
    }
    /// Takes the announcement of block `block` back, if it stands; the guest's side.
    pub fn want_no_more(&self, disk: DiskId, block: u64) {
        let word = 1 + block + (u64::from(disk.0) << 56);
        let _ = self.wanted_word().compare_exchange(word, 0, Ordering::SeqCst, Ordering::SeqCst);
    }
    fn wanted_word(&self) -> &AtomicU64 {
        &self.0.mapping.words()[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_one_log() {
        let sizes = [64 * 4096 * 600, 5000];
        let (guest, file) = SharedWriteLog::create(&sizes).unwrap();
        let engine = SharedWriteLog::open(file.as_fd(), &sizes).unwrap();
        guest.mark(DiskId(0), 38_399);
        guest.mark(DiskId(1), 1);
        guest.mark(DiskId(1), 64);
        guest.mark(DiskId(2), 0);
        assert!(engine.marked(DiskId(1), 1) && !engine.marked(DiskId(1), 0));
        let mut seen = Vec::new();
        for disk in 0..2 {
            engine.harvest(DiskId(disk), |at, bits| seen.push((disk, at, bits)));
        }
        assert_eq!(seen, [(0, 599, 1 << 63), (1, 0, 2)]);
        assert!(!guest.marked(DiskId(1), 1));
        assert!(SharedWriteLog::open(file.as_fd(), &[1 << 40]).is_err());
    }

    #[test]
    fn the_gate_holds_announces_and_opens() {
        let sizes = [1 << 20, 1 << 20];
        let (guest, file) = SharedGate::create(&sizes).unwrap();
        let engine = SharedGate::open(file.as_fd(), &sizes).unwrap();
        engine.hold_word(DiskId(1), 1, 0b110);
        assert!(guest.held(DiskId(1), 65) && guest.held(DiskId(1), 66) && !guest.held(DiskId(0), 65));
        assert_eq!(engine.wanted(), None);
        guest.want(DiskId(1), 65);
        guest.want(DiskId(1), 66);
        assert_eq!(engine.wanted(), Some((DiskId(1), 65)));
        engine.open_block(DiskId(1), 65);
        assert!(!guest.held(DiskId(1), 65) && guest.held(DiskId(1), 66));
        guest.want_no_more(DiskId(1), 66);
        assert_eq!(engine.wanted(), Some((DiskId(1), 65)));
        guest.want_no_more(DiskId(1), 65);
        assert_eq!(engine.wanted(), None);
        engine.open_all();
        assert!(!guest.held(DiskId(1), 66));
    }
}
