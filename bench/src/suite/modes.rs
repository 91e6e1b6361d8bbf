//! All four modes over shaped links, every workload, by the program as its user runs it (`pageferry demo --json`).
//!
//! In the clear, as xl and libxl move guests, so that figures compare; what TLS costs is the suite `stream`'s.
//!
//! The bounds of `lazy`: what the slower of link and disk needs for what it carried, the total time of `plain`, and
//! the downtime of `plain`; over all workloads, the mean of its total time against `stock`'s and against `plain`'s, and
//! the best. They are asked for at 1 Gbit/s; on faster links the same figures are told. The demonstration compares every page; the time that takes is not in its figures.
//!
//! How the guest fared: its work a second while it moves (downtime included) and behind it as parts of what it was before,
//! and what half and 99 of 100 of its page accesses stayed under, each with the content check and the filling that the
//! guest does in one. `lazy`'s bytes over the link are held against what no disk holds and no page repeats.

use std::path::Path;

use anyhow::{Result, bail};
use mover::limits::READ_DEPTH;
use mover::report::{Mode, Summary};
use mover::units::{f64_of, u64_of};

use super::disk::{MIXED, image};
use super::{Context, Storage, Suite};
use crate::demo::{Demo, Link, Moved};
use crate::fio;
use crate::fleet::{Fleet, Setup};
use crate::onlooker::Fared;
use crate::program;
use crate::report::{Limit, Row};
use crate::stats::Runs;

/// All shipped workloads.
pub(super) const WORKLOADS: [&str; 8] = [
    "idle-desktop",
    "remote-desktop",
    "package-upgrade",
    "compile",
    "file-copy",
    "video",
    "memory-hog",
    "overwrite-storm",
];
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
        for link in context.links.iter().filter(|_| context.storage.contains(&Storage::Nas)) {
            for workload in WORKLOADS.into_iter().filter(|name| wanted(name)) {
                rows.extend(on_the_link(context, &program, workload, memory, *link)?);
            }
        }
        for link in context.links.iter().filter(|_| context.storage.contains(&Storage::Own)) {
            let mut all = Vec::new();
            for workload in WORKLOADS.into_iter().filter(|name| wanted(name)) {
                eprintln!("  {workload}, {}", link.name());
                let demo = Demo {
                    program: &program,
                    workload,
                    memory,
                    link: *link,
                    modes: &Mode::ALL,
                    more: &[],
                    directory: &context.scratch,
                };
                let runs: Vec<Run> = (0..context.runs).map(|_| demo.run().map(Run)).collect::<Result<_>>()?;
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
struct Run(Vec<Moved>);

impl Run {
    fn moved(&self, mode: Mode) -> &Moved {
        let mut all = self.0.iter();
        all.find(|moved| moved.summary.mode == mode.name()).expect("a demonstration tells of every mode")
    }

    fn of(&self, mode: Mode) -> &Summary {
        &self.moved(mode).summary
    }

    /// Total time of `lazy` against that of another mode.
    fn lazy_to(&self, mode: Mode) -> f64 {
        self.of(Mode::Lazy).total_ms / self.of(mode).total_ms
    }
}

/// A limit where it is asked for: at 1 Gbit/s.
fn asked(row: Row, link: Link, limit: Limit) -> Row {
    if link == Link::One { row.limited(limit) } else { row }
}

/// One workload in all modes, its disk on the link.
fn on_the_link(
    context: &Context,
    program: &Path,
    workload: &str,
    memory: &str,
    link: Link,
) -> Result<Vec<Row>> {
    let case = format!("{workload}, {}, storage on it", link.name());
    let Some(rate) = link.bytes_per_second() else {
        let reason = "a link that is not shaped has no rate to share";
        return Ok(vec![Row::missing(&case, "total time", "ms", reason)]);
    };
    eprintln!("  {case}");
    let mut fleet = Fleet::start(&Setup {
        program,
        workloads: &[workload],
        memory,
        disk: if context.quick { "512M" } else { "2G" },
        bits_per_second: link.bits_per_second(),
        scratch: &context.scratch,
        nas: true,
    })?;
    let mut runs = Vec::new();
    for _ in 0..context.runs {
        runs.push(Mode::ALL.map(|mode| fleet.moved(mode)).into_iter().collect::<Result<Vec<_>>>()?);
    }
    fleet.check()?;
    let [stock, plain, _, lazy] = [0, 1, 2, 3];
    let mut rows = Vec::new();
    type Take = fn(&Summary) -> f64;
    let figures: [(&str, &'static str, Take); 5] = [
        ("total time", "ms", |summary| summary.total_ms),
        ("time to restart", "ms", |summary| summary.restart_ms),
        ("downtime", "ms", |summary| summary.downtime_ms),
        ("over the link", "MiB", |summary| f64_of(summary.link_bytes) / f64_of(1 << 20)),
        ("from disk", "MiB", |summary| f64_of(summary.disk_bytes) / f64_of(1 << 20)),
    ];
    for (what, unit, take) in figures {
        for (at, mode) in Mode::ALL.into_iter().enumerate() {
            let values = runs.iter().map(|run| take(&run[at]));
            rows.push(Row::of(&case, &format!("{what}, {}", mode.name()), unit, values));
        }
    }
    let ratio = |to: usize| runs.iter().map(move |run| run[lazy].total_ms / run[to].total_ms);
    let row = Row::of(&case, "lazy / plain", "", ratio(plain));
    rows.push(asked(row, link, Limit::AtMost(1.02)));
    rows.push(Row::of(&case, "lazy / stock", "", ratio(stock)));
    let bound = runs
        .iter()
        .map(|run| run[lazy].total_ms / (f64_of(run[lazy].link_bytes + run[lazy].disk_bytes) / rate * 1e3));
    rows.push(Row::of(&case, "lazy / what link and disk together take", "", bound));
    Ok(rows)
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
    rows.extend(fared(&case, runs, link));
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

/// How the guest fared in each mode, and how little went over the link.
fn fared(case: &str, runs: &[Run], link: Link) -> Vec<Row> {
    type Take = fn(&Fared) -> f64;
    let figures: [(&str, &'static str, Take); 8] = [
        ("guest's work meanwhile / before", "", |fared| fared.work_during / fared.work_before),
        ("guest's work behind / before", "", |fared| fared.work_after / fared.work_before),
        ("p50 of accesses before", "µs", |fared| fared.access_before.p50()),
        ("p50 of accesses meanwhile", "µs", |fared| fared.access_during.p50()),
        ("p50 of accesses behind", "µs", |fared| fared.access_after.p50()),
        ("p99 of accesses before", "µs", |fared| fared.access_before.p99()),
        ("p99 of accesses meanwhile", "µs", |fared| fared.access_during.p99()),
        ("p99 of accesses behind", "µs", |fared| fared.access_after.p99()),
    ];
    let mut rows = Vec::new();
    for (what, unit, take) in figures {
        for mode in Mode::ALL {
            let values = runs.iter().map(|run| take(&run.moved(mode).fared));
            rows.push(Row::of(case, &format!("{what}, {}", mode.name()), unit, values));
        }
    }
    let least = |run: &Run| {
        let Moved { summary, fared } = run.moved(Mode::Lazy);
        f64_of(summary.link_bytes) / f64_of(fared.least_link_bytes)
    };
    let row = Row::of(case, "over the link / on no disk and unrepeated, lazy", "", runs.iter().map(least));
    rows.push(asked(row, link, Limit::AtMost(1.10)));
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
