//! Xen's and privcmd's binary interfaces: structs, devices, buffers, mappings. All `unsafe` of this crate is here.
//!
//! Nothing here links libxenctrl or libxenguest, whose interfaces change with every release. What changes between
//! Xen 4.17 and 4.20 in what is used here is the number a domctl carries, and that is asked for at run time
//! ([`Xen::open`]); the structs are the same in all four.
//!
//! Every struct is declared by `layout::abi`, which checks size and offsets when it is compiled and keeps them in
//! [`LAYOUTS`] besides; a test compiles a C program against the installed headers and compares.
//!
//! Errors are the operating system's, bare: which domain, what for and what to do about it is said in
//! [`crate::domain`].

mod buffer;
mod calls;
mod device;
pub mod domctl;
pub mod entry;
#[cfg(test)]
mod entry_tests;
mod evtchn;
mod gntdev;
mod lane;
mod layout;
#[cfg(test)]
mod layout_tests;
pub mod memory;
pub mod paging;
pub mod process;
pub mod pv;
#[cfg(test)]
mod tests;
mod transfer;
mod window;

pub use buffer::HypercallBuffer;
pub use calls::{PolicySizes, ShadowOp, ShadowStats};
pub use device::Xen;
pub use domctl::{CpuidLeaf, DomainInfo, ExtVcpuContext, MsrEntry, Scheduling, TscInfo, VcpuInfo, VcpuMsr};
pub use evtchn::EventChannels;
pub use gntdev::{Gntdev, GrantWindow};
pub use lane::{Beside, Kept, LaneWindow, Span};
pub use layout::{LAYOUTS, Layout};
pub use memory::MmuextOp;
pub use paging::{PagingEvent, PagingRing};
pub use pv::{GrantEntry, SharedInfo, StartInfo, VcpuContext};
pub use transfer::{Part, PartMut, Stopped, Transfer};
pub use window::{Access, ForeignWindow, MachineToPhys, Resource};

/// A domain's number (`domid_t`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DomainId(pub u16);

impl DomainId {
    /// The hypervisor itself, as the owner of its own tables (`DOMID_XEN` of `xen.h`).
    pub const XEN: Self = Self(0x7FF2);
    /// The first number that names no ordinary domain (`DOMID_FIRST_RESERVED`).
    pub const FIRST_RESERVED: u16 = 0x7FF0;
}

impl std::fmt::Display for DomainId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "domain {}", self.0)
    }
}
