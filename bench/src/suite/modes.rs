//! All four modes over a shaped link, every workload, by the program as its user runs it (`pageferry demo --json`).
//!
//! In the clear, as xl and libxl move guests, so that figures compare; what TLS costs is the suite `stream`'s.
//!
//! The bounds of `lazy`: what the slower of link and disk needs for what it carried, the total time of `plain`, and
//! the downtime of `plain`. The demonstration compares every page; the time that takes is not in its figures.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use mover::limits::READ_DEPTH;
use mover::report::{Mode, Summary};
use mover::units::f64_of;

use super::disk::{MIXED, image};
use super::{Context, Suite};
use crate::fio;
use crate::program;
use crate::report::{Limit, Row};
use crate::stats::Runs;

/// All shipped workloads.
const WORKLOADS: [&str; 8] = [
    "idle-desktop",
    "remote-desktop",
    "package-upgrade",
    "compile",
    "file-copy",
    "video",
    "memory-hog",
    "overwrite-storm",
];
/// Bytes a second of TCP payload that a link of 1 Gbit/s carries: 1448 of every 1514 bytes on the wire.
const LINK_BYTES_PER_SECOND: f64 = 1e9 / 8.0 * 1448.0 / 1514.0;

/// The suite.
pub(crate) struct Modes;

impl Suite for Modes {
    fn name(&self) -> &'static str {
        "modes"
    }

    fn about(&self) -> &'static str {
        "stock, plain, refer and lazy over 1 Gbit/s, in the clear, every workload, by `pageferry demo` (root)"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let program = program::build()?;
        let file = image(&context.scratch, 1 << 30)?;
        let disk = fio::read(&file, MIXED, READ_DEPTH, 2.0)?.bytes_per_second;
        let memory = if context.quick { "256M" } else { "1G" };
        let mut rows = Vec::new();
        let wanted = |name: &str| context.workloads.is_empty() || context.workloads.iter().any(|w| w == name);
        if let Some(name) = context.workloads.iter().find(|name| !WORKLOADS.contains(&name.as_str())) {
            bail!("there is no workload {name}; there are {}", WORKLOADS.join(", "));
        }
        for workload in WORKLOADS.into_iter().filter(|name| wanted(name)) {
            eprintln!("  {workload}");
            let runs: Vec<Run> = (0..context.runs)
                .map(|_| demo(&program, workload, memory, &context.scratch))
                .collect::<Result<_>>()?;
            rows.extend(judge(workload, &runs, disk));
        }
        Ok(rows)
    }
}

/// The four modes' results of one demonstration.
struct Run(Vec<Summary>);

impl Run {
    fn of(&self, mode: Mode) -> &Summary {
        self.0.iter().find(|summary| summary.mode == mode.name()).expect("demo() has looked for all modes")
    }
}

fn demo(program: &Path, workload: &str, memory: &str, directory: &Path) -> Result<Run> {
    let output = Command::new(program)
        .args(["demo", "--json", "--quiet", "--link", "1gbit", "--plaintext", "--watch", "0s"])
        .args(["--workload", workload, "--memory", memory, "--dir"])
        .arg(directory)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("pageferry demo with workload {workload} ended with {}; its reason is above", output.status);
    }
    let summaries: Vec<Summary> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .context("pageferry demo's JSON is not a summary a line")?;
    for mode in Mode::ALL {
        let Some(summary) = summaries.iter().find(|summary| summary.mode == mode.name()) else {
            bail!("pageferry demo told nothing of mode {}", mode.name());
        };
        if summary.mismatched_pages != 0 || summary.verified_pages != summary.guest_bytes / 4096 {
            bail!("mode {}, {workload}: not every page was right: {summary:?}", mode.name());
        }
    }
    Ok(Run(summaries))
}

/// The rows of one workload.
fn judge(workload: &str, runs: &[Run], disk: f64) -> Vec<Row> {
    let figure = |value: &dyn Fn(&Run) -> f64| runs.iter().map(value).collect::<Runs>().figure();
    let total = |mode: Mode| move |run: &Run| run.of(mode).total_ms;
    let down = |mode: Mode| move |run: &Run| run.of(mode).downtime_ms;
    let mut rows = Vec::new();
    for mode in Mode::ALL {
        rows.push(Row::new(workload, &format!("total time, {}", mode.name()), "ms", figure(&total(mode))));
    }
    for mode in Mode::ALL {
        let row = Row::new(workload, &format!("downtime, {}", mode.name()), "ms", figure(&down(mode)));
        let allowed = figure(&down(Mode::Plain)).median.max(10.0);
        rows.push(if mode == Mode::Lazy { row.limited(Limit::AtMost(allowed)) } else { row });
    }
    let bound = |run: &Run| {
        let lazy = run.of(Mode::Lazy);
        let seconds = (f64_of(lazy.link_bytes) / LINK_BYTES_PER_SECOND).max(f64_of(lazy.disk_bytes) / disk);
        lazy.total_ms / (seconds * 1e3)
    };
    let to = |mode: Mode| move |run: &Run| run.of(Mode::Lazy).total_ms / run.of(mode).total_ms;
    let (to_plain, to_stock) = match workload {
        "remote-desktop" => (0.45, Some(0.35)),
        _ => (1.02, None),
    };
    rows.push(
        Row::new(workload, "lazy / slower of link and disk", "", figure(&bound)).limited(Limit::AtMost(1.2)),
    );
    rows.push(
        Row::new(workload, "lazy / plain", "", figure(&to(Mode::Plain))).limited(Limit::AtMost(to_plain)),
    );
    let row = Row::new(workload, "lazy / stock", "", figure(&to(Mode::Stock)));
    rows.push(match to_stock {
        Some(limit) => row.limited(Limit::AtMost(limit)),
        None => row,
    });
    type Take = fn(&Summary) -> u64;
    let source: Take = |lazy| lazy.extra_memory_source_bytes;
    let target: Take = |lazy| lazy.extra_memory_target_bytes;
    for (end, bytes) in [("source", source), ("target", target)] {
        let share = |run: &Run| {
            let lazy = run.of(Mode::Lazy);
            let allowed =
                f64::from(64 << 20) + f64_of(lazy.guest_bytes) * 0.002 + f64_of(lazy.pages_lazy) * 32.0;
            f64_of(bytes(lazy)) / allowed
        };
        let what = format!("memory beyond the guest / allowed, {end}");
        rows.push(Row::new(workload, &what, "", figure(&share)).limited(Limit::AtMost(1.0)));
    }
    rows
}
