//! Each rule of the specification, broken by hand: the fault is found, and at the right byte.

use std::convert::Infallible;

use super::super::scan::{ScanError, Survey, scan};
use super::super::*;
use super::samples::{self, boundaries, read_all};

fn survey(bytes: &[u8]) -> Survey {
    match scan(bytes, &mut |_| Ok::<(), Infallible>(())) {
        Ok(survey) => survey,
        Err(ScanError::Stream(error)) => panic!("a slice can't fail to be read: {error}"),
    }
}

/// A stream of these bytes behind the headers.
fn stream(guest: u8, version: u8, records: &[Raw<'_>]) -> Vec<u8> {
    let mut out = samples::hvm(1)[..40].to_vec();
    (out[15], out[24]) = (version, guest);
    for (number, body) in records {
        out.extend(number.to_le_bytes());
        out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        out.extend(*body);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// Type and body of a record.
type Raw<'a> = (u32, &'a [u8]);

/// A PAGE_DATA body of one frame without contents.
const PAGE: &[u8] = &[1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0xf0];
const PARAMS: &[u8] = &[0; 8];
const PV: &[u8] = &[8, 4, 0, 0, 0, 0, 0, 0];
const P2M: &[u8] = &[0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];
const SHARED: &[u8] = &[0; 4096];
const BASIC: &[u8] = &[0; 8 + 5168];
const LANES: u32 = 0x5046_0001;
const LANES_DONE: u32 = 0x5046_0002;
/// Version 1, no runs, a guest of five frames.
const ON_LANES: &[u8] =
    &[1, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 5, 0, 0, 0, 0, 0, 0, 0];
const DONE: &[u8] = &[0; 56];

#[test]
fn the_least_streams_are_right() {
    let hvm = stream(2, 3, &[(0x10, &[]), (1, PAGE), (9, &[1]), (10, PARAMS), (0, &[])]);
    read_all(&hvm).unwrap();
    let pv = stream(1, 3, &[(2, PV), (0x10, &[]), (3, P2M), (1, PAGE), (7, SHARED), (4, BASIC), (0, &[])]);
    read_all(&pv).unwrap();
    let done: Raw<'_> = (LANES_DONE, DONE);
    let ferried = stream(2, 3, &[(0x10, &[]), (LANES, ON_LANES), done, (9, &[1]), (10, PARAMS), (0, &[])]);
    read_all(&ferried).unwrap();
    for bytes in [hvm, pv, ferried] {
        let survey = survey(&bytes);
        assert!(survey.complete && survey.faults.is_empty(), "{:?}", survey.faults);
    }
}

#[test]
fn records_out_of_order_are_named() {
    let shared: &[Raw<'static>] = &[(7, SHARED), (4, BASIC), (0, &[])];
    let hvm_end: &[Raw<'static>] = &[(9, &[1]), (10, PARAMS), (0, &[])];
    let with = |first: &[Raw<'static>], rest: &[Raw<'static>]| [first, rest].concat();
    let cases: Vec<(u8, u8, Vec<Raw<'_>>, &str)> = vec![
        (2, 3, with(&[(1, PAGE)], hvm_end), "PAGE_DATA comes before STATIC_DATA_END"),
        (2, 3, with(&[(8, &[0; 24])], hvm_end), "X86_TSC_INFO comes before STATIC_DATA_END"),
        (2, 3, with(&[(0x10, &[]), (0x10, &[])], hvm_end), "STATIC_DATA_END comes a second time"),
        (2, 3, with(&[(0x10, &[]), (0x12, &[0; 16])], hvm_end), "X86_MSR_POLICY comes after STATIC_DATA_END"),
        (2, 3, with(&[(0x10, &[]), (13, &[])], hvm_end), "VERIFY comes before PAGE_DATA"),
        (2, 3, with(&[(0x10, &[]), (3, P2M)], hvm_end), "P2M_FRAMES does not belong into an HVM"),
        (2, 3, with(&[(0x10, &[]), (14, &[])], hvm_end), "CHECKPOINT does not belong"),
        (2, 3, with(&[(0x10, &[]), (11, &[])], hvm_end), "TOOLSTACK does not belong"),
        (2, 3, with(&[(0x10, &[]), (0x13, &[])], hvm_end), "0x00000013 is mandatory and unknown"),
        (2, 3, vec![(0x10, &[]), (1, PAGE), (9, &[1]), (0, &[])], "ends without HVM_PARAMS"),
        (2, 3, vec![(0x10, &[]), (1, PAGE), (10, PARAMS), (0, &[])], "ends without HVM_CONTEXT"),
        (2, 3, vec![(0x10, &[]), (9, &[1]), (10, PARAMS), (0, &[])], "ends without PAGE_DATA"),
        (2, 3, vec![(0x10, &[]), (1, PAGE), (9, &[1]), (9, &[1])], "HVM_CONTEXT comes a second time"),
        (2, 2, with(&[(0x10, &[])], hvm_end), "STATIC_DATA_END does not belong into a stream of version 2"),
        (2, 2, with(&[(0x11, &[0; 24])], hvm_end), "X86_CPUID_POLICY does not belong"),
        (1, 3, with(&[(0x10, &[])], shared), "STATIC_DATA_END comes before X86_PV_INFO"),
        (1, 3, with(&[(2, PV), (2, PV)], shared), "X86_PV_INFO comes a second time"),
        (1, 3, with(&[(2, PV), (0x10, &[]), (1, PAGE)], shared), "PAGE_DATA comes before X86_PV_P2M_FRAMES"),
        (
            1,
            3,
            with(&[(2, PV), (0x10, &[]), (3, P2M), (4, BASIC)], shared),
            "VCPU_BASIC comes before PAGE_DATA",
        ),
        (1, 3, with(&[(2, PV), (0x10, &[]), (9, &[1])], shared), "HVM_CONTEXT does not belong into a PV"),
        (
            1,
            3,
            with(&[(2, PV), (0x10, &[]), (3, P2M), (1, PAGE), (3, P2M)], shared),
            "P2M_FRAMES comes after PAGE_DATA",
        ),
        (
            1,
            3,
            with(&[(2, PV), (0x10, &[]), (3, P2M), (1, PAGE), (4, BASIC), (1, PAGE)], shared),
            "PAGE_DATA comes after X86_PV_VCPU_BASIC",
        ),
        (
            1,
            3,
            with(&[(2, PV), (0x10, &[]), (3, P2M), (1, PAGE), (4, BASIC)], shared),
            "VCPU_BASIC comes a second time for virtual CPU 0",
        ),
        (1, 2, with(&[(3, P2M)], shared), "P2M_FRAMES comes before X86_PV_INFO"),
        (2, 3, with(&[(LANES, ON_LANES)], hvm_end), "LANES comes before STATIC_DATA_END"),
        (2, 3, with(&[(0x10, &[]), (LANES_DONE, DONE)], hvm_end), "LANES_DONE comes before LANES"),
        (2, 3, with(&[(0x10, &[]), (LANES, ON_LANES)], hvm_end), "ends without LANES_DONE"),
        (2, 3, with(&[(0x10, &[]), (LANES, ON_LANES), (1, PAGE)], hvm_end), "PAGE_DATA comes after LANES"),
        (2, 3, with(&[(0x10, &[]), (LANES, ON_LANES), (13, &[])], hvm_end), "VERIFY comes after LANES"),
        (
            2,
            3,
            with(&[(0x10, &[]), (1, PAGE), (13, &[]), (LANES, ON_LANES)], hvm_end),
            "LANES comes after VERIFY",
        ),
        (
            2,
            3,
            with(&[(0x10, &[]), (LANES, ON_LANES), (LANES, ON_LANES)], hvm_end),
            "LANES comes a second time",
        ),
        (2, 2, with(&[(LANES, ON_LANES)], hvm_end), "LANES does not belong into a stream of version 2"),
        (
            1,
            3,
            with(&[(2, PV), (0x10, &[]), (3, P2M), (LANES, ON_LANES)], shared),
            "LANES does not belong into a PV",
        ),
    ];
    for (guest, version, records, expected) in cases {
        let bytes = stream(guest, version, &records);
        let error = read_all(&bytes).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}, not {expected}");
        assert!(
            boundaries(&bytes).iter().any(|&start| error.offset == u64::try_from(start).unwrap()
                || error.offset == u64::try_from(start).unwrap() + 8),
            "{error} is at no record"
        );
        let found = survey(&bytes).faults;
        assert!(found.iter().any(|found| found.fault.contains(expected)), "{found:?}");
    }
}

/// A right stream, the place and the bytes to overwrite, the place of the fault, words of it.
type Bent<'a> = (&'a [u8], usize, &'a [u8], usize, &'a str);

/// Overwrites bytes of a right stream and says at which byte the fault is to be found.
#[test]
fn wrong_fields_are_named_by_their_byte() {
    let hvm = samples::hvm(3);
    let pv = samples::pv(3);
    let (h, p) = (boundaries(&hvm), boundaries(&pv));
    let cases: Vec<Bent<'_>> = vec![
        (&hvm, 0, &[0], 0, "no xl, libxl or libxc stream"),
        (&hvm, 8, &[0], 8, "id"),
        (&hvm, 15, &[4], 12, "version"),
        (&hvm, 15, &[1], 12, "version"),
        (&hvm, 17, &[1], 16, "big-endian"),
        (&hvm, 17, &[2], 16, "reserved"),
        (&hvm, 21, &[1], 21, "reserved"),
        (&hvm, 24, &[3], 24, "type"),
        (&hvm, 28, &[13], 28, "page shift"),
        (&hvm, 30, &[1], 30, "reserved"),
        (&hvm, h[0] + 4, &[47], h[0] + 4, "X86_CPUID_POLICY has a body of 47 bytes"),
        (&hvm, h[2] + 4, &[8], h[2] + 4, "STATIC_DATA_END has a body of 8"),
        (&hvm, h[3] + 7, &[0x10], h[3] + 4, "length"),
        (&hvm, h[4] + 8, &[0], h[4] + 8, "count"),
        (&hvm, h[4] + 8, &[0xff, 0xff], h[4] + 8, "number of frames"),
        (&hvm, h[4] + 8, &[2], h[4] + 4, "contents"),
        (&hvm, h[4] + 12, &[1], h[4] + 12, "reserved"),
        (&hvm, h[4] + 16 + 6, &[0x10], h[4] + 16, "reserved"),
        (&hvm, h[4] + 24 + 7, &[0x50], h[4] + 24, "reserved page type"),
        (&hvm, h[4] + 32 + 7, &[0x10], h[4] + 32, "page table"),
        (&hvm, h[4] + 24, &[0], h[4] + 16, "twice"),
        (&hvm, h[4] + 16 + 5, &[1], h[4] + 16, "frame number"),
        (&hvm, h[8] + 28, &[1], h[8] + 28, "reserved"),
        (&hvm, h[9] + 8 + 1001, &[1], h[9] + 8 + 1001, "padding"),
        (&hvm, h[10] + 8, &[3], h[10] + 8, "3 parameters"),
        (&hvm, h[10] + 12, &[3], h[10] + 12, "reserved"),
        (&pv, p[0] + 8, &[4], p[0] + 8, "width and levels"),
        (&pv, p[0] + 11, &[4], p[0] + 10, "reserved"),
        (&pv, p[3] + 12, &[0, 4], p[3] + 16, "take 3 frames"),
        (&pv, p[3] + 8, &[0, 5], p[3] + 12, "last pfn"),
        (&pv, p[3] + 16 + 6, &[5], p[3] + 16, "frame number"),
        (&pv, p[8] + 8 + 2, &[1], p[8] + 8, "virtual CPU"),
        (&pv, p[8] + 12, &[1], p[8] + 12, "reserved"),
    ];
    for (right, at, bytes, offset, words) in cases {
        let mut broken = right.to_vec();
        broken[at..at + bytes.len()].copy_from_slice(bytes);
        let Err(error) = read_all(&broken) else { panic!("{words} at byte {at} was let pass") };
        assert_eq!(error.offset, u64::try_from(offset).unwrap(), "{error}, for {words}");
        assert!(error.to_string().contains(words), "{error}, not {words}");
        let found = survey(&broken).faults;
        assert!(!found.is_empty(), "{words} was let pass by the survey");
    }
}

/// A survey goes on behind a fault and names the next ones too.
#[test]
fn several_faults_are_all_named() {
    let mut bytes = samples::hvm(3);
    let at = boundaries(&bytes);
    bytes[at[4] + 12] = 1;
    bytes[at[8] + 28] = 1;
    bytes[at[9] + 8 + 1001] = 1;
    bytes.push(0);
    let survey = survey(&bytes);
    let found: Vec<_> = survey.faults.iter().map(|found| usize::try_from(found.offset).unwrap()).collect();
    assert_eq!(found, [at[4] + 12, at[8] + 28, at[9] + 8 + 1001, bytes.len() - 1]);
    assert!(survey.complete);
}

#[test]
fn framing_is_found_out_and_its_offsets_are_the_files() {
    let libxc = samples::hvm(2);
    let file = samples::xl_file(&libxc, true);
    let right = survey(&file);
    assert_eq!(right.framing, ["xl", "libxl", "libxc"]);
    assert!(right.complete && right.faults.is_empty(), "{:?}", right.faults);
    assert_eq!(right.pages.entries, 2 + 4 + 1);
    assert_eq!(right.pages.with_contents, 2 + 1 + 1);
    assert_eq!((right.version, right.guest, right.xen.as_deref()), (Some(3), Some("HVM"), Some("4.17")));
    assert_eq!(right.bytes, u64::try_from(file.len()).unwrap());

    let inside = file.windows(8).position(|bytes| bytes == [0xff; 8]).unwrap();
    let emulator = inside + libxc.len();
    let cases = [
        (inside + boundaries(&libxc)[8] + 28, 1, inside + boundaries(&libxc)[8] + 28, "reserved"),
        (emulator, 9, emulator, "0x00000009 is mandatory and unknown"),
        (emulator + 8, 7, emulator + 8, "emulator's kind"),
        (emulator + 16, 0, emulator + 16, "pairs of strings"),
        (emulator + 4, 1, emulator + 4, "at least 8"),
        (emulator + 7, 0x7f, emulator + 4, "length"),
    ];
    for (at, value, offset, words) in cases {
        let mut broken = file.clone();
        broken[at] = value;
        let found = survey(&broken).faults;
        let named = |found: &scan::Found| {
            found.offset == u64::try_from(offset).unwrap() && found.fault.contains(words)
        };
        assert!(found.iter().any(named), "{words} at {offset} is not among {found:?}");
    }
    let cut = survey(&file[..file.len() - 8]);
    assert!(!cut.complete && cut.faults[0].fault.contains("without an END"), "{:?}", cut.faults);
}

/// libxl's reader hands the descriptor over to libxc's and takes it back.
#[test]
fn libxls_reader_stops_behind_its_end() {
    let file = samples::xl_file(&samples::pv(2), true);
    let (header, behind) = XlHeader::read(&file[..], 0).unwrap();
    assert!(header.libxl && header.config.starts_with(b"{"));
    let mut rest = file[usize::try_from(behind).unwrap()..].to_vec();
    rest.extend(b"more");
    let mut reader = LibxlReader::start(&rest[..], behind).unwrap();
    assert_eq!(reader.next_record().unwrap(), LibxlRecord::LibxcContext);
    let mut libxc = reader.libxc().unwrap();
    loop {
        match libxc.next_record().unwrap() {
            Record::End => break,
            Record::PageData => libxc.skip_pages().unwrap(),
            _ => {}
        }
    }
    let offset = libxc.offset();
    reader.libxc_read(offset);
    assert!(matches!(reader.next_record().unwrap(), LibxlRecord::EmulatorXenstoreData { .. }));
    assert!(matches!(reader.next_record().unwrap(), LibxlRecord::EmulatorContext { .. }));
    assert_eq!(reader.next_record().unwrap(), LibxlRecord::End);
    assert_eq!(reader.offset(), u64::try_from(file.len()).unwrap());
    assert_eq!(reader.into_inner(), b"more");
}

/// The writer keeps to the rules it is read by.
#[test]
fn the_writer_refuses_what_a_reader_would() {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let start = || Writer::start(Vec::new(), domain).unwrap();
    let page = [PageEntry::new(mover::units::Pfn(1), PageType::Invalid)];
    let twice = [page[0], page[0]];
    let table = [PageEntry::new(mover::units::Pfn(1), PageType::Table { level: 1, pinned: false })];
    assert!(start().page_data(&page, &[]).is_err());
    assert!(start().pv_info(PvWidth::Bits64).is_err());
    assert!(start().end().is_err());
    assert!(start().optional(5, &[]).is_err());
    assert!(start().cpuid_policy(&[0; 23]).is_err());
    let mut writer = start();
    writer.static_data_end().unwrap();
    assert!(writer.page_data(&twice, &[]).is_err());
    assert!(writer.page_data(&table, &[std::io::IoSlice::new(&[0; 4096])]).is_err());
    assert!(writer.page_data(&[], &[]).is_err());
    assert!(writer.page_data(&samples::normal(0..1025), &[]).is_err());
    assert!(writer.page_data(&samples::normal(0..2), &[std::io::IoSlice::new(&[0; 4096])]).is_err());
    assert!(writer.hvm_context(&[]).is_err());
    let mut full: Vec<u8> = vec![0; 60];
    let mut writer = Writer::start(&mut full[..], domain).unwrap();
    let error = writer.static_data_end().and_then(|()| writer.page_data(&page, &[])).unwrap_err();
    assert!(error.is_io() && error.offset == 60, "{error}");
}

/// What is wrong within the records of our own, by its byte.
#[test]
fn lanes_that_can_not_be_are_named() {
    let whole = |lanes: &[u8], done: &[u8]| {
        let records: &[Raw<'_>] =
            &[(0x10, &[]), (LANES, lanes), (LANES_DONE, done), (9, &[1]), (10, PARAMS), (0, &[])];
        stream(2, 3, records)
    };
    let runs = |count: u8, numbers: &[[u64; 2]]| {
        let mut body = ON_LANES.to_vec();
        body[4] = count;
        numbers.iter().flatten().for_each(|number| body.extend(number.to_le_bytes()));
        body
    };
    let changed = |at: usize, byte: u8| {
        let mut body = ON_LANES.to_vec();
        body[at] = byte;
        body
    };
    let ascend = "do not ascend within its frames";
    read_all(&whole(&runs(2, &[[0, 2], [3, 2]]), DONE)).unwrap();
    for (lanes, at, words) in [
        (changed(0, 2), 0, "LANES is 0x2"),
        (changed(2, 1), 2, "reserved bits of LANES"),
        (changed(24, 0), 24, "frames is 0"),
        (changed(31, 1), 24, "the limit here is"),
        (changed(4, 1), 4, "its 1 runs take 48"),
        (runs(1, &[[0, 6]]), 32, ascend),
        (runs(1, &[[0, 0]]), 32, ascend),
        (runs(1, &[[u64::MAX, 2]]), 32, ascend),
        (runs(2, &[[0, 2], [2, 2]]), 48, ascend),
        (runs(2, &[[3, 1], [0, 2]]), 48, ascend),
    ] {
        let error = read_all(&whole(&lanes, DONE)).expect_err(words);
        // Headers, STATIC_DATA_END, and the record's own header.
        assert_eq!(error.offset, 40 + 8 + 8 + at, "{error}");
        assert!(error.to_string().contains(words), "{error}, not {words}");
    }
    let mut done = DONE.to_vec();
    done[21] = 1;
    let error = read_all(&whole(ON_LANES, &done)).unwrap_err();
    assert!(error.to_string().contains("reserved bits of LANES_DONE"), "{error}");
}

#[test]
fn records_of_our_own_are_listed_in_words() {
    let mut lines = Vec::new();
    let survey = scan(&samples::ferried(2)[..], &mut |item| {
        lines.push(format!("{} {}", item.name, item.detail));
        Ok::<(), Infallible>(())
    })
    .unwrap();
    assert!(survey.faults.is_empty(), "{:?}", survey.faults);
    for line in [
        "OFFER 2 lanes under TLS at 10.77.0.1:40000, [fd00::1]:40000",
        "LANES 90 frames with memory in 2 runs, all below 0x68",
        "LANES_DONE 9 frames on the lanes, up to version 8, round 3",
    ] {
        assert!(lines.iter().any(|found| found == line), "{lines:#?} have no {line}");
    }
}
