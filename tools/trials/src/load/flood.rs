//! A migration beside a flood of strangers, held against the same one without: connections without a token from many
//! addresses, and one peer that says a byte a second. Pairs are interleaved, so that what disturbs the machine disturbs
//! both; the ratio of each pair is what counts.
//!
//! The strangers come from the source's end of the cable, so that they take their part of it, and from this
//! machine's processors: what a real one would make elsewhere is paid for here.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::stats::{Runs, in_turns};
use clap::Args;
use mover::net::lab::End;
use mover::units::{f64_of, u64_of};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, bind, connect, getpeername, send, socket_with, sockopt,
};
use serde_json::Value;

use super::Waiting;
use crate::world::World;

/// Threads that make strangers, each with addresses of its own.
const HANDS: u8 = 4;
/// Addresses of a hand: one has at most 24 places at the entrance.
const ADDRESSES: u8 = 16;
/// Connections of a hand that are there at once; the oldest goes when one comes.
const HELD: usize = 64;
/// Between two looks at how many are due.
const STEP: Duration = Duration::from_millis(2);
/// Between two bytes of the slow peer.
const SLOW: Duration = Duration::from_secs(1);

/// How much.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Pairs of migrations, one with and one without strangers
    #[arg(long, default_value_t = 15)]
    pairs: usize,
    /// Strangers in each migration, if it lasts as long as one without does
    #[arg(long, default_value_t = 100_000)]
    strangers: u64,
    /// The guest's memory
    #[arg(long, default_value = "1G")]
    memory: String,
    /// Its disk, half of it files, which fill half of its memory
    #[arg(long, default_value = "2G")]
    disk: String,
    /// Megabits a second on the cable, each way
    #[arg(long, default_value_t = 1000)]
    megabits: u64,
    /// How pages travel
    #[arg(long, default_value = "plain")]
    mode: String,
}

/// One migration's figures.
struct Trip {
    total_ms: f64,
    downtime_ms: f64,
    /// Connections of strangers that stood, while it ran.
    met: u64,
}

/// Does it.
pub(crate) fn run(program: &Path, arguments: &Arguments) -> Result<()> {
    let world = World::new(program, arguments.megabits * 1_000_000)?;
    world.more_addresses((0..HANDS).flat_map(|hand| (0..ADDRESSES).map(move |n| address(hand, n))))?;
    // Not the world's, which is small; nothing is referenced in mode plain.
    let disk = world.path("flood.img").display().to_string();
    world.must(End::Source, &["image", "--size", &arguments.disk, "--quiet", &disk])?;
    let start = ["guest", "start", "desk", "--memory", &arguments.memory, "--disk", &disk, "--quiet"];
    world.must(End::Source, &start)?;
    // How long it takes, so that the strangers can be spread over it; and everything is warm.
    let alone = trip(&world, arguments, 0.0)?;
    let rate = f64_of(arguments.strangers) / (alone.total_ms / 1e3);
    println!("one alone takes {:.2} s; {rate:.0} strangers a second with the others", alone.total_ms / 1e3);
    println!(
        "{:>4} {:>10} {:>12} {:>8} {:>22} {:>10}",
        "pair", "alone s", "beside s", "ratio", "downtimes ms", "strangers"
    );
    let pairs = in_turns::<_, _, anyhow::Error>(
        arguments.pairs,
        |_| trip(&world, arguments, 0.0),
        |_| trip(&world, arguments, rate),
    )?;
    let (mut ratios, mut downtimes, mut fewest) = (Runs::default(), Runs::default(), u64::MAX);
    for (number, (alone, beside)) in (1..).zip(&pairs) {
        let ratio = beside.total_ms / alone.total_ms;
        ratios.push(ratio);
        downtimes.push(beside.downtime_ms - alone.downtime_ms);
        fewest = fewest.min(beside.met);
        println!(
            "{number:>4} {:>10.2} {:>12.2} {ratio:>8.3} {:>10.1} {:>11.1} {:>10}",
            alone.total_ms / 1e3,
            beside.total_ms / 1e3,
            alone.downtime_ms,
            beside.downtime_ms,
            beside.met
        );
    }
    world.must(End::Source, &["guest", "check", "desk"])?;
    world.must(End::Source, &["guest", "stop", "desk", "--quiet"])?;
    let left = world.left(Duration::from_secs(5))?;
    ensure!(left.is_empty(), "left: {}", left.join(", "));
    let (ratio, more) = (ratios.figure(), downtimes.figure());
    println!(
        "time beside strangers to time alone: {:.3} (19 of 20: {:.3} to {:.3}, {} pairs); downtime longer by {:.1} ms ({:.1} \
         to {:.1}); at least {fewest} strangers had a connection in each",
        ratio.median, ratio.low, ratio.high, ratio.runs, more.median, more.low, more.high
    );
    Ok(())
}

/// One migration there, beside so many strangers a second, and one back alone, which is not counted.
fn trip(world: &World, arguments: &Arguments, rate: f64) -> Result<Trip> {
    let waiting = Waiting::start(world, End::Target)?;
    let to: SocketAddr = waiting.address.parse().context("an address in figures")?;
    let (over, met) = (AtomicBool::new(false), AtomicU64::new(0));
    let summary = thread::scope(|scope| {
        let mut hands = Vec::new();
        if rate > 0.0 {
            for hand in 0..HANDS {
                let (over, met) = (&over, &met);
                let work = move || strangers(hand, to, rate / f64::from(HANDS), over, met);
                hands.push(scope.spawn(move || world.inside(End::Source, work)?));
            }
            let over = &over;
            hands.push(scope.spawn(move || world.inside(End::Source, move || slow(to, over))));
        }
        let summary = waiting.moved(world, "desk", End::Source, &arguments.mode);
        over.store(true, SeqCst);
        for hand in hands {
            hand.join().unwrap_or_else(|_| bail!("a thread fell"))?;
        }
        summary
    })?;
    Waiting::start(world, End::Source)?.moved(world, "desk", End::Target, "plain")?;
    let figure =
        |key: &str| summary.get(key).and_then(Value::as_f64).with_context(|| format!("{key} in the summary"));
    Ok(Trip { total_ms: figure("total_ms")?, downtime_ms: figure("downtime_ms")?, met: met.load(SeqCst) })
}

fn address(hand: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, hand + 1, number + 1)
}

/// Comes again and again, from its addresses in turn, so often a second, until it is over.
fn strangers(hand: u8, to: SocketAddr, rate: f64, over: &AtomicBool, met: &AtomicU64) -> Result<()> {
    let begun = Instant::now();
    let mut held = VecDeque::with_capacity(HELD + 1);
    let mut made = 0_u64;
    while !over.load(SeqCst) {
        while f64_of(made) < rate * begun.elapsed().as_secs_f64() && !over.load(SeqCst) {
            let number = u8::try_from(made % u64::from(ADDRESSES))?;
            held.push_back(knock(to, address(hand, number)).context("a stranger's socket")?);
            made += 1;
            if held.len() > HELD
                && let Some(oldest) = held.pop_front()
            {
                met.fetch_add(leave(&oldest, made), SeqCst);
            }
        }
        thread::sleep(STEP);
    }
    met.fetch_add(held.iter().map(|one| leave(one, made)).sum(), SeqCst);
    Ok(())
}

/// Begins a connection, and leaves no trace on this side when it ends.
fn knock(to: SocketAddr, from: Ipv4Addr) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    bind(&socket, &SocketAddrV4::new(from, 0))?;
    // In progress, or turned away already.
    let _ = connect(&socket, &to);
    Ok(socket)
}

/// Says something that is no token, or nothing; how many connections stood: 1 or 0.
fn leave(socket: &OwnedFd, number: u64) -> u64 {
    let stood = getpeername(socket).is_ok();
    let said: &[u8] = if number.is_multiple_of(2) { &[0; 64] } else { b"PGFK" };
    let _ = send(socket, said, SendFlags::NOSIGNAL);
    u64_of(usize::from(stood))
}

/// Says a byte a second of what a knock begins with, and comes again when it is turned away.
fn slow(to: SocketAddr, over: &AtomicBool) {
    while !over.load(SeqCst) {
        let Ok(mut stream) = TcpStream::connect_timeout(&to, SLOW) else { continue };
        for byte in b"PGFKnock" {
            if over.load(SeqCst) || stream.write_all(&[*byte]).is_err() {
                break;
            }
            let said = Instant::now();
            while said.elapsed() < SLOW && !over.load(SeqCst) {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
