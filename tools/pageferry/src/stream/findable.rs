//! `pageferry stream findable`: what of a saved guest's memory stands on its disks, and what of that their indexes find.

use std::path::{Path, PathBuf};

use mover::ExitClass;
use mover::index::commands::Contents;
use mover::units::{PAGE_BYTES, f64_of};
use serde::Serialize;
use xen_glue::stream::scan::{Item, ScanError, scan_pages};

use super::{name, open};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::state;
use crate::units::show_count;

/// What was counted; pages.
#[derive(Default, Serialize)]
struct Findable {
    /// With contents in the stream.
    pages: u64,
    /// Of those, nothing but zeroes.
    zero: u64,
    /// Of those that are not, standing on a disk.
    on_disks: u64,
    /// Of those, for which an index leads to a block that holds them.
    by_index: u64,
    /// Of the others on disks, for which an index leads to a block that holds something else.
    stale: u64,
    /// `by_index` of `on_disks`; 1 where there is nothing to find.
    share: f64,
}

/// Does what the command says.
pub(super) fn run(file: &Path, disks: &[PathBuf], console: &Console) -> Outcome {
    let directory = state::index_dir();
    let disks: Vec<Contents> =
        disks.iter().map(|disk| Contents::read(disk, &directory)).collect::<Result<_, _>>()?;
    let mut found = Findable::default();
    let mut each = |_: Item| -> Outcome { Ok(()) };
    let survey = scan_pages(open(file)?, &mut each, &mut |page| count(&mut found, &disks, page));
    let survey = survey.map_err(|error| match error {
        ScanError::Stream(error) => Failure::new(ExitClass::Machine, format!("{}: {error}", file.display())),
        ScanError::Each(failure) => failure,
    })?;
    if !survey.complete {
        let why = "it is not whole; `pageferry stream verify` says where it ends";
        return Err(Failure::new(ExitClass::Mismatch, format!("{}: {why}", name(file))));
    }
    found.share = match found.on_disks {
        0 => 1.0,
        some => f64_of(found.by_index) / f64_of(some),
    };
    if console.json {
        let text = serde_json::to_string(&found)
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        return console.print(&text);
    }
    console.print(&words(&name(file), &found))
}

fn count(found: &mut Findable, disks: &[Contents], page: &[u8; PAGE_BYTES]) {
    found.pages += 1;
    if page.iter().all(|byte| *byte == 0) {
        found.zero += 1;
        return;
    }
    if !disks.iter().any(|disk| disk.has(page)) {
        return;
    }
    found.on_disks += 1;
    // As a migration asks: the first disk whose index knows something is believed.
    match disks.iter().find_map(|disk| disk.index_is_right(page)) {
        Some(true) => found.by_index += 1,
        Some(false) => found.stale += 1,
        None => {}
    }
}

fn words(name: &str, found: &Findable) -> String {
    format!(
        "{name}: {} pages, {} of them zero\n  {} stand on the disks, of which the indexes lead to {} ({:.2} %); for {} they lead \
         to another block",
        show_count(found.pages),
        show_count(found.zero),
        show_count(found.on_disks),
        show_count(found.by_index),
        100.0 * found.share,
        show_count(found.stale),
    )
}
