//! A guest process that does what a test tells it: the control protocol with its rules, and nothing of its own will.
//!
//! It is this test binary again, running [`child`] alone. Orders come as lines on a stream socket, a connection a
//! thread, so that one that waits for a page keeps no other from going on.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::kernel::uffd::tests::pread_into;
use crate::kernel::uffd::{self, Reach};
use crate::memory::{Mapping, PageBuf};
use crate::process::client::GuestClient;
use crate::process::control::{Attached, FaultFd, GuestDisk, Phase, Reply, Request, Role};
use crate::process::life::{Grant, Life, Machinery};
use crate::process::packet;
use crate::process::shared::{SharedGate, SharedWriteLog};
use crate::units::{DiskId, PAGE_BYTES, Pfn, u64_of, usize_of};

const DIR: &str = "PAGEFERRY_TEST_DIR";
const WHAT: &str = "PAGEFERRY_TEST_WHAT";
const DISK_BYTES: u64 = 1000 * 4096;

/// A child of this test binary; killed when dropped.
pub(super) struct Own(pub(super) Child);

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Own {
    /// Runs the ignored test called `test` in a process of its own, with a directory and a word to go by.
    pub(super) fn start(test: &str, dir: &Path, what: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("process::backend::tests::{test}"), "--exact", "--ignored", "--nocapture"])
            .env(DIR, dir)
            .env(WHAT, what)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

/// The directory and the word a child goes by; `None` in a process that is nobody's child.
pub(super) fn orders() -> Option<(PathBuf, String)> {
    Some((std::env::var_os(DIR)?.into(), std::env::var(WHAT).ok()?))
}

/// The parent's end of a puppet.
pub(super) struct Puppet {
    pub(super) process: Own,
    pub(super) dir: tempfile::TempDir,
}

/// One thread of a puppet.
pub(super) struct Thread {
    orders: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Puppet {
    /// One with `pages` of memory; `phase` is "running", "incoming" or "prefaulted" (running, all pages written).
    pub(super) fn new(pages: u64, phase: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = Own::start("puppet::child", dir.path(), &format!("{pages} {phase}"));
        wait_for(&dir.path().join("ready"));
        Self { process, dir }
    }
    pub(super) fn client(&self) -> GuestClient {
        GuestClient::connect(&self.dir.path().join("control")).unwrap()
    }
    pub(super) fn thread(&self) -> Thread {
        let orders = UnixStream::connect(self.dir.path().join("orders")).unwrap();
        let answers = BufReader::new(orders.try_clone().unwrap());
        Thread { orders, answers }
    }
    /// One order on a thread of its own.
    pub(super) fn ask(&self, order: &str) -> String {
        self.thread().ask(order)
    }
    pub(super) fn write(&self, page: u64, word: u64) {
        assert_eq!(self.ask(&format!("write {page} {word}")), "done");
    }
    pub(super) fn read(&self, page: u64) -> u64 {
        self.ask(&format!("read {page}")).parse().unwrap()
    }
    /// Whether its memory is watched in the way that shows as `flag` in smaps ("uw": writes, "um": missing pages).
    pub(super) fn is_watched(&self, flag: &str) -> bool {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.process.0.id())).unwrap();
        smaps.lines().filter(|l| l.starts_with("VmFlags:")).any(|l| l.split(' ').any(|f| f == flag))
    }
}

impl Thread {
    pub(super) fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }
    pub(super) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
    pub(super) fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.answer()
    }
    /// Whether nothing has been answered for a while.
    pub(super) fn is_silent(&self) -> bool {
        self.orders.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let silent = rustix::net::recv(&self.orders, &mut [0; 1], rustix::net::RecvFlags::PEEK).is_err();
        self.orders.set_read_timeout(None).unwrap();
        silent
    }
}

/// Waits until a child has made this file.
pub(super) fn wait_for(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the child never made {}", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Guest {
    memory_file: OwnedFd,
    memory: Mapping,
    writes: (SharedWriteLog, OwnedFd),
    gate: (SharedGate, OwnedFd),
    rules: Mutex<(Life, Option<OwnedFd>)>,
}

struct NoMachine;

impl Machinery for NoMachine {
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn resume(&mut self) {}
    fn save(&mut self) -> Result<Vec<u8>, String> {
        Ok(vec![1])
    }
    fn load(&mut self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn start(&mut self, _: bool) {}
    fn throttle(&mut self, _: u8) {}
    fn holds_done(&mut self) {}
}

#[test]
#[ignore = "the process that other tests start as their guest"]
fn child() {
    let Some((dir, what)) = orders() else { return };
    let (pages, phase) = what.split_once(' ').unwrap();
    let bytes = pages.parse::<u64>().unwrap() * 4096;
    let memory_file = rustix::fs::memfd_create("puppet", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory_file, bytes).unwrap();
    let memory = Mapping::shared(memory_file.as_fd(), usize_of(bytes), phase == "prefaulted").unwrap();
    let began = if phase == "incoming" { Phase::Incoming } else { Phase::Running };
    let guest = Arc::new(Guest {
        memory_file,
        memory,
        writes: SharedWriteLog::create(&[DISK_BYTES]).unwrap(),
        gate: SharedGate::create(&[DISK_BYTES]).unwrap(),
        rules: Mutex::new((Life::new(began), None)),
    });
    let control =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&control, &SocketAddrUnix::new(dir.join("control")).unwrap()).unwrap();
    rustix::net::listen(&control, 8).unwrap();
    let orders = UnixListener::bind(dir.join("orders")).unwrap();
    let for_control = Arc::clone(&guest);
    std::thread::spawn(move || {
        for number in 0.. {
            let connection = rustix::net::accept_with(&control, SocketFlags::CLOEXEC).unwrap();
            let guest = Arc::clone(&for_control);
            std::thread::spawn(move || guest.converse(number, &connection));
        }
    });
    File::create(dir.join("ready")).unwrap();
    for stream in orders.incoming() {
        let (stream, guest) = (stream.unwrap(), Arc::clone(&guest));
        std::thread::spawn(move || {
            let mut answers = stream.try_clone().unwrap();
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let words: Vec<&str> = line.split(' ').collect();
                writeln!(answers, "{}", guest.obey(&words)).unwrap();
            }
        });
    }
}

impl Guest {
    fn obey(&self, words: &[&str]) -> String {
        let number = |n: usize| words[n].parse::<u64>().unwrap();
        match words[0] {
            "read" => {
                let mut copy = PageBuf::zeroed();
                self.memory.page(Pfn(number(1))).copy_to(&mut copy);
                let first = u64::from_le_bytes(copy.0[..8].try_into().unwrap());
                if copy.0 == page_of(first).0 { first.to_string() } else { "torn".to_owned() }
            }
            "write" => {
                self.memory.page(Pfn(number(1))).copy_from(&page_of(number(2)));
                "done".to_owned()
            }
            "touch" => {
                // Every n-th page.
                for page in (0..self.memory.pages().0).step_by(usize_of(number(1))) {
                    self.memory.page(Pfn(page)).mark_written();
                }
                "done".to_owned()
            }
            // Counts up in one page after the other, on this writer's half of them.
            "count" => {
                for n in 1..=number(2) {
                    let pages = self.memory.pages().0 / 2;
                    self.memory.page(Pfn(n * 7 % pages * 2 + number(1))).copy_from(&page_of(n));
                }
                "done".to_owned()
            }
            // Reads pages `from..to` in an order of its own; each must hold its number and 1.
            "sweep" => {
                let (from, pages) = (number(1), number(2) - number(1));
                let wrong: Vec<String> = (0..pages)
                    .map(|n| from + (n * 211 + number(3)) % pages)
                    .filter_map(|page| {
                        let found = self.obey(&["read", &page.to_string()]);
                        (found != (page + 1).to_string()).then(|| format!("page {page}: {found}"))
                    })
                    .collect();
                if wrong.is_empty() { "done".to_owned() } else { wrong.join(", ") }
            }
            "direct" => {
                let file = rustix::fs::open(
                    words[2],
                    rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT,
                    rustix::fs::Mode::empty(),
                );
                match file {
                    Err(e) => format!("no O_DIRECT: {e}"),
                    Ok(file) => {
                        let page = self.memory.page(Pfn(number(1)));
                        assert_eq!(pread_into(file.as_fd(), page), PAGE_BYTES);
                        "done".to_owned()
                    }
                }
            }
            "disk" => {
                self.writes.0.mark(DiskId(0), number(1));
                "done".to_owned()
            }
            "gate" => self.gate.0.held(DiskId(0), number(1)).to_string(),
            "want" => {
                self.gate.0.want(DiskId(0), number(1));
                "done".to_owned()
            }
            other => panic!("{other}?"),
        }
    }

    fn converse(&self, number: u64, connection: &OwnedFd) {
        while let Ok(Some((request, _))) = packet::receive::<Request>(connection.as_fd()) {
            let mut rules = self.rules.lock().unwrap();
            let (reply, fds) = match rules.0.handle(number, &request, &[1], &mut NoMachine) {
                Err(sentence) => (Reply::Failed { sentence }, Vec::new()),
                Ok(Grant::Attached { again }) => self.attached(&mut rules, &request, again),
                Ok(Grant::End) => std::process::exit(0),
                Ok(_) => {
                    if !rules.0.holding() && matches!(request, Request::HoldsDone | Request::Start { .. }) {
                        rules.1 = None;
                    }
                    (Reply::Done, Vec::new())
                }
            };
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            packet::send(connection.as_fd(), &reply, &fds).unwrap();
        }
        if self.rules.lock().unwrap().0.lost(number, &mut NoMachine) {
            std::process::exit(0);
        }
    }

    fn attached(
        &self,
        rules: &mut (Life, Option<OwnedFd>),
        request: &Request,
        again: bool,
    ) -> (Reply, Vec<OwnedFd>) {
        let (fd, reach) = if again {
            (rules.1.as_ref().unwrap().try_clone().unwrap(), Reach::Everything)
        } else {
            uffd::open().unwrap()
        };
        if matches!(request, Request::Attach { role: Role::Target, .. }) {
            rules.1 = Some(fd.try_clone().unwrap());
        }
        let fault_fd = if reach == Reach::Everything { FaultFd::Full } else { FaultFd::UserModeOnly };
        let info = Attached {
            guest: "puppet".to_owned(),
            memory_bytes: self.memory.pages().bytes().0,
            base_address: u64_of(self.memory.address().as_ptr().addr()),
            pid: std::process::id(),
            vcpus: 1,
            disks: vec![GuestDisk { name: "disk0".to_owned(), path: String::new(), bytes: DISK_BYTES }],
            fault_fd,
            phase: rules.0.phase(),
            kept_bytes: None,
        };
        let pagemap = File::open("/proc/self/pagemap").unwrap().into();
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        let fds = vec![copy(&self.memory_file), pagemap, copy(&self.writes.1), copy(&self.gate.1), fd];
        (Reply::Attached(info), fds)
    }
}

/// A page of one word over and over.
pub(super) fn page_of(word: u64) -> PageBuf {
    let mut page = PageBuf::zeroed();
    for chunk in page.0.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    page
}
