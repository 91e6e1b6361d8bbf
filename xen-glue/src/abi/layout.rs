//! Structs that say their own layout: checked when compiled, compared with the C headers by a test.
#![forbid(unsafe_code)]

/// What a struct of ours claims of one of Xen's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The C type, as an expression for `sizeof`.
    pub c_type: &'static str,
    /// Its size in bytes.
    pub bytes: usize,
    /// C members and their offsets in bytes.
    pub members: &'static [(&'static str, usize)],
}

/// Declares a struct that mirrors a C one: `struct Name = "c type", bytes { field: type = "member" @ offset }`. A
/// member of `""` is padding. All bytes are named, so that none leaks to the hypervisor or is left to chance.
macro_rules! abi {
    ($(#[$meta:meta])* $name:ident = $c:literal, $bytes:literal {
        $($(#[$fmeta:meta])* $field:ident: $ty:ty = $member:literal @ $at:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $ty,)*
        }
        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            $(assert!(std::mem::offset_of!($name, $field) == $at);)*
        };
        impl $name {
            /// What this struct claims of the C one.
            pub(crate) const LAYOUT: $crate::abi::Layout = $crate::abi::Layout {
                c_type: $c,
                bytes: $bytes,
                members: &[$(($member, $at)),*],
            };
        }
        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}
pub(super) use abi;

/// Declares offsets into a C struct too long to mirror: `Name = "c type", bytes { CONSTANT = "member" @ offset }`.
macro_rules! offsets {
    ($(#[$meta:meta])* $name:ident = $c:literal, $bytes:literal {
        $($(#[$fmeta:meta])* $field:ident = $member:literal @ $at:literal,)*
    }) => {
        $(#[$meta])*
        pub struct $name;
        impl $name {
            /// Bytes of the whole.
            pub const BYTES: usize = $bytes;
            $($(#[$fmeta])* pub const $field: usize = $at;)*
            /// What these offsets claim of the C struct.
            pub(crate) const LAYOUT: $crate::abi::Layout = $crate::abi::Layout {
                c_type: $c,
                bytes: $bytes,
                members: &[$(($member, $at)),*],
            };
        }
    };
}
pub(super) use offsets;

use super::{domctl, entry, memory, paging, pv};

/// Every layout claimed in this module.
pub const LAYOUTS: &[Layout] = &[
    domctl::Domctl::LAYOUT,
    domctl::DomainInfo::LAYOUT,
    domctl::PageFrameInfo::LAYOUT,
    domctl::ShadowControl::LAYOUT,
    domctl::VcpuContextArg::LAYOUT,
    domctl::VcpuInfo::LAYOUT,
    domctl::Scheduling::LAYOUT,
    domctl::HvmContextArg::LAYOUT,
    domctl::AddressSize::LAYOUT,
    domctl::ExtVcpuContext::LAYOUT,
    domctl::CpuPolicyArg::LAYOUT,
    domctl::CpuidLeaf::LAYOUT,
    domctl::MsrEntry::LAYOUT,
    domctl::TscInfo::LAYOUT,
    domctl::ExtState::LAYOUT,
    domctl::VcpuMsrs::LAYOUT,
    domctl::VcpuMsr::LAYOUT,
    memory::Reservation::LAYOUT,
    memory::MachphysList::LAYOUT,
    memory::HvmParam::LAYOUT,
    memory::MmuextOp::LAYOUT,
    memory::PrivcmdHypercall::LAYOUT,
    memory::PrivcmdMmapBatch::LAYOUT,
    memory::PrivcmdMmapResource::LAYOUT,
    memory::EvtchnBindInterdomain::LAYOUT,
    memory::EvtchnPort::LAYOUT,
    memory::GntdevGrantRef::LAYOUT,
    memory::GntdevMapGrantRef::LAYOUT,
    memory::GntdevUnmapGrantRef::LAYOUT,
    paging::VmEventOp::LAYOUT,
    paging::PagingOp::LAYOUT,
    paging::PagingEvent::LAYOUT,
    pv::GrantEntry::LAYOUT,
    pv::GrantTableSize::LAYOUT,
    pv::GrantTableVersion::LAYOUT,
    pv::VcpuContext::LAYOUT,
    pv::SharedInfo::LAYOUT,
    pv::StartInfo::LAYOUT,
    entry::STATS,
    entry::SAVE,
    entry::RESTORE,
];
