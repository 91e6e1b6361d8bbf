//! What has ended on this host since it was booted: a small file in the runtime directory that each end of a migration
//! adds itself to as its last act, under a lock.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mover::ExitClass;
use mover::journal::Role;
use mover::report::Summary;
use mover::units::f64_of;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::exposition::{Kind, Text};

const FILE: &str = "ended.tally";
/// Each class of exit, as a label.
const RESULTS: [(ExitClass, &str); 10] = [
    (ExitClass::Internal, "internal"),
    (ExitClass::Usage, "usage"),
    (ExitClass::Machine, "machine"),
    (ExitClass::Network, "network"),
    (ExitClass::Peer, "peer"),
    (ExitClass::Disk, "disk"),
    (ExitClass::Guest, "guest"),
    (ExitClass::Cancelled, "cancelled"),
    (ExitClass::InDoubt, "in_doubt"),
    (ExitClass::Mismatch, "mismatch"),
];
const SUCCESS: &str = "success";

/// The sums.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Tally {
    source: BTreeMap<String, u64>,
    target: BTreeMap<String, u64>,
    /// Of successful migrations, as their sources account for them.
    pages: [u64; 4],
    link_bytes: u64,
    disk_bytes: u64,
    faults: u64,
    check_failures: u64,
    downtime_ms: f64,
    total_ms: f64,
}

/// How an end came out.
pub(crate) enum Ended<'a> {
    /// A source's migration succeeded.
    Moved(&'a Summary),
    /// A target has its guest.
    Received,
    /// It failed at this end.
    Failed(Role, ExitClass),
}

impl Tally {
    fn add(&mut self, ended: &Ended<'_>) {
        let (role, result) = match ended {
            Ended::Moved(_) => (Role::Source, SUCCESS),
            Ended::Received => (Role::Target, SUCCESS),
            Ended::Failed(role, class) => {
                let name = RESULTS.iter().find(|(known, _)| known == class);
                (*role, name.map_or("internal", |(_, name)| *name))
            }
        };
        let counts = if role == Role::Source { &mut self.source } else { &mut self.target };
        *counts.entry(result.to_owned()).or_default() += 1;
        if let Ended::Moved(summary) = ended {
            let fates =
                [summary.pages_zero, summary.pages_data, summary.pages_by_reference, summary.pages_refetched];
            self.pages.iter_mut().zip(fates).for_each(|(sum, more)| *sum += more);
            self.link_bytes += summary.link_bytes;
            self.disk_bytes += summary.disk_bytes;
            self.faults += summary.faults_served;
            self.check_failures += summary.check_failures;
            self.downtime_ms += summary.downtime_ms;
            self.total_ms += summary.total_ms;
        }
    }

    /// Its families.
    pub(super) fn show(&self, out: &mut Text) {
        out.family(
            "pageferry_migrations_ended_total",
            Kind::Counter,
            "Ends of migrations that have ended here since the host was booted, by result: success, or the class of \
             their exit code.",
        );
        for (role, counts) in [("source", &self.source), ("target", &self.target)] {
            for result in RESULTS.iter().map(|(_, name)| *name).chain([SUCCESS]) {
                let count = counts.get(result).copied().unwrap_or(0);
                out.sample(&[("role", role), ("result", result)], f64_of(count));
            }
        }
        out.family(
            "pageferry_moved_pages_total",
            Kind::Counter,
            "Pages sent by migrations that succeeded from here, by what became of them.",
        );
        for (fate, count) in fates(self.pages) {
            out.sample(&[("fate", fate)], f64_of(count));
        }
        let sums: [(&str, &str, f64); 6] = [
            ("moved_link_bytes_total", "Bytes these sent over the link.", f64_of(self.link_bytes)),
            ("moved_disk_bytes_total", "Bytes their targets read from disks.", f64_of(self.disk_bytes)),
            (
                "moved_faults_served_total",
                "Faults on outstanding pages their targets answered.",
                f64_of(self.faults),
            ),
            (
                "moved_reference_failures_total",
                "References of these that did not hold.",
                f64_of(self.check_failures),
            ),
            ("moved_downtime_seconds_total", "Downtime of these, added up.", self.downtime_ms / 1e3),
            ("moved_duration_seconds_total", "Time these took, added up.", self.total_ms / 1e3),
        ];
        for (name, help, value) in sums {
            out.family(&format!("pageferry_{name}"), Kind::Counter, help);
            out.sample(&[], value);
        }
    }
}

/// Counts of pages with their labels.
pub(super) fn fates(counts: [u64; 4]) -> [(&'static str, u64); 4] {
    let [zero, data, reference, refetch] = counts;
    [("zero", zero), ("data", data), ("reference", reference), ("refetch", refetch)]
}

/// Adds one that has ended. Where that can't be done the tally has one less, and it is said.
pub(crate) fn add(directory: &Path, ended: &Ended<'_>) {
    if let Err(error) = try_add(&directory.join(FILE), ended) {
        tracing::warn!(
            "`pageferry metrics` will not count this: {}: {error}",
            directory.join(FILE).display()
        );
    }
}

fn try_add(path: &Path, ended: &Ended<'_>) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    let mut tally = parse(&mut file);
    tally.add(ended);
    let text = serde_json::to_vec(&tally).map_err(io::Error::from)?;
    file.rewind()?;
    file.write_all(&text)?;
    file.set_len(mover::units::u64_of(text.len()))
}

/// As it stands.
pub(super) fn read(directory: &Path) -> Tally {
    let Ok(mut file) = File::open(directory.join(FILE)) else { return Tally::default() };
    if flock(&file, FlockOperation::LockShared).is_err() {
        return Tally::default();
    }
    parse(&mut file)
}

/// One that is damaged, by a host that was switched off while it was written, begins anew: counters may.
fn parse(file: &mut File) -> Tally {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) => serde_json::from_str(&text).unwrap_or_default(),
        Err(_) => Tally::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_is_added_up_and_a_damaged_tally_begins_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let summary = Summary { pages_zero: 3, link_bytes: 10, downtime_ms: 1500.0, ..Summary::default() };
        for _ in 0..2 {
            add(directory.path(), &Ended::Moved(&summary));
        }
        add(directory.path(), &Ended::Received);
        add(directory.path(), &Ended::Failed(Role::Source, ExitClass::InDoubt));
        let mut text = Text::default();
        read(directory.path()).show(&mut text);
        let text = text.into_string();
        for line in [
            "pageferry_migrations_ended_total{role=\"source\",result=\"success\"} 2",
            "pageferry_migrations_ended_total{role=\"source\",result=\"in_doubt\"} 1",
            "pageferry_migrations_ended_total{role=\"target\",result=\"success\"} 1",
            "pageferry_migrations_ended_total{role=\"target\",result=\"disk\"} 0",
            "pageferry_moved_pages_total{fate=\"zero\"} 6",
            "pageferry_moved_link_bytes_total 20",
            "pageferry_moved_downtime_seconds_total 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        std::fs::write(directory.path().join(FILE), "{\"source\":").expect("it is written");
        assert_eq!(read(directory.path()), Tally::default());
        add(directory.path(), &Ended::Received);
        assert_ne!(read(directory.path()), Tally::default());
    }

    #[test]
    fn every_class_has_a_label() {
        for class in ExitClass::ALL {
            assert!(RESULTS.iter().any(|(known, _)| *known == class), "{class:?}");
        }
    }
}
