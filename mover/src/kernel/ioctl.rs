//! `ioctl` requests as `asm-generic/ioctl.h` encodes them, and the call itself.
//!
//! Invariant: a request and the struct it carries stand together in a constant of the module that owns the ABI,
//! which checks the encoding at compile time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const READ: u32 = 2;
const WRITE: u32 = 1;

/// `_IOC(direction, kind, number, size)`.
const fn encode(direction: u32, kind: u8, number: u8, bytes: usize) -> u32 {
    assert!(bytes < 1 << 14, "the size field has 14 bits");
    #[expect(clippy::as_conversions, reason = "constant evaluation has no From; checked just above")]
    {
        direction << 30 | (bytes as u32) << 16 | (kind as u32) << 8 | number as u32
    }
}

/// `_IO(kind, number)`: no argument.
pub(super) const fn plain(kind: u8, number: u8) -> u32 {
    encode(0, kind, number, 0)
}

/// `_IOR(kind, number, T)`.
pub(super) const fn reading<T>(kind: u8, number: u8) -> u32 {
    encode(READ, kind, number, size_of::<T>())
}

/// `_IOWR(kind, number, T)`.
pub(super) const fn exchanging<T>(kind: u8, number: u8) -> u32 {
    encode(READ | WRITE, kind, number, size_of::<T>())
}

/// Calls `ioctl(fd, request, argument)`, again when a signal interrupts it; the kernel's non-negative answer.
///
/// # Safety
/// `request` takes a `T`, and what the kernel does with the addresses in it is sound.
pub(super) unsafe fn call<T>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> io::Result<u32> {
    loop {
        // SAFETY: the caller's promise; `argument` is a live T. Worth it: rustix has no types for these requests,
        // and bindgen needs a libclang that fresh machines lack.
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), std::ptr::from_mut(argument)) };
        match u32::try_from(answer) {
            Ok(answer) => return Ok(answer),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
