//! Guests in processes of their own, engines that attach, misbehave and die.
//!
//! This test binary is its own guest and engine: it starts itself again with one of the `child_*` tests, which do
//! nothing unless the environment says what they are to be.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::client::GuestClient;
use super::config::GuestConfig;
use super::control::{FaultFd, Phase, Role, Status};
use super::inside::tests::test_image;
use super::launch::{self, GuestHandle};
use crate::memory::{Mapping, PageBuf};
use crate::units::{Pfn, usize_of};

const CHILD: &str = "PAGEFERRY_TEST_CHILD";

fn myself(test: &str, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("process::tests::{test}"), "--exact", "--nocapture"]).env(CHILD, what);
    command
}

#[test]
fn child_guest() {
    if std::env::var_os(CHILD).is_some_and(|what| what == "guest") {
        if let Err(e) = launch::run_spawned(&AtomicBool::new(false)) {
            eprintln!("{e}");
            std::process::exit(1);
        }
        std::process::exit(0);
    }
}

#[test]
fn child_engine() {
    let Some(what) = std::env::var(CHILD).ok().filter(|what| what.starts_with("engine ")) else { return };
    let mut words = what.split(' ').skip(1);
    let client = GuestClient::connect(Path::new(words.next().unwrap())).unwrap();
    for word in words {
        match word {
            "source" => drop(client.attach(Role::Source, "the child's").unwrap()),
            "target" => drop(client.attach(Role::Target, "the child's").unwrap()),
            "pause" => client.pause().unwrap(),
            "release" => client.release().unwrap(),
            "throttle" => client.throttle(5).unwrap(),
            other => panic!("{other}"),
        }
    }
    println!("engine is there");
    std::thread::sleep(Duration::from_secs(60));
}

/// An engine in a process of its own that has done what `words` say.
fn engine(guest: &GuestHandle, words: &str) -> Child {
    let mut child = myself("child_engine", &format!("engine {} {words}", guest.socket.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = std::io::BufReader::new(child.stdout.take().unwrap());
    let there = std::io::BufRead::lines(out).any(|line| line.unwrap().contains("engine is there"));
    assert!(there, "the engine gave up");
    child
}

fn config(dir: &Path, name: &str, image: Option<PathBuf>) -> GuestConfig {
    let workload = if image.is_some() { "file-copy" } else { "memory-hog" };
    GuestConfig {
        disks: image.into_iter().collect(),
        workload: workload.to_owned(),
        runtime_dir: dir.join("run"),
        ..GuestConfig::new(name, 32 << 20)
    }
}

fn spawn(config: &GuestConfig) -> GuestHandle {
    launch::spawn(myself("child_guest", "guest"), config).unwrap()
}

fn until(guest: &GuestHandle, what: &str, mut reached: impl FnMut(&Status) -> bool) -> Status {
    let begun = Instant::now();
    loop {
        let status = guest.connect().unwrap().status().unwrap();
        if reached(&status) {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "never {what}: {status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn through(guest: &mut GuestHandle) {
    let begun = Instant::now();
    while guest.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(30), "guest {} does not end", guest.pid);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ended(mut guest: GuestHandle) {
    through(&mut guest);
    assert!(!guest.socket.exists(), "its socket is gone");
    assert!(!guest.log.exists(), "its log is gone");
}

#[test]
fn a_killed_source_engine_leaves_a_running_guest() {
    let dir = tempfile::tempdir().unwrap();
    let guest = spawn(&config(dir.path(), "a", None));
    for (words, phase) in [("source pause", Phase::Paused), ("source throttle", Phase::Running)] {
        let mut engine = engine(&guest, words);
        let with = until(&guest, "attached", |status| status.phase == phase);
        assert_eq!(with.migration.as_deref(), Some("the child's"));
        if phase == Phase::Paused {
            let before = guest.connect().unwrap().status().unwrap().work;
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(guest.connect().unwrap().status().unwrap().work, before, "paused is paused");
        }
        let second = guest.connect().unwrap();
        let said = second.attach(Role::Source, "mine").unwrap_err().to_string();
        assert!(said.contains("the child's"), "{said}");
        engine.kill().unwrap();
        engine.wait().unwrap();
        let after = until(&guest, "let go", |status| status.migration.is_none());
        assert_eq!((after.phase, after.throttle_percent), (Phase::Running, 100));
        until(&guest, "working", |status| status.work.operations > after.work.operations);
    }
    // A released one stays paused, and can be taken back.
    let mut engine = engine(&guest, "source pause release");
    engine.kill().unwrap();
    engine.wait().unwrap();
    until(&guest, "let go", |status| status.migration.is_none() && status.phase == Phase::Released);
    let client = guest.connect().unwrap();
    client.attach(Role::Source, "again").unwrap();
    client.reclaim().unwrap();
    client.resume().unwrap();
    client.pause().unwrap();
    client.release().unwrap();
    assert_eq!(client.check().unwrap().wrong_pages, 0);
    client.destroy().unwrap();
    ended(guest);
}

#[test]
fn a_guest_that_was_given_up_may_come_back_at_once_under_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "z", None);
    let mut before: Option<GuestHandle> = None;
    for _ in 0..5 {
        let guest = spawn(&config);
        // The end of the one before takes nothing of this one's with it.
        before.iter_mut().for_each(through);
        let client = guest.connect().unwrap();
        assert!(guest.socket.exists() && guest.log.exists());
        client.attach(Role::Source, "away").unwrap();
        client.pause().unwrap();
        client.release().unwrap();
        client.destroy().unwrap();
        before = Some(guest);
    }
    before.into_iter().for_each(ended);
    assert_eq!(std::fs::read_dir(config.runtime_dir).unwrap().count(), 0);
}

/// A guest that has just come is moved on by a program that starts when the one before it has ended.
#[test]
fn who_attaches_right_behind_another_is_not_taken_for_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let guest = spawn(&config(directory.path(), "busy", None));
    for time in 0..500 {
        let engine = guest.connect().unwrap();
        engine.attach(Role::Source, "one after the other").unwrap_or_else(|error| panic!("{time}: {error}"));
    }
    let held = guest.connect().unwrap();
    held.attach(Role::Source, "the one").unwrap();
    let Err(refused) = guest.connect().unwrap().attach(Role::Source, "another") else { panic!("it is held") };
    assert!(refused.to_string().contains("(the one) has this guest already"), "{refused}");
    drop(held);
    guest.connect().unwrap().destroy().unwrap();
    ended(guest);
}

#[test]
fn an_incoming_guest_ends_with_its_engine_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let guest = spawn(&GuestConfig { incoming: true, ..config(dir.path(), "b", None) });
    let mut engine = engine(&guest, "target");
    assert_eq!(until(&guest, "there", |_| true).phase, Phase::Incoming);
    engine.kill().unwrap();
    engine.wait().unwrap();
    ended(guest);
    let alone =
        GuestConfig { incoming: true, attach_within_seconds: Some(0), ..config(dir.path(), "c", None) };
    let mut alone = spawn(&alone);
    assert!(!alone.wait().unwrap().success());
    assert!(std::fs::read_to_string(&alone.log).unwrap().contains("no migration has come"));
    std::fs::remove_file(&alone.log).unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("run")).unwrap().count(), 0);
}

/// Moves `from` into a new incoming guest by copying all of memory while it is paused.
fn move_over(from: &GuestHandle, to: &GuestHandle) {
    let (source, target) = (from.connect().unwrap(), to.connect().unwrap());
    let here = source.attach(Role::Source, "m").unwrap();
    let there = target.attach(Role::Target, "m").unwrap();
    assert!(there.info.fault_fd != FaultFd::Full || there.fault_fd.is_ok());
    source.pause().unwrap();
    let bytes = usize_of(here.info.memory_bytes);
    let (out, into) = (
        Mapping::shared(here.memory.as_fd(), bytes, false).unwrap(),
        Mapping::shared(there.memory.as_fd(), bytes, false).unwrap(),
    );
    let mut page = PageBuf::zeroed();
    for pfn in (0..out.pages().0).map(Pfn) {
        if !out.page(pfn).is_zero() {
            out.page(pfn).copy_to(&mut page);
            into.page(pfn).copy_from(&page);
        }
    }
    let state = source.save_state().unwrap();
    let done = source.status().unwrap().work;
    target.load_state(&state).unwrap();
    source.release().unwrap();
    target.start(false).unwrap();
    source.destroy().unwrap();
    assert!(target.status().unwrap().work.operations >= done.operations);
}

#[test]
fn a_guest_moved_by_hand_goes_on_and_finds_itself_right() {
    let dir = tempfile::tempdir().unwrap();
    let image = test_image(dir.path());
    let mut old = spawn(&GuestConfig { vcpus: 2, ..config(dir.path(), "hop-0", Some(image.clone())) });
    for hop in 1..3 {
        std::thread::sleep(Duration::from_millis(300));
        let name = format!("hop-{hop}");
        let new = spawn(&GuestConfig { incoming: true, ..config(dir.path(), &name, Some(image.clone())) });
        move_over(&old, &new);
        ended(old);
        let there = until(&new, "let go", |status| status.migration.is_none());
        assert_eq!((there.phase, there.workload.as_str()), (Phase::Running, "file-copy"));
        until(&new, "copying on", |status| status.work.written_bytes > there.work.written_bytes + (1 << 20));
        let checked = new.connect().unwrap().check().unwrap();
        assert!(checked.pages_checked > 8000 && checked.full_checks > 0);
        assert_eq!((checked.wrong_pages, checked.first_wrong.len()), (0, 0), "{:?}", checked.first_wrong);
        assert!(checked.access.quantile_ns(0.5).is_some());
        old = new;
    }
    // A page changed from outside is found by the guest itself, without being asked.
    let client = old.connect().unwrap();
    let attachment = client.attach(Role::Source, "vandal").unwrap();
    let memory = Mapping::shared(attachment.memory.as_fd(), 32 << 20, false).unwrap();
    let last = (0..memory.pages().0).rev().map(Pfn).find(|pfn| !memory.page(*pfn).is_zero()).unwrap();
    drop(attachment);
    memory.page(last).copy_from(&PageBuf([3; 4096]));
    let seen = until(&old, "found", |status| status.wrong_pages > 0);
    assert_eq!(seen.first_wrong[0].pfn, last.0, "{:?}", seen.first_wrong);
    assert!(std::fs::read_to_string(&old.log).unwrap().contains("WRONG PAGE"));
    drop(client);
    old.kill().unwrap();
}

#[test]
fn a_guest_that_can_not_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "d", None);
    let refused = |config: &GuestConfig, word: &str| {
        let said = launch::spawn(myself("child_guest", "guest"), config).unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
    };
    refused(&GuestConfig { disks: vec![dir.path().join("none.img")], ..good.clone() }, "Make one with");
    refused(&GuestConfig { workload: "work-life-balance".into(), ..good.clone() }, "remote-desktop");
    refused(&GuestConfig { workload: "video".into(), ..good.clone() }, "Give it a larger image");
    refused(&GuestConfig { memory_bytes: 1 << 20, ..good.clone() }, "multiple of 2M");
    let mut guest = spawn(&good);
    refused(&good, "already running");
    assert_eq!(until(&guest, "unharmed", |_| true).phase, Phase::Running);
    // Killed, it leaves its socket behind; the next one takes its place.
    guest.kill().unwrap();
    assert!(guest.socket.exists());
    let next = spawn(&good);
    next.connect().unwrap().destroy().unwrap();
    ended(next);
}

#[test]
fn garbage_on_the_socket_gets_a_sentence_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let guest = spawn(&config(dir.path(), "e", None));
    let address = rustix::net::SocketAddrUnix::new(&guest.socket).unwrap();
    for garbage in [&b"\xff\xfe"[..], b"{}", b"{\"request\":\"pause\"", &[b' '; 100_000]] {
        let kind = rustix::net::SocketType::SEQPACKET;
        let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        rustix::net::send(&socket, garbage, rustix::net::SendFlags::empty()).unwrap();
        let mut answer = [0; 4096];
        let (read, _) = rustix::net::recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty()).unwrap();
        let said = String::from_utf8_lossy(&answer[..read]).into_owned();
        assert!(said.contains("failed") && said.contains("pageferry of this version"), "{said}");
    }
    let client = guest.connect().unwrap();
    assert!(client.pause().unwrap_err().to_string().contains("attach first"));
    client.destroy().unwrap();
    ended(guest);
}

#[test]
fn a_guest_lives_on_when_its_disk_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let image = test_image(dir.path());
    // One that only reads: writes would make the image longer again.
    let mut guest =
        spawn(&GuestConfig { workload: "video".to_owned(), ..config(dir.path(), "f", Some(image.clone())) });
    std::fs::File::options().write(true).open(&image).unwrap().set_len(4096).unwrap();
    until(&guest, "noticing", |status| status.work.disk_errors > 3);
    assert!(std::fs::read_to_string(&guest.log).unwrap().contains("has shrunk"));
    let client = guest.connect().unwrap();
    assert_eq!(client.check().unwrap().wrong_pages, 0);
    client.destroy().unwrap();
    guest.wait().unwrap();
}
