//! What is written is what the specification says, and is read back as it was.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};

use super::super::*;
use super::samples::{self, contents, normal};

/// Reads a stream to its end, and names each record.
fn names(bytes: &[u8]) -> Vec<String> {
    let mut reader = Reader::start(bytes, 0).unwrap();
    let mut out = Vec::new();
    loop {
        let record = reader.next_record().unwrap_or_else(|error| panic!("{error} after {out:?}"));
        let name = format!("{record:?}");
        let name = name.split(['(', ' ', '{']).next().unwrap().to_owned();
        match record {
            Record::PageData => {
                let expected = contents(reader.page_entries());
                let mut found = vec![0; expected.len()];
                let (one, two) = found.split_at_mut(expected.len() / 8192 * 4096);
                reader.read_pages(&mut [IoSliceMut::new(one)]).unwrap();
                reader.read_pages(&mut [IoSliceMut::new(two)]).unwrap();
                assert!(found == expected, "contents differ");
                assert_eq!(reader.contents_left(), 0);
            }
            Record::End => {
                out.push(name);
                assert!(reader.into_inner().is_empty(), "END was not the last thing written");
                return out;
            }
            Record::TscInfo(found) => assert_eq!(found, samples::TSC),
            Record::Optional { number, ref body } => {
                assert_eq!(number, 0x8005_0001);
                assert_eq!(body.as_deref(), Some(&b"an offer"[..]));
            }
            Record::P2mFrames(ref found) => {
                assert_eq!(*found, P2mFrames { start: 0, end: 1023, frames: vec![40, 41] });
            }
            Record::HvmParams(ref found) => assert_eq!(found[1], HvmParam { index: 17, value: 5 }),
            Record::SharedInfo(ref found) => assert_eq!(**found, samples::page(1)),
            Record::Vcpu(ref found) if found.kind == VcpuKind::Xsave => assert_eq!(found.context, [3; 835]),
            _ => {}
        }
        out.push(name);
    }
}

#[test]
fn an_hvm_stream_comes_back_as_it_went() {
    let names = names(&samples::hvm(1024));
    let expected = "CpuidPolicy MsrPolicy StaticDataEnd Optional PageData PageData Verify PageData TscInfo HvmContext \
                    HvmParams End";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn a_pv_stream_comes_back_as_it_went() {
    let names = names(&samples::pv(33));
    let expected = "PvInfo CpuidPolicy StaticDataEnd P2mFrames PageData PageData TscInfo SharedInfo Vcpu Vcpu Vcpu Vcpu \
                    Vcpu Vcpu Vcpu Vcpu End";
    assert_eq!(names.join(" "), expected);
}

/// The bytes of a small stream, put down from the specification by hand.
#[test]
fn bytes_are_those_of_the_specification() {
    let mut expected = Vec::new();
    expected.extend([0xff; 8]);
    expected.extend(*b"XENF");
    expected.extend([0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([2, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    expected.extend([0x12, 0, 0, 0, 16, 0, 0, 0]);
    expected.extend([5; 16]);
    expected.extend([0x10, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([1, 0, 0, 0]);
    expected.extend((8u32 + 16 + 4096).to_le_bytes());
    expected.extend([2, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    expected.extend([0x35, 0x12, 0, 0, 0, 0, 0, 0xf0]);
    expected.extend([6; 4096]);
    expected.extend([0x0a, 0, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([17, 0, 0, 0, 0, 0, 0, 0, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0]);
    expected.extend([0x09, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0]);
    expected.extend([0; 8]);

    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.cpuid_policy(&[]).unwrap();
    writer.msr_policy(&[5; 16]).unwrap();
    writer.static_data_end().unwrap();
    let entries = [(0x1234, PageType::Normal), (0x1235, PageType::Invalid)]
        .map(|(pfn, page_type)| PageEntry::new(mover::units::Pfn(pfn), page_type));
    writer.page_data(&entries, &[IoSlice::new(&[6; 4096])]).unwrap();
    writer.hvm_params(&[HvmParam { index: 17, value: 0x1234_5678 }]).unwrap();
    writer.hvm_context(&[1, 2, 3]).unwrap();
    assert_eq!(writer.offset() + 8, u64::try_from(expected.len()).unwrap());
    assert!(writer.end().unwrap() == expected);
}

/// Takes and gives few bytes at a time, interrupted now and then.
struct Slow<T>(T, usize);

impl<T> Slow<T> {
    fn step(&mut self) -> io::Result<usize> {
        self.1 += 1;
        if self.1.is_multiple_of(5) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(self.1 % 1500 + 1) }
    }
}

impl<W: Write> Write for Slow<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.step()?.min(buffer.len());
        self.0.write(&buffer[..n])
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<R: Read> Read for Slow<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.step()?.min(buffer.len());
        self.0.read(&mut buffer[..n])
    }
}

/// The ways for memory that is no slice move the same bytes, however the descriptor cuts them up.
#[test]
fn callers_own_transfers_are_carried_on_from_where_they_stopped() {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let entries = normal(5..25);
    let memory = contents(&entries);
    let stream = |slow: bool| -> Vec<u8> {
        let mut writer = Writer::start(Slow(Vec::new(), 0), domain).unwrap();
        writer.static_data_end().unwrap();
        if slow {
            writer
                .page_data_with(&entries, |out, head, done| {
                    let done = usize::try_from(done).unwrap();
                    if head.is_empty() { out.write(&memory[done..]) } else { out.write(head) }
                })
                .unwrap();
        } else {
            writer.page_data(&entries, &[IoSlice::new(&memory)]).unwrap();
        }
        writer.hvm_params(&[HvmParam { index: 1, value: 2 }]).unwrap();
        writer.hvm_context(&[1]).unwrap();
        writer.end().unwrap().0
    };
    let bytes = stream(true);
    assert!(bytes == stream(false));

    let mut reader = Reader::start(Slow(&bytes[..], 0), 0).unwrap();
    assert!(matches!(reader.next_record().unwrap(), Record::StaticDataEnd));
    assert!(matches!(reader.next_record().unwrap(), Record::PageData));
    let mut found = vec![0; memory.len()];
    for batch in found.chunks_mut(7 * 4096) {
        let pages = batch.len() / 4096;
        let read = |inner: &mut Slow<&[u8]>, done: u64| {
            let done = usize::try_from(done).unwrap();
            inner.read(&mut batch[done..])
        };
        reader.read_pages_with(pages, read).unwrap();
    }
    assert!(found == memory);
    assert!(matches!(reader.next_record().unwrap(), Record::HvmParams(_)));
}

/// libxl goes on reading from the same descriptor.
#[test]
fn nothing_behind_the_end_is_read() {
    let mut bytes = samples::pv(3);
    bytes.extend(b"libxl's own records");
    let mut reader = Reader::start(&bytes[..], 0).unwrap();
    loop {
        match reader.next_record().unwrap() {
            Record::End => break,
            Record::PageData => reader.skip_pages().unwrap(),
            _ => {}
        }
    }
    assert_eq!(reader.into_inner(), b"libxl's own records");
}

/// Version 2 has neither policies nor STATIC_DATA_END; the reader says where the latter would be.
#[test]
fn a_stream_of_version_2_gets_its_static_data_end() {
    for (mut bytes, before) in [(samples::hvm(3), "Optional"), (samples::pv(3), "PvInfo")] {
        bytes[15] = 2;
        let mut out = bytes[..40].to_vec();
        let mut rest = &bytes[40..];
        while !rest.is_empty() {
            let kind = Kind::from_number(u32::from_le_bytes(rest[..4].try_into().unwrap()));
            let length = usize::try_from(u32::from_le_bytes(rest[4..8].try_into().unwrap())).unwrap();
            let (record, behind) = rest.split_at(8 + length.next_multiple_of(8));
            if !matches!(kind, Some(Kind::StaticDataEnd | Kind::CpuidPolicy | Kind::MsrPolicy)) {
                out.extend(record);
            }
            rest = behind;
        }
        let names = names(&out);
        let place = names.iter().position(|name| name == "StaticDataEnd").unwrap();
        assert_eq!(names[place - 1], before, "{names:?}");
        assert!(["PageData", "P2mFrames"].contains(&names[place + 1].as_str()), "{names:?}");
    }
}
