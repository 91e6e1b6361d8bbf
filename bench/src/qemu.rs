//! QEMU as a peer: a machine that has been given its memory and never started, so that no emulated processor takes part,
//! migrated from one process to another over loopback. Driven over QMP (QEMU's `docs/interop/qmp-spec`, and
//! `qapi/migration.json` for the commands).
//!
//! Its memory is a file in tmpfs that the harness fills before and compares after.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";
/// Longest that anything of it may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How QEMU moves memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// One connection, rounds.
    PreCopy,
    /// So many connections, rounds.
    MultiFd(u32),
    /// The same with `MSG_ZEROCOPY`.
    ZeroCopy(u32),
    /// Switched to post-copy as soon as it has begun.
    PostCopy,
    /// The same with a second connection for pages that are waited for.
    PostCopyPreempt,
}

impl Way {
    /// All that are compared.
    pub const ALL: [Self; 6] = [
        Self::PreCopy,
        Self::MultiFd(2),
        Self::MultiFd(4),
        Self::ZeroCopy(2),
        Self::PostCopy,
        Self::PostCopyPreempt,
    ];

    /// In a table.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::PreCopy => "QEMU pre-copy".to_owned(),
            Self::MultiFd(channels) => format!("QEMU multifd × {channels}"),
            Self::ZeroCopy(channels) => format!("QEMU multifd × {channels} zero-copy"),
            Self::PostCopy => "QEMU post-copy".to_owned(),
            Self::PostCopyPreempt => "QEMU post-copy preempt".to_owned(),
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::PreCopy => &[],
            Self::MultiFd(_) => &["multifd"],
            Self::ZeroCopy(_) => &["multifd", "zero-copy-send"],
            Self::PostCopy => &["postcopy-ram"],
            Self::PostCopyPreempt => &["postcopy-ram", "postcopy-preempt"],
        }
    }

    /// Whether the receiving end has to be told of a capability; sending without copies is the sender's own affair.
    fn at_target(capability: &str) -> bool {
        capability != "zero-copy-send"
    }
}

/// QEMU's version line, if it is installed.
#[must_use]
pub fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next()?.trim_start_matches("QEMU emulator version ").to_owned())
}

/// What a migration came to.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// From the command until both ends say that they are done.
    pub seconds: f64,
    /// CPU time of both processes over that.
    pub cpu_seconds: f64,
}

/// Migrates the memory in `source` into `target`, both files of `bytes`, once.
///
/// # Errors
/// When QEMU refuses, with its own words, or does not end.
pub fn migrate(way: Way, source: &Path, target: &Path, bytes: usize, sockets: &Path) -> Result<Moved> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let uri = format!("tcp:127.0.0.1:{port}");
    let mut from = Machine::start(source, bytes, &sockets.join("source.qmp"), false)?;
    let mut to = Machine::start(target, bytes, &sockets.join("target.qmp"), true)?;
    for capability in way.capabilities() {
        from.capability(capability)?;
        if Way::at_target(capability) {
            to.capability(capability)?;
        }
    }
    // As fast as it goes: the default is 128 MiB/s.
    let mut parameters = json!({ "max-bandwidth": 100_u64 << 30, "downtime-limit": 300 });
    if let Way::MultiFd(channels) | Way::ZeroCopy(channels) = way {
        parameters["multifd-channels"] = channels.into();
        to.command("migrate-set-parameters", &json!({ "multifd-channels": channels }))?;
    }
    from.command("migrate-set-parameters", &parameters)?;
    to.command("migrate-incoming", &json!({ "uri": uri }))?;
    let (began, cpu) = (Instant::now(), from.cpu()? + to.cpu()?);
    from.command("migrate", &json!({ "uri": uri }))?;
    if matches!(way, Way::PostCopy | Way::PostCopyPreempt) {
        from.command("migrate-start-postcopy", &json!({}))?;
    }
    // The source is done when it has written the last byte; the target when it has read it.
    from.wait_completed(began)?;
    to.wait_completed(began)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Moved { seconds, cpu_seconds: from.cpu()? + to.cpu()? - cpu })
}

/// A QEMU process that was told to start nothing.
struct Machine {
    child: Child,
    socket: PathBuf,
    output: UnixStream,
    input: BufReader<UnixStream>,
}

impl Machine {
    fn start(memory: &Path, bytes: usize, socket: &Path, incoming: bool) -> Result<Self> {
        let mut command = Command::new(PROGRAM);
        command
            .args([
                "-S",
                "-nodefaults",
                "-display",
                "none",
                "-accel",
                "tcg",
                "-machine",
                "pc,memory-backend=m",
            ])
            .args(["-m", &format!("{}M", bytes >> 20), "-object"])
            .arg(format!(
                "memory-backend-file,id=m,size={bytes},share=on,prealloc=on,mem-path={}",
                memory.display()
            ))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
        let mut child = child.with_context(|| format!("cannot start {PROGRAM}"))?;
        let output = match connect(socket, &mut child) {
            Ok(output) => output,
            Err(error) => {
                // It may have ended by itself, which is the error already.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        output.set_read_timeout(Some(PATIENCE))?;
        let input = BufReader::new(output.try_clone()?);
        let mut machine = Self { child, socket: socket.to_owned(), output, input };
        machine.hear()?;
        machine.command("qmp_capabilities", &json!({}))?;
        Ok(machine)
    }

    /// The next message.
    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.input.read_line(&mut line).context("QEMU does not answer")?;
        if line.is_empty() {
            bail!("QEMU has hung up; its reason is above");
        }
        serde_json::from_str(&line).context("QEMU's answer is no JSON")
    }

    /// Has a command executed; returns its answer. Events in between are passed over.
    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": name, "arguments": arguments });
        writeln!(self.output, "{line}").with_context(|| format!("QEMU takes no {name}"))?;
        loop {
            let mut answer = self.hear()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {name}: {}", error["desc"].as_str().unwrap_or("without a word"));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    fn capability(&mut self, name: &str) -> Result<()> {
        let list = json!({ "capabilities": [{ "capability": name, "state": true }] });
        self.command("migrate-set-capabilities", &list).map(drop)
    }

    /// Waits until the migration has ended well.
    fn wait_completed(&mut self, began: Instant) -> Result<()> {
        while began.elapsed() < PATIENCE {
            let info = self.command("query-migrate", &json!({}))?;
            match info["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = info["error-desc"].as_str().unwrap_or("without a word");
                    bail!("QEMU's migration failed: {why}");
                }
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        bail!("QEMU's migration did not end in {} s", PATIENCE.as_secs())
    }

    /// CPU time so far, of user and system (fields 14 and 15 of `/proc/PID/stat`, proc(5)), in seconds.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let (_, after_name) = stat.rsplit_once(") ").context("/proc/PID/stat is not as it was")?;
        let ticks = after_name.split(' ').skip(11).take(2).map(str::parse::<u32>);
        let ticks: u32 = ticks.sum::<Result<_, _>>().context("/proc/PID/stat holds no number")?;
        let a_second = rustix::param::clock_ticks_per_second();
        Ok(f64::from(ticks) / mover::units::f64_of(a_second))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its memory is the harness's file: nothing is lost with it.
        let killed = self.child.kill().and_then(|()| self.child.wait().map(drop));
        if let Err(error) = killed {
            eprintln!("bench: QEMU could not be ended: {error}");
        }
        // QEMU removes its socket only if it ends by itself.
        let _ = fs::remove_file(&self.socket);
    }
}

/// Connects as soon as QEMU listens.
fn connect(socket: &Path, child: &mut Child) -> Result<UnixStream> {
    let began = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if began.elapsed() > PATIENCE => {
                return Err(error).context("QEMU does not open its QMP socket");
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("QEMU ended with {status}; its reason is above");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_its_name() {
        let mut names: Vec<_> = Way::ALL.into_iter().map(Way::name).collect();
        names.dedup();
        assert_eq!(names.len(), Way::ALL.len());
    }
}
