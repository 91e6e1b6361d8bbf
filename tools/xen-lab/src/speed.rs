//! `xen-lab speed`: live migrations by our helper at both ends and by stock's, in turns, in one lab: how long they take,
//! what they cost the two dom0s, and how often they ask Xen. Under emulation only the ratios mean anything.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use crate::cache::Cache;
use crate::calls::{self, Calls};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{Helper, Migration};
use crate::wait;

/// The guest's memory, and the part of it that the checker fills: with more, the guest's kernel has too little.
const GUEST_MIB: u32 = 512;
const CHECKED_MIB: u32 = 352;
/// Longest migration.
const SECONDS: u32 = 900;

/// What to measure, and where.
pub(crate) struct Order {
    /// The lab's name: it is brought up for this, and ended.
    pub(crate) lab: String,
    /// Migrations there and back, by each helper.
    pub(crate) runs: usize,
    /// How much of the guest's memory is zero, in percent, guest by guest; the rest is random.
    pub(crate) zero: Vec<u32>,
    /// Where the binaries are.
    pub(crate) binaries: PathBuf,
}

/// What one migration took.
#[derive(Clone, Copy)]
struct Taken {
    seconds: f64,
    /// Seconds of CPU time of both dom0s.
    cpu: f64,
}

/// Several of them by one helper, of one guest.
struct Row {
    zero_percent: u32,
    helper: Helper,
    taken: Vec<Taken>,
    calls: Calls,
}

impl Order {
    /// Brings up the lab, measures, prints the table, ends the lab.
    pub(crate) fn run(&self, cache: &Cache) -> Result<String> {
        let rows = Lab::for_one(cache, &self.lab, &self.binaries, "speed", |lab| self.measure(lab))?;
        Ok(table(&rows))
    }

    fn measure(&self, lab: &Lab) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for zero_percent in self.zero.iter().copied() {
            let guest = Guest {
                memory_mib: GUEST_MIB,
                checked_mib: CHECKED_MIB,
                zero_percent,
                ..Guest::small(Kind::Pvh)
            };
            guest.forget_counts(lab.host(2))?;
            let created = guest.create(lab.host(1))?;
            let mut count = guest.verifies_once(lab.host(1), created)?;
            let mut pair = Vec::new();
            for (helper, from) in [(Helper::Stock, 1), (Helper::Ours, 2)] {
                let (calls, after) = calls::count(lab, &guest, from, count, helper)?;
                pair.push(Row { zero_percent, helper, taken: vec![], calls });
                count = after;
            }
            for run in 0..self.runs {
                // Neither has the better place in every run.
                for at in if run % 2 == 0 { [0, 1] } else { [1, 0] } {
                    for from in [1, 2] {
                        let Row { helper, taken, .. } = &mut pair[at];
                        let (one, after) = migrate(lab, &guest, from, count, *helper)
                            .with_context(|| format!("{zero_percent} % zero, {helper}, run {run}"))?;
                        taken.push(one);
                        count = after;
                    }
                }
            }
            guest.verifies_all(lab.host(1), count)?;
            guest.destroy(lab.host(1))?;
            rows.extend(pair);
        }
        Ok(rows)
    }
}

/// One migration from host `from`.
fn migrate(lab: &Lab, guest: &Guest, from: usize, before: Count, helper: Helper) -> Result<(Taken, Count)> {
    let mut migration = Migration::new(helper, helper);
    migration.limit = wait::limit(SECONDS);
    let cpu = cpu(lab)?;
    let report = lab.try_migrate(guest, from, &migration)?;
    let cpu = self::cpu(lab)? - cpu;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let after = guest.counts_on(lab.host(3 - from), before)?;
    Ok((Taken { seconds: report.elapsed.as_secs_f64(), cpu }, after))
}

/// CPU time both dom0s have had, in seconds.
pub(crate) fn cpu(lab: &Lab) -> Result<f64> {
    let mut sum = 0.0;
    for number in [1, 2] {
        let said = lab.host(number).run("xl list Domain-0 | awk 'NR == 2 { print $6 }'")?;
        let seconds: f64 =
            said.trim().parse().with_context(|| format!("`xl list` says {said:?} for dom0's CPU time"))?;
        sum += seconds;
    }
    Ok(sum)
}

/// The middle of some values, of which there must be one.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = ((values.len() - 1) / 2, values.len() / 2);
    f64::midpoint(values[low], values[high])
}

/// Calls of one migration, for each GiB of the guest's memory.
fn per_gib(calls: u64) -> String {
    (calls * 1024 / u64::from(GUEST_MIB)).to_string()
}

/// Rows come in pairs, stock before ours.
fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "memory",
        "helper",
        "migration",
        "dom0s' CPU time",
        "times as fast",
        "CPU, of stock's",
        "hypercalls a GiB",
        "batches mapped a GiB",
    ]);
    for pair in rows.chunks(2) {
        let stock = &pair[0];
        for row in pair {
            let seconds = median(row.taken.iter().map(|taken| taken.seconds));
            let cpu = median(row.taken.iter().map(|taken| taken.cpu));
            let of = |value: fn(&Taken) -> f64| {
                median(row.taken.iter().zip(&stock.taken).map(|(ours, stock)| value(ours) / value(stock)))
            };
            table.add_row([
                format!("{} % zero", row.zero_percent),
                row.helper.to_string(),
                format!("{seconds:.1} s"),
                format!("{cpu:.1} s"),
                format!("{:.2}", 1.0 / of(|taken| taken.seconds)),
                format!("{:.2}", of(|taken| taken.cpu)),
                per_gib(row.calls.hypercalls),
                per_gib(row.calls.batches),
            ]);
        }
    }
    table.to_string()
}
