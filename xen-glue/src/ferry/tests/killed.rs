//! The target's worker is killed with `kill -9` while pages are outstanding, and another process goes on in its place. The worker is
//! a process of its own, this test once more; the guest's memory, and what the hypervisor knows of its pages, are in files that
//! outlive it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};

use mover::memory::Mapping;
use mover::wire::hello::MigrationId;
use rustix::io::dup;
use rustix::process::{Signal, getpid, kill_process};

use super::overwritten::{ENOUGH, FIRST, Overwritten, PAGES, SHELVED, is_gone, overwritten};
use super::*;
use crate::abi::process::take_over as descriptors;
use crate::domain::Orphaned;
use crate::ferry::{Return, Shelves, take_over};
use crate::simulated::{Flags, SimHold, mapped, memory_file};
use crate::standby::{Guard, make_table, map_table, take_terms, wait_armed};

/// Says to a process of this test that it is the worker, where it is to be killed, and its descriptors.
const WORKER: &str = "PAGEFERRY_TEST_WORKER";
const PORT: u32 = 77;

/// Where the worker is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// It has said that it is there no more for the toolstack; nobody has touched a page.
    Restart,
    /// A page has been loaded, or sent, and the guest does not have it yet.
    Loaded,
    /// The guest has it, and nobody has been told.
    PagedIn,
    /// The toolstack does not know that the guest is restored.
    Early,
}

fn was_killed(how: ExitStatus) -> bool {
    how.signal() == Some(9)
}

fn die() {
    kill_process(getpid(), Signal::KILL).unwrap();
    std::thread::sleep(REDIAL_FOR);
}

/// What both processes have.
struct Shared {
    memory: OwnedFd,
    held: OwnedFd,
    table: OwnedFd,
}

impl Shared {
    fn new() -> Self {
        let held = memory_file(Flags::pages(PAGES));
        Self { memory: memory_file(PAGES), held, table: make_table(u64_of(PAGES)).unwrap() }
    }
    fn memory(&self) -> Arc<Mapping> {
        mapped(&self.memory, PAGES)
    }
    fn held(&self) -> Arc<Mapping> {
        mapped(&self.held, Flags::pages(PAGES))
    }
    fn table(&self) -> Arc<Mapping> {
        map_table(&self.table, u64_of(PAGES)).unwrap()
    }
}

/// The worker; of the test itself there is nothing to be done.
#[test]
fn the_worker() {
    let Ok(told) = std::env::var(WORKER) else { return };
    let (at, numbers) = told.split_once(' ').unwrap();
    let numbers: Vec<i32> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
    let [stream, socket, memory, held, table] = descriptors(<[i32; 5]>::try_from(numbers).unwrap()).unwrap();
    let shared = Shared { memory, held, table };
    let (target, _landed) = SimTarget::over(shared.memory(), shared.held());
    let hold = &target.hold;
    *hold.slow.lock().unwrap() = FIRST..FIRST + SHELVED;
    let guard = Guard::over(UnixStream::from(socket), shared.table(), PORT);
    assert!(hold.table.set(guard.table()).is_ok() && hold.guard.set(Arc::new(guard)).is_ok());
    let strike = match at {
        "Loaded" => Some(&hold.at_release),
        "PagedIn" => Some(&hold.behind_release),
        _ => None,
    };
    if let Some(strike) = strike {
        *strike.lock().unwrap() = Some(Box::new(|_| die()));
    }
    // The source's end is in another process.
    let lingering = Arc::clone(hold.lingering.get_or_init(|| Arc::new(AtomicU32::new(1))));
    let mut toolstack = Doomed { at, inner: SimToolstack { lingering, ..SimToolstack::default() } };
    let options = restore::Options { dial_back: true, redial_for: REDIAL_FOR, ..restore::Options::default() };
    let _ = restore::run(target, stream.as_fd(), &WIRING, &options, &mut toolstack, &AtomicBool::new(false));
}

/// A toolstack whose worker does not live long.
struct Doomed<'a> {
    at: &'a str,
    inner: SimToolstack,
}

impl restore::Toolstack for Doomed<'_> {
    fn static_data_done(&mut self, missing: u32) -> std::io::Result<bool> {
        restore::Toolstack::static_data_done(&mut self.inner, missing)
    }
    fn lingers(&mut self, left: super::super::Lingering) -> Result<(), String> {
        match self.at {
            "Early" => die(),
            "Restart" => {
                assert_eq!(left.arm(), None);
                die();
            }
            _ => {}
        }
        restore::Toolstack::lingers(&mut self.inner, left)
    }
    fn report(&mut self, event: &restore::Event<'_>) {
        restore::Toolstack::report(&mut self.inner, event);
    }
}

/// Starts the worker, which reads from `stream`.
fn worker(at: At, shared: &Shared, stream: &OwnedFd, socket: &UnixStream) -> Child {
    let all =
        [stream.as_fd(), socket.as_fd(), shared.memory.as_fd(), shared.held.as_fd(), shared.table.as_fd()];
    // Copies get through exec.
    let all = all.map(|descriptor| dup(descriptor).unwrap());
    let numbers: Vec<String> = all.iter().map(|descriptor| descriptor.as_raw_fd().to_string()).collect();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ferry::tests::killed::the_worker", "--nocapture"])
        .env(WORKER, format!("{at:?} {}", numbers.join(" ")))
        .spawn()
        .unwrap()
}

/// What has become of it.
struct Fate {
    died: ExitStatus,
    /// Pages that were outstanding when the worker had ended, and those of them that only the source had.
    outstanding: (usize, usize),
    /// What the standby has said, if it was to go on.
    said: Option<(Result<String, String>, Vec<String>)>,
    hold: Arc<SimHold>,
}

/// The standby: waits for the worker's end, and goes on.
fn stand_by(mut worker: Child, shared: &Shared, socket: &UnixStream, sees_disks: bool) -> Fate {
    let died = worker.wait().unwrap();
    let hold = SimHold::over(shared.memory(), shared.held());
    let held = hold.holds();
    let outstanding = (held.len(), held.iter().filter(|pfn| is_gone(**pfn)).count());
    // Where nothing was outstanding by chance it has ended well.
    let terms = take_terms(socket).filter(|_| was_killed(died));
    let said = terms.filter(|_| wait_armed(socket)).map(|terms| {
        assert_eq!((terms.port, terms.shape.pages), (PORT, u64_of(PAGES)));
        assert!(hold.table.set(shared.table()).is_ok());
        let named = if sees_disks { &terms.shape.disks[..] } else { &[] };
        let shelves = Shelves::open(named);
        let guest = Orphaned { memory: hold.memory(), held: hold.begin() };
        let how = Return { credentials: None, redial_for: REDIAL_FOR };
        let migration = MigrationId(terms.offer.migration);
        let left = take_over(terms, how, guest, shelves).unwrap();
        assert_eq!(left.migration, migration);
        let mut notices = Vec::new();
        let outcome = left.finish(|event| {
            if let Told::Notice { text, .. } = event {
                notices.push(text.clone());
            }
        });
        (outcome, notices)
    });
    Fate { died, outstanding, said, hold }
}

struct Passage {
    saved: Result<Summary, SaveError>,
    fate: Fate,
    guest: Rc<RefCell<Guest>>,
    shared: Shared,
    lingered: Vec<String>,
}

/// Moves a guest to a worker that is killed there. Half of the blocks are overwritten when the guest is stopped.
fn passage(at: At, sees_disks: bool) -> Passage {
    let Overwritten { guest, plan, mut toolstack, _directory } = overwritten();
    toolstack.guest = Some(Rc::clone(&guest));
    let brief = at == At::Early;
    let redial_for = if brief { Duration::from_secs(1) } else { REDIAL_FOR };
    let plan = Plan { redial_for, ..plan };
    let shared = Shared::new();
    let (stream, into) = pipe();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let worker = worker(at, &shared, &stream, &theirs);
    drop((stream, theirs));
    let (saved, fate) = std::thread::scope(|scope| {
        let standby = scope.spawn(|| stand_by(worker, &shared, &ours, sees_disks));
        let (options, stop) = (options(Some(plan)), AtomicBool::new(false));
        let saved = save::run(SimSource::new(&guest), into.as_fd(), &options, &mut toolstack, &stop);
        drop(into);
        (saved, standby.join().unwrap())
    });
    Passage { saved, fate, guest, shared, lingered: toolstack.lingered }
}

/// As above, until enough was outstanding: how much that is, is chance.
fn goes_on(at: At, sees_disks: bool) {
    for _ in 0..20 {
        let Passage { saved, fate, guest, shared, lingered } = passage(at, sees_disks);
        if !was_killed(fate.died) {
            continue;
        }
        let (outcome, notices) = fate.said.expect("it was armed");
        outcome.unwrap_or_else(|error| panic!("{at:?}: {error}, {notices:#?}"));
        saved.unwrap_or_else(|error| panic!("{at:?}: {error}, {lingered:#?}"));
        let memory = shared.memory();
        for pfn in (0..PAGES).map(Pfn::at) {
            let same = read(guest.borrow().memory.page(pfn)) == read(memory.page(pfn));
            assert!(same, "{at:?}: {pfn} of {:?} is another one", fate.outstanding);
        }
        assert!(fate.hold.finished.load(Ordering::SeqCst) && !fate.hold.stopped.load(Ordering::SeqCst));
        if fate.outstanding.1 >= ENOUGH && fate.outstanding.0 >= 2 * ENOUGH {
            assert!(notices.iter().any(|line| line.contains("the source is there again")), "{notices:#?}");
            return;
        }
    }
    panic!("too little was outstanding in all of the trips");
}

#[test]
fn a_worker_killed_before_the_first_fault_is_replaced() {
    goes_on(At::Restart, true);
}

#[test]
fn a_worker_killed_with_a_page_in_its_hands_is_replaced() {
    goes_on(At::Loaded, true);
}

#[test]
fn a_worker_killed_between_page_and_answer_is_replaced() {
    goes_on(At::PagedIn, true);
}

/// The source has every page that is outstanding.
#[test]
fn a_standby_that_can_read_no_disk_asks_the_source() {
    goes_on(At::Loaded, false);
}

/// The toolstack hears that the restore has failed, and destroys the domain.
#[test]
fn a_worker_killed_before_the_toolstack_knows_is_not_replaced() {
    let fate = (0..20).map(|_| passage(At::Early, true).fate).find(|fate| was_killed(fate.died));
    let fate = fate.expect("pages are outstanding in one of the trips");
    assert!(fate.said.is_none(), "nobody may serve a guest that is to be destroyed");
}
