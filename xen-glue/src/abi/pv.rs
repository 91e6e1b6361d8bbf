//! What a 64-bit PV guest shares with the hypervisor (`xen.h`, `arch-x86/xen.h`, `arch-x86/xen-x86_64.h`,
//! `grant_table.h`): offsets only where most of a struct passes through untouched.
#![forbid(unsafe_code)]

use super::layout::{abi, offsets};

offsets! {
    /// A virtual CPU's registers.
    VcpuContext = "vcpu_guest_context_t", 5168 {
        /// `VGCF_*`, 8 bytes.
        FLAGS = "flags" @ 512,
        /// Register `rdx`, 8 bytes: of the first virtual CPU, when suspended, the start info page's frame.
        RDX = "user_regs.edx" @ 616,
        /// Frames of the descriptor table, 16 of 8 bytes.
        GDT_FRAMES = "gdt_frames" @ 4832,
        /// Entries of it, 8 bytes.
        GDT_ENTRIES = "gdt_ents" @ 4960,
        /// Control registers, 8 of 8 bytes; in the second the user page table, bit 0 set if there is one.
        CONTROL = "ctrlreg" @ 4984,
    }
}

impl VcpuContext {
    /// The virtual CPU is online (`VGCF_online`).
    pub const ONLINE: u64 = 1 << 5;
    /// Most entries of a descriptor table (`FIRST_RESERVED_GDT_ENTRY`): the rest of it is the hypervisor's.
    pub const GDT_ENTRIES_MAX: u64 = 14 * 512;
    /// Descriptors on a page.
    pub const GDT_ENTRIES_A_PAGE: u64 = 512;
}

offsets! {
    /// The page a domain shares with the hypervisor.
    SharedInfo = "shared_info_t", 3136 {
        /// Event channels pending, 512 bytes.
        EVENTS_PENDING = "evtchn_pending" @ 2048,
        /// Event channels masked, 512 bytes.
        EVENTS_MASKED = "evtchn_mask" @ 2560,
        /// Frames in the guest's table, 8 bytes.
        MAX_PFN = "arch.max_pfn" @ 3088,
        /// Root of the table in its tree form, 8 bytes.
        FRAME_LIST_LIST = "arch.pfn_to_mfn_frame_list_list" @ 3096,
        /// Page table root under which the table in its list form is found, 8 bytes; 0 if there is none.
        P2M_CR3 = "arch.p2m_cr3" @ 3112,
        /// Address of the list, 8 bytes.
        P2M_VADDR = "arch.p2m_vaddr" @ 3120,
        /// Counts changes of the list's mapping, 8 bytes.
        P2M_GENERATION = "arch.p2m_generation" @ 3128,
    }
}

impl SharedInfo {
    /// Virtual CPUs it has room for (`XEN_LEGACY_MAX_VCPUS`).
    pub const VCPUS: usize = 32;
    /// Bytes of a virtual CPU's part, from the page's start.
    pub const VCPU_BYTES: usize = 64;
    /// In it, which words of pending events to look at, 8 bytes.
    pub const VCPU_PENDING_WORDS: usize = 8;
    /// Bytes of a bitmap of event channels.
    pub const EVENTS_BYTES: usize = 512;
}

offsets! {
    /// What a guest is told at its start and after a resume.
    StartInfo = "start_info_t", 1168 {
        /// Pages it has, 8 bytes.
        NR_PAGES = "nr_pages" @ 32,
        /// Machine address of the shared info page, 8 bytes.
        SHARED_INFO = "shared_info" @ 40,
        /// Flags, 4 bytes.
        FLAGS = "flags" @ 48,
        /// Frame of the page shared with xenstore, 8 bytes.
        STORE_FRAME = "store_mfn" @ 56,
        /// Its event channel, 4 bytes.
        STORE_PORT = "store_evtchn" @ 64,
        /// Frame of the page shared with the console, 8 bytes.
        CONSOLE_FRAME = "console.domU.mfn" @ 72,
        /// Its event channel, 4 bytes.
        CONSOLE_PORT = "console.domU.evtchn" @ 80,
    }
}

abi! {
    /// An entry of a grant table, version 1.
    GrantEntry = "grant_entry_v1_t", 8 {
        /// `GTF_*`.
        flags: u16 = "flags" @ 0,
        /// Who may map the frame.
        domain: u16 = "domid" @ 2,
        /// The frame.
        frame: u32 = "frame" @ 4,
    }
}

abi! {
    /// How large a domain's grant table is (`GNTTABOP_query_size`).
    GrantTableSize = "struct gnttab_query_size", 16 {
        /// Whose.
        domain: u16 = "dom" @ 0,
        /// Zero.
        pad: u16 = "" @ 2,
        /// Pages it has.
        frames: u32 = "nr_frames" @ 4,
        /// Pages it may have.
        most: u32 = "max_nr_frames" @ 8,
        /// 0, or why it is not told.
        status: i16 = "status" @ 12,
        /// Zero.
        pad2: u16 = "" @ 14,
    }
}

abi! {
    /// Which kind of entries it has (`GNTTABOP_get_version`).
    GrantTableVersion = "struct gnttab_get_version", 8 {
        /// Whose.
        domain: u16 = "dom" @ 0,
        /// Zero.
        pad: u16 = "pad" @ 2,
        /// 1: [`GrantEntry`]; 2: twice as long.
        version: u32 = "version" @ 4,
    }
}

impl GrantEntry {
    /// The frame may be mapped (`GTF_permit_access`).
    pub const PERMIT_ACCESS: u16 = 1;
    /// Somebody has it mapped, for reading or for writing (`GTF_reading`, `GTF_writing`).
    pub const IN_USE: u16 = 1 << 3 | 1 << 4;
    /// Entries of a page of a table.
    pub const A_PAGE: usize = 512;
    /// The entry of the console's page (`GNTTAB_RESERVED_CONSOLE`).
    pub const CONSOLE: usize = 0;
    /// The entry of xenstore's page (`GNTTAB_RESERVED_XENSTORE`).
    pub const STORE: usize = 1;
}
