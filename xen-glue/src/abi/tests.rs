//! The layouts against the C headers of libxen-dev, and transfers over real pipes.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use mover::memory::PageBuf;

use super::{LAYOUTS, Part, PartMut, Transfer};

/// Prints size and offsets in the order of [`LAYOUTS`], one number a line.
fn program() -> String {
    let mut c = String::from(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#define __XEN_TOOLS__ 1\n\
         #include <xen/xen.h>\n#include <xen/domctl.h>\n#include <xen/memory.h>\n#include <xen/grant_table.h>\n\
         #include <xen/hvm/hvm_op.h>\n#include <xen/sys/privcmd.h>\n#include <xen/sys/evtchn.h>\n\
         #include <xen/arch-x86/xen.h>\n#include <xenctrl.h>\n#include <xenguest.h>\nint main(void) {\n",
    );
    for layout in LAYOUTS {
        writeln!(c, "printf(\"%zu\\n\", sizeof({}));", layout.c_type).unwrap();
        for (member, _) in layout.members.iter().filter(|(member, _)| !member.is_empty()) {
            writeln!(c, "printf(\"%zu\\n\", offsetof({}, {member}));", layout.c_type).unwrap();
        }
    }
    c + "return 0; }\n"
}

#[test]
fn layouts_are_those_of_the_c_headers() {
    if !Path::new("/usr/include/xen/domctl.h").exists() {
        eprintln!("SKIPPED: no Xen headers: apt-get install libxen-dev");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, program()).unwrap();
    let Ok(compiled) = Command::new("cc").arg(&source).arg("-o").arg(&binary).output() else {
        eprintln!("SKIPPED: no C compiler: apt-get install gcc");
        return;
    };
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let printed = Command::new(&binary).output().unwrap();
    let mut numbers =
        std::str::from_utf8(&printed.stdout).unwrap().lines().map(|line| line.parse::<usize>().unwrap());
    let mut different = String::new();
    for layout in LAYOUTS {
        let bytes = numbers.next().unwrap();
        if bytes != layout.bytes {
            writeln!(different, "{} has {bytes} bytes, not {}", layout.c_type, layout.bytes).unwrap();
        }
        for (member, at) in layout.members.iter().filter(|(member, _)| !member.is_empty()) {
            let offset = numbers.next().unwrap();
            if offset != *at {
                writeln!(different, "{}.{member} is at {offset}, not {at}", layout.c_type).unwrap();
            }
        }
    }
    assert!(different.is_empty() && numbers.next().is_none(), "{different}");
}

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
    let error = Transfer::new(&stop).read(reader.as_fd(), [PartMut::Bytes(&mut [0; 4])]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    let (_reader, writer) = std::io::pipe().unwrap();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = Transfer::new(&stop).write(writer.as_fd(), [Part::Bytes(b"abc")]).unwrap_err();
    assert!(error.get_ref().is_some_and(|error| error.is::<super::Stopped>()), "{error}");
}
