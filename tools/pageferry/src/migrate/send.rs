//! `pageferry send`: moves a guest of this machine to a waiting target.

use std::sync::Arc;

use mover::ExitClass;
use mover::disk::Disks;
use mover::disk::image::{DiskSpec, ImageDisks};
use mover::journal::{Entry, FileJournal, Record, Role};
use mover::net::tcp::{Settings, TcpDialer};
use mover::process::backend::attach_source;
use mover::process::control::Attached;
use mover::report::Mode;
use mover::source::{self, Config, NotConverging, Parts};
use mover::wire::hello::{MigrationId, Secret};

use super::{records_dir, surroundings};
use crate::cli::{IfNotConverging, SendArgs, Throttle};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::guest;
use crate::layout;
use crate::results::{self, Figures, Run};
use crate::told::{Line, Teller, Told};

/// Does it.
pub(crate) fn run(args: &SendArgs, console: &Console) -> Outcome {
    let token = Secret::from_hex(&args.token).ok_or_else(|| {
        Failure::usage(
            "that is not a token: it has 64 hexadecimal digits, as `pageferry receive` printed them",
        )
    })?;
    let teller = args.json_events.then(|| Arc::new(Teller::new()));
    let surroundings = surroundings(console, teller.clone())?;
    let mut id = MigrationId::default();
    surroundings.runtime.random(&mut id.0);

    let client = guest::connect(&args.guest)?;
    let workload = client.status()?.workload;
    let attached = attach_source(client, &id.to_string())?;
    let disks: Arc<dyn Disks> = Arc::new(ImageDisks::open_images(&specs(&attached.info))?);
    let journal = FileJournal::create(
        &records_dir(),
        Record {
            migration: id.to_string(),
            role: Role::Source,
            entry: Entry::Open,
            guest: attached.info.guest.clone(),
            handle: guest::socket_of(&args.guest).display().to_string(),
            peer: args.to.clone(),
        },
    )?;
    let name = attached.info.guest.clone();
    let config = config(args, workload);
    let settings = Settings { patience: config.patience, zero_copy: args.zero_copy, ..Settings::default() };
    let parts = Parts {
        guest: attached.with_disks(Arc::clone(&disks)),
        name,
        index: None,
        keeper: None,
        dialer: Arc::new(TcpDialer::new(&args.to, settings)),
        token,
        migration: id,
        journal: Box::new(journal),
    };
    let summary = source::migrate(parts, config, surroundings)?;
    match teller {
        Some(teller) => teller.tell(&Line::Told(Told::Ended { summary: Box::new(summary) })),
        None if console.json => {
            let line = serde_json::to_string(&summary)
                .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
            console.print(&line)?;
        }
        None => {
            let run = Run { result: Figures { summary, full_speed_ms: None }, events: Vec::new() };
            console.print(&results::table(&[run], layout::width()))?;
        }
    }
    Ok(())
}

/// The guest's disks, to be opened here.
fn specs(info: &Attached) -> Vec<DiskSpec> {
    let spec = |disk: &mover::process::control::GuestDisk| DiskSpec {
        name: disk.name.clone(),
        path: disk.path.clone().into(),
        writable: true,
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
        bandwidth: args.bandwidth.map(|rate| rate.0),
        throttle: args.throttle == Throttle::Auto,
        not_converging: match args.if_not_converging {
            IfNotConverging::Finish => NotConverging::Finish,
            IfNotConverging::Abort => NotConverging::Abort,
        },
        verify: args.verify,
        ..Config::default()
    }
}
