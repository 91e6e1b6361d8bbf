//! `pageferry stream` as its user meets it, on a file as `xl save` writes it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use xen_glue::stream::{
    DomainHeader, GuestType, HvmParam, LibxlRecord, PageEntry, PageType, Writer, XlHeader, libxl_header,
};

fn pageferry(arguments: &[&str], input: Option<&[u8]>) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .arg("stream")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.unwrap_or_default()).expect("it reads its input");
    drop(stdin);
    child.wait_with_output().expect("the program ends")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn saved() -> Vec<u8> {
    saved_with(&[0; 3 * 40960])
}

/// A save of 30 pages with these contents.
fn saved_with(contents: &[u8]) -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).expect("memory can be written to");
    let mut write = || -> Result<(), xen_glue::stream::StreamError> {
        writer.static_data_end()?;
        for (batch, contents) in (0..).zip(contents.chunks(40960)) {
            let pfns = batch * 10..batch * 10 + 10;
            let entries: Vec<_> =
                pfns.map(|pfn| PageEntry::new(mover::units::Pfn(pfn), PageType::Normal)).collect();
            writer.page_data(&entries, &[std::io::IoSlice::new(contents)])?;
        }
        writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff }])?;
        writer.hvm_context(&[1; 11])
    };
    write().expect("a right stream");
    let libxc = writer.end().expect("a whole stream");
    let mut out = XlHeader { json: true, libxl: true, config: b"{}".to_vec() }.encode();
    out.extend(libxl_header());
    out.extend(LibxlRecord::LibxcContext.encode());
    out.extend(libxc);
    out.extend(LibxlRecord::End.encode());
    out
}

#[test]
fn a_right_file_is_listed_and_found_right() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("saved");
    std::fs::write(&path, saved()).expect("the file is written");
    let path = path.to_str().expect("an ordinary path");
    let listed = pageferry(&["inspect", path], None);
    assert!(listed.status.success(), "{}", stderr(&listed));
    let words = stdout(&listed);
    for expected in [
        "LIBXC_CONTEXT",
        "PAGE_DATA × 3",
        "30 NOTAB; contents of 30 all zero",
        "HVM_PARAMS",
        "no fault",
        "of Xen 4.17",
    ] {
        assert!(words.contains(expected), "{expected} is not in\n{words}");
    }
    let each = stdout(&pageferry(&["inspect", "-v", path], None));
    assert_eq!(each.matches("10 frames up to").count(), 3, "{each}");

    let json = pageferry(&["inspect", "--json", path], None);
    let value: serde_json::Value = serde_json::from_str(&stdout(&json)).expect("one JSON object");
    assert_eq!(value["summary"]["pages"]["entries"], 30);
    assert_eq!(value["records"].as_array().map(Vec::len), Some(3 + 1 + 1 + 3 + 3 + 1));

    let verified = pageferry(&["verify", "-"], Some(&saved()));
    assert!(verified.status.success() && stdout(&verified).contains("no fault"), "{}", stdout(&verified));
}

#[test]
fn faults_are_named_and_classed() {
    let mut bytes = saved();
    let end = bytes.len();
    bytes[end - 17] = 1;
    let verified = pageferry(&["verify", "-"], Some(&bytes));
    assert_eq!(verified.status.code(), Some(10));
    assert!(
        stdout(&verified).contains("the padding behind HVM_CONTEXT is not zero"),
        "{}",
        stdout(&verified)
    );
    assert!(stderr(&verified).contains("at byte"), "{}", stderr(&verified));
    let listed = pageferry(&["inspect", "-"], Some(&bytes));
    assert!(listed.status.success() && stdout(&listed).contains("fault at byte"), "{}", stdout(&listed));

    let json = pageferry(&["verify", "--json", "-"], Some(&bytes[..end - 9]));
    assert_eq!(json.status.code(), Some(10));
    let value: serde_json::Value = serde_json::from_str(&stdout(&json)).expect("one JSON object");
    assert_eq!(value["complete"], false);
    assert_eq!(value["faults"].as_array().map(Vec::len), Some(2));
    assert_eq!(pageferry(&["inspect", "-"], Some(&bytes[..end - 9])).status.code(), Some(10));

    let missing = pageferry(&["verify", "/nowhere/saved"], None);
    assert_eq!(missing.status.code(), Some(2));
    assert!(!Path::new("/nowhere/saved").exists() && stderr(&missing).contains("/nowhere/saved"));
    assert_eq!(pageferry(&["verify", "-"], Some(b"#!/bin/sh\n")).status.code(), Some(10));
}

fn page(seed: u64) -> Vec<u8> {
    (0..512_u64).flat_map(|at| (seed << 16 | at).to_le_bytes()).collect()
}

/// Of 30 pages ten are zero, ten stand on no disk, nine where the index says, and one where it does not know yet; for that one's block
/// the index has what stood there before, which is a page of the guest's as well.
#[test]
fn pages_that_stand_on_disks_are_counted() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name).to_str().expect("an ordinary path").to_owned();
    let disk: Vec<u8> = (1..=100).flat_map(page).collect();
    std::fs::write(at("disk"), &disk).expect("the disk is written");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.args(arguments).env("XDG_STATE_HOME", directory.path()).output().expect("the program runs")
    };
    let built = run(&["index", "build", &at("disk")]);
    assert!(built.status.success(), "{}", stderr(&built));
    let mut changed = disk;
    changed[3 * 4096..4 * 4096].copy_from_slice(&page(777));
    std::fs::write(at("disk"), changed).expect("the disk is written");
    let pages = (1..=10).chain([777]).chain(1001..=1009).flat_map(page);
    let contents: Vec<u8> = vec![0; 40960].into_iter().chain(pages).collect();
    std::fs::write(at("saved"), saved_with(&contents)).expect("the file is written");

    let json = run(&["--json", "stream", "findable", &at("saved"), "--disk", &at("disk")]);
    let value: serde_json::Value = serde_json::from_str(&stdout(&json)).expect("one JSON object");
    for (key, count) in [("pages", 30), ("zero", 10), ("on_disks", 10), ("by_index", 9), ("stale", 0)] {
        assert_eq!(value[key], count, "{key} of {value}");
    }
    assert_eq!(value["share"], 0.9);
    let words = stdout(&run(&["stream", "findable", &at("saved"), "--disk", &at("disk")]));
    assert!(words.contains("10 stand on the disks") && words.contains("lead to 9 (90.00 %)"), "{words}");

    let whole = std::fs::read(at("saved")).expect("it is there");
    std::fs::write(at("saved"), &whole[..whole.len() / 2]).expect("the file is written");
    let cut = run(&["stream", "findable", &at("saved"), "--disk", &at("disk")]);
    assert_eq!(cut.status.code(), Some(10), "{}", stderr(&cut));
    let missing = run(&["stream", "findable", &at("saved"), "--disk", "/nowhere/disk"]);
    assert!(!missing.status.success() && stderr(&missing).contains("/nowhere/disk"), "{}", stderr(&missing));
}
