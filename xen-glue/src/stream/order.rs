//! Which records may follow which, for reader and writer alike.
//!
//! ```text
//!   v3, PV:   PV_INFO, policies | STATIC_DATA_END | P2M_FRAMES | PAGE_DATA.. [VERIFY PAGE_DATA..] | VCPU_* , SHARED_INFO, TSC | END
//!   v3, HVM:           policies | STATIC_DATA_END |              PAGE_DATA.. [VERIFY PAGE_DATA..] , HVM_PARAMS, HVM_CONTEXT, TSC | END
//!   v2: the same without policies; STATIC_DATA_END is inferred before the first P2M_FRAMES (PV) or PAGE_DATA (HVM)
//!   ours, v3, HVM: LANES in the place of the pages or behind some of them, then neither PAGE_DATA nor VERIFY; LANES_DONE
//!   ours, v3: FROZEN_DISKS before the pages, REFERENCES.. behind them, then neither PAGE_DATA nor, in either case, VERIFY or LANES
//! ```
//!
//! A comma joins what may come in any order. The specification wants HVM_PARAMS before HVM_CONTEXT and Xen's own saver
//! writes them the other way round, so both are let pass. Optional records may stand anywhere. Invariant: what
//! [`Order`] has admitted is a prefix of a stream that can be restored.
#![forbid(unsafe_code)]

use super::body::PvWidth;
use super::error::Fault;
use super::frozen::{FrozenDisks, Reference};
use super::header::GuestType;
use super::kind::{Kind, VcpuKind};
use super::limits::VCPU_END;
use super::page::{PageEntry, PageType};
use crate::frames::FrameSet;
use mover::units::{Pfn, usize_of};

/// What has come so far.
#[derive(Debug)]
pub(crate) struct Order {
    version: u32,
    guest: GuestType,
    seen: u32,
    width: Option<PvWidth>,
    vcpus: [Vec<u64>; 4],
    /// Bytes of the frozen disks.
    disks: Vec<u64>,
    /// Frames that are to come by reference.
    owed: FrameSet,
    ended: bool,
}

fn bit(kind: Kind) -> u32 {
    1 << kind.index()
}

impl Order {
    pub(crate) fn new(version: u32, guest: GuestType) -> Self {
        let (vcpus, disks, owed) = (Default::default(), Vec::new(), FrameSet::default());
        Self { version, guest, seen: 0, width: None, vcpus, disks, owed, ended: false }
    }

    pub(crate) fn seen(&self, kind: Kind) -> bool {
        self.seen & bit(kind) != 0
    }

    /// The guest's width, as soon as X86_PV_INFO has come.
    pub(crate) fn width(&self) -> Option<PvWidth> {
        self.width
    }

    pub(crate) fn set_width(&mut self, width: PvWidth) {
        self.width = Some(width);
    }

    /// Takes in which disks pages are left on.
    pub(crate) fn set_frozen(&mut self, frozen: &FrozenDisks) {
        self.disks = frozen.disks.iter().map(|disk| disk.bytes).collect();
    }

    /// Takes in what a PAGE_DATA record names: of frames that get memory and no contents those are owed.
    pub(crate) fn name_pages(&mut self, entries: &[PageEntry]) {
        if !self.seen(Kind::FrozenDisks) {
            return;
        }
        for entry in entries {
            match entry.page_type() {
                PageType::AllocateOnly => self.owed.insert(entry.pfn().0),
                _ => drop(self.owed.remove(entry.pfn().0)),
            }
        }
    }

    /// Takes a reference in: it lies on a disk, and its frame is owed.
    pub(crate) fn pay(&mut self, reference: &Reference) -> Result<(), Fault> {
        reference.check(&self.disks)?;
        match self.owed.remove(reference.pfn.0) {
            true => Ok(()),
            false => Err(Fault::NotOwed { pfn: reference.pfn }),
        }
    }

    /// Whether the reader has to make up a STATIC_DATA_END before this record.
    pub(crate) fn infers_static_data_end(&self, next: Kind) -> bool {
        let first = match self.guest {
            GuestType::Pv => Kind::P2mFrames,
            GuestType::Hvm => Kind::PageData,
        };
        self.version < 3 && next == first && !self.seen(Kind::StaticDataEnd)
    }

    /// Notes that STATIC_DATA_END was inferred.
    pub(crate) fn infer_static_data_end(&mut self) {
        self.seen |= bit(Kind::StaticDataEnd);
    }

    /// Takes a record in, or says why it can't stand here; in that case nothing has changed but that it has been seen.
    pub(crate) fn admit(&mut self, kind: Kind) -> Result<(), Fault> {
        let verdict = self.judge(kind);
        self.seen |= bit(kind);
        verdict
    }

    fn judge(&self, kind: Kind) -> Result<(), Fault> {
        self.belongs(kind)?;
        self.comes_once(kind)?;
        let early = |needs: Kind| Err(Fault::Early { record: kind.name(), needs: needs.name() });
        let late = |by: Kind| Err(Fault::Late { record: kind.name(), closed_by: by.name() });
        let is_static = matches!(kind, Kind::PvInfo | Kind::CpuidPolicy | Kind::MsrPolicy);
        let pv_info_due = self.guest == GuestType::Pv && !self.seen(Kind::PvInfo);
        match kind {
            Kind::End => return self.complete(),
            Kind::StaticDataEnd if pv_info_due => return early(Kind::PvInfo),
            Kind::StaticDataEnd => return Ok(()),
            _ if is_static && self.seen(Kind::StaticDataEnd) => return late(Kind::StaticDataEnd),
            _ if is_static => return Ok(()),
            _ if self.version >= 3 && !self.seen(Kind::StaticDataEnd) => return early(Kind::StaticDataEnd),
            _ => {}
        }
        if kind == Kind::LanesDone && !self.seen(Kind::Lanes) {
            return early(Kind::Lanes);
        }
        if matches!(kind, Kind::PageData | Kind::Verify) && self.seen(Kind::Lanes) {
            return late(Kind::Lanes);
        }
        if kind == Kind::Lanes && self.seen(Kind::Verify) {
            return late(Kind::Verify);
        }
        if matches!(kind, Kind::Lanes | Kind::Verify) && self.seen(Kind::FrozenDisks) {
            return late(Kind::FrozenDisks);
        }
        match kind {
            Kind::FrozenDisks => {
                let closed = [Kind::PageData, Kind::Lanes].into_iter().find(|&by| self.seen(by));
                return closed.map_or(Ok(()), late);
            }
            Kind::References if !self.seen(Kind::FrozenDisks) => return early(Kind::FrozenDisks),
            Kind::PageData if self.seen(Kind::References) => return late(Kind::References),
            _ => {}
        }
        if self.guest == GuestType::Hvm {
            if kind == Kind::Verify && !self.seen(Kind::PageData) {
                return early(Kind::PageData);
            }
            return Ok(());
        }
        match kind {
            Kind::P2mFrames if self.seen(Kind::PageData) => late(Kind::PageData),
            Kind::P2mFrames | Kind::SharedInfo if !self.seen(Kind::PvInfo) => early(Kind::PvInfo),
            Kind::PageData if !self.seen(Kind::P2mFrames) => early(Kind::P2mFrames),
            Kind::Vcpu(_) | Kind::Verify if !self.seen(Kind::PageData) => early(Kind::PageData),
            Kind::PageData | Kind::References => {
                match VcpuKind::ALL.into_iter().find(|&state| self.seen(Kind::Vcpu(state))) {
                    Some(state) => late(Kind::Vcpu(state)),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Records of another kind of guest, of checkpointed streams, or of a later version.
    fn belongs(&self, kind: Kind) -> Result<(), Fault> {
        let misplaced = |stream| Err(Fault::Misplaced { record: kind.name(), stream });
        match (kind, self.guest) {
            (Kind::Toolstack, _) => misplaced("any stream: it was withdrawn before Xen 4.6"),
            (Kind::Checkpoint | Kind::CheckpointDirtyPfns, _) => {
                misplaced("a plain stream: Remus and COLO are left to Xen's own tools")
            }
            (Kind::StaticDataEnd | Kind::CpuidPolicy | Kind::MsrPolicy, _) if self.version < 3 => {
                misplaced("a stream of version 2")
            }
            (Kind::Lanes | Kind::LanesDone, GuestType::Pv) => misplaced("a PV guest's stream"),
            (Kind::Lanes | Kind::LanesDone | Kind::FrozenDisks | Kind::References, _) if self.version < 3 => {
                misplaced("a stream of version 2")
            }
            (Kind::PvInfo | Kind::P2mFrames | Kind::Vcpu(_) | Kind::SharedInfo, GuestType::Hvm) => {
                misplaced("an HVM guest's stream")
            }
            (Kind::HvmContext | Kind::HvmParams, GuestType::Pv) => misplaced("a PV guest's stream"),
            _ => Ok(()),
        }
    }

    fn comes_once(&self, kind: Kind) -> Result<(), Fault> {
        match kind {
            Kind::PageData | Kind::P2mFrames | Kind::Vcpu(_) | Kind::References => Ok(()),
            kind if self.seen(kind) => Err(Fault::Repeated { record: kind.name() }),
            _ => Ok(()),
        }
    }

    /// Takes a virtual CPU's state in; each comes once. The number has been held against its limit.
    pub(crate) fn admit_vcpu(&mut self, kind: VcpuKind, vcpu: u32) -> Result<(), Fault> {
        assert!(vcpu < VCPU_END, "virtual CPU numbers are held against their limit before");
        let words = &mut self.vcpus[kind.index()];
        words.resize(usize_of(u64::from(VCPU_END / 64)), 0);
        let (word, mask) = (usize_of(u64::from(vcpu / 64)), 1u64 << (vcpu % 64));
        if words[word] & mask != 0 {
            return Err(Fault::RepeatedVcpu { record: Kind::Vcpu(kind).name(), vcpu });
        }
        words[word] |= mask;
        Ok(())
    }

    /// Whether END may come: nothing is missing without which the guest can't run.
    fn complete(&self) -> Result<(), Fault> {
        let needed: &[Kind] = match self.guest {
            GuestType::Pv => &[
                Kind::PvInfo,
                Kind::StaticDataEnd,
                Kind::P2mFrames,
                Kind::PageData,
                Kind::SharedInfo,
                Kind::Vcpu(VcpuKind::Basic),
            ],
            GuestType::Hvm if self.seen(Kind::Lanes) => {
                &[Kind::StaticDataEnd, Kind::LanesDone, Kind::HvmParams, Kind::HvmContext]
            }
            GuestType::Hvm => &[Kind::StaticDataEnd, Kind::PageData, Kind::HvmParams, Kind::HvmContext],
        };
        match needed.iter().find(|&&kind| !self.seen(kind)) {
            Some(kind) => Err(Fault::Missing { record: kind.name() }),
            None => match self.owed.first() {
                Some(first) => Err(Fault::Owed { count: self.owed.count(), first: Pfn(first) }),
                None => Ok(()),
            },
        }
    }

    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended
    }
}
