//! What HVM and PV guests have in common.
#![forbid(unsafe_code)]

use std::io;

use mover::bitmap::Bitmap;
use mover::units::{u64_of, usize_of};
use zerocopy::IntoBytes;

use super::{DomainError, Life, LogRead};
use crate::abi::{CpuidLeaf, DomainId, DomainInfo, HypercallBuffer, MsrEntry, Scheduling, ShadowOp, Xen};
use crate::stream::TscInfo;

/// What to do where nothing particular is known.
pub(super) const LOG: &str = "The hypervisor's log (`xl dmesg`) says more";

/// A domain and the handle to its hypervisor.
#[derive(Debug)]
pub struct Domain {
    /// The hypervisor.
    pub(super) xen: Xen,
    /// Its number.
    pub(super) id: DomainId,
    /// What it was when it was opened.
    pub(super) info: DomainInfo,
    /// The log of written pages as the hypervisor fills it in; made when first needed.
    log: Option<HypercallBuffer>,
    /// Its share of the processors, while it is slowed down.
    share: Option<Scheduling>,
}

impl Domain {
    /// Opens domain `id`.
    ///
    /// # Errors
    /// There is no Xen here, or no such domain.
    pub fn open(id: DomainId) -> Result<Self, DomainError> {
        let mut xen = Xen::open().map_err(|source| DomainError::NoXen { source })?;
        let info = Self::info_of(&mut xen, id)?;
        Ok(Self { xen, id, info, log: None, share: None })
    }

    fn info_of(xen: &mut Xen, id: DomainId) -> Result<DomainInfo, DomainError> {
        match xen.domain_info(id) {
            Ok(info) if info.is_dying() => Err(DomainError::Gone { domain: id }),
            Ok(info) => Ok(info),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DomainError::Gone { domain: id }),
            Err(source) => Err(DomainError::call("read the state", id, LOG)(source)),
        }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomainId {
        self.id
    }
    /// Whether it is an HVM or PVH guest.
    #[must_use]
    pub fn is_hvm(&self) -> bool {
        self.info.is_hvm()
    }
    /// What it is now.
    ///
    /// # Errors
    /// It is gone.
    pub fn info(&mut self) -> Result<DomainInfo, DomainError> {
        Self::info_of(&mut self.xen, self.id)
    }
    /// What it is doing.
    ///
    /// # Errors
    /// It is gone.
    pub fn life(&mut self) -> Result<Life, DomainError> {
        let info = self.info()?;
        Ok(match info.shutdown_reason() {
            None => Life::Running,
            Some(_) if info.is_suspended() => Life::Suspended,
            Some(reason) => Life::ShutDown(reason),
        })
    }
    /// Pauses it; pauses count.
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn pause(&mut self) -> Result<(), DomainError> {
        self.xen.pause(self.id).map_err(DomainError::call("pause the virtual CPUs", self.id, LOG))
    }
    /// Takes one pause back.
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn unpause(&mut self) -> Result<(), DomainError> {
        self.xen.unpause(self.id).map_err(DomainError::call("unpause the virtual CPUs", self.id, LOG))
    }

    /// The hypervisor's release.
    pub(super) fn release_of_xen(&mut self) -> Result<(u32, u32), DomainError> {
        self.xen.release().map_err(|source| DomainError::NoXen { source })
    }

    /// How many frames it may have used, from 0.
    pub(super) fn frames(&mut self) -> Result<u64, DomainError> {
        let highest = self.xen.maximum_gpfn(self.id).map_err(DomainError::call(
            "find out the size of the memory",
            self.id,
            LOG,
        ))?;
        Ok(highest + 1)
    }

    /// CPUID leaves and model-specific registers of its policy, as bytes.
    pub(super) fn policies(&mut self) -> Result<(Vec<u8>, Vec<u8>), DomainError> {
        let fail = || DomainError::call("read the CPU policy", self.id, LOG);
        let id = self.id;
        let room = self.xen.cpu_policy_sizes(id).map_err(fail())?;
        let leaf_bytes = usize_of(room.leaves.into()) * size_of::<CpuidLeaf>();
        let msr_bytes = usize_of(room.msrs.into()) * size_of::<MsrEntry>();
        let mut leaves = self.xen.buffer(leaf_bytes).map_err(fail())?;
        let mut msrs = self.xen.buffer(msr_bytes).map_err(fail())?;
        let got = self.xen.cpu_policy(id, &mut leaves, &mut msrs).map_err(fail())?;
        let leaf_bytes = usize_of(got.leaves.into()) * size_of::<CpuidLeaf>();
        let msr_bytes = usize_of(got.msrs.into()) * size_of::<MsrEntry>();
        Ok((leaves.as_bytes()[..leaf_bytes].to_vec(), msrs.as_bytes()[..msr_bytes].to_vec()))
    }

    /// Sets a policy; either part may be empty.
    pub(super) fn set_policies(&mut self, cpuid: &[u8], msrs: &[u8]) -> Result<(), DomainError> {
        if cpuid.is_empty() && msrs.is_empty() {
            return Ok(());
        }
        let remedy = "This host's CPU or hypervisor lacks what the guest was started with: move it to a host that \
                      has it, or start it with a CPU policy both hosts have (`cpuid=` of xl.cfg)";
        let fail = || DomainError::call("set the CPU policy", self.id, remedy);
        let leaves = self.filled(cpuid).map_err(fail())?;
        let registers = self.filled(msrs).map_err(fail())?;
        self.xen.set_cpu_policy(self.id, &leaves, &registers).map_err(fail())
    }

    /// A buffer for hypercalls that holds `bytes`.
    pub(super) fn filled(&self, bytes: &[u8]) -> io::Result<HypercallBuffer> {
        let mut buffer = self.xen.buffer(bytes.len())?;
        buffer.as_mut_bytes().copy_from_slice(bytes);
        Ok(buffer)
    }

    /// Its time stamp counter.
    pub(super) fn tsc(&mut self) -> Result<TscInfo, DomainError> {
        let tsc = self.xen.tsc_info(self.id).map_err(DomainError::call("read the clock", self.id, LOG))?;
        let (mode, khz, incarnation) = (tsc.mode, tsc.khz, tsc.incarnation);
        Ok(TscInfo { mode, khz, nsec: tsc.elapsed_nsec, incarnation })
    }
    /// Sets it.
    pub(super) fn set_tsc(&mut self, tsc: &TscInfo) -> Result<(), DomainError> {
        let info = crate::abi::TscInfo {
            mode: tsc.mode,
            khz: tsc.khz,
            incarnation: tsc.incarnation,
            pad: 0,
            elapsed_nsec: tsc.nsec,
        };
        self.xen.set_tsc_info(self.id, &info).map_err(DomainError::call("set the clock", self.id, LOG))
    }

    /// Starts logging written pages, of which the guest has `pages`.
    pub(super) fn log_on(&mut self, pages: u64) -> Result<(), DomainError> {
        let remedy = if self.info.is_hvm() {
            "A guest with a passed-through device can't be moved while it runs. Else look at `xl dmesg`"
        } else {
            "A PV guest can be moved while it runs only where the hypervisor has shadow paging \
             (CONFIG_SHADOW_PAGING), which current packages leave out; save and restore it, or start it as PVH"
        };
        let id = self.id;
        let fail = || DomainError::call("log the written pages", id, remedy);
        let bytes = usize_of(pages.div_ceil(64)) * size_of::<u64>();
        self.log = Some(self.xen.buffer(bytes).map_err(fail())?);
        if self.xen.log_dirty(id, ShadowOp::Enable, None).is_err() {
            // Something else may have had it on, for the display; that is over then. What the second attempt says
            // is what counts.
            let _ = self.xen.log_dirty(id, ShadowOp::Off, None);
            self.xen.log_dirty(id, ShadowOp::Enable, None).map_err(fail())?;
        }
        Ok(())
    }

    /// Reads and clears the log; how many pages it has.
    pub(super) fn log_read(&mut self, which: LogRead, into: &mut Bitmap) -> Result<u64, DomainError> {
        let op = match which {
            LogRead::Round => ShadowOp::Clean,
            LogRead::Last => ShadowOp::CleanFinal,
        };
        let fail = DomainError::call("read the log of written pages", self.id, LOG);
        let Some(log) = &mut self.log else {
            return Err(fail(io::Error::other("the log is not on")));
        };
        self.xen.log_dirty(self.id, op, Some(log)).map_err(fail)?;
        into.clear_all();
        let bits = into.len();
        for (at, &word) in log.words().iter().enumerate().filter(|(_, word)| **word != 0) {
            let left = bits.saturating_sub(at * 64);
            let word = if left >= 64 { word } else { word & ((1 << left) - 1) };
            if word != 0 {
                into.set_word(at, word);
            }
        }
        Ok(into.count())
    }

    /// Stops logging; nothing to do for a domain that is gone.
    pub(super) fn log_off(&mut self) -> Result<(), DomainError> {
        match self.xen.log_dirty(self.id, ShadowOp::Off, None).map_err(DomainError::call(
            "stop logging the written pages",
            self.id,
            "The guest runs slower until it is off: pause and unpause it, or look at `xl dmesg`",
        )) {
            Ok(_) | Err(DomainError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Caps the processor time it gets at `percent` of what it could have: of all its virtual CPUs, or of the cap it has.
    pub(super) fn slow_down(&mut self, percent: u8) -> Result<(), DomainError> {
        let id = self.id;
        let remedy =
            "Slowing a guest down takes a scheduler with caps, credit2 or credit (`xl info`, xen_scheduler)";
        let fail = || DomainError::call("cap the processor time", id, remedy);
        let share = match self.share {
            Some(share) => share,
            None => self.xen.scheduling(id).map_err(fail())?,
        };
        let processors = self.info()?.nr_online_vcpus;
        let all = match u32::from(share.cap) {
            0 => 100 * processors,
            cap => cap.min(100 * processors),
        };
        let cap = u16::try_from((all * u32::from(percent) / 100).max(1)).unwrap_or(u16::MAX);
        // Kept before the call: even a cap that half took hold is to be taken back.
        self.share = Some(share);
        self.xen.set_scheduling(id, &Scheduling { cap, ..share }).map_err(fail())
    }

    /// Gives it the share of the processors back that it had; nothing to do if it has it, or is gone.
    pub(super) fn full_speed(&mut self) -> Result<(), DomainError> {
        let Some(share) = self.share.take() else { return Ok(()) };
        let remedy = "The guest is slower until its cap is taken back: `xl sched-credit2 -d DOMAIN -c 0`";
        match self.xen.set_scheduling(self.id, &share).map_err(DomainError::call(
            "take back the cap on the processor time",
            self.id,
            remedy,
        )) {
            Ok(()) | Err(DomainError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Most pages the toolstack lets it have.
    pub(super) fn pages_max(&mut self) -> Result<u64, DomainError> {
        Ok(self.info()?.max_pages)
    }
}

/// The bytes of `words`, for buffers of frame numbers.
pub(super) fn fill_words(buffer: &mut HypercallBuffer, words: &[u64]) {
    buffer.as_mut_bytes()[..usize_of(u64_of(words.len()) * 8)].copy_from_slice(words.as_bytes());
}
