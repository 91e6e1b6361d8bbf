//! Strangers at the target's door by the hundred thousand, beside a migration: it goes on, and what they hold of the
//! target stays within named bounds.

mod host;

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use host::{Host, end, said};
use mover::limits::GREETINGS_MAX;
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, bind, connect, send, socket_with, sockopt,
};

/// Connections made without a token.
const STRANGERS: u64 = 100_000;
/// Threads that make them, each with an address of its own.
const HANDS: u8 = 4;
/// Strangers of a hand between two pauses.
const AT_ONCE: u64 = 8;
const PAUSE: Duration = Duration::from_millis(3);
/// What the target may hold besides those it greets: its listener, lanes, control, files and the guest.
const OWN_DESCRIPTORS: usize = 64;
const OWN_THREADS: u64 = 32;
const OWN_MEMORY_KIB: u64 = 64 * 1024;

/// One stranger: comes, says 64 bytes or nothing, and is gone without a trace on its own side.
fn stranger(to: SocketAddr, from: Ipv4Addr, bytes: &[u8]) -> rustix::io::Result<()> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    bind(&socket, &SocketAddrV4::new(from, 0))?;
    // In progress, or refused as the queue is full: as good.
    let _ = connect(&socket, &to);
    let _ = send(&socket, bytes, SendFlags::NOSIGNAL);
    Ok(())
}

/// The most of everything that was seen.
#[derive(Default, Debug)]
struct Most {
    descriptors: usize,
    threads: u64,
    memory_kib: u64,
}

impl Most {
    fn look(&mut self, process: u32) {
        let of = |key: &str| {
            let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix(key).map(str::to_owned))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let open = fs::read_dir(format!("/proc/{process}/fd")).map_or(0, Iterator::count);
        self.descriptors = self.descriptors.max(open);
        self.threads = self.threads.max(of("Threads:").unwrap_or(0));
        self.memory_kib = self.memory_kib.max(of("RssAnon:").unwrap_or(0));
    }
}

#[test]
fn a_hundred_thousand_strangers_and_a_slow_one_change_nothing() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&[]);
    let to: SocketAddr =
        line.split_whitespace().nth(5).and_then(|word| word.parse().ok()).expect("an address");
    let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut hands = Vec::new();
    for hand in 0..HANDS {
        let (stop, made) = (Arc::clone(&stop), Arc::clone(&made));
        hands.push(thread::spawn(move || {
            let from = Ipv4Addr::new(127, 0, 1, hand + 1);
            while made.load(SeqCst) < STRANGERS || !stop.load(SeqCst) {
                for _ in 0..AT_ONCE {
                    let bytes: &[u8] = if hand % 2 == 0 { &[0; 64] } else { b"PGFK" };
                    stranger(to, from, bytes).expect("a socket");
                }
                made.fetch_add(AT_ONCE, SeqCst);
                // Some ten thousand a second: they come from this machine, and are not to take its processors as well.
                thread::sleep(PAUSE);
            }
        }));
    }
    // Those who say a byte a second, always some of them.
    let slow_stop = Arc::clone(&stop);
    hands.push(thread::spawn(move || {
        while !slow_stop.load(SeqCst) {
            let Ok(mut slow) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) else { continue };
            for byte in b"PGFK" {
                // Turned away: another one comes.
                if slow.write_all(&[*byte]).is_err() || slow_stop.load(SeqCst) {
                    break;
                }
                thread::sleep(Duration::from_secs(1));
            }
        }
    }));
    let process = target.id();
    let mut most = Most::default();
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            // Some seconds on the wire, while strangers come.
            host.send(&line, |line| format!("{line} --mode plain --bandwidth 8MiB/s --max-rounds 4 --verify"))
        });
        while !sending.is_finished() {
            most.look(process);
            thread::sleep(Duration::from_millis(20));
        }
        let sent = sending.join().expect("it ran");
        assert!(sent.status.success(), "{}", said(&sent));
    });
    assert_eq!(end(target), Some(0));
    stop.store(true, SeqCst);
    for hand in hands {
        hand.join().expect("no stranger falls");
    }
    assert!(made.load(SeqCst) >= STRANGERS);
    assert!(host.runs("moved"));
    assert!(most.descriptors > 0 && most.descriptors <= GREETINGS_MAX + OWN_DESCRIPTORS, "{most:?}");
    assert!(most.threads > 0 && most.threads <= OWN_THREADS, "{most:?}");
    assert!(most.memory_kib > 0 && most.memory_kib <= OWN_MEMORY_KIB, "{most:?}");
    eprintln!("at most: {most:?}; {} strangers", made.load(SeqCst));
}
