//! `pageferry demo`, whole and broken off: what it prints, and that nothing of it is left.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Keys of one mode's result that scripts rely on.
const PROMISED: [&str; 22] = [
    "mode",
    "workload",
    "guest_bytes",
    "total_ms",
    "downtime_ms",
    "restart_ms",
    "rounds",
    "pages_zero",
    "pages_data",
    "pages_by_reference",
    "pages_refetched",
    "pages_lazy",
    "faults_served",
    "link_bytes",
    "disk_bytes",
    "verified_pages",
    "mismatched_pages",
    "lanes",
    "send_path",
    "load_path",
    "cpu_ms_source",
    "cpu_ms_target",
];

/// The demonstration on a small guest, with everything it makes in `directory`.
fn demo(directory: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.args(["demo", "--memory", "64M", "--watch", "1s", "--dir"]);
    command.arg(directory).args(more);
    command
}

/// This host can't log writes to memory; says so.
fn lacks_kernel() -> bool {
    let doctor = Command::new(env!("CARGO_BIN_EXE_pageferry")).args(["doctor", "--quiet"]).output();
    let lacking = !doctor.is_ok_and(|output| output.status.success());
    if lacking {
        eprintln!("SKIPPED: demo: this kernel lacks something no migration works without (pageferry doctor)");
    }
    lacking
}

/// Processes whose environment names `directory`: guests and ends of a demonstration in it.
fn left_running(directory: &Path) -> Vec<String> {
    let name = directory.as_os_str().as_encoded_bytes();
    let environments = fs::read_dir("/proc").expect("/proc is there").flatten().filter_map(|entry| {
        let environment = fs::read(entry.path().join("environ")).ok()?;
        let named = environment.windows(name.len()).any(|window| window == name);
        named.then(|| entry.file_name().to_string_lossy().into_owned())
    });
    environments.collect()
}

/// Nothing runs, nothing lies about.
fn assert_nothing_left(directory: &Path) {
    assert_eq!(left_running(directory), Vec::<String>::new(), "processes");
    let files: Vec<_> = fs::read_dir(directory).expect("the directory is ours").flatten().collect();
    assert!(files.is_empty(), "{files:?}");
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn all_modes_with_every_page_right_and_nothing_left() {
    if lacks_kernel() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let page = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = page.path().to_str().expect("a plain name");
    let output = demo(directory.path(), &["--json", "--report", path]).output().expect("the program starts");
    assert!(output.status.success(), "{}", said(&output));
    let stdout = String::from_utf8_lossy(&output.stdout);
    let modes: Vec<String> = stdout
        .lines()
        .map(|line| {
            let result: serde_json::Value = serde_json::from_str(line).expect("a line is a JSON object");
            for key in PROMISED {
                assert!(result.get(key).is_some(), "{key} is missing in {line}");
            }
            assert_eq!(result["verified_pages"], (64 << 20) / 4096, "{line}");
            assert_eq!(result["mismatched_pages"], 0, "{line}");
            result["mode"].as_str().expect("a name").to_owned()
        })
        .collect();
    assert_eq!(modes, ["stock", "plain", "refer", "lazy"]);
    let html = fs::read_to_string(path).expect("the report is there");
    assert_eq!(html.matches("<svg").count(), 4);
    assert_nothing_left(directory.path());
}

/// Starts it and waits until it says `word`.
fn until(command: &mut Command, word: &str) -> Child {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains(word));
    assert!(found, "it never said {word}");
    // Its pipe must not fill up.
    std::thread::spawn(move || lines.for_each(drop));
    child
}

#[test]
fn broken_off_at_any_time_it_leaves_nothing() {
    if lacks_kernel() {
        return;
    }
    for word in ["making a disk", "taking the guest's speed", "round 1", "full speed"] {
        let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let mut child = until(&mut demo(directory.path(), &[]), word);
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::INT).expect("it runs");
        let status = child.wait().expect("it can be waited for");
        assert_eq!(status.code(), Some(8), "interrupted at {word}");
        assert_nothing_left(directory.path());
    }
}

#[test]
fn a_failure_leaves_nothing_either() {
    if lacks_kernel() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let output = demo(directory.path(), &["--workload", "no-such-workload"]).output();
    let output = output.expect("the program starts");
    assert!(!output.status.success());
    assert!(said(&output).contains("no-such-workload"), "{}", said(&output));
    assert_nothing_left(directory.path());

    // A guest that dies under the migration.
    let mut child = until(&mut demo(directory.path(), &[]), "round 1");
    let begun = Instant::now();
    while left_running(directory.path()).is_empty() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    for pid in left_running(directory.path()) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains("guest\0run")
            && let Some(pid) = pid.parse().ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let status = child.wait().expect("it can be waited for");
    assert!(!status.success());
    assert_nothing_left(directory.path());
}

/// Nothing tidies up behind a kill but those that were started, and where none were yet, the next demonstration.
#[test]
fn killed_at_any_time_it_leaves_nothing() {
    if lacks_kernel() {
        return;
    }
    for word in ["making a disk", "starting the guest", "round 1", "full speed"] {
        let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let mut child = until(&mut demo(directory.path(), &[]), word);
        child.kill().expect("it runs");
        child.wait().expect("it can be waited for");
        let begun = Instant::now();
        while !left_running(directory.path()).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(60), "killed at {word}: still there");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Those that were started had removed it all, unless they ended by themselves first, of what they were then missing.
        if fs::read_dir(directory.path()).expect("the directory is ours").next().is_some() {
            let next = demo(directory.path(), &["--workload", "no-such-workload"])
                .output()
                .expect("the program starts");
            assert!(!next.status.success());
        }
        assert_nothing_left(directory.path());
    }
}
