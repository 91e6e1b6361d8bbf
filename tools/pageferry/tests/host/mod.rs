//! A host for tests of `receive` and `send`: processes of this machine with directories of their own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest that anything here may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A host of its own: directories, an image, a guest called `desk`.
pub(crate) struct Host {
    directory: tempfile::TempDir,
}

#[allow(dead_code, reason = "each test program has use for a part of it")]
impl Host {
    pub(crate) fn new() -> Option<Self> {
        Self::holding(&[])
    }
    /// With an image made with these flags.
    pub(crate) fn holding(flags: &[&str]) -> Option<Self> {
        let host = Self { directory: tempfile::tempdir_in("/var/tmp").expect("a temporary directory") };
        if !host.run(&["doctor", "--quiet"]).status.success() {
            eprintln!(
                "SKIPPED: two ends: this kernel lacks something no migration works without (pageferry doctor)"
            );
            return None;
        }
        let image = host.image();
        let image = image.to_str().expect("a plain name");
        host.must(&[&["image", image, "--size", "64M"], flags].concat());
        host.must(&["index", "build", image]);
        host.must(&["guest", "start", "desk", "--memory", "32M", "--disk", image]);
        Some(host)
    }
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.env("XDG_RUNTIME_DIR", self.path("run")).env("XDG_STATE_HOME", self.path("state"));
        command
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("the program starts")
    }
    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
    /// Starts a target; its process and the command it prints for the source.
    pub(crate) fn receive(&self, more: &[&str]) -> (Child, String) {
        self.receive_by(self.command(), more)
    }
    /// The same by a command made before.
    pub(crate) fn receive_by(&self, mut command: Command, more: &[&str]) -> (Child, String) {
        let mut target = command
            .args(["receive", "--listen", "127.0.0.1:0", "--name", "moved", "--quiet"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let stdout = target.stdout.take().expect("a pipe");
        let line = BufReader::new(stdout).lines().next().expect("a line").expect("text");
        (target, line)
    }
    /// Runs what `receive` printed, changed by `change`.
    pub(crate) fn send(&self, line: &str, change: impl Fn(&str) -> String) -> Output {
        let line = change(&line.replace("NAME", "desk"));
        let words: Vec<_> = line.split_whitespace().skip(1).collect();
        self.run(&words)
    }
    /// Begins a migration that takes its time, and waits until `shown` sees it; the processes of source and target.
    pub(crate) fn begin(&self, shown: impl Fn(&Self) -> bool) -> (Child, Child) {
        let (target, line) = self.receive(&[]);
        let line = line.replace("NAME", "desk");
        let mut command = self.command();
        command.args(line.split_whitespace().skip(1)).args(["--bandwidth", "1MiB/s"]);
        let source = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        let began = Instant::now();
        while !shown(self) {
            assert!(began.elapsed() < LIMIT, "the migration never began");
            thread::sleep(Duration::from_millis(10));
        }
        (source, target)
    }
    pub(crate) fn runs(&self, guest: &str) -> bool {
        self.must(&["guest", "list", "--quiet"]).contains(&format!("{guest}: running"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Those that are not there any more: as good.
        for guest in ["desk", "moved"] {
            let _ = self.command().args(["guest", "stop", guest, "--quiet"]).output();
        }
    }
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn end(mut target: Child) -> Option<i32> {
    target.wait().expect("it can be waited for").code()
}
