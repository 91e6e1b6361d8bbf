//! Upgrades: what earlier versions wrote is read, and peers of other versions are spoken with in a common one or refused
//! with a sentence.
//!
//! `kept/wire-N` and `kept/index-N` hold bytes as version N's writers made them. They are never changed: a later version
//! adds a directory of its own and goes on reading these for as long as it speaks or knows that version
//! (`docs/PROTOCOL.md`, "Versions"). Version 1 is the first of both, so the versions before and behind it are pretended here.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use mover::Error;
use mover::index::file;
use mover::net::entrance::{Entrance, Lock};
use mover::net::tcp::{Settings, TcpAcceptor, TcpDialer};
use mover::pipeline::control;
use mover::report::{Event, Observer};
use mover::runtime::Threads;
use mover::source::Surroundings;
use mover::target::{self, Config, Parts};
use mover::units::{Sector, Version};
use mover::wire::control::{HEADER_BYTES, Message};
use mover::wire::frame::{Header, Kind};
use mover::wire::hello::{HELLO_BYTES, Hello, MigrationId, Purpose, Secret, Verdict, Welcome};
use mover::wire::{VERSION_NEWEST, VERSION_OLDEST, knock};

static TOKEN: LazyLock<Secret> = LazyLock::new(|| Secret::of(&[9; 32]));
const PATIENCE: Duration = Duration::from_secs(10);

fn kept(place: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kept").join(place);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|file| {
            let path = file.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "nothing is kept of {place}");
    files
}

/// Whether what is written today is still what version `version` wrote.
fn is_spoken_first(version: u16) -> bool {
    VERSION_NEWEST == version
}

#[test]
fn messages_of_version_1_are_read() {
    if VERSION_OLDEST > 1 {
        return;
    }
    let files = kept("wire-1/message");
    assert_eq!(files.len(), 17, "one of each kind");
    for (name, bytes) in files {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let (kind, length) = Message::header(head).unwrap();
        assert_eq!(length, body.len(), "{name}");
        let message = Message::decode(kind, body).unwrap();
        assert_eq!(message.name().to_lowercase(), name);
        if is_spoken_first(1) {
            assert!(message.encode() == bytes, "{name} is written in another way; that is another version");
        }
        if let Message::Shape(shape) = &message {
            assert_eq!((shape.guest.as_str(), shape.pages, shape.lanes), ("desk", 1 << 18, 2));
            assert_eq!((shape.refers, shape.lazy, shape.verify), (true, true, false));
            assert_eq!((shape.disks.len(), shape.disks[0].bytes), (1, 1 << 30));
            assert_eq!(shape.disks[0].path, "/images/desk.img");
        }
        if let Message::Refetch { urgent, pfns } = &message {
            assert_eq!((*urgent, pfns.iter().map(|pfn| pfn.0).collect()), (true, vec![3, 9]));
        }
    }
}

#[test]
fn frames_of_version_1_are_read() {
    if VERSION_OLDEST > 1 {
        return;
    }
    let mut kinds = Vec::new();
    for (name, bytes) in kept("wire-1/frame") {
        let (head, table) = bytes.split_first_chunk().unwrap();
        let header = Header::decode(head).unwrap();
        assert_eq!(
            (header.lane, header.round, header.version, header.sequence),
            (1, 2, Version(5), 3),
            "{name}"
        );
        assert_eq!(header.table_bytes(), table.len(), "{name}");
        if is_spoken_first(1) {
            assert_eq!(header.encode(), *head, "{name}");
        }
        kinds.push(header.kind);
    }
    assert_eq!(kinds, [Kind::Barrier, Kind::Data, Kind::Digests, Kind::References, Kind::Zero]);
}

/// Greetings are read whatever version they are of: they say it.
#[test]
fn greetings_of_version_1_are_read() {
    for (name, bytes) in kept("wire-1/greeting") {
        let bytes: [u8; HELLO_BYTES] = bytes.try_into().unwrap();
        let purpose = match name.as_str() {
            "control" => Purpose::Control,
            "lane" => Purpose::Lane(3),
            "resume" => Purpose::Resume,
            "knock" => {
                assert!(knock::is_right(&bytes, &TOKEN) && !knock::is_right(&bytes, &Secret::of(&[8; 32])));
                continue;
            }
            "refused" => {
                assert!(VERSION_OLDEST > 1 || Welcome::decode(&bytes).unwrap().verdict == Verdict::Busy);
                continue;
            }
            other => panic!("{other} is not known here"),
        };
        let hello = Hello::decode(&bytes).unwrap();
        assert_eq!((hello.purpose, hello.newest, hello.oldest), (purpose, 1, 1));
        assert!(hello.secret.same(&TOKEN) && hello.migration == MigrationId([7; 16]));
        assert_eq!(hello.common_version(), (VERSION_OLDEST == 1).then_some(1));
    }
}

#[test]
fn an_index_of_version_1_is_found_in_and_those_of_others_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index");
    let bytes = kept("index-1").remove(0).1;
    fs::write(&path, &bytes).unwrap();
    let (table, meta) = file::open(&path, "a disk").unwrap().unwrap();
    assert_eq!((meta.blocks, meta.path.as_str(), table.entries()), (200, "/images/desk.img", 200));
    for unit in 0..200_u64 {
        let hint = unit.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        assert_eq!(table.find(hint, None), Some(Sector(unit * 8)), "unit {unit}");
    }
    for version in [file::VERSION - 1, file::VERSION + 1] {
        let mut other = bytes.clone();
        other[8..12].copy_from_slice(&version.to_le_bytes());
        fs::write(&path, &other).unwrap();
        let error = file::open(&path, "a disk").unwrap_err().to_string();
        let said = format!("it has format version {version}, this pageferry knows {}", file::VERSION);
        assert!(error.contains(&said) && error.contains("pageferry index build"), "{error}");
    }
}

/// Keeps what the target tells.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn event(&self, event: Event) {
        if let Event::Notice { text, .. } = event {
            self.0.lock().unwrap().push(text);
        }
    }
}

/// Says that Hello to a target and returns its answer.
fn greet(target: SocketAddr, newest: u16, oldest: u16, purpose: Purpose) -> [u8; HELLO_BYTES] {
    let hello = Hello { newest, oldest, ..Hello::new(purpose, MigrationId([7; 16]), TOKEN.clone()) };
    let mut stream = TcpStream::connect(target).unwrap();
    stream.write_all(&hello.encode()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; HELLO_BYTES];
    stream.read_exact(&mut answer).unwrap();
    answer
}

/// Sources of other versions, at the real target: those that speak none of ours are told which are spoken here, and the
/// token is still good; one that is newer and speaks ours too is welcome in ours.
#[test]
fn a_target_speaks_the_common_version_or_refuses() {
    let acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    let entrance = Entrance::new(acceptor, Lock::Plain);
    let address = entrance.local();
    let told = Arc::new(Told::default());
    let around = Surroundings {
        runtime: Arc::new(Threads::new()),
        observer: Arc::<Told>::clone(&told),
        cancel: Arc::default(),
    };
    let parts = Parts {
        acceptor: Box::new(entrance),
        token: TOKEN.clone(),
        host: Box::new(|_| panic!("nobody tells a guest's shape")),
        journal: Box::new(|_, _, _| panic!("nobody comes so far")),
    };
    let config = Config { wait: Some(6 * PATIENCE), patience: PATIENCE, ..Config::default() };
    let target = thread::spawn(move || target::receive(parts, config, around).map(|_| ()));
    let (before, behind) = (VERSION_OLDEST - 1, VERSION_NEWEST + 1);
    for (newest, oldest) in [(before, before), (behind + 1, behind)] {
        for purpose in [Purpose::Control, Purpose::Lane(0), Purpose::Resume] {
            let answer = greet(address, newest, oldest, purpose);
            // Its version at 4, its oldest at 6, "no common version" at 8, no secret.
            assert_eq!(
                answer[4..9],
                [&VERSION_NEWEST.to_le_bytes()[..], &VERSION_OLDEST.to_le_bytes(), &[3]].concat()
            );
            assert_eq!(answer[32..], [0; 32]);
        }
    }
    let answer = greet(address, behind, VERSION_NEWEST, Purpose::Control);
    assert_eq!(
        answer[4..9],
        [&VERSION_NEWEST.to_le_bytes()[..], &VERSION_OLDEST.to_le_bytes(), &[0]].concat()
    );
    assert_ne!(answer[32..], [0; 32], "a session's secret");
    // It hung up without telling the guest's shape.
    assert!(target.join().unwrap().is_err());
    let told = told.0.lock().unwrap();
    assert_eq!(told.iter().filter(|text| text.contains("no common protocol version")).count(), 6, "{told:?}");
}

/// What the real dialler makes of a target that answers `(version, oldest, verdict)`.
fn dial(version: u16, oldest: u16, verdict: u8) -> Result<(), Error> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let target = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; HELLO_BYTES];
        stream.read_exact(&mut hello).unwrap();
        let mut answer = [0; HELLO_BYTES];
        answer[..4].copy_from_slice(b"PGFY");
        answer[4..6].copy_from_slice(&version.to_le_bytes());
        answer[6..8].copy_from_slice(&oldest.to_le_bytes());
        answer[8] = verdict;
        stream.write_all(&answer).unwrap();
        hello
    });
    let dialer = TcpDialer::new(&address, Settings::default());
    let outcome =
        control::open(&dialer, &Hello::new(Purpose::Control, MigrationId([7; 16]), TOKEN.clone()), PATIENCE);
    // What a target of any version reads: magic, newest, oldest.
    let hello = target.join().unwrap();
    assert_eq!(
        hello[..8],
        [b"PGFY", &VERSION_NEWEST.to_le_bytes()[..], &VERSION_OLDEST.to_le_bytes()].concat()
    );
    outcome.map(|(_, welcome)| assert_eq!(welcome.version, version))
}

#[test]
fn a_source_speaks_the_common_version_or_says_who_is_to_be_updated() {
    let (welcome, none_in_common) = (0, 3);
    // A newer target that speaks ours too answers just that.
    assert!(dial(VERSION_NEWEST, VERSION_OLDEST, welcome).is_ok());
    for (version, oldest, verdict) in [
        (VERSION_OLDEST - 1, 0, none_in_common),
        (VERSION_NEWEST + 1, VERSION_NEWEST + 1, none_in_common),
        // It was told what is spoken here; whoever goes on in another version is not understood.
        (VERSION_OLDEST - 1, 0, welcome),
        (VERSION_NEWEST + 1, VERSION_OLDEST, welcome),
    ] {
        let error = dial(version, oldest, verdict).unwrap_err().to_string();
        let said =
            format!("speaks protocol version {version}, this one {VERSION_OLDEST} to {VERSION_NEWEST}");
        assert!(error.contains(&said) && error.contains("Update the older one"), "{error}");
    }
}
