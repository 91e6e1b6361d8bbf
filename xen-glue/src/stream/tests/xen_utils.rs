//! Xen's own verifier, `verify-stream-v2` of Debian's xen-utils, on what is written here.
//!
//! It is a Python program and needs no Xen. It is looked for in `/usr/lib/xen-*`, or below the directory
//! `PAGEFERRY_XEN_UTILS` names, into which the package may have been unpacked (`dpkg -x`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::samples;

/// The directories with xen-utils' files.
fn installed() -> Vec<PathBuf> {
    let root = std::env::var_os("PAGEFERRY_XEN_UTILS").map_or_else(|| PathBuf::from("/"), PathBuf::from);
    let Ok(entries) = fs::read_dir(root.join("usr/lib")) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| path.join("bin/verify-stream-v2").exists()).collect()
}

#[test]
fn xens_own_verifier_accepts_what_is_written() {
    let installed = installed();
    if installed.is_empty() {
        eprintln!(
            "SKIPPED: no verify-stream-v2; install Debian's xen-utils, or unpack it and set PAGEFERRY_XEN_UTILS"
        );
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (hvm, pv) = (samples::hvm_with(1024, false), samples::pv(30));
    let file = samples::xl_file(&hvm, false);
    let libxl = file.windows(8).position(|bytes| bytes == b"LibxlFmt").unwrap();
    let mut broken = samples::hvm_with(2, false);
    broken[30] = 1;
    let streams = [
        ("libxc", hvm.clone(), true),
        ("libxc", pv.clone(), true),
        ("libxl", file[libxl..].to_vec(), true),
        ("xl", file.clone(), true),
        ("xl", samples::xl_file(&pv, false), true),
        ("libxc", broken, false),
    ];
    for xen in installed {
        for (place, (format, bytes, right)) in streams.iter().enumerate() {
            let path = directory.path().join(format!("{place}.stream"));
            fs::write(&path, bytes).unwrap();
            let output = Command::new("python3")
                .arg(xen.join("bin/verify-stream-v2"))
                .args(["-f", format, "-v", "-i"])
                .arg(&path)
                .env("PYTHONPATH", xen.join("lib/python"))
                .env("PYTHONDONTWRITEBYTECODE", "1")
                .output()
                .expect("python3 starts");
            let words = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), *right, "{format} stream {place}: {words}");
        }
    }
}
