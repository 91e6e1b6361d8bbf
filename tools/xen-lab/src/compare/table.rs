//! The tables that a comparison ends with.

use anyhow::{Context, Result};
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use super::{Run, Taken, WAYS};
use crate::probe::Lateness;
use crate::speed::median;

pub(super) const MIB: f64 = 1_048_576.0;

/// Of all runs; there must be one.
pub(super) fn table(runs: &[Run]) -> Result<String> {
    let first = runs.first().context("nothing has been measured")?;
    let mut commits: Vec<&str> = runs.iter().map(|run| run.commit.as_str()).collect();
    commits.dedup();
    let mib = |value: fn(&Run) -> f64| median(runs.iter().map(value)) / MIB;
    Ok(format!(
        "{} MiB of files read; {} runs, medians; commit {}; stock unshaped {:.1} MiB/s, the wire {:.1} MiB/s\n\n{}\n\n{}\n\n{}",
        first.files_mib,
        runs.len(),
        commits.join(", "),
        mib(|run| run.unshaped),
        mib(|run| run.rate),
        times(runs),
        pages(runs),
        beside(runs)?
    ))
}

/// This way's of each run, beside stock's.
fn pairs(runs: &[Run], at: usize) -> impl Iterator<Item = (&Taken, &Taken)> {
    runs.iter().map(move |run| (&run.taken[at], &run.taken[0]))
}

fn markdown(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(header);
    table
}

fn times(runs: &[Run]) -> Table {
    let mut table = markdown(&[
        "helper",
        "total",
        "to the restart",
        "total, of stock's",
        "restart, of stock's total",
        "downtime",
        "CPU of both dom0s",
        "processor busy, source, target",
        "wire",
        "of what it carries",
        "disk",
        "guest's speed afterwards, of stock's",
    ]);
    for (at, way) in WAYS.iter().enumerate() {
        let of = |value: fn(&Taken) -> f64| median(pairs(runs, at).map(|(taken, _)| value(taken)));
        let ratio = |value: fn(&Taken) -> f64, base: fn(&Taken) -> f64| {
            median(pairs(runs, at).map(|(taken, stock)| value(taken) / base(stock)))
        };
        let busy = |host: usize| {
            let part = |taken: &Taken| 1.0 - taken.idle[host] / taken.total;
            100.0 * median(pairs(runs, at).map(|(taken, _)| part(taken)))
        };
        let carried = runs.iter().map(|run| run.taken[at].wire / run.taken[at].restart / run.rate);
        table.add_row([
            way.to_string(),
            format!("{:.1} s", of(|taken| taken.total)),
            format!("{:.1} s", of(|taken| taken.restart)),
            format!("{:.2}", ratio(|taken| taken.total, |stock| stock.total)),
            format!("{:.2}", ratio(|taken| taken.restart, |stock| stock.total)),
            format!("{:.2} s", of(|taken| taken.downtime)),
            format!("{:.1} s", of(|taken| taken.cpu.iter().sum())),
            format!("{:.0}, {:.0} %", busy(0), busy(1)),
            format!("{:.0} MiB", of(|taken| taken.wire) / MIB),
            format!("{:.2}", median(carried)),
            format!("{:.0} MiB", of(|taken| taken.disk) / MIB),
            format!("{:.2}", ratio(|taken| taken.pace, |stock| stock.pace)),
        ]);
    }
    table
}

/// Each run's, where something tells.
fn pages(runs: &[Run]) -> Table {
    let mut table = markdown(&[
        "helper",
        "sent",
        "zero",
        "by reference",
        "sent after all",
        "outstanding at the restart",
        "accesses to them",
        "paging",
    ]);
    for (at, way) in WAYS.iter().enumerate().skip(1) {
        let each = |value: &dyn Fn(&Taken) -> Option<String>| {
            let all: Vec<String> =
                runs.iter().map(|run| value(&run.taken[at]).unwrap_or_else(|| "–".into())).collect();
            all.join("; ")
        };
        let number = |value: fn(&Taken) -> Option<u64>| each(&|taken| value(taken).map(|n| n.to_string()));
        table.add_row([
            way.to_string(),
            number(|taken| taken.sent),
            number(|taken| taken.zero),
            number(|taken| taken.references),
            number(|taken| taken.refetched),
            number(|taken| taken.outstanding),
            number(|taken| taken.faults),
            each(&|taken| taken.paging.clone()),
        ]);
    }
    table
}

/// How late a guest beside wakes on either host, of all runs together.
fn beside(runs: &[Run]) -> Result<Table> {
    let mut table = markdown(&["a guest beside, late by", "source: p50", "p99", "target: p50", "p99"]);
    let mut row = |name: String, of: &dyn Fn(&Run) -> &[Lateness; 2]| -> Result<()> {
        let mut cells = vec![name];
        for host in 0..2 {
            let mut all = Lateness::default();
            runs.iter().for_each(|run| all.add(&of(run)[host]));
            for per_mille in [500, 990] {
                cells.push(format!("{:.1} ms", all.quantile(per_mille)?));
            }
        }
        table.add_row(cells);
        Ok(())
    };
    row("nobody migrates".into(), &|run| &run.calm)?;
    for (at, way) in WAYS.iter().enumerate() {
        row(way.to_string(), &move |run| &run.taken[at].beside)?;
    }
    Ok(table)
}
