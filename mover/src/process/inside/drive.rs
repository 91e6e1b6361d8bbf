//! A guest's disk: an image file, read and written with O_DIRECT straight into and from guest pages.
//!
//! Every write is announced in the shared log before it is submitted and again when it has ended, and waits while the
//! shared gate holds one of its blocks. Buffers are never registered with the kernel: what is written into pinned
//! memory behind the kernel's back escapes the engine's dirty tracking. For the same reason pages that a read has
//! filled are marked as written once more when it has ended.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::error::GuestError;
use crate::kernel::direct_io;
use crate::memory::GuestPage;
use crate::process::shared::{SharedGate, SharedWriteLog};
use crate::units::{DiskId, PAGE_BYTES_U64, u64_of};

/// How often a write that the gate holds looks again.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// An open image file.
#[derive(Debug)]
pub(crate) struct Drive {
    file: OwnedFd,
    id: DiskId,
    path: String,
    bytes: u64,
    log: Arc<SharedWriteLog>,
    gate: Arc<SharedGate>,
}

/// Opens an image and says how long it is.
pub(crate) fn open(path: &Path) -> Result<(OwnedFd, u64), GuestError> {
    let failed = |source: rustix::io::Errno, remedy| GuestError::Os {
        doing: format!("cannot open the guest's disk {}", path.display()),
        remedy,
        source: source.into(),
    };
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
        let remedy = match e {
            rustix::io::Errno::INVAL => "Its file system has no O_DIRECT: put the image on another one",
            rustix::io::Errno::NOENT => "Make one with `pageferry image`, or name another",
            _ => "The guest needs to read and write it",
        };
        failed(e, remedy)
    })?;
    let remedy = "It must be a regular file or a block device";
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e, remedy))?;
    if bytes < PAGE_BYTES_U64 {
        return Err(GuestError::State(format!(
            "the guest's disk {} has only {bytes} bytes. Make another with `pageferry image`",
            path.display()
        )));
    }
    Ok((file, bytes))
}

impl Drive {
    /// The disk `id` on an image opened with [`open`].
    pub(crate) fn new(
        (file, bytes): (OwnedFd, u64),
        path: &Path,
        id: DiskId,
        log: Arc<SharedWriteLog>,
        gate: Arc<SharedGate>,
    ) -> Self {
        Self { file, id, path: path.display().to_string(), bytes, log, gate }
    }
    /// The image's path.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }
    /// The image's size.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Whole blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.bytes / PAGE_BYTES_U64
    }

    /// Reads blocks from `block` on into `pages`, which the caller has touched.
    pub(super) fn read(&self, block: u64, pages: &[GuestPage<'_>]) -> io::Result<()> {
        let read = direct_io::read_pages(self.file.as_fd(), block * PAGE_BYTES_U64, pages);
        // A harvest of the dirty log while the read was in flight saw the pages pinned, and took what they held before.
        pages.iter().for_each(GuestPage::mark_written);
        let read = read?;
        if read == pages.len() {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the image {} has shrunk: block {} is not there", self.path, block + u64_of(read)),
        ))
    }

    /// Writes `pages`, which the caller has touched and which do not change meanwhile, to the blocks from `block` on.
    pub(super) fn write(&self, block: u64, pages: &[GuestPage<'_>]) -> io::Result<()> {
        let blocks = block..block + u64_of(pages.len());
        let mark = || blocks.clone().for_each(|block| self.log.mark(self.id, block));
        mark();
        if blocks.clone().any(|block| self.gate.held(self.id, block)) {
            blocks.clone().for_each(|block| self.wait_for_gate(block));
            mark();
        }
        let written = direct_io::write_pages(self.file.as_fd(), block * PAGE_BYTES_U64, pages);
        mark();
        if written? == pages.len() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::WriteZero, format!("the image {} takes no more", self.path)))
    }

    fn wait_for_gate(&self, block: u64) {
        while self.gate.held(self.id, block) {
            self.gate.want(self.id, block);
            std::thread::sleep(LOOK_EVERY);
        }
        self.gate.want_no_more(self.id, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Mapping, PageBuf};
    use crate::units::Pfn;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

    #[test]
    fn a_write_is_logged_before_it_changes_the_disk_and_waits_at_the_gate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1u8; 64 * 4096]).unwrap();
        let sizes = [64 * 4096];
        let (log, log_file) = SharedWriteLog::create(&sizes).unwrap();
        let (gate, gate_file) = SharedGate::create(&sizes).unwrap();
        let log_there = SharedWriteLog::open(log_file.as_fd(), &sizes).unwrap();
        let gate_there = SharedGate::open(gate_file.as_fd(), &sizes).unwrap();
        let memory = rustix::fs::memfd_create("drive-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 4 * 4096).unwrap();
        let map = Mapping::shared(memory.as_fd(), 4 * 4096, true).unwrap();
        map.page(Pfn(2)).copy_from(&PageBuf([7; 4096]));
        let drive = Drive::new(open(&path).unwrap(), &path, DiskId(0), Arc::new(log), Arc::new(gate));
        let on_disk = || {
            let mut byte = [0];
            std::fs::File::open(&path).unwrap().read_exact_at(&mut byte, 12 * 4096).unwrap();
            byte[0]
        };
        // Blocks 10 to 13 are written; 11 and 12 are held, and opened one after the other.
        gate_there.hold_word(DiskId(0), 0, 0b11 << 11);
        let mut seen = Vec::new();
        std::thread::scope(|scope| {
            let write = scope.spawn(|| {
                let pages: Vec<_> = [0, 1, 2, 3].map(|n| map.page(Pfn(n))).into();
                drive.write(10, &pages)
            });
            for held in [11, 12] {
                while gate_there.wanted() != Some((DiskId(0), held)) && !write.is_finished() {
                    std::thread::yield_now();
                }
                let logged = (10..14).all(|block| log_there.marked(DiskId(0), block));
                seen.push((logged, on_disk(), write.is_finished()));
                if held == 12 {
                    log_there.harvest(DiskId(0), |_, _| {});
                }
                gate_there.open_block(DiskId(0), held);
            }
            write.join().unwrap().unwrap();
        });
        assert_eq!(seen, [(true, 1, false), (true, 1, false)], "logged first, then held, then written");
        assert_eq!((on_disk(), gate_there.wanted()), (7, None));
        assert!(log_there.marked(DiskId(0), 12) && !log_there.marked(DiskId(0), 14), "logged again");
        assert!(drive.write(62, &[map.page(Pfn(0))]).is_ok());
        assert!(
            drive.read(62, &[map.page(Pfn(0)), map.page(Pfn(1)), map.page(Pfn(2))]).is_err(),
            "past the end"
        );
    }

    /// Whoever harvests the log all the time and then looks at the disk has seen the last content of every write.
    #[test]
    fn a_write_that_a_harvest_overtakes_is_logged_once_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0u8; 16 * 4096]).unwrap();
        let sizes = [16 * 4096];
        let (log, log_file) = SharedWriteLog::create(&sizes).unwrap();
        let log_there = SharedWriteLog::open(log_file.as_fd(), &sizes).unwrap();
        let gate = SharedGate::create(&sizes).unwrap().0;
        let drive = Drive::new(open(&path).unwrap(), &path, DiskId(0), Arc::new(log), Arc::new(gate));
        let memory = rustix::fs::memfd_create("drive-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 4096).unwrap();
        let map = Mapping::shared(memory.as_fd(), 4096, true).unwrap();
        let (seen, rounds, end) = (AtomicU8::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let mut missed = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let file = std::fs::File::open(&path).unwrap();
                while !end.load(Ordering::SeqCst) {
                    let mut dirty = false;
                    log_there.harvest(DiskId(0), |_, _| dirty = true);
                    if dirty {
                        let mut byte = [0];
                        file.read_exact_at(&mut byte, 5 * 4096).unwrap();
                        seen.store(byte[0], Ordering::SeqCst);
                    }
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
            for content in 1..=200 {
                map.page(Pfn(0)).copy_from(&PageBuf([content; 4096]));
                drive.write(5, &[map.page(Pfn(0))]).unwrap();
                let now = rounds.load(Ordering::SeqCst);
                while rounds.load(Ordering::SeqCst) < now + 2 {
                    std::thread::yield_now();
                }
                missed += u32::from(seen.load(Ordering::SeqCst) != content);
            }
            end.store(true, Ordering::SeqCst);
        });
        assert_eq!(missed, 0, "writes whose content no harvest led to");
    }

    /// Harvests run while reads are in flight: one that falls between the kernel's pinning of a page and the disk's
    /// writing to it takes the page for what it held before. Every page is read into once, so that none gets a second
    /// chance to be noticed.
    #[test]
    fn a_read_that_a_harvest_overtakes_is_logged_once_more() {
        use crate::kernel::pagemap::Scanner;
        use crate::kernel::uffd::tests::{Pair, skipped};
        use crate::kernel::uffd::{self, Features, Userfaultfd, Watch};
        const PAGES: u64 = 8192;
        let uffd = match uffd::open().and_then(|(fd, _)| Userfaultfd::new(fd, Features::LOG_WRITES)) {
            Ok(uffd) => uffd,
            Err(e) => return skipped("direct reads under a dirty log", &e),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7u8; 16 * 4096]).unwrap();
        let (log, gate) = (SharedWriteLog::create(&[]).unwrap().0, SharedGate::create(&[]).unwrap().0);
        let drive = Drive::new(open(&path).unwrap(), &path, DiskId(0), Arc::new(log), Arc::new(gate));
        let pair = Pair::new(PAGES);
        uffd.register(pair.span(), Watch::WRITES).unwrap();
        let mut scanner = Scanner::new(Scanner::open_own().unwrap());
        scanner.protect(pair.span()).unwrap();
        let mut there = vec![false; usize::try_from(PAGES).unwrap()];
        std::thread::scope(|scope| {
            let reads = scope.spawn(|| {
                for first in (0..PAGES).step_by(16) {
                    let pages: Vec<_> = (first..first + 16).map(|n| pair.guest.page(Pfn(n))).collect();
                    drive.read(0, &pages).unwrap();
                }
            });
            let mut last = false;
            while !last {
                last = reads.is_finished();
                let page = |address: u64| (address - pair.span().start) / PAGE_BYTES_U64;
                let note = |from, to| {
                    for n in page(from)..page(to) {
                        there[usize::try_from(n).unwrap()] = !pair.engine.page(Pfn(n)).is_zero();
                    }
                };
                scanner.written(pair.span(), note).unwrap();
            }
        });
        let lost = there.iter().filter(|there| !**there).count();
        assert_eq!(lost, 0, "pages whose content no harvest has seen");
    }

    #[test]
    fn what_can_not_be_a_disk_is_refused_with_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        for (path, word) in
            [(empty, "only 0 bytes"), (dir.path().join("none"), "Make one"), ("/dev".into(), "cannot open")]
        {
            let said = open(&path).unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
    }
}
