//! What a round costs when nothing, or little, is dirty: asking the kernel what a guest of 4 GiB wrote, and walking
//! the result as the lanes do. The guest is a process of its own, as always.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mover::bitmap::Bitmap;
use mover::disk::image::ImageDisks;
use mover::guest::SourceGuest;
use mover::limits::PAGES_PER_FRAME;
use mover::pipeline::work::{Purpose, Round};
use mover::process::backend::attach_source;
use mover::process::config::GuestConfig;
use mover::process::launch::{GuestHandle, spawn};
use mover::units::{f64_of, u64_of, usize_of};
use tempfile::TempDir;

use super::{Context, Suite};
use crate::program;
use crate::report::{Limit, Row};
use crate::stats::Runs;

/// How much the guest dirties before each round; the first does nothing.
const RATES: [(&str, u64); 3] = [("nothing dirty", 0), ("a little dirty", 20), ("more dirty", 200)];
/// How long it has for it.
const BETWEEN: Duration = Duration::from_millis(200);

/// The suite.
pub(crate) struct Clean;

impl Suite for Clean {
    fn name(&self) -> &'static str {
        "clean-round"
    }

    fn about(&self) -> &'static str {
        "a round over a guest of 4 GiB with nothing, little and more of it dirty"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let bytes = if context.quick { 1_u64 << 30 } else { 4 << 30 };
        let mut rows = Vec::new();
        for (name, mebibytes_per_second) in RATES {
            let (pages, time) = rounds(context, bytes, mebibytes_per_second)?;
            let case = format!("{} GiB, {name}", bytes >> 30);
            let row = Row::new(&case, "a round", "ms", time.figure());
            rows.push(if mebibytes_per_second == 0 { row.limited(Limit::AtMost(10.0)) } else { row });
            rows.push(Row::new(&case, "dirty in it", "pages", pages.figure()));
        }
        Ok(rows)
    }
}

/// Pages found dirty, and milliseconds it took, of each of a number of rounds.
fn rounds(context: &Context, bytes: u64, mebibytes_per_second: u64) -> Result<(Runs, Runs)> {
    let guest = Guest::start(bytes, mebibytes_per_second)?;
    let mut source = guest.attach()?;
    let mut dirty = Bitmap::new(usize_of(bytes / 4096));
    let mut batch = Vec::with_capacity(PAGES_PER_FRAME);
    source.dirty.arm()?;
    // The first harvest finds what the arming itself let pass.
    source.dirty.harvest(&mut dirty)?;
    let (mut pages, mut time) = (Runs::default(), Runs::default());
    for _ in 0..context.runs {
        std::thread::sleep(BETWEEN);
        dirty = Bitmap::new(dirty.len());
        let began = Instant::now();
        source.dirty.harvest(&mut dirty)?;
        let round = Round::new(1, Purpose::Live, &dirty, None);
        let mut found = 0;
        loop {
            round.take(&mut batch, None);
            found += u64_of(batch.len());
            if batch.is_empty() {
                break;
            }
        }
        time.push(began.elapsed().as_secs_f64() * 1e3);
        pages.push(f64_of(found));
    }
    source.dirty.disarm()?;
    if mebibytes_per_second == 0 && pages.figure().median > 1000.0 {
        bail!("the guest that does nothing dirtied {} pages in a round", pages.figure().median);
    }
    Ok((pages, time))
}

/// A guest process with nearly all memory anonymous.
struct Guest {
    handle: GuestHandle,
    _directory: TempDir,
}

impl Guest {
    fn start(bytes: u64, mebibytes_per_second: u64) -> Result<Self> {
        let directory = TempDir::with_prefix("pageferry-bench-")?;
        let workload = directory.path().join("workload.toml");
        let mut text = "name = \"bench\"\ndescription = \"Anonymous memory.\"\n\
            [memory]\ncache = 0\nanonymous = 95\nfree = 5\n"
            .to_owned();
        if mebibytes_per_second > 0 {
            text += &format!("[dirty]\nrate = \"{mebibytes_per_second}MiB/s\"\n");
        }
        fs::write(&workload, text)?;
        let mut config = GuestConfig::new("bench", bytes);
        config.workload = workload.display().to_string();
        config.runtime_dir = directory.path().to_owned();
        config.prefault = true;
        config.scrub_pages_per_second = 0;
        let mut program = program::itself()?;
        program.arg("guest");
        let handle = spawn(program, &config).context("the guest did not start")?;
        Ok(Self { handle, _directory: directory })
    }

    fn attach(&self) -> Result<SourceGuest> {
        let source = attach_source(self.handle.connect()?, "bench")?;
        Ok(source.with_disks(ImageDisks::open(&[])?))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.handle.kill() {
            eprintln!("bench: the guest of process {} could not be ended: {error}", self.handle.pid);
        }
    }
}
