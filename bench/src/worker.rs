//! The two ends of a copy of a buffer, by plain socket calls or by the engine, each a process of its own. The harness starts them
//! once, so that their buffers are made once, and gives them a run at a time as a JSON line on standard input; each
//! answers with a line.
//!
//! ```text
//!   harness --> receiver  Run { connections, chunk, port: 0 }     receiver listens
//!   receiver --> harness  Listening { port }
//!   harness --> sender    Run { connections, chunk, port }        sender connects, sends, waits for a byte on each
//!   both --> harness      Done { seconds, cpu_seconds, digest }
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mover::kernel::bare::{receive_range, send_range};
use mover::memory::Mapping;
use mover::net::Connection;
use mover::net::pass::Fingerprint;
use mover::net::tcp::{Settings, TcpAcceptor, TcpDialer};
use mover::runtime::{Runtime, Threads};
use mover::units::{PAGE_BYTES, Pfn, u64_of, usize_of};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::buffer::{Pages, digest, incompressible_on, part};
use crate::idle::{self, Plan};
use crate::program;
use crate::writer::Writes;

/// Which end a worker is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Which {
    /// Sends its buffer.
    Sender,
    /// Receives into its buffer.
    Receiver,
}

/// What copies a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum By {
    /// Plain calls, `chunk` bytes each.
    Calls,
    /// The engine's TCP layer, chunk by chunk straight from pages.
    Tcp {
        /// Bytes before the pages of each chunk, 8 at least.
        head: usize,
        /// Bytes that its sockets may hold unsent.
        unsent: u32,
    },
    /// The whole engine: the buffer is the memory of a guest, migrated in mode `plain`.
    Engine {
        /// Whether over TLS; if not, in the clear.
        encrypted: bool,
        /// What the guest writes meanwhile; none: it does nothing.
        writes: Option<Writes>,
    },
}

/// One copy of the buffer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Connections; each carries an equal part.
    pub connections: usize,
    /// Bytes a call.
    pub chunk: usize,
    /// Whether the receiver waits for whole chunks (`MSG_WAITALL`).
    pub wait_all: bool,
    /// What copies.
    pub by: By,
    /// Whether the n-th thread of either end runs on the n-th core only, as the engine's lanes do. On one machine that
    /// puts both ends of a connection on one core, which is often the fastest.
    pub pinned: bool,
    /// Where the receiver listens; 0 for the receiver itself.
    pub port: u16,
    /// The fingerprint of the receiver's key, where the run is encrypted.
    pub pin: Option<[u8; 32]>,
    /// Whether the buffers' digests are to be told.
    pub check: bool,
}

/// Where the receiver listens.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Listening {
    port: u16,
    pin: Option<[u8; 32]>,
}

/// What one end says of a copy.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Done {
    /// From the first call to the last byte's receipt.
    pub seconds: f64,
    /// CPU time of the process over that.
    pub cpu_seconds: f64,
    /// Of the buffer, if asked for.
    pub digest: Option<u64>,
}

/// A worker's process: reads runs from standard input until it ends.
///
/// # Errors
/// When a socket fails.
pub fn serve(which: Which, bytes: usize, pages: Pages) -> Result<()> {
    let seed = match which {
        Which::Sender => 1,
        Which::Receiver => 2,
    };
    let buffer = Arc::new(incompressible_on(bytes, seed, pages)?);
    let mut output = io::stdout().lock();
    say(&mut output, &Listening { port: 0, pin: None })?;
    for line in io::stdin().lock().lines() {
        let run: Run = serde_json::from_str(&line?)?;
        let mut done = match which {
            Which::Sender => match run.by {
                By::Calls => send(&buffer, run)?,
                By::Tcp { head, unsent } => send_pages(&buffer, run, (head, unsent))?,
                By::Engine { writes, .. } => {
                    let pin = run.pin.map(Fingerprint);
                    let plan = Plan { pin, writes, ..Plan::plain(run.connections) };
                    timed(|| idle::send(&buffer, run.port, plan))?
                }
            },
            Which::Receiver if run.by == By::Calls => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                say(&mut output, &Listening { port: listener.local_addr()?.port(), pin: None })?;
                receive(&buffer, run, &listener)?
            }
            Which::Receiver => match run.by {
                By::Tcp { head, .. } => {
                    let mut acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default())?;
                    say(&mut output, &Listening { port: acceptor.local().port(), pin: None })?;
                    receive_pages(&buffer, run, head, &mut acceptor)?
                }
                by => {
                    let entrance = idle::entrance(matches!(by, By::Engine { encrypted: true, .. }))?;
                    let pin = entrance.fingerprint().map(|print| print.0);
                    say(&mut output, &Listening { port: entrance.local().port(), pin })?;
                    timed(|| idle::receive(&buffer, entrance, None))?
                }
            },
        };
        done.digest = run.check.then(|| digest(&buffer));
        say(&mut output, &done)?;
    }
    Ok(())
}

fn say(output: &mut impl Write, what: &impl Serialize) -> Result<()> {
    writeln!(output, "{}", serde_json::to_string(what)?)?;
    output.flush()?;
    Ok(())
}

fn send(buffer: &Mapping, run: Run) -> Result<Done> {
    let streams = (0..run.connections).map(|_| {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, run.port))?;
        stream.set_nodelay(true)?;
        io::Result::Ok(stream)
    });
    transfer(buffer, run, streams.collect::<io::Result<_>>()?, |stream, range| {
        for start in range.clone().step_by(run.chunk) {
            let end = (start + run.chunk).min(range.end);
            let mut done = start;
            while done < end {
                done += send_range(stream.as_fd(), buffer, done..end)?;
            }
        }
        stream.read_exact(&mut [0])
    })
}

fn receive(buffer: &Mapping, run: Run, listener: &TcpListener) -> Result<Done> {
    let streams = (0..run.connections).map(|_| Ok(listener.accept()?.0));
    transfer(buffer, run, streams.collect::<io::Result<_>>()?, |stream, range| {
        let mut done = range.start;
        while done < range.end {
            let end = (done + run.chunk).min(range.end);
            match receive_range(stream.as_fd(), buffer, done..end, run.wait_all)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                bytes => done += bytes,
            }
        }
        stream.write_all(&[1])
    })
}

/// As [`send`], through the engine's connections.
fn send_pages(buffer: &Mapping, run: Run, (head, unsent): (usize, u32)) -> Result<Done> {
    let settings = Settings { unsent, ..Settings::default() };
    let dialer = TcpDialer::new(&format!("127.0.0.1:{}", run.port), settings);
    let connections = (0..run.connections).map(|_| dialer.dial(Duration::from_secs(5)));
    transfer(buffer, run, connections.collect::<Result<_, _>>()?, |connection: &mut Connection, range| {
        let mut pages = Vec::with_capacity(run.chunk / PAGE_BYTES);
        let mut head = vec![0; head];
        for start in range.clone().step_by(run.chunk) {
            let end = (start + run.chunk).min(range.end);
            pages.clear();
            pages.extend((start..end).step_by(PAGE_BYTES).map(|at| buffer.page(Pfn::at(at / PAGE_BYTES))));
            head[..8].copy_from_slice(&u64_of(start).to_le_bytes());
            connection.sender.send(&head, &pages).map_err(io::Error::other)?;
        }
        connection.receiver.recv(&mut [0]).map_err(io::Error::other)
    })
}

/// As [`receive`], through the engine's connections.
fn receive_pages(buffer: &Mapping, run: Run, head: usize, acceptor: &mut TcpAcceptor) -> Result<Done> {
    let mut connections = Vec::new();
    while connections.len() < run.connections {
        let accepted = acceptor.accept(Duration::from_secs(5))?;
        connections.push(accepted.context("the sender did not connect")?);
    }
    transfer(buffer, run, connections, |connection: &mut Connection, range| {
        let mut pages = Vec::with_capacity(run.chunk / PAGE_BYTES);
        let mut head = vec![0; head];
        let mut done = 0;
        while done < range.len() {
            connection.receiver.recv(&mut head).map_err(io::Error::other)?;
            let (start, _) =
                head.split_first_chunk().context("a head of 8 bytes at least").map_err(io::Error::other)?;
            let start = usize_of(u64::from_le_bytes(*start));
            let end = (start + run.chunk).min(start + range.len() - done);
            pages.clear();
            pages.extend((start..end).step_by(PAGE_BYTES).map(|at| buffer.page(Pfn::at(at / PAGE_BYTES))));
            connection.receiver.recv_pages(&pages).map_err(io::Error::other)?;
            done += end - start;
        }
        connection.sender.send(&[1], &[]).map_err(io::Error::other)
    })
}

/// Runs `work` on a thread for each stream and its part of the buffer.
fn transfer<S: Send>(
    buffer: &Mapping,
    run: Run,
    streams: Vec<S>,
    work: impl Fn(&mut S, Range<usize>) -> io::Result<()> + Sync,
) -> Result<Done> {
    let count = streams.len();
    timed(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = streams
                .into_iter()
                .enumerate()
                .map(|(place, mut stream)| {
                    let work = &work;
                    let range = part(buffer.bytes(), count, place);
                    scope.spawn(move || {
                        if run.pinned {
                            pin(place)?;
                        }
                        work(&mut stream, range)
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result.map_err(anyhow::Error::from),
                Err(_) => bail!("a thread of the copy panicked"),
            })
        })
    })
}

/// Keeps the calling thread on the `place`-th of the cores it may use, modulo their number.
fn pin(place: usize) -> io::Result<()> {
    let all = sched_getaffinity(None)?;
    let usable: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| all.is_set(*core)).collect();
    let mut one = CpuSet::new();
    one.set(usable[place % usable.len()]);
    Ok(sched_setaffinity(None, &one)?)
}

/// Runs `work` and takes its time.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Done> {
    let runtime = Threads::new();
    let (began, cpu) = (Instant::now(), runtime.cpu_time());
    work()?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu_seconds = runtime.cpu_time().saturating_sub(cpu).as_secs_f64();
    Ok(Done { seconds, cpu_seconds, digest: None })
}

/// A worker seen from the harness.
pub struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts one with a buffer of `bytes` and waits until that is made.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(which: Which, bytes: usize, pages: Pages) -> Result<Self> {
        let name = match which {
            Which::Sender => "sender",
            Which::Receiver => "receiver",
        };
        let mut child = program::itself()?
            .args(["worker", name, &bytes.to_string(), pages.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a worker")?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a worker has no standard output")?;
        let mut worker = Self { child, input, output: BufReader::new(output) };
        worker.hear::<Listening>()?;
        Ok(worker)
    }

    fn tell(&mut self, run: &Run) -> Result<()> {
        let input = self.input.as_mut().context("a worker has no standard input")?;
        say(input, run)
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("a worker ended; its reason is above");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It ends at the end of its input; waiting keeps no zombie.
        drop(self.input.take());
        if let Err(error) = self.child.wait() {
            eprintln!("bench: a worker could not be waited for: {error}");
        }
    }
}

/// One copy from `sender` to `receiver`; returns what each says. The sender's seconds are the copy's: they end when
/// the receiver has confirmed every part.
///
/// # Errors
/// When a worker ends, or the bytes that were to be compared differ.
pub fn copy(sender: &mut Worker, receiver: &mut Worker, run: Run) -> Result<(Done, Done)> {
    receiver.tell(&run)?;
    let Listening { port, pin } = receiver.hear()?;
    sender.tell(&Run { port, pin, ..run })?;
    let done: (Done, Done) = (sender.hear()?, receiver.hear()?);
    if done.0.digest != done.1.digest {
        bail!("the receiver has other bytes than the sender");
    }
    Ok(done)
}
