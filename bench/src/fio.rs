//! fio, the reference for reading: io_uring and O_DIRECT on a file, with runs of given lengths at random places or one behind
//! the other, its buffers and file registered, which is the fastest it does.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// A length of run and how often it occurs.
#[derive(Clone, Copy, Debug)]
pub struct RunLength {
    /// Bytes, a multiple of 4096.
    pub bytes: usize,
    /// Percent of all runs; a distribution's add up to 100.
    pub percent: u32,
}

/// Where runs are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Anywhere.
    Random,
    /// Each where the last one ended.
    Sequential,
}

/// What fio reached.
#[derive(Clone, Copy, Debug)]
pub struct Reached {
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// CPU seconds a gigabyte (10^9 bytes).
    pub cpu_per_gigabyte: f64,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    usr_cpu: f64,
    sys_cpu: f64,
    read: Read,
}

#[derive(Deserialize)]
struct Read {
    bw_bytes: f64,
}

/// Reads `file` for `seconds`, runs at random places.
///
/// # Errors
/// When fio is missing, with the way to get it, or fails.
pub fn read(file: &Path, lengths: &[RunLength], depth: usize, seconds: f64) -> Result<Reached> {
    read_in(Order::Random, file, lengths, depth, seconds)
}

/// The same with runs in an order.
///
/// # Errors
/// As [`read`].
pub fn read_in(
    order: Order,
    file: &Path,
    lengths: &[RunLength],
    depth: usize,
    seconds: f64,
) -> Result<Reached> {
    let order = match order {
        Order::Random => "--rw=randread",
        Order::Sequential => "--rw=read",
    };
    let split: Vec<_> = lengths.iter().map(|length| format!("{}/{}", length.bytes, length.percent)).collect();
    let output = Command::new("fio")
        .args(["--name=reference", order, "--ioengine=io_uring", "--direct=1", "--thread"])
        .args([
            "--norandommap",
            "--randrepeat=0",
            "--blockalign=4096",
            "--time_based",
            "--output-format=json",
        ])
        .arg(format!("--bssplit={}", split.join(":")))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={}ms", seconds * 1e3))
        .arg(format!("--filename={}", file.display()))
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("fio is not installed. It is the reference here: install it (apt-get install fio)")
        }
        Err(error) => return Err(error).context("cannot run fio"),
    };
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // Warnings come before the JSON.
    let start = text.find('{').context("fio printed no JSON")?;
    let parsed: Output = serde_json::from_str(&text[start..]).context("fio's JSON is not as it was")?;
    let job = parsed.jobs.first().context("fio ran no job")?;
    if job.error != 0 {
        bail!("fio met error {}", job.error);
    }
    let bytes_per_second = job.read.bw_bytes;
    Ok(Reached {
        bytes_per_second,
        cpu_per_gigabyte: (job.usr_cpu + job.sys_cpu) / 100.0 / (bytes_per_second / 1e9),
    })
}
