//! Both ends of a migration in this process, over loopback: what the lanes allocate, and what becomes of a migration
//! one of whose tasks falls.
#![expect(clippy::unwrap_used, reason = "a test ends where it finds an error")]

use std::fs;
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use bench::buffer::{digest, incompressible};
use bench::idle::{self, Plan};
use mover::error::{Error, ExitClass};
use mover::index::Duplicates;
use mover::kernel::counting::Counting;
use mover::memory::{Mapping, PageBuf};
use mover::net::tcp::{Settings, TcpAcceptor};
use mover::report::{Mode, Summary};
use mover::units::{BlockAddress, DiskId, PAGE_BYTES, PAGE_BYTES_U64, Pfn, Sector};

/// Lanes of either end and the loader: whatever touches every page.
#[global_allocator]
static ALLOCATOR: Counting = Counting::new(&["pf-lane", "pf-load"]);

/// Every page stands on the disk at its own place.
struct SamePlace;

impl Duplicates for SamePlace {
    fn find(&self, page: &PageBuf, _near: Option<BlockAddress>) -> Option<BlockAddress> {
        let [a, b, c, d, e, f, g, h, ..] = page.0;
        let sector = Sector::holding(u64::from_le_bytes([a, b, c, d, e, f, g, h]) * PAGE_BYTES_U64);
        Some(BlockAddress { disk: DiskId(0), sector })
    }
    fn mapped_bytes(&self) -> u64 {
        0
    }
}

/// An index with a bug.
struct Broken;

impl Duplicates for Broken {
    fn find(&self, _page: &PageBuf, _near: Option<BlockAddress>) -> Option<BlockAddress> {
        panic!("as this test wants it")
    }
    fn mapped_bytes(&self) -> u64 {
        0
    }
}

fn migrate(source: &Arc<Mapping>, target: &Arc<Mapping>, plan: Plan) -> (Result<Summary>, Result<()>) {
    let acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    let port = acceptor.local().port();
    let disk = plan.disk.clone();
    thread::scope(|scope| {
        let receiving = scope.spawn(|| idle::receive(target, acceptor, disk.as_deref()));
        let sent = idle::send(source, port, plan);
        (sent, receiving.join().unwrap())
    })
}

/// Migrates a guest of `pages` pages; says how often the lanes and the loader allocated.
fn allocations(pages: u64, mode: Mode) -> u64 {
    let bytes = usize::try_from(pages).unwrap() * PAGE_BYTES;
    let (source, target) =
        (Arc::new(incompressible(bytes, 1).unwrap()), Arc::new(incompressible(bytes, 2).unwrap()));
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    let mut blocks = Vec::with_capacity(bytes);
    for at in 0..pages {
        let mut page = PageBuf::zeroed();
        source.page(Pfn(at)).copy_to(&mut page);
        page.0[..8].copy_from_slice(&at.to_le_bytes());
        source.page(Pfn(at)).copy_from(&page);
        blocks.extend_from_slice(&page.0);
    }
    fs::write(&image, blocks).unwrap();
    let plan = Plan { mode, disk: Some(image), known: Some(Arc::new(SamePlace)), ..Plan::plain(2) };
    let before = ALLOCATOR.allocations();
    let (sent, received) = migrate(&source, &target, plan);
    received.unwrap();
    let summary = sent.unwrap();
    assert_eq!(digest(&source), digest(&target));
    match mode {
        Mode::Refer => assert!(summary.pages_by_reference > pages / 8, "{summary:?}"),
        _ => assert_eq!(summary.pages_data, pages),
    }
    ALLOCATOR.allocations() - before
}

/// Allocations that the end of a connection may or may not take, all lanes together; a frame each would be 240.
const ENDS: u64 = 12;

/// Invariant 6. What is allocated is so before the first page or behind the last: sixteen times the pages take no more.
#[test]
fn the_hot_path_does_not_allocate() {
    for mode in [Mode::Plain, Mode::Refer] {
        let (small, large) = (allocations(4 * 1024, mode), allocations(64 * 1024, mode));
        assert!(small > 0, "starting a thread allocates; does the allocator count at all?");
        assert!(large <= small + ENDS, "{mode:?}: {small} allocations for 4,096 pages, {large} for 65,536");
    }
}

/// A task that panics ends the migration with its name and words, on both ends, instead of being waited for.
#[test]
fn a_fallen_task_ends_the_migration() {
    let bytes = 4 << 20;
    let (source, target) =
        (Arc::new(incompressible(bytes, 1).unwrap()), Arc::new(incompressible(bytes, 2).unwrap()));
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), vec![1; 1 << 20]).unwrap();
    let disk = Some(image.path().to_owned());
    let plan = Plan { mode: Mode::Refer, disk, known: Some(Arc::new(Broken)), ..Plan::plain(2) };
    let (sent, received) = migrate(&source, &target, plan);
    let class = |error: &anyhow::Error| error.downcast_ref::<Error>().map(Error::class);
    let error = sent.unwrap_err();
    assert!(error.to_string().contains("as this test wants it"), "{error}");
    assert_eq!(class(&error), Some(ExitClass::Internal));
    let error = received.unwrap_err();
    assert_eq!(class(&error), Some(ExitClass::Internal), "{error}");
}
