//! Both ends over loopback: what is carried, what is refused, and what an eavesdropper or a forger gets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver as Inbox, Sender as Outbox, channel};
use std::thread;
use std::time::Duration;

use super::Identity;
use crate::error::NetError;
use crate::memory::{GuestPage, PageBuf};
use crate::net::entrance::{Entrance, Lock};
use crate::net::pass::Fingerprint;
use crate::net::tcp::{Settings, TcpAcceptor, TcpDialer, halves};
use crate::net::{Acceptor, Connection, Dialer, SendPath};
use crate::units::PAGE_BYTES;
use crate::wire::hello::{HELLO_BYTES, Hello, MigrationId, Purpose, Secret};

const SECOND: Duration = Duration::from_secs(1);
static TOKEN: LazyLock<Secret> = LazyLock::new(|| Secret::of(&[7; 32]));

fn hello() -> Hello {
    Hello::new(Purpose::Control, MigrationId([1; 16]), TOKEN.clone())
}

fn entrance() -> (Entrance, Fingerprint) {
    let identity = Identity::new().unwrap();
    let pin = identity.fingerprint();
    let acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    (Entrance::new(acceptor, Lock::Tls(identity)), pin)
}

/// Dials `address` and accepts at `entrance`.
fn connect(entrance: &mut Entrance, address: &str, pin: Fingerprint) -> (Connection, Connection) {
    let dialer = TcpDialer::new(address, Settings::default()).pinned(Some(pin));
    let near = thread::spawn(move || dialer.call(&hello(), 5 * SECOND).unwrap());
    let far = entrance.caller(&TOKEN, 5 * SECOND).unwrap().expect("it was dialled");
    assert_eq!(*far.hello, hello().encode());
    (near.join().unwrap(), far.connection)
}

fn pair() -> (Connection, Connection) {
    let (mut entrance, pin) = entrance();
    let address = entrance.local().to_string();
    connect(&mut entrance, &address, pin)
}

fn pages(count: usize, seed: u8) -> Vec<PageBuf> {
    let mut pages = vec![PageBuf::zeroed(); count];
    let mut state = u32::from(seed) + 1;
    for byte in pages.iter_mut().flat_map(|page| &mut page.0) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    pages
}

fn list(pages: &mut [PageBuf]) -> Vec<GuestPage<'_>> {
    pages.iter_mut().map(PageBuf::as_guest_page).collect()
}

/// Heads from nothing to more than two records, with and without pages.
const MESSAGES: [(usize, usize); 9] =
    [(64, 0), (0, 1), (128, 256), (40_000, 3), (1, 7), (16_384, 4), (16_385, 0), (2_112, 256), (64, 5)];

fn carries_everything(mut near: Connection, mut far: Connection) {
    let sending = thread::spawn(move || {
        for (number, (head, count)) in (0..).zip(MESSAGES) {
            let mut pages = pages(count, number);
            near.sender.send(&vec![number; head], &list(&mut pages)).unwrap();
        }
        let mut answer = [0; 300];
        near.receiver.recv(&mut answer).unwrap();
        assert_eq!(answer, [9; 300]);
        assert_eq!(near.sender.path(), SendPath::Encrypted);
    });
    for (number, (head, count)) in (0..).zip(MESSAGES) {
        let mut came = vec![0xee; head];
        // In two pieces, neither of which is a record.
        let (first, second) = came.split_at_mut(head / 3);
        far.receiver.recv(first).unwrap();
        far.receiver.recv(second).unwrap();
        assert!(came.iter().all(|byte| *byte == number));
        let mut placed = vec![PageBuf::zeroed(); count];
        far.receiver.recv_pages(&list(&mut placed)).unwrap();
        assert!(placed == pages(count, number), "message {number}");
    }
    far.sender.send(&[9; 300], &[]).unwrap();
    sending.join().unwrap();
}

#[test]
fn heads_and_pages_of_any_shape_arrive() {
    let (near, far) = pair();
    carries_everything(near, far);
}

/// The same with keys that change every three records.
#[test]
fn keys_change_under_a_connection() {
    let (mut entrance, pin) = entrance();
    let address = entrance.local().to_string();
    let dialing = thread::spawn(move || {
        let address = address.parse().unwrap();
        let socket = socket2::Socket::from(TcpStream::connect(address).unwrap());
        let halves = halves(socket, address, &Settings::default()).unwrap();
        let wanted = super::Wanted { pin, authority: None };
        super::handshake::dial_with(halves, &wanted, &hello(), 3).unwrap()
    });
    let far = entrance.caller(&TOKEN, 5 * SECOND).unwrap().unwrap();
    carries_everything(dialing.join().unwrap(), far.connection);
}

/// Passes bytes on between a source and a target, and lets a test look at or change those of the source.
fn between(target: String, change: impl Fn(u64, &mut [u8]) + Send + 'static) -> (String, Inbox<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tell, heard): (Outbox<Vec<u8>>, _) = channel();
    thread::spawn(move || {
        let mut near = listener.accept().unwrap().0;
        let mut far = TcpStream::connect(target).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let back = thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut all = Vec::new();
        let mut piece = vec![0; 1 << 16];
        while let Ok(count @ 1..) = near.read(&mut piece) {
            let before = u64::try_from(all.len()).unwrap();
            all.extend_from_slice(&piece[..count]);
            change(before, &mut piece[..count]);
            if far.write_all(&piece[..count]).is_err() {
                break;
            }
        }
        // Either end may be gone.
        let _ = far.shutdown(std::net::Shutdown::Both);
        let _ = tell.send(all);
        let _ = back.join();
    });
    (address, heard)
}

#[test]
fn an_eavesdropper_sees_neither_pages_nor_secrets() {
    let (mut entrance, pin) = entrance();
    let (address, heard) = between(entrance.local().to_string(), |_, _| {});
    let (mut near, mut far) = connect(&mut entrance, &address, pin);
    let mut page = vec![PageBuf([0x5a; PAGE_BYTES]); 1];
    near.sender.send(&[0x5a; 64], &list(&mut page)).unwrap();
    far.receiver.recv(&mut [0; 64 + PAGE_BYTES]).unwrap();
    drop((near, far));
    let all = heard.recv().unwrap();
    assert!(all.len() > PAGE_BYTES + 2 * HELLO_BYTES);
    assert!(!all.windows(8).any(|window| window == [0x5a; 8]));
    assert!(!all.windows(8).any(|window| window == [7; 8]), "the token never crosses in the clear");
    assert!(!all.windows(16).any(|window| window == [1; 16]), "nor does the migration's number");
}

/// A bit changed anywhere behind the handshake ends the connection before any byte of that record is used.
#[test]
fn a_changed_bit_ends_the_connection() {
    let (mut entrance, pin) = entrance();
    let far_behind = 100_000;
    let (address, _heard) = between(entrance.local().to_string(), move |before, piece| {
        if (before..before + u64::try_from(piece.len()).unwrap()).contains(&far_behind) {
            piece[usize::try_from(far_behind - before).unwrap()] ^= 4;
        }
    });
    let (mut near, mut far) = connect(&mut entrance, &address, pin);
    let sending = thread::spawn(move || {
        let mut pages = pages(64, 1);
        // The other end hangs up somewhere in between.
        let _ = near.sender.send(&[], &list(&mut pages));
        near
    });
    let mut placed = vec![PageBuf::zeroed(); 64];
    let error = far.receiver.recv_pages(&list(&mut placed)).unwrap_err();
    assert!(matches!(error, NetError::Untrusted { .. }), "{error}");
    assert!(error.to_string().contains("changed on its way"), "{error}");
    let wrong = placed.iter().zip(pages(64, 1)).filter(|(one, other)| **one != *other);
    assert!(wrong.clone().count() > 30 && wrong.clone().all(|(page, _)| *page == PageBuf::zeroed()));
    drop(far);
    drop(sending.join().unwrap());
}

#[test]
fn another_key_is_found_out_before_anything_is_told() {
    let (mut entrance, _) = entrance();
    let target = entrance.local().to_string();
    let (address, heard) = between(target, |_, _| {});
    let other = Identity::new().unwrap().fingerprint();
    let dialer = TcpDialer::new(&address, Settings::default()).pinned(Some(other));
    let dialing = thread::spawn(move || dialer.call(&hello(), 5 * SECOND).err().unwrap());
    assert!(entrance.caller(&TOKEN, SECOND).unwrap().is_none());
    let error = dialing.join().unwrap();
    assert!(matches!(error, NetError::OtherKey { .. }), "{error}");
    let told = entrance.turned_away().unwrap();
    assert!(told.contains("turned away"), "{told}");
    assert!(!heard.recv().unwrap().windows(8).any(|window| window == [7; 8]));
}

#[test]
fn a_wrong_token_gets_no_answer() {
    let (mut entrance, pin) = entrance();
    let dialer = TcpDialer::new(&entrance.local().to_string(), Settings::default()).pinned(Some(pin));
    let dialing = thread::spawn(move || dialer.call(&hello(), 5 * SECOND).err().unwrap());
    assert!(entrance.caller(&Secret::of(&[8; 32]), SECOND).unwrap().is_none());
    let error = dialing.join().unwrap();
    assert!(matches!(error, NetError::TurnedAway { .. }), "{error}");
    assert!(entrance.turned_away().unwrap().contains("wrong token"));
}

#[test]
fn a_target_in_the_clear_and_a_source_under_tls_part_with_a_sentence() {
    let acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    let mut entrance = Entrance::new(acceptor, Lock::Plain);
    let pin = Identity::new().unwrap().fingerprint();
    let dialer = TcpDialer::new(&entrance.local().to_string(), Settings::default()).pinned(Some(pin));
    let dialing = thread::spawn(move || dialer.call(&hello(), 5 * SECOND).err().unwrap());
    assert!(entrance.caller(&TOKEN, SECOND).unwrap().is_none());
    assert!(matches!(dialing.join().unwrap(), NetError::TurnedAway { .. }));
}

#[test]
fn an_end_that_goes_is_told_from_one_that_hangs_up_here() {
    let (near, mut far) = pair();
    let hang_up = near.hang_up.clone();
    drop(near.sender);
    hang_up.hang_up();
    let mut receiver = near.receiver;
    assert!(matches!(receiver.recv(&mut [0]), Err(NetError::HungUp)));
    assert!(matches!(far.receiver.recv(&mut [0]), Err(NetError::Closed { .. })));
}

#[test]
fn silence_is_noticed_under_tls_too() {
    let (_near, mut far) = pair();
    far.receiver.set_patience(Some(Duration::from_millis(100)));
    assert!(matches!(far.receiver.recv(&mut [0]), Err(NetError::Stalled { .. })));
}

/// The cipher that a real target and a dialler with or without instructions for AES settle on.
fn settled(aes: bool) -> rustls::CipherSuite {
    let identity = Identity::new().unwrap();
    let provider = super::provider_for(aes);
    let algorithms = provider.signature_verification_algorithms;
    let pinned = super::Pinned { pin: identity.fingerprint(), algorithms };
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(pinned))
        .with_no_client_auth();
    let mut near =
        rustls::ClientConnection::new(super::asking(config), "target".try_into().unwrap()).unwrap();
    let mut far = rustls::ServerConnection::new(identity.config()).unwrap();
    while near.is_handshaking() || far.is_handshaking() {
        let (mut there, mut back) = (Vec::new(), Vec::new());
        near.write_tls(&mut there).unwrap();
        far.read_tls(&mut there.as_slice()).unwrap();
        far.process_new_packets().unwrap();
        far.write_tls(&mut back).unwrap();
        near.read_tls(&mut back.as_slice()).unwrap();
        near.process_new_packets().unwrap();
    }
    near.negotiated_cipher_suite().unwrap().suite()
}

#[test]
fn an_end_without_instructions_for_aes_gets_another_cipher() {
    let quick = if super::has_aes() { "TLS13_AES_128_GCM_SHA256" } else { "TLS13_CHACHA20_POLY1305_SHA256" };
    assert_eq!(settled(true).as_str(), Some(quick));
    assert_eq!(settled(false).as_str(), Some("TLS13_CHACHA20_POLY1305_SHA256"));
}
