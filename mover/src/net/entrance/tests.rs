//! Strangers of every kind before a real socket.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::thread;

use super::*;
use crate::net::Dialer;
use crate::net::tcp::{Settings, TcpDialer};
use crate::wire::hello::{Hello, MigrationId, Purpose};

const SECOND: Duration = Duration::from_secs(1);
static TOKEN: LazyLock<Secret> = LazyLock::new(|| Secret::of(&[7; 32]));

fn hello() -> Hello {
    Hello::new(Purpose::Control, MigrationId([1; 16]), TOKEN.clone())
}

fn entrances() -> [Entrance; 2] {
    [Lock::Plain, Lock::Tls(Identity::new().unwrap())]
        .map(|lock| Entrance::new(TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap(), lock))
}

/// Dials as who knows the token, on another thread.
fn dial(entrance: &Entrance) -> thread::JoinHandle<Result<Connection, NetError>> {
    let dialer = TcpDialer::new(&entrance.local().to_string(), Settings::default())
        .pinned(entrance.lock.fingerprint());
    thread::spawn(move || dialer.call(&hello(), 5 * SECOND))
}

/// Connections that say nothing, or `bytes`.
fn strangers(to: SocketAddr, count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let one = || {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    (0..count).map(|_| one()).collect()
}

/// Nobody is waited for: with more silent strangers than there is room, and each of them there first, the right one is
/// let in at once.
#[test]
fn silent_strangers_keep_nobody_out() {
    for mut entrance in entrances() {
        let silent = strangers(entrance.local(), 3 * GREETINGS_MAX, b"");
        let half = strangers(entrance.local(), GREETINGS_MAX, b"PGF");
        let dialing = dial(&entrance);
        let before = Instant::now();
        let caller = entrance.caller(&TOKEN, 10 * SECOND).unwrap().expect("it was dialled");
        assert_eq!(*caller.hello, hello().encode());
        // Not a measure of speed: one silent stranger alone used to cost two seconds.
        assert!(before.elapsed() < FIRST_TIME, "{:?}", before.elapsed());
        assert!(entrance.greetings.len() <= GREETINGS_PER_ADDRESS_MAX);
        assert!(dialing.join().unwrap().is_ok());
        drop((silent, half));
    }
}

/// What a stranger is held for: its socket and 64 bytes.
#[test]
fn a_stranger_holds_a_socket_and_64_bytes() {
    assert!(size_of::<Greeting>() <= 160, "{}", size_of::<Greeting>());
    for mut entrance in entrances() {
        let room = entrance.greetings.capacity();
        let mut strangers = strangers(entrance.local(), GREETINGS_PER_ADDRESS_MAX, b"PG");
        assert!(entrance.caller(&TOKEN, Duration::from_millis(100)).unwrap().is_none());
        assert_eq!(entrance.greetings.len(), strangers.len());
        assert_eq!(entrance.greetings.capacity(), room);
        assert!(
            entrance.greetings.iter().all(|greeting| matches!(greeting.stage, Stage::First { have: 2, .. }))
        );
        // A byte now and then does not buy more time than none.
        let began = Instant::now();
        let right = match entrance.lock {
            Lock::Plain => hello::MAGIC,
            Lock::Tls(_) => knock::MAGIC,
        };
        let mut next = right[2..].iter().chain(std::iter::repeat(&1));
        while !entrance.greetings.is_empty() {
            assert!(began.elapsed() < 10 * SECOND, "they are still there");
            let byte = next.next().expect("without end");
            for stranger in &mut strangers {
                // Gone already: as it should be.
                let _ = stranger.write_all(&[*byte]);
            }
            assert!(entrance.caller(&TOKEN, Duration::from_millis(300)).unwrap().is_none());
        }
        let told = entrance.turned_away().unwrap();
        assert!(told.contains("turned away 24 connections") && told.contains("too slow"), "{told}");
    }
}

#[test]
fn who_does_not_speak_the_protocol_gets_no_byte() {
    for mut entrance in entrances() {
        let mut web = strangers(entrance.local(), 1, b"GET / HTTP/1.1\r\n\r\n").remove(0);
        assert!(entrance.caller(&TOKEN, Duration::from_millis(200)).unwrap().is_none());
        web.set_read_timeout(Some(SECOND)).unwrap();
        match web.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
        let told = entrance.turned_away().unwrap();
        assert!(told.contains("does not speak"), "{told}");
        assert_eq!(entrance.turned_away(), None, "told once");
    }
}

/// Who has overheard a knock and sends it again gets a handshake, and no further without the secret; nor does it hold
/// the entrance up.
#[test]
fn an_overheard_knock_is_no_way_in() {
    let [_, mut entrance] = entrances();
    let overheard = knock::make(&TOKEN, [5; 16]);
    let mut replay = strangers(entrance.local(), 1, &overheard).remove(0);
    assert!(entrance.caller(&TOKEN, Duration::from_millis(100)).unwrap().is_none());
    assert!(matches!(entrance.greetings[0].stage, Stage::Shaking(_)));
    let dialing = dial(&entrance);
    assert!(entrance.caller(&TOKEN, 10 * SECOND).unwrap().is_some());
    assert!(dialing.join().unwrap().is_ok());
    replay.write_all(&[22, 3, 1, 0xff, 0xff]).unwrap();
    assert!(entrance.caller(&TOKEN, Duration::from_millis(200)).unwrap().is_none());
    assert!(entrance.greetings.is_empty());
    assert!(entrance.turned_away().unwrap().contains("speak TLS"));
}

/// Thousands of wrong connections, as fast as one thread makes them, and the right one among them.
#[test]
fn a_flood_of_connections_passes() {
    let [_, mut entrance] = entrances();
    let to = entrance.local();
    let flood = thread::spawn(move || {
        for _ in 0..5_000 {
            // The kernel's queue may be full for a moment.
            let _ = TcpStream::connect_timeout(&to, SECOND).and_then(|mut stream| stream.write_all(&[0; 64]));
        }
    });
    let dialing = dial(&entrance);
    assert!(entrance.caller(&TOKEN, 30 * SECOND).unwrap().is_some());
    assert!(dialing.join().unwrap().is_ok());
    while !flood.is_finished() {
        assert!(entrance.caller(&TOKEN, Duration::from_millis(10)).unwrap().is_none());
        assert!(entrance.greetings.len() <= GREETINGS_PER_ADDRESS_MAX);
    }
    flood.join().unwrap();
}
