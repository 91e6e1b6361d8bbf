//! On real images: made by mke2fs and sfdisk, or by hand where the point is a number.

use super::*;
use crate::index::Duplicates;
use crate::memory::PageBuf;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// A directory with an image and a state directory in it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }
    fn write(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(self.image()).unwrap();
        file.write_all_at(bytes, at).unwrap();
        file.sync_all().unwrap();
    }
    fn set_len(&self, bytes: u64) {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.image())
            .unwrap()
            .set_len(bytes)
            .unwrap();
    }
    fn build(&self) -> Built {
        build(&self.image(), &self.state(), &mut options(&mut |_, _| true)).unwrap()
    }
    fn update(&self, written: Option<&Bitmap>) -> Built {
        update(&self.image(), &self.state(), written, &mut options(&mut |_, _| true)).unwrap()
    }
    fn load(&self) -> (Tables, Vec<String>) {
        load(&self.disks(&[self.image()]), &self.state()).unwrap()
    }
    fn disks(&self, images: &[PathBuf]) -> ImageDisks {
        let spec =
            |path: &PathBuf| DiskSpec { name: "disk0".to_owned(), path: path.clone(), role: Role::ReadOnly };
        ImageDisks::open_images(&images.iter().map(spec).collect::<Vec<_>>()).unwrap()
    }
    /// Blocks `range` of 4 KiB, each different, of one seed.
    fn fill(&self, range: Range<u64>, seed: u64) {
        for block in range {
            self.write(block * PAGE_BYTES_U64, &page(block, seed).0);
        }
    }
}

fn options<'p>(progress: &'p mut Progress<'p>) -> Options<'p> {
    Options { bytes_per_second: None, progress }
}

fn page(block: u64, seed: u64) -> PageBuf {
    let mut page = PageBuf::zeroed();
    let mut state =
        (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    for word in page.0.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&state.to_le_bytes());
    }
    page
}

fn found(tables: &Tables, block: u64, seed: u64) -> Option<u64> {
    tables.find(&page(block, seed), None).map(|found| found.sector.bytes() / PAGE_BYTES_U64)
}

fn run(program: &str, args: &[&str], input: &str) -> bool {
    use std::io::Write;
    let path = format!("/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let child = Command::new(program)
        .args(args)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: {program} is not installed (packages e2fsprogs, fdisk)");
        return false;
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?}");
    true
}

/// Looks up each whole page of the files in `dir` as they stand in `image`: how many there are, and how many are found
/// where just their bytes stand.
fn pages_found(dir: &Path, image: &[u8], tables: &Tables) -> (usize, usize) {
    let (mut pages, mut right) = (0, 0);
    for entry in std::fs::read_dir(dir).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        let mut near = None;
        for chunk in bytes.chunks_exact(PAGE_BYTES) {
            pages += 1;
            let page = PageBuf(chunk.try_into().unwrap());
            let Some(place) = tables.find(&page, near) else { continue };
            let at = usize_of(place.sector.bytes());
            assert!(image[at..at + PAGE_BYTES] == page.0, "nothing has changed since the scan");
            right += 1;
            near = Some(place);
        }
    }
    (pages, right)
}

fn files(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for (number, pages) in [(0, 700), (1, 3), (2, 1), (3, 260)] {
        let mut bytes: Vec<u8> = (0..pages).flat_map(|block| page(block, 100 + number).0).collect();
        // An odd end, so that what follows does not begin at a page of the disk by luck.
        bytes.extend_from_slice(&[7; 1500]);
        std::fs::write(dir.join(number.to_string()), bytes).unwrap();
    }
}

#[test]
fn files_are_found_in_file_systems_at_any_phase_and_block_size() {
    let labels = [("dos", 63, "1024"), ("dos", 63, "4096"), ("gpt", 2049, "2048"), ("gpt", 2048, "4096")];
    for (label, start, block) in labels {
        let place = Place::new();
        let (dir, image) = (place.dir.path().join("files"), place.image().display().to_string());
        files(&dir);
        place.set_len(48 << 20);
        let script = format!("label: {label}\nstart={start}, size=61440\nsize=20480\n");
        let (offset, kib) = (format!("offset={}", start * 512), "30720k");
        let root = dir.display().to_string();
        let args = ["-qF", "-t", "ext4", "-b", block, "-d", &root, "-E", &offset, &image, kib];
        if !run("sfdisk", &["--quiet", &image], &script) || !run("mke2fs", &args, "") {
            return;
        }
        let built = place.build();
        assert_eq!(built.outcome, "built");
        let (tables, notes) = place.load();
        assert!(notes.is_empty(), "{notes:?}");
        let bytes = std::fs::read(place.image()).unwrap();
        let (pages, right) = pages_found(&dir, &bytes, &tables);
        assert_eq!(pages, 964);
        // A file that lies in two pieces has a page over the cut, which stands nowhere as a whole.
        assert!(right + 8 >= pages, "{label} {start} {block}: {right} of {pages}");
        let all = verify(&place.image(), &place.state(), true).unwrap();
        assert!(all.checked >= 900 && all.stale == 0, "{all:?}");
    }
}

#[test]
fn two_disks_are_told_apart() {
    let (one, other) = (Place::new(), Place::new());
    one.fill(0..40, 1);
    other.fill(0..40, 2);
    one.build();
    build(&other.image(), &one.state(), &mut options(&mut |_, _| true)).unwrap();
    let (tables, notes) = load(&one.disks(&[one.image(), other.image()]), &one.state()).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    for (disk, seed) in [(0, 1), (1, 2)] {
        let place = tables.find(&page(17, seed), None).unwrap();
        assert_eq!((place.disk, place.sector), (DiskId(disk), Sector(17 * 8)));
    }
    // The second one has no index elsewhere: it is left out, with a line.
    let (tables, notes) = load(&other.disks(&[one.image(), other.image()]), &other.state()).unwrap();
    assert_eq!(notes.len(), 2);
    assert!(
        notes[1].contains("no page is referenced on it") && notes[1].contains("index build"),
        "{notes:?}"
    );
    assert!(tables.find(&page(17, 2), None).is_none());
}

#[test]
fn a_disk_that_grew_keeps_its_index_and_update_reads_only_the_rest() {
    let place = Place::new();
    place.fill(0..100, 1);
    place.build();
    place.fill(100..150, 2);
    let (tables, notes) = place.load();
    assert!(notes[0].contains("it has grown from 409600 to 614400 bytes"), "{notes:?}");
    assert_eq!((found(&tables, 7, 1), found(&tables, 120, 2)), (Some(7), None));
    let updated = place.update(Some(&Bitmap::new(150)));
    assert_eq!((updated.outcome, updated.counts.blocks), ("updated", 50));
    let (tables, notes) = place.load();
    assert!(notes.is_empty(), "{notes:?}");
    assert_eq!((found(&tables, 7, 1), found(&tables, 120, 2)), (Some(7), Some(120)));
}

#[test]
fn of_a_disk_that_shrank_nothing_past_its_end_is_named() {
    let place = Place::new();
    place.fill(0..100, 1);
    place.build();
    place.set_len(50 * PAGE_BYTES_U64 + 512);
    let (tables, notes) = place.load();
    assert!(notes[0].contains("it has shrunk from 409600 to 205312 bytes"), "{notes:?}");
    assert_eq!(found(&tables, 49, 1), Some(49));
    assert!((50..100).all(|block| found(&tables, block, 1).is_none()));
    let near = crate::units::BlockAddress { disk: DISK, sector: Sector(49 * 8) };
    assert!(tables.find(&page(50, 1), Some(near)).is_none());
    let updated = place.update(Some(&Bitmap::new(51)));
    assert_eq!((updated.outcome, updated.counts.blocks), ("built", 50));
    assert!(updated.reason.unwrap().contains("size or partitions"));
    assert!(place.load().1.is_empty());
}

#[test]
fn update_reads_what_was_written_and_no_more() {
    let place = Place::new();
    place.fill(0..2000, 1);
    place.build();
    let mut written = Bitmap::new(2000);
    for block in [5, 6, 900, 1999] {
        place.fill(block..block + 1, 9);
        written.set(usize_of(block));
    }
    place.write(901 * PAGE_BYTES_U64, &[0; PAGE_BYTES]);
    written.set(901);
    let updated = place.update(Some(&written));
    assert_eq!((updated.outcome, updated.counts.blocks, updated.counts.zero), ("updated", 5, 1));
    assert_eq!(updated.entries, 1999);
    let (tables, _) = place.load();
    for block in 0..2000 {
        let changed = [5, 6, 900, 901, 1999].contains(&block);
        assert_eq!(found(&tables, block, 1), (!changed).then_some(block));
        assert_eq!(found(&tables, block, 9), (changed && block != 901).then_some(block));
    }
    assert_eq!(verify(&place.image(), &place.state(), true).unwrap().stale, 0);
}

#[test]
fn without_knowing_what_was_written_the_time_of_change_decides() {
    let place = Place::new();
    place.fill(0..100, 1);
    assert_eq!(place.update(None).outcome, "built");
    assert_eq!(place.update(None).outcome, "unchanged");
    assert_eq!(stat(&place.image(), &place.state()).unwrap().image_changed, Some(false));
    std::thread::sleep(Duration::from_millis(20));
    place.fill(3..4, 2);
    assert_eq!(stat(&place.image(), &place.state()).unwrap().image_changed, Some(true));
    let updated = place.update(None);
    assert_eq!((updated.outcome, updated.counts.blocks), ("built", 100));
    assert_eq!(found(&place.load().0, 3, 2), Some(3));
}

#[test]
fn a_stale_index_is_seen_by_verify_and_refused_when_it_is_of_no_use() {
    let place = Place::new();
    place.fill(0..200, 1);
    place.build();
    place.fill(0..50, 2);
    let verified = verify(&place.image(), &place.state(), false).unwrap();
    assert_eq!((verified.checked, verified.right, verified.stale), (200, 150, 50));
    assert!(place.load().1.is_empty());
    place.fill(50..180, 2);
    let (tables, notes) = place.load();
    assert!(notes[0].contains("it is stale") && notes[0].contains("index update"), "{notes:?}");
    assert_eq!(found(&tables, 190, 1), None);
}

#[test]
fn another_image_under_the_same_name_has_no_index() {
    let place = Place::new();
    place.fill(0..100, 1);
    place.build();
    let old = place.dir.path().join("old");
    std::fs::rename(place.image(), &old).unwrap();
    place.fill(0..100, 2);
    let why = stat(&place.image(), &place.state()).unwrap_err().to_string();
    assert!(why.contains("there is none of") && why.contains("index build"), "{why}");
    // The old one keeps its index under its new name.
    assert_eq!(stat(&old, &place.state()).unwrap().entries, 100);
}

#[test]
fn a_stopped_build_leaves_the_old_index() {
    let place = Place::new();
    place.fill(0..100, 1);
    place.build();
    place.fill(0..100, 2);
    let built = build(&place.image(), &place.state(), &mut options(&mut |_, _| false)).unwrap();
    assert_eq!(built.outcome, "stopped");
    let found = verify(&place.image(), &place.state(), true).unwrap();
    assert_eq!((found.checked, found.right), (100, 0));
}

#[test]
fn holes_and_zeroes_cost_nothing() {
    let place = Place::new();
    place.set_len(1 << 40);
    place.fill(0..10, 1);
    place.write(1 << 39, &[0; 1 << 20]);
    place.write((1 << 40) - PAGE_BYTES_U64, &page(0, 2).0);
    let built = place.build();
    assert_eq!(built.entries, 11);
    assert!(built.index_bytes < 2 << 20, "{built:?}");
    assert!(built.counts.bytes_read < 4 << 20, "{built:?}");
    let stat = stat(&place.image(), &place.state()).unwrap();
    assert!(stat.hole_share > 0.999 && stat.zero_share > 0.9, "{stat:?}");
    let (tables, _) = place.load();
    assert!(tables.mapped_bytes() < 8 << 20, "{}", tables.mapped_bytes());
}

#[test]
fn what_is_no_disk_is_refused_with_a_sentence() {
    let place = Place::new();
    let missing =
        build(&place.image(), &place.state(), &mut options(&mut |_, _| true)).unwrap_err().to_string();
    assert!(missing.contains("No such file") && missing.contains("Check the path"), "{missing}");
    place.fill(0..4, 1);
    let file = place.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let state = build(&place.image(), &file, &mut options(&mut |_, _| true)).unwrap_err().to_string();
    assert!(state.contains("can't be written"), "{state}");
}
