//! `pageferry resolve`: what to do when a link or an end was lost just as a guest changed hands.
//!
//! Each end keeps a record of every migration until the other end has confirmed its end. A source's record that says
//! `committed` means: the guest was given up here, and whether it was started there is not known. The target's record
//! on the other host knows.

use mover::ExitClass;
use mover::journal::{self, Entry, Record, Role};
use mover::process::client::GuestClient;
use mover::process::control::{self, Status};
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
    match (record.role, args.here) {
        (Role::Source, true) => source_here(path, record, console),
        (Role::Source, false) => source_there(path, record, console),
        (Role::Target, true) => target_here(path, record, console),
        (Role::Target, false) => target_there(path, record, console),
    }
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
    /// What the guest is doing on this host; nothing where none answers.
    guest_phase: Option<control::Phase>,
    meaning: String,
}

fn tell(record: &Record, console: &Console) -> Outcome {
    let status = status(record);
    let meaning = meaning(record, status.as_ref());
    if console.json {
        let guest_phase = status.map(|status| status.phase);
        let text = serde_json::to_string(&Told { record, guest_phase, meaning })
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        return console.print(&text);
    }
    console.print(&format!("{}  {}: {meaning}", record.migration, record.guest))
}

/// How the guest is that a record is about; `None` where none answers.
fn status(record: &Record) -> Option<Status> {
    GuestClient::connect(Path::new(&record.handle)).and_then(|client| client.status()).ok()
}

/// What a record and the guest, if it answers, say about who has the guest, and what to do.
fn meaning(record: &Record, status: Option<&Status>) -> String {
    let peer = &record.peer;
    let id = record.migration.get(..8).unwrap_or(&record.migration);
    match (record.role, record.entry, status) {
        (Role::Source, Entry::Open, Some(status)) if status.migration.is_some() => {
            format!("on its way to {peer}; the guest is this host's until it is given up")
        }
        (Role::Source, Entry::Open, _) => format!(
            "broken off before it was given up: the guest is this host's. `pageferry resolve {id} --here` forgets this"
        ),
        (Role::Source, _, Some(status)) if status.phase == control::Phase::Running => format!(
            "broken off as it was to be given up: the guest runs here, and was not started on {peer}. `pageferry \
             resolve {id} --here` forgets this"
        ),
        (Role::Source, ..) => format!(
            "given up here to {peer}, its start there not confirmed. Run `pageferry resolve {id}` there. If it was \
             started: `pageferry resolve {id} --there` here; if not: `pageferry resolve {id} --here` here"
        ),
        (Role::Target, Entry::Open, Some(status)) if status.migration.is_some() => {
            format!("on its way from {peer}; it does not run here yet")
        }
        (Role::Target, Entry::Open | Entry::Discarded, _) => format!(
            "from {peer}: never started here, and this host will not start it any more. `pageferry resolve {id} \
             --there` forgets this"
        ),
        (Role::Target, _, Some(status)) if status.holding && status.migration.is_none() => format!(
            "from {peer}: started here, this host has the guest, but it waits for pages that nobody loads any more. \
             `pageferry resume {}` goes on with that",
            record.guest
        ),
        (Role::Target, _, Some(status)) if status.phase == control::Phase::Running => format!(
            "from {peer}: started here, this host has the guest. `pageferry resolve {id} --here` forgets this"
        ),
        (Role::Target, ..) => format!(
            "from {peer}: recorded as started here, but it does not run here. Killed before it came up, or ended since: \
             if it is to go on where it was before, `pageferry resolve {id} --here` on {peer}; then `pageferry resolve \
             {id} --there` here"
        ),
    }
}

/// Refuses where an engine is still at it.
fn not_under_way(record: &Record, status: Option<&Status>) -> Outcome {
    match status.and_then(|status| status.migration.as_ref()) {
        Some(_) if record.entry != Entry::Committed => Err(Failure::usage(format!(
            "guest {} is still on its way: there is nothing to settle yet",
            record.guest
        ))),
        _ => Ok(()),
    }
}

/// The guest, given up and paused, that a source's record is about.
fn given_up(record: &Record) -> Outcome<GuestClient> {
    let client = GuestClient::connect(Path::new(&record.handle))?;
    let status = client.status()?;
    if status.phase != control::Phase::Released {
        let message = format!("guest {} is {}, not given up", record.guest, status.phase);
        return Err(Failure::new(ExitClass::Guest, message));
    }
    Ok(client)
}

fn source_here(path: &Path, record: &Record, console: &Console) -> Outcome {
    if record.entry != Entry::Committed {
        not_under_way(record, status(record).as_ref())?;
        return forget(path);
    }
    // It goes on running only once it has been reclaimed: a second call finds it so, and only forgets the record.
    if status(record).is_none_or(|status| status.phase != control::Phase::Running) {
        let client = given_up(record)?;
        client.attach(control::Role::Source, &record.migration)?;
        client.reclaim()?;
        client.resume()?;
    }
    forget(path)?;
    console.note(&format!("guest {} runs here again", record.guest));
    Ok(())
}

fn source_there(path: &Path, record: &Record, console: &Console) -> Outcome {
    if record.entry != Entry::Committed {
        return Err(Failure::usage(format!(
            "guest {} was never given up here: {}",
            record.guest,
            meaning(record, status(record).as_ref())
        )));
    }
    // Where its process has gone with this host's power, there is nothing left to end.
    if status(record).is_some() {
        given_up(record)?.destroy()?;
    }
    forget(path)?;
    console.note(&format!("guest {} has ended here; {} has it", record.guest, record.peer));
    Ok(())
}

fn target_here(path: &Path, record: &Record, console: &Console) -> Outcome {
    let status = status(record);
    not_under_way(record, status.as_ref())?;
    let runs = status.as_ref().is_some_and(|s| s.phase == control::Phase::Running && !s.holding);
    if record.entry != Entry::Started || !runs {
        let message =
            format!("guest {} is not this host's: {}", record.guest, meaning(record, status.as_ref()));
        return Err(Failure::usage(message));
    }
    forget(path)?;
    console.note(&format!("guest {} runs here", record.guest));
    Ok(())
}

fn target_there(path: &Path, record: &Record, console: &Console) -> Outcome {
    let status = status(record);
    not_under_way(record, status.as_ref())?;
    if record.entry == Entry::Started && status.is_some() {
        return Err(Failure::usage(format!(
            "guest {} is here: {}",
            record.guest,
            meaning(record, status.as_ref())
        )));
    }
    forget(path)?;
    console.note(&format!("guest {} does not run here", record.guest));
    Ok(())
}

fn forget(path: &Path) -> Outcome {
    std::fs::remove_file(path).or_fail(
        || format!("settled, but its record {} can't be removed", path.display()),
        "Remove it by hand",
    )
}
