//! `/dev/xen/privcmd`: hypercalls, and the number domctls carry.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use mover::units::u64_of;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::domctl::{Domctl, INTERFACE_VERSIONS, command};
use super::memory::{self, hypercall};
use super::{DomainId, DomainInfo, HypercallBuffer};

/// `_IOC(_IOC_NONE, kind, number, bytes)` of `asm-generic/ioctl.h`: Xen's devices say no direction.
pub(super) const fn request(kind: u8, number: u8, bytes: usize) -> u64 {
    assert!(bytes < 1 << 14, "the size field has 14 bits");
    u64_of(bytes) << 16 | widen(kind) << 8 | widen(number)
}

const fn widen(byte: u8) -> u64 {
    #[expect(clippy::as_conversions, reason = "constant evaluation has no From")]
    {
        byte as u64
    }
}

const HYPERCALL: u64 = request(b'P', 0, size_of::<memory::PrivcmdHypercall>());
const _: () = assert!(HYPERCALL == 0x30_5000);

/// How often a call is repeated that failed with EFAULT on locked memory, which may be moving at that instant.
const FAULTS_MAX: u32 = 16;

/// Calls `ioctl(fd, request, argument)`, again when a signal interrupts it; the kernel's non-negative answer, which
/// libc's wrapper would cut to 32 bits.
///
/// # Safety
/// `request` takes a `T`, and what the kernel or the hypervisor does with the addresses in it is sound.
pub(super) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<u64> {
    loop {
        // SAFETY: the caller's promise; `argument` is a live T. Worth it: no crate has types for these requests.
        let answer =
            unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        match u64::try_from(answer) {
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

/// The hypervisor, as the control domain may talk to it. One thread at a time uses it; others open their own.
#[derive(Debug)]
pub struct Xen {
    privcmd: File,
    /// `/dev/xen/hypercall`, where the kernel has it.
    buffers: Option<File>,
    /// Where every call's argument stands.
    argument: HypercallBuffer,
    version: u32,
}

impl Xen {
    /// Opens the devices and finds out which interface this hypervisor speaks.
    ///
    /// # Errors
    /// What opening `/dev/xen/privcmd` says (`NotFound` where there is no Xen), what `mmap(2)` says, and
    /// `Unsupported` where the hypervisor takes none of the interface versions this program knows.
    pub fn open() -> io::Result<Self> {
        let privcmd = OpenOptions::new().read(true).write(true).open("/dev/xen/privcmd")?;
        let buffers = OpenOptions::new().read(true).write(true).open("/dev/xen/hypercall").ok();
        let argument = HypercallBuffer::new(buffers.as_ref(), 4096)?;
        let mut xen = Self { privcmd, buffers, argument, version: 0 };
        for version in INTERFACE_VERSIONS {
            xen.version = version;
            match xen.domain_info(DomainId(0)) {
                // Both "another version" and "not for you".
                Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(xen),
            }
        }
        let (low, high) = (INTERFACE_VERSIONS[0], INTERFACE_VERSIONS[INTERFACE_VERSIONS.len() - 1]);
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "the hypervisor takes no domctl of interface versions {low:#x} to {high:#x} (Xen 4.17 to 4.20 and \
                 one later) from this domain"
            ),
        ))
    }

    /// The domctl interface version this hypervisor takes: 0x15 for 4.17, 0x16 for 4.18, 0x17 for 4.19 and 4.20.
    #[must_use]
    pub fn interface_version(&self) -> u32 {
        self.version
    }

    /// A buffer that calls can be pointed at.
    ///
    /// # Errors
    /// What `mmap(2)` or `mlock(2)` says.
    pub fn buffer(&self, bytes: usize) -> io::Result<HypercallBuffer> {
        HypercallBuffer::new(self.buffers.as_ref(), bytes)
    }

    pub(super) fn privcmd(&self) -> &File {
        &self.privcmd
    }

    /// The hypervisor's release, as major and minor number.
    ///
    /// # Errors
    /// What the hypervisor says.
    pub fn release(&mut self) -> io::Result<(u32, u32)> {
        // SAFETY: XENVER_version (0) takes no argument. Worth it: the stream's header carries it.
        let version = unsafe { self.call(hypercall::XEN_VERSION, [0; 5])? };
        Ok((half(version >> 16), half(version)))
    }

    /// A hypercall as it is.
    ///
    /// # Safety
    /// The arguments are what the call takes; buffers they name are live, long enough, and mutably borrowed or owned
    /// where the hypervisor writes.
    pub(super) unsafe fn call(&mut self, op: u64, arguments: [u64; 5]) -> io::Result<u64> {
        let mut faults = 0;
        loop {
            let mut call = memory::PrivcmdHypercall { op, arguments };
            // SAFETY: the request takes this struct; the caller's promise for the rest.
            // Worth it: this is how a program talks to the hypervisor.
            match unsafe { ioctl(self.privcmd.as_fd(), HYPERCALL, &mut call) } {
                Err(error)
                    if self.buffers.is_none()
                        && error.raw_os_error() == Some(libc::EFAULT)
                        && faults < FAULTS_MAX =>
                {
                    faults += 1;
                }
                answer => return answer,
            }
        }
    }

    /// A hypercall whose last argument is the address of a `T`; the T as it is afterwards.
    ///
    /// # Safety
    /// As [`Self::call`], for `before` and for buffers that `argument` names.
    pub(super) unsafe fn call_with<T>(
        &mut self,
        op: u64,
        before: Option<u64>,
        argument: &T,
    ) -> io::Result<(u64, T)>
    where
        T: IntoBytes + FromBytes + Immutable + Default,
    {
        // SAFETY: the caller's promise.
        unsafe { self.call_with_more(op, before, argument, 0) }
    }

    /// The same for calls that take `count` of them behind the address.
    ///
    /// # Safety
    /// As [`Self::call_with`]; there is one.
    pub(super) unsafe fn call_counted<T>(
        &mut self,
        op: u64,
        before: u64,
        argument: &T,
        count: u64,
    ) -> io::Result<(u64, T)>
    where
        T: IntoBytes + FromBytes + Immutable + Default,
    {
        // SAFETY: the caller's promise. Worth it: see `call_with`.
        unsafe { self.call_with_more(op, Some(before), argument, count) }
    }

    /// # Safety
    /// As [`Self::call_with`], for `last` too.
    unsafe fn call_with_more<T>(
        &mut self,
        op: u64,
        before: Option<u64>,
        argument: &T,
        last: u64,
    ) -> io::Result<(u64, T)>
    where
        T: IntoBytes + FromBytes + Immutable + Default,
    {
        let bytes = argument.as_bytes();
        self.argument.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
        let address = self.argument.address();
        let arguments = match before {
            Some(before) => [before, address, last, 0, 0],
            None => [address, 0, 0, 0, 0],
        };
        // SAFETY: the caller's promise; the argument's own buffer is ours and longer than any of these structs.
        let answer = unsafe { self.call(op, arguments)? };
        let after = T::read_from_prefix(self.argument.as_bytes()).map_or_else(|_| T::default(), |(t, _)| t);
        Ok((answer, after))
    }

    /// Domctl `command` for `domain`; its argument as the hypervisor left it.
    ///
    /// # Safety
    /// `A` is what the sub-command takes, and buffers it names are as [`Self::call`] wants them.
    pub(super) unsafe fn domctl<A>(
        &mut self,
        command: u32,
        domain: DomainId,
        argument: &A,
    ) -> io::Result<(u64, A)>
    where
        A: IntoBytes + FromBytes + Immutable + Default,
    {
        let mut domctl = Domctl::new(command, domain, argument);
        domctl.version = self.version;
        // SAFETY: the caller's promise. Worth it: one place puts the version in.
        let (answer, after) = unsafe { self.call_with(hypercall::DOMCTL, None, &domctl)? };
        Ok((answer, after.argument()))
    }

    /// What the hypervisor knows of `domain`.
    ///
    /// # Errors
    /// `NotFound` if there is none; else what the hypervisor says.
    pub fn domain_info(&mut self, domain: DomainId) -> io::Result<DomainInfo> {
        // SAFETY: the argument holds no addresses. Worth it: see `call`.
        let (_, info) = unsafe { self.domctl(command::GET_DOMAIN_INFO, domain, &DomainInfo::default())? };
        if info.domain != domain.0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no {domain}")));
        }
        Ok(info)
    }
}

fn half(number: u64) -> u32 {
    u32::try_from(number & 0xffff).unwrap_or(0)
}
