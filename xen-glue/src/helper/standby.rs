//! The process that takes a target's worker's place if it is killed while pages are outstanding ([`crate::standby`] has the
//! picture): in a session of its own, with nothing but a socket, the table of pages and a descriptor that says when the worker has
//! ended.
//!
//! Until then it has the ring's page mapped and the disks open, and does nothing. If it is killed too, the guest's processors that
//! touch pages that are out stand still, as they do while nobody has taken over yet.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use mover::journal::Role;
use mover::process::launch;
use mover::wire::hello::MigrationId;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::setsid;

use super::lingering;
use super::note::Noted;
use crate::abi::{DomainId, process};
use crate::confine;
use crate::domain::Watch;
use crate::ferry::{Return, Shelves, take_over};
use crate::settings::Settings;
use crate::standby::{Terms, map_table, say_mapped, take_terms, wait_armed};

/// What it is told by its arguments: the descriptors' numbers, and the domain, the ring's frame, the guest's frames.
fn told(arguments: &[OsString]) -> Option<([i32; 3], (DomainId, u64, u64))> {
    let [socket, table, worker, domain, frame, frames] = arguments else { return None };
    let number = |text: &OsString| text.to_str()?.parse().ok();
    let descriptors = [number(socket)?, number(table)?, number(worker)?];
    let wide = |text: &OsString| text.to_str()?.parse::<u64>().ok();
    let domain = DomainId(u16::try_from(wide(domain)?).ok()?);
    Some((descriptors, (domain, wide(frame)?, wide(frames)?)))
}

/// Watches, and takes over. Exits with 2 if it was not a worker that has started it.
pub(super) fn run(arguments: &[OsString]) -> ExitCode {
    let Some((descriptors, (domain, frame, frames))) = told(arguments) else { return ExitCode::from(2) };
    let Ok([socket, table, worker]) = process::take_over(descriptors) else { return ExitCode::from(2) };
    // The worker's session may be ended as a whole.
    let _ = setsid();
    let mut notes = confine::worker();
    let socket = UnixStream::from(socket);
    let watch = map_table(&table, frames).and_then(|table| Watch::begin(domain, frame, frames, table));
    let said = say_mapped(&socket, watch.as_ref().err());
    let (Ok(watch), Ok(())) = (watch, said) else { return ExitCode::FAILURE };
    // Nothing to take over: the worker has ended, and with it the restore.
    let Some(terms) = take_terms(&socket) else { return ExitCode::SUCCESS };
    let shelves = Shelves::open(&terms.shape.disks);
    notes.extend(shelves.notes.iter().cloned());
    notes.extend(confine::faces_the_network());
    let how = how(&mut notes);
    if !wait_armed(&socket) {
        return ExitCode::SUCCESS;
    }
    wait_for_end(&worker);
    go_on(domain, watch, terms, how, shelves, notes)
}

/// How the source is found again: the worker has the same from the same settings.
fn how(notes: &mut Vec<String>) -> Return {
    let how = Settings::load().and_then(|settings| {
        Ok(Return { credentials: settings.credentials()?, redial_for: settings.redial_for })
    });
    how.unwrap_or_else(|error| {
        notes.push(format!("{error}. The source is not looked for"));
        Return { credentials: None, redial_for: Duration::ZERO }
    })
}

/// Waits until every thread of the worker has ended.
fn wait_for_end(worker: &OwnedFd) {
    loop {
        let mut fds = [PollFd::new(worker, PollFlags::IN)];
        if poll(&mut fds, None).is_ok_and(|ready| ready > 0) {
            return;
        }
    }
}

/// The drain is this process's.
fn go_on(
    domain: DomainId,
    watch: Watch,
    terms: Terms,
    how: Return,
    shelves: Shelves,
    notes: Vec<String>,
) -> ExitCode {
    let migration = MigrationId(terms.offer.migration);
    let noted = Noted::begin(&launch::notes_dir(), migration, Role::Target, &terms.shape.guest);
    let mut begins =
        vec!["the worker has ended while pages were outstanding, its standby goes on".to_owned()];
    begins.extend(notes);
    let left = watch.take_over(terms.port).and_then(|guest| take_over(terms, how, guest, shelves));
    match left {
        Ok(left) => {
            lingering::finish(left, domain, noted.ok(), &begins);
            ExitCode::SUCCESS
        }
        Err(error) => {
            begins.push(format!("failed: {error}. The guest waits for its pages; destroy it"));
            lingering::write_down(domain, migration, Role::Target, &begins);
            ExitCode::FAILURE
        }
    }
}
