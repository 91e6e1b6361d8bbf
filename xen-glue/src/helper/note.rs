//! What a worker notes where `pageferry status` and `pageferry metrics` look: which migration it is an end of, how far that
//! is. The file has the form of `pageferry send`'s and `receive`'s, and is locked for as long as the worker lives.
//!
//! Where pages go by lanes, the engine's own samples are noted. In libxl's stream there is no engine: what is noted then is made
//! of what the phases tell, and counts page contents alone as bytes.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mover::journal::Role;
use mover::report::{Event, Phase, Sample};
use mover::units::{PAGE_BYTES_U64, f64_of};
use mover::wire::hello::MigrationId;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

/// Bytes of a note: written whole at a time, blanks behind the text.
const NOTE_BYTES: usize = 2048;
/// Between two samples made of what the phases tell.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// A note as `pageferry status` reads it.
#[derive(Debug, Serialize)]
struct Running {
    migration: String,
    role: Role,
    guest: String,
    peer: String,
    pid: u32,
    at_ms: f64,
    phase: Option<Phase>,
    sample: Option<Sample>,
}

/// A note, its file removed when this is dropped.
#[derive(Debug)]
pub struct Noted {
    running: Running,
    file: File,
    path: PathBuf,
    began: Instant,
    /// When the last sample was made here.
    sampled: Instant,
    /// Pages of rounds that are over.
    before: u64,
    round: u32,
    /// Pages of this round.
    sent: u64,
    /// The engine tells how it goes.
    engine: bool,
}

impl Noted {
    /// Begins one in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// It can't be written there.
    pub fn begin(directory: &Path, migration: MigrationId, role: Role, guest: &str) -> io::Result<Self> {
        if !directory.is_dir() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let end = match role {
            Role::Source => "source",
            Role::Target => "target",
        };
        let path = directory.join(format!("{migration}-{end}.migration"));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let running = Running {
            migration: migration.to_string(),
            role,
            guest: guest.to_owned(),
            peer: String::new(),
            pid: std::process::id(),
            at_ms: 0.0,
            phase: None,
            sample: None,
        };
        let now = Instant::now();
        let this = Self {
            running,
            file,
            path,
            began: now,
            sampled: now,
            before: 0,
            round: 0,
            sent: 0,
            engine: false,
        };
        this.write();
        Ok(this)
    }

    /// Pages go by the lanes of this migration from now on; what it is called on the other host too.
    pub fn lanes(&mut self, migration: MigrationId) {
        self.running.migration = migration.to_string();
        self.engine = true;
        self.write();
    }

    /// What the engine tells.
    pub fn engine(&mut self, event: &Event) {
        self.now();
        match event {
            // The domain is not the engine's to finish: "done" is when the worker ends.
            Event::Phase { phase: Phase::Done, .. } | Event::Round { .. } | Event::Notice { .. } => return,
            Event::Phase { phase, .. } => self.running.phase = Some(*phase),
            Event::Sample(sample) => self.running.sample = Some(*sample),
        }
        self.write();
    }

    /// A phase of the stream begins.
    pub fn phase(&mut self, phase: Phase) {
        self.now();
        self.running.phase = Some(phase);
        if let Some(sample) = &mut self.running.sample {
            sample.paused = matches!(phase, Phase::Stop | Phase::Verify | Phase::Commit);
        }
        self.write();
    }

    /// `sent` of `total` pages of `round` have gone in the stream, or have come; the total is not known to a target.
    pub fn pages(&mut self, round: u32, sent: u64, total: Option<u64>) {
        if self.engine {
            return;
        }
        if round != self.round {
            (self.before, self.round, self.sent) = (self.before + self.sent, round, 0);
        }
        self.sent = sent;
        let passed = self.sampled.elapsed();
        if passed < SAMPLE_EVERY && total != Some(sent) && self.running.sample.is_some() {
            return;
        }
        self.now();
        let bytes = (self.before + sent) * PAGE_BYTES_U64;
        let last = self.running.sample.unwrap_or_default();
        let mut sample = Sample {
            at_ms: self.running.at_ms,
            round,
            pages_left: total.map_or(0, |total| total.saturating_sub(sent)),
            link_bytes: bytes,
            link_rate: f64_of(bytes.saturating_sub(last.link_bytes)) / passed.as_secs_f64().max(1e-6),
            paused: last.paused,
            ..Sample::default()
        };
        sample.pages.data = self.before + sent;
        self.sampled = Instant::now();
        self.running.sample = Some(sample);
        self.write();
    }

    fn now(&mut self) {
        self.running.at_ms = self.began.elapsed().as_secs_f64() * 1e3;
    }

    fn write(&self) {
        let Ok(mut text) = serde_json::to_vec(&self.running) else { return };
        text.resize(NOTE_BYTES.max(text.len()), b' ');
        // Out of date, it still says that this process is at work.
        let _ = self.file.write_all_at(&text, 0);
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        // Left behind, it is found unlocked and removed by `pageferry status`.
        let _ = std::fs::remove_file(&self.path);
    }
}
