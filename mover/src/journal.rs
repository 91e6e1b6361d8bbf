//! The durable record of which end has the guest. Written when the guest changes hands, so that after any crash an
//! operator, or the other end, can tell (invariant 3).
//!
//! One small JSON file a migration and end, `<state directory>/migrations/<id>-<role>.json`, of a fixed size: made and
//! synced before the guest is touched, so that the entry within the downtime is an overwrite in place and one
//! `fdatasync`.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Which end keeps the record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The end the guest comes from.
    Source,
    /// The end it goes to.
    Target,
}

/// How far this end has gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Entry {
    /// The migration is under way; the guest is the source's.
    Open,
    /// Source: the guest has been given up; the commit may be on its way.
    Committed,
    /// Target: the guest was started here.
    Started,
    /// Target: the guest was given up before any commit; it never ran here.
    Discarded,
}

/// Where entries are kept.
pub trait Journal: Send {
    /// Makes `entry` the last word, durably, before it returns.
    fn record(&mut self, entry: Entry) -> Result<(), Error>;
    /// The matter is settled on both ends; forgets the record.
    fn close(&mut self) -> Result<(), Error>;
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The migration's id.
    pub migration: String,
    /// Which end wrote it.
    pub role: Role,
    /// The last word.
    pub entry: Entry,
    /// The guest's name.
    pub guest: String,
    /// The guest's control socket or domain on this host.
    pub handle: String,
    /// The other end's address.
    pub peer: String,
}

/// Bytes of a record's file.
const RECORD_BYTES: usize = 4096;
const REMEDY: &str = "Is the state directory writable, and is there space on its disk?";

/// A record in a file.
pub struct FileJournal {
    path: PathBuf,
    file: File,
    record: Record,
}

impl FileJournal {
    /// Makes the record's file in `directory`, which is made if need be, with the entry [`Entry::Open`].
    pub fn create(directory: &Path, record: Record) -> Result<Self, Error> {
        let role = if record.role == Role::Source { "source" } else { "target" };
        let path = directory.join(format!("{}-{role}.json", record.migration));
        let made = || {
            fs::create_dir_all(directory)?;
            let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
            Ok(file)
        };
        let file = made().map_err(|source| failed("make", &path, source))?;
        let mut journal = Self { path, file, record: Record { entry: Entry::Open, ..record } };
        journal.write()?;
        let synced = journal.file.sync_all().and_then(|()| File::open(directory)?.sync_all());
        synced.map_err(|source| failed("make", &journal.path, source))?;
        Ok(journal)
    }

    /// The record that is in `path` already, to be gone on with.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let record = read(path)?;
        let file =
            OpenOptions::new().write(true).open(path).map_err(|source| failed("open", path, source))?;
        Ok(Self { path: path.to_owned(), file, record })
    }

    fn write(&mut self) -> Result<(), Error> {
        let mut text = serde_json::to_vec(&self.record).map_err(|e| failed("write", &self.path, e.into()))?;
        if text.len() > RECORD_BYTES {
            return Err(failed(
                "write",
                &self.path,
                io::Error::other("a name or address in it is far too long"),
            ));
        }
        text.resize(RECORD_BYTES, b' ');
        let written = self.file.write_all_at(&text, 0).and_then(|()| self.file.sync_data());
        written.map_err(|source| failed("write", &self.path, source))
    }
}

impl Journal for FileJournal {
    fn record(&mut self, entry: Entry) -> Result<(), Error> {
        self.record.entry = entry;
        self.write()
    }
    fn close(&mut self) -> Result<(), Error> {
        fs::remove_file(&self.path).map_err(|source| failed("remove", &self.path, source))
    }
}

/// The record in `path`.
pub fn read(path: &Path) -> Result<Record, Error> {
    let text = fs::read_to_string(path).map_err(|source| failed("read", path, source))?;
    serde_json::from_str(text.trim_end()).map_err(|e| failed("read", path, e.into()))
}

/// The records in `directory`; none where there is no directory.
pub fn list(directory: &Path) -> Result<Vec<(PathBuf, Record)>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed("list", directory, source)),
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry.map_err(|source| failed("list", directory, source))?.path();
        if path.extension().is_some_and(|e| e == "json") {
            records.push((path.clone(), read(&path)?));
        }
    }
    records.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(records)
}

fn failed(doing: &str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        doing: format!("cannot {doing} the migration's record {}", path.display()),
        remedy: REMEDY,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_entry_is_what_a_reader_finds() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("migrations");
        assert_eq!(list(&directory).unwrap(), []);
        let record = Record {
            migration: "ab".repeat(16),
            role: Role::Source,
            entry: Entry::Committed,
            guest: "desk".into(),
            handle: "/run/desk.sock".into(),
            peer: "10.0.0.2:7000".into(),
        };
        let mut journal = FileJournal::create(&directory, record.clone()).unwrap();
        assert_eq!(list(&directory).unwrap()[0].1.entry, Entry::Open);
        journal.record(Entry::Committed).unwrap();
        assert_eq!(list(&directory).unwrap()[0].1, record);
        journal.close().unwrap();
        assert_eq!(list(&directory).unwrap(), []);
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x-source.json"), b"{\"migration\":").unwrap();
        let error = list(dir.path()).unwrap_err().to_string();
        assert!(error.contains("x-source.json"), "{error}");
    }
}
