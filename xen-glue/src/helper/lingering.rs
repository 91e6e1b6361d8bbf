//! A worker that goes on when libxl's business is done: it goes on noting how far it is where `pageferry status` looks, and
//! writes down what it came to.
//!
//! Nobody is left to tell it to stop but a signal that ends it, which it then does not survive: a target's guest waits for
//! its pages for good, a source's target is told by the end of the connection.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::process::{Child, Command, Stdio};

use mover::journal::Role;
use mover::report::{Event, Phase};
use mover::wire::hello::MigrationId;

use super::note::Noted;
use crate::abi::DomainId;
use crate::ferry::Lingering;

/// Where what it came to is written down.
const LOG: &str = "/var/log/xen/pageferry.log";

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

/// What is written down, each line with what it is about.
struct Log {
    file: io::Result<File>,
    about: String,
}

impl Log {
    fn open(domain: DomainId, migration: MigrationId, role: Role) -> Self {
        let name = match role {
            Role::Source => "source",
            Role::Target => "target",
        };
        let file = OpenOptions::new().append(true).create(true).open(LOG);
        Self { file, about: format!("migration {migration}, {domain}, {name}") }
    }

    fn say(&mut self, text: &str) {
        if let Ok(file) = &mut self.file {
            // A disk that is full is no reason to leave the guest alone.
            let _ = writeln!(file, "{}: {text}", self.about);
        }
    }
}

/// Writes these lines down.
pub(super) fn write_down(domain: DomainId, migration: MigrationId, role: Role, lines: &[String]) {
    let mut log = Log::open(domain, migration, role);
    lines.iter().for_each(|text| log.say(text));
}

/// Keeps this process at it until it is through; `noted` is what it has noted so far, `begins` what is written down first.
pub(super) fn finish(left: Lingering, domain: DomainId, mut noted: Option<Noted>, begins: &[String]) {
    let mut log = Log::open(domain, left.migration, left.role);
    let mut say = |text: &str| log.say(text);
    if noted.is_none() {
        say("`pageferry status` will not show this: it could not be noted");
    }
    if let Some(noted) = &mut noted {
        noted.lanes(left.migration);
        noted.phase(Phase::Drain);
    }
    begins.iter().for_each(|text| say(text));
    let why = "a guest that was moved still needs pages from here, or is getting them";
    let inhibitor = Inhibitor::hold(why);
    if inhibitor.is_none() {
        say("nothing keeps this host from being shut down meanwhile: there is no systemd-inhibit");
    }
    let outcome = left.finish(|event| {
        if let Event::Notice { text, .. } = event {
            say(text);
        }
        if let Some(noted) = &mut noted {
            noted.engine(event);
        }
    });
    match outcome {
        Ok(text) => say(&format!("done. {text}")),
        Err(error) => say(&format!("failed: {error}")),
    }
}
