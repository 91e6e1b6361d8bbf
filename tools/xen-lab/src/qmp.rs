//! QEMU's monitor (its "QEMU Machine Protocol"): one JSON object a line, on a Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::place;

const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection to the monitor of one QEMU.
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the socket `name` in `directory`.
    pub(crate) fn connect(directory: &Path, name: &str) -> Result<Self> {
        let stream = place::connect(directory, name)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self { lines: BufReader::new(stream) };
        monitor.line().context("QEMU's monitor gives no greeting")?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Executes a command and returns what it returns; events in between are dropped.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.lines.get_mut().write_all(request.as_bytes())?;
        loop {
            let answer = self.line().with_context(|| format!("QEMU does not answer `{command}`"))?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses `{command}`: {error}");
            }
        }
    }

    /// The local TCP port that leads to the guest end of the user network `netdev`.
    pub(crate) fn forwarded_port(&mut self) -> Result<u16> {
        let said = self.execute("human-monitor-command", &json!({ "command-line": "info usernet" }))?;
        let text = said.as_str().unwrap_or_default();
        port_in(text).with_context(|| format!("QEMU names no forwarded port in: {text}"))
    }
}

/// In QEMU's table: protocol and state, descriptor, source address, source port, ...
fn port_in(table: &str) -> Option<u16> {
    let line = table.lines().find(|line| line.contains("HOST_FORWARD"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_the_table() {
        let table = "Hub -1 (line):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                     TCP[HOST_FORWARD]  12       127.0.0.1 38213     10.99.0.15     7     0     0\r\n";
        assert_eq!(port_in(table), Some(38213));
        assert_eq!(port_in("nothing"), None);
    }
}
