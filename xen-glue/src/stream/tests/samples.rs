//! Streams to test with, made by the writer.

use std::io::IoSlice;

use mover::disk::DiskInfo;
use mover::fingerprint::Check;
use mover::units::{BlockAddress, DiskId, Pfn, Sector};
use mover::wire::hello::Secret;

use super::super::*;

/// What a page of a sample holds.
pub(crate) fn page(pfn: u64) -> [u8; 4096] {
    let mut out = [0; 4096];
    for (place, byte) in out.iter_mut().enumerate() {
        *byte = u8::try_from((pfn.wrapping_mul(31) + u64::try_from(place).unwrap() / 8) % 251).unwrap();
    }
    out
}

/// Contents of `entries`, one after the other.
pub(crate) fn contents(entries: &[PageEntry]) -> Vec<u8> {
    entries.iter().filter(|entry| entry.has_data()).flat_map(|entry| page(entry.pfn().0)).collect()
}

pub(crate) const TSC: TscInfo = TscInfo { mode: 2, khz: 2_400_000, nsec: 123_456_789_012, incarnation: 3 };

pub(crate) fn normal(pfns: std::ops::Range<u64>) -> Vec<PageEntry> {
    pfns.map(|pfn| PageEntry::new(Pfn(pfn), PageType::Normal)).collect()
}

fn mixed() -> Vec<PageEntry> {
    let types = [PageType::AllocateOnly, PageType::Broken, PageType::Normal, PageType::Invalid];
    types.into_iter().zip(100..).map(|(page_type, pfn)| PageEntry::new(Pfn(pfn), page_type)).collect()
}

fn tables() -> Vec<PageEntry> {
    let types = (1..=4).flat_map(|level| [false, true].map(|pinned| PageType::Table { level, pinned }));
    types.zip(200..).map(|(page_type, pfn)| PageEntry::new(Pfn(pfn), page_type)).collect()
}

fn send<W: std::io::Write>(writer: &mut Writer<W>, entries: &[PageEntry]) {
    let contents = contents(entries);
    let slices: Vec<_> = contents.chunks(3000).map(IoSlice::new).collect();
    writer.page_data(entries, &slices).unwrap();
}

/// An HVM guest's stream of `pages` pages and a few special ones, with an optional record and a verification pass.
pub(crate) fn hvm(pages: u64) -> Vec<u8> {
    hvm_with(pages, true)
}

/// As [`hvm`], with or without the optional record, which Xen's own verifier does not let pass.
pub(crate) fn hvm_with(pages: u64, optional: bool) -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.cpuid_policy(&[7; 48]).unwrap();
    writer.msr_policy(&[8; 32]).unwrap();
    writer.static_data_end().unwrap();
    if optional {
        writer.optional(OPTIONAL | 0x50001, b"an offer").unwrap();
    }
    send(&mut writer, &normal(0..pages));
    send(&mut writer, &mixed());
    writer.verify().unwrap();
    send(&mut writer, &normal(0..1));
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 1001]).unwrap();
    writer
        .hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }, HvmParam { index: 17, value: 5 }])
        .unwrap();
    writer.end().unwrap()
}

/// An HVM guest's stream of `pages` pages, of which the rest comes on lanes.
pub(crate) fn ferried(pages: u64) -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.cpuid_policy(&[7; 48]).unwrap();
    writer.static_data_end().unwrap();
    writer.optional(OFFER, &offer().encode()).unwrap();
    send(&mut writer, &normal(0..pages));
    let populated = vec![0..60, 70..100];
    writer.lanes(&Lanes { migration: offer().migration, pages: 104, populated }).unwrap();
    writer.lanes_done(&LanesDone { frames: 9, version: 8, round: 3, digest: [0x77; 32] }).unwrap();
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 1001]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    writer.end().unwrap()
}

/// An HVM or PV guest's stream of `pages` pages, of which as many again stand on disks.
pub(crate) fn frozen(guest: GuestType, pages: u64) -> Vec<u8> {
    let mut writer = Writer::start(Vec::new(), DomainHeader { guest, xen_major: 4, xen_minor: 17 }).unwrap();
    if guest == GuestType::Pv {
        writer.pv_info(PvWidth::Bits64).unwrap();
    }
    writer.cpuid_policy(&[7; 48]).unwrap();
    writer.static_data_end().unwrap();
    if guest == GuestType::Pv {
        writer.p2m_frames(&P2mFrames { start: 0, end: 1023, frames: vec![40, 41] }).unwrap();
    }
    let disk = |name: &str, bytes| DiskInfo {
        name: name.to_owned(),
        path: format!("/nowhere/{name}"),
        bytes,
        identity: "pf1 wwid=- blocks=0:00000000000000aa".to_owned(),
    };
    let disks = vec![disk("xvda", 1 << 20), disk("xvdb", 8192)];
    writer.frozen_disks(&FrozenDisks { key: Secret::of(&[3; 32]), disks }).unwrap();
    send(&mut writer, &normal(0..pages));
    let left: Vec<_> =
        (pages..2 * pages).map(|pfn| PageEntry::new(Pfn(pfn), PageType::AllocateOnly)).collect();
    writer.page_data(&left, &[]).unwrap();
    let reference = |pfn: u64| Reference {
        pfn: Pfn(pfn),
        block: BlockAddress { disk: DiskId(u8::from(pfn.is_multiple_of(2))), sector: Sector(pfn % 8) },
        check: Check([0x77; 16]),
    };
    let (one, rest): (Vec<_>, Vec<_>) = (pages..2 * pages).map(reference).partition(|r| r.pfn.0 == pages);
    writer.references(&one).unwrap();
    writer.references(&rest).unwrap();
    writer.tsc_info(TSC).unwrap();
    match guest {
        GuestType::Hvm => {
            writer.hvm_context(&[9; 1001]).unwrap();
            writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
        }
        GuestType::Pv => {
            writer.shared_info(&page(1)).unwrap();
            writer.vcpu(VcpuKind::Basic, 0, &[1; 5168]).unwrap();
        }
    }
    writer.end().unwrap()
}

/// The offer of [`ferried`].
pub(crate) fn offer() -> Offer {
    let addresses = vec!["10.77.0.1:40000".to_owned(), "[fd00::1]:40000".to_owned()];
    Offer { migration: [5; 16], token: [6; 32], lanes: 2, fingerprint: Some([4; 32]), addresses }
}

/// A PV guest's stream of `pages` pages, page tables and two virtual CPUs.
pub(crate) fn pv(pages: u64) -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Pv, xen_major: 4, xen_minor: 20 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.pv_info(PvWidth::Bits64).unwrap();
    writer.cpuid_policy(&[7; 24]).unwrap();
    writer.static_data_end().unwrap();
    writer.p2m_frames(&P2mFrames { start: 0, end: 1023, frames: vec![40, 41] }).unwrap();
    send(&mut writer, &normal(0..pages));
    send(&mut writer, &tables());
    writer.tsc_info(TSC).unwrap();
    writer.shared_info(&page(1)).unwrap();
    for vcpu in 0..2 {
        writer.vcpu(VcpuKind::Basic, vcpu, &[1; 5168]).unwrap();
        writer.vcpu(VcpuKind::Extended, vcpu, &[2; 128]).unwrap();
        writer.vcpu(VcpuKind::Xsave, vcpu, &[3; 835]).unwrap();
        writer.vcpu(VcpuKind::Msrs, vcpu, &[4; 32]).unwrap();
    }
    writer.end().unwrap()
}

/// A file as `xl save` writes it, around `libxc`. Xen's own verifier can't read xenstore data under Python 3, so those
/// can be left out.
pub(crate) fn xl_file(libxc: &[u8], xenstore: bool) -> Vec<u8> {
    let emulator = Emulator { id: 2, index: 0 };
    let mut out = XlHeader { json: true, libxl: true, config: b"{\"name\":\"one\"}".to_vec() }.encode();
    out.extend(libxl_header());
    out.extend(LibxlRecord::LibxcContext.encode());
    out.extend(libxc);
    if xenstore {
        let data = b"physmap/1/start_addr\0f0000000\0".to_vec();
        out.extend(LibxlRecord::EmulatorXenstoreData { emulator, data }.encode());
    }
    out.extend(LibxlRecord::EmulatorContext { emulator, data: vec![0x51; 77] }.encode());
    out.extend(LibxlRecord::End.encode());
    out
}

/// How many cases a test that makes them up tries: as many as it usually does, or `PAGEFERRY_STREAM_CASES`.
pub(crate) fn cases(usual: usize) -> usize {
    std::env::var("PAGEFERRY_STREAM_CASES").map_or(usual, |number| number.parse().expect("a number of cases"))
}

/// Where the records of a libxc stream begin, its end included.
pub(crate) fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let mut out = vec![IMAGE_HEADER_BYTES + DOMAIN_HEADER_BYTES];
    while let Some(head) = bytes.get(*out.last().unwrap()..).and_then(|rest| rest.get(4..8)) {
        let length = usize::try_from(u32::from_le_bytes(head.try_into().unwrap())).unwrap();
        out.push(out.last().unwrap() + 8 + length.next_multiple_of(8));
    }
    out
}

/// Reads a libxc stream to its end, as a restore would, dropping what it says.
pub(crate) fn read_all(bytes: &[u8]) -> Result<(), StreamError> {
    let mut reader = Reader::start(bytes, 0)?;
    loop {
        match reader.next_record()? {
            Record::End => return Ok(()),
            Record::PageData => reader.skip_pages()?,
            _ => {}
        }
    }
}
