//! One host of a running lab: commands in its dom0, files to and from it.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::agent::{Agent, Output, Session, Sink};
use crate::wait;

/// Seconds a command may take unless told otherwise.
const COMMAND_SECONDS: u32 = 120;

/// The host.
#[derive(Debug, Clone)]
pub struct Host {
    number: usize,
    agent: Agent,
}

/// A command that runs in dom0 meanwhile.
#[derive(Debug)]
pub struct Running {
    command: String,
    thread: JoinHandle<Result<Output>>,
}

impl Running {
    /// Waits for it to end (the limit was given when it was started).
    pub fn wait(self) -> Result<Output> {
        self.thread.join().map_err(|_| anyhow!("the thread that waited for `{}` died", self.command))?
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Host {
    pub(crate) fn new(number: usize, agent: Agent) -> Self {
        Self { number, agent }
    }

    /// 1 or 2.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// Its address on the wire.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// Runs a shell command line in dom0; its standard output, or an error with all it said unless it ends with 0 within
    /// two minutes.
    pub fn run(&self, command: &str) -> Result<String> {
        self.run_within(command, wait::limit(COMMAND_SECONDS))
    }

    /// As [`run`](Self::run) with another limit.
    pub fn run_within(&self, command: &str, limit: Duration) -> Result<String> {
        let output = self.attempt(command, limit)?;
        if output.code != 0 {
            bail!("host {}: `{command}` ended with {}:\n{}", self.number, output.code, output.text());
        }
        Ok(String::from_utf8_lossy(&output.out).into_owned())
    }

    /// Runs a shell command line in dom0, whatever its exit code.
    pub fn attempt(&self, command: &str, limit: Duration) -> Result<Output> {
        self.watch(command, &[], limit, &mut |_, _| {})
    }

    /// As [`attempt`](Self::attempt), with input, and with the outputs (the flag: standard error) as they come.
    pub fn watch(&self, command: &str, input: &[u8], limit: Duration, sink: Sink) -> Result<Output> {
        self.agent.run(command, input, limit, sink).with_context(|| format!("host {}", self.number))
    }

    /// Starts a shell command line in dom0 and goes on.
    #[must_use]
    pub fn start(&self, command: &str, limit: Duration) -> Running {
        let (host, line) = (self.clone(), command.to_owned());
        Running { command: command.to_owned(), thread: thread::spawn(move || host.attempt(&line, limit)) }
    }

    /// Writes a file in dom0, whole or not at all; with permission to run it.
    pub fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        let command = format!("cat > '{path}.new' && chmod 755 '{path}.new' && mv '{path}.new' '{path}'");
        let output = self.watch(&command, content, wait::limit(COMMAND_SECONDS), &mut |_, _| {})?;
        if output.code != 0 {
            bail!("host {}: {path} can't be written: {}", self.number, output.text());
        }
        Ok(())
    }

    /// Reads a file in dom0.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.attempt(&format!("cat '{path}'"), wait::limit(COMMAND_SECONDS))?;
        if output.code != 0 {
            bail!("host {}: {path} can't be read: {}", self.number, output.text());
        }
        Ok(output.out)
    }

    /// Begins a shell with a terminal of type `terminal`.
    pub(crate) fn shell(&self, terminal: &str) -> Result<Session> {
        let request = serde_json::json!({ "terminal": terminal });
        let session = self.agent.begin(request, wait::limit(20))?;
        session.patient().context("the shell's connection can't be set up")
    }
}
