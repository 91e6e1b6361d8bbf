//! An interactive shell in a host's dom0: this terminal, raw, at the end of an agent's pseudo-terminal.

use std::io::{self, IsTerminal, Read, Write};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::agent::Session;
use crate::host::Host;

/// The terminal as it was, put back when this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("the terminal's settings can't be read")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw).context("the terminal can't be made raw")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done about it where a terminal has gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Runs the shell until it ends; its exit code.
pub(crate) fn run(host: &Host) -> Result<i32> {
    if !io::stdin().is_terminal() {
        bail!("`shell` needs a terminal; `run {} 'COMMANDS'` does not", host.number());
    }
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let mut session = host.shell(&terminal)?;
    let _raw = Raw::enter()?;
    send_size(&mut session)?;
    let typing = session.twin()?;
    // Ends with the process: nothing else ends a read from the terminal.
    thread::spawn(move || type_along(typing));
    let mut screen = io::stdout();
    loop {
        match session.receive().context("the shell's connection broke")? {
            (b'x', code) => return Ok(i32::from_be_bytes(code.as_slice().try_into().unwrap_or([0; 4]))),
            (_, content) => {
                screen.write_all(&content)?;
                screen.flush()?;
            }
        }
    }
}

/// What is typed, to the shell; the window's size with it, as it may have changed.
fn type_along(mut session: Session) {
    let mut typed = [0; 4096];
    while let Ok(count @ 1..) = io::stdin().read(&mut typed) {
        let sent =
            send_size(&mut session).and_then(|()| Ok(session.send(b'i', typed.get(..count).unwrap_or(&[]))?));
        if sent.is_err() {
            return;
        }
    }
}

fn send_size(session: &mut Session) -> Result<()> {
    let size = tcgetwinsize(io::stdin())?;
    let [rows, columns] = [size.ws_row, size.ws_col].map(u16::to_be_bytes);
    session.send(b'w', &[rows, columns].concat())?;
    Ok(())
}
