//! `pageferry send`: moves a guest of this machine to a waiting target.

use std::sync::Arc;

use mover::ExitClass;
use mover::bitmap::Bitmap;
use mover::disk::image::{self, DiskSpec, ImageDisks};
use mover::disk::{Disks, WriteLog};
use mover::error::DiskError;
use mover::index::Keeper;
use mover::index::commands;
use mover::index::keeper::{DiskKeeper, Habits};
use mover::index::set::Tables;
use mover::journal::{Entry, FileJournal, Record, Role};
use mover::net::pass::{Fingerprint, Pass};
use mover::net::tcp::{Settings, TcpDialer};
use mover::net::tls::Authority;
use mover::process::backend::attach_source;
use mover::process::control::Attached;
use mover::report::{Event, Mode};
use mover::runtime::{Runtime, Threads};
use mover::source::{self, Config, NotConverging, Parts};
use mover::units::DiskId;
use mover::wire::hello::MigrationId;

use super::surroundings;
use crate::cli::{IfNotConverging, SendArgs, Throttle};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::guest;
use crate::layout;
use crate::lockdown;
use crate::metrics::tally::Ended;
use crate::results::{self, Figures, Run};
use crate::state;
use crate::status::{self, Running};
use crate::told::{Line, Teller, Told};

/// Does it.
pub(crate) fn run(args: &SendArgs, console: &Console) -> Outcome {
    let pass = pass(args)?;
    let authority = args.credentials.load()?;
    let mut id = MigrationId::default();
    Threads::new().random(&mut id.0);

    let teller = args.json_events.then(|| Arc::new(Teller::new()));
    if let Some(teller) = &teller {
        teller.migration_is(&id);
    }

    let client = guest::connect(&args.guest)?;
    let workload = client.status()?.workload;
    let attached = attach_source(client, &id.to_string())?;
    let disks = ImageDisks::open_images(&specs(&attached.info))?;
    let (tables, notes) = match args.mode.refers() {
        true => commands::load(&disks, &state::index_dir())?,
        false => (Tables::default(), Vec::new()),
    };
    let journal = FileJournal::create(
        &state::records_dir(),
        Record {
            migration: id.to_string(),
            role: Role::Source,
            entry: Entry::Open,
            guest: attached.info.guest.clone(),
            handle: guest::socket_of(&args.guest).display().to_string(),
            peer: args.to.clone(),
        },
    )?;
    // All that takes privileges is open. Before the first thread and the first byte from outside.
    let kept = lockdown::engine(&state::records_dir());
    let (surroundings, noted) = surroundings(console, teller.clone())?;
    noted.begin(Running {
        migration: id.to_string(),
        role: Role::Source,
        guest: attached.info.guest.clone(),
        peer: args.to.clone(),
        pid: std::process::id(),
        at_ms: 0.0,
        phase: None,
        sample: None,
    });
    for text in notes.into_iter().chain(kept) {
        surroundings.observer.event(Event::Notice { at_ms: 0.0, text });
    }
    let name = attached.info.guest.clone();
    let config = config(args, workload);
    let settings = Settings { patience: config.patience, zero_copy: args.zero_copy, ..Settings::default() };
    let disks: Arc<dyn Disks> = Arc::new(disks);
    let mut guest = attached.with_disks(Arc::clone(&disks));
    let writes = std::mem::replace(&mut guest.writes, Box::new(TakenLog));
    let keeper: Box<dyn Keeper> =
        Box::new(DiskKeeper::new(tables.clone(), &*disks, writes, Habits::default())?);
    let parts = Parts {
        guest,
        name,
        index: Some(Arc::new(tables)),
        keeper: Some(keeper),
        dialer: Arc::new(dialer(args, settings, pass.fingerprint, authority)?),
        token: pass.token,
        migration: id,
        journal: Box::new(journal),
    };
    let outcome = source::migrate(parts, config, surroundings);
    status::ended(&match &outcome {
        Ok(summary) => Ended::Moved(summary),
        Err(error) => Ended::Failed(Role::Source, error.class()),
    });
    let summary = outcome?;
    match teller {
        Some(teller) => teller.tell(&Line::Told(Told::Ended { summary: Box::new(summary) })),
        None if console.json => {
            let line = serde_json::to_string(&summary)
                .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
            console.print(&line)?;
        }
        None => {
            let run = Run {
                result: Figures { summary, full_speed_ms: None, fared: None },
                events: Vec::new(),
                watched: false,
            };
            console.print(&results::table(&[run], layout::width()))?;
        }
    }
    Ok(())
}

/// The way to the target.
fn dialer(
    args: &SendArgs,
    settings: Settings,
    pin: Option<Fingerprint>,
    authority: Option<Authority>,
) -> Outcome<TcpDialer> {
    let dialer = TcpDialer::new(&args.to, settings).pinned(pin);
    let Some(authority) = authority else { return Ok(dialer) };
    let host = args.to.rsplit_once(':').map_or(args.to.as_str(), |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok(dialer.certified(authority, Some(args.peer_name.as_deref().unwrap_or(host)))?)
}

/// The token, if it is for what is asked for.
fn pass(args: &SendArgs) -> Outcome<Pass> {
    let pass: Pass = args.token.parse().map_err(Failure::usage)?;
    match (&pass.fingerprint, args.plaintext) {
        (None, false) => Err(Failure::usage(
            "that token is for a target in the clear (`pageferry receive --plaintext`). If the guest's memory may be \
             read and changed on the way, say --plaintext here too",
        )),
        (Some(_), true) => {
            Err(Failure::usage("that token is for an encrypted migration: leave --plaintext away"))
        }
        _ => Ok(pass),
    }
}

/// Stands where the log of disk writes was before the index's keeper took it.
struct TakenLog;

impl WriteLog for TakenLog {
    fn harvest(&mut self, _: DiskId, _: &mut Bitmap) -> Result<u64, DiskError> {
        Ok(0)
    }
}

/// The guest's disks, to be opened here.
pub(crate) fn specs(info: &Attached) -> Vec<DiskSpec> {
    let spec = |disk: &mover::process::control::GuestDisk| DiskSpec {
        name: disk.name.clone(),
        path: disk.path.clone().into(),
        role: image::Role::Own,
    };
    info.disks.iter().map(spec).collect()
}

fn config(args: &SendArgs, workload: String) -> Config {
    Config {
        mode: args.mode,
        workload,
        // The baseline has one connection, as libxl gives libxenguest one.
        lanes: if args.mode == Mode::Stock { 1 } else { args.lanes },
        max_downtime: args.max_downtime,
        max_rounds: args.max_rounds,
        patience: args.patience,
        redial_for: args.redial_for,
        bandwidth: args.bandwidth.map(|rate| rate.0),
        throttle: args.throttle == Throttle::Auto,
        not_converging: match args.if_not_converging {
            IfNotConverging::Finish => NotConverging::Finish,
            IfNotConverging::Abort => NotConverging::Abort,
        },
        holds_ahead: false,
        toolstack: false,
        verify: args.verify,
    }
}
