//! Which records there are, and how long each may be.
#![forbid(unsafe_code)]

use super::error::Fault;
use super::{ferry, frozen, limits};

/// Bit 31 of a record's type: who does not know it may skip it.
pub const OPTIONAL: u32 = 1 << 31;

/// A record type of `libxc-migration-stream`, "Records".
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// 0x00, last.
    End,
    /// 0x01, frames, types and contents.
    PageData,
    /// 0x02, a PV guest's width and page-table levels.
    PvInfo,
    /// 0x03, where a PV guest's P2M is.
    P2mFrames,
    /// 0x04, 0x05, 0x06 and 0x0C, state of a PV guest's virtual CPU.
    Vcpu(VcpuKind),
    /// 0x07, the shared info page.
    SharedInfo,
    /// 0x08, the time-stamp counter.
    TscInfo,
    /// 0x09, what Xen saves of an HVM guest.
    HvmContext,
    /// 0x0A, parameters of an HVM guest.
    HvmParams,
    /// 0x0B, withdrawn before it was used.
    Toolstack,
    /// 0x0D, pages from here on are to be compared.
    Verify,
    /// 0x0E, Remus and COLO.
    Checkpoint,
    /// 0x0F, COLO's back channel.
    CheckpointDirtyPfns,
    /// 0x10, the end of what the guest can't change.
    StaticDataEnd,
    /// 0x11, what CPUID says in the guest.
    CpuidPolicy,
    /// 0x12, what model-specific registers say in the guest.
    MsrPolicy,
    /// 0x50460001, ours: page contents come on the lanes from here on.
    Lanes,
    /// 0x50460002, ours: what has come on them.
    LanesDone,
    /// 0x50460003, ours: on which disks pages are left.
    FrozenDisks,
    /// 0x50460004, ours: where they stand there.
    References,
}

/// Which state of a virtual CPU; each is an opaque blob of one pair of domctls.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum VcpuKind {
    /// `XEN_DOMCTL_{get,set}vcpucontext`.
    Basic,
    /// `XEN_DOMCTL_{get,set}_ext_vcpucontext`.
    Extended,
    /// `XEN_DOMCTL_{get,set}vcpuextstate`.
    Xsave,
    /// `XEN_DOMCTL_{get,set}_vcpu_msrs`: 16 bytes a register.
    Msrs,
}

impl VcpuKind {
    /// All four, in the order savers write them.
    pub const ALL: [Self; 4] = [Self::Basic, Self::Extended, Self::Xsave, Self::Msrs];

    /// Its place in [`Self::ALL`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Basic => 0,
            Self::Extended => 1,
            Self::Xsave => 2,
            Self::Msrs => 3,
        }
    }
}

/// Bytes of `vcpu_guest_context_t` of a 64-bit guest (`public/arch-x86/xen.h`).
pub const VCPU_CONTEXT_64: u32 = 5168;
/// Bytes of `vcpu_guest_context_t` of a 32-bit guest.
pub const VCPU_CONTEXT_32: u32 = 2800;
/// Bytes in front of a virtual CPU's state: its number, and four reserved ones.
pub(crate) const VCPU_HEADER: u32 = 8;
/// Bytes of the shared info page.
pub(crate) const SHARED_INFO_BYTES: u32 = 4096;
/// Bytes of TSC_INFO.
pub(crate) const TSC_INFO_BYTES: u32 = 24;
/// Bytes of `xen_cpuid_leaf_t`.
pub const CPUID_LEAF_BYTES: u32 = 24;
/// Bytes of `xen_msr_entry_t`, of a `xen_domctl_vcpu_msr_t` and of an HVM parameter's index and value.
pub const MSR_ENTRY_BYTES: u32 = 16;

/// Lengths a body may have: `head` bytes, then 0 or `least` to `most` units of `unit` bytes.
struct Shape {
    head: u32,
    unit: u32,
    least: u32,
    most: u32,
    may_be_empty: bool,
}

impl Shape {
    const fn exactly(bytes: u32) -> Self {
        Self { head: bytes, unit: 1, least: 0, most: 0, may_be_empty: true }
    }
    const fn units(head: u32, unit: u32, least: u32, most: u32) -> Self {
        Self { head, unit, least, most, may_be_empty: false }
    }
    /// As the errata of the specification ask: some savers wrote records without content.
    const fn or_empty(self) -> Self {
        Self { may_be_empty: true, ..self }
    }

    fn holds(&self, length: u32) -> bool {
        let Some(rest) = length.checked_sub(self.head) else { return false };
        let count = rest / self.unit;
        rest.is_multiple_of(self.unit)
            && (count >= self.least && count <= self.most || rest == 0 && self.may_be_empty)
    }

    fn words(&self) -> String {
        if self.most == 0 {
            return format!("it has exactly {}", self.head);
        }
        let head = if self.head == 0 { String::new() } else { format!("{} and ", self.head) };
        format!("it has {head}{} to {} times {}", self.least, self.most, self.unit)
    }
}

impl Kind {
    /// Those of the specification, by number.
    pub const ALL: [Self; 19] = [
        Self::End,
        Self::PageData,
        Self::PvInfo,
        Self::P2mFrames,
        Self::Vcpu(VcpuKind::Basic),
        Self::Vcpu(VcpuKind::Extended),
        Self::Vcpu(VcpuKind::Xsave),
        Self::SharedInfo,
        Self::TscInfo,
        Self::HvmContext,
        Self::HvmParams,
        Self::Toolstack,
        Self::Vcpu(VcpuKind::Msrs),
        Self::Verify,
        Self::Checkpoint,
        Self::CheckpointDirtyPfns,
        Self::StaticDataEnd,
        Self::CpuidPolicy,
        Self::MsrPolicy,
    ];

    /// Records of our own, which the specification does not have.
    pub const OURS: [Self; 4] = [Self::Lanes, Self::LanesDone, Self::FrozenDisks, Self::References];

    /// Its place among all of them.
    pub(crate) fn index(self) -> u32 {
        match self {
            Self::Lanes => 19,
            Self::LanesDone => 20,
            Self::FrozenDisks => 21,
            Self::References => 22,
            known => known.number(),
        }
    }

    /// The record with this type.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        if let Some(ours) = Self::OURS.into_iter().find(|kind| kind.number() == number) {
            return Some(ours);
        }
        usize::try_from(number).ok().and_then(|place| Self::ALL.get(place)).copied()
    }

    /// Its type.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::End => 0x00,
            Self::PageData => 0x01,
            Self::PvInfo => 0x02,
            Self::P2mFrames => 0x03,
            Self::Vcpu(VcpuKind::Basic) => 0x04,
            Self::Vcpu(VcpuKind::Extended) => 0x05,
            Self::Vcpu(VcpuKind::Xsave) => 0x06,
            Self::SharedInfo => 0x07,
            Self::TscInfo => 0x08,
            Self::HvmContext => 0x09,
            Self::HvmParams => 0x0a,
            Self::Toolstack => 0x0b,
            Self::Vcpu(VcpuKind::Msrs) => 0x0c,
            Self::Verify => 0x0d,
            Self::Checkpoint => 0x0e,
            Self::CheckpointDirtyPfns => 0x0f,
            Self::StaticDataEnd => 0x10,
            Self::CpuidPolicy => 0x11,
            Self::MsrPolicy => 0x12,
            Self::Lanes => 0x5046_0001,
            Self::LanesDone => 0x5046_0002,
            Self::FrozenDisks => 0x5046_0003,
            Self::References => 0x5046_0004,
        }
    }

    /// The name the specification gives it, or ours.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::End => "END",
            Self::PageData => "PAGE_DATA",
            Self::PvInfo => "X86_PV_INFO",
            Self::P2mFrames => "X86_PV_P2M_FRAMES",
            Self::Vcpu(VcpuKind::Basic) => "X86_PV_VCPU_BASIC",
            Self::Vcpu(VcpuKind::Extended) => "X86_PV_VCPU_EXTENDED",
            Self::Vcpu(VcpuKind::Xsave) => "X86_PV_VCPU_XSAVE",
            Self::Vcpu(VcpuKind::Msrs) => "X86_PV_VCPU_MSRS",
            Self::SharedInfo => "SHARED_INFO",
            Self::TscInfo => "X86_TSC_INFO",
            Self::HvmContext => "HVM_CONTEXT",
            Self::HvmParams => "HVM_PARAMS",
            Self::Toolstack => "TOOLSTACK",
            Self::Verify => "VERIFY",
            Self::Checkpoint => "CHECKPOINT",
            Self::CheckpointDirtyPfns => "CHECKPOINT_DIRTY_PFN_LIST",
            Self::StaticDataEnd => "STATIC_DATA_END",
            Self::CpuidPolicy => "X86_CPUID_POLICY",
            Self::MsrPolicy => "X86_MSR_POLICY",
            Self::Lanes => "LANES",
            Self::LanesDone => "LANES_DONE",
            Self::FrozenDisks => "FROZEN_DISKS",
            Self::References => "REFERENCES",
        }
    }

    /// Holds a `body_length` against what this record may have. PAGE_DATA's own fields say more.
    pub(crate) fn check_length(self, length: u32) -> Result<(), Fault> {
        let shape = match self {
            Self::End | Self::Verify | Self::Checkpoint | Self::StaticDataEnd => Shape::exactly(0),
            Self::PageData => Shape::units(8, 8, 1, (limits::RECORD_BYTES_MAX - 8) / 8),
            Self::PvInfo => Shape::exactly(8),
            Self::P2mFrames => Shape::units(8, 8, 1, limits::P2M_FRAMES_MAX),
            Self::Vcpu(VcpuKind::Basic) => {
                Shape::units(VCPU_HEADER, 8, VCPU_CONTEXT_32 / 8, VCPU_CONTEXT_64 / 8).or_empty()
            }
            Self::Vcpu(VcpuKind::Extended) => Shape::units(VCPU_HEADER, 1, 1, 128).or_empty(),
            Self::Vcpu(VcpuKind::Xsave) => {
                Shape::units(VCPU_HEADER, 1, 16, limits::XSAVE_BYTES_MAX).or_empty()
            }
            Self::Vcpu(VcpuKind::Msrs) => {
                Shape::units(VCPU_HEADER, MSR_ENTRY_BYTES, 1, limits::VCPU_MSRS_MAX).or_empty()
            }
            Self::SharedInfo => Shape::exactly(SHARED_INFO_BYTES),
            Self::TscInfo => Shape::exactly(TSC_INFO_BYTES),
            Self::HvmContext => Shape::units(0, 1, 1, limits::HVM_CONTEXT_BYTES_MAX),
            Self::HvmParams => Shape::units(8, MSR_ENTRY_BYTES, 1, limits::HVM_PARAMS_MAX).or_empty(),
            Self::Toolstack => Shape::units(0, 1, 0, limits::RECORD_BYTES_MAX),
            Self::CheckpointDirtyPfns => Shape::units(0, 8, 0, limits::RECORD_BYTES_MAX / 8),
            Self::CpuidPolicy => Shape::units(0, CPUID_LEAF_BYTES, 1, limits::POLICY_ENTRIES_MAX),
            Self::MsrPolicy => Shape::units(0, MSR_ENTRY_BYTES, 1, limits::POLICY_ENTRIES_MAX),
            Self::Lanes => {
                let most = u32::try_from(limits::RUNS_MAX).unwrap_or(u32::MAX);
                Shape::units(ferry::LANES_HEAD, ferry::RUN_BYTES, 1, most).or_empty()
            }
            Self::LanesDone => Shape::exactly(ferry::LANES_DONE_BYTES),
            Self::FrozenDisks => {
                Shape::units(frozen::FROZEN_HEAD, 1, frozen::DISK_BYTES, limits::FROZEN_DISKS_BYTES_MAX)
            }
            Self::References => {
                Shape::units(frozen::REFERENCES_HEAD, frozen::REFERENCE_BYTES, 1, limits::REFERENCES_READ_MAX)
            }
        };
        if shape.holds(length) {
            return Ok(());
        }
        Err(Fault::Length { record: self.name(), found: u64::from(length), expected: shape.words() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_places_agree() {
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(usize::try_from(kind.number()).unwrap(), place, "{}", kind.name());
            assert_eq!(Kind::from_number(kind.number()), Some(kind));
        }
        for (place, kind) in (19..).zip(Kind::OURS) {
            assert_eq!(kind.index(), place);
            assert_eq!(Kind::from_number(kind.number()), Some(kind));
        }
        assert_eq!(Kind::from_number(0x13), None);
        assert_eq!(Kind::from_number(OPTIONAL), None);
        assert_eq!(Kind::from_number(u32::MAX), None);
    }

    #[test]
    fn lengths_are_held_against_each_record() {
        let good = [
            (Kind::End, 0),
            (Kind::PageData, 16),
            (Kind::PageData, 8 + 1024 * (8 + 4096)),
            (Kind::Vcpu(VcpuKind::Basic), 8),
            (Kind::Vcpu(VcpuKind::Basic), 8 + VCPU_CONTEXT_64),
            (Kind::Vcpu(VcpuKind::Basic), 8 + VCPU_CONTEXT_32),
            (Kind::Vcpu(VcpuKind::Extended), 136),
            (Kind::Vcpu(VcpuKind::Xsave), 24),
            (Kind::Vcpu(VcpuKind::Msrs), 24),
            (Kind::HvmParams, 8),
            (Kind::HvmParams, 8 + 16 * 39),
            (Kind::HvmContext, 1),
            (Kind::CpuidPolicy, 48),
        ];
        for (kind, length) in good {
            assert!(kind.check_length(length).is_ok(), "{} {length}", kind.name());
        }
        let bad = [
            (Kind::End, 1),
            (Kind::PageData, 8),
            (Kind::PageData, 15),
            (Kind::PvInfo, 7),
            (Kind::PvInfo, 9),
            (Kind::P2mFrames, 8),
            (Kind::Vcpu(VcpuKind::Basic), 16),
            (Kind::Vcpu(VcpuKind::Basic), 7),
            (Kind::Vcpu(VcpuKind::Extended), 137),
            (Kind::Vcpu(VcpuKind::Xsave), 23),
            (Kind::Vcpu(VcpuKind::Msrs), 25),
            (Kind::SharedInfo, 4095),
            (Kind::HvmContext, 0),
            (Kind::HvmContext, limits::HVM_CONTEXT_BYTES_MAX + 1),
            (Kind::HvmParams, 7),
            (Kind::CpuidPolicy, 0),
            (Kind::CpuidPolicy, 25),
            (Kind::MsrPolicy, 16 * (limits::POLICY_ENTRIES_MAX + 1)),
        ];
        for (kind, length) in bad {
            assert!(kind.check_length(length).is_err(), "{} {length}", kind.name());
        }
    }
}
