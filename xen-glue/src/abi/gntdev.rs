//! `/dev/xen/gntdev`: pages that another domain's grant table lets this one map, which the kernel can pin, as opposed to those
//! that privcmd maps (`drivers/xen/gntdev.c` of Linux: its special page table entries have pages behind them).
//!
//! The device is told of some grants (an ioctl), which the next `mmap` at the offset it answers maps, in their order. They are
//! unmapped with the mapping; a kernel that still has one of the pages pinned unmaps it later, and the entry says so until then.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use mover::limits::READ_BYTES_MAX;
use mover::memory::Window;
use mover::units::PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::IntoBytes;

use super::DomainId;
use super::device::{ioctl, request};
use super::memory::{GntdevGrantRef, GntdevMapGrantRef, GntdevUnmapGrantRef};

const MAP_GRANT_REF: u64 = request(b'G', 0, size_of::<GntdevMapGrantRef>());
const UNMAP_GRANT_REF: u64 = request(b'G', 1, size_of::<GntdevUnmapGrantRef>());
const _: () = assert!(MAP_GRANT_REF == 0x18_4700 && UNMAP_GRANT_REF == 0x10_4701);
const _: () = assert!(size_of::<GntdevGrantRef>() == size_of::<u64>());

/// Words of the argument before the grants.
const HEAD: usize = 2;
/// Most grants of a mapping: pages of a read.
const MOST: usize = READ_BYTES_MAX / PAGE_BYTES;

/// The device, for grants of one domain.
#[derive(Debug)]
pub struct Gntdev {
    device: File,
    domain: DomainId,
    /// The argument: its head of two words, then a grant a word.
    argument: Box<[u64; HEAD + MOST]>,
}

impl Gntdev {
    /// Opens the device, for grants of `domain`.
    ///
    /// # Errors
    /// What opening `/dev/xen/gntdev` says: `NotFound` where the kernel has none.
    pub fn open(domain: DomainId) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/xen/gntdev")?;
        Ok(Self { device, domain, argument: Box::new([0; HEAD + MOST]) })
    }

    /// Tells the device of `count` grants from `first` on; the offset to map them at.
    fn name(&mut self, first: usize, count: usize) -> io::Result<u64> {
        assert!(count <= MOST, "{count} grants at once");
        let wide = |number: usize| u32::try_from(number).map_err(io::Error::other);
        let head = GntdevMapGrantRef { count: wide(count)?, ..GntdevMapGrantRef::default() };
        let bytes = self.argument.as_mut_bytes();
        bytes[..16].copy_from_slice(&head.as_bytes()[..16]);
        for (at, place) in bytes[16..].chunks_exact_mut(8).take(count).enumerate() {
            let grant = GntdevGrantRef { domain: self.domain.0.into(), reference: wide(first + at)? };
            place.copy_from_slice(grant.as_bytes());
        }
        // SAFETY: the request takes this struct and, behind it, as many grants as it says, which the argument has room for:
        // `count` were just written. Worth it: no crate has these requests.
        unsafe { ioctl(self.device.as_fd(), MAP_GRANT_REF, &mut *self.argument)? };
        Ok(self.argument[1])
    }

    /// Makes the device forget them.
    fn forget(&self, index: u64, count: usize) -> io::Result<()> {
        let count = u32::try_from(count).map_err(io::Error::other)?;
        let mut argument = GntdevUnmapGrantRef { index, count, pad: 0 };
        // SAFETY: the request takes this struct, without addresses. Worth it: as above.
        unsafe { ioctl(self.device.as_fd(), UNMAP_GRANT_REF, &mut argument) }.map(drop)
    }
}

/// What stands behind a window of granted pages: a mapping at an address of the kernel's choice, which is never mapped over: a
/// mapping that the device refuses half way would leave its addresses to anybody. Dropped with what it has mapped.
#[derive(Debug, Default)]
pub struct GrantWindow {
    mapped: Option<Granted>,
}

/// A mapping of grants.
#[derive(Debug)]
struct Granted {
    address: NonNull<u8>,
    count: usize,
    /// The device's offset.
    index: u64,
}

// SAFETY: the mapping belongs to this value alone, and to no thread. Worth it: a window is made on one thread and used by another.
unsafe impl Send for Granted {}

impl GrantWindow {
    /// A window with room for `capacity` pages.
    #[must_use]
    pub fn open(capacity: usize) -> Window {
        let mut window = Window::with_capacity(capacity);
        window.backing = Some(Box::new(Self::default()));
        window
    }

    fn of(window: &mut Window) -> &mut Self {
        let backing = window.backing.as_mut().and_then(|backing| backing.downcast_mut::<Self>());
        match backing {
            Some(grants) => grants,
            None => panic!("a window is filled by what made it"),
        }
    }

    /// Fills the empty `window` with the pages of grants, one for each place of `there` that says so, from grant `first` on.
    ///
    /// # Errors
    /// What the device or `mmap(2)` says: one that can't be mapped is enough. The window is empty then.
    ///
    /// # Panics
    /// If there are more than it has room for, or it is not empty.
    pub fn map(window: &mut Window, device: &mut Gntdev, first: usize, there: &[bool]) -> io::Result<()> {
        assert!(Self::of(window).mapped.is_none() && window.is_empty(), "a window in use");
        let count = there.iter().filter(|there| **there).count();
        let index = device.name(first, count)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing. Worth it: the kernel can pin these pages.
        let mapped = unsafe {
            let (anywhere, bytes) = (std::ptr::null_mut(), count * PAGE_BYTES);
            rustix::mm::mmap(anywhere, bytes, access, MapFlags::SHARED, &device.device, index)
        };
        let address = match mapped {
            Ok(address) => NonNull::new(address.cast()),
            Err(error) => {
                device.forget(index, count)?;
                return Err(error.into());
            }
        };
        let address = address.ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Self::of(window).mapped = Some(Granted { address, count, index });
        let mut at = 0;
        for there in there {
            // SAFETY: a page of the mapping just made, of which there are as many as places that say so; the window's backing
            // keeps it until the window is cleared. Worth it: the disk's read goes there.
            unsafe { window.push(there.then(|| address.add(at * PAGE_BYTES))) };
            at += usize::from(*there);
        }
        Ok(())
    }

    /// Empties `window` and unmaps what it had.
    ///
    /// # Errors
    /// What `munmap(2)` or the device says.
    pub fn unmap(window: &mut Window, device: &Gntdev) -> io::Result<()> {
        window.clear();
        let Some(granted) = Self::of(window).mapped.take() else { return Ok(()) };
        let (index, count) = (granted.index, granted.count);
        drop(granted);
        device.forget(index, count)
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        // SAFETY: the whole mapping is ours, and nobody holds a page of it: windows are cleared before, or go with it. Worth it:
        // nothing else gives it back.
        let dropped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.count * PAGE_BYTES) };
        debug_assert!(dropped.is_ok(), "munmap of a mapping of our own: {dropped:?}");
    }
}
