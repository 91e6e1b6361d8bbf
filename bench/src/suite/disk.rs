//! The engine's disk reader against fio on the same file, with the same run lengths at random places and the same
//! number of reads in flight. What loading by reference can reach at most.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mover::disk::image::{DiskSpec, ImageDisks, Role};
use mover::disk::{Read, Slot};
use mover::limits::READ_DEPTH;
use mover::runtime::{Runtime, Threads};
use mover::units::{DiskId, Sector, f64_of, u64_of, usize_of};

use super::{Context, Suite};
use crate::fio::{self, Reached, RunLength};
use crate::report::{Limit, Row};
use crate::stats::{Runs, in_turns};

/// Runs of mixed length, by number of runs: what a page cache looks like.
pub(crate) const MIXED: &[RunLength] = &[
    RunLength { bytes: 4 << 10, percent: 30 },
    RunLength { bytes: 16 << 10, percent: 30 },
    RunLength { bytes: 64 << 10, percent: 25 },
    RunLength { bytes: 256 << 10, percent: 15 },
];

/// Distributions tried.
const DISTRIBUTIONS: [(&str, &[RunLength]); 3] = [
    ("4 KiB runs", &[RunLength { bytes: 4 << 10, percent: 100 }]),
    ("4 to 256 KiB runs", MIXED),
    ("1 MiB runs", &[RunLength { bytes: 1 << 20, percent: 100 }]),
];

/// The suite.
pub(crate) struct Disk;

impl Suite for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn about(&self) -> &'static str {
        "the engine's disk reader against fio (io_uring, O_DIRECT): same file, run lengths and depth"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let file = image(&context.scratch, if context.quick { 512 << 20 } else { 4 << 30 })?;
        let seconds = if context.quick { 0.5 } else { 2.0 };
        let mut rows = Vec::new();
        for (name, lengths) in DISTRIBUTIONS {
            let case = format!("{name}, depth {READ_DEPTH}");
            let pairs = in_turns(
                context.runs,
                |_| fio::read(&file, lengths, READ_DEPTH, seconds),
                |round| ours(&file, lengths, seconds, u64_of(round)),
            )?;
            let figures = |value: fn(&(Reached, Reached)) -> f64| pairs.iter().map(value).collect::<Runs>();
            let rate = figures(|(_, ours)| ours.bytes_per_second / 1e9);
            let ratio = figures(|(fio, ours)| ours.bytes_per_second / fio.bytes_per_second);
            let cpu = figures(|(fio, ours)| ours.cpu_per_gigabyte / fio.cpu_per_gigabyte);
            rows.push(Row::new(&case, "rate", "GB/s", rate.figure()));
            rows.push(Row::new(&case, "rate / fio", "", ratio.figure()).limited(Limit::AtLeast(0.8)));
            rows.push(Row::new(&case, "CPU / fio", "", cpu.figure()));
        }
        Ok(rows)
    }
}

/// A file of `bytes` that nothing can compress, kept for the next call.
pub(crate) fn image(scratch: &Path, bytes: u64) -> Result<PathBuf> {
    let path = scratch.join(format!("incompressible-{}M", bytes >> 20));
    if fs::metadata(&path).is_ok_and(|found| found.len() == bytes) {
        return Ok(path);
    }
    let made = path.with_extension("part");
    let context = || format!("cannot make {}", made.display());
    let mut file = File::create(&made).with_context(context)?;
    let mut piece = vec![0_u8; 1 << 20];
    let mut state = Random(bytes | 1);
    for _ in 0..bytes >> 20 {
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&state.next().to_le_bytes());
        }
        file.write_all(&piece).with_context(context)?;
    }
    file.sync_all().with_context(context)?;
    fs::rename(&made, &path).with_context(context)?;
    Ok(path)
}

/// Marsaglia's xorshift.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Reads `file` with the engine's reader for `seconds`.
fn ours(file: &Path, lengths: &[RunLength], seconds: f64, seed: u64) -> Result<Reached> {
    let spec = DiskSpec { name: "bench".to_owned(), path: file.to_owned(), role: Role::ReadOnly };
    let disks = ImageDisks::open(&[spec])?;
    let mut reader = disks.reader(READ_DEPTH)?;
    let pages = disks.infos()[0].bytes / 4096;
    let mut random = Random(seed * 2 + 0x9e37_79b9_7f4a_7c15);
    let runtime = Threads::new();
    let (began, cpu) = (Instant::now(), runtime.cpu_time());
    let mut free: Vec<Slot> = (0..reader.slots()).map(Slot).collect();
    let mut done = Vec::with_capacity(READ_DEPTH);
    let (mut bytes, mut in_flight) = (0_u64, 0_usize);
    let mut ending = false;
    while !ending || in_flight > 0 {
        ending = began.elapsed().as_secs_f64() >= seconds;
        while let (false, Some(slot)) = (ending, free.pop()) {
            let length = length(lengths, random.next());
            let page = (random.next() >> 8) % (pages - u64_of(length / 4096));
            reader.read(Read { disk: DiskId(0), sector: Sector(page * 8), bytes: length, slot })?;
            in_flight += 1;
        }
        reader.complete(&mut done, Duration::from_secs(1))?;
        for completion in done.drain(..) {
            bytes += u64_of(completion.result?);
            free.push(completion.slot);
            in_flight -= 1;
        }
    }
    if bytes == 0 {
        bail!("nothing was read");
    }
    let gigabytes = f64_of(bytes) / 1e9;
    Ok(Reached {
        bytes_per_second: f64_of(bytes) / began.elapsed().as_secs_f64(),
        cpu_per_gigabyte: runtime.cpu_time().saturating_sub(cpu).as_secs_f64() / gigabytes,
    })
}

/// A length drawn from the distribution.
pub(crate) fn length(lengths: &[RunLength], random: u64) -> usize {
    let mut rest = usize_of((random >> 16) % 100);
    for length in lengths {
        let percent = usize::try_from(length.percent).unwrap_or(100);
        if rest < percent {
            return length.bytes;
        }
        rest -= percent;
    }
    lengths[0].bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_distribution_is_whole_and_drawn_as_it_says() {
        for (name, lengths) in DISTRIBUTIONS {
            assert_eq!(lengths.iter().map(|length| length.percent).sum::<u32>(), 100, "{name}");
        }
        let count = (0..100_u64).filter(|n| length(MIXED, n << 16) == 256 << 10).count();
        assert_eq!(count, 15);
    }
}
