//! What a guest is besides its memory, as the two ends hand it to each other.
#![forbid(unsafe_code)]

use crate::abi::DomainId;
use crate::stream::{HvmParam, PvWidth, TscInfo, VcpuState};

/// What a guest can't change while it runs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StaticState {
    /// CPUID leaves, 24 bytes each ([`crate::abi::CpuidLeaf`]); none if the stream had none.
    pub cpuid: Vec<u8>,
    /// Model-specific registers, 16 bytes each ([`crate::abi::MsrEntry`]); none if the stream had none.
    pub msrs: Vec<u8>,
    /// Of a PV guest, the size of its words.
    pub pv: Option<PvWidth>,
}

impl StaticState {
    /// What the toolstack has to make up: bit 0 CPUID, bit 1 MSRs (`XGR_SDD_MISSING_*` of `xenguest.h`).
    #[must_use]
    pub fn missing(&self) -> u32 {
        u32::from(self.cpuid.is_empty()) | u32::from(self.msrs.is_empty()) << 1
    }
}

/// What a stopped guest is besides its memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FinalState {
    /// Its time stamp counter.
    pub tsc: TscInfo,
    /// The rest.
    pub kind: KindState,
}

/// The part that depends on the kind of guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KindState {
    /// HVM and PVH.
    Hvm {
        /// Virtual CPUs and emulated devices, as the hypervisor gave it.
        context: Vec<u8>,
        /// Parameters that are not zero.
        params: Vec<HvmParam>,
    },
    /// PV.
    Pv {
        /// The page shared with the hypervisor.
        shared_info: Box<[u8; 4096]>,
        /// What there is of each virtual CPU.
        vcpus: Vec<VcpuState>,
    },
}

/// What ties a restored domain to its toolstack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wiring {
    /// The guest's event channel to xenstore.
    pub store_port: u32,
    /// Where xenstore runs.
    pub store_domain: DomainId,
    /// Its event channel to the console.
    pub console_port: u32,
    /// Where the console runs.
    pub console_domain: DomainId,
}

/// Frames the toolstack wants to know of a restored domain: guest frames of HVM, machine frames of PV guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Frames {
    /// The page shared with xenstore.
    pub store: u64,
    /// The page shared with the console.
    pub console: u64,
}
