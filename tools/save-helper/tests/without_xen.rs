//! The program on a machine without Xen: libxl is told why, in its own protocol, and the program exits as it expects.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;

/// Plays libxl; the numbers of the messages that came, their bytes as text, the last one's arguments, the exit code.
fn play(arguments: &str, variables: &[(&str, &str)]) -> (Vec<u16>, String, Vec<u8>, Option<i32>) {
    let (_ours, theirs) = UnixStream::pair().expect("a socket pair");
    let theirs = OwnedFd::from(theirs);
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).expect("it is let through exec");
    let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry-save-helper"))
        .args(arguments.replace("FD", &theirs.as_raw_fd().to_string()).split(' '))
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut to = child.stdin.take().expect("a pipe");
    let mut from = child.stdout.take().expect("a pipe");
    let (mut numbers, mut text, mut last) = (Vec::new(), String::new(), Vec::new());
    while last.is_empty() {
        let mut length = [0; 2];
        from.read_exact(&mut length).expect("a message");
        let mut body = vec![0; usize::from(u16::from_ne_bytes(length))];
        from.read_exact(&mut body).expect("the whole of it");
        let number = u16::from_ne_bytes([body[0], body[1]]);
        numbers.push(number);
        text.push_str(&String::from_utf8_lossy(&body));
        if number == 10 {
            last = body.split_off(2);
        }
    }
    to.write_all(&0i32.to_ne_bytes()).expect("it hears");
    (numbers, text, last, child.wait().expect("it ends").code())
}

#[test]
fn libxl_is_told_why_nothing_can_be_done() {
    if Path::new("/dev/xen/privcmd").exists() {
        eprintln!("SKIPPED: this machine runs Xen, and domain 32000 may be somebody's");
        return;
    }
    for (arguments, numbers) in [
        ("--save-domain FD -1 32000 1 136 0", vec![1, 1, 1, 1, 10]),
        ("--restore-domain FD -1 32000 1 0 2 0 768 0", vec![1, 1, 1, 9, 1, 10]),
    ] {
        let (found, text, last, code) = play(arguments, &[("PAGEFERRY_POLICY", "stock")]);
        assert_eq!(found, numbers, "{text}");
        assert!(text.contains("cannot talk to the hypervisor"), "{text}");
        let complete = [(-1i32).to_ne_bytes(), 2i32.to_ne_bytes()].concat();
        assert_eq!((last, code), (complete, Some(0)), "{text}");
    }
}

#[test]
fn wrong_settings_reach_libxls_log() {
    let (_, text, last, code) =
        play("--save-domain FD -1 32000 1 136 0", &[("PAGEFERRY_MAX_DOWNTIME", "never")]);
    assert!(text.contains("PAGEFERRY_MAX_DOWNTIME is wrong"), "{text}");
    let complete = [(-1i32).to_ne_bytes(), 22i32.to_ne_bytes()].concat();
    assert_eq!((last, code), (complete, Some(0)));
}
