//! Both ends of a migration in this process, over loopback: what the lanes allocate, what can be overheard, and what
//! becomes of a migration one of whose tasks falls.
#![expect(clippy::unwrap_used, reason = "a test ends where it finds an error")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::Result;
use bench::buffer::{digest, incompressible};
use bench::idle::{self, Plan};
use mover::error::{Error, ExitClass};
use mover::fingerprint::Check;
use mover::index::Duplicates;
use mover::kernel::counting::Counting;
use mover::memory::{Mapping, PageBuf};
use mover::report::{Mode, Summary};
use mover::units::{BlockAddress, DiskId, PAGE_BYTES, PAGE_BYTES_U64, PageCount, Pfn, Sector};
use mover::wire::frame::{HEADER_BYTES, Header, Kind, MAGIC, Reference, table};
use mover::wire::hello::HELLO_BYTES;

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
    migrate_over(source, target, plan, false)
}

fn migrate_over(
    source: &Arc<Mapping>,
    target: &Arc<Mapping>,
    plan: Plan,
    encrypted: bool,
) -> (Result<Summary>, Result<()>) {
    let entrance = idle::entrance(encrypted).unwrap();
    let port = entrance.local().port();
    let disk = plan.disk.clone();
    let plan = Plan { pin: entrance.fingerprint(), ..plan };
    thread::scope(|scope| {
        let receiving = scope.spawn(|| idle::receive(target, entrance, disk.as_deref()));
        let sent = idle::send(source, port, plan);
        (sent, receiving.join().unwrap())
    })
}

/// Numbers a guest's pages in their first bytes, and writes them to an image, each to its own place.
fn numbered(guest: &Mapping) -> tempfile::NamedTempFile {
    let mut blocks = Vec::new();
    for at in 0..guest.pages().0 {
        let mut page = PageBuf::zeroed();
        guest.page(Pfn(at)).copy_to(&mut page);
        page.0[..8].copy_from_slice(&at.to_le_bytes());
        guest.page(Pfn(at)).copy_from(&page);
        blocks.extend_from_slice(&page.0);
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), blocks).unwrap();
    image
}

/// Migrates a guest of `pages` pages; says how often the lanes and the loader allocated.
fn allocations(pages: u64, mode: Mode, encrypted: bool) -> u64 {
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
    // Without a cap the link holds nothing up, and everything goes over it.
    let bandwidth = (mode == Mode::Refer).then_some(400_000_000);
    let plan =
        Plan { mode, bandwidth, disk: Some(image), known: Some(Arc::new(SamePlace)), ..Plan::plain(2) };
    let before = ALLOCATOR.allocations();
    let (sent, received) = migrate_over(&source, &target, plan, encrypted);
    received.unwrap();
    let summary = sent.unwrap();
    assert_eq!(summary.send_path, if encrypted { "encrypted" } else { "copy" });
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
    for (mode, encrypted) in
        [(Mode::Plain, false), (Mode::Refer, false), (Mode::Plain, true), (Mode::Refer, true)]
    {
        let (small, large) =
            (allocations(4 * 1024, mode, encrypted), allocations(64 * 1024, mode, encrypted));
        assert!(small > 0, "starting a thread allocates; does the allocator count at all?");
        let how = if encrypted { "encrypted" } else { "in the clear" };
        assert!(
            large <= small + ENDS,
            "{mode:?}, {how}: {small} allocations for 4,096 pages, {large} for 65,536"
        );
    }
}

/// Listens in front of `port`; gives its own port, and everything that came in from the source, a connection each.
fn overhear(port: u16) -> (u16, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let heard: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let all = Arc::clone(&heard);
    thread::spawn(move || {
        for source in listener.incoming().map_while(Result::ok) {
            let target = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (mut back_from, mut back_to) = (target.try_clone().unwrap(), source.try_clone().unwrap());
            thread::spawn(move || {
                // Either end hangs up when it is done.
                let _ = io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(Shutdown::Both);
            });
            let all = Arc::clone(&all);
            let number = all.lock().unwrap().len();
            all.lock().unwrap().push(Vec::new());
            thread::spawn(move || {
                let (mut from, mut to) = (source, target);
                let mut piece = vec![0; 1 << 16];
                while let Ok(count @ 1..) = from.read(&mut piece) {
                    // Noted before it is passed on: what the target has, the test has too.
                    all.lock().unwrap()[number].extend_from_slice(&piece[..count]);
                    if to.write_all(&piece[..count]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    (own, heard)
}

/// The references in what a lane carried.
fn references(lane: &[u8], guest: PageCount) -> BTreeMap<Pfn, (BlockAddress, Check)> {
    let mut found = BTreeMap::new();
    let mut rest = &lane[HELLO_BYTES..];
    while let Some((header, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::decode(header).unwrap();
        let (filled, behind) = behind.split_at(header.filled_table_bytes());
        let entries = &filled[..header.table_bytes()];
        rest = behind;
        match header.kind {
            Kind::Data => rest = &rest[header.count * PAGE_BYTES..],
            Kind::References => {
                for reference in table::<Reference>(entries) {
                    let (pfn, block, check) = reference.parts(guest, 1).unwrap();
                    found.insert(pfn, (block, check));
                }
            }
            _ => {}
        }
    }
    found
}

/// Invariant 5. The same page of the same guest, referred to the same block, has another check in each migration, so
/// that nobody in the guest can know one beforehand.
#[test]
fn checks_are_keyed_anew_for_every_migration() {
    let (pages, bytes) = (PageCount(512), 512 * PAGE_BYTES);
    let (source, target) =
        (Arc::new(incompressible(bytes, 1).unwrap()), Arc::new(incompressible(bytes, 2).unwrap()));
    let image = numbered(&source);
    let once = || {
        // In the clear: a reader of lanes has to be able to read.
        let entrance = idle::entrance(false).unwrap();
        let (port, heard) = overhear(entrance.local().port());
        let disk = Some(image.path().to_owned());
        thread::scope(|scope| {
            let receiving = scope.spawn(|| idle::receive(&target, entrance, disk.as_deref()));
            let known: Option<Arc<dyn Duplicates>> = Some(Arc::new(SamePlace));
            let plan = Plan { mode: Mode::Refer, disk: disk.clone(), known, ..Plan::plain(1) };
            idle::send(&source, port, plan).unwrap();
            receiving.join().unwrap().unwrap();
        });
        let heard = heard.lock().unwrap();
        let lane =
            heard.iter().find(|stream| stream.get(HELLO_BYTES..).is_some_and(|s| s.starts_with(&MAGIC)));
        references(lane.unwrap(), pages)
    };
    let (first, second) = (once(), once());
    let both: Vec<_> = first.iter().filter_map(|(pfn, one)| Some((one, second.get(pfn)?))).collect();
    assert!(both.len() > 100, "{} and {} references", first.len(), second.len());
    assert!(both.iter().all(|(one, other)| one.0 == other.0 && one.1 != other.1));
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
