//! The source's disks as this host has them. libxl attaches them only behind the stream, so they are opened here, by the paths
//! they have on the source.
//!
//! A disk that can't be read is left out: its references are not made. One that can and is another one refuses the migration:
//! the guest would run on it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mover::disk::identity::open_same;
use mover::disk::{Completion, DiskInfo, Disks, Read, Reader, Slot};
use mover::error::{DiskError, Error};
use mover::memory::GuestPage;
use mover::units::DiskId;
use mover::wire::control::DiskName;

/// For each of the source's disks, whether it can be read here, or why not.
type Readable = Vec<Result<(), String>>;

/// Opens those of `named` that can be read; for each whether it can.
pub(super) fn open(named: &[DiskName]) -> Result<(Option<Arc<dyn Disks>>, Readable), Error> {
    let infos: Vec<DiskInfo> = named
        .iter()
        .map(|DiskName { name, path, identity, bytes }| DiskInfo {
            name: name.clone(),
            path: path.clone(),
            bytes: *bytes,
            identity: identity.clone(),
        })
        .collect();
    let mut readable = Vec::with_capacity(infos.len());
    for info in &infos {
        readable.push(match open_same(std::slice::from_ref(info), &BTreeMap::new()) {
            Ok(_) => Ok(()),
            Err(error @ DiskError::Identity { .. }) => return Err(error.into()),
            Err(error) => Err(error.to_string()),
        });
    }
    let (here, numbers): (Vec<DiskInfo>, Vec<u8>) = infos
        .iter()
        .zip(0..)
        .zip(&readable)
        .filter(|(_, readable)| readable.is_ok())
        .map(|((info, number), _): ((&DiskInfo, u8), _)| (info.clone(), number))
        .unzip();
    if here.is_empty() {
        return Ok((None, readable));
    }
    let disks =
        Present { inner: Arc::new(open_same(&here, &BTreeMap::new())?), infos, numbers: numbers.into() };
    Ok((Some(Arc::new(disks)), readable))
}

/// Some of the source's disks under the numbers the source has for them.
struct Present {
    inner: Arc<dyn Disks>,
    infos: Vec<DiskInfo>,
    /// By their place in `inner`.
    numbers: Arc<[u8]>,
}

/// The place of `disk` among those that are open; past them, which is no disk, if it is not.
fn place(numbers: &[u8], disk: DiskId) -> Option<DiskId> {
    let place = numbers.iter().position(|number| *number == disk.0)?;
    u8::try_from(place).ok().map(DiskId)
}

impl Disks for Present {
    fn infos(&self) -> &[DiskInfo] {
        &self.infos
    }
    fn alignment(&self, disk: DiskId) -> usize {
        // Of a disk that is not here nothing is read, whatever a hostile source refers to.
        place(&self.numbers, disk).map_or(mover::units::PAGE_BYTES, |disk| self.inner.alignment(disk))
    }
    fn reader(&self, slots: usize) -> Result<Box<dyn Reader>, DiskError> {
        let inner = self.inner.reader(slots)?;
        Ok(Box::new(PresentReader { inner, numbers: Arc::clone(&self.numbers), refused: Vec::new() }))
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.inner.flush()
    }
    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

struct PresentReader {
    inner: Box<dyn Reader>,
    numbers: Arc<[u8]>,
    /// Reads from disks that are not here.
    refused: Vec<Completion>,
}

impl PresentReader {
    fn here(&mut self, read: Read) -> Option<Read> {
        let found = place(&self.numbers, read.disk);
        if found.is_none() {
            let error = DiskError::Short { disk: read.disk, end: 0, wanted: read.sector.bytes() };
            self.refused.push(Completion { slot: read.slot, result: Err(error) });
        }
        found.map(|disk| Read { disk, ..read })
    }
}

impl Reader for PresentReader {
    fn slots(&self) -> usize {
        self.inner.slots()
    }
    fn read(&mut self, read: Read) -> Result<(), DiskError> {
        match self.here(read) {
            Some(read) => self.inner.read(read),
            None => Ok(()),
        }
    }
    fn read_direct(&mut self, read: Read, pages: &[Option<GuestPage<'_>>]) -> Result<(), DiskError> {
        match self.here(read) {
            Some(read) => self.inner.read_direct(read, pages),
            None => Ok(()),
        }
    }
    fn complete(&mut self, done: &mut Vec<Completion>, wait: Duration) -> Result<(), DiskError> {
        let wait = if self.refused.is_empty() { wait } else { Duration::ZERO };
        done.append(&mut self.refused);
        self.inner.complete(done, wait)
    }
    fn staged(&self, slot: Slot) -> &[u8] {
        self.inner.staged(slot)
    }
    fn path(&self) -> String {
        self.inner.path()
    }
    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mover::disk::image::{DiskSpec, ImageDisks};
    use mover::units::{Sector, u64_of};
    use std::path::Path;

    fn image(path: &Path, seed: u8) {
        let blocks: Vec<u8> = (0..64u8).flat_map(|block| [block.wrapping_mul(3) ^ seed; 4096]).collect();
        std::fs::write(path, blocks).unwrap();
    }

    /// As the source names the disk at `path`.
    fn named(path: &Path) -> DiskName {
        let spec = DiskSpec { name: "xvda".into(), path: path.to_owned(), writable: true };
        let disks = ImageDisks::open_images(&[spec]).unwrap();
        let DiskInfo { name, path, bytes, identity } = disks.infos()[0].clone();
        DiskName { name, path, bytes, identity }
    }

    #[test]
    fn a_disk_that_is_not_here_is_left_out_and_the_others_keep_their_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        image(&path, 1);
        let here = named(&path);
        let gone = DiskName { path: "/nowhere/image".into(), ..here.clone() };
        let (disks, readable) = open(&[gone.clone(), here]).unwrap();
        assert!(readable[0].as_ref().is_err_and(|why| why.contains("/nowhere/image")) && readable[1].is_ok());
        let disks = disks.unwrap();
        let mut reader = disks.reader(2).unwrap();
        let alignment = disks.alignment(DiskId(1)).max(4096);
        let sector = Sector::holding(u64_of(alignment));
        let mut done = Vec::new();
        for (disk, slot) in [(1, 0), (0, 1)] {
            reader.read(Read { disk: DiskId(disk), sector, bytes: alignment, slot: Slot(slot) }).unwrap();
        }
        while done.len() < 2 {
            reader.complete(&mut done, Duration::from_secs(10)).unwrap();
        }
        for completion in done {
            match completion.slot.0 {
                0 => assert_eq!(completion.result.unwrap(), alignment),
                _ => assert!(completion.result.is_err(), "there is no such disk here"),
            }
        }
        let block = u8::try_from(alignment / 4096).unwrap();
        assert_eq!(reader.staged(Slot(0))[0], block.wrapping_mul(3) ^ 1);
        let (none, readable) = open(&[gone]).unwrap();
        assert!(none.is_none() && readable[0].is_err());
    }

    #[test]
    fn another_disk_under_the_same_path_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        image(&path, 1);
        let meant = named(&path);
        image(&path, 0x80);
        let Err(error) = open(&[meant]) else { panic!("the guest would run on another disk") };
        assert!(error.to_string().contains("is not the disk the source means"), "{error}");
    }
}
