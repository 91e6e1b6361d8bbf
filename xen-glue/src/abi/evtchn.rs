//! `/dev/xen/evtchn`: event channels, the hypervisor's interrupts between domains.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use super::DomainId;
use super::device::{ioctl, request};
use super::memory::{EvtchnBindInterdomain, EvtchnPort};

const BIND_INTERDOMAIN: u64 = request(b'E', 1, size_of::<EvtchnBindInterdomain>());
const UNBIND: u64 = request(b'E', 3, size_of::<EvtchnPort>());
const NOTIFY: u64 = request(b'E', 4, size_of::<EvtchnPort>());

/// Ports of this process; unbound on drop.
#[derive(Debug)]
pub struct EventChannels {
    device: File,
}

/// Errors of all of these are what the kernel says.
#[expect(clippy::missing_errors_doc, reason = "said once, above: they all return what the kernel says")]
impl EventChannels {
    /// Opens the device.
    pub fn open() -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/xen/evtchn")?;
        Ok(Self { device })
    }
    /// Binds a new port to `remote` of `domain`; the port.
    pub fn bind(&self, domain: DomainId, remote: u32) -> io::Result<u32> {
        let mut argument = EvtchnBindInterdomain { domain: domain.0.into(), port: remote };
        // SAFETY: the request takes this struct, without addresses. Worth it: no crate has these requests.
        let port = unsafe { ioctl(self.device.as_fd(), BIND_INTERDOMAIN, &mut argument)? };
        u32::try_from(port).map_err(io::Error::other)
    }
    /// Gives a port back.
    pub fn unbind(&self, port: u32) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { ioctl(self.device.as_fd(), UNBIND, &mut EvtchnPort { port }) }.map(drop)
    }
    /// Rings the other side.
    pub fn notify(&self, port: u32) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { ioctl(self.device.as_fd(), NOTIFY, &mut EvtchnPort { port }) }.map(drop)
    }
    /// The next port that was rung, waiting for it; it rings again only after [`Self::unmask`].
    pub fn pending(&self) -> io::Result<u32> {
        let mut port = [0; 4];
        (&self.device).read_exact(&mut port)?;
        Ok(u32::from_ne_bytes(port))
    }
    /// Lets a port ring again.
    pub fn unmask(&self, port: u32) -> io::Result<()> {
        (&self.device).write_all(&port.to_ne_bytes())
    }
    /// For waiting with others; readable when a port was rung.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}
