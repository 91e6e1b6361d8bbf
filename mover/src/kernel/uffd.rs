//! userfaultfd(2): being told of, and answering, page faults of a process, and write protection that the kernel
//! lifts by itself (`WP_ASYNC`), which makes a log of written pages (see [`super::pagemap`]).
//!
//! The ABI is `linux/userfaultfd.h` (Linux 6.18), written out by hand: a binding generator needs a libclang that
//! fresh machines lack. Sizes and encodings are checked at compile time here, and against the C header in the tests.
//!
//! Owning thread: any; the kernel serialises. Invariants:
//! - A descriptor belongs to the address space of the process that opened it, wherever it is sent. All calls act on
//!   *that* process; `copy` reads from the caller's own memory.
//! - What is registered stays so until `unregister` or until the last copy of the descriptor is closed, by anyone's
//!   death; then threads waiting in a fault go on as if it had never been registered. Whoever wants them to wait for
//!   a successor keeps a copy.
//! - One address range answers to one userfaultfd at a time (registering with a second is `EBUSY`), but one
//!   descriptor may be registered for [`Watch::MISSING`] first and [`Watch::WRITES`] later, or both at once.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::UserfaultfdFlags;

use super::ioctl::{call, exchanging, plain, reading};
use crate::memory::GuestPage;
use crate::units::{PAGE_BYTES_U64, u64_of};

const UFFD_API: u64 = 0xaa;
const KIND: u8 = 0xaa;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeropageArgument {
    range: Span,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct WriteprotectArgument {
    range: Span,
    mode: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    argument: [u64; 3],
}

const UFFDIO_API: u32 = exchanging::<ApiArgument>(KIND, 0x3f);
const UFFDIO_REGISTER: u32 = exchanging::<RegisterArgument>(KIND, 0x00);
const UFFDIO_UNREGISTER: u32 = reading::<Span>(KIND, 0x01);
const UFFDIO_WAKE: u32 = reading::<Span>(KIND, 0x02);
const UFFDIO_COPY: u32 = exchanging::<CopyArgument>(KIND, 0x03);
const UFFDIO_ZEROPAGE: u32 = exchanging::<ZeropageArgument>(KIND, 0x04);
const UFFDIO_WRITEPROTECT: u32 = exchanging::<WriteprotectArgument>(KIND, 0x06);
const USERFAULTFD_IOC_NEW: u32 = plain(KIND, 0x00);
const WRITEPROTECT_MODE_WP: u64 = 1;
const USER_MODE_ONLY: u32 = 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

const _: () = assert!(size_of::<Message>() == 32);
const _: () = assert!(UFFDIO_API == 0xc018_aa3f && size_of::<ApiArgument>() == 24);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00 && size_of::<RegisterArgument>() == 32);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01 && size_of::<Span>() == 16);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && size_of::<CopyArgument>() == 40);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04 && size_of::<ZeropageArgument>() == 32);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06 && size_of::<WriteprotectArgument>() == 24);
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);

/// A range of addresses of the process a userfaultfd or pagemap belongs to; `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// First address, page-aligned.
    pub start: u64,
    /// Length in bytes, whole pages.
    pub bytes: u64,
}

impl Span {
    /// The first address after it.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start + self.bytes
    }
    /// One page at `address`, which may lie anywhere in it.
    #[must_use]
    pub fn page_of(address: u64) -> Self {
        Self { start: address & !(PAGE_BYTES_U64 - 1), bytes: PAGE_BYTES_U64 }
    }
}

/// What a userfaultfd can be asked for: `UFFD_FEATURE_*` of the header, as one set of bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(pub u64);

impl Features {
    /// Write protection of private memory.
    pub const PAGEFAULT_FLAG_WP: Self = Self(1);
    /// Tell of fork(2), with a descriptor for the child. Whoever asks must read events, or the process hangs.
    pub const EVENT_FORK: Self = Self(1 << 1);
    /// Tell of mremap(2).
    pub const EVENT_REMAP: Self = Self(1 << 2);
    /// Tell of `MADV_REMOVE` and `MADV_DONTNEED`.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Faults on missing pages of hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self(1 << 4);
    /// Faults on missing pages of shared memory (memfd, tmpfs).
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// Tell of munmap(2).
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// A fault is a SIGBUS instead of a message.
    pub const SIGBUS: Self = Self(1 << 7);
    /// Name the faulting thread.
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Give the exact address of a fault, not its page's.
    pub const EXACT_ADDRESS: Self = Self(1 << 11);
    /// Write protection of shared memory and hugetlbfs.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Write protection of pages that are not there yet (Linux 6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel lifts write protection by itself at a write (Linux 6.7): with PAGEMAP_SCAN, a log of writes.
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// What the source of a migration needs: writes to a memfd logged by the kernel itself.
    pub const LOG_WRITES: Self =
        Self::PAGEFAULT_FLAG_WP.and(Self::WP_HUGETLBFS_SHMEM).and(Self::WP_UNPOPULATED).and(Self::WP_ASYNC);
    /// What the target of a lazy migration needs: faults on missing pages of a memfd.
    pub const HOLD_BACK: Self = Self::MISSING_SHMEM;

    /// Both sets.
    #[must_use]
    pub const fn and(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }
    /// Whether all of `asked` are in it.
    #[must_use]
    pub const fn has(self, asked: Self) -> bool {
        self.0 & asked.0 == asked.0
    }
}

/// What to watch a range for: `UFFDIO_REGISTER_MODE_*`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(u64);

impl Watch {
    /// Accesses to pages that are not there.
    pub const MISSING: Self = Self(1);
    /// Writes to protected pages.
    pub const WRITES: Self = Self(1 << 1);
    /// Both.
    #[must_use]
    pub const fn and(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }
}

/// How a userfaultfd was got, which decides what it sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Faults of user code, and of the kernel on its behalf (a read(2) into a missing page waits).
    Everything,
    /// Faults of user code only: a system call on a missing page fails with EFAULT. Enough to log writes, not to
    /// hold pages back.
    UserOnly,
}

/// A fault or another event.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at `address`.
    Fault {
        /// Where; the page's own address unless `EXACT_ADDRESS` was asked for.
        address: u64,
        /// Whether it writes.
        write: bool,
        /// Whether the page is there, and write-protected.
        protected: bool,
        /// The thread, 0 unless `THREAD_ID` was asked for.
        thread: u32,
    },
    /// The process has forked; the child's own userfaultfd.
    Fork(OwnedFd),
    /// A range has moved.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Pages were given back to the kernel.
    Remove(Span),
    /// A range is gone.
    Unmap(Span),
}

/// A userfaultfd after its handshake.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Messages read in one system call.
    pub const BATCH: usize = 64;

    /// One fresh from [`open`], here or in the process it belongs to, with `features` from now on.
    ///
    /// # Errors
    /// `Unsupported` if this kernel lacks one of `features`, or the descriptor is not fresh; otherwise what the
    /// kernel answers.
    pub fn new(fd: OwnedFd, features: Features) -> io::Result<Self> {
        handshake(fd.as_fd(), features)?;
        Ok(Self { fd })
    }

    /// One that has its features: a copy of one that another engine has used.
    #[must_use]
    pub fn used(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The features this kernel has.
    ///
    /// # Errors
    /// `Unsupported` without userfaultfd; otherwise what the kernel answers.
    pub fn offered() -> io::Result<Features> {
        handshake(open()?.0.as_fd(), Features::default())
    }

    /// Watches `span`, or changes what it is watched for.
    ///
    /// # Errors
    /// `EBUSY` where another userfaultfd watches, `EINVAL` where nothing is mapped or it can't be watched so,
    /// `ENOMEM` also where the process is gone.
    pub fn register(&self, span: Span, watch: Watch) -> io::Result<()> {
        let mut argument = RegisterArgument { range: span, mode: watch.0, ioctls: 0 };
        // SAFETY: the argument is the request's; registering changes what faults do, never what memory holds.
        unsafe { call(self.fd.as_fd(), UFFDIO_REGISTER, &mut argument) }.map(drop)
    }

    /// Ends all watching of `span`, lifts its write protection and wakes who waits in it.
    ///
    /// # Errors
    /// `ENOMEM` where the process is gone, `EINVAL` where nothing is mapped.
    pub fn unregister(&self, span: Span) -> io::Result<()> {
        self.with_span(UFFDIO_UNREGISTER, span)
    }

    /// Wakes who waits in `span`; each tries its access again.
    ///
    /// # Errors
    /// What the kernel answers; it has no reason to refuse.
    pub fn wake(&self, span: Span) -> io::Result<()> {
        self.with_span(UFFDIO_WAKE, span)
    }

    fn with_span(&self, request: u32, mut span: Span) -> io::Result<()> {
        // SAFETY: both requests take a uffdio_range and neither touches memory.
        unsafe { call(self.fd.as_fd(), request, &mut span) }.map(drop)
    }

    /// Write-protects all pages of `span`, those not there included.
    ///
    /// # Errors
    /// `ENOENT` where `span` is not watched for writes, `EAGAIN` while the process changes its mappings, `ESRCH`
    /// where it is gone.
    pub fn protect(&self, span: Span) -> io::Result<()> {
        let mut argument = WriteprotectArgument { range: span, mode: WRITEPROTECT_MODE_WP };
        // SAFETY: the argument is the request's; protecting never changes what memory holds.
        unsafe { call(self.fd.as_fd(), UFFDIO_WRITEPROTECT, &mut argument) }.map(drop)
    }

    /// Whether the process this belongs to still has its memory: after its death every scan finds nothing, without
    /// an error.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // A page that nobody watches (the last that x86-64 and arm64 have; at most a stack is there): ENOENT where
        // there is an address space to look in, ESRCH where there is none.
        let nowhere = Span { start: (1 << 47) - 2 * PAGE_BYTES_U64, bytes: PAGE_BYTES_U64 };
        let mut argument = WriteprotectArgument { range: nowhere, mode: 0 };
        // SAFETY: as in `protect`; mode 0 could only lift a protection.
        let answer = unsafe { call(self.fd.as_fd(), UFFDIO_WRITEPROTECT, &mut argument) };
        answer.err().is_none_or(|e| e.raw_os_error() != Some(libc::ESRCH))
    }

    /// Puts a page where none is, atomically, with the bytes of `source`, a page mapped in *this* process, and wakes
    /// who waits.
    ///
    /// # Errors
    /// `EEXIST` where there is a page already (nothing is changed, nobody woken), `ENOENT` where `to` is not watched,
    /// `ESRCH` where the process is gone, `ENOSPC`/`ENOMEM` without memory.
    pub fn copy_page(&self, to: u64, source: GuestPage<'_>) -> io::Result<()> {
        loop {
            let src = u64_of(source.address().as_ptr().addr());
            let mut argument = CopyArgument { dst: to, src, len: PAGE_BYTES_U64, mode: 0, copy: 0 };
            // SAFETY: `source` is mapped as long as it lives; the destination belongs to whoever made the descriptor
            // and takes a page only where it has none. Worth it: this is the one atomic way to fill a page.
            match unsafe { call(self.fd.as_fd(), UFFDIO_COPY, &mut argument) } {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                other => return other.map(drop),
            }
        }
    }

    /// Puts a zero page where none is, and wakes who waits.
    ///
    /// # Errors
    /// As [`Self::copy_page`].
    pub fn zero_page(&self, to: u64) -> io::Result<()> {
        loop {
            let range = Span { start: to, bytes: PAGE_BYTES_U64 };
            let mut argument = ZeropageArgument { range, mode: 0, zeropage: 0 };
            // SAFETY: the argument is the request's; the destination takes a page only where it has none.
            match unsafe { call(self.fd.as_fd(), UFFDIO_ZEROPAGE, &mut argument) } {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                other => return other.map(drop),
            }
        }
    }

    /// Appends to `events` what has happened, at most [`Self::BATCH`] of it; waits at most `timeout` for the first.
    ///
    /// # Errors
    /// What poll(2) or read(2) answer; `InvalidData` for an event this module does not know.
    pub fn events(&self, timeout: Duration, events: &mut Vec<Event>) -> io::Result<()> {
        let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let mut wait = [PollFd::new(&self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut wait, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let mut messages = [Message::default(); Self::BATCH];
        // SAFETY: the buffer is BATCH messages long, of plain integers for which any bytes will do. Worth it: one
        // system call for all waiting threads.
        let got =
            unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                // Another reader, or the thread that waited was killed.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        };
        for message in &messages[..got / size_of::<Message>()] {
            events.push(decode(message)?);
        }
        Ok(())
    }

    /// The descriptor, to hand to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn decode(message: &Message) -> io::Result<Event> {
    let [a, b, c] = message.argument;
    Ok(match message.event {
        EVENT_PAGEFAULT => Event::Fault {
            write: a & PAGEFAULT_FLAG_WRITE != 0,
            protected: a & PAGEFAULT_FLAG_WP != 0,
            address: b,
            thread: u32::try_from(c & u64::from(u32::MAX)).unwrap_or(0),
        },
        EVENT_FORK => {
            let fd = i32::try_from(a & u64::from(u32::MAX)).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "a fork event without a descriptor")
            })?;
            // SAFETY: the kernel has just made this descriptor for us, with the message. Worth it: dropped, it
            // would leak.
            Event::Fork(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        EVENT_REMAP => Event::Remap { from: a, to: b, bytes: c },
        EVENT_REMOVE => Event::Remove(Span { start: a, bytes: b - a }),
        EVENT_UNMAP => Event::Unmap(Span { start: a, bytes: b - a }),
        other => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("userfaultfd told of an event {other:#x} that Linux 6.18 does not have"),
            ));
        }
    })
}

/// A userfaultfd of this process, its features not chosen yet: by the system call, by `/dev/userfaultfd` where the
/// system call is privileged, or for faults of user code only, which everyone may.
///
/// # Errors
/// `Unsupported` if this kernel lacks userfaultfd; otherwise what it answers to the last of these ways.
pub fn open() -> io::Result<(OwnedFd, Reach)> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: nothing is registered yet; what registering does is each call's business.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => return Ok((fd, Reach::Everything)),
        Err(rustix::io::Errno::NOSYS) => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no userfaultfd"));
        }
        Err(_) => {}
    }
    if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        let arguments = libc::c_ulong::from(flags.bits());
        // SAFETY: USERFAULTFD_IOC_NEW takes the flags as its argument's value and touches no memory. Worth it: the
        // device is how an administrator grants this to a group without root.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW.into(), arguments) };
        if fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Reach::Everything));
        }
    }
    // SAFETY: as above.
    let fd = unsafe { rustix::mm::userfaultfd(flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY)) }?;
    Ok((fd, Reach::UserOnly))
}

/// Asks for `features`; what the kernel has.
fn handshake(fd: BorrowedFd<'_>, features: Features) -> io::Result<Features> {
    let mut argument = ApiArgument { api: UFFD_API, features: features.0, ioctls: 0 };
    // SAFETY: the argument is the request's.
    match unsafe { call(fd, UFFDIO_API, &mut argument) } {
        Ok(_) => Ok(Features(argument.features)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("this kernel's userfaultfd lacks one of the features {:#x}", features.0),
        )),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "uffd_tests.rs"]
pub(crate) mod tests;
