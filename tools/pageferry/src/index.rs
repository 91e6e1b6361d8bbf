//! `pageferry index ...`: where contents stand on a disk, looked up before a migration needs it.

mod watch;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mover::ExitClass;
use mover::error::DiskError;
use mover::index::commands::{self, Built, Options, Stat, Verified};
use mover::units::f64_of;
use serde::Serialize;

use crate::cli::IndexCommand;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::signals;
use crate::state;
use crate::units::{show_bytes, show_count, show_ms, show_rate};

/// Does what the command says.
pub(crate) fn run(command: &IndexCommand, console: &Console) -> Outcome {
    let directory = state::index_dir();
    match command {
        IndexCommand::Build { image, rate } => {
            let built = scan(console, rate.map(|rate| rate.0), |options| {
                commands::build(image, &directory, options)
            })?;
            show(&built, || built_words(image, &built), console)?;
            stopped(&built)
        }
        IndexCommand::Update { image, rate } => {
            let built = scan(console, rate.map(|rate| rate.0), |options| {
                commands::update(image, &directory, None, options)
            })?;
            show(&built, || built_words(image, &built), console)?;
            stopped(&built)
        }
        IndexCommand::Watch(args) => watch::run(args, console),
        IndexCommand::Verify { image, all } => {
            let verified = commands::verify(image, &directory, *all)?;
            show(&verified, || verified_words(&verified), console)
        }
        IndexCommand::Stat { image } => {
            let stat = commands::stat(image, &directory)?;
            show(&stat, || stat_words(&stat), console)
        }
    }
}

/// Brings the index of `image` up to date without a word; for those who need one on the way.
pub(crate) fn bring_up_to_date(image: &Path, directory: &Path, ending: &AtomicBool) -> Outcome<Built> {
    let mut progress = |_, _| !ending.load(Ordering::SeqCst);
    let mut options = Options { bytes_per_second: None, progress: &mut progress };
    Ok(commands::update(image, directory, None, &mut options)?)
}

/// Runs a scan with a bar, to be broken off with Ctrl-C.
fn scan(
    console: &Console,
    bytes_per_second: Option<u64>,
    work: impl FnOnce(&mut Options<'_>) -> Result<Built, DiskError>,
) -> Outcome<Built> {
    let ending = Arc::new(AtomicBool::new(false));
    signals::set_on_end(&ending)?;
    let bar = if console.draws() {
        ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10))
    } else {
        ProgressBar::hidden()
    };
    let style = ProgressStyle::with_template(
        "{bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
    let mut progress = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
        !ending.load(Ordering::SeqCst)
    };
    let built = work(&mut Options { bytes_per_second, progress: &mut progress });
    bar.finish_and_clear();
    Ok(built?)
}

/// A scan broken off has not done what it was asked.
fn stopped(built: &Built) -> Outcome {
    if built.outcome != "stopped" {
        return Ok(());
    }
    Err(Failure::new(ExitClass::Cancelled, "cancelled; the index, if there was one, is as it was"))
}

fn show<T: Serialize>(value: &T, words: impl FnOnce() -> String, console: &Console) -> Outcome {
    if !console.json {
        return console.print(&words());
    }
    let text =
        serde_json::to_string(value).map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
    console.print(&text)
}

fn built_words(image: &Path, built: &Built) -> String {
    let read = built.counts.bytes_read;
    let rate = if built.seconds > 0.0 { f64_of(read) / built.seconds } else { 0.0 };
    let reason = built.reason.as_ref().map_or(String::new(), |reason| format!("  a whole scan: {reason}\n"));
    format!(
        "{}: index {}\n{reason}  {} of blocks can be found; {} read in {} ({}), {} of holes left out\n  {} in {}",
        image.display(),
        built.outcome,
        show_bytes(built.entries.saturating_mul(mover::units::PAGE_BYTES_U64)),
        show_bytes(read),
        show_ms(built.seconds * 1e3),
        show_rate(rate),
        show_bytes(built.hole_bytes),
        show_bytes(built.index_bytes),
        built.index,
    )
}

fn verified_words(verified: &Verified) -> String {
    format!(
        "{}: its own sums are right\n  {} entries compared with the disk: {} right, {} stale (a stale one costs time, never \
         a page)",
        verified.index,
        show_count(verified.checked),
        show_count(verified.right),
        show_count(verified.stale),
    )
}

fn stat_words(stat: &Stat) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let changed = match stat.image_changed {
        Some(true) => "; the image has been written to since: `pageferry index update` reads it again",
        Some(false) => "; the image has not been written to since",
        None => "",
    };
    let regions: Vec<String> = stat
        .regions
        .iter()
        .map(|region| {
            format!("    sectors {} to {}, a block every {}", region.start, region.end, region.stride)
        })
        .collect();
    let age = Duration::from_secs_f64(stat.age_seconds.max(0.0));
    format!(
        "{}\n  of {} ({}), scanned {} ago{changed}\n  {} of blocks can be found; room for {} entries, {} used; {} on disk\n  \
         holes {}; of the rest zero {}, repeated {}\n  regions:\n{}",
        stat.index,
        stat.image,
        show_bytes(stat.disk_bytes),
        age_words(age),
        show_bytes(stat.findable_bytes),
        show_count(stat.room),
        show_count(stat.entries),
        show_bytes(stat.index_bytes),
        percent(stat.hole_share),
        percent(stat.zero_share),
        percent(stat.repeated_share),
        regions.join("\n"),
    )
}

fn age_words(age: Duration) -> String {
    match age.as_secs() {
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s if s < 172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}
