//! The engine's small parts, by criterion (`bench/benches/micro.rs`), held against the memory bandwidth of the same run.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::{Context, Suite};
use crate::report::Row;
use crate::stats::Figure;

/// What all rates are held against.
const BANDWIDTH: &str = "memory/bandwidth, read";

/// The suite.
pub(crate) struct Micro;

impl Suite for Micro {
    fn name(&self) -> &'static str {
        "micro"
    }

    fn about(&self) -> &'static str {
        "page hashes, copies, bitmaps, rings, codec, index lookups, each by itself, against memory bandwidth"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let Some(cargo) = std::env::var_os("CARGO") else {
            let reason = "they are built with cargo, in the source tree: `cargo xtask bench micro`";
            return Ok(vec![Row::missing("small parts", "time", "ns", reason)]);
        };
        let kept = tempfile::tempdir_in(&context.scratch)?;
        let home = kept.path().canonicalize()?;
        let seconds = if context.quick {
            ["--warm-up-time", "0.1", "--measurement-time", "0.3"]
        } else {
            ["--warm-up-time", "1", "--measurement-time", "3"]
        };
        let mut command = Command::new(cargo);
        command.args([
            "bench",
            "--quiet",
            "--package",
            "bench",
            "--bench",
            "micro",
            "--",
            "--noplot",
            "--quiet",
        ]);
        // Its report goes to standard error, ours alone to standard output.
        let output =
            command.args(seconds).env("CRITERION_HOME", &home).output().context("cannot run cargo bench")?;
        if !output.status.success() {
            bail!(
                "the micro benches ended with {}:\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let mut found = BTreeMap::new();
        gather(&home, &mut found)?;
        rows(&found)
    }
}

/// One bench, from criterion's files.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Nanoseconds an iteration: the median and criterion's 95 % interval of it.
    time: Figure,
    /// Bytes an iteration.
    bytes: Option<f64>,
}

/// `benchmark.json` of criterion, as far as it is read.
#[derive(Deserialize)]
struct About {
    full_id: String,
    throughput: Option<BTreeMap<String, f64>>,
}

/// `estimates.json` of criterion, as far as it is read. Nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

/// `sample.json` of criterion, as far as it is read.
#[derive(Deserialize)]
struct Sample {
    times: Vec<f64>,
}

/// Finds every bench below `directory`.
fn gather(directory: &Path, found: &mut BTreeMap<String, Measured>) -> Result<()> {
    if directory.join("benchmark.json").exists() && directory.file_name().is_some_and(|name| name == "new") {
        let about: About = read(&directory.join("benchmark.json"))?;
        let Estimates { median } = read(&directory.join("estimates.json"))?;
        let Sample { times } = read(&directory.join("sample.json"))?;
        let Interval { lower_bound: low, upper_bound: high } = median.confidence_interval;
        let time = Figure { median: median.point_estimate, low, high, runs: times.len() };
        let bytes = about.throughput.and_then(|of| of.get("Bytes").copied());
        found.insert(about.full_id, Measured { time, bytes });
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            gather(&path, found)?;
        }
    }
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("criterion left no {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not as criterion wrote it", path.display()))
}

/// Rates beside the memory's for what has bytes, times for what has none.
fn rows(found: &BTreeMap<String, Measured>) -> Result<Vec<Row>> {
    let rate = |one: &Measured| {
        let bytes = one.bytes?;
        let Figure { median, low, high, runs } = one.time;
        // Bytes a nanosecond are GB a second; the slowest time is the lowest rate.
        Some(Figure { median: bytes / median, low: bytes / high, high: bytes / low, runs })
    };
    let memory = found.get(BANDWIDTH).and_then(rate).context("criterion told nothing of memory bandwidth")?;
    let mut rows = Vec::new();
    for (name, measured) in found {
        let Some(rate) = rate(measured) else {
            rows.push(Row::new(name, "time", "ns", measured.time));
            continue;
        };
        rows.push(Row::new(name, "rate", "GB/s", rate));
        if name != BANDWIDTH {
            let Figure { median, low, high, runs } = rate;
            let against = Figure {
                median: median / memory.median,
                low: low / memory.high,
                high: high / memory.low,
                runs,
            };
            rows.push(Row::new(name, "rate / memory bandwidth", "", against));
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_held_against_memory() {
        let measured = |ns: f64, bytes| {
            let time = Figure { median: ns, low: ns * 0.9, high: ns * 1.1, runs: 20 };
            Measured { time, bytes }
        };
        let mut found = BTreeMap::from([("judge".to_owned(), measured(2.0, None))]);
        assert!(rows(&found).is_err());
        found.insert(BANDWIDTH.to_owned(), measured(100.0, Some(1000.0)));
        found.insert("page/check".to_owned(), measured(4096.0 / 5.0, Some(4096.0)));
        let rows = rows(&found).unwrap();
        let of = |what: &str| rows.iter().find(|row| row.case == "page/check" && row.what == what).unwrap();
        assert!((of("rate").figure().unwrap().median - 5.0).abs() < 1e-9);
        assert!((of("rate / memory bandwidth").figure().unwrap().median - 0.5).abs() < 1e-9);
        assert_eq!(rows.iter().find(|row| row.case == "judge").unwrap().unit, "ns");
    }
}
