//! A worker that goes on when libxl's business is done: it goes on noting how far it is where `pageferry status` looks, and
//! writes down what it came to.
//!
//! Nobody is left to tell it to stop but a signal that ends it, which it then does not survive: a target's guest waits for
//! its pages for good, a source's target is told by the end of the connection.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use mover::journal::Role;
use mover::report::{Event, Phase};

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

/// Keeps this process at it until it is through; `noted` is what it has noted so far.
pub(super) fn finish(left: Lingering, domain: DomainId, mut noted: Option<Noted>) {
    let name = match left.role {
        Role::Source => "source",
        Role::Target => "target",
    };
    let migration = left.migration.to_string();
    let mut log = OpenOptions::new().append(true).create(true).open(LOG);
    let mut say = |text: &str| {
        if let Ok(log) = &mut log {
            // A disk that is full is no reason to leave the guest alone.
            let _ = writeln!(log, "migration {migration}, {domain}, {name}: {text}");
        }
    };
    if noted.is_none() {
        say("`pageferry status` will not show this: it could not be noted");
    }
    if let Some(noted) = &mut noted {
        noted.lanes(left.migration);
        noted.phase(Phase::Drain);
    }
    say("pages are outstanding");
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
