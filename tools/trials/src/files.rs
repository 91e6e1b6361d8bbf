//! The files that a trial's processes work on ([`bench::fuse`] serves them): a guest's disk that fails on demand, and the
//! two files that the ends of a migration write their events to. A process that writes an event waits for the write to be
//! answered; so it can be held just there, and a fault strikes exactly the phase it is meant for.
//!
//! ```text
//!   DIR/disk     the image, read and written; see [`Weather`] for what can be wrong with it
//!   DIR/source   events of `pageferry send`       DIR/target   events of `pageferry receive`
//! ```

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Result, bail};
use bench::fuse::{self, EIO};
use mover::units::u64_of;

use crate::ear::Ear;
use crate::weather::{Verdict, Weather};

const DISK: u64 = 2;
const SOURCE: u64 = 3;
const TARGET: u64 = 4;

/// What its files are.
pub(crate) struct Files {
    /// The image behind `disk`.
    pub(crate) image: File,
    /// What is wrong with it.
    pub(crate) weather: Arc<Weather>,
    /// Who listens to `source`.
    pub(crate) source: Arc<Ear>,
    /// Who listens to `target`.
    pub(crate) target: Arc<Ear>,
}

impl fuse::Files for Files {
    fn node(&self, name: &[u8]) -> Option<u64> {
        match name {
            b"disk" => Some(DISK),
            b"source" => Some(SOURCE),
            b"target" => Some(TARGET),
            _ => None,
        }
    }

    fn bytes(&self, node: u64) -> Option<u64> {
        match node {
            DISK => self.image.metadata().ok().map(|found| found.len()),
            SOURCE | TARGET => Some(0),
            _ => None,
        }
    }

    fn read(&self, node: u64, asker: u32, place: u64, bytes: usize) -> Result<Vec<u8>, i32> {
        if node != DISK {
            return Ok(Vec::new());
        }
        let mut data = vec![0; bytes];
        let verdict = self.weather.on_read(asker);
        let mut there = 0;
        while there < data.len() {
            match self.image.read_at(&mut data[there..], place + u64_of(there)) {
                Ok(0) => break,
                Ok(more) => there += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(EIO),
            }
        }
        data.truncate(there);
        match verdict {
            Verdict::Good => {}
            Verdict::Error => return Err(EIO),
            Verdict::Garbled => data.iter_mut().skip(there / 2).for_each(|byte| *byte ^= 0xa5),
            Verdict::Short => data.truncate(there / 2 / 512 * 512),
        }
        Ok(data)
    }

    fn write(&self, node: u64, place: u64, data: &[u8]) -> Result<(), i32> {
        match node {
            DISK if self.weather.on_write() => return self.image.write_all_at(data, place).map_err(|_| EIO),
            SOURCE => self.source.hear(data, &self.weather),
            TARGET => self.target.hear(data, &self.weather),
            _ => return Err(EIO),
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), i32> {
        self.image.sync_data().map_err(|_| EIO)
    }
}

/// The thread group that a thread belongs to: requests name threads.
pub(crate) fn process_of(thread: u32) -> Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    match status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok()) {
        Some(process) => Ok(process),
        None => bail!("/proc/{thread}/status has no Tgid"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::path::Path;
    use std::thread;

    use bench::fuse::Fuse;

    use super::*;
    use crate::weather::Trouble;

    fn mounted(directory: &Path) -> Result<(Fuse, Arc<Weather>, Arc<Ear>)> {
        let path = directory.join("image");
        std::fs::write(&path, vec![7; 1 << 20])?;
        let image = OpenOptions::new().read(true).write(true).open(path)?;
        let (weather, source) = (Arc::<Weather>::default(), Arc::<Ear>::default());
        let files = Files {
            image,
            weather: Arc::clone(&weather),
            source: Arc::clone(&source),
            target: Arc::default(),
        };
        Ok((Fuse::mount(&directory.join("mnt"), files)?, weather, source))
    }

    #[test]
    fn the_disk_reads_and_fails_as_it_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let (fuse, weather, _) = match mounted(directory.path()) {
            Ok(mounted) => mounted,
            Err(why) => return eprintln!("SKIPPED: no file system in user space here: {why:#}"),
        };
        let mut options = OpenOptions::new();
        let disk = options.read(true).write(true).open(fuse.path("disk")).expect("it opens");
        let mut block = [0; 4096];
        disk.read_exact_at(&mut block, 8192).expect("it reads");
        assert_eq!(block, [7; 4096]);
        disk.write_all_at(&[9; 4096], 8192).expect("it writes");
        weather.becomes(Trouble::Errors);
        assert_eq!(disk.read_at(&mut block, 8192).expect_err("an error").raw_os_error(), Some(EIO));
        weather.becomes(Trouble::Torn { processes: vec![std::process::id()] });
        let mut odd = 0;
        for _ in 0..2 {
            let bytes = disk.read_at(&mut block, 8192).expect("it reads");
            odd += u32::from(bytes < 4096 || block != [9; 4096]);
        }
        assert_eq!(odd, 2);
        weather.becomes(Trouble::Torn { processes: vec![1] });
        disk.read_exact_at(&mut block, 8192).expect("others read what stands there");
        assert_eq!(block, [9; 4096]);
    }

    #[test]
    fn who_writes_an_event_is_held_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let (fuse, _, ear) = match mounted(directory.path()) {
            Ok(mounted) => mounted,
            Err(why) => return eprintln!("SKIPPED: no file system in user space here: {why:#}"),
        };
        ear.hold_at(|line| line["phase"] == "commit");
        let mut out = OpenOptions::new().write(true).open(fuse.path("source")).expect("it opens");
        let writer = thread::spawn(move || {
            out.write_all(b"{\"phase\":\"arm\"}\n{\"pha").expect("it writes");
            out.write_all(b"se\":\"commit\"}\n").expect("it writes");
        });
        let held = ear.until_held(std::time::Duration::from_secs(20)).expect("it is held");
        assert_eq!(held["phase"], "commit");
        assert!(!writer.is_finished());
        ear.release();
        writer.join().expect("it goes on");
        assert_eq!(ear.lines().len(), 2);
    }
}
