//! Starting a guest: in this process, or as a detached child of its own session.

#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::client::GuestClient;
use super::config::GuestConfig;
use super::control::Phase;
use super::machine::Machine;
use super::server::{Server, Socket};
use crate::error::GuestError;

/// How often a starting guest is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// How long a guest may take to boot: its memory is filled at the speed of its disk.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);

/// The directory of guests' control sockets: `$XDG_RUNTIME_DIR/pageferry`, `/run/pageferry` for root, else
/// `/tmp/pageferry-UID`.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let uid = rustix::process::getuid();
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("pageferry"),
        _ if uid.is_root() => PathBuf::from("/run/pageferry"),
        _ => PathBuf::from(format!("/tmp/pageferry-{}", uid.as_raw())),
    }
}

/// Where processes note what they do whatever session they were started in: [`runtime_dir`], but for root always the same,
/// which is there for longer than a login.
#[must_use]
pub fn notes_dir() -> PathBuf {
    if rustix::process::getuid().is_root() { PathBuf::from("/run/pageferry") } else { runtime_dir() }
}

/// The control socket of the guest called `name` in the user's runtime directory.
#[must_use]
pub fn socket_of(name: &str) -> PathBuf {
    runtime_dir().join(format!("{name}.guest"))
}

/// Makes a runtime directory that only its owner can enter.
fn make_runtime_dir(dir: &Path) -> Result<(), GuestError> {
    let failed = |source: io::Error| GuestError::Os {
        doing: format!("cannot make the runtime directory {}", dir.display()),
        remedy: "Set XDG_RUNTIME_DIR to a directory of your own",
        source,
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let meta = std::fs::metadata(dir).map_err(failed)?;
    let uid = rustix::process::geteuid();
    if meta.uid() != uid.as_raw() && !uid.is_root() {
        return Err(GuestError::State(format!(
            "the runtime directory {} belongs to user {}, not to you. Set XDG_RUNTIME_DIR to a directory of your own",
            dir.display(),
            meta.uid()
        )));
    }
    Ok(())
}

/// Runs a guest in this process until it is destroyed, loses the migration that was to bring it, or `stop` is set;
/// its control socket is removed then. The caller ends the process after it: threads of a guest with pages held back
/// may still wait for them.
///
/// # Errors
/// A wrong configuration, a guest of that name already running, a disk that can't be read, no memory.
pub fn run(config: &GuestConfig, stop: &AtomicBool) -> Result<(), GuestError> {
    run_logged(config, None, stop)
}

/// As [`run`], with its standard error in `log`.
fn run_logged(config: &GuestConfig, log: Option<PathBuf>, stop: &AtomicBool) -> Result<(), GuestError> {
    config.check()?;
    make_runtime_dir(&config.runtime_dir)?;
    let socket = Socket::bind(&config.socket(), log)?;
    let machine = Machine::new(config)?;
    if !config.incoming {
        machine.boot(stop)?;
    }
    let server = Server::new(config.clone(), machine, &socket);
    let served = server.serve(&socket, stop);
    drop(socket);
    server.machine().end(server.holding());
    served
}

/// The child's side of [`spawn`]: takes the configuration from standard input, leaves its parent's session, and runs
/// the guest.
///
/// # Errors
/// As for [`run`]; no configuration on standard input.
pub fn run_spawned(stop: &AtomicBool) -> Result<(), GuestError> {
    let mut text = String::new();
    io::stdin().lock().read_to_string(&mut text).map_err(|source| GuestError::Os {
        doing: "cannot read the guest's configuration from standard input".to_owned(),
        remedy: "This command is run by others: start a guest with `pageferry guest`",
        source,
    })?;
    let config: GuestConfig = serde_json::from_str(&text).map_err(|e| {
        GuestError::State(format!(
            "the guest's configuration on standard input is wrong: {e}. This command is run by others: start a \
             guest with `pageferry guest`"
        ))
    })?;
    // It fails only where the process leads its group already: started by hand, which is as good.
    let _ = rustix::process::setsid();
    run_logged(&config, Some(config.log()), stop)
}

/// A guest in a process of its own.
#[derive(Debug)]
pub struct GuestHandle {
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub socket: PathBuf,
    /// Its standard error.
    pub log: PathBuf,
    child: Child,
}

impl GuestHandle {
    /// A new connection to it.
    ///
    /// # Errors
    /// It has ended.
    pub fn connect(&self) -> Result<GuestClient, GuestError> {
        GuestClient::connect(&self.socket)
    }
    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// What `waitpid(2)` says.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }
    /// Waits for its end.
    ///
    /// # Errors
    /// What `waitpid(2)` says.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
    /// Ends it at once, whatever it does. For tests and for tidying up.
    ///
    /// # Errors
    /// What `kill(2)` and `waitpid(2)` say.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }
}

/// Starts `command`, which must end up in [`run_spawned`], as the guest of `config`: in a session of its own, its
/// standard error in a file beside its socket. Returns once it answers, booted or incoming. The guest outlives the
/// handle and the caller.
///
/// # Errors
/// It could not be started or ended before it answered: the last lines of its standard error.
pub fn spawn(mut command: Command, config: &GuestConfig) -> Result<GuestHandle, GuestError> {
    config.check()?;
    make_runtime_dir(&config.runtime_dir)?;
    let log = config.log();
    let failed = |source: io::Error| GuestError::Os {
        doing: format!("cannot start the process of guest {}", config.name),
        remedy: "Is its runtime directory writable, and are there processes and memory left?",
        source,
    };
    let text = serde_json::to_vec(config).map_err(|e| failed(e.into()))?;
    let stderr = File::create(&log).map_err(failed)?;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that ended before it read says why itself, below.
        let _ = stdin.write_all(&text);
    }
    let socket = config.socket();
    let mut handle = GuestHandle { pid: child.id(), socket, log, child };
    let begun = Instant::now();
    loop {
        if let Some(status) = handle.try_wait().map_err(failed)? {
            return Err(GuestError::State(format!(
                "guest {} did not start ({status}): {}",
                config.name,
                last_lines(&handle.log)
            )));
        }
        // Its pid tells it from another guest of that name, about which the child itself complains.
        if let Ok(status) = handle.connect().and_then(|client| client.status())
            && status.pid == handle.pid
            && status.phase != Phase::Booting
        {
            return Ok(handle);
        }
        if begun.elapsed() > BOOT_PATIENCE {
            handle.kill().map_err(failed)?;
            return Err(GuestError::State(format!(
                "guest {} has not booted within {} s. Is its disk very slow?",
                config.name,
                BOOT_PATIENCE.as_secs()
            )));
        }
        std::thread::sleep(ASK_EVERY);
    }
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join(" / ");
    if last.is_empty() { "it said nothing".to_owned() } else { last }
}
