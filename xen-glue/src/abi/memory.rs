//! Memory operations (`memory.h`), HVM parameters (`hvm/hvm_op.h`), page table operations (`xen.h`) and the ioctls of
//! `/dev/xen/privcmd`, `/dev/xen/evtchn` and `/dev/xen/gntdev` (`sys/privcmd.h`, `sys/evtchn.h`, `sys/gntdev.h` of Xen; the
//! kernel's own are the same).
#![forbid(unsafe_code)]

use super::layout::abi;

/// Hypercall numbers (`__HYPERVISOR_*` of `xen.h`).
pub(super) mod hypercall {
    pub(in super::super) const MEMORY_OP: u64 = 12;
    pub(in super::super) const XEN_VERSION: u64 = 17;
    pub(in super::super) const GRANT_TABLE_OP: u64 = 20;
    pub(in super::super) const MMUEXT_OP: u64 = 26;
    pub(in super::super) const HVM_OP: u64 = 34;
    pub(in super::super) const DOMCTL: u64 = 36;
}

/// Memory operations (`XENMEM_*`).
pub(super) mod operation {
    pub(in super::super) const DECREASE_RESERVATION: u64 = 1;
    pub(in super::super) const MAXIMUM_RAM_PAGE: u64 = 2;
    pub(in super::super) const MACHPHYS_MFN_LIST: u64 = 5;
    pub(in super::super) const POPULATE_PHYSMAP: u64 = 6;
    pub(in super::super) const MAXIMUM_GPFN: u64 = 14;
    pub(in super::super) const PAGING_OP: u64 = 20;
    pub(in super::super) const CLAIM_PAGES: u64 = 24;
}

/// `HVMOP_set_param`, `HVMOP_get_param`.
pub(super) mod hvm {
    pub(in super::super) const SET_PARAM: u64 = 0;
    pub(in super::super) const GET_PARAM: u64 = 1;
}

abi! {
    /// Memory of a domain (`XENMEM_populate_physmap`).
    Reservation = "struct xen_memory_reservation", 32 {
        /// First frames of the extents; on return where they came to stand, for PV machine frames.
        extents: u64 = "extent_start" @ 0,
        /// How many.
        count: u64 = "nr_extents" @ 8,
        /// Each is `1 << order` pages.
        order: u32 = "extent_order" @ 16,
        /// `XENMEMF_*`.
        flags: u32 = "mem_flags" @ 20,
        /// Whose.
        domain: u16 = "domid" @ 24,
        /// Zero.
        pad: [u16; 3] = "" @ 26,
    }
}

abi! {
    /// The machine-to-physical table's own frames (`XENMEM_machphys_mfn_list`).
    MachphysList = "struct xen_machphys_mfn_list", 24 {
        /// Room in the list.
        room: u32 = "max_extents" @ 0,
        /// Zero.
        pad: u32 = "" @ 4,
        /// The list: machine frames, each of 2 MiB of the table.
        extents: u64 = "extent_start" @ 8,
        /// How many were written.
        count: u32 = "nr_extents" @ 16,
        /// Zero.
        pad2: u32 = "" @ 20,
    }
}

abi! {
    /// A parameter of an HVM guest.
    HvmParam = "struct xen_hvm_param", 16 {
        /// Whose.
        domain: u16 = "domid" @ 0,
        /// Zero.
        pad: u16 = "pad" @ 2,
        /// Which.
        index: u32 = "index" @ 4,
        /// Its value.
        value: u64 = "value" @ 8,
    }
}

abi! {
    /// A page table operation.
    MmuextOp = "struct mmuext_op", 24 {
        /// What to do: 0 to 3 pin a table of level 1 to 4.
        command: u32 = "cmd" @ 0,
        /// Zero.
        pad: u32 = "" @ 4,
        /// The table's machine frame.
        frame: u64 = "arg1.mfn" @ 8,
        /// Not used here.
        second: u64 = "arg2" @ 16,
    }
}

abi! {
    /// A hypercall through privcmd.
    PrivcmdHypercall = "privcmd_hypercall_t", 48 {
        /// Its number.
        op: u64 = "op" @ 0,
        /// Its arguments.
        arguments: [u64; 5] = "arg" @ 8,
    }
}

abi! {
    /// Maps frames of another domain, each anywhere (`IOCTL_PRIVCMD_MMAPBATCH_V2`).
    PrivcmdMmapBatch = "privcmd_mmapbatch_v2_t", 32 {
        /// How many.
        count: u32 = "num" @ 0,
        /// Whose.
        domain: u16 = "dom" @ 4,
        /// Zero.
        pad: u16 = "" @ 6,
        /// Where to, in this process.
        address: u64 = "addr" @ 8,
        /// Frame numbers.
        frames: u64 = "arr" @ 16,
        /// An `int` a frame: 0 or a negative errno.
        errors: u64 = "err" @ 24,
    }
}

abi! {
    /// Maps a resource of another domain (`IOCTL_PRIVCMD_MMAP_RESOURCE`).
    PrivcmdMmapResource = "privcmd_mmap_resource_t", 32 {
        /// Whose.
        domain: u16 = "dom" @ 0,
        /// Zero.
        pad: u16 = "" @ 2,
        /// Kind: 1 is the grant table.
        kind: u32 = "type" @ 4,
        /// Which of the kind.
        id: u32 = "id" @ 8,
        /// First frame.
        first: u32 = "idx" @ 12,
        /// Frames.
        count: u64 = "num" @ 16,
        /// Where to, in this process.
        address: u64 = "addr" @ 24,
    }
}

abi! {
    /// Binds a port to another domain's (`IOCTL_EVTCHN_BIND_INTERDOMAIN`).
    EvtchnBindInterdomain = "struct ioctl_evtchn_bind_interdomain", 8 {
        /// The other domain.
        domain: u32 = "remote_domain" @ 0,
        /// Its port.
        port: u32 = "remote_port" @ 4,
    }
}

abi! {
    /// One grant of another domain's.
    GntdevGrantRef = "struct ioctl_gntdev_grant_ref", 8 {
        /// Whose.
        domain: u32 = "domid" @ 0,
        /// Its entry in that domain's table.
        reference: u32 = "ref" @ 4,
    }
}

abi! {
    /// Names grants that the next `mmap` at `index` maps (`IOCTL_GNTDEV_MAP_GRANT_REF`); more of them follow the first.
    GntdevMapGrantRef = "struct ioctl_gntdev_map_grant_ref", 24 {
        /// How many.
        count: u32 = "count" @ 0,
        /// Zero.
        pad: u32 = "pad" @ 4,
        /// On return the offset for `mmap`, in bytes.
        index: u64 = "index" @ 8,
        /// The first.
        first: [u32; 2] = "refs" @ 16,
    }
}

abi! {
    /// Forgets them (`IOCTL_GNTDEV_UNMAP_GRANT_REF`).
    GntdevUnmapGrantRef = "struct ioctl_gntdev_unmap_grant_ref", 16 {
        /// The offset.
        index: u64 = "index" @ 0,
        /// How many.
        count: u32 = "count" @ 8,
        /// Zero.
        pad: u32 = "pad" @ 12,
    }
}

abi! {
    /// Names a port (`IOCTL_EVTCHN_NOTIFY`, `IOCTL_EVTCHN_UNBIND`).
    EvtchnPort = "struct ioctl_evtchn_notify", 4 {
        /// The port.
        port: u32 = "port" @ 0,
    }
}
