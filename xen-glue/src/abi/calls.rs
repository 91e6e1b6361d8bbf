//! The hypercalls a save and a restore need, each as a safe function: buffers are borrowed for the length of the call,
//! and their lengths checked against what the hypervisor is told.

use std::io;

use mover::units::{u64_of, usize_of};

use super::domctl::{
    AddressSize, CpuPolicyArg, ExtState, ExtVcpuContext, HvmContextArg, PageFrameInfo, Scheduling,
    ShadowControl, TscInfo, VcpuContextArg, VcpuInfo, VcpuMsrs, command,
};
use super::memory::{HvmParam, MachphysList, Reservation, hvm, hypercall, operation};
use super::pv::{GrantTableSize, GrantTableVersion};
use super::{CpuidLeaf, DomainId, HypercallBuffer, MmuextOp, MsrEntry, VcpuContext, VcpuMsr, Xen};

/// Most frames of one `getpageframeinfo3`; the hypervisor answers more with E2BIG.
const TYPES_MAX: usize = 1024;

/// What to do with a domain's log of written pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowOp {
    /// Stop logging.
    Off,
    /// Start logging; nothing is dirty yet.
    Enable,
    /// Read the log and clear it.
    Clean,
    /// Read it and clear it, pages that the hypervisor itself has mapped for writing included: when the domain is
    /// suspended and this is the last time.
    CleanFinal,
    /// Read it and leave it as it is.
    Peek,
}

impl ShadowOp {
    /// `XEN_DOMCTL_SHADOW_OP_*` and `XEN_DOMCTL_SHADOW_LOGDIRTY_*`.
    fn number_and_mode(self) -> (u32, u32) {
        match self {
            Self::Off => (0, 0),
            Self::Enable => (2, 0),
            Self::Clean => (11, 0),
            Self::CleanFinal => (11, 1),
            Self::Peek => (12, 0),
        }
    }
}

/// What reading the log gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShadowStats {
    /// Bits of the bitmap that were filled in.
    pub pages: u64,
    /// Faults logging has cost the domain since the last reading.
    pub faults: u32,
    /// Pages written.
    pub dirty: u32,
}

/// Entries of a CPU policy: what there are, or room for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PolicySizes {
    /// CPUID leaves.
    pub leaves: u32,
    /// Model-specific registers.
    pub msrs: u32,
}

/// The length of `buffer` as 32 bits, and that `bytes` fit into it.
fn fitting(buffer: &HypercallBuffer, bytes: usize) -> u32 {
    assert!(bytes <= buffer.len(), "{bytes} bytes in a buffer of {}", buffer.len());
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// How many entries of type `T` fill `buffer`.
fn entries<T>(buffer: &HypercallBuffer) -> u32 {
    u32::try_from(buffer.len() / size_of::<T>()).unwrap_or(u32::MAX)
}

/// Calls whose argument holds no addresses.
macro_rules! plain_domctl {
    ($self:ident, $command:expr, $domain:expr, $argument:expr) => {{
        // SAFETY: the argument is the sub-command's own struct and holds no addresses.
        // Worth it: see `Xen::call`.
        unsafe { $self.domctl($command, $domain, $argument) }
    }};
}

/// Calls whose argument names buffers borrowed by the function around it, of the lengths it names.
macro_rules! pointing_domctl {
    ($self:ident, $command:expr, $domain:expr, $argument:expr) => {{
        // SAFETY: the argument is the sub-command's own struct; the buffers it names are borrowed by this function,
        // mutably where the hypervisor writes, and at least as long as it says. Worth it: see `Xen::call`.
        unsafe { $self.domctl($command, $domain, $argument) }
    }};
}

/// Errors of all of these are what the hypervisor says.
#[expect(clippy::missing_errors_doc, reason = "said once, above: they all return what the hypervisor says")]
impl Xen {
    /// Pauses `domain`; pauses count.
    pub fn pause(&mut self, domain: DomainId) -> io::Result<()> {
        plain_domctl!(self, command::PAUSE_DOMAIN, domain, &0u64).map(drop)
    }
    /// Takes one pause back.
    pub fn unpause(&mut self, domain: DomainId) -> io::Result<()> {
        plain_domctl!(self, command::UNPAUSE_DOMAIN, domain, &0u64).map(drop)
    }

    /// Its share of the processors. `EINVAL` where its scheduler knows no cap.
    pub fn scheduling(&mut self, domain: DomainId) -> io::Result<Scheduling> {
        let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
        for scheduler in Scheduling::WITH_CAP {
            let argument = Scheduling { scheduler, operation: Scheduling::GET, ..Scheduling::default() };
            match plain_domctl!(self, command::SCHEDULER_OP, domain, &argument) {
                Ok((_, found)) => return Ok(found),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }
    /// Sets it.
    pub fn set_scheduling(&mut self, domain: DomainId, share: &Scheduling) -> io::Result<()> {
        let argument = Scheduling { operation: Scheduling::PUT, ..*share };
        plain_domctl!(self, command::SCHEDULER_OP, domain, &argument).map(drop)
    }

    /// The log of written pages: a bit a page into `bitmap`, which is left out where the operation reads nothing.
    pub fn log_dirty(
        &mut self,
        domain: DomainId,
        op: ShadowOp,
        bitmap: Option<&mut HypercallBuffer>,
    ) -> io::Result<ShadowStats> {
        let (op, mode) = op.number_and_mode();
        let (dirty_bitmap, pages) = bitmap.map_or((0, 0), |b| (b.address(), u64_of(b.len()) * 8));
        let argument = ShadowControl { op, mode, dirty_bitmap, pages, ..ShadowControl::default() };
        let (_, after) = pointing_domctl!(self, command::SHADOW_OP, domain, &argument)?;
        Ok(ShadowStats { pages: after.pages, faults: after.fault_count, dirty: after.dirty_count })
    }

    /// Replaces the first `count` (at most 1,024) frame numbers in `frames` by their types, in bits 28 to 31.
    ///
    /// # Panics
    /// If `count` is more than that, or than fits.
    pub fn page_types(
        &mut self,
        domain: DomainId,
        frames: &mut HypercallBuffer,
        count: usize,
    ) -> io::Result<()> {
        assert!(count <= TYPES_MAX && count <= frames.words().len(), "{count} frames at once");
        let argument = PageFrameInfo { count: u64_of(count), array: frames.address() };
        pointing_domctl!(self, command::GET_PAGE_FRAME_INFO3, domain, &argument).map(drop)
    }

    /// Bytes of an HVM guest's state outside memory.
    pub fn hvm_context_bytes(&mut self, domain: DomainId) -> io::Result<usize> {
        let argument = HvmContextArg::default();
        let (_, after) = plain_domctl!(self, command::GET_HVM_CONTEXT, domain, &argument)?;
        Ok(usize_of(after.size.into()))
    }
    /// That state; bytes of `buffer` filled.
    pub fn hvm_context(&mut self, domain: DomainId, buffer: &mut HypercallBuffer) -> io::Result<usize> {
        let argument =
            HvmContextArg { size: fitting(buffer, buffer.len()), buffer: buffer.address(), pad: 0 };
        let (_, after) = pointing_domctl!(self, command::GET_HVM_CONTEXT, domain, &argument)?;
        Ok(usize_of(after.size.into()).min(buffer.len()))
    }
    /// Gives a domain that state, all of `buffer`.
    pub fn set_hvm_context(&mut self, domain: DomainId, buffer: &HypercallBuffer) -> io::Result<()> {
        let argument =
            HvmContextArg { size: fitting(buffer, buffer.len()), buffer: buffer.address(), pad: 0 };
        pointing_domctl!(self, command::SET_HVM_CONTEXT, domain, &argument).map(drop)
    }

    /// An HVM guest's parameter `index` (`HVM_PARAM_*` of `hvm/params.h`).
    pub fn hvm_param(&mut self, domain: DomainId, index: u32) -> io::Result<u64> {
        let argument = HvmParam { domain: domain.0, index, ..HvmParam::default() };
        // SAFETY: the operation's own struct, without addresses. Worth it: see `Xen::call`.
        let (_, after) = unsafe { self.call_with(hypercall::HVM_OP, Some(hvm::GET_PARAM), &argument)? };
        Ok(after.value)
    }
    /// Sets it.
    pub fn set_hvm_param(&mut self, domain: DomainId, index: u32, value: u64) -> io::Result<()> {
        let argument = HvmParam { domain: domain.0, pad: 0, index, value };
        // SAFETY: as above.
        unsafe { self.call_with(hypercall::HVM_OP, Some(hvm::SET_PARAM), &argument) }.map(drop)
    }

    /// A domain's time stamp counter.
    pub fn tsc_info(&mut self, domain: DomainId) -> io::Result<TscInfo> {
        Ok(plain_domctl!(self, command::GET_TSC_INFO, domain, &TscInfo::default())?.1)
    }
    /// Sets it.
    pub fn set_tsc_info(&mut self, domain: DomainId, info: &TscInfo) -> io::Result<()> {
        plain_domctl!(self, command::SET_TSC_INFO, domain, info).map(drop)
    }

    /// Room a domain's CPU policy needs at most.
    pub fn cpu_policy_sizes(&mut self, domain: DomainId) -> io::Result<PolicySizes> {
        let argument = CpuPolicyArg::default();
        let (_, after) = plain_domctl!(self, command::GET_CPU_POLICY, domain, &argument)?;
        Ok(PolicySizes { leaves: after.nr_leaves, msrs: after.nr_msrs })
    }
    /// The policy, as arrays of [`CpuidLeaf`] and [`MsrEntry`]; how many of each there are.
    pub fn cpu_policy(
        &mut self,
        domain: DomainId,
        leaves: &mut HypercallBuffer,
        msrs: &mut HypercallBuffer,
    ) -> io::Result<PolicySizes> {
        let argument = Self::policy_argument(leaves, msrs);
        let (_, after) = pointing_domctl!(self, command::GET_CPU_POLICY, domain, &argument)?;
        Ok(PolicySizes { leaves: after.nr_leaves, msrs: after.nr_msrs })
    }
    /// Gives a domain a policy; both arrays whole.
    pub fn set_cpu_policy(
        &mut self,
        domain: DomainId,
        leaves: &HypercallBuffer,
        msrs: &HypercallBuffer,
    ) -> io::Result<()> {
        let argument = Self::policy_argument(leaves, msrs);
        pointing_domctl!(self, command::SET_CPU_POLICY, domain, &argument).map(drop)
    }
    fn policy_argument(leaves: &HypercallBuffer, msrs: &HypercallBuffer) -> CpuPolicyArg {
        CpuPolicyArg {
            nr_leaves: entries::<CpuidLeaf>(leaves),
            nr_msrs: entries::<MsrEntry>(msrs),
            leaves: leaves.address(),
            msrs: msrs.address(),
            ..CpuPolicyArg::default()
        }
    }

    /// Gives `domain` memory at the first `count` extents named in `extents`, each `1 << order` pages. Returns how
    /// many of them were populated; where a PV guest's came to stand is in `extents` afterwards.
    ///
    /// # Panics
    /// If `count` is more than fits.
    pub fn populate(
        &mut self,
        domain: DomainId,
        extents: &mut HypercallBuffer,
        count: usize,
        order: u32,
    ) -> io::Result<usize> {
        assert!(count <= extents.words().len(), "{count} extents at once");
        let argument = Reservation {
            extents: extents.address(),
            count: u64_of(count),
            order,
            domain: domain.0,
            ..Reservation::default()
        };
        // SAFETY: the operation's own struct; the list is mutably borrowed and as long as it says.
        // Worth it: see `Xen::call`.
        let (done, _) =
            unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::POPULATE_PHYSMAP), &argument)? };
        Ok(usize_of(done))
    }
    /// The highest guest frame `domain` has used.
    pub fn maximum_gpfn(&mut self, domain: DomainId) -> io::Result<u64> {
        // SAFETY: the argument is a domain's number, 16 bits of the 64. Worth it: see `Xen::call`.
        let (highest, _) = unsafe {
            self.call_with(hypercall::MEMORY_OP, Some(operation::MAXIMUM_GPFN), &u64::from(domain.0))?
        };
        Ok(highest)
    }
    /// The highest machine frame of the host.
    pub fn maximum_ram_page(&mut self) -> io::Result<u64> {
        // SAFETY: no argument. Worth it: see `Xen::call`.
        unsafe { self.call(hypercall::MEMORY_OP, [operation::MAXIMUM_RAM_PAGE, 0, 0, 0, 0]) }
    }
    /// First machine frames of the machine-to-physical table's 2 MiB pieces into `list`; how many there are. A piece
    /// that does not exist is 0.
    pub fn machphys_frames(&mut self, list: &mut HypercallBuffer) -> io::Result<usize> {
        let room = u32::try_from(list.words().len()).unwrap_or(u32::MAX);
        let argument = MachphysList { room, extents: list.address(), ..MachphysList::default() };
        // SAFETY: the operation's own struct; the list is mutably borrowed and as long as it says.
        // Worth it: see `Xen::call`.
        let (_, after) =
            unsafe { self.call_with(hypercall::MEMORY_OP, Some(operation::MACHPHYS_MFN_LIST), &argument)? };
        Ok(usize_of(after.count.into()).min(list.words().len()))
    }

    /// Page table operations on behalf of `domain`: the first `count` of `operations`.
    ///
    /// # Panics
    /// If `count` is more than fits.
    pub fn page_table_operations(
        &mut self,
        domain: DomainId,
        operations: &mut HypercallBuffer,
        count: usize,
    ) -> io::Result<()> {
        assert!(count * size_of::<MmuextOp>() <= operations.len(), "{count} operations at once");
        let arguments = [operations.address(), u64_of(count), 0, domain.0.into(), 0];
        // SAFETY: the list is mutably borrowed and as long as it says. Worth it: see `Xen::call`.
        unsafe { self.call(hypercall::MMUEXT_OP, arguments) }.map(drop)
    }
}

/// A domain's grant table. Errors are what the hypervisor says.
#[expect(clippy::missing_errors_doc, reason = "said once, above: they all return what the hypervisor says")]
impl Xen {
    /// `GNTTABOP_query_size` and `GNTTABOP_get_version`.
    const QUERY_SIZE: u64 = 6;
    const GET_VERSION: u64 = 10;

    /// Pages of it, and the version of its entries; 0 pages if it has none.
    pub fn grant_table(&mut self, domain: DomainId) -> io::Result<(usize, u32)> {
        let argument = GrantTableSize { domain: domain.0, ..GrantTableSize::default() };
        // SAFETY: one of the operation's own structs, without addresses. Worth it: see `Xen::call`.
        let (_, size) = unsafe { self.grant_operation(Self::QUERY_SIZE, &argument)? };
        if size.status != 0 {
            return Ok((0, 1));
        }
        let argument = GrantTableVersion { domain: domain.0, ..GrantTableVersion::default() };
        // SAFETY: as above.
        let (_, version) = unsafe { self.grant_operation(Self::GET_VERSION, &argument)? };
        Ok((usize_of(size.frames.into()), version.version.max(1)))
    }

    /// One operation on a grant table.
    ///
    /// # Safety
    /// As `Xen::call_with`, for one struct of the operation `op`.
    unsafe fn grant_operation<T>(&mut self, op: u64, argument: &T) -> io::Result<(u64, T)>
    where
        T: zerocopy::IntoBytes + zerocopy::FromBytes + zerocopy::Immutable + Default,
    {
        // SAFETY: the caller's promise; the count says that there is one. Worth it: as above.
        unsafe { self.call_counted(hypercall::GRANT_TABLE_OP, op, argument, 1) }
    }
}

/// What only PV guests have. Errors are what the hypervisor says.
#[expect(clippy::missing_errors_doc, reason = "said once, above: they all return what the hypervisor says")]
impl Xen {
    /// Bits of a guest's pointers.
    pub fn address_size(&mut self, domain: DomainId) -> io::Result<u32> {
        let argument = AddressSize::default();
        Ok(plain_domctl!(self, command::GET_ADDRESS_SIZE, domain, &argument)?.1.size)
    }
    /// What a virtual CPU is doing.
    pub fn vcpu_info(&mut self, domain: DomainId, vcpu: u32) -> io::Result<VcpuInfo> {
        let argument = VcpuInfo { vcpu, ..VcpuInfo::default() };
        Ok(plain_domctl!(self, command::GET_VCPU_INFO, domain, &argument)?.1)
    }
    /// Its registers ([`VcpuContext`]).
    ///
    /// # Panics
    /// If they don't fit into `buffer`.
    pub fn vcpu_context(
        &mut self,
        domain: DomainId,
        vcpu: u32,
        buffer: &mut HypercallBuffer,
    ) -> io::Result<()> {
        fitting(buffer, VcpuContext::BYTES);
        let argument = VcpuContextArg { vcpu, pad: 0, context: buffer.address() };
        pointing_domctl!(self, command::GET_VCPU_CONTEXT, domain, &argument).map(drop)
    }
    /// Sets them.
    ///
    /// # Panics
    /// If `buffer` is shorter than they are.
    pub fn set_vcpu_context(
        &mut self,
        domain: DomainId,
        vcpu: u32,
        buffer: &HypercallBuffer,
    ) -> io::Result<()> {
        fitting(buffer, VcpuContext::BYTES);
        let argument = VcpuContextArg { vcpu, pad: 0, context: buffer.address() };
        pointing_domctl!(self, command::SET_VCPU_CONTEXT, domain, &argument).map(drop)
    }
    /// Its callbacks for 32-bit system calls, and its machine check banks.
    pub fn ext_vcpu_context(&mut self, domain: DomainId, vcpu: u32) -> io::Result<ExtVcpuContext> {
        let argument = ExtVcpuContext { vcpu, ..ExtVcpuContext::default() };
        Ok(plain_domctl!(self, command::GET_EXT_VCPU_CONTEXT, domain, &argument)?.1)
    }
    /// Sets them.
    pub fn set_ext_vcpu_context(&mut self, domain: DomainId, context: &ExtVcpuContext) -> io::Result<()> {
        plain_domctl!(self, command::SET_EXT_VCPU_CONTEXT, domain, context).map(drop)
    }
    /// Bytes of its extended state (XSAVE); 0 if it has none.
    pub fn ext_state_bytes(&mut self, domain: DomainId, vcpu: u32) -> io::Result<usize> {
        let argument = ExtState { vcpu, ..ExtState::default() };
        let (_, after) = plain_domctl!(self, command::GET_VCPU_EXT_STATE, domain, &argument)?;
        Ok(if after.features == 0 { 0 } else { usize_of(after.size) })
    }
    /// That state; bytes of `buffer` filled.
    pub fn ext_state(
        &mut self,
        domain: DomainId,
        vcpu: u32,
        buffer: &mut HypercallBuffer,
    ) -> io::Result<usize> {
        let probe = ExtState { vcpu, ..ExtState::default() };
        let (_, features) = plain_domctl!(self, command::GET_VCPU_EXT_STATE, domain, &probe)?;
        let argument = ExtState { vcpu, size: u64_of(buffer.len()), buffer: buffer.address(), ..features };
        let (_, after) = pointing_domctl!(self, command::GET_VCPU_EXT_STATE, domain, &argument)?;
        Ok(usize_of(after.size).min(buffer.len()))
    }
    /// Sets it, all of `buffer`.
    pub fn set_ext_state(&mut self, domain: DomainId, vcpu: u32, buffer: &HypercallBuffer) -> io::Result<()> {
        let argument =
            ExtState { vcpu, size: u64_of(buffer.len()), buffer: buffer.address(), ..ExtState::default() };
        pointing_domctl!(self, command::SET_VCPU_EXT_STATE, domain, &argument).map(drop)
    }
    /// How many model-specific registers it may have at most.
    pub fn vcpu_msrs_max(&mut self, domain: DomainId, vcpu: u32) -> io::Result<usize> {
        let argument = VcpuMsrs { vcpu, ..VcpuMsrs::default() };
        let (_, after) = plain_domctl!(self, command::GET_VCPU_MSRS, domain, &argument)?;
        Ok(usize_of(after.count.into()))
    }
    /// Those it has, as an array of [`VcpuMsr`]; how many.
    pub fn vcpu_msrs(
        &mut self,
        domain: DomainId,
        vcpu: u32,
        buffer: &mut HypercallBuffer,
    ) -> io::Result<usize> {
        let argument = VcpuMsrs { vcpu, count: entries::<VcpuMsr>(buffer), msrs: buffer.address() };
        let (_, after) = pointing_domctl!(self, command::GET_VCPU_MSRS, domain, &argument)?;
        Ok(usize_of(after.count.into()))
    }
    /// Sets them, all of `buffer`.
    pub fn set_vcpu_msrs(&mut self, domain: DomainId, vcpu: u32, buffer: &HypercallBuffer) -> io::Result<()> {
        let argument = VcpuMsrs { vcpu, count: entries::<VcpuMsr>(buffer), msrs: buffer.address() };
        pointing_domctl!(self, command::SET_VCPU_MSRS, domain, &argument).map(drop)
    }
}
