//! The layouts against the C headers of each Xen version that is at hand: this machine's (libxen-dev), those that
//! `cargo xtask ci` has fetched into `target/xen-headers`, and those in the directories of `PAGEFERRY_XEN_HEADERS`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::LAYOUTS;
use super::domctl::INTERFACE_VERSIONS;

/// Prints the domctl interface's version, then size and offsets in the order of [`LAYOUTS`], one number a line.
fn program() -> String {
    let mut c = String::from(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#define __XEN_TOOLS__ 1\n\
         #include <xen/xen.h>\n#include <xen/domctl.h>\n#include <xen/memory.h>\n#include <xen/grant_table.h>\n\
         #include <xen/hvm/hvm_op.h>\n#include <xen/vm_event.h>\n#include <xen/sys/privcmd.h>\n#include <xen/sys/evtchn.h>\n#include <xen/sys/gntdev.h>\n\
         #include <xen/arch-x86/xen.h>\n#include <xenctrl.h>\n#include <xenguest.h>\nint main(void) {\n\
         printf(\"%d\\n\", XEN_DOMCTL_INTERFACE_VERSION);",
    );
    for layout in LAYOUTS {
        writeln!(c, "printf(\"%zu\\n\", sizeof({}));", layout.c_type).unwrap();
        for (member, _) in layout.members.iter().filter(|(member, _)| !member.is_empty()) {
            writeln!(c, "printf(\"%zu\\n\", offsetof({}, {member}));", layout.c_type).unwrap();
        }
    }
    c + "return 0; }\n"
}

/// Directories of headers, one a Xen version, as far as they are here.
fn directories() -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("/usr/include")];
    let ours = std::env::current_exe().unwrap();
    // target/PROFILE/deps/us
    if let Some(fetched) =
        ours.ancestors().nth(3).and_then(|target| target.join("xen-headers").read_dir().ok())
    {
        all.extend(fetched.map(|entry| entry.unwrap().path().join("usr/include")));
    }
    let named = std::env::var_os("PAGEFERRY_XEN_HEADERS").unwrap_or_default();
    all.extend(std::env::split_paths(&named));
    all.retain(|directory| directory.join("xenguest.h").exists());
    all
}

/// Compares with the headers of `directory`; the number of their domctl interface.
fn compare(directory: &Path) -> u32 {
    let place = tempfile::tempdir().unwrap();
    let (source, binary) = (place.path().join("layout.c"), place.path().join("layout"));
    std::fs::write(&source, program()).unwrap();
    let mut compile = Command::new("cc");
    let compiled = compile.arg("-I").arg(directory).arg(&source).arg("-o").arg(&binary).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let printed = Command::new(&binary).output().unwrap();
    let mut numbers =
        std::str::from_utf8(&printed.stdout).unwrap().lines().map(|line| line.parse::<usize>().unwrap());
    let version = u32::try_from(numbers.next().unwrap()).unwrap();
    assert!(INTERFACE_VERSIONS.contains(&version), "domctls of version {version:#x} are not asked for");
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
    assert!(different.is_empty() && numbers.next().is_none(), "{}:\n{different}", directory.display());
    version
}

#[test]
fn layouts_are_those_of_the_c_headers_of_every_xen() {
    if Command::new("cc").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no C compiler: apt-get install gcc libc6-dev");
        return;
    }
    let compared: BTreeSet<u32> = directories().iter().map(|directory| compare(directory)).collect();
    // Debian has these two.
    for (version, xen, how) in [
        (0x15, "4.17", "apt-get install libxen-dev on Debian 12, or cargo xtask ci"),
        (0x17, "4.20", "cargo xtask ci, where apt-get reaches a Debian archive"),
    ] {
        if !compared.contains(&version) {
            eprintln!("SKIPPED: no headers of Xen {xen} to compare our layouts with: {how}");
        }
    }
}
