//! What is said where: results on standard output, everything else on standard error, nothing twice.

use std::io::{self, IsTerminal, Write};

use mover::ExitClass;
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

use crate::cli::Shared;
use crate::failure::{Failure, Outcome};

/// How this process talks.
#[derive(Clone, Copy)]
pub(crate) struct Console {
    /// Results as JSON.
    pub(crate) json: bool,
    /// No notes.
    pub(crate) quiet: bool,
    /// Pass on what other processes of ours log.
    pub(crate) loud: bool,
}

impl Console {
    /// As the flags say.
    pub(crate) fn new(shared: &Shared) -> Self {
        Self { json: shared.json, quiet: shared.quiet, loud: shared.verbose > 0 }
    }

    /// Prints a result, with a line break behind it. A reader that has gone away (`| head`) ends the command without
    /// a word.
    pub(crate) fn print(&self, text: &str) -> Outcome {
        let text = text.trim_end();
        // There may be a token in it. A line in one piece goes past the buffer of standard output, which nobody overwrites.
        let mut line = Zeroizing::new(String::with_capacity(text.len() + 1));
        line.push_str(text);
        line.push('\n');
        let mut out = io::stdout().lock();
        let written = out.write_all(line.as_bytes()).and_then(|()| out.flush());
        written.map_err(|error| {
            let message = match error.kind() {
                io::ErrorKind::BrokenPipe => String::new(),
                _ => format!("cannot write to standard output: {error}"),
            };
            Failure::new(ExitClass::Machine, message)
        })
    }

    /// Says something by the way.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }

    /// Says what went wrong.
    pub(crate) fn complain(&self, text: &str) {
        say(&format!("pageferry: {text}"));
    }

    /// Whether progress can be drawn: standard error is a terminal, and nobody asked for silence.
    pub(crate) fn draws(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }
}

/// A line on standard error. Nobody is left to tell if that fails.
fn say(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Sends the log of the engine to standard error: warnings, with `-v` what it does, with `-vv` everything.
/// `PAGEFERRY_LOG` takes the filters of `tracing-subscriber` instead.
pub(crate) fn log_to_stderr(verbose: u8) {
    let level = ["warn", "info", "debug"].get(usize::from(verbose)).unwrap_or(&"trace");
    let filter = EnvFilter::try_from_env("PAGEFERRY_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(verbose > 1)
        .init();
}
