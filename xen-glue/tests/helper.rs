//! The save helper, driven as libxl drives it: control pipes on 0 and 1, the stream on another descriptor, real
//! processes, real signals.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xen_glue::stream::{Reader, Record};

const WAIT_MAX: Duration = Duration::from_secs(60);

/// The example of that name, which cargo builds with the tests.
fn program() -> PathBuf {
    let ourselves = std::env::current_exe().expect("it has a path");
    let place = ourselves.parent().and_then(Path::parent).expect("it lies in target/*/deps");
    let path = place.join("examples/scripted_save_helper");
    assert!(path.exists(), "{} is missing: cargo build -p xen-glue --examples", path.display());
    path
}

struct Helper {
    child: Child,
    to: Option<ChildStdin>,
    from: ChildStdout,
    /// libxl's end of the stream; the other one is the helper's.
    stream: UnixStream,
    /// The helper's end, as libxl still holds it.
    theirs: OwnedFd,
    directory: TempDir,
}

#[derive(Debug, PartialEq)]
struct Said {
    number: u16,
    arguments: Vec<u8>,
}

impl Helper {
    fn start(arguments: &str, script: &str) -> Self {
        Self::start_with(arguments, script, &[])
    }

    /// `arguments` with FD in the place of the stream's number.
    fn start_with(arguments: &str, script: &str, environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (stream, theirs) = UnixStream::pair().expect("a socket pair");
        let theirs = OwnedFd::from(theirs);
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).expect("it is let through exec");
        let number = theirs.as_raw_fd().to_string();
        // libxl leaves signals blocked in what it starts.
        let mut child = Command::new("env")
            .arg("--block-signal=TERM,INT,HUP")
            .arg(program())
            .args(arguments.replace("FD", &number).split(' '))
            .env("SCRIPT", script)
            .env("SCRIPT_MARK", directory.path().join("mark"))
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the helper starts");
        rustix::io::fcntl_setfd(&theirs, FdFlags::CLOEXEC).expect("and not through another");
        let (to, from) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        Self { child, to, from, stream, theirs, directory }
    }

    fn hear(&mut self) -> Option<Said> {
        let mut length = [0; 2];
        self.from.read_exact(&mut length).ok()?;
        let mut body = vec![0; usize::from(u16::from_ne_bytes(length))];
        self.from.read_exact(&mut body).expect("a whole message");
        let number = u16::from_ne_bytes([body[0], body[1]]);
        Some(Said { number, arguments: body.split_off(2) })
    }

    fn say(&mut self, answer: i32) {
        let to = self.to.as_mut().expect("the pipe is open");
        to.write_all(&answer.to_ne_bytes()).expect("the helper hears");
    }

    /// Answers as libxl does when all goes well, until "complete"; everything it heard.
    fn converse(&mut self) -> Vec<Said> {
        let mut heard = Vec::new();
        while let Some(said) = self.hear() {
            match said.number {
                3 => self.say(1),
                7 | 8 | 10 => self.say(0),
                _ => {}
            }
            let last = said.number == 10;
            heard.push(said);
            if last {
                break;
            }
        }
        heard
    }

    fn ended(&mut self) -> ExitStatus {
        self.child.wait().expect("it can be waited for")
    }

    fn mark(&self) -> String {
        fs::read_to_string(self.directory.path().join("mark")).unwrap_or_default()
    }

    /// Waits until the mark has `text`.
    fn await_mark(&self, text: &str) -> String {
        let since = Instant::now();
        loop {
            let mark = self.mark();
            if mark.contains(text) {
                return mark;
            }
            assert!(since.elapsed() < WAIT_MAX, "`{text}` never came into the mark: {mark}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The worker's process, and its session.
    fn worker(&self) -> (Pid, i32) {
        let mark = self.await_mark("began ");
        let mut words = mark.lines().next().expect("a line").split(' ').skip(1);
        let mut number = || words.next().and_then(|word| word.parse::<i32>().ok()).expect("a number");
        (Pid::from_raw(number()).expect("a process"), number())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the helper lives");
    }

    /// Reads what has been written so far, so that the worker comes to wait for room.
    fn await_blocked_write(&mut self) {
        let mut head = [0; 40];
        self.stream.read_exact(&mut head).expect("the headers");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until a process is gone, by itself or as a zombie nobody has waited for yet.
fn await_gone(pid: Pid) {
    let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let since = Instant::now();
    while let Ok(stat) = fs::read_to_string(&path) {
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')) {
            return;
        }
        assert!(since.elapsed() < WAIT_MAX, "process {pid:?} is still there: {stat}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn numbers(heard: &[Said]) -> Vec<u16> {
    heard.iter().map(|said| said.number).collect()
}

fn complete(retval: i32, errno: i32) -> Said {
    Said { number: 10, arguments: [retval.to_ne_bytes(), errno.to_ne_bytes()].concat() }
}

fn log_text(said: &Said) -> String {
    let words = said.arguments[8..].split(|&byte| byte == 0).filter(|word| word.len() > 3);
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect::<Vec<_>>().join("|")
}

const SAVE: &str = "--save-domain FD -1 7 1 136 0";
const RESTORE: &str = "--restore-domain FD -1 7 1 0 2 0 768 0";

#[test]
fn a_save_says_what_libxl_expects_and_nothing_else() {
    let mut helper = Helper::start(SAVE, "");
    let mut copy = helper.stream.try_clone().expect("a copy");
    let reader = std::thread::spawn(move || {
        let mut reader = Reader::start(&mut copy, 0).expect("headers");
        let mut pages = 0;
        loop {
            match reader.next_record().expect("a right record") {
                Record::PageData => {
                    pages += reader.page_entries().len();
                    reader.skip_pages().expect("contents");
                }
                Record::End => return pages,
                _ => {}
            }
        }
    });
    let heard = helper.converse();
    assert_eq!(numbers(&heard), [1, 1, 7, 2, 2, 2, 2, 3, 7, 1, 10]);
    assert!(log_text(&heard[0]).contains("starting save"), "{heard:?}");
    assert_eq!(heard[2].arguments, [7, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(heard[8].arguments, [7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(heard[10], complete(0, 0));
    assert_eq!(helper.ended().code(), Some(0));
    assert_eq!(reader.join().expect("the stream is right"), 256);
    let (worker, session) = helper.worker();
    assert_eq!(worker.as_raw_nonzero().get(), session, "the worker leads a session of its own");
    await_gone(worker);
    let flags = rustix::fs::fcntl_getfl(&helper.theirs).expect("its flags");
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "the stream was made non-blocking");
}

#[test]
fn a_restore_leaves_what_follows_to_libxl() {
    let mut bytes = saved();
    bytes.extend(b"libxl's records");
    let mut helper = Helper::start(RESTORE, "");
    let mut copy = helper.stream.try_clone().expect("a copy");
    let writer = std::thread::spawn(move || copy.write_all(&bytes).expect("it is read"));
    let heard = helper.converse();
    assert_eq!(numbers(&heard), [1, 8, 9, 1, 10]);
    assert_eq!(heard[1].arguments, [3, 0, 0, 0]);
    assert_eq!(heard[2].arguments, [0xfeffcu64.to_ne_bytes(), 0xfefffu64.to_ne_bytes()].concat());
    assert_eq!(heard[4], complete(0, 0));
    assert_eq!(helper.ended().code(), Some(0));
    writer.join().expect("all was taken");
    // What libxl goes on with, on the descriptor it has shared.
    let mut rest = [0; 15];
    assert_eq!(rustix::io::read(helper.theirs.as_fd(), &mut rest[..]).expect("the rest"), 15);
    assert_eq!(&rest, b"libxl's records");
}

/// What a scripted save writes.
fn saved() -> Vec<u8> {
    let mut helper = Helper::start(SAVE, "");
    let mut copy = helper.stream.try_clone().expect("a copy");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        copy.read_to_end(&mut bytes).expect("the stream");
        bytes
    });
    helper.converse();
    assert_eq!(helper.ended().code(), Some(0));
    drop(helper);
    reader.join().expect("the stream was read")
}

#[test]
fn a_restore_of_a_cut_stream_fails_and_says_so() {
    let bytes = saved();
    let mut helper = Helper::start(RESTORE, "");
    let mut copy = helper.stream.try_clone().expect("a copy");
    let writer = std::thread::spawn(move || {
        copy.write_all(&bytes[..bytes.len() / 2]).expect("it is read");
        copy.shutdown(std::net::Shutdown::Write).expect("the end");
    });
    let heard = helper.converse();
    assert_eq!(numbers(&heard), [1, 8, 1, 9, 1, 10]);
    assert!(log_text(&heard[2]).contains("the stream is cut off"), "{}", log_text(&heard[2]));
    assert_eq!(heard[3].arguments, [0; 16]);
    assert_eq!(heard[5], complete(-1, 5));
    assert_eq!(helper.ended().code(), Some(0));
    writer.join().expect("half of it was taken");
}

#[test]
fn libxls_refusals_end_the_save() {
    for (refused, number) in [(0, 3), (-1, 7)] {
        let mut helper = Helper::start(SAVE, "");
        let mut copy = helper.stream.try_clone().expect("a copy");
        std::thread::spawn(move || std::io::copy(&mut copy, &mut std::io::sink()));
        let mut last = None;
        while let Some(said) = helper.hear() {
            match said.number {
                n if n == number => helper.say(refused),
                3 => helper.say(1),
                7 | 10 => helper.say(0),
                _ => {}
            }
            last = Some(said);
        }
        assert_eq!(last, Some(complete(-1, 5)), "message {number} refused");
        assert_eq!(helper.ended().code(), Some(0));
        assert!(helper.mark().contains("cleaned up"));
    }
}

#[test]
fn a_killed_front_takes_its_worker_with_it() {
    let mut helper = Helper::start(SAVE, "endless");
    for _ in 0..3 {
        if helper.hear().expect("a message").number == 7 {
            helper.say(0);
        }
    }
    let (worker, _) = helper.worker();
    helper.await_blocked_write();
    helper.signal(Signal::KILL);
    assert_eq!(helper.ended().signal(), Some(9));
    helper.await_mark("cleaned up");
    await_gone(worker);
}

/// What `/proc/PID/status` says of `key`.
fn status(pid: Pid, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).expect("it lives");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("the kernel says");
    line.trim().to_owned()
}

#[test]
fn a_worker_has_given_up_what_it_does_not_need_and_the_front_has_not() {
    let mut helper = Helper::start(SAVE, "endless");
    for _ in 0..3 {
        let said = helper.hear().expect("a message");
        assert!(said.number != 1 || said.arguments[0] < 7, "a warning: {}", log_text(&said));
        if said.number == 7 {
            helper.say(0);
        }
    }
    let (worker, _) = helper.worker();
    helper.await_blocked_write();
    let ours = Pid::from_raw(i32::try_from(std::process::id()).expect("a number")).expect("a process");
    // CAP_DAC_READ_SEARCH is bit 2, CAP_NET_BIND_SERVICE bit 10; who has none has none to keep.
    let had = u64::from_str_radix(&status(ours, "CapEff:"), 16).expect("a set");
    for set in ["CapEff:", "CapPrm:"] {
        assert_eq!(status(worker, set), format!("{:016x}", had & 0x404), "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(status(worker, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(worker, "NoNewPrivs:"), "1");
    let limits = fs::read_to_string(format!("/proc/{}/limits", worker.as_raw_nonzero())).expect("it lives");
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
    let front = Pid::from_child(&helper.child);
    assert_eq!(status(front, "CapEff:"), status(ours, "CapEff:"), "the front belongs to the toolstack");
    assert_eq!(status(front, "NoNewPrivs:"), status(ours, "NoNewPrivs:"));
    helper.signal(Signal::TERM);
    assert_eq!(helper.converse().last().map(|said| said.number), Some(10));
    assert_eq!(helper.ended().code(), Some(0));
    await_gone(worker);
}

/// Called by anybody but a worker a standby does nothing; without a hypervisor, or with another guest's table, it says why it is
/// of no use, and ends.
#[test]
fn a_standby_without_a_ring_says_why_and_ends() {
    let called = Command::new(program()).args(["--standby", "3"]).status().expect("it starts");
    assert_eq!(called.code(), Some(2));
    for (frames, why) in [("64", "it can't have the ring: "), ("4096", "the table is another guest's")] {
        let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
        let table =
            rustix::fs::memfd_create("table", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
        rustix::fs::ftruncate(&table, 4096).expect("of a page, which 64 frames need");
        let us = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        let us = us.expect("a descriptor of this process");
        // Copies get through exec.
        let copies = [theirs.as_fd(), table.as_fd(), us.as_fd()];
        let copies = copies.map(|descriptor| rustix::io::dup(descriptor).expect("a copy"));
        drop(theirs);
        let mut standby = Command::new(program())
            .arg("--standby")
            .args(copies.each_ref().map(|copy| copy.as_raw_fd().to_string()))
            .args(["32751", "80", frames])
            .spawn()
            .expect("it starts");
        drop(copies);
        let mut said = String::new();
        ours.read_to_string(&mut said).expect("a sentence, and its end");
        assert!(said.contains(why), "{said}");
        assert_eq!(standby.wait().expect("it ends").code(), Some(1));
    }
}

#[test]
fn libxls_death_is_noticed_while_nothing_is_said() {
    let mut helper = Helper::start(RESTORE, "");
    let (worker, _) = helper.worker();
    helper.to = None;
    assert_eq!(helper.ended().code(), Some(1));
    helper.await_mark("cleaned up");
    await_gone(worker);
}

#[test]
fn libxls_death_is_noticed_while_an_answer_is_due() {
    let mut helper = Helper::start(SAVE, "");
    while helper.hear().expect("a message").number != 7 {}
    let (worker, _) = helper.worker();
    helper.to = None;
    assert_eq!(helper.ended().code(), Some(1));
    helper.await_mark("cleaned up");
    await_gone(worker);
}

#[test]
fn signals_end_a_save_as_one_that_failed() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut helper = Helper::start(SAVE, "endless");
        while helper.hear().expect("a message").number != 7 {}
        helper.say(0);
        let (worker, _) = helper.worker();
        helper.await_blocked_write();
        helper.signal(signal);
        let heard = helper.converse();
        let last = heard.last().expect("something was said");
        assert_eq!(*last, complete(-1, rustix::io::Errno::CANCELED.raw_os_error()), "{signal:?}");
        assert_eq!(helper.ended().code(), Some(0), "{signal:?}");
        assert!(helper.mark().contains("cleaned up"), "{signal:?}");
        await_gone(worker);
    }
}

/// libxl answers the question it was asked before it sent the signal; then the save ends.
#[test]
fn a_signal_while_an_answer_is_due_waits_for_it() {
    let mut helper = Helper::start(SAVE, "");
    while helper.hear().expect("a message").number != 7 {}
    helper.worker();
    helper.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!helper.mark().contains("cleaned up"), "it did not wait: {}", helper.mark());
    helper.say(0);
    let heard = helper.converse();
    assert_eq!(heard.last(), Some(&complete(-1, rustix::io::Errno::CANCELED.raw_os_error())));
    assert_eq!(helper.ended().code(), Some(0));
}

#[test]
fn a_restore_dies_of_the_signal_behind_its_worker() {
    let mut helper = Helper::start(RESTORE, "");
    let (worker, _) = helper.worker();
    helper.signal(Signal::TERM);
    assert_eq!(helper.ended().signal(), Some(15));
    assert!(helper.mark().contains("cleaned up"), "{}", helper.mark());
    await_gone(worker);
}

#[test]
fn a_worker_that_dies_is_cleaned_up_behind() {
    let mut helper = Helper::start(SAVE, "die");
    let mut copy = helper.stream.try_clone().expect("a copy");
    std::thread::spawn(move || std::io::copy(&mut copy, &mut std::io::sink()));
    let heard = helper.converse();
    assert_eq!(heard.last(), Some(&complete(-1, 5)));
    assert!(heard.iter().any(|said| said.number == 1 && log_text(said).contains("ended unexpectedly")));
    assert_eq!(helper.ended().code(), Some(0));
    assert!(helper.mark().contains("put back domain 7, 70 %"), "{}", helper.mark());
}

#[test]
fn a_panic_is_told() {
    let mut helper = Helper::start(SAVE, "panic");
    let mut copy = helper.stream.try_clone().expect("a copy");
    std::thread::spawn(move || std::io::copy(&mut copy, &mut std::io::sink()));
    let heard = helper.converse();
    assert_eq!(heard.last(), Some(&complete(-1, 5)));
    let told =
        |said: &Said| said.number == 1 && log_text(said).contains("internal error: as the script says");
    assert!(heard.iter().any(told), "{heard:?}");
    assert_eq!(helper.ended().code(), Some(0));
}

/// Remus and COLO go to Xen's own helper, with everything it was started with.
#[test]
fn other_streams_are_handed_over() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let stock = directory.path().join("stock");
    fs::write(&stock, "#!/bin/bash\necho \"$@\"; echo seen >&$2\n").expect("it is written");
    fs::set_permissions(&stock, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it may be run");
    let environment = [("PAGEFERRY_STOCK_HELPER", stock.to_str().expect("an ordinary path"))];
    let mut helper = Helper::start_with("--save-domain FD 11 7 1 136 2", "", &environment);
    let mut said = String::new();
    helper.from.read_to_string(&mut said).expect("what it said");
    assert_eq!(said, format!("--save-domain {} 11 7 1 136 2\n", helper.theirs.as_raw_fd()));
    assert_eq!(helper.ended().code(), Some(0));
    let mut seen = [0; 5];
    helper.stream.read_exact(&mut seen).expect("it has the stream");
    assert_eq!(&seen, b"seen\n");
}

#[test]
fn who_is_not_libxl_is_told_what_this_is() {
    for arguments in ["--help", "--save-domain FD 1 2", "--worker 99 --save-domain FD -1 7 1 136 0"] {
        let mut helper = Helper::start(arguments, "");
        let mut words = String::new();
        helper.child.stderr.take().expect("a pipe").read_to_string(&mut words).expect("its words");
        assert_eq!(helper.ended().code(), Some(2), "{arguments}: {words}");
        assert!(words.starts_with("pageferry-save-helper: ") || arguments.starts_with("--worker"), "{words}");
    }
}
