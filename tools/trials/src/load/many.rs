//! Several guests migrate at once, each to and fro between the same two ends, over one narrow cable. Memory and descriptors stay
//! what they are, none has to wait for ever, and each gets its share of the cable.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mover::net::lab::End;
use mover::units::{f64_of, u64_of};

use super::{Waiting, across};
use crate::world::{ENDS, World};

const MODES: [&str; 3] = ["plain", "refer", "lazy"];
/// How often processes are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// By how much the last fifth may be above the first: descriptors and memory come and go with what happens to run.
const FLAT: f64 = 1.25;
/// What the guest that got least must have got of the mean.
const FAIR: f64 = 0.5;

/// How much.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Guests
    #[arg(long, default_value_t = 8)]
    guests: usize,
    /// For so long
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Megabits a second on the cable, each way
    #[arg(long, default_value_t = 200)]
    megabits: u64,
}

/// What became of one guest.
#[derive(Default)]
struct Told {
    migrations: u64,
    bytes: u64,
    longest_s: f64,
}

/// What all processes together hold at one moment.
#[derive(Clone, Copy, Default)]
struct Held {
    engines_kib: u64,
    guests_kib: u64,
    descriptors: u64,
    processes: u64,
}

type Count = fn(&Held) -> u64;

/// Does it.
pub(crate) fn run(program: &Path, arguments: &Arguments) -> Result<()> {
    let world = World::new(program, arguments.megabits * 1_000_000)?;
    let names: Vec<_> = (0..arguments.guests).map(|n| format!("guest{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        let image = world.path(&format!("{name}.img"));
        fs::copy(world.path("image"), &image)?;
        let image = image.display().to_string();
        let home = ENDS[n % 2];
        for end in ENDS {
            world.must(end, &["index", "build", "--quiet", &image])?;
        }
        world.must(home, &["guest", "start", name, "--memory", "32M", "--disk", &image, "--quiet"])?;
    }
    let lasting = Duration::from_secs_f64(arguments.minutes * 60.0);
    let (begun, over) = (Instant::now(), AtomicBool::new(false));
    let (told, held) = thread::scope(|scope| {
        let looking = scope.spawn(|| look(&world, &over));
        let guests: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(n, name)| {
                let world = &world;
                scope.spawn(move || travel(world, name, n, begun + lasting))
            })
            .collect();
        let told: Vec<_> =
            guests.into_iter().map(|guest| guest.join().unwrap_or_else(|_| bail!("a thread fell"))).collect();
        over.store(true, SeqCst);
        (told, looking.join().unwrap_or_else(|_| bail!("the look-out fell")))
    });
    let told = told.into_iter().collect::<Result<Vec<_>>>()?;
    shares(&names, &told)?;
    flat(&held?)?;
    for name in &names {
        let end = ENDS.into_iter().find(|end| world.status_of(*end, name).is_some()).context("it runs")?;
        world.must(end, &["guest", "check", name])?;
        world.must(end, &["guest", "stop", name, "--quiet"])?;
    }
    let left = world.left(Duration::from_secs(5))?;
    ensure!(left.is_empty(), "left: {}", left.join(", "));
    println!("every page of every guest is right, nothing is left");
    Ok(())
}

/// One guest, to and fro until `end`.
fn travel(world: &World, name: &str, number: usize, end: Instant) -> Result<Told> {
    let mut told = Told::default();
    let mut from = ENDS[number % 2];
    while Instant::now() < end {
        let begun = Instant::now();
        let mode = MODES[(number + usize::try_from(told.migrations)?) % MODES.len()];
        told.bytes += once(world, name, from, mode).with_context(|| format!("{name}, {mode}"))?;
        told.migrations += 1;
        told.longest_s = told.longest_s.max(begun.elapsed().as_secs_f64());
        from = across(from);
    }
    Ok(told)
}

/// One migration; the bytes it took.
fn once(world: &World, name: &str, from: End, mode: &str) -> Result<u64> {
    let summary = Waiting::start(world, across(from))?.moved(world, name, from, mode)?;
    summary["link_bytes"].as_u64().context("a summary has link_bytes")
}

/// What all processes hold, again and again.
fn look(world: &World, over: &AtomicBool) -> Result<Vec<Held>> {
    let mut seen = Vec::new();
    while !over.load(SeqCst) {
        let mut held = Held::default();
        for (number, words) in world.processes()? {
            let status = fs::read_to_string(format!("/proc/{number}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
            if words.contains("guest run") {
                held.guests_kib += kib;
            } else {
                held.engines_kib += kib;
            }
            held.descriptors += u64_of(fs::read_dir(format!("/proc/{number}/fd")).map_or(0, Iterator::count));
            held.processes += 1;
        }
        seen.push(held);
        thread::sleep(LOOK_EVERY);
    }
    Ok(seen)
}

fn shares(names: &[String], told: &[Told]) -> Result<()> {
    let mean = f64_of(told.iter().map(|one| one.bytes).sum()) / f64_of(u64_of(told.len()));
    println!("{:<8} {:>10} {:>8} {:>9} {:>10}", "guest", "migrations", "MiB", "of mean", "longest s");
    for (name, one) in names.iter().zip(told) {
        println!(
            "{name:<8} {:>10} {:>8.0} {:>8.0}% {:>10.1}",
            one.migrations,
            f64_of(one.bytes) / 1_048_576.0,
            f64_of(one.bytes) / mean * 100.0,
            one.longest_s
        );
        ensure!(f64_of(one.bytes) >= FAIR * mean, "{name} got less than half of its share");
    }
    Ok(())
}

fn flat(held: &[Held]) -> Result<()> {
    let fifth = held.len() / 5;
    ensure!(fifth > 0, "too short to say anything");
    // Means, since a moment holds what happens to run in it.
    let mean =
        |part: &[Held], of: fn(&Held) -> u64| f64_of(part.iter().map(of).sum()) / f64_of(u64_of(part.len()));
    let kinds: [(&str, Count); 4] = [
        ("engines' memory, KiB", |held| held.engines_kib),
        ("guests' own memory, KiB", |held| held.guests_kib),
        ("descriptors", |held| held.descriptors),
        ("processes", |held| held.processes),
    ];
    println!("{:<24} {:>8} {:>8} {:>8} {:>8} {:>8}", "mean of each fifth", "1", "2", "3", "4", "5");
    for (name, of) in kinds {
        let means: Vec<_> = held.chunks(fifth).take(5).map(|part| mean(part, of)).collect();
        let shown: String = means.iter().map(|mean| format!(" {mean:>8.0}")).collect();
        println!("{name:<24}{shown}");
        ensure!(means[4] <= means[0] * FLAT, "{name} grew from {:.0} to {:.0}", means[0], means[4]);
    }
    Ok(())
}
