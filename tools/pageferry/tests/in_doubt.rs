//! A link cut just as the guest changes hands, and an end killed: neither end knows what the other did, the guest runs
//! nowhere twice, and `pageferry resolve` settles it (invariant 3).

mod host;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, LIMIT, end, said};

/// How long a short message stays on the wire in the slow direction: long enough to cut it off there.
const DELAY: Duration = Duration::from_millis(400);
/// A read of fewer bytes is no page data.
const SHORT: usize = 8 * 1024;

/// Which way the wire is slow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slow {
    ToTarget,
    ToSource,
}

/// A wire between the ends that can be cut while a message is on it.
struct Wire {
    address: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Nothing comes out of the slow direction any more.
    held: AtomicBool,
    cut: AtomicBool,
}

impl Wire {
    fn to(target: &str, slow: Slow) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let (state, target) = (Arc::new(State::default()), target.to_owned());
        let there = Arc::clone(&state);
        thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                if there.cut.load(SeqCst) {
                    return;
                }
                let to = TcpStream::connect(&target).expect("the target listens");
                let again =
                    || (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
                let (one, other) = (again(), again());
                let state = Arc::clone(&there);
                thread::spawn(move || carry(one.0, one.1, slow == Slow::ToTarget, &state));
                let state = Arc::clone(&there);
                thread::spawn(move || carry(other.1, other.0, slow == Slow::ToSource, &state));
            }
        });
        Self { address, state }
    }
}

/// Carries bytes one way until either end, or the wire, is gone.
fn carry(mut from: TcpStream, mut to: TcpStream, slow: bool, state: &State) {
    let mut buffer = vec![0; 64 * 1024];
    from.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
    while !state.cut.load(SeqCst) {
        let bytes = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        };
        if slow && bytes < SHORT {
            thread::sleep(DELAY);
        }
        while slow && state.held.load(SeqCst) && !state.cut.load(SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        if state.cut.load(SeqCst) || to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    // Either end may have gone before.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Waits until a record in `state` says `word`.
fn until_recorded(state: &Path, word: &str) {
    let began = Instant::now();
    let says = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.contains(word));
    loop {
        let records = fs::read_dir(state.join("pageferry/migrations"));
        if records.is_ok_and(|found| found.flatten().any(|entry| says(&entry.path()))) {
            return;
        }
        assert!(began.elapsed() < LIMIT, "no record ever said {word}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until `guest` is not listed any more: it is told to end, and ends.
fn until_gone(host: &Host, guest: &str) {
    let began = Instant::now();
    while host.must(&["guest", "list", "--quiet"]).lines().any(|line| line.starts_with(guest)) {
        assert!(began.elapsed() < LIMIT, "{guest} is still here");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until `guest` runs.
fn until_running(host: &Host, guest: &str) {
    let began = Instant::now();
    while !host.runs(guest) {
        assert!(began.elapsed() < LIMIT, "{guest} does not run");
        thread::sleep(Duration::from_millis(5));
    }
}

fn address_of(line: &str) -> &str {
    let mut words = line.split_whitespace().skip_while(|word| *word != "--to");
    words.nth(1).expect("an address")
}

/// Migrates `desk` and cuts the wire once the records of `watched` say `word` and `then` has returned, killing the target
/// with it. Returns the migration's number.
fn lose(host: &Host, slow: Slow, watched: &str, word: &str, then: impl FnOnce()) -> String {
    let mut receive = host.command();
    receive.env("XDG_STATE_HOME", host.path("state-there"));
    let (mut target, line) = host.receive_by(receive, &[]);
    let wire = Wire::to(address_of(&line), slow);
    let sent = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            host.send(&line, |line| {
                let line = line.replace(address_of(line), &wire.address);
                format!("{line} --mode plain --redial-for 1s")
            })
        });
        until_recorded(&host.path(watched), word);
        wire.state.held.store(true, SeqCst);
        then();
        target.kill().expect("it runs");
        wire.state.cut.store(true, SeqCst);
        sending.join().expect("no panic")
    });
    end(target);
    assert_eq!(sent.status.code(), Some(9), "{}", said(&sent));
    assert!(said(&sent).contains("pageferry resolve"), "{}", said(&sent));
    let record = host.must(&["resolve", "--json"]);
    let record: serde_json::Value = serde_json::from_str(&record).expect("one JSON object");
    assert_eq!((record["role"].as_str(), record["entry"].as_str()), (Some("source"), Some("committed")));
    record["migration"].as_str().expect("a number").to_owned()
}

#[test]
fn a_commit_that_never_arrived_is_taken_back() {
    let Some(host) = Host::new() else { return };
    let migration = lose(&host, Slow::ToTarget, "state", "committed", || {});
    assert!(!host.runs("desk"), "given up: it must not run before the other end has been asked");
    assert!(!host.runs("moved"), "never started");
    let wrong = host.run(&["resolve", "ffffffff", "--here"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", said(&wrong));
    host.must(&["resolve", &migration[..8], "--here"]);
    assert!(host.runs("desk"));
    assert!(host.must(&["guest", "check", "desk"]).contains("none wrong"));
    assert!(host.must(&["resolve", "--quiet"]).is_empty(), "settled");
}

#[test]
fn a_start_that_was_never_confirmed_is_settled_for_the_target() {
    let Some(host) = Host::new() else { return };
    // The record comes first: killed in between, the target would leave no guest.
    let migration = lose(&host, Slow::ToSource, "state-there", "started", || until_running(&host, "moved"));
    assert!(!host.runs("desk"), "it runs there");
    let there = host.command().env("XDG_STATE_HOME", host.path("state-there")).arg("resolve").output();
    let there = there.expect("the program starts");
    assert!(String::from_utf8_lossy(&there.stdout).contains("started here"), "{}", said(&there));
    host.must(&["resolve", &migration, "--there"]);
    until_gone(&host, "desk");
    assert!(host.must(&["resolve", "--quiet"]).is_empty(), "settled");
    assert!(host.runs("moved"));
    assert!(host.must(&["guest", "check", "moved"]).contains("none wrong"));
}
