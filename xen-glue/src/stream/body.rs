//! What stands in records that are neither markers nor page contents.
#![forbid(unsafe_code)]

use mover::units::{PAGE_BYTES_U64, u64_of, usize_of};

use super::error::Fault;
use super::fields::{u32_at, u64_at};
use super::kind::{self, Kind, VcpuKind};
use super::limits;

/// X86_PV_INFO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PvWidth {
    /// 4-byte words, 3 levels of page tables.
    Bits32,
    /// 8-byte words, 4 levels of page tables.
    Bits64,
}

impl PvWidth {
    /// Bytes of a word, and of a P2M entry.
    #[must_use]
    pub fn bytes(self) -> u8 {
        match self {
            Self::Bits32 => 4,
            Self::Bits64 => 8,
        }
    }
    /// Levels of page tables.
    #[must_use]
    pub fn levels(self) -> u8 {
        match self {
            Self::Bits32 => 3,
            Self::Bits64 => 4,
        }
    }
    /// P2M entries in a frame.
    #[must_use]
    pub fn entries_per_frame(self) -> u32 {
        match self {
            Self::Bits32 => 1024,
            Self::Bits64 => 512,
        }
    }
    /// Bytes of `vcpu_guest_context_t`.
    #[must_use]
    pub fn vcpu_context_bytes(self) -> u32 {
        match self {
            Self::Bits32 => kind::VCPU_CONTEXT_32,
            Self::Bits64 => kind::VCPU_CONTEXT_64,
        }
    }

    pub(crate) fn encode(self) -> [u8; 8] {
        [self.bytes(), self.levels(), 0, 0, 0, 0, 0, 0]
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, BodyFault> {
        let width = match (body[0], body[1]) {
            (4, 3) => Self::Bits32,
            (8, 4) => Self::Bits64,
            (width, levels) => {
                return Err((
                    0,
                    Fault::Field {
                        field: "X86_PV_INFO's width and levels, a byte each",
                        found: u64::from(width) << 8 | u64::from(levels),
                        expected: "0x403 or 0x804",
                    },
                ));
            }
        };
        reserved("X86_PV_INFO", 2, u64_at(body, 0) >> 16)?;
        Ok(width)
    }
}

/// X86_PV_P2M_FRAMES: which frames hold the P2M entries of pfns `start` to `end`, both included.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct P2mFrames {
    /// First pfn.
    pub start: u32,
    /// Last pfn.
    pub end: u32,
    /// A frame number for each frame from that of `start` to that of `end`.
    pub frames: Vec<u64>,
}

impl P2mFrames {
    /// How many frames pfns `start` to `end` take; none if they are the wrong way round.
    fn expected(start: u32, end: u32, width: PvWidth) -> Option<u32> {
        let per_frame = width.entries_per_frame();
        (end >= start).then(|| end / per_frame - start / per_frame + 1)
    }

    pub(crate) fn check(&self, width: PvWidth) -> Result<(), BodyFault> {
        let Some(expected) = Self::expected(self.start, self.end, width) else {
            return Err((
                4,
                Fault::Field {
                    field: "X86_PV_P2M_FRAMES's last pfn",
                    found: u64::from(self.end),
                    expected: "one not under the first",
                },
            ));
        };
        if u64_of(self.frames.len()) != u64::from(expected) {
            return Err((
                8,
                Fault::Length {
                    record: Kind::P2mFrames.name(),
                    found: 8 + 8 * u64_of(self.frames.len()),
                    expected: format!(
                        "pfns {:#x} to {:#x} take {expected} frames, thus {} bytes",
                        self.start,
                        self.end,
                        8 + 8 * u64::from(expected)
                    ),
                },
            ));
        }
        for (place, &frame) in self.frames.iter().enumerate() {
            if frame >= limits::PFN_END {
                let what = "a frame number in X86_PV_P2M_FRAMES";
                let fault = Fault::Limit { what, found: frame, limit: limits::PFN_END - 1 };
                return Err((8 + 8 * u64_of(place), fault));
            }
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + 8 * self.frames.len());
        out.extend(self.start.to_le_bytes());
        out.extend(self.end.to_le_bytes());
        self.frames.iter().for_each(|frame| out.extend(frame.to_le_bytes()));
        out
    }

    pub(crate) fn decode(body: &[u8], width: PvWidth) -> Result<Self, BodyFault> {
        let frames = body[8..].chunks_exact(8).map(|frame| u64_at(frame, 0)).collect();
        let found = Self { start: u32_at(body, 0), end: u32_at(body, 4), frames };
        found.check(width).map(|()| found)
    }
}

/// A virtual CPU's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VcpuState {
    /// Which state.
    pub kind: VcpuKind,
    /// The virtual CPU.
    pub vcpu: u32,
    /// The blob, as the domctl gave it; empty where an old saver wrote none, which is to be passed over.
    pub context: Vec<u8>,
}

impl VcpuState {
    pub(crate) fn check(
        kind: VcpuKind,
        vcpu: u32,
        context_bytes: u64,
        width: PvWidth,
    ) -> Result<(), BodyFault> {
        if vcpu >= limits::VCPU_END {
            let limit = u64::from(limits::VCPU_END - 1);
            return Err((0, Fault::Limit { what: "a virtual CPU's number", found: u64::from(vcpu), limit }));
        }
        let basic = u64::from(width.vcpu_context_bytes());
        if kind == VcpuKind::Basic && context_bytes != 0 && context_bytes != basic {
            return Err((
                8,
                Fault::Length {
                    record: Kind::Vcpu(kind).name(),
                    found: 8 + context_bytes,
                    expected: format!("in a guest of this width it has {}", 8 + basic),
                },
            ));
        }
        Ok(())
    }

    pub(crate) fn decode(kind: VcpuKind, body: &[u8], width: PvWidth) -> Result<Self, BodyFault> {
        let (head, context) = body.split_at(usize_of(u64::from(kind::VCPU_HEADER)));
        let vcpu = u32_at(head, 0);
        Self::check(kind, vcpu, u64_of(context.len()), width)?;
        reserved(Kind::Vcpu(kind).name(), 4, u64::from(u32_at(head, 4)))?;
        Ok(Self { kind, vcpu, context: context.to_vec() })
    }
}

/// X86_TSC_INFO, as `XEN_DOMCTL_{get,set}tscinfo` has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TscInfo {
    /// `TSC_MODE_*`.
    pub mode: u32,
    /// The counter's frequency, in kHz.
    pub khz: u32,
    /// Time the guest has seen pass, in nanoseconds.
    pub nsec: u64,
    /// How often the guest has been restored.
    pub incarnation: u32,
}

impl TscInfo {
    pub(crate) fn encode(self) -> [u8; 24] {
        let mut out = [0; 24];
        out[..4].copy_from_slice(&self.mode.to_le_bytes());
        out[4..8].copy_from_slice(&self.khz.to_le_bytes());
        out[8..16].copy_from_slice(&self.nsec.to_le_bytes());
        out[16..20].copy_from_slice(&self.incarnation.to_le_bytes());
        out
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, BodyFault> {
        reserved("X86_TSC_INFO", 20, u64::from(u32_at(body, 20)))?;
        Ok(Self {
            mode: u32_at(body, 0),
            khz: u32_at(body, 4),
            nsec: u64_at(body, 8),
            incarnation: u32_at(body, 16),
        })
    }
}

/// One of HVM_PARAMS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HvmParam {
    /// `HVM_PARAM_*`.
    pub index: u64,
    /// Its value.
    pub value: u64,
}

impl HvmParam {
    pub(crate) fn encode_all(params: &[Self]) -> Vec<u8> {
        // Writers hold the number against its limit first.
        let count = u32::try_from(params.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(8 + 16 * params.len());
        out.extend(count.to_le_bytes());
        out.extend([0; 4]);
        for param in params {
            out.extend(param.index.to_le_bytes());
            out.extend(param.value.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode_all(body: &[u8]) -> Result<Vec<Self>, BodyFault> {
        let count = u64::from(u32_at(body, 0));
        if 8 + 16 * count != u64_of(body.len()) {
            return Err((
                0,
                Fault::Length {
                    record: Kind::HvmParams.name(),
                    found: u64_of(body.len()),
                    expected: format!("it says it holds {count} parameters, thus {}", 8 + 16 * count),
                },
            ));
        }
        reserved("HVM_PARAMS", 4, u64::from(u32_at(body, 4)))?;
        let pair = |entry: &[u8]| Self { index: u64_at(entry, 0), value: u64_at(entry, 8) };
        Ok(body[8..].chunks_exact(16).map(pair).collect())
    }
}

/// A fault and its place within the body.
pub(crate) type BodyFault = (u64, Fault);

/// Holds reserved bits against zero.
pub(crate) fn reserved(field: &'static str, at: u64, found: u64) -> Result<(), BodyFault> {
    if found == 0 { Ok(()) } else { Err((at, Fault::Reserved { field, found })) }
}

/// Bytes a record with these entries has in its body.
pub(crate) fn page_data_bytes(entries: u64, with_data: u64) -> u64 {
    8 + 8 * entries + PAGE_BYTES_U64 * with_data
}
