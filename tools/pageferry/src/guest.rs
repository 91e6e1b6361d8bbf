//! `pageferry guest ...`: guests that are processes of this machine.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mover::ExitClass;
use mover::error::GuestError;
use mover::process::client::GuestClient;
use mover::process::config::GuestConfig;
use mover::process::control::Status;
use mover::process::launch;

use crate::cli::{GuestCommand, GuestShape};
use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::signals;
use crate::units::{show_bytes, show_count, show_ms};

/// Does what the command says.
pub(crate) fn run(command: GuestCommand, console: &Console) -> Outcome {
    match command {
        GuestCommand::Start { name, shape } => start(&name, &shape, console),
        GuestCommand::List => list(console),
        GuestCommand::Status { name } => show(&connect(&name)?.status()?, console),
        GuestCommand::Check { name } => check(&name, console),
        GuestCommand::Stop { name } => {
            connect(&name)?.destroy()?;
            console.note(&format!("guest {name} has ended"));
            Ok(())
        }
        GuestCommand::Run => {
            let stop = Arc::new(AtomicBool::new(false));
            signals::set_on_end(&stop)?;
            launch::run_spawned(&stop).map_err(Failure::from)
        }
    }
}

/// A connection to the guest of that name, or to the one whose socket that is.
pub(crate) fn connect(name: &str) -> Outcome<GuestClient> {
    GuestClient::connect(&socket_of(name)).map_err(|error| {
        let nobody = matches!(&error, GuestError::Os { source, .. }
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused));
        let failure = Failure::from(error);
        // No guest answers there: it is not the machine that lacks something.
        if nobody { Failure { class: ExitClass::Guest, ..failure } } else { failure }
    })
}

/// A guest's control socket by its name, or the path of one.
pub(crate) fn socket_of(name: &str) -> PathBuf {
    if name.contains('/') { PathBuf::from(name) } else { launch::socket_of(name) }
}

/// The arguments with which this program is the process of a guest.
pub(crate) const PROCESS: [&str; 2] = ["guest", "run"];

/// This program, called as the process of a guest.
pub(crate) fn guest_program() -> Outcome<Command> {
    let program = std::env::current_exe()
        .or_fail(|| "cannot find this program's own file".to_owned(), "Is /proc mounted?")?;
    let mut command = Command::new(program);
    command.args(PROCESS);
    Ok(command)
}

/// A guest's configuration from the flags.
pub(crate) fn config(name: &str, shape: &GuestShape) -> Outcome<GuestConfig> {
    let mut config = GuestConfig::new(name, shape.memory.0);
    config.vcpus = shape.vcpus;
    config.workload.clone_from(&shape.workload);
    config.seed = shape.seed;
    config.prefault = shape.prefault;
    for path in &shape.disks {
        // The guest's process may run elsewhere, and a migration names the path to the other end.
        let whole = path.canonicalize().map_err(|error| {
            Failure::new(
                ExitClass::Disk,
                format!("cannot open the disk image {}: {error}. Name one that is there", path.display()),
            )
        })?;
        config.disks.push(whole);
    }
    config.check().map_err(|error| Failure::usage(error.to_string()))?;
    Ok(config)
}

fn start(name: &str, shape: &GuestShape, console: &Console) -> Outcome {
    let config = config(name, shape)?;
    let guest = launch::spawn(guest_program()?, &config)?;
    let status = guest.connect()?.status()?;
    show(&status, console)?;
    console.note(&format!("it runs until `pageferry guest stop {name}`; its log is {}", guest.log.display()));
    Ok(())
}

/// All guests that answer; sockets nobody answers at are left alone and named.
fn list(console: &Console) -> Outcome {
    let directory = launch::runtime_dir();
    let mut guests = Vec::new();
    for socket in sockets(&directory)? {
        match GuestClient::connect(&socket).and_then(|client| client.status()) {
            Ok(status) => guests.push(status),
            Err(_) => console.note(&format!("nobody answers at {}; its guest is gone", socket.display())),
        }
    }
    if console.json {
        return guests.iter().try_for_each(|status| print_json(status, console));
    }
    if guests.is_empty() {
        console.note(&format!("no guest runs here (sockets in {})", directory.display()));
    }
    guests.iter().try_for_each(|status| console.print(&line(status)))
}

fn sockets(directory: &Path) -> Outcome<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.or_fail(
            || format!("cannot read the runtime directory {}", directory.display()),
            "Set XDG_RUNTIME_DIR to a directory of your own",
        )?,
    };
    let mut sockets: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "guest"))
        .collect();
    sockets.sort();
    Ok(sockets)
}

fn check(name: &str, console: &Console) -> Outcome {
    let status = connect(name)?.check()?;
    show(&status, console)?;
    if status.wrong_pages == 0 {
        return Ok(());
    }
    let wrong = show_count(status.wrong_pages);
    Err(Failure::new(
        ExitClass::Mismatch,
        format!("guest {name} has found {wrong} wrong pages in its memory"),
    ))
}

fn print_json(status: &Status, console: &Console) -> Outcome {
    let text = serde_json::to_string(status)
        .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
    console.print(&text)
}

fn show(status: &Status, console: &Console) -> Outcome {
    if console.json {
        return print_json(status, console);
    }
    console.print(&format!("{}\n{}", line(status), details(status)))
}

/// A guest in a line.
fn line(status: &Status) -> String {
    let migration = status.migration.as_ref().map_or(String::new(), |id| format!(", migration {id}"));
    format!(
        "{}: {}, {}, {}, pid {}{migration}",
        status.guest,
        status.phase,
        show_bytes(status.memory_bytes),
        status.workload,
        status.pid,
    )
}

/// What it has done and found.
fn details(status: &Status) -> String {
    let work = &status.work;
    let wrong = match status.wrong_pages {
        0 => "none wrong".to_owned(),
        n => format!("{} WRONG", show_count(n)),
    };
    let mut out = format!(
        "  work:   {} dirtied, {} read, {} written, {} operations\n  checks: {} pages in {} here, {wrong}",
        show_bytes(work.dirtied_bytes),
        show_bytes(work.read_bytes),
        show_bytes(work.written_bytes),
        show_count(work.operations),
        show_count(status.pages_checked),
        show_ms(mover::units::f64_of(status.uptime_ms)),
    );
    if work.disk_errors > 0 {
        out.push_str(&format!("\n  disks:  {} operations failed", show_count(work.disk_errors)));
    }
    for page in &status.first_wrong {
        out.push_str(&format!("\n  pfn {:#x} ({}): {}", page.pfn, page.kind, page.what));
    }
    out
}
