//! The most a stream may ask for. Every length and number from a stream is held against one of these before
//! anything is read or allocated for it, and memory grows only with bytes that have arrived.
#![forbid(unsafe_code)]

/// Longest body of any libxc record, bytes (`REC_LENGTH_MAX` of `xg_sr_stream_format.h`).
pub const RECORD_BYTES_MAX: u32 = 128 << 20;
/// Most frames one PAGE_DATA record may name when it is read. Stock savers put up to 1,024 in one; with contents a
/// record of the longest length holds 32,704.
pub const PAGES_READ_MAX: u32 = 32_768;
/// Most frames one PAGE_DATA record names when it is written here: stock's own batch (`MAX_BATCH_SIZE`).
pub const PAGES_WRITTEN_MAX: usize = 1024;
/// First frame number that no guest has: 52 bits of physical address.
pub const PFN_END: u64 = 1 << 40;
/// Most frames of a PV guest's P2M: what 32-bit frame numbers can name with 512 entries a frame.
pub const P2M_FRAMES_MAX: u32 = 1 << 23;
/// First virtual CPU number that no PV guest has (`MAX_VIRT_CPUS` of Xen).
pub const VCPU_END: u32 = 8192;
/// Longest extended state of a virtual CPU, bytes. AMX takes it to about 11 KiB.
pub const XSAVE_BYTES_MAX: u32 = 64 << 10;
/// Most model-specific registers of a virtual CPU.
pub const VCPU_MSRS_MAX: u32 = 4096;
/// Longest HVM context, bytes. 128 virtual CPUs take some 2 MiB.
pub const HVM_CONTEXT_BYTES_MAX: u32 = 16 << 20;
/// Most HVM parameters in a record. Xen 4.20 has 39.
pub const HVM_PARAMS_MAX: u32 = 1024;
/// Most leaves of a CPUID policy, or entries of an MSR policy. Xen 4.20 has under 200.
pub const POLICY_ENTRIES_MAX: u32 = 4096;
/// Longest body of an optional record that is handed to the caller, bytes; a longer one is skipped.
pub const OPTIONAL_BYTES_MAX: u32 = 64 << 10;
/// Most addresses of an offer.
pub const OFFER_ADDRESSES_MAX: usize = 16;
/// Longest address of an offer, in bytes: a host's name and a port.
pub const OFFER_ADDRESS_BYTES_MAX: usize = 280;
/// Most runs of frames that LANES may name.
pub const RUNS_MAX: usize = 1 << 16;
/// Longest text of a disk in FROZEN_DISKS, bytes: its name, path or identity; as in a handshake.
pub const DISK_TEXT_BYTES_MAX: usize = 2048;
/// Most bytes of FROZEN_DISKS' disks: 16 of them with texts of the longest length.
pub const FROZEN_DISKS_BYTES_MAX: u32 = 16 * (14 + 3 * 2048);
/// Most references in a record that is read.
pub const REFERENCES_READ_MAX: u32 = 32_768;
/// Most references in a record that is written.
pub const REFERENCES_WRITTEN_MAX: usize = 4096;
/// Longest emulator state or emulator's xenstore data in a libxl stream, bytes. QEMU's is some 100 KiB.
pub const EMULATOR_BYTES_MAX: u32 = 64 << 20;
/// Longest optional data behind xl's file header, bytes: the domain's configuration, some kilobytes.
pub const XL_DATA_BYTES_MAX: u32 = 16 << 20;
/// Faults kept of one stream when it is verified; those behind are counted.
pub const FAULTS_KEPT_MAX: usize = 1000;
/// Bytes by which a buffer grows while a body arrives.
pub(crate) const GROWTH_BYTES: usize = 64 << 10;
