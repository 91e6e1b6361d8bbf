//! What a running end keeps to itself: its memory, what its token opens, and the guest's pages.

mod host;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, LIMIT, end, said};

/// A user that has no rights, on every Linux.
const NOBODY: u32 = 65534;
/// A page of a guest that is nowhere else. Written in two halves, so that this program's own memory has it but as them.
const MARKER: [&str; 2] = ["a-secret-that-only", "-the-guest-has-in-its-memory!"];

/// How often `what` stands in the memory of that process; root may look.
fn occurrences(process: u32, what: &[u8]) -> usize {
    places(process, what).len()
}

/// Where `what` stands in the memory of that process: addresses, and what the kernel calls what is there.
fn places(process: u32, what: &[u8]) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let Ok(mut memory) = File::open(format!("/proc/{process}/mem")) else { return Vec::new() };
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let parse = |text: &str| u64::from_str_radix(text, 16).ok();
        let Some((Some(from), Some(to))) = range.split_once('-').map(|(a, b)| (parse(a), parse(b))) else {
            continue;
        };
        if !rights.starts_with("rw") || memory.seek(SeekFrom::Start(from)).is_err() {
            continue;
        }
        let mut bytes = Vec::new();
        // What can't be read (a hole, a device) ends it; what came before counts.
        let _ = Read::by_ref(&mut memory).take(to - from).read_to_end(&mut bytes);
        let called = words.last().unwrap_or("").to_owned();
        found.extend(
            (from..)
                .zip(bytes.windows(what.len()))
                .filter(|(_, window)| *window == what)
                .map(|(at, _)| format!("{at:x} {called}")),
        );
    }
    found
}

/// The line of `/proc/PID/limits` for core dumps: soft and hard.
fn core_limits(process: u32) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).expect("it lives");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).expect("a limit");
    line.split_whitespace().take(2).map(str::to_owned).collect()
}

/// As a user without rights; none of this may be seen by another process of the same user.
fn as_nobody(command: &mut Command) -> &mut Command {
    command.uid(NOBODY).gid(NOBODY)
}

#[test]
fn nobody_else_of_the_same_user_reads_an_ends_memory() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: becoming another user needs root");
        return;
    }
    let place = tempfile::tempdir_in("/var/tmp").expect("a directory");
    for name in ["run", "state"] {
        fs::create_dir(place.path().join(name)).expect("it is made");
        chown(place.path().join(name), Some(NOBODY), Some(NOBODY)).expect("it is given away");
    }
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("it may be entered");
    // From where any user may run it.
    let program = place.path().join("pageferry");
    fs::copy(env!("CARGO_BIN_EXE_pageferry"), &program).expect("it is copied");
    let mut receive = Command::new(&program);
    receive
        .env("XDG_RUNTIME_DIR", place.path().join("run"))
        .env("XDG_STATE_HOME", place.path().join("state"));
    receive
        .args(["receive", "--listen", "127.0.0.1:0", "--quiet"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut receive = as_nobody(&mut receive).spawn().expect("it starts");
    let mut first = [0; 1];
    receive.stdout.take().expect("a pipe").read_exact(&mut first).expect("it waits for a source");
    let mut sleeping = as_nobody(Command::new("sleep").arg("600")).spawn().expect("it starts");
    let looks = |process: &Child| {
        let command = format!("head -c 1 /proc/{}/environ", process.id());
        let mut look = Command::new("sh");
        let look = as_nobody(look.args(["-c", &command])).stdout(Stdio::null()).stderr(Stdio::null());
        look.status().expect("sh runs").success()
    };
    // It runs another program a moment after it is there.
    let began = Instant::now();
    while !looks(&sleeping) && began.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(10));
    }
    let (into_sleep, into_receive) = (looks(&sleeping), looks(&receive));
    let limits = core_limits(receive.id());
    for process in [&mut sleeping, &mut receive] {
        process.kill().expect("it runs");
        process.wait().expect("it is gone");
    }
    assert!(into_sleep, "this says nothing: even a common process can't be looked into");
    assert!(!into_receive, "another process of the same user can look into `receive`");
    assert_eq!(limits, ["0", "0"]);
}

#[test]
fn a_used_token_opens_nothing_and_no_end_dumps_core() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&[]);
    let line = line.replace("NAME", "desk");
    let mut command = host.command();
    command.args(line.split_whitespace().skip(1)).args(["--bandwidth", "1MiB/s"]);
    let mut source = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let began = Instant::now();
    while !host.must(&["status", "--json", "--quiet"]).contains("\"phase\":\"rounds\"") {
        assert!(began.elapsed() < LIMIT, "the migration never began");
        thread::sleep(Duration::from_millis(20));
    }
    for (name, process) in [("receive", target.id()), ("send", source.id())] {
        assert_eq!(core_limits(process), ["0", "0"], "{name}");
    }
    let word = line.split_whitespace().last().expect("the token's word");
    let text = word.split('-').next().expect("the token");
    if rustix::process::geteuid().is_root() {
        // The source has it on its command line, for as long as it runs: that shows that it would be found.
        assert!(
            occurrences(source.id(), text.as_bytes()) > 0,
            "this says nothing: a token is not found where it is"
        );
        let bytes: Vec<u8> = (0..text.len() / 2)
            .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("digits"))
            .collect();
        let left = [text.as_bytes(), &bytes].map(|what| places(target.id(), what));
        assert_eq!(
            left,
            [Vec::<String>::new(), Vec::new()],
            "copies of a token that has been used, in `receive`"
        );
    } else {
        eprintln!("SKIPPED: reading another process's memory needs root");
    }
    // Whatever of it is still in a memory or on a screen: another guest does not get in by it.
    let disk = host.path("other.img").display().to_string();
    host.must(&["image", &disk, "--size", "32M"]);
    host.must(&["guest", "start", "other", "--memory", "16M", "--disk", &disk]);
    let sent = host.send(&line, |line| line.replace("--guest desk", "--guest other"));
    let there = host.must(&["guest", "list", "--quiet"]).contains("other: running");
    host.must(&["guest", "stop", "other", "--quiet"]);
    assert!(!sent.status.success() && there, "it got in: {}", said(&sent));
    assert!(source.try_wait().expect("it can be asked").is_none(), "and the one that was in goes on");
    source.kill().expect("it runs");
    source.wait().expect("it is gone");
    assert_ne!(end(target), Some(0));
}

/// Every file below `directory` but the disk itself that has `what` in it.
fn files_with(directory: &Path, what: &[u8], found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_with(&path, what, found);
        } else if path.extension().is_none_or(|ending| ending != "img") {
            let bytes = fs::read(&path).unwrap_or_default();
            if bytes.windows(what.len()).any(|window| window == what) {
                found.push(path.display().to_string());
            }
        }
    }
}

#[test]
fn no_log_and_no_error_has_a_guests_page_in_it() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: reading another process's memory needs root");
        return;
    }
    let marker = MARKER.concat().into_bytes();
    // A disk full of it, which the guest reads into its memory when it starts.
    let files = tempfile::tempdir().expect("a directory");
    let text = marker.repeat((1 << 20) / marker.len());
    for number in 0..24 {
        fs::write(files.path().join(number.to_string()), &text).expect("it is written");
    }
    let from = files.path().to_str().expect("a plain name");
    let Some(host) = Host::holding(&["--from", from]) else { return };
    for (name, more, cut_off) in
        [("failing", "--bandwidth 1MiB/s", true), ("whole", "--mode lazy --verify", false)]
    {
        let log = |end: &str| File::create(host.path(&format!("{name}.{end}.log"))).expect("it is made");
        let mut receive = host.command();
        receive.args(["receive", "--listen", "127.0.0.1:0", "--name", "moved", "-vvv"]);
        let mut target = receive.stdout(Stdio::piped()).stderr(log("target")).spawn().expect("it starts");
        let mut lines = BufReader::new(target.stdout.take().expect("a pipe")).lines();
        let line = lines.next().expect("a line").expect("text").replace("NAME", "desk");
        let mut send = host.command();
        send.args(line.split_whitespace().skip(1)).args(more.split(' ')).arg("-vvv");
        let mut source = send.stdout(log("report")).stderr(log("source")).spawn().expect("it starts");
        if cut_off {
            let began = Instant::now();
            while !host.must(&["status", "--json", "--quiet"]).contains("\"phase\":\"rounds\"") {
                assert!(began.elapsed() < LIMIT, "the migration never began");
                thread::sleep(Duration::from_millis(20));
            }
            target.kill().expect("it runs");
        }
        let (source, target) = (source.wait().expect("it ends"), target.wait().expect("it ends"));
        assert_eq!((source.success(), target.success()), (!cut_off, !cut_off), "{name}");
        for end in ["source", "target"] {
            let log = fs::read(host.path(&format!("{name}.{end}.log"))).expect("it is there");
            assert!(!log.is_empty() || end == "target", "nothing was logged");
        }
    }
    let status = host.must(&["guest", "status", "moved", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("an object");
    let guest = status["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process");
    assert!(occurrences(guest, &marker) > 1000, "this says nothing: the guest has no such page");
    let mut found = Vec::new();
    files_with(&host.path("."), &marker, &mut found);
    assert_eq!(found, Vec::<String>::new());
}
