//! Guests of several kinds on one host, all moved to another over a shaped link and back, by `pageferry send` and `receive`
//! as an operator would. Names change from hop to hop, for both hosts are this machine.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use mover::evacuation::{self, Load, UnderWay};
use mover::net::lab::{End, Lab, Shape};
use mover::report::{Mode, Summary};
use serde_json::Value;
use tempfile::TempDir;

use crate::nas::Nas;
use crate::owned::Owned;

/// How often it is asked who is to leave next.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How guests leave their host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// So many at a time, as they are listed.
    Given(usize),
    /// [`evacuation::next`].
    Planned,
}

/// The guests, their disks, and the link.
pub struct Fleet {
    program: PathBuf,
    // Unmounted before the link is gone.
    nas: Option<Nas>,
    lab: Lab,
    guests: Vec<String>,
    /// How often they have all been moved.
    hops: usize,
    directory: TempDir,
}

/// What a fleet is to be.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    /// The program.
    pub program: &'a Path,
    /// What its guests do, one each.
    pub workloads: &'a [&'a str],
    /// The memory of each, as "512M".
    pub memory: &'a str,
    /// The disk of each.
    pub disk: &'a str,
    /// Of the link.
    pub bits_per_second: u64,
    /// Where its files go.
    pub scratch: &'a Path,
    /// Whether the disk is on the link; then there is one guest.
    pub nas: bool,
}

/// What an evacuation came to, in seconds from its begin.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Evacuated {
    /// Until the last guest was away.
    pub makespan: f64,
    /// Until a guest was away, on average.
    pub mean: f64,
    /// Bytes of all of them over the link.
    pub link_bytes: u64,
    /// And from disk.
    pub disk_bytes: u64,
}

/// Where an evacuation stands.
struct Progress {
    waiting: Vec<usize>,
    /// And in how many seconds each will have restarted, as its migration has last told.
    under_way: Vec<(usize, Option<f64>)>,
    /// When each came to its end, and what it took.
    ends: Vec<(f64, Summary)>,
    failed: bool,
}

impl Fleet {
    /// Starts a guest of each of the workloads, each with a disk of its own.
    ///
    /// # Errors
    /// Without root, or when something does not start.
    ///
    /// # Panics
    /// If several guests are to have their storage on the link.
    pub fn start(setup: &Setup<'_>) -> Result<Self> {
        let Setup { program, workloads, memory, disk, scratch, .. } = *setup;
        let directory = tempfile::Builder::new().prefix("fleet-").tempdir_in(scratch)?;
        for name in ["run", "state"] {
            fs::create_dir(directory.path().join(name))?;
        }
        let lab = Lab::new(Shape::of(setup.bits_per_second))?;
        let program = program.to_owned();
        let mut fleet = Self { program, nas: None, lab, guests: Vec::new(), hops: 0, directory };
        let first = fleet.image(0);
        fleet.must(&["image", "--quiet", "--size", disk, &first])?;
        if setup.nas {
            assert_eq!(workloads.len(), 1, "storage on the link is of one disk");
            let shown = fleet.directory.path().join("nas");
            fleet.nas = Some(Nas::mount(&fleet.lab, Path::new(&first), &shown)?);
        }
        for (number, workload) in workloads.iter().enumerate() {
            let image = fleet.image(number);
            if number > 0 {
                fs::copy(&first, &image).with_context(|| format!("cannot make {image}"))?;
            }
            fleet.must(&["index", "build", "--quiet", &image])?;
            fleet.guests.push((*workload).to_owned());
        }
        // Images are copied before any guest writes to its own.
        for (number, workload) in workloads.iter().enumerate() {
            let (name, image) = (fleet.name(number), fleet.image(number));
            let shape = ["--memory", memory, "--disk", &image, "--workload", workload, "--prefault"];
            fleet.must(&[["guest", "start", "--quiet", &name].as_slice(), &shape].concat())?;
        }
        Ok(fleet)
    }

    fn image(&self, number: usize) -> String {
        let own = || self.directory.path().join(format!("disk{number}.img"));
        self.nas.as_ref().map_or_else(own, Nas::path).display().to_string()
    }
    fn name(&self, number: usize) -> String {
        format!("g{number}-{}", self.hops)
    }

    fn command(&self, end: Option<End>) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command.env("XDG_RUNTIME_DIR", self.directory.path().join("run"));
        command.env("XDG_STATE_HOME", self.directory.path().join("state"));
        command.stdin(Stdio::null());
        if let Some(end) = end {
            self.lab.place(end, &mut command)?;
        }
        Ok(command)
    }

    fn must(&self, words: &[&str]) -> Result<Output> {
        let output = self.command(None)?.args(words).output().context("cannot run pageferry")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`pageferry {}`: {}", words.join(" "), said.trim());
        Ok(output)
    }

    /// What each guest would take in mode `lazy`, by `pageferry plan`.
    ///
    /// # Errors
    /// When it fails.
    pub fn loads(&self, link: &str) -> Result<Vec<Load>> {
        let load = |number| -> Result<Load> {
            let name = self.name(number);
            let words = ["plan", "--json", "--quiet", "--guest", &name, "--link", link, "--sample", "1s"];
            let told: Value = serde_json::from_slice(&self.must(&words)?.stdout)?;
            let modes = told["modes"].as_array().context("a plan has modes")?;
            let lazy = modes.iter().find(|mode| mode[0] == "lazy").context("a plan has mode lazy")?;
            let part = |bytes: &str, rate: &str| {
                Some(lazy[1][bytes].as_f64()? / told[rate].as_f64().filter(|rate| *rate > 0.0)?)
            };
            let seconds = part("link_bytes", "link_rate").zip(part("disk_bytes", "disk_rate"));
            let (link_s, disk_s) = seconds.context("a plan has bytes and rates")?;
            Ok(Load { link_s, disk_s })
        };
        (0..self.guests.len()).map(load).collect()
    }

    /// Moves all guests to the other host.
    ///
    /// # Errors
    /// When a migration fails.
    pub fn evacuate(&mut self, order: Order, loads: &[Load]) -> Result<Evacuated> {
        for number in 0..self.guests.len() {
            self.must(&["index", "update", "--quiet", &self.image(number)])?;
        }
        let progress = Mutex::new(Progress {
            waiting: (0..self.guests.len()).collect(),
            under_way: Vec::new(),
            ends: Vec::new(),
            failed: false,
        });
        let (changed, begun, this) = (Condvar::new(), Instant::now(), &*self);
        thread::scope(|scope| {
            let mut movers = Vec::new();
            let mut now = progress.lock().unwrap_or_else(PoisonError::into_inner);
            while !now.waiting.is_empty() && !now.failed {
                let Some(number) = now.start_next(order, loads) else {
                    let waited = changed.wait_timeout(now, LOOK_EVERY);
                    now = waited.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                };
                let (progress, changed) = (&progress, &changed);
                movers.push(scope.spawn(move || {
                    let moved = this.migrate(number, Mode::Lazy, &[], &|left| {
                        let mut now = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        let mut under_way = now.under_way.iter_mut();
                        under_way
                            .find(|(other, _)| *other == number)
                            .into_iter()
                            .for_each(|one| one.1 = Some(left));
                        changed.notify_all();
                    });
                    let mut now = progress.lock().unwrap_or_else(PoisonError::into_inner);
                    now.under_way.retain(|(other, _)| *other != number);
                    now.failed |= moved.is_err();
                    let moved = moved.with_context(|| this.guests[number].clone());
                    let moved = moved.map(|summary| now.ends.push((begun.elapsed().as_secs_f64(), summary)));
                    changed.notify_all();
                    moved
                }));
            }
            drop(now);
            movers.into_iter().try_for_each(|mover| mover.join().map_err(|_| anyhow!("a thread panicked"))?)
        })?;
        self.hops += 1;
        let ends = progress.into_inner().unwrap_or_else(PoisonError::into_inner).ends;
        let count = mover::units::f64_of(mover::units::u64_of(ends.len()));
        let makespan = ends.iter().map(|(end, _)| *end).fold(0.0, f64::max);
        let mean = ends.iter().map(|(end, _)| end).sum::<f64>() / count;
        let link_bytes = ends.iter().map(|(_, summary)| summary.link_bytes).sum();
        let disk_bytes = ends.iter().map(|(_, summary)| summary.disk_bytes).sum();
        Ok(Evacuated { makespan, mean, link_bytes, disk_bytes })
    }

    /// Moves the only guest, every page compared.
    ///
    /// # Errors
    /// When that fails, or a page is wrong.
    pub fn moved(&mut self, mode: Mode) -> Result<Summary> {
        self.must(&["index", "update", "--quiet", &self.image(0)])?;
        let summary = self.migrate(0, mode, &["--verify"], &|_| ())?;
        if summary.mismatched_pages != 0 || summary.verified_pages != summary.guest_bytes / 4096 {
            bail!("mode {}: not every page was right: {summary:?}", mode.name());
        }
        self.hops += 1;
        Ok(summary)
    }

    /// One guest to the other host, in the clear, and always in the same direction of the link. `told` hears in how many
    /// seconds it will have restarted, where its migration says that.
    fn migrate(&self, number: usize, mode: Mode, more: &[&str], told: &dyn Fn(f64)) -> Result<Summary> {
        let (from, to) = (End::Source, End::Target);
        let (name, there) = (self.name(number), format!("g{number}-{}", self.hops + 1));
        let listen = format!("{}:0", to.address());
        let mut receive = self.command(Some(to))?;
        receive.args(["receive", "--json", "--quiet", "--plaintext", "--name", &there, "--listen", &listen]);
        let mut target = Owned(receive.stdout(Stdio::piped()).spawn().context("cannot run pageferry")?);
        let said = target.0.stdout.take().context("a target has a standard output")?;
        let line = BufReader::new(said).lines().next().context("the target said nothing")??;
        let listening: Value = serde_json::from_str(&line)?;
        let word = |key: &str| listening[key].as_str().context("a target tells address and token");
        let (address, token) = (word("address")?, word("token")?);
        let mut send = self.command(Some(from))?;
        send.args([
            "send",
            "--json-events",
            "--quiet",
            "--plaintext",
            "--mode",
            mode.name(),
            "--guest",
            &name,
        ]);
        send.args(["--to", address, "--token", token]).args(more);
        let mut source = Owned(send.stdout(Stdio::piped()).spawn().context("cannot run pageferry")?);
        let said = source.0.stdout.take().context("a source has a standard output")?;
        let mut summary = None;
        for line in BufReader::new(said).lines() {
            let mut line: Value = serde_json::from_str(&line?)?;
            match line["event"].as_str() {
                Some("sample") => {
                    line["restart_in_ms"].as_f64().into_iter().for_each(|left| told(left / 1e3))
                }
                Some("phase") if line["phase"] == "drain" => told(0.0),
                Some("ended") => summary = Some(serde_json::from_value(line["summary"].take())?),
                _ => {}
            }
        }
        ensure!(source.0.wait()?.success(), "the source of {name} failed; its reason is above");
        ensure!(target.0.wait()?.success(), "the target of {name} failed");
        summary.context("pageferry send told of no end")
    }

    /// Has every guest look at all of its pages.
    ///
    /// # Errors
    /// When one finds a wrong page.
    pub fn check(&self) -> Result<()> {
        (0..self.guests.len())
            .try_for_each(|number| self.must(&["guest", "check", "--quiet", &self.name(number)]).map(drop))
    }
}

impl Progress {
    /// The guest to leave now, if one is to; it is under way then.
    fn start_next(&mut self, order: Order, loads: &[Load]) -> Option<usize> {
        let at = match order {
            Order::Given(most) => (self.under_way.len() < most).then_some(0),
            Order::Planned => {
                let waiting: Vec<Load> = self.waiting.iter().map(|number| loads[*number]).collect();
                let under_way: Vec<UnderWay> = self
                    .under_way
                    .iter()
                    .map(|(number, left_s)| UnderWay { load: loads[*number], left_s: *left_s })
                    .collect();
                evacuation::next(&waiting, &under_way)
            }
        }?;
        let number = self.waiting.remove(at);
        self.under_way.push((number, None));
        Some(number)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for number in 0..self.guests.len() {
            // After a failure a guest may be at either hop, or at none.
            for name in [self.name(number), format!("g{number}-{}", self.hops + 1)] {
                let ended = self.command(None).and_then(|mut command| {
                    let output = command.args(["guest", "stop", "--quiet", &name]).output()?;
                    if output.status.success() { Ok(()) } else { bail!("it is not there") }
                });
                drop(ended);
            }
        }
    }
}
