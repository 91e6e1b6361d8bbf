//! The libxc migration stream, version 3 written, 2 and 3 read, and as much of libxl's and xl's framing around it as
//! our own tools need.
//!
//! ```text
//!   xl file:  magic, flags, configuration | libxl stream
//!   libxl:    header | LIBXC_CONTEXT | libxc stream | EMULATOR_* | END
//!   libxc:    image header | domain header | records | END
//!   record:   type, length | body | zeroes to a multiple of 8
//! ```
//!
//! Sources: `docs/specs/libxc-migration-stream.pandoc`, `libxl-migration-stream.pandoc` and `tools/xl/xl.h` of Xen.
//! Nothing a stream says is believed before it has been held against [`limits`] and the rules of order; every fault
//! names its byte.
#![forbid(unsafe_code)]

mod body;
mod error;
mod ferry;
mod fields;
mod frozen;
mod header;
mod input;
mod judge;
mod kind;
mod libxl;
pub mod limits;
mod order;
mod page;
mod reader;
pub mod scan;
#[cfg(test)]
pub(crate) mod tests;
mod writer;
mod xl;

pub use body::{HvmParam, P2mFrames, PvWidth, TscInfo, VcpuState};
pub use error::{Fault, StreamError};
pub use ferry::{Lanes, LanesDone, OFFER, Offer};
pub use frozen::{FrozenDisks, REFERENCE_BYTES, Reference};
pub use header::{DOMAIN_HEADER_BYTES, DomainHeader, GuestType, IMAGE_HEADER_BYTES};
pub use kind::{
    CPUID_LEAF_BYTES, Kind, MSR_ENTRY_BYTES, OPTIONAL, VCPU_CONTEXT_32, VCPU_CONTEXT_64, VcpuKind,
};
pub use libxl::{Emulator, LIBXL_HEADER_BYTES, LibxlReader, LibxlRecord, libxl_header};
pub use page::{PageEntry, PageType};
pub use reader::{Reader, Record};
pub use writer::Writer;
pub use xl::XlHeader;
