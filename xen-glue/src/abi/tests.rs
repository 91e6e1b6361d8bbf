//! Transfers over real pipes.

use std::io::{Read, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use mover::memory::PageBuf;

use super::{Part, PartMut, Transfer};

/// More pieces than a system call takes, through a pipe that holds less than all of it.
#[test]
fn a_transfer_moves_every_byte_in_order() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut pages: Vec<PageBuf> = (0..1500u16)
        .map(|n| PageBuf(std::array::from_fn(|at| (at + usize::from(n) * 7).to_le_bytes()[0])))
        .collect();
    let expected: Vec<u8> = pages.iter().rev().flat_map(|page| page.0).collect();
    let stop = AtomicBool::new(false);
    let mut got = vec![0; 6 + expected.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (head, pages) = (b"header", &mut pages);
            // Backwards, so that no two are neighbours.
            let parts = pages.iter_mut().rev().map(|page| Part::Page(page.as_guest_page()));
            let parts = std::iter::once(Part::Bytes(head)).chain(parts);
            Transfer::new(&stop).write(writer.as_fd(), parts).unwrap();
            drop(writer);
        });
        let (head, body) = got.split_at_mut(6);
        let parts = [PartMut::Bytes(head), PartMut::Bytes(body)];
        Transfer::new(&stop).read(reader.as_fd(), parts).unwrap();
    });
    assert_eq!(&got[..6], b"header");
    assert!(got[6..] == expected, "bytes changed on the way");
    assert_eq!((&reader).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_transfer_ends_with_its_stream_or_when_told() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let stop = AtomicBool::new(false);
    writer.write_all(b"abc").unwrap();
    drop(writer);
    let mut got = [0; 4];
    assert_eq!(Transfer::new(&stop).read(reader.as_fd(), [PartMut::Bytes(&mut got)]).unwrap(), 3);
    assert_eq!(&got, b"abc\0");
    let (_reader, writer) = std::io::pipe().unwrap();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = Transfer::new(&stop).write(writer.as_fd(), [Part::Bytes(b"abc")]).unwrap_err();
    assert!(error.get_ref().is_some_and(|error| error.is::<super::Stopped>()), "{error}");
}
