//! Running other programs on this machine: with a limit, their exit status looked at, their output kept.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, bail};

/// How a command reads in a message.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
    if line.chars().count() > 200 { line.chars().take(200).chain("...".chars()).collect() } else { line }
}

/// Runs it with its output appended to `log`; an error, with the log's end, unless it succeeds within `limit`.
pub(crate) fn logged(command: &mut Command, log: &Path, limit: Duration) -> Result<()> {
    let file = File::options().create(true).append(true).open(log);
    let file = file.with_context(|| format!("cannot write the log {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let name = shown(command);
    let status = wait(command, limit)?;
    if !status.success() {
        bail!("`{name}` ended with {status}; {} ends with:\n{}", log.display(), tail(log, 12));
    }
    Ok(())
}

/// Runs it and returns its standard output; an error, with its error output, unless it succeeds within `limit`.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let name = shown(command);
    let mut out = tempfile::tempfile()?;
    let mut err = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(err.try_clone()?);
    let status = wait(command, limit)?;
    if !status.success() {
        bail!("`{name}` ended with {status}: {}", whole(&mut err)?.trim());
    }
    whole(&mut out)
}

fn whole(file: &mut File) -> Result<String> {
    io::Seek::rewind(file)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(file, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for it to end; past `limit` it is ended, which is an error.
fn wait(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let name = shown(command);
    let begun = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start `{name}`"))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begun.elapsed() > limit {
            // Terminated, not killed, so that it takes what it started along; killed only where it won't go.
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
            thread::sleep(Duration::from_secs(3));
            child.kill()?;
            child.wait()?;
            bail!("`{name}` did not end within {} s and was ended", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The last `lines` lines of a file, for messages.
pub(crate) fn tail(file: &Path, lines: usize) -> String {
    let text = std::fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.iter().skip(from).map(|line| format!("  | {}\n", line.trim_end())).collect()
}
