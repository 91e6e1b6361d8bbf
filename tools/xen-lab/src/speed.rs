//! `xen-lab speed`: live migrations by stock's helper at both ends and by ours, over the stream and by lanes, in turns, in one
//! lab: how long they take, what they cost the two dom0s, and how often they ask Xen. Under emulation only the ratios mean
//! anything.

use std::fmt;
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
    /// Whether calls are counted too, in migrations of their own.
    pub(crate) calls: bool,
    /// Where the binaries are.
    pub(crate) binaries: PathBuf,
}

/// How the guest is migrated.
#[derive(Clone, Copy, Debug)]
enum Way {
    Stock,
    /// By ours, over libxc's stream.
    Stream,
    /// By ours, mode `plain`, over lanes in the clear.
    Lanes,
}

/// In the order of the table: stock's is what the others are held against.
const WAYS: [Way; 3] = [Way::Stock, Way::Stream, Way::Lanes];

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Stream => "ours",
            Self::Lanes => "ours, plain by lanes",
        })
    }
}

impl Way {
    fn helper(self) -> Helper {
        if matches!(self, Self::Stock) { Helper::Stock } else { Helper::Ours }
    }

    fn environment(self) -> &'static str {
        match self {
            Self::Stock => "",
            Self::Stream => "PAGEFERRY_MODE=stock",
            Self::Lanes => "PAGEFERRY_MODE=plain PAGEFERRY_LANES_PLAINTEXT=true",
        }
    }
}

/// What one migration took.
#[derive(Clone, Copy)]
struct Taken {
    seconds: f64,
    /// Seconds of CPU time of both dom0s.
    cpu: f64,
}

/// Several of them one way, of one guest.
struct Row {
    zero_percent: u32,
    way: Way,
    taken: Vec<Taken>,
    calls: Option<Calls>,
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
            let (mut rows_of_it, mut from) = (Vec::new(), 1);
            for way in WAYS {
                let mut calls = None;
                if self.calls {
                    let (counted, after) =
                        calls::count(lab, &guest, from, count, way.helper(), way.environment())?;
                    (calls, count, from) = (Some(counted), after, 3 - from);
                }
                rows_of_it.push(Row { zero_percent, way, taken: vec![], calls });
            }
            for run in 0..self.runs {
                for at in 0..WAYS.len() {
                    // None has the better place in every run.
                    let Row { way, taken, .. } = &mut rows_of_it[(at + run) % WAYS.len()];
                    // There and back.
                    for _ in 0..2 {
                        let (one, after) = migrate(lab, &guest, from, count, *way)
                            .with_context(|| format!("{zero_percent} % zero, {way}, run {run}"))?;
                        taken.push(one);
                        (count, from) = (after, 3 - from);
                    }
                }
            }
            guest.verifies_all(lab.host(from), count)?;
            guest.destroy(lab.host(from))?;
            rows.extend(rows_of_it);
        }
        Ok(rows)
    }
}

/// One migration from host `from`.
fn migrate(lab: &Lab, guest: &Guest, from: usize, before: Count, way: Way) -> Result<(Taken, Count)> {
    let mut migration = Migration::new(way.helper(), way.helper());
    migration.limit = wait::limit(SECONDS);
    migration.environment = way.environment().to_owned();
    guest.forget_counts(lab.host(3 - from))?;
    let cpu = cpu(lab)?;
    let report = lab.try_migrate(guest, from, &migration)?;
    let cpu = self::cpu(lab)? - cpu;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    if matches!(way, Way::Lanes) && !report.target.text().contains("pages come by lanes") {
        bail!("no pages came by lanes:\n{}", report.text());
    }
    let after = guest.is_back(lab.host(3 - from), before)?;
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
fn per_gib(calls: Option<u64>) -> String {
    calls.map_or_else(|| "–".into(), |calls| (calls * 1024 / u64::from(GUEST_MIB)).to_string())
}

/// Rows come guest by guest, each in the order of [`WAYS`].
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
    for guest in rows.chunks(WAYS.len()) {
        let stock = &guest[0];
        for row in guest {
            let seconds = median(row.taken.iter().map(|taken| taken.seconds));
            let cpu = median(row.taken.iter().map(|taken| taken.cpu));
            let of = |value: fn(&Taken) -> f64| {
                median(row.taken.iter().zip(&stock.taken).map(|(ours, stock)| value(ours) / value(stock)))
            };
            table.add_row([
                format!("{} % zero", row.zero_percent),
                row.way.to_string(),
                format!("{seconds:.1} s"),
                format!("{cpu:.1} s"),
                format!("{:.2}", 1.0 / of(|taken| taken.seconds)),
                format!("{:.2}", of(|taken| taken.cpu)),
                per_gib(row.calls.map(|calls| calls.hypercalls)),
                per_gib(row.calls.map(|calls| calls.batches)),
            ]);
        }
    }
    table.to_string()
}
