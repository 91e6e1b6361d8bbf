//! `pageferry demo`, run as its user runs it: one guest, moved from process to process over a link, every page compared.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use mover::report::{Mode, Summary};
use mover::units::f64_of;
use serde::Deserialize;

use crate::onlooker::Fared;

/// Part of a link's bits that TCP's payload is: 1448 of every 1514 bytes on the wire.
const PAYLOAD: f64 = 1448.0 / 1514.0;

/// A link that guests are moved over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Link {
    /// 1 Gbit/s, between two network namespaces.
    #[value(name = "1gbit")]
    One,
    /// 10 Gbit/s, likewise.
    #[value(name = "10gbit")]
    Ten,
    /// The loopback, as fast as it is.
    Unshaped,
}

impl Link {
    /// As it is called on the command line and in cases.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "1gbit",
            Self::Ten => "10gbit",
            Self::Unshaped => "unshaped",
        }
    }

    /// Bits a second on the wire; 0 if it is not shaped.
    #[must_use]
    pub fn bits_per_second(self) -> u64 {
        match self {
            Self::One => 1_000_000_000,
            Self::Ten => 10_000_000_000,
            Self::Unshaped => 0,
        }
    }

    /// Bytes of TCP payload a second; none if it is not shaped.
    #[must_use]
    pub fn bytes_per_second(self) -> Option<f64> {
        (self != Self::Unshaped).then(|| f64_of(self.bits_per_second()) / 8.0 * PAYLOAD)
    }
}

/// A demonstration, in the clear.
pub struct Demo<'a> {
    /// The program.
    pub program: &'a Path,
    /// What the guest does: a shipped workload's name, or a file.
    pub workload: &'a str,
    /// The guest's memory, as "1G".
    pub memory: &'a str,
    /// What it is moved over.
    pub link: Link,
    /// One migration after the other.
    pub modes: &'a [Mode],
    /// Whatever else to say to it.
    pub more: &'a [&'a str],
    /// Where its files go meanwhile.
    pub directory: &'a Path,
}

/// One migration of it.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Moved {
    /// The engine's account.
    #[serde(flatten)]
    pub summary: Summary,
    /// How the guest fared.
    pub fared: Fared,
}

impl Demo<'_> {
    /// Runs it: its migrations in the order of its modes.
    ///
    /// # Errors
    /// When it fails, tells of other migrations than were asked for, or compared fewer pages than there are or found one
    /// that differs.
    pub fn run(&self) -> Result<Vec<Moved>> {
        let Self { workload, .. } = self;
        let modes: Vec<_> = self.modes.iter().map(|mode| mode.name()).collect();
        let mut command = Command::new(self.program);
        command.args(["demo", "--json", "--quiet", "--plaintext", "--closely", "--watch", "0s"]);
        if self.link != Link::Unshaped {
            command.args(["--link", self.link.name()]);
        }
        command.args(["--workload", workload, "--memory", self.memory, "--modes", &modes.join(",")]);
        let output = command
            .args(self.more)
            .arg("--dir")
            .arg(self.directory)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        if !output.status.success() {
            bail!(
                "pageferry demo with workload {workload} ended with {}; its reason is above",
                output.status
            );
        }
        let moved: Vec<Moved> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context("pageferry demo's JSON is not a summary a line, with how the guest fared")?;
        let told: Vec<_> = moved.iter().map(|moved| moved.summary.mode.as_str()).collect();
        if told != modes {
            bail!("pageferry demo was to use modes {modes:?}, and told of {told:?}");
        }
        for Moved { summary, .. } in &moved {
            if summary.mismatched_pages != 0 || summary.verified_pages != summary.guest_bytes / 4096 {
                bail!("mode {}, {workload}: not every page was right: {summary:?}", summary.mode);
            }
        }
        Ok(moved)
    }
}
