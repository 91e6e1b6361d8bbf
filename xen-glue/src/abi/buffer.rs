//! Memory a hypercall may be pointed at: present for as long as it lives, whatever the kernel does meanwhile.
//!
//! From `/dev/xen/hypercall` (Linux 4.18) where there is one: its pages are the kernel's and never move. Elsewhere
//! anonymous memory, locked; the kernel may still move a locked page for an instant, which the hypervisor answers with
//! EFAULT, so calls through such a buffer are worth repeating ([`super::Xen`] does).

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use mover::units::PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags};

/// A buffer for hypercalls; unmapped on drop.
#[derive(Debug)]
pub struct HypercallBuffer {
    address: NonNull<u8>,
    bytes: usize,
    mapped: usize,
}

// SAFETY: the memory belongs to this value alone; the hypervisor writes to it only during calls that borrow it
// mutably. Worth it: a save is set up on one thread and run on another.
unsafe impl Send for HypercallBuffer {}

impl HypercallBuffer {
    /// Zeroed, of `bytes`, from `device` (`/dev/xen/hypercall`) if given.
    ///
    /// # Errors
    /// What `mmap(2)` or `mlock(2)` says.
    pub(super) fn new(device: Option<&File>, bytes: usize) -> io::Result<Self> {
        let mapped = bytes.max(1).next_multiple_of(PAGE_BYTES);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let address = match device {
            // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
            // Worth it: only this device gives pages that stay present.
            Some(device) => unsafe {
                rustix::mm::mmap(std::ptr::null_mut(), mapped, access, MapFlags::SHARED, device, 0)?
            },
            // SAFETY: as above. Worth it: kernels without the device.
            None => unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::LOCKED | MapFlags::POPULATE;
                rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped, access, flags)?
            },
        };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        let mut buffer = Self { address, bytes, mapped };
        if device.is_none() {
            // SAFETY: our own mapping; without this a child made by fork would leave its pages copy-on-write, and the
            // next call would see them move. Worth it: the caller may fork at any time.
            unsafe {
                rustix::mm::madvise(address.as_ptr().cast(), mapped, rustix::mm::Advice::LinuxDontFork)?
            };
        }
        buffer.as_mut_bytes().fill(0);
        Ok(buffer)
    }

    /// Bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }
    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
    /// Its address, for the hypervisor.
    pub(super) fn address(&self) -> u64 {
        mover::units::u64_of(self.address.as_ptr().addr())
    }
    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: mapped, initialised, ours alone; changed only through `&mut self`. Worth it: no copy of bitmaps.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
    /// Its bytes, to be changed.
    #[must_use]
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
    /// Its bytes as 64-bit words; what does not fill a word is left out.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        // SAFETY: page-aligned, initialised, and every bit pattern is a u64. Worth it: bitmaps and frame lists are
        // words, of gigabytes of guest memory.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.bytes / size_of::<u64>()) }
    }
    /// The same, to be changed.
    #[must_use]
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr().cast(), self.bytes / size_of::<u64>()) }
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole, used by nobody after this. Worth it: nothing else gives it back.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap of a mapping of our own: {unmapped:?}");
    }
}
