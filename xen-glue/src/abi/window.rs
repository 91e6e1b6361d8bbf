//! Another domain's memory in this process: a window over a batch of its pages, used again for every batch; the
//! hypervisor's machine-to-physical table; a domain's resources (its grant table).
//!
//! privcmd maps a range of addresses once and refuses to map over it, so a window is a reserved range of addresses,
//! and every batch a fresh mapping placed over the one before, which `mmap` drops in the same call. What is mapped is
//! the kernel's business only: such pages can't be pinned (no O_DIRECT, no registered buffers), but any ordinary read
//! or write may name them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::{Duration, Instant};

use mover::memory::GuestPage;
use mover::units::{PAGE_BYTES, u64_of, usize_of};
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::FromBytes;

use super::device::{ioctl, request};
use super::memory::{PrivcmdMmapBatch, PrivcmdMmapResource};
use super::{DomainId, GrantEntry, Xen};

const MMAP_BATCH: u64 = request(b'P', 4, size_of::<PrivcmdMmapBatch>());
const MMAP_RESOURCE: u64 = request(b'P', 7, size_of::<PrivcmdMmapResource>());
const _: () = assert!(MMAP_BATCH == 0x20_5004 && MMAP_RESOURCE == 0x20_5007);

/// How long a page that is paged out may take to come back, and the pause between two looks.
const PAGED_IN_WITHIN: Duration = Duration::from_secs(60);
const PAGED_LOOK: Duration = Duration::from_micros(100);

/// What a mapping is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing. Written pages count as dirty for the domain's log.
    Write,
}

impl Access {
    fn protection(self) -> ProtFlags {
        match self {
            Self::Read => ProtFlags::READ,
            Self::Write => ProtFlags::READ | ProtFlags::WRITE,
        }
    }
}

/// A reserved range of addresses over which batches of a domain's pages are mapped. Dropped with what it has mapped.
#[derive(Debug)]
pub struct ForeignWindow {
    privcmd: File,
    address: NonNull<u8>,
    capacity: usize,
    /// Pages mapped now, from the range's start; `errors` has one entry for each.
    mapped: usize,
    access: Access,
    errors: Vec<i32>,
    /// Whether pages that are paged out are waited for.
    patient: bool,
}

// SAFETY: the range belongs to this value alone; its pages are reached through opaque copies, volatile reads and the
// kernel only. Worth it: a reader on one thread and a writer on another take turns with windows.
unsafe impl Send for ForeignWindow {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for ForeignWindow {}

impl ForeignWindow {
    /// Reserves addresses for `capacity` pages; no memory.
    ///
    /// # Errors
    /// What `mmap(2)` or `dup(2)` says.
    pub fn reserve(xen: &Xen, capacity: usize) -> io::Result<Self> {
        let capacity = capacity.max(1);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        // Worth it: addresses of our own, to map over again and again.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                capacity * PAGE_BYTES,
                ProtFlags::empty(),
                flags,
            )?
        };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        let errors = Vec::with_capacity(capacity);
        let privcmd = xen.privcmd().try_clone()?;
        Ok(Self { privcmd, address, capacity, mapped: 0, access: Access::Read, errors, patient: true })
    }

    /// Never waits for a page that is paged out: it is a hole, for who pages it in itself.
    #[must_use]
    pub fn impatient(mut self) -> Self {
        self.patient = false;
        self
    }

    /// Pages it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Maps `frames` of `domain` in this order, instead of what the window held. Returns for each 0, or the negative
    /// errno with which it could not be mapped; it is a hole then. A page that is paged out is waited for, unless this is
    /// [`Self::impatient`].
    ///
    /// # Errors
    /// What `mmap(2)` or privcmd says of the batch as a whole; the window is empty then.
    ///
    /// # Panics
    /// If there are more frames than it has room for.
    pub fn map(&mut self, domain: DomainId, frames: &[u64], access: Access) -> io::Result<&[i32]> {
        assert!(frames.len() <= self.capacity, "{} pages in a window for {}", frames.len(), self.capacity);
        if self.mapped > frames.len() {
            self.clear()?;
        }
        if frames.is_empty() {
            return Ok(&self.errors);
        }
        // SAFETY: inside the range reserved for this, over what this window itself had mapped, and `&mut self` says
        // that nobody holds a page of it. Worth it: one call drops the old batch and makes place for the new.
        unsafe {
            rustix::mm::mmap(
                self.address.as_ptr().cast(),
                frames.len() * PAGE_BYTES,
                access.protection(),
                MapFlags::SHARED | MapFlags::FIXED,
                &self.privcmd,
                0,
            )?
        };
        self.mapped = frames.len();
        self.access = access;
        self.errors.clear();
        self.errors.resize(frames.len(), 0);
        match self.batch(domain, frames, 0, frames.len()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                if self.patient {
                    self.wait_for_paged(domain, frames)?;
                }
            }
            Err(error) => {
                self.clear()?;
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(&self.errors)
    }

    /// Asks for pages `from..to` of the batch.
    fn batch(&mut self, domain: DomainId, frames: &[u64], from: usize, to: usize) -> io::Result<()> {
        let mut batch = PrivcmdMmapBatch {
            count: u32::try_from(to - from).unwrap_or(u32::MAX),
            domain: domain.0,
            pad: 0,
            address: u64_of(self.address.as_ptr().addr() + from * PAGE_BYTES),
            frames: u64_of(frames[from..to].as_ptr().addr()),
            errors: u64_of(self.errors[from..to].as_mut_ptr().addr()),
        };
        // SAFETY: the request takes this struct; both arrays have `count` entries, the addresses are inside the
        // mapping made for them. Worth it: this is how another domain's pages are mapped.
        unsafe { ioctl(self.privcmd.as_fd(), MMAP_BATCH, &mut batch) }.map(drop)
    }

    /// Asks again for runs of pages that are paged out, until they are in or the limit has passed.
    fn wait_for_paged(&mut self, domain: DomainId, frames: &[u64]) -> io::Result<()> {
        let begun = Instant::now();
        loop {
            std::thread::sleep(PAGED_LOOK);
            let mut waiting = false;
            let mut at = 0;
            while at < frames.len() {
                if self.errors[at] != -libc::ENOENT {
                    at += 1;
                    continue;
                }
                let run = self.errors[at..].iter().take_while(|&&error| error == -libc::ENOENT).count();
                match self.batch(domain, frames, at, at + run) {
                    Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                    Err(_) => waiting = true,
                    Ok(()) => {}
                }
                at += run;
            }
            if !waiting || begun.elapsed() > PAGED_IN_WITHIN {
                return Ok(());
            }
        }
    }

    /// Drops what is mapped; the addresses stay reserved.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub fn clear(&mut self) -> io::Result<()> {
        if self.mapped > 0 {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            // SAFETY: as in `map`. Worth it: a mapping kept is a page of the domain kept.
            unsafe {
                rustix::mm::mmap_anonymous(
                    self.address.as_ptr().cast(),
                    self.mapped * PAGE_BYTES,
                    ProtFlags::empty(),
                    flags,
                )?
            };
            self.mapped = 0;
            self.errors.clear();
        }
        Ok(())
    }

    /// Page `at` of the batch; none if it could not be mapped. A window mapped for reading gives pages that only may
    /// be read.
    #[must_use]
    pub fn page(&self, at: usize) -> Option<GuestPage<'_>> {
        let address = self.page_address(at)?;
        // SAFETY: mapped, page-aligned, and kept by this window for as long as it is borrowed.
        // Worth it: the kernel copies straight from and to the domain's pages.
        Some(unsafe { GuestPage::new(address) })
    }

    pub(super) fn page_address(&self, at: usize) -> Option<NonNull<u8>> {
        let mapped = self.errors.get(at).is_some_and(|&error| error == 0);
        // SAFETY: `errors` has an entry a page mapped, so this is inside the range. Worth it: see `page`.
        mapped.then(|| unsafe { self.address.add(at * PAGE_BYTES) })
    }

    /// The 64-bit word at `index`, counted over all pages; none where no page is mapped.
    #[must_use]
    pub fn word(&self, index: usize) -> Option<u64> {
        const WORDS: usize = PAGE_BYTES / size_of::<u64>();
        let page = self.page_address(index / WORDS)?;
        // SAFETY: inside a mapped page and aligned; volatile, as its owner may write it. Worth it: tables of frames.
        Some(unsafe { page.cast::<u64>().add(index % WORDS).read_volatile() })
    }

    /// Writes that word; false where no page is mapped.
    ///
    /// # Panics
    /// If the window is mapped for reading.
    pub fn set_word(&mut self, index: usize, value: u64) -> bool {
        const WORDS: usize = PAGE_BYTES / size_of::<u64>();
        assert_eq!(self.access, Access::Write, "a window mapped for reading");
        let Some(page) = self.page_address(index / WORDS) else { return false };
        // SAFETY: as in `word`, and mapped for writing.
        unsafe { page.cast::<u64>().add(index % WORDS).write_volatile(value) };
        true
    }
}

impl Drop for ForeignWindow {
    fn drop(&mut self) {
        // SAFETY: the whole range is ours, and nobody borrows it. Worth it: nothing else gives it back.
        let dropped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.capacity * PAGE_BYTES) };
        debug_assert!(dropped.is_ok(), "munmap of a range of our own: {dropped:?}");
    }
}

/// The hypervisor's table from machine frames to their owners' frames.
#[derive(Debug)]
pub struct MachineToPhys {
    table: ForeignWindow,
    /// The highest machine frame it has an entry for.
    highest: u64,
}

impl MachineToPhys {
    /// Bytes, pages and entries of the pieces the hypervisor names.
    const PIECE_BYTES: u64 = 2 << 20;
    const PIECE_PAGES: u64 = Self::PIECE_BYTES / 4096;
    const PIECE_ENTRIES: u64 = Self::PIECE_BYTES / 8;

    /// Maps it, for reading.
    ///
    /// # Errors
    /// What the hypervisor or `mmap(2)` says.
    pub fn map(xen: &mut Xen) -> io::Result<Self> {
        let highest = xen.maximum_ram_page()?;
        let pieces = usize_of(highest / Self::PIECE_ENTRIES + 1);
        let mut list = xen.buffer(pieces * size_of::<u64>())?;
        let known = xen.machphys_frames(&mut list)?;
        let mut frames = Vec::with_capacity(known * usize_of(Self::PIECE_PAGES));
        for first in &list.words()[..known] {
            // A gap in the host's memory has no piece. Frame numbers past all memory stand for it: none is mapped there.
            let first = if *first == 0 { u64::MAX >> 12 } else { *first };
            frames.extend((0..Self::PIECE_PAGES).map(|page| first.saturating_add(page)));
        }
        let mut table = ForeignWindow::reserve(xen, frames.len())?;
        table.map(DomainId::XEN, &frames, Access::Read)?;
        Ok(Self { table, highest })
    }
    /// The highest machine frame of the host.
    #[must_use]
    pub fn highest(&self) -> u64 {
        self.highest
    }
    /// What the table says of a machine frame, which its owner may have put there; none if it has no entry.
    #[must_use]
    pub fn get(&self, machine_frame: u64) -> Option<u64> {
        if machine_frame > self.highest { None } else { self.table.word(usize_of(machine_frame)) }
    }
}

/// Frames that belong to a domain but not to its memory, mapped for writing; unmapped on drop.
#[derive(Debug)]
pub struct Resource {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and to no thread. Worth it: a grant table is written by one thread and looked
// over by another in the end.
unsafe impl Send for Resource {}

impl Resource {
    const GRANT_TABLE: u32 = 1;

    /// Maps the first `frames` pages of a domain's grant table; there are that many from then on.
    ///
    /// # Errors
    /// What `mmap(2)` or privcmd says.
    pub fn grant_table(xen: &Xen, domain: DomainId, frames: usize) -> io::Result<Self> {
        let bytes = frames.max(1) * PAGE_BYTES;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let device = xen.privcmd();
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        // Worth it: entries are written into the table itself.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, device, 0)? };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        let resource = Self { address, bytes };
        let mut argument = PrivcmdMmapResource {
            domain: domain.0,
            kind: Self::GRANT_TABLE,
            count: u64_of(bytes / PAGE_BYTES),
            address: u64_of(address.as_ptr().addr()),
            ..PrivcmdMmapResource::default()
        };
        // SAFETY: the request takes this struct, and the address is of a mapping of that length.
        // Worth it: as above.
        unsafe { ioctl(device.as_fd(), MMAP_RESOURCE, &mut argument)? };
        Ok(resource)
    }

    /// Frames that entries of a grant table of this version let others map.
    #[must_use]
    pub fn granted(&self, version: u32) -> Vec<u64> {
        let words = self.bytes / size_of::<u64>();
        // SAFETY: inside the mapping, aligned; volatile, as its owner may write it. Worth it: who has a page mapped is told nowhere
        // else.
        let word = |at: usize| unsafe { self.address.cast::<u64>().add(at).read_volatile() };
        // The flags stand first; version 1 has the frame in the upper half, version 2 in the next word.
        let permits = |at: &usize| word(*at) & 3 == u64::from(GrantEntry::PERMIT_ACCESS);
        match version {
            1 => (0..words).filter(permits).map(|at| word(at) >> 32).collect(),
            _ => (0..words).step_by(2).filter(permits).map(|at| word(at + 1)).collect(),
        }
    }

    /// Entry `at` of a grant table of version 1.
    ///
    /// # Panics
    /// If there is no such entry.
    #[must_use]
    pub fn grant(&self, at: usize) -> GrantEntry {
        let place = self.place(at).cast::<u64>();
        // SAFETY: inside the mapping, aligned; volatile, as the hypervisor writes its flags. Worth it: what was written is read back.
        let word = unsafe { place.read_volatile() };
        GrantEntry::read_from_bytes(&word.to_ne_bytes()).unwrap_or_default()
    }

    /// Empties entry `at` of a grant table of version 1; false, and it is as it was, while somebody has its frame mapped.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn clear_grant(&mut self, at: usize) -> bool {
        let place = self.place(at);
        // SAFETY: the flags stand first, aligned, inside the mapping; atomic, as the hypervisor sets and clears bits of them.
        // Worth it: looking and clearing are one step, so that nobody can come to use it in between.
        let flags = unsafe { AtomicU16::from_ptr(place.cast().as_ptr()) };
        let now = flags.load(SeqCst);
        if now & GrantEntry::IN_USE != 0 || flags.compare_exchange(now, 0, SeqCst, SeqCst).is_err() {
            return false;
        }
        // SAFETY: as above. An entry without flags is nobody's business but ours.
        unsafe {
            let place = place.cast::<GrantEntry>().as_ptr();
            (&raw mut (*place).domain).write_volatile(0);
            (&raw mut (*place).frame).write_volatile(0);
        }
        true
    }

    /// Where entry `at` of a grant table of version 1 stands.
    fn place(&self, at: usize) -> NonNull<u8> {
        let offset = at * size_of::<GrantEntry>();
        let end = offset + size_of::<GrantEntry>();
        assert!(end <= self.bytes, "entry {at} of a table of {} bytes", self.bytes);
        // SAFETY: inside the mapping, which was just looked at. Worth it: see `set_grant`.
        unsafe { self.address.add(offset) }
    }

    /// Writes entry `at` of a grant table of version 1, the flags last, so that nobody sees half an entry.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn set_grant(&mut self, at: usize, entry: GrantEntry) {
        let place = self.place(at).cast::<GrantEntry>().as_ptr();
        // SAFETY: inside the mapping, aligned; volatile and in this order, as the hypervisor reads it meanwhile.
        // Worth it: as above.
        unsafe {
            (&raw mut (*place).frame).write_volatile(entry.frame);
            (&raw mut (*place).domain).write_volatile(entry.domain);
            std::sync::atomic::fence(SeqCst);
            (&raw mut (*place).flags).write_volatile(entry.flags);
        }
    }
}

impl Drop for Resource {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole, used by nobody after this. Worth it: nothing else gives it back.
        let dropped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
        debug_assert!(dropped.is_ok(), "munmap of a mapping of our own: {dropped:?}");
    }
}
