//! The metrics on a local socket, to whoever asks by HTTP: one asks at a time, with a limit to what and how long.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::signals;

/// How long one who asks may take, his question and our answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long his question may be.
const QUESTION_BYTES: usize = 4096;
const REMEDY: &str = "Name a socket in a directory of your own with --socket";

/// Answers until it is ended.
pub(super) fn run(path: &Path, console: &Console) -> Outcome {
    let listener = bind(path)?;
    let file = path.to_owned();
    signals::call_on_end(move || {
        remove(&file);
        std::process::exit(0);
    })?;
    console.note(&format!("answering on {}", path.display()));
    loop {
        match listener.accept() {
            // Whoever asks and goes away has no answer; the next one may.
            Ok((stream, _)) => {
                if let Err(error) = answer(stream) {
                    tracing::debug!("a scrape: {error}");
                }
            }
            Err(error) => {
                tracing::warn!("cannot take a connection on {}: {error}", path.display());
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// The socket, in place of one that nobody answers on any more. Its owner and group may connect.
fn bind(path: &Path) -> Outcome<UnixListener> {
    let doing = || format!("cannot listen on {}", path.display());
    let stale = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if stale {
        if UnixStream::connect(path).is_ok() {
            return Err(Failure::usage(format!("somebody answers on {} already. {REMEDY}", path.display())));
        }
        remove(path);
    }
    let listener = UnixListener::bind(path).or_fail(doing, REMEDY)?;
    let mode = fs::Permissions::from_mode(0o660);
    fs::set_permissions(path, mode).or_fail(doing, REMEDY)?;
    Ok(listener)
}

fn remove(path: &Path) {
    // Not there any more is as good.
    let _ = fs::remove_file(path);
}

fn answer(mut stream: UnixStream) -> io::Result<()> {
    let question = question(&mut stream)?;
    let mut words = question.split_ascii_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics" | "/") => {
            ("200 OK", "text/plain; version=0.0.4; charset=utf-8", super::text())
        }
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "the metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "text/plain", "GET is all there is\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes())?;
    }
    Ok(())
}

/// The head of a request, as far as its blank line.
fn question(stream: &mut UnixStream) -> io::Result<String> {
    let begun = Instant::now();
    let mut head = Vec::new();
    let mut piece = [0; 512];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") && !head.windows(2).any(|two| two == b"\n\n") {
        let left = PATIENCE.saturating_sub(begun.elapsed());
        if left.is_zero() || head.len() > QUESTION_BYTES {
            return Err(io::Error::other("the question is too long, or comes too slowly"));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => break,
            bytes => head.extend_from_slice(&piece[..bytes]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
