//! `pageferry receive`: waits for one guest and takes it up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mover::ExitClass;
use mover::disk::identity::{open_same, resolve};
use mover::disk::{DiskInfo, Disks};
use mover::error::Error;
use mover::journal::{Entry, FileJournal, Journal, Record, Role};
use mover::net::entrance::{Entrance, Lock};
use mover::net::pass::Pass;
use mover::net::tcp::{Settings, TcpAcceptor};
use mover::net::tls::Identity;
use mover::process::backend::attach_target_by;
use mover::process::config::GuestConfig;
use mover::process::keepsake::Way;
use mover::process::launch;
use mover::report::{Event, Observer as _};
use mover::target::{self, Config, Host, Parts};
use mover::units::PageCount;
use mover::wire::control::Shape;
use mover::wire::hello::Secret;
use zeroize::Zeroizing;

use super::surroundings;
use crate::cli::ReceiveArgs;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::guest;
use crate::lockdown;
use crate::metrics::tally::Ended;
use crate::state;
use crate::status::{self, Running};
use crate::told::{self, Line, Teller, Told};
use crate::units::{show_bytes, show_count, show_ms};

/// An incoming guest whose engine has not come within so many seconds ends.
const ATTACH_WITHIN_SECONDS: u64 = 60;

/// Does it.
pub(crate) fn run(args: &ReceiveArgs, console: &Console) -> Outcome {
    let disks = disks(&args.disks)?;
    let teller = args.json_events.then(|| Arc::new(Teller::new()));
    let (surroundings, noted) = surroundings(console, teller.clone())?;
    let mut config = Config {
        direct: args.direct,
        wait: Some(args.wait),
        patience: args.patience,
        redial_for: args.redial_for,
        ..Config::default()
    };
    if let Some(depth) = args.depth {
        config.depth = depth;
    }
    let settings = Settings { patience: config.patience, ..Settings::default() };
    let acceptor = TcpAcceptor::listen(&args.listen, settings)?;
    let lock = match (args.plaintext, args.credentials.load()?) {
        (true, _) => Lock::Plain,
        (false, None) => Lock::Tls(Identity::new()?),
        (false, Some(authority)) => Lock::Tls(authority.identity()?),
    };
    // An operator's own key is not given to guests to keep: nobody takes over from an engine that shows it.
    let listen = acceptor.local().to_string();
    let way = match &lock {
        Lock::Plain => Some(Way { listen, pair: None }),
        Lock::Tls(identity) => identity.pair().map(|pair| Way { listen, pair: Some(pair.clone()) }),
    };
    let token = Secret::made(|place| surroundings.runtime.random(place));
    let pass = Pass { token, fingerprint: lock.fingerprint() };
    announce(acceptor.local(), &pass, args, console, teller.as_deref())?;

    let told = teller.clone();
    let name = args.name.clone();
    let journal_name = name.clone();
    let parts = Parts {
        acceptor: Box::new(Entrance::new(acceptor, lock)),
        token: pass.token,
        host: Box::new(move |shape| make_host(shape, name.as_deref(), &disks, way)),
        journal: Box::new(move |id, shape, peer| {
            let guest = journal_name.unwrap_or_else(|| shape.guest.clone());
            if let Some(teller) = &told {
                teller.migration_is(&id);
            }
            noted.begin(Running {
                migration: id.to_string(),
                role: Role::Target,
                guest: guest.clone(),
                peer: peer.to_owned(),
                pid: std::process::id(),
                at_ms: 0.0,
                phase: None,
                sample: None,
            });
            let record = Record {
                migration: id.to_string(),
                role: Role::Target,
                entry: Entry::Open,
                handle: launch::socket_of(&guest).display().to_string(),
                guest,
                peer: peer.to_owned(),
            };
            let journal: Box<dyn Journal> = Box::new(FileJournal::create(&state::records_dir(), record)?);
            // The guest's process runs, its disks are open: lanes and loader start without privileges.
            for text in lockdown::engine(&state::records_dir()) {
                noted.event(Event::Notice { at_ms: 0.0, text });
            }
            Ok(journal)
        }),
    };
    let outcome = target::receive(parts, config, surroundings);
    status::ended(&match &outcome {
        Ok(_) => Ended::Received,
        Err(error) => Ended::Failed(Role::Target, error.class()),
    });
    let account = outcome?;
    if teller.is_none() {
        let feedback = &account.feedback;
        console.note(&format!(
            "the guest runs here: {} references loaded and checked, {} did not hold, {} from disk, {} after the restart",
            show_count(feedback.checked),
            show_count(feedback.failed),
            show_bytes(feedback.disk_bytes),
            show_count(account.lazy),
        ));
    }
    Ok(())
}

/// `NAME=PATH` pairs.
fn disks(given: &[String]) -> Outcome<BTreeMap<String, PathBuf>> {
    let pair = |text: &String| {
        let (name, path) =
            text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty())?;
        Some((name.to_owned(), PathBuf::from(path)))
    };
    given
        .iter()
        .map(|text| {
            pair(text)
                .ok_or_else(|| Failure::usage(format!("`{text}` is not NAME=PATH, as in disk0=/images/a")))
        })
        .collect()
}

/// Says where to send to: the whole command, to be pasted into the other shell.
fn announce(
    local: SocketAddr,
    pass: &Pass,
    args: &ReceiveArgs,
    console: &Console,
    teller: Option<&Teller>,
) -> Outcome {
    let word = pass.to_word();
    let host = if local.ip().is_unspecified() { host_name() } else { local.ip().to_string() };
    let address = if host.contains(':') {
        format!("[{host}]:{}", local.port())
    } else {
        format!("{host}:{}", local.port())
    };
    if let Some(teller) = teller {
        teller.tell(&Line::Told(Told::Listening { address, token: word }));
        return Ok(());
    }
    if console.json {
        let line = Told::Listening { address, token: word };
        let text =
            told::text_of(&line).map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        return console.print(&text);
    }
    let limit = show_ms(args.wait.as_secs_f64() * 1e3);
    console.note(&format!("listening on {local}; on the source, start within {limit}:"));
    let plaintext = match (args.plaintext, &args.credentials.ca) {
        (true, _) => "--plaintext ",
        (false, Some(_)) => "--ca FILE --cert FILE --key FILE ",
        (false, None) => "",
    };
    let command = format!("pageferry send --guest NAME --to {address} {plaintext}--token ");
    let mut whole = Zeroizing::new(String::with_capacity(command.len() + word.len()));
    whole.push_str(&command);
    whole.push_str(&word);
    console.print(&whole)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "THIS-HOST".to_owned() } else { name.to_owned() }
}

/// Makes the guest the source describes, on the disks as they are here.
fn make_host(
    shape: &Shape,
    name: Option<&str>,
    paths: &BTreeMap<String, PathBuf>,
    way: Option<Way>,
) -> Result<Host, Error> {
    let infos: Vec<DiskInfo> = shape
        .disks
        .iter()
        .map(|disk| DiskInfo {
            name: disk.name.clone(),
            path: disk.path.clone(),
            bytes: disk.bytes,
            identity: disk.identity.clone(),
        })
        .collect();
    // The guest's own disks: if one of them is not here, or is another one, there is nothing to run the guest on.
    let disks: Option<Arc<dyn Disks>> = match infos.is_empty() {
        true => None,
        false => Some(Arc::new(open_same(&infos, paths)?)),
    };
    let mut config = GuestConfig::new(name.unwrap_or(&shape.guest), PageCount(shape.pages).bytes().0);
    config.disks = infos.iter().map(|info| resolve(info, paths)).collect();
    config.incoming = true;
    config.attach_within_seconds = Some(ATTACH_WITHIN_SECONDS);
    let program = guest::guest_program()
        .map_err(|failure| Error::Peer { reason: failure.message, class: failure.class })?;
    let spawned = launch::spawn(program, &config)?;
    let target = attach_target_by(spawned.connect()?, &shape.guest, way)?;
    Ok(Host { guest: target.guest, disks, readable: infos.iter().map(|_| Ok(())).collect() })
}
