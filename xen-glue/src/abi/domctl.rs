//! Domain control: the structs of `xen/include/public/domctl.h`, as 4.17 to 4.20 have them.
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::DomainId;
use super::layout::abi;

/// Interface versions tried in this order: 4.17, 4.18, 4.19 and 4.20, what comes after.
pub(super) const INTERFACE_VERSIONS: [u32; 4] = [0x15, 0x16, 0x17, 0x18];

/// Sub-commands (`XEN_DOMCTL_*`).
pub(super) mod command {
    pub(in super::super) const PAUSE_DOMAIN: u32 = 3;
    pub(in super::super) const UNPAUSE_DOMAIN: u32 = 4;
    pub(in super::super) const GET_DOMAIN_INFO: u32 = 5;
    pub(in super::super) const SHADOW_OP: u32 = 10;
    pub(in super::super) const SET_VCPU_CONTEXT: u32 = 12;
    pub(in super::super) const GET_VCPU_CONTEXT: u32 = 13;
    pub(in super::super) const GET_VCPU_INFO: u32 = 14;
    pub(in super::super) const SCHEDULER_OP: u32 = 16;
    pub(in super::super) const GET_HVM_CONTEXT: u32 = 33;
    pub(in super::super) const SET_HVM_CONTEXT: u32 = 34;
    pub(in super::super) const GET_ADDRESS_SIZE: u32 = 36;
    pub(in super::super) const SET_EXT_VCPU_CONTEXT: u32 = 42;
    pub(in super::super) const GET_EXT_VCPU_CONTEXT: u32 = 43;
    pub(in super::super) const VM_EVENT_OP: u32 = 56;
    pub(in super::super) const GET_TSC_INFO: u32 = 59;
    pub(in super::super) const SET_TSC_INFO: u32 = 60;
    pub(in super::super) const GET_PAGE_FRAME_INFO3: u32 = 61;
    pub(in super::super) const SET_VCPU_EXT_STATE: u32 = 62;
    pub(in super::super) const GET_VCPU_EXT_STATE: u32 = 63;
    pub(in super::super) const GET_VCPU_MSRS: u32 = 72;
    pub(in super::super) const SET_VCPU_MSRS: u32 = 73;
    pub(in super::super) const GET_CPU_POLICY: u32 = 82;
    pub(in super::super) const SET_CPU_POLICY: u32 = 83;
}

abi! {
    /// The argument of every domctl.
    Domctl = "struct xen_domctl", 144 {
        /// Sub-command.
        command: u32 = "cmd" @ 0,
        /// The interface's version.
        version: u32 = "interface_version" @ 4,
        /// The domain.
        domain: u16 = "domain" @ 8,
        /// Zero.
        pad: [u16; 3] = "" @ 10,
        /// The sub-command's own argument.
        payload: [u64; 16] = "u" @ 16,
    }
}

impl Domctl {
    /// Sub-command `command` for `domain` with this argument.
    pub(super) fn new<T: IntoBytes + Immutable>(command: u32, domain: DomainId, argument: &T) -> Self {
        let mut all = Self { command, domain: domain.0, ..Self::default() };
        let bytes = argument.as_bytes();
        all.payload.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
        all
    }
    /// What the hypervisor made of the argument.
    pub(super) fn argument<T: FromBytes + Default>(&self) -> T {
        T::read_from_prefix(self.payload.as_bytes()).map_or_else(|_| T::default(), |(value, _)| value)
    }
}

abi! {
    /// A domain as `XEN_DOMCTL_getdomaininfo` tells of it.
    DomainInfo = "struct xen_domctl_getdomaininfo", 112 {
        /// The domain this is about, which need not be the one asked for: then there is none of that number.
        domain: u16 = "domain" @ 0,
        /// Nothing.
        pad1: u16 = "pad1" @ 2,
        /// `XEN_DOMINF_*`.
        flags: u32 = "flags" @ 4,
        /// Pages it has.
        tot_pages: u64 = "tot_pages" @ 8,
        /// Pages it may have.
        max_pages: u64 = "max_pages" @ 16,
        /// Pages claimed for it.
        outstanding_pages: u64 = "outstanding_pages" @ 24,
        /// Pages shared with others.
        shr_pages: u64 = "shr_pages" @ 32,
        /// Pages paged out.
        paged_pages: u64 = "paged_pages" @ 40,
        /// Machine frame of its shared info page.
        shared_info_frame: u64 = "shared_info_frame" @ 48,
        /// CPU time it used, ns.
        cpu_time: u64 = "cpu_time" @ 56,
        /// Virtual CPUs online.
        nr_online_vcpus: u32 = "nr_online_vcpus" @ 64,
        /// Highest number of a virtual CPU; all ones if it has none.
        max_vcpu_id: u32 = "max_vcpu_id" @ 68,
        /// Security label.
        ssidref: u32 = "ssidref" @ 72,
        /// UUID.
        handle: [u8; 16] = "handle" @ 76,
        /// CPU pool.
        cpupool: u32 = "cpupool" @ 92,
        /// Bits of a guest physical address.
        gpaddr_bits: u8 = "gpaddr_bits" @ 96,
        /// Nothing.
        pad2: [u8; 7] = "pad2" @ 97,
        /// The architecture's configuration: emulation flags and others.
        arch: [u32; 2] = "arch_config" @ 104,
    }
}

impl DomainInfo {
    const DYING: u32 = 1 << 0;
    const HVM: u32 = 1 << 1;
    const SHUTDOWN: u32 = 1 << 2;
    const PAUSED: u32 = 1 << 3;
    /// `SHUTDOWN_suspend` of `sched.h`.
    const SUSPEND: u32 = 2;

    /// Whether it runs in a hardware container: HVM or PVH.
    #[must_use]
    pub fn is_hvm(&self) -> bool {
        self.flags & Self::HVM != 0
    }
    /// Whether it is being destroyed.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        self.flags & Self::DYING != 0
    }
    /// Whether the toolstack has it paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.flags & Self::PAUSED != 0
    }
    /// Why it shut down (`SHUTDOWN_*` of `sched.h`), if it did.
    #[must_use]
    pub fn shutdown_reason(&self) -> Option<u32> {
        (self.flags & Self::SHUTDOWN != 0).then_some(self.flags >> 16 & 0xff)
    }
    /// Whether it has suspended itself.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.shutdown_reason() == Some(Self::SUSPEND)
    }
}

abi! {
    /// Types of a batch of pages (`XEN_DOMCTL_getpageframeinfo3`).
    PageFrameInfo = "struct xen_domctl_getpageframeinfo3", 16 {
        /// Frames in the array, at most 1,024.
        count: u64 = "num" @ 0,
        /// Frame numbers, overwritten with types.
        array: u64 = "array" @ 8,
    }
}

abi! {
    /// Log-dirty and its bitmap (`XEN_DOMCTL_shadow_op`).
    ShadowControl = "struct xen_domctl_shadow_op", 40 {
        /// What to do.
        op: u32 = "op" @ 0,
        /// Bit 0: the last time, pages the hypervisor itself has mapped included.
        mode: u32 = "mode" @ 4,
        /// Megabytes of shadow memory: not used here.
        mb: u32 = "mb" @ 8,
        /// Zero.
        pad: u32 = "" @ 12,
        /// A bit a page.
        dirty_bitmap: u64 = "dirty_bitmap" @ 16,
        /// Pages the bitmap has room for.
        pages: u64 = "pages" @ 24,
        /// Faults taken on behalf of it.
        fault_count: u32 = "stats.fault_count" @ 32,
        /// Pages found dirty.
        dirty_count: u32 = "stats.dirty_count" @ 36,
    }
}

abi! {
    /// A virtual CPU's registers (`XEN_DOMCTL_getvcpucontext`, `setvcpucontext`).
    VcpuContextArg = "struct xen_domctl_vcpucontext", 16 {
        /// The virtual CPU.
        vcpu: u32 = "vcpu" @ 0,
        /// Zero.
        pad: u32 = "" @ 4,
        /// A `vcpu_guest_context_t`.
        context: u64 = "ctxt" @ 8,
    }
}

abi! {
    /// What a virtual CPU is doing (`XEN_DOMCTL_getvcpuinfo`).
    VcpuInfo = "struct xen_domctl_getvcpuinfo", 24 {
        /// The virtual CPU.
        vcpu: u32 = "vcpu" @ 0,
        /// Whether it is plugged in.
        online: u8 = "online" @ 4,
        /// Whether it waits for an event.
        blocked: u8 = "blocked" @ 5,
        /// Whether it runs.
        running: u8 = "running" @ 6,
        /// Zero.
        pad: u8 = "" @ 7,
        /// CPU time used, ns.
        cpu_time: u64 = "cpu_time" @ 8,
        /// The CPU it is on.
        cpu: u32 = "cpu" @ 16,
        /// Zero.
        pad2: u32 = "" @ 20,
    }
}

abi! {
    /// A domain's share of the processors (`XEN_DOMCTL_scheduler_op`), for the two credit schedulers, which lay it out
    /// alike.
    Scheduling = "struct xen_domctl_scheduler_op", 24 {
        /// Which scheduler: `XEN_SCHEDULER_*`.
        scheduler: u32 = "sched_id" @ 0,
        /// `XEN_DOMCTL_SCHEDOP_*`.
        operation: u32 = "cmd" @ 4,
        /// Share in relation to others.
        weight: u16 = "u.credit2.weight" @ 8,
        /// Most processor time it gets, in percent of one processor; 0 is no limit.
        cap: u16 = "u.credit2.cap" @ 10,
        /// Zero.
        pad: [u16; 6] = "" @ 12,
    }
}

impl Scheduling {
    /// `XEN_SCHEDULER_CREDIT2` and `XEN_SCHEDULER_CREDIT`: those that know a cap.
    pub(super) const WITH_CAP: [u32; 2] = [6, 5];
    /// `XEN_DOMCTL_SCHEDOP_putinfo`.
    pub(super) const PUT: u32 = 0;
    /// `XEN_DOMCTL_SCHEDOP_getinfo`.
    pub(super) const GET: u32 = 1;
}

abi! {
    /// An HVM guest's CPUs and emulated devices (`XEN_DOMCTL_gethvmcontext`, `sethvmcontext`).
    HvmContextArg = "struct xen_domctl_hvmcontext", 16 {
        /// Bytes of the buffer; bytes written to it.
        size: u32 = "size" @ 0,
        /// Zero.
        pad: u32 = "" @ 4,
        /// The buffer; without one the size is told.
        buffer: u64 = "buffer" @ 8,
    }
}

abi! {
    /// Bits of a PV guest's pointers (`XEN_DOMCTL_get_address_size`).
    AddressSize = "struct xen_domctl_address_size", 4 {
        /// 32 or 64.
        size: u32 = "size" @ 0,
    }
}

abi! {
    /// A PV virtual CPU's callbacks for 32-bit system calls, and its machine check banks.
    ExtVcpuContext = "struct xen_domctl_ext_vcpucontext", 64 {
        /// The virtual CPU.
        vcpu: u32 = "vcpu" @ 0,
        /// Bytes of this struct that count.
        size: u32 = "size" @ 4,
        /// 32-bit `syscall`.
        syscall32_callback_eip: u64 = "syscall32_callback_eip" @ 8,
        /// `sysenter`.
        sysenter_callback_eip: u64 = "sysenter_callback_eip" @ 16,
        /// Code segment of the first.
        syscall32_callback_cs: u16 = "syscall32_callback_cs" @ 24,
        /// Code segment of the second.
        sysenter_callback_cs: u16 = "sysenter_callback_cs" @ 26,
        /// Whether the first disables events.
        syscall32_disables_events: u8 = "syscall32_disables_events" @ 28,
        /// Whether the second does.
        sysenter_disables_events: u8 = "sysenter_disables_events" @ 29,
        /// Zero.
        pad: [u8; 2] = "" @ 30,
        /// Machine check: capabilities and two banks.
        vmce: [u64; 4] = "vmce" @ 32,
    }
}

abi! {
    /// A domain's CPUID and MSR policy (`XEN_DOMCTL_get_cpu_policy`, `set_cpu_policy`).
    CpuPolicyArg = "struct xen_domctl_cpu_policy", 40 {
        /// Leaves in the buffer.
        nr_leaves: u32 = "nr_leaves" @ 0,
        /// MSRs in the buffer.
        nr_msrs: u32 = "nr_msrs" @ 4,
        /// Leaves.
        leaves: u64 = "leaves" @ 8,
        /// MSRs.
        msrs: u64 = "msrs" @ 16,
        /// What setting objects to.
        err_leaf: u32 = "err_leaf" @ 24,
        /// What setting objects to.
        err_subleaf: u32 = "err_subleaf" @ 28,
        /// What setting objects to.
        err_msr: u32 = "err_msr" @ 32,
        /// Zero.
        pad: u32 = "" @ 36,
    }
}

abi! {
    /// One CPUID leaf of a policy.
    CpuidLeaf = "xen_cpuid_leaf_t", 24 {
        /// Leaf.
        leaf: u32 = "leaf" @ 0,
        /// Sub-leaf, all ones where there is none.
        subleaf: u32 = "subleaf" @ 4,
        /// Registers a, b, c, d.
        registers: [u32; 4] = "a" @ 8,
    }
}

abi! {
    /// One model-specific register of a policy.
    MsrEntry = "xen_msr_entry_t", 16 {
        /// Its number.
        index: u32 = "idx" @ 0,
        /// Zero.
        flags: u32 = "flags" @ 4,
        /// Its value.
        value: u64 = "val" @ 8,
    }
}

abi! {
    /// A domain's time stamp counter (`XEN_DOMCTL_gettscinfo`, `settscinfo`).
    TscInfo = "struct xen_domctl_tsc_info", 24 {
        /// How it is provided.
        mode: u32 = "tsc_mode" @ 0,
        /// Its frequency.
        khz: u32 = "gtsc_khz" @ 4,
        /// How often it was restored.
        incarnation: u32 = "incarnation" @ 8,
        /// Zero.
        pad: u32 = "pad" @ 12,
        /// Guest time, ns.
        elapsed_nsec: u64 = "elapsed_nsec" @ 16,
    }
}

abi! {
    /// A PV virtual CPU's extended state (`XEN_DOMCTL_getvcpuextstate`, `setvcpuextstate`).
    ExtState = "struct xen_domctl_vcpuextstate", 32 {
        /// The virtual CPU.
        vcpu: u32 = "vcpu" @ 0,
        /// Zero.
        pad: u32 = "" @ 4,
        /// Features the state is of.
        features: u64 = "xfeature_mask" @ 8,
        /// Bytes.
        size: u64 = "size" @ 16,
        /// The state.
        buffer: u64 = "buffer" @ 24,
    }
}

abi! {
    /// A PV virtual CPU's model-specific registers (`XEN_DOMCTL_get_vcpu_msrs`, `set_vcpu_msrs`).
    VcpuMsrs = "struct xen_domctl_vcpu_msrs", 16 {
        /// The virtual CPU.
        vcpu: u32 = "vcpu" @ 0,
        /// How many.
        count: u32 = "msr_count" @ 4,
        /// The registers.
        msrs: u64 = "msrs" @ 8,
    }
}

abi! {
    /// One of them.
    VcpuMsr = "struct xen_domctl_vcpu_msr", 16 {
        /// Its number.
        index: u32 = "index" @ 0,
        /// Zero.
        reserved: u32 = "reserved" @ 4,
        /// Its value.
        value: u64 = "value" @ 8,
    }
}
