//! Migrations that run on this host: each end notes in a file of its own how far it is, and `pageferry status` reads
//! them.
//!
//! The file stands in the runtime directory, which only its user can enter, has no secret in it, and is locked for as long
//! as its process lives: one that can be locked was left behind by a process that was killed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::ExitClass;
use mover::journal::Role;
use mover::process::launch;
use mover::report::{Event, Observer, Phase, Sample};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::metrics::tally::{self, Ended};
use crate::units::show_ms;
use crate::words;

/// Bytes of a note: written whole at a time, blanks behind the text.
const NOTE_BYTES: usize = 2048;
const ENDING: &str = "migration";

/// How far one end of a migration is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    /// The migration's number, as in records and events.
    pub(crate) migration: String,
    /// Which end runs here.
    pub(crate) role: Role,
    /// The guest, as it is called here.
    pub(crate) guest: String,
    /// The other end's address.
    pub(crate) peer: String,
    /// The process of this end.
    pub(crate) pid: u32,
    /// Milliseconds from its begin to the last note.
    pub(crate) at_ms: f64,
    /// The phase it is in.
    pub(crate) phase: Option<Phase>,
    /// The source's last sample: rounds, rates, what is left.
    pub(crate) sample: Option<Sample>,
}

/// An observer that notes what it passes on. Dropping it removes the note.
pub(crate) struct Noted {
    inner: Arc<dyn Observer>,
    note: Mutex<Option<Note>>,
}

struct Note {
    running: Running,
    file: File,
    path: PathBuf,
}

impl Noted {
    /// Nothing is noted before [`Self::begin`].
    pub(crate) fn new(inner: Arc<dyn Observer>) -> Self {
        Self { inner, note: Mutex::new(None) }
    }

    /// Notes this migration from now on. Where that can't be done it is only not seen by `pageferry status`.
    pub(crate) fn begin(&self, running: Running) {
        let role = if running.role == Role::Source { "source" } else { "target" };
        let path = launch::runtime_dir().join(format!("{}-{role}.{ENDING}", running.migration));
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let locked = opened
            .and_then(|file| Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).map(|()| file)?));
        match locked {
            Ok(file) => {
                let note = Note { running, file, path };
                note.write();
                *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
            }
            Err(error) => {
                tracing::warn!("`pageferry status` will not show this: {}: {error}", path.display())
            }
        }
    }
}

/// Adds an end that is over to the tally that `pageferry metrics` shows.
pub(crate) fn ended(ended: &Ended<'_>) {
    tally::add(&launch::runtime_dir(), ended);
}

impl Observer for Noted {
    fn event(&self, event: Event) {
        if let Some(note) = &mut *self.note.lock().unwrap_or_else(PoisonError::into_inner) {
            let running = &mut note.running;
            match &event {
                Event::Phase { at_ms, phase } => (running.at_ms, running.phase) = (*at_ms, Some(*phase)),
                Event::Sample(sample) => (running.at_ms, running.sample) = (sample.at_ms, Some(*sample)),
                Event::Round { at_ms, .. } | Event::Notice { at_ms, .. } => {
                    running.at_ms = at_ms.max(running.at_ms)
                }
            }
            note.write();
        }
        self.inner.event(event);
    }
}

impl Note {
    fn write(&self) {
        let Ok(mut text) = serde_json::to_vec(&self.running) else { return };
        // Longer than that only with a guest's name nobody can read either.
        text.resize(NOTE_BYTES.max(text.len()), b' ');
        if let Err(error) = self.file.write_all_at(&text, 0) {
            tracing::warn!("{} is out of date: {error}", self.path.display());
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // Left behind, it is found unlocked and removed by `pageferry status`.
        let _ = fs::remove_file(&self.path);
    }
}

/// How often it is looked whether all are over.
const GLANCE: Duration = Duration::from_millis(200);

/// What the notes of this host say, whatever session their ends were started in.
pub(crate) fn look_everywhere() -> Notes {
    let mut notes = look(&launch::runtime_dir());
    if launch::notes_dir() != launch::runtime_dir() {
        let more = look(&launch::notes_dir());
        notes.running.extend(more.running);
        notes.left.extend(more.left);
    }
    notes
}

/// What runs here, and the notes left behind, which are removed.
fn all() -> (Vec<Running>, Vec<PathBuf>) {
    let Notes { running, left } = look_everywhere();
    // One may have ended just now, and removed it itself.
    (running, left.into_iter().filter(|path| fs::remove_file(path).is_ok()).collect())
}

/// The guests that run here while pages of them are outstanding.
pub(crate) fn draining() -> Vec<String> {
    let here = |one: &Running| one.role == Role::Target && one.phase == Some(Phase::Drain);
    all().0.into_iter().filter(here).map(|one| one.guest).collect()
}

/// `pageferry status`.
pub(crate) fn run(wait: bool, console: &Console) -> Outcome {
    let (mut running, mut left) = all();
    while wait && !running.is_empty() {
        std::thread::sleep(GLANCE);
        let (now, more) = all();
        running = now;
        left.extend(more);
    }
    for path in left {
        console.note(&format!(
            "{} was left behind by a process that ended without a word; `pageferry resolve` says what became of its \
             guest",
            path.display()
        ));
    }
    if running.is_empty() && !console.json {
        console.note("no migration runs here");
    }
    running.iter().try_for_each(|one| {
        if !console.json {
            return console.print(&line(one));
        }
        let text = serde_json::to_string(one)
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        console.print(&text)
    })
}

fn line(one: &Running) -> String {
    let id = one.migration.get(..8).unwrap_or(&one.migration);
    let way = if one.role == Role::Source { "to" } else { "from" };
    let phase = one.phase.map_or("beginning", words::phase);
    let sample = one.sample.as_ref().map_or(String::new(), |sample| {
        let (above, below) = words::sample(sample, one.phase);
        format!(": {above}, {below}")
    });
    // Under a toolstack the other end is the toolstack's business.
    let peer = match one.peer.as_str() {
        "" if one.role == Role::Source => " to another host".to_owned(),
        "" => " from another host".to_owned(),
        peer => format!(" {way} {peer}"),
    };
    format!("{id}  {}{peer}, {}  {phase}{sample}", one.guest, show_ms(one.at_ms))
}

/// What the notes in a directory say.
#[derive(Default)]
pub(crate) struct Notes {
    /// Those whose process lives.
    pub(crate) running: Vec<Running>,
    /// Those left behind.
    pub(crate) left: Vec<PathBuf>,
}

/// Reads the notes in `directory`.
pub(crate) fn look(directory: &Path) -> Notes {
    let mut notes = Notes::default();
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(|path| path.extension().is_some_and(|ending| ending == ENDING)) {
        let Ok(file) = File::open(&path) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            notes.left.push(path);
            continue;
        }
        // Read while it is written, it may not parse: once more then.
        let note = (0..3).find_map(|_| serde_json::from_str(fs::read_to_string(&path).ok()?.trim_end()).ok());
        notes.running.extend(note);
    }
    notes.running.sort_by(|a, b| (&a.migration, &a.guest).cmp(&(&b.migration, &b.guest)));
    notes
}

#[cfg(test)]
mod tests {
    use mover::wire::hello::MigrationId;
    use xen_glue::helper::Noted;

    use super::*;

    /// What the save helper's worker notes is read here: of a save in the stream, and of one whose pages go by lanes.
    #[test]
    fn a_xen_workers_note_is_one_like_ours() {
        let directory = tempfile::tempdir().expect("a directory");
        let place = directory.path().join("pageferry");
        let mut noted = Noted::begin(&place, MigrationId([1; 16]), Role::Source, "desk").expect("a note");
        let now = || match look(&place) {
            Notes { running, left } if left.is_empty() => running.into_iter().next().expect("one runs"),
            Notes { left, .. } => panic!("taken for one left behind: {left:?}"),
        };
        assert_eq!((now().guest, now().role, now().phase), ("desk".to_owned(), Role::Source, None));
        assert_eq!(now().pid, std::process::id());
        noted.phase(Phase::Rounds);
        noted.pages(1, 300, Some(1000));
        let sample = now().sample.expect("a sample");
        assert_eq!((now().phase, sample.round, sample.pages_left), (Some(Phase::Rounds), 1, 700));
        noted.pages(1, 1000, Some(1000));
        noted.pages(2, 50, Some(50));
        let sample = now().sample.expect("a sample");
        assert_eq!((sample.round, sample.pages.data, sample.link_bytes), (2, 1050, 1050 * 4096));
        assert!(!sample.paused);
        noted.phase(Phase::Stop);
        assert!(now().sample.expect("a sample").paused);
        assert!(line(&now()).contains("desk to another host"), "{}", line(&now()));

        noted.lanes(MigrationId([2; 16]));
        let sample = Sample { round: 3, outstanding: 7, link_rate: 5.0, ..Sample::default() };
        noted.engine(&Event::Sample(sample));
        noted.engine(&Event::Phase { at_ms: 1.0, phase: Phase::Drain });
        noted.pages(9, 9, None);
        let seen = now();
        assert_eq!((seen.phase, seen.sample), (Some(Phase::Drain), Some(sample)));
        assert_eq!(seen.migration, MigrationId([2; 16]).to_string());
        drop(noted);
        assert!(look(&place).running.is_empty() && look(&place).left.is_empty());
    }
}
