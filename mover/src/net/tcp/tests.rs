//! Real sockets on loopback, and peers that are cut off, stall, or send in pieces of any size.

use super::*;
use crate::memory::PageBuf;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, sleep};

const SECOND: Duration = Duration::from_secs(1);

fn impatient() -> Settings {
    Settings { patience: Duration::from_millis(200), ..Settings::default() }
}

/// A connection of ours and the other end as a plain socket.
fn with_plain_peer(settings: Settings) -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialer = TcpDialer::new(&listener.local_addr().unwrap().to_string(), settings);
    let ours = dialer.dial(SECOND).unwrap();
    (ours, listener.accept().unwrap().0)
}

/// Both ends ours.
fn pair(settings: &Settings) -> (Connection, Connection) {
    let mut acceptor = TcpAcceptor::listen("127.0.0.1:0", settings.clone()).unwrap();
    let dialer = TcpDialer::new(&acceptor.local().to_string(), settings.clone());
    let near = dialer.dial(SECOND).unwrap();
    let far = acceptor.accept(SECOND).unwrap().expect("it was dialled");
    (near, far)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = u8::try_from(self.below(256)).unwrap();
        }
    }
}

fn random_pages(random: &mut Random, count: usize) -> Vec<PageBuf> {
    let mut pages = vec![PageBuf::zeroed(); count];
    pages.iter_mut().for_each(|page| random.fill(&mut page.0));
    pages
}

/// The pages in an order with neighbours and jumps.
fn shuffled<'p>(random: &mut Random, pages: &'p mut [PageBuf]) -> Vec<GuestPage<'p>> {
    let mut list: Vec<_> = pages.iter_mut().map(PageBuf::as_guest_page).collect();
    for at in 0..list.len() / 4 {
        let (a, b) = (random.below(list.len()), random.below(list.len()));
        if at % 2 == 0 {
            list.swap(a, b);
        }
    }
    list
}

/// Sends frames of random shapes, some more than a call can take, and compares every byte on the other side.
fn carries_everything(settings: &Settings) -> SendPath {
    let (mut near, mut far) = pair(settings);
    let sizes = [0, 1, 2, 300, 256, 1500, 0, 17, 64];
    let sending = thread::spawn(move || {
        let mut random = Random(1);
        for count in sizes {
            let mut pages = random_pages(&mut random, count);
            let mut head = vec![0; random.below(100)];
            random.fill(&mut head);
            let list = shuffled(&mut random, &mut pages);
            near.sender.send(&head, &list).unwrap();
        }
        // Whatever went without a copy must have left before the pages go.
        while near.sender.backlog_bytes() != 0 {
            sleep(Duration::from_millis(1));
        }
        (near.sender.path(), near)
    });
    let mut random = Random(1);
    for count in sizes {
        let mut pages = random_pages(&mut random, count);
        let mut head = vec![0; random.below(100)];
        random.fill(&mut head);
        let mut wanted = Vec::new();
        for page in shuffled(&mut random, &mut pages) {
            let mut copy = PageBuf::zeroed();
            page.copy_to(&mut copy);
            wanted.push(copy);
        }
        let mut came = vec![0; head.len()];
        far.receiver.recv(&mut came).unwrap();
        assert_eq!(came, head);
        // Every other page goes to a neighbour's place, so that lists have gaps here too.
        let mut places = vec![PageBuf::zeroed(); count * 2];
        let mut list: Vec<_> = places.iter_mut().map(PageBuf::as_guest_page).collect();
        list.truncate(count + count / 2);
        let chosen: Vec<_> = list.split_off(count / 2);
        far.receiver.recv_pages(&chosen).unwrap();
        for (place, wanted) in chosen.iter().zip(&wanted) {
            let mut copy = PageBuf::zeroed();
            place.copy_to(&mut copy);
            assert!(copy == *wanted);
        }
    }
    sending.join().unwrap().0
}

#[test]
fn heads_and_pages_of_any_shape_arrive() {
    assert_eq!(carries_everything(&Settings::default()), SendPath::Copy);
}

#[test]
fn zero_copy_that_the_kernel_does_not_grant_is_given_up_and_loses_nothing() {
    let settings = Settings { zero_copy: true, ..Settings::default() };
    // Loopback always copies, and says so.
    assert_eq!(carries_everything(&settings), SendPath::Copy);
}

#[test]
fn bytes_in_pieces_of_any_size_are_put_together() {
    let (mut ours, mut peer) = with_plain_peer(Settings::default());
    let mut random = Random(7);
    let mut stream = vec![0; 30 * (5 + PAGE_BYTES * 3)];
    random.fill(&mut stream);
    let sent = stream.clone();
    let sending = thread::spawn(move || {
        let mut rest = &sent[..];
        peer.set_nodelay(true).unwrap();
        while !rest.is_empty() {
            let most = if random.below(3) == 0 { 20_000 } else { 7 };
            let piece = (1 + random.below(most)).min(rest.len());
            peer.write_all(&rest[..piece]).unwrap();
            rest = &rest[piece..];
        }
        peer
    });
    let mut came = Vec::new();
    for _ in 0..30 {
        let mut head = [0; 5];
        ours.receiver.recv(&mut head).unwrap();
        came.extend(head);
        let mut pages = vec![PageBuf::zeroed(); 3];
        let list: Vec<_> = pages.iter_mut().map(PageBuf::as_guest_page).collect();
        ours.receiver.recv_pages(&list).unwrap();
        pages.iter().for_each(|page| came.extend(page.0));
    }
    assert!(came == stream);
    sending.join().unwrap();
}

#[test]
fn ten_thousand_small_messages_go_to_and_fro() {
    let (mut near, mut far) = pair(&Settings::default());
    let echo = thread::spawn(move || {
        for _ in 0..10_000 {
            let mut message = [0; 24];
            far.receiver.recv(&mut message).unwrap();
            far.sender.send(&message, &[]).unwrap();
        }
    });
    let mut sent = 0_u64;
    let mut answered = 0_u64;
    while answered < 10_000 {
        // Up to 16 on their way at once.
        while sent < 10_000 && sent < answered + 16 {
            let mut message = [0; 24];
            message[..8].copy_from_slice(&sent.to_le_bytes());
            near.sender.send(&message, &[]).unwrap();
            sent += 1;
        }
        let mut message = [0; 24];
        near.receiver.recv(&mut message).unwrap();
        assert_eq!(message[..8], answered.to_le_bytes());
        answered += 1;
    }
    echo.join().unwrap();
}

#[test]
fn a_cut_in_the_middle_of_a_message_is_told() {
    let (mut ours, mut peer) = with_plain_peer(Settings::default());
    peer.write_all(&[1; 3 + PAGE_BYTES / 2]).unwrap();
    drop(peer);
    ours.receiver.recv(&mut [0; 3]).unwrap();
    let mut page = PageBuf::zeroed();
    let error = ours.receiver.recv_pages(&[page.as_guest_page()]).unwrap_err();
    assert!(matches!(&error, NetError::Closed { doing, .. } if *doing == AMID), "{error}");
    assert!(error.to_string().contains(&ours.peer), "{error}");
}

#[test]
fn a_half_closed_peer_still_gets_data() {
    let (mut ours, mut peer) = with_plain_peer(Settings::default());
    peer.shutdown(Shutdown::Write).unwrap();
    let error = ours.receiver.recv(&mut [0; 1]).unwrap_err();
    assert!(matches!(error, NetError::Closed { doing, .. } if doing == AWAITING));
    ours.sender.send(b"still", &[]).unwrap();
    let mut came = [0; 5];
    peer.read_exact(&mut came).unwrap();
    assert_eq!(&came, b"still");
}

#[test]
fn a_peer_that_sends_nothing_is_stalled() {
    let (mut ours, mut peer) = with_plain_peer(impatient());
    assert!(
        matches!(ours.receiver.recv(&mut [0; 1]), Err(NetError::Stalled { doing, .. }) if doing == AWAITING)
    );
    ours.receiver.set_patience(Some(Duration::from_millis(100)));
    peer.write_all(&[1, 2]).unwrap();
    let error = ours.receiver.recv(&mut [0; 4]).unwrap_err();
    assert!(matches!(error, NetError::Stalled { doing, .. } if doing == AMID), "{error}");
}

#[test]
fn a_slow_peer_is_not_a_stalled_one() {
    let (mut ours, mut peer) = with_plain_peer(impatient());
    let sending = thread::spawn(move || {
        for byte in 0..10 {
            sleep(Duration::from_millis(50));
            peer.write_all(&[byte]).unwrap();
        }
        peer
    });
    // Ten bytes take half a second, more than twice the patience, but never that long for one.
    let mut came = [0; 10];
    ours.receiver.recv(&mut came).unwrap();
    assert_eq!(came, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    sending.join().unwrap();
}

#[test]
fn a_peer_that_takes_nothing_is_stalled() {
    let (mut ours, peer) = with_plain_peer(impatient());
    let mut pages = vec![PageBuf::zeroed(); 256];
    let list: Vec<_> = pages.iter_mut().map(PageBuf::as_guest_page).collect();
    let error = loop {
        if let Err(error) = ours.sender.send(&[], &list) {
            break error;
        }
    };
    assert!(matches!(error, NetError::Stalled { doing, .. } if doing == SENDING), "{error}");
    assert!(ours.sender.backlog_bytes() > 0);
    drop(peer);
}

#[test]
fn a_peer_that_has_closed_ends_a_send() {
    let (mut ours, peer) = with_plain_peer(Settings::default());
    drop(peer);
    let error = loop {
        if let Err(error) = ours.sender.send(&[0; 100], &[]) {
            break error;
        }
    };
    assert!(matches!(error, NetError::Closed { .. }), "{error}");
}

#[test]
fn hanging_up_ends_a_blocked_receive() {
    let (mut near, mut far) = pair(&Settings::default());
    near.receiver.set_patience(None);
    let hang_up = near.hang_up.clone();
    let waiting = thread::spawn(move || near.receiver.recv(&mut [0; 1]));
    sleep(Duration::from_millis(20));
    hang_up.hang_up();
    hang_up.hang_up();
    assert!(matches!(waiting.join().unwrap(), Err(NetError::HungUp)));
    assert!(matches!(far.receiver.recv(&mut [0; 1]), Err(NetError::Closed { .. })));
}

#[test]
fn hanging_up_ends_a_blocked_send() {
    let (mut ours, peer) = with_plain_peer(Settings { patience: 60 * SECOND, ..Settings::default() });
    let hang_up = ours.hang_up.clone();
    let blocked = thread::spawn(move || {
        let mut pages = vec![PageBuf::zeroed(); 256];
        let list: Vec<_> = pages.iter_mut().map(PageBuf::as_guest_page).collect();
        loop {
            if let Err(error) = ours.sender.send(&[], &list) {
                return error;
            }
        }
    });
    sleep(Duration::from_millis(100));
    hang_up.hang_up();
    let error = blocked.join().unwrap();
    assert!(matches!(error, NetError::HungUp), "{error}");
    drop(peer);
}

#[test]
fn nobody_listening_names_the_address_and_the_remedy() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let error = TcpDialer::new(&unused, Settings::default()).dial(SECOND).err().unwrap().to_string();
    assert!(error.contains(&unused) && error.contains("pageferry receive"), "{error}");
}

#[test]
fn bad_addresses_are_told_apart() {
    let dial =
        |target: &str| TcpDialer::new(target, Settings::default()).dial(SECOND).err().unwrap().to_string();
    let unknown = dial("no-such-host.invalid:7700");
    assert!(unknown.contains("no-such-host.invalid") && unknown.contains("not known"), "{unknown}");
    let portless = dial("127.0.0.1");
    assert!(portless.contains("HOST:PORT"), "{portless}");
}

#[test]
fn an_address_in_use_says_so() {
    let first = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    let error =
        TcpAcceptor::listen(&first.local().to_string(), Settings::default()).err().unwrap().to_string();
    assert!(error.contains("stop it, or choose another port"), "{error}");
    let foreign = TcpAcceptor::listen("192.0.2.1:7700", Settings::default()).err().unwrap().to_string();
    assert!(foreign.contains("not an address of this host"), "{foreign}");
}

#[test]
fn names_and_ipv6_are_dialled_and_accepted() {
    let mut acceptor = match TcpAcceptor::listen("[::]:0", Settings::default()) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            eprintln!("SKIPPED: this host has no IPv6: {error}");
            return;
        }
    };
    let port = acceptor.local().port();
    for target in [format!("[::1]:{port}"), format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
        let mut near = TcpDialer::new(&target, Settings::default()).dial(SECOND).unwrap();
        let mut far = acceptor.accept(SECOND).unwrap().expect("it was dialled");
        near.sender.send(b"!", &[]).unwrap();
        far.receiver.recv(&mut [0]).unwrap();
    }
}

#[test]
fn accepting_ends_with_its_timeout() {
    let mut acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    assert!(acceptor.accept(Duration::from_millis(10)).unwrap().is_none());
}
