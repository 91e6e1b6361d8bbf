//! The lab's side of the channel into dom0: commands in, output and exit code out. `guest/agent.py` is the other side and
//! says how they speak.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Longest content of a frame, on both sides.
const FRAME_MAX: usize = 1 << 20;
/// Most of a command's output that is kept.
const OUTPUT_MAX: usize = 1 << 30;

/// Where an agent is.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) port: u16,
    pub(crate) token: String,
}

/// What a command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; the negated signal if one ended it.
    pub code: i32,
    /// What it wrote to standard output.
    pub out: Vec<u8>,
    /// What it wrote to standard error.
    pub err: Vec<u8>,
}

impl Output {
    /// Both outputs as text, for messages.
    #[must_use]
    pub fn text(&self) -> String {
        let both = [&self.out, &self.err].map(|bytes| String::from_utf8_lossy(bytes).trim_end().to_owned());
        both.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

/// One frame: what it is, and its content.
pub(crate) type Frame = (u8, Vec<u8>);

/// A command under way.
pub(crate) struct Session {
    stream: TcpStream,
}

impl Session {
    /// Writes one frame.
    pub(crate) fn send(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut frame = vec![kind];
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(content);
        self.stream.write_all(&frame)
    }

    /// Reads one frame; a time-out is an error of kind `WouldBlock` or `TimedOut`.
    pub(crate) fn receive(&mut self) -> io::Result<Frame> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
        if length > FRAME_MAX {
            return Err(io::Error::other("the agent speaks nonsense"));
        }
        let mut content = vec![0; length];
        self.stream.read_exact(&mut content)?;
        Ok((kind, content))
    }

    /// A second handle on the same connection, for another thread.
    pub(crate) fn twin(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()? })
    }

    /// Without a limit on how long the next frame may take to come.
    pub(crate) fn patient(self) -> io::Result<Self> {
        self.stream.set_read_timeout(None)?;
        Ok(self)
    }
}

/// Where a command's output goes as it comes: standard output's and standard error's bytes.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(bool, &[u8]);

impl Agent {
    /// Begins a request (`command`, or `terminal` with its type).
    pub(crate) fn begin(&self, mut request: Value, limit: Duration) -> Result<Session> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)
            .with_context(|| format!("nobody listens at {address}; is the lab up?"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        stream.set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let mut session = Session { stream };
        if let Some(object) = request.as_object_mut() {
            object.insert("token".into(), json!(self.token));
        }
        session.send(b'r', request.to_string().as_bytes())?;
        Ok(session)
    }

    /// Runs `command` in a shell with `input`, for no longer than `limit`; what it says goes to `sink` too. When the
    /// limit has passed the command's process group is killed, and the error has what it said until then.
    pub(crate) fn run(&self, command: &str, input: &[u8], limit: Duration, sink: Sink) -> Result<Output> {
        let begun = Instant::now();
        let mut session = self.begin(json!({ "command": command }), limit)?;
        let mut output = Output { code: 0, out: Vec::new(), err: Vec::new() };
        for part in input.chunks(FRAME_MAX / 2) {
            session.send(b'i', part).context("the agent takes no input")?;
        }
        session.send(b'c', &[])?;
        loop {
            let left = limit.saturating_sub(begun.elapsed());
            session.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let (kind, content) = match session.receive() {
                Ok(frame) => frame,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let _ = session.stream.shutdown(Shutdown::Both);
                    bail!(
                        "`{command}` did not end within {} s and was killed; it said:\n{}",
                        limit.as_secs(),
                        output.text()
                    );
                }
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("the agent went away during `{command}`, which said:\n{}", output.text())
                    });
                }
            };
            match kind {
                b'o' | b'e' => {
                    sink(kind == b'e', &content);
                    let kept = if kind == b'o' { &mut output.out } else { &mut output.err };
                    if kept.len() + content.len() > OUTPUT_MAX {
                        bail!("`{command}` says more than {OUTPUT_MAX} bytes");
                    }
                    kept.extend_from_slice(&content);
                }
                b'x' => {
                    let code = content.as_slice().try_into().context("an exit code of another size")?;
                    output.code = i32::from_be_bytes(code);
                    return Ok(output);
                }
                other => bail!("the agent sends a frame of unknown kind {other}"),
            }
        }
    }
}
