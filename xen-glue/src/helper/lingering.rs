//! A worker that goes on when libxl's business is done: it notes how far it is where `pageferry status` looks, and writes down
//! what it came to.
//!
//! Nobody is left to tell it to stop but a signal that ends it, which it then does not survive: a target's guest waits for
//! its pages for good, a source's target is told by the end of the connection.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mover::journal::Role;
use mover::process::launch;
use mover::report::{Event, Phase, Sample};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use crate::abi::DomainId;
use crate::ferry::Lingering;

/// Bytes of a note: written whole at a time, blanks behind the text.
const NOTE_BYTES: usize = 2048;
/// Where what it came to is written down.
const LOG: &str = "/var/log/xen/pageferry.log";

/// A note as `pageferry status` reads it.
#[derive(Serialize)]
struct Note {
    migration: String,
    role: Role,
    guest: String,
    peer: String,
    pid: u32,
    at_ms: f64,
    phase: Option<Phase>,
    sample: Option<Sample>,
}

/// The note's file, locked while this lives and removed then.
struct Noted {
    file: File,
    path: PathBuf,
}

impl Noted {
    fn make(directory: &Path, name: &str) -> std::io::Result<Self> {
        if !directory.is_dir() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let path = directory.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { file, path })
    }

    fn write(&self, note: &Note) {
        let Ok(mut text) = serde_json::to_vec(note) else { return };
        text.resize(NOTE_BYTES.max(text.len()), b' ');
        // Out of date, it still says that this process is at work.
        let _ = self.file.write_all_at(&text, 0);
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        // Left behind, it is found unlocked and removed by `pageferry status`.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Keeps the host from being shut down for as long as this lives, and this process with it: its end of the pipe is what the
/// other program reads.
struct Inhibitor(Child);

impl Inhibitor {
    /// None where there is nothing that could: no systemd.
    fn hold(why: &str) -> Option<Self> {
        let child = Command::new("systemd-inhibit")
            .args(["--what=shutdown", "--mode=block", "--who=pageferry", &format!("--why={why}"), "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        child.ok().map(Self)
    }
}

impl Drop for Inhibitor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // Whatever it has to say, it holds nothing any more.
        let _ = self.0.wait();
    }
}

/// Keeps this process at it until it is through.
pub(super) fn finish(left: Lingering, domain: DomainId) {
    let (role, name) = match left.role {
        Role::Source => (Role::Source, "source"),
        Role::Target => (Role::Target, "target"),
    };
    let migration = left.migration.to_string();
    let mut note = Note {
        migration: migration.clone(),
        role,
        guest: domain.to_string(),
        peer: String::new(),
        pid: std::process::id(),
        at_ms: 0.0,
        phase: Some(Phase::Drain),
        sample: None,
    };
    let noted = Noted::make(&launch::notes_dir(), &format!("{migration}-{name}.migration"));
    let mut log = OpenOptions::new().append(true).create(true).open(LOG);
    let mut say = |text: &str| {
        if let Ok(log) = &mut log {
            // A disk that is full is no reason to leave the guest alone.
            let _ = writeln!(log, "migration {migration}, {domain}, {name}: {text}");
        }
    };
    if let Err(error) = &noted {
        say(&format!("`pageferry status` will not show this: {error}"));
    }
    if let Ok(noted) = &noted {
        noted.write(&note);
    }
    say("pages are outstanding");
    let why = "a guest that was moved still needs pages from here, or is getting them";
    let inhibitor = Inhibitor::hold(why);
    if inhibitor.is_none() {
        say("nothing keeps this host from being shut down meanwhile: there is no systemd-inhibit");
    }
    let outcome = left.finish(|event| {
        match event {
            Event::Phase { at_ms, phase } => (note.at_ms, note.phase) = (*at_ms, Some(*phase)),
            Event::Sample(sample) => (note.at_ms, note.sample) = (sample.at_ms, Some(*sample)),
            Event::Notice { at_ms, text } => {
                note.at_ms = *at_ms;
                say(text);
            }
            Event::Round { .. } => {}
        }
        if let Ok(noted) = &noted {
            noted.write(&note);
        }
    });
    match outcome {
        Ok(text) => say(&format!("done. {text}")),
        Err(error) => say(&format!("failed: {error}")),
    }
}
