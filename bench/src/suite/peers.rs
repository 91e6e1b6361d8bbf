//! Other movers of memory, with the same bytes between two processes of this machine: QEMU of the distribution in each of
//! its ways, CRIU, and stock Xen. What a peer can't do here is an empty cell with its reason.
//!
//! The memory holds nothing that can be compressed, and nothing of the machine runs: what is compared is how fast and
//! for how much processor time memory gets to the other process. Every way is run once with all bytes compared.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use mover::memory::Mapping;
use mover::units::{f64_of, u64_of};
use rustix::fs::ftruncate;
use tempfile::TempDir;

use super::bare::{Ends, Shape};
use super::{Context, Suite};
use crate::buffer::{digest, fill, gib};
use crate::qemu::{self, Moved, Way};
use crate::report::{Limit, Row};
use crate::stats::Runs;

/// At least so many times as fast as QEMU's best way.
const AGAINST_QEMU: Limit = Limit::AtLeast(2.1);

/// The suite.
pub(crate) struct Peers;

impl Suite for Peers {
    fn name(&self) -> &'static str {
        "peers"
    }

    fn about(&self) -> &'static str {
        "the same 2 GiB by QEMU in each of its ways, by CRIU, by stock Xen and by the engine in mode plain"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let bytes = if context.quick { gib(1) / 2 } else { gib(2) };
        let case = format!("{} MiB, nothing runs, loopback", bytes >> 20);
        let mut rows = Vec::new();
        let memory = Memory::make(bytes)?;
        let mut ways = Vec::new();
        for way in qemu_ways() {
            match way.and_then(|way| memory.first(way).map(|()| way)) {
                Ok(way) => ways.push((way, Runs::default(), Runs::default())),
                Err(Unable { name, reason }) => {
                    rows.push(Row::missing(&case, &format!("rate, {name}"), "GB/s", &reason))
                }
            }
        }
        let ends = RefCell::new(Ends::start(bytes)?);
        let shape = Shape::engine(false);
        ends.borrow_mut().copy(shape, true).context("the engine's first run, every byte compared")?;
        let (mut rate, mut cpu, mut ratio) = (Runs::default(), Runs::default(), Runs::default());
        let gigabytes = f64_of(u64_of(bytes)) / 1e9;
        for _ in 0..context.runs {
            let ours = ends.borrow_mut().copy(shape, false)?;
            rate.push(ours.gigabytes_per_second);
            cpu.push(ours.cpu_per_gigabyte);
            let mut best: f64 = 0.0;
            for (way, rate, cpu) in &mut ways {
                let Moved { seconds, cpu_seconds } = memory.moved(*way)?;
                rate.push(gigabytes / seconds);
                cpu.push(cpu_seconds / gigabytes);
                best = best.max(gigabytes / seconds);
            }
            if best > 0.0 {
                ratio.push(ours.gigabytes_per_second / best);
            }
        }
        rows.push(Row::new(&case, "rate, pageferry", "GB/s", rate.figure()));
        rows.push(Row::new(&case, "CPU of both ends, pageferry", "s/GB", cpu.figure()));
        if !ways.is_empty() {
            let what = "rate, pageferry / QEMU's best of the round";
            rows.push(Row::new(&case, what, "", ratio.figure()).limited(AGAINST_QEMU));
        }
        for (way, rate, cpu) in ways {
            rows.push(Row::new(&case, &format!("rate, {}", way.name()), "GB/s", rate.figure()));
            rows.push(Row::new(&case, &format!("CPU of both ends, {}", way.name()), "s/GB", cpu.figure()));
        }
        rows.push(Row::missing(&case, "rate, CRIU", "GB/s", &criu()));
        let xen = "it takes a hypervisor: `cargo xtask xen-lab speed` compares on two emulated hosts";
        rows.push(Row::missing(&case, "rate, stock Xen", "GB/s", xen));
        Ok(rows)
    }
}

/// A peer that can't do it here.
struct Unable {
    name: String,
    reason: String,
}

/// QEMU's ways, if there is a QEMU.
fn qemu_ways() -> Vec<Result<Way, Unable>> {
    match qemu::version() {
        Some(version) => {
            eprintln!("  QEMU {version}");
            Way::ALL.into_iter().map(Ok).collect()
        }
        None => vec![Err(Unable {
            name: "QEMU".to_owned(),
            reason: "it is not installed (apt-get install qemu-system-x86)".to_owned(),
        })],
    }
}

/// Two files in tmpfs as the memory of two machines.
struct Memory {
    directory: TempDir,
    bytes: usize,
}

impl Memory {
    fn make(bytes: usize) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("pageferry-bench-")
            .tempdir_in("/dev/shm")
            .context("QEMU's memory is made in /dev/shm, where nothing can be made")?;
        let memory = Self { directory, bytes };
        for (end, seed) in [("source", 1), ("target", 2)] {
            let file = File::create_new(memory.path(end))?;
            ftruncate(&file, u64_of(bytes))?;
            drop(file);
            fill(&memory.map(end)?, seed);
        }
        Ok(memory)
    }

    fn path(&self, end: &str) -> PathBuf {
        self.directory.path().join(end)
    }

    fn map(&self, end: &str) -> Result<Mapping> {
        let path = self.path(end);
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Mapping::shared(file.as_fd(), self.bytes, true)?)
    }

    /// One migration.
    fn moved(&self, way: Way) -> Result<Moved> {
        let sockets: &Path = self.directory.path();
        qemu::migrate(way, &self.path("source"), &self.path("target"), self.bytes, sockets)
            .with_context(|| way.name())
    }

    /// The first of a way: whether it can be done here, and whether every byte arrives.
    fn first(&self, way: Way) -> Result<(), Unable> {
        let tried = self.moved(way).and_then(|_| {
            let (source, target) = (self.map("source")?, self.map("target")?);
            if digest(&source) != digest(&target) {
                bail!("its target has other bytes than its source");
            }
            // What the next way finds must not be right already.
            fill(&target, 2);
            Ok(())
        });
        tried.map_err(|error| Unable { name: way.name(), reason: format!("{error:#}") })
    }
}

/// Why CRIU's figure is missing.
fn criu() -> String {
    let output = Command::new("criu").arg("check").stdin(Stdio::null()).output();
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            "it is not installed (apt-get install criu)".to_owned()
        }
        Err(error) => format!("it can't be run: {error}"),
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let line = said
                .lines()
                .find(|line| line.contains("Error") && !line.contains("exited"))
                .unwrap_or("without a word")
                .trim()
                .to_owned();
            format!("`criu check` fails here: {line}")
        }
        Ok(_) => "it dumps to files and restores from them: no way without both was found to hold it against"
            .to_owned(),
    }
}
