//! With a loop device and the kernel's own rings; root alone may have either.

use super::*;
use std::os::unix::fs::FileExt;
use std::process::Command;

/// What is run has to succeed; else the sentence of why not.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A file of 64 MiB, a loop device over it, and a tracefs.
pub(crate) struct Bench {
    directory: tempfile::TempDir,
    device: String,
    mounted: bool,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", &self.device]);
        if self.mounted {
            let _ = run("umount", &[self.tracefs().to_str().unwrap()]);
        }
    }
}

impl Bench {
    pub(crate) fn new() -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let device = run("losetup", &["--find", "--show", image.to_str().unwrap()])?;
        let mounted = !Path::new(TRACEFS).join("instances").is_dir();
        let bench = Self { directory, device, mounted };
        if mounted {
            fs::create_dir(bench.tracefs()).unwrap();
            run("mount", &["-t", "tracefs", "none", bench.tracefs().to_str().unwrap()])?;
        }
        Ok(bench)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    fn tracefs(&self) -> PathBuf {
        if self.mounted { self.directory.path().join("tracefs") } else { TRACEFS.into() }
    }

    pub(crate) fn watch(&self, path: &Path, ring_kib: u32) -> Observer {
        Observer::start_in(&self.tracefs(), path, ring_kib).unwrap()
    }

    /// Past the page cache, as blkback writes.
    pub(crate) fn open(&self) -> File {
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.device).unwrap()
    }

    fn instances(&self) -> Vec<String> {
        let all = fs::read_dir(self.tracefs().join("instances")).unwrap();
        all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Four pages where O_DIRECT takes them from.
fn aligned() -> Vec<crate::memory::PageBuf> {
    vec![crate::memory::PageBuf([0xa5; 4096]); 4]
}

fn write(file: &File, piece: u64, pages: usize) {
    for (at, page) in (piece..).zip(&aligned()[..pages]) {
        file.write_all_at(&page.0, at * 4096).unwrap();
    }
}

fn pieces(bitmap: &Bitmap) -> Vec<usize> {
    bitmap.iter().collect()
}

#[test]
fn what_is_written_to_a_device_is_seen_and_what_is_read_is_not() {
    let bench = match Bench::new() {
        Ok(bench) => bench,
        Err(why) => return eprintln!("SKIPPED: writes to a loop device: {why}"),
    };
    let mut by_device = bench.watch(bench.device.as_ref(), RING_KIB);
    let mut by_file = bench.watch(&bench.image(), RING_KIB);
    let file = bench.open();
    let mut page = aligned();
    write(&file, 10, 1);
    write(&file, 4000, 4);
    file.read_exact_at(&mut page[0].0, 77 * 4096).unwrap();
    file.sync_all().unwrap();
    // Half a piece, out of a page cache.
    let cached = fs::OpenOptions::new().write(true).open(&bench.device).unwrap();
    cached.write_all_at(&[7; 100], 9000 * 4096 + 512).unwrap();
    cached.sync_all().unwrap();
    for observer in [&mut by_device, &mut by_file] {
        let mut written = Bitmap::new(16384);
        let found = observer.harvest(&mut written).unwrap();
        assert_eq!(pieces(&written), [10, 4000, 4001, 4002, 4003, 9000]);
        assert_eq!(found, Written { fresh: 6, lost: false });
        assert_eq!(observer.harvest(&mut written).unwrap(), Written::default());
    }
    write(&file, 11, 1);
    run("blkdiscard", &["-o", "40960000", "-l", "8192", &bench.device]).unwrap();
    let mut log = Observed::new(vec![None, Some(by_device)]);
    let mut written = Bitmap::new(16384);
    assert_eq!(log.harvest(DiskId(0), &mut written).unwrap(), 0);
    assert_eq!(log.harvest(DiskId(1), &mut written).unwrap(), 3);
    assert_eq!(pieces(&written), [11, 10000, 10001], "what is discarded is not what it was");
    assert_eq!(log.harvest(DiskId(2), &mut written).unwrap(), 0);
}

/// A ring that ran full: everything may have been written.
#[test]
fn what_is_lost_counts_as_everything() {
    let bench = match Bench::new() {
        Ok(bench) => bench,
        Err(why) => return eprintln!("SKIPPED: writes to a loop device: {why}"),
    };
    let mut observer = bench.watch(bench.device.as_ref(), 8);
    let file = bench.open();
    let mut written = Bitmap::new(16384);
    for piece in 0..2000 {
        write(&file, piece, 1);
    }
    assert!(observer.harvest(&mut written).unwrap().lost);
    // It goes on behind that.
    let mut written = Bitmap::new(16384);
    write(&file, 3000, 1);
    assert_eq!(observer.harvest(&mut written).unwrap(), Written { fresh: 1, lost: false });
    for piece in 0..2000 {
        write(&file, piece, 1);
    }
    let mut log = Observed::new(vec![Some(observer)]);
    let mut written = Bitmap::new(16384);
    assert_eq!(log.harvest(DiskId(0), &mut written).unwrap(), 16384);
}

#[test]
fn nothing_is_left_in_the_kernel() {
    let bench = match Bench::new() {
        Ok(bench) => bench,
        Err(why) => return eprintln!("SKIPPED: instances of tracefs: {why}"),
    };
    // As a process leaves it that was killed: no process has this number.
    let left = format!("{PREFIX}-4194305-0");
    fs::create_dir(bench.tracefs().join("instances").join(&left)).unwrap();
    let observer = bench.watch(bench.device.as_ref(), RING_KIB);
    let own = format!("{PREFIX}-{}-", std::process::id());
    assert!(!bench.instances().contains(&left), "{:?}", bench.instances());
    assert!(bench.instances().iter().any(|name| name.starts_with(&own)), "{:?}", bench.instances());
    drop(observer);
    assert!(!bench.instances().iter().any(|name| name.starts_with(&own)), "{:?}", bench.instances());
}

#[test]
fn what_no_device_shows_is_told() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Observer::start(file.path()).unwrap_err().to_string();
    assert!(error.contains("0 loop devices show all of it") && error.contains("index update"), "{error}");
    let error = Observer::start(Path::new("/nowhere/disk")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/disk"), "{error}");
}

#[test]
fn pieces_are_those_a_request_touches() {
    let mut bitmap = Bitmap::new(100);
    assert_eq!(enter(&mut bitmap, 7, 2), 2);
    assert_eq!(enter(&mut bitmap, 8, 0), 0);
    assert_eq!(enter(&mut bitmap, 799, 1000), 1);
    assert_eq!(enter(&mut bitmap, u64::MAX, u64::MAX), 0);
    assert_eq!(pieces(&bitmap), [0, 1, 99]);
}
