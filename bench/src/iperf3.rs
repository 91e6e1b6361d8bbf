//! iperf3, a copy over sockets that others know: from memory of its own to nowhere, over loopback.

#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::owned::Owned;

/// The program.
const PROGRAM: &str = "iperf3";
/// How long its server may take until it listens.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);

/// Why it can't be measured here; none if it can.
#[must_use]
pub fn obstacle() -> Option<String> {
    match Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("{PROGRAM} --version ends with {}", output.status)),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Some("it is not installed (apt-get install iperf3)".to_owned())
        }
        Err(error) => Some(format!("it can't be run: {error}")),
    }
}

/// Gigabytes (10^9 bytes) a second, received, that so many connections carry in `seconds`.
///
/// # Errors
/// When it fails, or says something else than before.
pub fn rate(connections: usize, seconds: u32) -> Result<f64> {
    // Free a moment ago; it takes no port of the kernel's choice itself.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let mut server = Command::new(PROGRAM);
    server.args(["-s", "-1", "-p", &port]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Owned(server.spawn().context("cannot run iperf3")?);
    let begun = Instant::now();
    loop {
        let output = Command::new(PROGRAM)
            .args(["-c", "127.0.0.1", "-p", &port, "-J", "-P", &connections.to_string()])
            .args(["-t", &seconds.to_string()])
            .stdin(Stdio::null())
            .output()
            .context("cannot run iperf3")?;
        let told: Value = serde_json::from_slice(&output.stdout).context("iperf3's JSON is not as it was")?;
        if let Some(bits) = told["end"]["sum_received"]["bits_per_second"].as_f64().filter(|bits| *bits > 0.0)
        {
            return Ok(bits / 8e9);
        }
        if begun.elapsed() > LISTENS_WITHIN {
            bail!("iperf3 failed: {}", told["error"].as_str().unwrap_or("without a word"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
