//! The shaped link that `pageferry demo --link` and the suites with a link use: whether TCP fills it, and how long
//! what is sent last waits behind what was sent before, by the bytes that the engine's sockets may hold unsent.
//!
//! Two lanes send frames of 1 MiB without a pause. A third connection sends a small message to and fro meanwhile, as
//! the control connection does; at the end of a run both lanes stop and the time until every byte has arrived is what
//! a guest's last round would wait.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mover::error::NetError;
use mover::memory::Mapping;
use mover::net::Connection;
use mover::net::lab::{End, Lab, Shape};
use mover::net::tcp::{Settings, TcpAcceptor, TcpDialer};
use mover::runtime::{Runtime, Threads};
use mover::units::{PAGE_BYTES_U64, Pfn, f64_of, u64_of};

use super::{Context, Suite};
use crate::buffer::incompressible;
use crate::report::{Limit, Row};
use crate::stats::Runs;

/// Pages of a frame.
const FRAME: u64 = 256;
/// Lanes.
const LANES: usize = 2;

/// The suite.
pub(crate) struct Link;

impl Suite for Link {
    fn name(&self) -> &'static str {
        "link"
    }

    fn about(&self) -> &'static str {
        "the shaped link of demo --link: does TCP fill it, and how long do last bytes queue (root)"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (name, bits) in [("1 Gbit/s", 1_000_000_000), ("10 Gbit/s", 10_000_000_000)] {
            let lab = Lab::new(Shape::of(bits))?;
            for unsent in [64 << 10, 128 << 10, 256 << 10, 1 << 20, 1 << 30] {
                let case = if unsent == 1 << 30 {
                    format!("{name}, any number unsent")
                } else {
                    format!("{name}, {} KiB unsent", unsent >> 10)
                };
                rows.extend(measure(context, &lab, &case, unsent)?);
            }
        }
        Ok(rows)
    }
}

/// The figures of one setting.
fn measure(context: &Context, lab: &Lab, case: &str, unsent: u32) -> Result<Vec<Row>> {
    let (mut filled, mut control, mut tail, mut cpu) =
        (Runs::default(), Runs::default(), Runs::default(), Runs::default());
    let duration = Duration::from_millis(if context.quick { 300 } else { 1_000 });
    for _ in 0..context.runs {
        let once = saturate(lab, unsent, duration)?;
        // 1448 of 1514 bytes on the wire are TCP's payload (Ethernet, IP, TCP with time stamps).
        let wire = once.bytes_per_second * 8.0 * 1514.0 / 1448.0;
        filled.push(wire / f64_of(lab.shape().bits_per_second));
        control.push(once.round_trip_ms);
        tail.push(once.tail_ms);
        cpu.push(once.cpu_seconds_per_gigabyte);
    }
    Ok(vec![
        Row::new(case, "wire rate / shape", "", filled.figure()).limited(Limit::AtMost(1.01)),
        Row::new(case, "round trip beside it, median", "ms", control.figure()),
        Row::new(case, "until the last byte is there", "ms", tail.figure()),
        Row::new(case, "CPU, both ends", "s/GB", cpu.figure()),
    ])
}

/// What one run of lanes at full speed came to.
struct Once {
    bytes_per_second: f64,
    round_trip_ms: f64,
    tail_ms: f64,
    cpu_seconds_per_gigabyte: f64,
}

/// Connections from the source's end of the link to the target's.
fn connect(lab: &Lab, unsent: u32, count: usize) -> Result<Vec<(Connection, Connection)>> {
    let settings = Settings { unsent, ..Settings::default() };
    let address = format!("{}:0", End::Target.address());
    let listening = || TcpAcceptor::listen(&address, settings.clone());
    let mut acceptor: TcpAcceptor = lab.inside(End::Target, listening)??;
    let dialer = TcpDialer::new(&acceptor.local().to_string(), settings.clone());
    let second = Duration::from_secs(1);
    let mut made = Vec::new();
    for _ in 0..count {
        let near = lab.inside(End::Source, || dialer.dial(second))??;
        made.push((near, acceptor.accept(second)?.context("the dialled connection did not arrive")?));
    }
    Ok(made)
}

fn saturate(lab: &Lab, unsent: u32, duration: Duration) -> Result<Once> {
    let runtime = Threads::new();
    let buffer = incompressible(usize::try_from(FRAME * PAGE_BYTES_U64)? * (LANES + 1), 1)?;
    let mut connections = connect(lab, unsent, LANES + 1)?;
    let control = connections.pop().context("there is a control connection")?;
    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    let cpu = runtime.cpu_time();
    let began = Instant::now();
    thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for (place, (mut near, mut far)) in connections.into_iter().enumerate() {
            let (stop, arrived, buffer) = (&stop, &arrived, &buffer);
            senders.push(scope.spawn(move || {
                let pages = pages(buffer, place);
                while !stop.load(Ordering::Relaxed) {
                    near.sender.send(&[1; 8], &pages)?;
                }
                near.sender.send(&[0; 8], &[])?;
                Ok::<_, NetError>((Instant::now(), near))
            }));
            receivers.push(scope.spawn(move || {
                let pages = pages(buffer, LANES);
                loop {
                    let mut head = [0; 8];
                    far.receiver.recv(&mut head)?;
                    if head == [0; 8] {
                        return Ok::<_, NetError>(Instant::now());
                    }
                    far.receiver.recv_pages(&pages)?;
                    arrived.fetch_add(FRAME * PAGE_BYTES_U64, Ordering::Relaxed);
                }
            }));
        }
        let round_trips = echo(scope, control, duration)?;
        stop.store(true, Ordering::Relaxed);
        let mut last_sent = began;
        let mut kept = Vec::new();
        for sender in senders {
            let (at, near) = sender.join().map_err(|_| anyhow::anyhow!("a lane panicked"))??;
            last_sent = last_sent.max(at);
            kept.push(near);
        }
        let mut last_there = began;
        for receiver in receivers {
            last_there = last_there.max(receiver.join().map_err(|_| anyhow::anyhow!("a lane panicked"))??);
        }
        let bytes = f64_of(arrived.load(Ordering::Relaxed));
        let used = runtime.cpu_time().saturating_sub(cpu).as_secs_f64();
        Ok(Once {
            bytes_per_second: bytes / last_there.duration_since(began).as_secs_f64(),
            round_trip_ms: round_trips.figure().median,
            tail_ms: last_there.saturating_duration_since(last_sent).as_secs_f64() * 1e3,
            cpu_seconds_per_gigabyte: used / (bytes / 1e9),
        })
    })
}

/// The pages of one frame.
fn pages(buffer: &Mapping, place: usize) -> Vec<mover::memory::GuestPage<'_>> {
    let first = u64_of(place) * FRAME;
    (first..first + FRAME).map(|pfn| buffer.page(Pfn(pfn))).collect()
}

/// Sends a small message to and fro every 5 ms for `duration`; returns the round trips in milliseconds.
fn echo<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    (mut near, mut far): (Connection, Connection),
    duration: Duration,
) -> Result<Runs> {
    scope.spawn(move || {
        let mut message = [0; 64];
        // Ends when the other side hangs up.
        while far.receiver.recv(&mut message).and_then(|()| far.sender.send(&message, &[])).is_ok() {}
    });
    let began = Instant::now();
    let mut round_trips = Runs::default();
    while began.elapsed() < duration {
        let sent = Instant::now();
        near.sender.send(&[7; 64], &[])?;
        near.receiver.recv(&mut [0; 64])?;
        round_trips.push(sent.elapsed().as_secs_f64() * 1e3);
        thread::sleep(Duration::from_millis(5));
    }
    near.hang_up.hang_up();
    Ok(round_trips)
}
