//! All four modes over shaped links, every workload, by the program as its user runs it (`pageferry demo --json`).
//!
//! In the clear, as xl and libxl move guests, so that figures compare; what TLS costs is the suite `stream`'s.
//!
//! The bounds of `lazy`: what the slower of link and disk needs for what it carried, the total time of `plain`, and
//! the downtime of `plain`; over all workloads, the mean of its total time against `stock`'s and against `plain`'s, and
//! the best. They are asked for at 1 Gbit/s; on faster links the same figures are told. The demonstration compares every page; the time that takes is not in its figures.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use mover::limits::READ_DEPTH;
use mover::report::{Mode, Summary};
use mover::units::{f64_of, u64_of};

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
    fn name(self) -> &'static str {
        match self {
            Self::One => "1gbit",
            Self::Ten => "10gbit",
            Self::Unshaped => "unshaped",
        }
    }

    /// Bytes of TCP payload a second; none if it is not shaped.
    fn bytes_per_second(self) -> Option<f64> {
        match self {
            Self::One => Some(1e9 / 8.0 * PAYLOAD),
            Self::Ten => Some(1e10 / 8.0 * PAYLOAD),
            Self::Unshaped => None,
        }
    }
}

/// The suite.
pub(crate) struct Modes;

impl Suite for Modes {
    fn name(&self) -> &'static str {
        "modes"
    }

    fn about(&self) -> &'static str {
        "stock, plain, refer and lazy over a shaped link, in the clear, every workload, by `pageferry demo` (root)"
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
        for link in &context.links {
            let mut all = Vec::new();
            for workload in WORKLOADS.into_iter().filter(|name| wanted(name)) {
                eprintln!("  {workload}, {}", link.name());
                let runs: Vec<Run> = (0..context.runs)
                    .map(|_| demo(&program, workload, memory, *link, &context.scratch))
                    .collect::<Result<_>>()?;
                rows.extend(judge(workload, &runs, disk, *link));
                all.push(runs);
            }
            if all.len() > 1 {
                rows.extend(together(&all, *link));
            }
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

    /// Total time of `lazy` against that of another mode.
    fn lazy_to(&self, mode: Mode) -> f64 {
        self.of(Mode::Lazy).total_ms / self.of(mode).total_ms
    }
}

fn demo(program: &Path, workload: &str, memory: &str, link: Link, directory: &Path) -> Result<Run> {
    let mut command = Command::new(program);
    command.args(["demo", "--json", "--quiet", "--plaintext", "--watch", "0s"]);
    if link != Link::Unshaped {
        command.args(["--link", link.name()]);
    }
    let output = command
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

/// A limit where it is asked for: at 1 Gbit/s.
fn asked(row: Row, link: Link, limit: Limit) -> Row {
    if link == Link::One { row.limited(limit) } else { row }
}

/// The rows of one workload.
fn judge(workload: &str, runs: &[Run], disk: f64, link: Link) -> Vec<Row> {
    let case = format!("{workload}, {}", link.name());
    let figure = |value: &dyn Fn(&Run) -> f64| runs.iter().map(value).collect::<Runs>().figure();
    let each = |what: &str, unit, value: fn(&Summary) -> f64| {
        Mode::ALL.map(|mode| {
            Row::new(&case, &format!("{what}, {}", mode.name()), unit, figure(&|run| value(run.of(mode))))
        })
    };
    let mut rows = Vec::new();
    rows.extend(each("total time", "ms", |summary| summary.total_ms));
    rows.extend(each("time to restart", "ms", |summary| summary.restart_ms));
    let allowed = figure(&|run| run.of(Mode::Plain).downtime_ms).median.max(10.0);
    rows.extend(
        each("downtime", "ms", |summary| summary.downtime_ms)
            .map(|row| if row.what == "downtime, lazy" { row.limited(Limit::AtMost(allowed)) } else { row }),
    );
    rows.extend(each("over the link", "MiB", |summary| f64_of(summary.link_bytes) / f64_of(1 << 20)));
    rows.extend(each("from disk", "MiB", |summary| f64_of(summary.disk_bytes) / f64_of(1 << 20)));
    rows.extend(each("CPU of both ends", "ms", |summary| summary.cpu_ms_source + summary.cpu_ms_target));
    if let Some(rate) = link.bytes_per_second() {
        let bound = |run: &Run| {
            let lazy = run.of(Mode::Lazy);
            let seconds = (f64_of(lazy.link_bytes) / rate).max(f64_of(lazy.disk_bytes) / disk);
            lazy.total_ms / (seconds * 1e3)
        };
        let row = Row::new(&case, "lazy / slower of link and disk", "", figure(&bound));
        rows.push(asked(row, link, Limit::AtMost(1.15)));
    }
    let row = Row::new(&case, "lazy / plain", "", figure(&|run| run.lazy_to(Mode::Plain)));
    rows.push(asked(row, link, Limit::AtMost(if workload == "remote-desktop" { 0.45 } else { 1.02 })));
    let row = Row::new(&case, "lazy / stock", "", figure(&|run| run.lazy_to(Mode::Stock)));
    rows.push(if workload == "remote-desktop" { asked(row, link, Limit::AtMost(0.35)) } else { row });
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
        rows.push(Row::new(&case, &what, "", figure(&share)).limited(Limit::AtMost(1.0)));
    }
    rows
}

/// The rows over all workloads that were gone through: a mean and a best for each run, and the medians of those. The
/// limits are on all of them, so a part is told without.
fn together(all: &[Vec<Run>], link: Link) -> Vec<Row> {
    let case = format!("{} workloads, {}", all.len(), link.name());
    let whole = all.len() == WORKLOADS.len();
    let over = |mode: Mode, fold: &dyn Fn(&[f64]) -> f64| {
        let rounds = all.iter().map(Vec::len).min().unwrap_or(0);
        let each = (0..rounds).map(|round| {
            let ratios: Vec<f64> = all.iter().map(|runs| runs[round].lazy_to(mode)).collect();
            fold(&ratios)
        });
        each.collect::<Runs>().figure()
    };
    let mean = |ratios: &[f64]| ratios.iter().sum::<f64>() / f64_of(u64_of(ratios.len()));
    let best = |ratios: &[f64]| ratios.iter().copied().fold(f64::INFINITY, f64::min);
    [
        ("lazy / stock, mean", over(Mode::Stock, &mean), 0.40),
        ("lazy / plain, mean", over(Mode::Plain, &mean), 0.50),
        ("lazy / stock, best workload", over(Mode::Stock, &best), 0.12),
    ]
    .into_iter()
    .map(|(what, figure, most)| {
        let row = Row::new(&case, what, "", figure);
        if whole { asked(row, link, Limit::AtMost(most)) } else { row }
    })
    .collect()
}
