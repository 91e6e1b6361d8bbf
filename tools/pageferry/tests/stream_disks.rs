//! `pageferry stream verify --disks` on a file that leaves pages on a real image.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mover::disk::DiskInfo;
use mover::disk::image::{DiskSpec, ImageDisks, Role};
use mover::units::{BlockAddress, DiskId, Pfn, Sector};
use mover::wire::hello::Secret;
use xen_glue::stream::{
    DomainHeader, FrozenDisks, GuestType, HvmParam, PageEntry, PageType, Reference, StreamError, Writer,
};

const PAGES: u64 = 600;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// A file with pages on a disk, and the disk.
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().expect("a temporary directory") };
        let image: Vec<u8> = (0..PAGES).flat_map(block).collect();
        std::fs::write(place.path("image"), image).expect("the image is written");
        std::fs::write(place.path("saved"), place.saved().expect("a right stream")).expect("it is written");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn saved(&self) -> Result<Vec<u8>, StreamError> {
        let spec = DiskSpec { name: "xvda".into(), path: self.path("image"), role: Role::ReadOnly };
        let disks = ImageDisks::open(&[spec]).expect("an image");
        let disks: Vec<DiskInfo> = disks.infos().to_vec();
        let frozen = FrozenDisks { key: Secret([0x42; 32]), disks };
        let header = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
        let mut writer = Writer::start(Vec::new(), header)?;
        writer.static_data_end()?;
        writer.frozen_disks(&frozen)?;
        let left: Vec<_> = (0..PAGES).map(|pfn| PageEntry::new(Pfn(pfn), PageType::AllocateOnly)).collect();
        writer.page_data(&left, &[])?;
        let key = frozen.check_key();
        let reference = |pfn: u64| Reference {
            pfn: Pfn(pfn),
            block: BlockAddress { disk: DiskId(0), sector: Sector(pfn * 8) },
            check: key.check_bytes(&block(pfn).try_into().expect("a page")),
        };
        let references: Vec<_> = (0..PAGES).map(reference).collect();
        for some in references.chunks(250) {
            writer.references(some)?;
        }
        writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff }])?;
        writer.hvm_context(&[1; 16])?;
        writer.end()
    }

    fn verify(&self, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.args(["stream", "verify"]).args(more).arg(self.path("saved"));
        command.output().expect("the program runs")
    }

    /// Verifies with `more`; the exit code, and what is said of disks in JSON.
    fn on_disks(&self, more: &[&str]) -> (Option<i32>, serde_json::Value) {
        let output = self.verify(&[&["--json", "--disks"], more].concat());
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        (output.status.code(), value["on_disks"].clone())
    }
}

fn block(number: u64) -> Vec<u8> {
    (0..512u64).flat_map(|at| (number << 20 | at << 4 | 5).to_le_bytes()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn overwrite(path: &Path, at: u64) {
    let file = File::options().write(true).open(path).expect("the image");
    file.write_all_at(&[0xff], at).expect("it is written");
    file.sync_all().expect("it is flushed");
}

#[test]
fn a_file_and_its_disks_go_together_until_a_block_is_another_one() {
    let place = Place::new();
    let good = place.verify(&["--disks"]);
    let words = text(&good.stdout);
    assert!(good.status.success(), "{}", text(&good.stderr));
    for expected in ["600 of these frames stand on disks", "600 pages stand on xvda", "no fault"] {
        assert!(words.contains(expected), "{expected} is not in\n{words}");
    }
    let (code, account) = place.on_disks(&[]);
    assert_eq!((code, &account["right"], &account["pages"]), (Some(0), &600.into(), &600.into()));

    overwrite(&place.path("image"), 77 * 4096 + 13);
    overwrite(&place.path("image"), 401 * 4096 + 4095);
    let bad = place.verify(&["--disks"]);
    assert_eq!(bad.status.code(), Some(10));
    let words = text(&bad.stdout);
    assert!(
        words.contains("2 of 600 pages") && words.contains("pfn 0x4d does not stand at sector 616"),
        "{words}"
    );
    assert!(text(&bad.stderr).contains("can't be restored"), "{}", text(&bad.stderr));
    let (code, account) = place.on_disks(&[]);
    assert_eq!((code, &account["other"], &account["right"]), (Some(10), &2.into(), &598.into()));
    assert_eq!(account["faults"].as_array().map(Vec::len), Some(2));
    // The stream itself is as right as before.
    let stream = place.verify(&[]);
    assert!(stream.status.success() && !text(&stream.stdout).contains("stand on xvda"));
}

#[test]
fn a_disk_that_is_not_there_or_another_one_is_an_error_of_the_disk() {
    let place = Place::new();
    std::fs::rename(place.path("image"), place.path("moved")).expect("it is moved");
    let gone = place.verify(&["--disks"]);
    assert_eq!(gone.status.code(), Some(6), "{}", text(&gone.stderr));
    assert!(text(&gone.stderr).contains("xvda"), "{}", text(&gone.stderr));
    let moved = format!("xvda={}", place.path("moved").display());
    let (code, account) = place.on_disks(&["--disk", &moved]);
    assert_eq!((code, &account["right"]), (Some(0), &600.into()));
    std::fs::write(place.path("image"), vec![7; 600 * 4096]).expect("it is written");
    let other = place.verify(&["--disks"]);
    assert_eq!(other.status.code(), Some(6));
    assert!(text(&other.stderr).contains("is not the disk"), "{}", text(&other.stderr));
    let wrong = place.verify(&["--disks", "--disk", "xvda"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong.stderr));
}

#[test]
fn it_lists_what_is_left_where() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    let listed = command.args(["stream", "inspect"]).arg(place.path("saved")).output().expect("it runs");
    let words = text(&listed.stdout);
    for expected in ["FROZEN_DISKS", "xvda (", "REFERENCES", "250 frames by where they stand", "600 XALLOC"] {
        assert!(words.contains(expected), "{expected} is not in\n{words}");
    }
    assert!(!words.contains("424242"), "the key is not shown");
}
