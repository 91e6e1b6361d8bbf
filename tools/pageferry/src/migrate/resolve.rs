//! `pageferry resolve`: what to do when a link or an end was lost just as a guest changed hands.
//!
//! Each end keeps a record of every migration until the other end has confirmed its end. A source's record that says
//! `committed` means: the guest was given up here, and whether it was started there is not known. The target's record
//! on the other host knows.

use mover::ExitClass;
use mover::journal::{self, Entry, Record, Role};
use mover::process::client::GuestClient;
use mover::process::control;
use serde::Serialize;
use std::path::{Path, PathBuf};

use crate::cli::ResolveArgs;
use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::state;

/// Does it.
pub(crate) fn run(args: &ResolveArgs, console: &Console) -> Outcome {
    let records = journal::list(&state::records_dir())?;
    let Some(wanted) = &args.migration else { return list(&records, console) };
    let mut found: Vec<_> =
        records.iter().filter(|(_, record)| record.migration.starts_with(wanted.as_str())).collect();
    let Some((_, first)) = found.first() else {
        return Err(Failure::usage(format!(
            "there is no record of migration {wanted} here; it is settled, or was not of this host"
        )));
    };
    if found.iter().any(|(_, record)| record.migration != first.migration) {
        return Err(Failure::usage(format!(
            "more than one migration begins with {wanted}; give more digits"
        )));
    }
    if !args.here && !args.there {
        return found.into_iter().try_for_each(|(_, record)| tell(record, console));
    }
    // Both ends may be on this host; the guest that was given up is the source's.
    found.sort_by_key(|(_, record)| record.role != Role::Source);
    let (path, record) = found[0];
    if args.here { take_back(path, record, console) } else { give_up(path, record, console) }
}

fn list(records: &[(PathBuf, Record)], console: &Console) -> Outcome {
    if records.is_empty() {
        console.note("no migration is open here");
    }
    records.iter().try_for_each(|(_, record)| tell(record, console))
}

/// A record with what it means, as JSON.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    record: &'a Record,
    meaning: String,
}

fn tell(record: &Record, console: &Console) -> Outcome {
    let meaning = meaning(record);
    if console.json {
        let text = serde_json::to_string(&Told { record, meaning })
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        return console.print(&text);
    }
    console.print(&format!("{}  {}: {meaning}", record.migration, record.guest))
}

/// What a record says about who has the guest, and what to do.
fn meaning(record: &Record) -> String {
    let peer = &record.peer;
    let id = record.migration.get(..8).unwrap_or(&record.migration);
    match (record.role, record.entry) {
        (Role::Source, Entry::Open) => {
            "on its way from here, or broken off before it was given up: the guest is this host's".to_owned()
        }
        (Role::Source, _) => format!(
            "given up here to {peer}, its start there not confirmed. Run `pageferry resolve {id}` there. If it was \
             started: `pageferry resolve {id} --there` here; if not: `pageferry resolve {id} --here` here"
        ),
        (Role::Target, Entry::Open) => format!(
            "on its way from {peer}, or broken off before it was started: it does not run here, and this host will \
             not start it any more"
        ),
        (Role::Target, Entry::Discarded) => format!("from {peer}: never started here"),
        (Role::Target, _) => format!("from {peer}: started here, this host has the guest"),
    }
}

/// The guest, given up and paused, that a source's record is about.
fn given_up(record: &Record) -> Outcome<GuestClient> {
    if record.role != Role::Source || record.entry != Entry::Committed {
        return Err(Failure::usage(format!("there is nothing to settle: {}", meaning(record))));
    }
    let client = GuestClient::connect(Path::new(&record.handle))?;
    let status = client.status()?;
    if status.phase != control::Phase::Released {
        let message = format!("guest {} is {}, not given up", record.guest, status.phase);
        return Err(Failure::new(ExitClass::Guest, message));
    }
    Ok(client)
}

fn take_back(path: &Path, record: &Record, console: &Console) -> Outcome {
    let client = given_up(record)?;
    client.attach(control::Role::Source, &record.migration)?;
    client.reclaim()?;
    client.resume()?;
    forget(path)?;
    console.note(&format!("guest {} runs here again", record.guest));
    Ok(())
}

fn give_up(path: &Path, record: &Record, console: &Console) -> Outcome {
    given_up(record)?.destroy()?;
    forget(path)?;
    console.note(&format!("guest {} has ended here; {} has it", record.guest, record.peer));
    Ok(())
}

fn forget(path: &Path) -> Outcome {
    std::fs::remove_file(path).or_fail(
        || format!("settled, but its record {} can't be removed", path.display()),
        "Remove it by hand",
    )
}
