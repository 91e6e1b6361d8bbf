//! `pageferry plan`: what a migration would take, with nothing moved. The guest is looked at while it runs: its pages
//! once, its writes for a few seconds; the disk is read here and there for its speed.

pub(crate) mod look;
mod model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use mover::ExitClass;
use mover::bitmap::Bitmap;
use mover::disk::image::ImageDisks;
use mover::disk::{Completion, Disks, Read, Reader, Slot};
use mover::guest::SourceGuest;
use mover::index::commands;
use mover::limits::READ_DEPTH;
use mover::process::backend::attach_source;
use mover::report::Mode;
use mover::units::{BlockAddress, PAGE_BYTES_U64, Sector, f64_of, u64_of, u64_of_f64};
use serde::Serialize;

use crate::cli::PlanArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::units::{show_bytes, show_count, show_ms, show_rate};
use crate::{guest, migrate, signals, state};
use model::{Known, Prediction, Writing};

/// One read of the disk's measurement, and how many of them.
const READ_BYTES: usize = 256 * 1024;
/// See [`READ_BYTES`].
const READS: usize = 256;
/// A disk that is not measured (nothing is on it) is taken to be this fast; it does not matter then.
const DISK_RATE: f64 = 1e9;

/// Does it.
pub(crate) fn run(args: &PlanArgs, console: &Console) -> Outcome {
    let ending = Arc::new(AtomicBool::new(false));
    signals::set_on_end(&ending)?;
    let attached = attach_source(guest::connect(&args.guest)?, "plan")?;
    let disks = ImageDisks::open_images(&migrate::send::specs(&attached.info))?;
    let (tables, notes) = commands::load(&disks, &state::index_dir())?;
    for note in notes {
        console.note(&note);
    }
    let disks: Arc<dyn Disks> = Arc::new(disks);
    let mut source = attached.with_disks(Arc::clone(&disks));
    let writing = writing(&mut source, args.sample, &ending)?;
    let seen = look::classify(&*source.memory, &tables, &ending)?;
    drop(source);
    let disk = match args.disk_rate {
        Some(rate) => f64_of(rate.0),
        None => measure(&*disks, &seen.places)?.unwrap_or(DISK_RATE),
    };
    let known = Known {
        pages: seen.pages,
        zero: seen.zero,
        hits: u64_of(seen.places.len()),
        writing,
        link: f64_of(args.link.0),
        disk,
        max_downtime: args.max_downtime,
        max_rounds: args.max_rounds,
    };
    let plan = Plan::new(&args.guest, &known);
    if console.json {
        let text = serde_json::to_string(&plan)
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        return console.print(&text);
    }
    console.print(&words(&known, &plan))
}

/// The result, as JSON.
#[derive(Serialize)]
struct Plan {
    guest: String,
    pages: u64,
    pages_zero: u64,
    pages_found: u64,
    hit_rate: f64,
    dirtied_pages_per_second: f64,
    dirtied_set_pages: Option<u64>,
    link_rate: f64,
    disk_rate: f64,
    modes: Vec<(&'static str, Prediction)>,
}

impl Plan {
    fn new(guest: &str, known: &Known) -> Self {
        let full = known.pages - known.zero;
        Self {
            guest: guest.to_owned(),
            pages: known.pages,
            pages_zero: known.zero,
            pages_found: known.hits,
            hit_rate: if full == 0 { 0.0 } else { f64_of(known.hits) / f64_of(full) },
            dirtied_pages_per_second: known.writing.rate,
            dirtied_set_pages: known.writing.set.is_finite().then(|| u64_of_f64(known.writing.set)),
            link_rate: known.link,
            disk_rate: known.disk,
            modes: Mode::ALL.map(|mode| (mode.name(), model::predict(mode, known))).to_vec(),
        }
    }
}

pub(crate) fn cancelled(ending: &AtomicBool) -> Outcome {
    if ending.load(Ordering::SeqCst) {
        return Err(Failure::new(ExitClass::Cancelled, "cancelled; the guest runs on as before"));
    }
    Ok(())
}

/// Watches the guest's writes for `time`, in two halves.
fn writing(source: &mut SourceGuest, time: Duration, ending: &AtomicBool) -> Outcome<Writing> {
    let mut written = Bitmap::new(source.memory.pages().entries());
    source.dirty.arm()?;
    let begun = Instant::now();
    let mut look = |until: Duration| -> Outcome<u64> {
        while begun.elapsed() < until {
            cancelled(ending)?;
            std::thread::sleep(Duration::from_millis(20).min(until.saturating_sub(begun.elapsed())));
        }
        Ok(source.dirty.harvest(&mut written)?.0)
    };
    let looked = look(time / 2).and_then(|half| Ok((half, half + look(time)?)));
    source.dirty.disarm()?;
    let (half, whole) = looked?;
    Ok(Writing::seen(half, whole, begun.elapsed()))
}

/// Reads some of the blocks that would be referred to, as a target would: what it got a second. `None` where there is
/// nothing to read.
fn measure(disks: &dyn Disks, places: &[BlockAddress]) -> Outcome<Option<f64>> {
    let mut reads: Vec<(u8, u64)> = places
        .iter()
        .map(|place| (place.disk.0, place.sector.bytes() / u64_of(READ_BYTES) * u64_of(READ_BYTES)))
        .filter(|(disk, at)| {
            disks.infos().get(usize::from(*disk)).is_some_and(|info| at + u64_of(READ_BYTES) <= info.bytes)
        })
        .collect();
    reads.sort_unstable();
    reads.dedup();
    let step = (reads.len() / READS).max(1);
    let mut reads = reads.into_iter().step_by(step);
    let mut reader = disks.reader(READ_DEPTH)?;
    let (begun, mut bytes, mut flying) = (Instant::now(), 0, 0);
    let mut submit = |reader: &mut dyn Reader, slot: Slot| -> Outcome<usize> {
        let Some((disk, at)) = reads.next() else { return Ok(0) };
        let disk = mover::units::DiskId(disk);
        reader.read(Read { disk, sector: Sector::holding(at), bytes: READ_BYTES, slot })?;
        Ok(1)
    };
    for slot in 0..reader.slots() {
        flying += submit(&mut *reader, Slot(slot))?;
    }
    let mut done: Vec<Completion> = Vec::new();
    while flying > 0 {
        reader.complete(&mut done, Duration::from_secs(60))?;
        if done.is_empty() {
            return Err(Failure::new(
                ExitClass::Disk,
                "the disk has not answered for a minute. Is the storage reachable?",
            ));
        }
        for completion in done.drain(..) {
            bytes += completion.result?;
            flying -= 1;
            flying += submit(&mut *reader, completion.slot)?;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok((bytes > 0).then(|| f64_of(u64_of(bytes)) / seconds))
}

/// The plan for people.
fn words(known: &Known, plan: &Plan) -> String {
    let writes = match plan.dirtied_set_pages {
        Some(set) => format!(
            "{} a second over a set of {}",
            bytes(known.writing.rate),
            show_bytes(set * PAGE_BYTES_U64)
        ),
        None => format!("{} a second, hardly a page twice", bytes(known.writing.rate)),
    };
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    let heads = ["", "total", "downtime", "restart", "rounds", "over the link", "from disk"];
    table.set_header(heads);
    for (mode, prediction) in &plan.modes {
        let mark = if prediction.converges || *mode == "stock" { "" } else { " !" };
        table.add_row([
            (*mode).to_owned(),
            show_ms(prediction.total_ms),
            format!("{}{mark}", show_ms(prediction.downtime_ms)),
            show_ms(prediction.restart_ms),
            show_count(prediction.rounds.into()),
            show_bytes(u64_of_f64(prediction.link_bytes)),
            show_bytes(u64_of_f64(prediction.disk_bytes)),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let converges = plan.modes.iter().all(|(mode, prediction)| prediction.converges || *mode == "stock");
    let warning = if converges {
        String::new()
    } else {
        format!(
            "\n! more than the {} aimed for: the guest writes faster than the link carries. --throttle auto slows it down",
            show_ms(known.max_downtime.as_secs_f64() * 1e3)
        )
    };
    format!(
        "{} pages: {} zero, {} found on disk ({:.0} % of the rest), {} to send\nwrites {writes}\nlink {}, disk {}\n{table}{warning}",
        show_count(known.pages),
        show_count(known.zero),
        show_count(known.hits),
        100.0 * plan.hit_rate,
        show_count(known.pages - known.zero - known.hits),
        show_rate(known.link),
        show_rate(known.disk),
    )
}

/// Pages a second as bytes.
fn bytes(pages: f64) -> String {
    show_bytes(u64_of_f64(pages * f64_of(PAGE_BYTES_U64)))
}
