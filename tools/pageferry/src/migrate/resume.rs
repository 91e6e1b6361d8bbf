//! `pageferry resume`: takes the place of a `receive` that was lost while its guest ran with pages outstanding.

use std::sync::Arc;

use mover::ExitClass;
use mover::journal::{FileJournal, Role};
use mover::net::entrance::{Entrance, Lock};
use mover::net::tcp::{Settings, TcpAcceptor};
use mover::net::tls::Identity;
use mover::process::backend::attach_target;
use mover::report::{Event, Observer as _};
use mover::target::{self, Config, Host, Orphan};

use super::surroundings;
use crate::cli::ResumeArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::guest;
use crate::lockdown;
use crate::state;
use crate::status::Running;
use crate::told::Teller;
use crate::units::show_count;

/// Does it.
pub(crate) fn run(args: &ResumeArgs, console: &Console) -> Outcome {
    let client = guest::connect(&args.guest)?;
    let status = client.status()?;
    if !status.holding || status.migration.is_some() {
        let why = if status.holding { "they are being loaded" } else { "all of them are there" };
        let message = format!("guest {} does not wait for its pages: {why}", status.guest);
        return Err(Failure::usage(message));
    }
    let taken = attach_target(client, &status.guest)?;
    let Some(kept) = taken.kept else {
        return Err(Failure::new(
            ExitClass::Guest,
            format!(
                "guest {} was brought here by a version that can't be taken over from. Its pages are at the source still: \
                 end it here, and take it back there with `pageferry resolve`",
                status.guest
            ),
        ));
    };
    let teller = args.json_events.then(|| Arc::new(Teller::new()));
    if let Some(teller) = &teller {
        teller.migration_is(&kept.migration);
    }
    let (surroundings, noted) = surroundings(console, teller)?;
    let config = Config { patience: args.patience, redial_for: args.redial_for, ..Config::default() };
    let settings = Settings { patience: config.patience, ..Settings::default() };
    let acceptor = TcpAcceptor::listen(&kept.way.listen, settings)?;
    let lock = match kept.way.pair {
        Some(pair) => Lock::Tls(Identity::of(pair)?),
        None => Lock::Plain,
    };
    let record = state::records_dir().join(format!("{}-target.json", kept.migration));
    let journal = FileJournal::open(&record)?;
    console.note(&format!("waiting for the source to dial {} again", kept.way.listen));
    noted.begin(Running {
        migration: kept.migration.to_string(),
        role: Role::Target,
        guest: status.guest.clone(),
        peer: "the source".to_owned(),
        pid: std::process::id(),
        at_ms: 0.0,
        phase: None,
        sample: None,
    });
    for text in lockdown::engine(&state::records_dir()) {
        noted.event(Event::Notice { at_ms: 0.0, text });
    }
    let orphan = Orphan {
        acceptor: Box::new(Entrance::new(acceptor, lock)),
        migration: kept.migration,
        session: kept.secret,
        shape: Orphan::bare(status.guest.clone(), taken.guest.memory.pages(), kept.lanes),
        host: Host { guest: taken.guest, disks: None, readable: Vec::new() },
        journal: Box::new(journal),
    };
    let account = target::take_over(orphan, config, surroundings)?;
    console.note(&format!(
        "guest {} has all of its pages: {} came from the source",
        status.guest,
        show_count(account.lazy)
    ));
    Ok(())
}
