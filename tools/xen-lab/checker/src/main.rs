//! The program of a test guest: holds memory with content it can derive again, rewrites some and verifies all of it
//! without end, reads the shared disk, watches the clock, and says so once a second on the console:
//!
//! ```text
//! CHECK: 17 ok t=17.204 pages=4096 pass=9 dirtied=1700 verified=38912 reads=17
//! CHECK: BAD memory: page 512 version 3: it is version 2
//! ```
//!
//! `pass` counts how often every page was verified: once it has grown by two, each page was read since. After the first
//! BAD there is never again an ok.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the console is what it talks to")]

mod beat;
mod clock;
mod disk;
mod memory;
mod options;
mod probe;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::beat::Beat;
use crate::clock::Clock;
use crate::disk::{Disk, Files};
use crate::memory::Share;
use crate::options::Options;

/// A thread's turn: it dirties its pages of the turn, verifies for its share of it, sleeps for the rest.
const TURN: Duration = Duration::from_millis(20);
const TURNS_PER_SECOND: u64 = 50;
/// Between two reads of files out of the page cache. On a thread of its own: one that waits for the disk does not touch memory.
const CACHED_EVERY: Duration = Duration::from_millis(100);
/// Pages verified between two looks at the clock.
const BATCH: usize = 8;

/// What the threads tell the one that counts.
struct Board {
    clock: Clock,
    passes: Vec<AtomicU64>,
    dirtied: AtomicU64,
    verified: AtomicU64,
    bad: Mutex<Option<String>>,
    is_bad: AtomicBool,
}

impl Board {
    fn accuse(&self, what: String) {
        println!("CHECK: BAD {what}");
        if let Ok(mut bad) = self.bad.lock() {
            bad.get_or_insert(what);
        }
        self.is_bad.store(true, Ordering::Release);
    }

    /// Passes every thread has finished.
    fn passes(&self) -> u64 {
        self.passes.iter().map(|passes| passes.load(Ordering::Relaxed)).min().unwrap_or(0)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            println!("CHECK: BAD {what}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let line = std::fs::read_to_string("/proc/cmdline").map_err(|error| format!("/proc/cmdline: {error}"))?;
    let processors =
        thread::available_parallelism().map_or(1, |count| u64::try_from(count.get()).unwrap_or(1));
    let options = Options::parse(&line, processors)?;
    let disk = Disk::open(Path::new("/mnt"), options.files_mib)?;
    let pages = (options.memory_mib << 20) / 4096;
    let per_thread = pages / options.threads;
    // With nothing to check nobody wakes up for it.
    let sharers = if per_thread == 0 { 0 } else { options.threads };
    let board = Arc::new(Board {
        clock: Clock::new(),
        passes: (0..sharers).map(|_| AtomicU64::new(0)).collect(),
        dirtied: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        bad: Mutex::new(None),
        is_bad: AtomicBool::new(false),
    });
    for (number, thread) in (0..sharers).zip(0_usize..) {
        let (board, options) = (Arc::clone(&board), options.clone());
        let count = usize::try_from(per_thread).map_err(|_| "more memory than addresses")?;
        let first = number * per_thread;
        thread::spawn(move || {
            let mut share = Share::new(first, count, options.zero_percent);
            if let Err(what) = keep(&mut share, thread, &options, &board) {
                board.accuse(what);
            }
        });
    }
    let (direct, cached) = disk.map(|disk| (disk.direct, disk.cached)).unzip();
    let direct = direct.filter(|_| options.direct);
    if let Some(cached) = cached.filter(|files| !files.is_empty()) {
        let board = Arc::clone(&board);
        thread::spawn(move || {
            if let Err(what) = read_cached(cached) {
                board.accuse(what);
            }
        });
    }
    if options.beat_ms > 0 {
        let (board, beat) = (Arc::clone(&board), Beat::open(Path::new("/dev/xvda"), options.beat_ms)?);
        thread::spawn(move || {
            if let Err(what) = beat.keep() {
                board.accuse(what);
            }
        });
    }
    if options.probe_ms > 0 {
        thread::spawn(move || probe::wake_up(Duration::from_millis(options.probe_ms)));
    }
    count(&board, direct, per_thread * options.threads)
}

/// Reads files out of the page cache, without end.
fn read_cached(mut cached: Files) -> Result<(), String> {
    loop {
        thread::sleep(CACHED_EVERY);
        cached.verify()?;
    }
}

/// A thread's life: dirty, verify, sleep.
fn keep(share: &mut Share, thread: usize, options: &Options, board: &Board) -> Result<(), String> {
    let per_second = options.dirty_per_second / options.threads;
    let verifying = TURN * u32::try_from(options.duty_percent).unwrap_or(100) / 100;
    for turn in 0_u64.. {
        let begun = Instant::now();
        let due = (turn + 1) * per_second / TURNS_PER_SECOND - turn * per_second / TURNS_PER_SECOND;
        board.dirtied.fetch_add(share.dirty(due), Ordering::Relaxed);
        let verified = Instant::now();
        loop {
            let passes = share.verify(BATCH)?;
            board.verified.fetch_add(u64::try_from(BATCH).unwrap_or(0), Ordering::Relaxed);
            if let Some(counter) = board.passes.get(thread) {
                counter.fetch_add(passes, Ordering::Relaxed);
            }
            board.clock.check()?;
            if verified.elapsed() >= verifying {
                break;
            }
        }
        thread::sleep(TURN.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// The count on the console, once a second, for as long as all is well.
fn count(board: &Board, mut disk: Option<Files>, pages: u64) -> Result<(), String> {
    let mut reads = 0;
    for number in 1_u64.. {
        thread::sleep(Duration::from_secs(1));
        if let Some(disk) = &mut disk {
            disk.verify()?;
            reads += 1;
        }
        let time = board.clock.check()?;
        if board.is_bad.load(Ordering::Acquire) {
            let what = board.bad.lock().ok().and_then(|bad| bad.clone()).unwrap_or_default();
            return Err(what);
        }
        println!(
            "CHECK: {number} ok t={:.3} pages={pages} pass={} dirtied={} verified={} reads={reads}",
            time.as_secs_f64(),
            board.passes(),
            board.dirtied.load(Ordering::Relaxed),
            board.verified.load(Ordering::Relaxed),
        );
    }
    Ok(())
}
