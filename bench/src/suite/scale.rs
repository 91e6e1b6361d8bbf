//! How costs grow: with the guest, and with the disk behind an index. A straight line is fitted through each, by least
//! squares: what a migration costs at all, and what every further GiB costs.

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, Result};
use mover::index::layout::Layout;
use mover::index::table::{Learned, Table};
use mover::units::{PAGE_BYTES_U64, f64_of, usize_of};

use super::bare::{Ends, Shape};
use super::disk::Random;
use super::{Context, Suite};
use crate::report::Row;
use crate::stats::{Figure, Runs};

/// Guests, in MiB.
const GUESTS: [u64; 6] = [256, 1024, 2048, 4096, 6144, 9216];
/// Disks, in GiB.
const DISKS: [u64; 5] = [1, 16, 64, 256, 1024];
/// Lookups that are timed together.
const LOOKUPS: u64 = 1 << 20;

/// The suite.
pub(crate) struct Scale;

impl Suite for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn about(&self) -> &'static str {
        "guests of 256 MiB to 9 GiB, indexes of disks of 1 GiB to 1 TiB, and the lines fitted through them"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let mut rows = guests(context)?;
        rows.extend(disks(context)?);
        Ok(rows)
    }
}

/// Idle guests over loopback, mode `plain`, in the clear.
fn guests(context: &Context) -> Result<Vec<Row>> {
    let shape = Shape::engine(false);
    let (mut rows, mut points) = (Vec::new(), Vec::new());
    for mebibytes in GUESTS.into_iter().filter(|size| !context.quick || *size <= 1024) {
        eprintln!("  a guest of {mebibytes} MiB");
        let bytes = mebibytes << 20;
        let mut ends = Ends::start(usize_of(bytes))?;
        ends.copy(shape, true).context("the first run, every byte compared")?;
        let (mut time, mut cpu) = (Runs::default(), Runs::default());
        for _ in 0..context.runs {
            let copied = ends.copy(shape, false)?;
            let gigabytes = f64_of(bytes) / 1e9;
            let milliseconds = gigabytes / copied.gigabytes_per_second * 1e3;
            time.push(milliseconds);
            cpu.push(copied.cpu_per_gigabyte * gigabytes * 1e3);
            points.push((f64_of(mebibytes) / 1024.0, milliseconds));
        }
        let case = format!("guest of {mebibytes} MiB");
        rows.push(Row::new(&case, "total time", "ms", time.figure()));
        rows.push(Row::new(&case, "CPU of both ends", "ms", cpu.figure()));
    }
    rows.extend(fitted("guests, fitted", "total time", "ms", &points));
    Ok(rows)
}

/// Indexes of which every block is known.
fn disks(context: &Context) -> Result<Vec<Row>> {
    let (mut rows, mut points) = (Vec::new(), Vec::new());
    for gibibytes in DISKS.into_iter().filter(|size| !context.quick || *size <= 16) {
        eprintln!("  an index of {gibibytes} GiB");
        let units = (gibibytes << 30) / PAGE_BYTES_U64;
        let table = Table::new(Layout::plain(gibibytes << 30), units);
        let began = Instant::now();
        let refused = (0..units).filter(|unit| table.learn(*unit, hint_of(*unit)) != Learned::Added).count();
        let learning = began.elapsed().as_secs_f64() / f64_of(units) * 1e9;
        let (mut hit, mut miss) = (Runs::default(), Runs::default());
        for _ in 0..context.runs {
            hit.push(lookups(&table, units, 0));
            miss.push(lookups(&table, units, units));
        }
        let case = format!("index of {gibibytes} GiB");
        let once = |median| Figure { median, low: median, high: median, runs: 1 };
        rows.push(Row::new(&case, "a block, learned", "ns", once(learning)));
        rows.push(Row::new(&case, "a block, found", "ns", hit.figure()));
        rows.push(Row::new(&case, "a block, missed", "ns", miss.figure()));
        let share = f64_of(mover::units::u64_of(refused)) / f64_of(units);
        rows.push(Row::new(&case, "blocks without room / all", "", once(share)));
        let mebibytes = f64_of(table.bytes()) / f64_of(1 << 20);
        rows.push(Row::new(&case, "memory", "MiB", once(mebibytes)));
        points.push((f64_of(gibibytes), mebibytes));
    }
    rows.extend(fitted("indexes, fitted", "memory", "MiB", &points));
    Ok(rows)
}

/// A hint that no other unit has, spread as a hash's values are (the golden ratio's multiples).
fn hint_of(unit: u64) -> u64 {
    (unit + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Nanoseconds a lookup of blocks drawn at random, `beyond` the known ones.
fn lookups(table: &Table, units: u64, beyond: u64) -> f64 {
    let mut random = Random(88_172_645_463_325_252);
    let began = Instant::now();
    for _ in 0..LOOKUPS {
        black_box(table.find(hint_of(random.next() % units + beyond), None));
    }
    began.elapsed().as_secs_f64() / f64_of(LOOKUPS) * 1e9
}

/// The line through `points` as two figures, the cost at nothing and the cost of each further GiB.
fn fitted(case: &str, of: &str, unit: &'static str, points: &[(f64, f64)]) -> Vec<Row> {
    let Some((fixed, each)) = line(points) else { return Vec::new() };
    let once = |median| Figure { median, low: median, high: median, runs: points.len() };
    vec![
        Row::new(case, &format!("{of} at all"), unit, once(fixed)),
        Row::new(case, &format!("{of} for every GiB"), unit, once(each)),
    ]
}

/// Intercept and slope by least squares; none for fewer than two places.
fn line(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let count = f64_of(mover::units::u64_of(points.len()));
    let mean = |value: fn(&(f64, f64)) -> f64| points.iter().map(value).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if points.len() < 2 || spread == 0.0 {
        return None;
    }
    let slope = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>() / spread;
    Some((y - slope * x, slope))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_what_stands_on_one() {
        let (fixed, each) = line(&[(1.0, 12.0), (2.0, 14.0), (8.0, 26.0)]).unwrap();
        assert!((fixed - 10.0).abs() < 1e-9 && (each - 2.0).abs() < 1e-9);
        assert!(line(&[(1.0, 2.0), (1.0, 3.0)]).is_none());
    }
}
