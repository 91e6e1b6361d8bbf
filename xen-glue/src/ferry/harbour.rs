//! The source's side of the dial-back: listens, and lets in who shows the offer's right, each number once. A thread of its
//! own, so that the stream goes on meanwhile.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mover::runtime::Runtime;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::greeting;
use crate::stream::Offer;
use crate::stream::limits::OFFER_ADDRESSES_MAX;

/// How long a connection may take for its greeting; the others wait meanwhile.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait for a connection before looking whether the harbour is closed.
const GLANCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// What the keeper's thread and the save share.
struct Berths {
    /// By number: 0 for control, then the lanes.
    taken: Mutex<Vec<Option<TcpStream>>>,
    free: AtomicUsize,
    closed: AtomicBool,
}

/// Waits for the target to dial back. Dropping it turns away whoever still comes.
pub(crate) struct Harbour {
    offer: Offer,
    berths: Arc<Berths>,
    keeper: Option<JoinHandle<()>>,
}

impl Harbour {
    /// Listens on `addresses`, `HOST` or `HOST:PORT` each, and there only; without any on all addresses of this host.
    ///
    /// # Errors
    /// An address is not this host's, or its port is taken.
    pub(crate) fn open(addresses: &[String], lanes: u8, runtime: &dyn Runtime) -> io::Result<Self> {
        let (listeners, addresses) = if addresses.is_empty() { everywhere()? } else { at_these(addresses)? };
        let (mut migration, mut token) = ([0; 16], [0; 32]);
        runtime.random(&mut migration);
        runtime.random(&mut token);
        let offer = Offer { migration, token, lanes, addresses };
        let count = usize::from(lanes) + 1;
        let berths = Arc::new(Berths {
            taken: Mutex::new((0..count).map(|_| None).collect()),
            free: AtomicUsize::new(count),
            closed: AtomicBool::new(false),
        });
        let (theirs, terms) = (Arc::clone(&berths), offer.clone());
        let keeper = std::thread::Builder::new()
            .name("pf-harbour".to_owned())
            .spawn(move || keep(&listeners, &terms, &theirs))?;
        Ok(Self { offer, berths, keeper: Some(keeper) })
    }

    /// What the target is to be told.
    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Whether all connections are there.
    pub(crate) fn is_full(&self) -> bool {
        self.berths.free.load(SeqCst) == 0
    }

    /// The connections by number, of a full harbour.
    pub(crate) fn leave(mut self) -> Vec<TcpStream> {
        if let Some(keeper) = self.keeper.take() {
            // It has nothing to say; a panic of its would have left a place free.
            let _ = keeper.join();
        }
        let mut taken = self.berths.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.drain(..).flatten().collect()
    }
}

impl Drop for Harbour {
    fn drop(&mut self) {
        self.berths.closed.store(true, SeqCst);
    }
}

/// Lets connections in until all are there or the harbour is closed.
fn keep(listeners: &[TcpListener], offer: &Offer, berths: &Berths) {
    while berths.free.load(SeqCst) > 0 && !berths.closed.load(SeqCst) {
        let mut watched: Vec<_> =
            listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)).collect();
        if poll(&mut watched, Some(&GLANCE)).unwrap_or(0) == 0 {
            continue;
        }
        for listener in listeners {
            // What went away before it was let in is none of ours, and neither is one without the right.
            if let Ok((stream, _)) = listener.accept()
                && let Some(number) = greeted(&stream, offer)
            {
                let mut taken = berths.taken.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(place) = taken.get_mut(usize::from(number)).filter(|place| place.is_none()) {
                    *place = Some(stream);
                    berths.free.fetch_sub(1, SeqCst);
                }
            }
        }
    }
}

/// The number in the greeting of a connection that has the right.
fn greeted(mut stream: &TcpStream, offer: &Offer) -> Option<u8> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING_PATIENCE)).ok()?;
    let mut bytes = [0; greeting::BYTES];
    stream.read_exact(&mut bytes).ok()?;
    greeting::decode(offer, &bytes)
}

type Open = (Vec<TcpListener>, Vec<String>);

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// On every address of this host.
fn everywhere() -> io::Result<Open> {
    let any = |ip: IpAddr| listen(SocketAddr::new(ip, 0));
    let v6 = any(Ipv6Addr::UNSPECIFIED.into());
    let dual = v6.is_ok();
    let listener = v6.or_else(|_| any(Ipv4Addr::UNSPECIFIED.into()))?;
    let port = listener.local_addr()?.port();
    let mut all = local_addresses();
    all.retain(|address| dual || address.is_ipv4());
    all.truncate(OFFER_ADDRESSES_MAX);
    if all.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            "this host has no address but its own loop",
        ));
    }
    Ok((vec![listener], all.into_iter().map(|ip| SocketAddr::new(ip, port).to_string()).collect()))
}

/// On those addresses alone.
fn at_these(addresses: &[String]) -> io::Result<Open> {
    let mut open = (Vec::new(), Vec::new());
    for address in addresses.iter().take(OFFER_ADDRESSES_MAX) {
        let resolved = match address.to_socket_addrs() {
            Ok(mut found) => found.next(),
            // Without a port.
            Err(_) => (address.as_str(), 0).to_socket_addrs()?.next(),
        };
        let none = || io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address"));
        let listener = listen(resolved.ok_or_else(none)?)
            .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
        open.1.push(listener.local_addr()?.to_string());
        open.0.push(listener);
    }
    Ok(open)
}

/// Addresses of this host by which others may reach it.
fn local_addresses() -> Vec<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut all: Vec<IpAddr> = v4_of(&read("/proc/net/fib_trie")).into_iter().map(IpAddr::V4).collect();
    all.extend(v6_of(&read("/proc/net/if_inet6")).into_iter().map(IpAddr::V6));
    all
}

/// Those that `/proc/net/fib_trie` marks as local, each once.
fn v4_of(trie: &str) -> Vec<Ipv4Addr> {
    let (mut found, mut last) = (Vec::new(), None);
    for line in trie.lines().map(str::trim_start) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.trim().parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL")
            && let Some(address) = last.filter(|address| !address.is_loopback() && !found.contains(address))
        {
            found.push(address);
        }
    }
    found
}

/// Those of global scope in `/proc/net/if_inet6`: address, interface, prefix, scope, flags, name.
fn v6_of(table: &str) -> Vec<Ipv6Addr> {
    let address = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        (fields.nth(2)? == "00").then(|| Ipv6Addr::from(address))
    };
    table.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mover::runtime::Threads;
    use std::io::Write;
    use std::time::Instant;

    fn harbour(lanes: u8) -> Harbour {
        Harbour::open(&["127.0.0.1".to_owned()], lanes, &Threads::new()).unwrap()
    }

    fn dial(harbour: &Harbour, greeting: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&harbour.offer().addresses[0]).unwrap();
        stream.write_all(greeting).unwrap();
        stream
    }

    /// Waits until the harbour has let go of a connection.
    fn closed(mut stream: TcpStream) {
        let got = stream.read(&mut [0; 1]);
        assert!(matches!(got, Ok(0)) || got.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset));
    }

    #[test]
    fn who_has_the_right_is_let_in_once_and_nobody_else() {
        let harbour = harbour(1);
        let greet = |number| greeting::encode(harbour.offer(), number);
        let control = dial(&harbour, &greet(0));
        closed(dial(&harbour, &greet(0)));
        closed(dial(&harbour, &greet(2)));
        closed(dial(&harbour, &[0; 64]));
        let other = Offer { token: [1; 32], ..harbour.offer().clone() };
        closed(dial(&harbour, &greeting::encode(&other, 1)));
        assert!(!harbour.is_full());
        let lane = dial(&harbour, &greet(1));
        let patience = Instant::now() + Duration::from_secs(60);
        while !harbour.is_full() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        let streams = harbour.leave();
        let ports: Vec<_> = streams.iter().map(|stream| stream.peer_addr().unwrap()).collect();
        assert_eq!(ports, [control.local_addr().unwrap(), lane.local_addr().unwrap()]);
    }

    #[test]
    fn a_closed_harbour_turns_everyone_away() {
        let harbour = harbour(1);
        let (address, greeting) =
            (harbour.offer().addresses[0].clone(), greeting::encode(harbour.offer(), 0));
        drop(harbour);
        let patience = Instant::now() + Duration::from_secs(60);
        while let Ok(mut stream) = TcpStream::connect(&address) {
            // Let go of at once, or never accepted.
            if stream.write_all(&greeting).is_ok() {
                closed(stream);
            }
            assert!(Instant::now() < patience, "it listens on");
        }
    }

    #[test]
    fn addresses_are_read_from_the_kernels_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.77.0.0\n        /24 link UNICAST\n     |-- 10.77.0.1\n        \
                    /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\nLocal:\n     |-- 10.77.0.1\n        \
                    /32 host LOCAL\n     |-- 10.77.0.255\n        /32 link BROADCAST\n";
        assert_eq!(v4_of(trie), [Ipv4Addr::new(10, 77, 0, 1)]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fe800000000000005054000000000001 02 40 20 80     eth0\n\
                     fd000000000000000000000000000001 02 40 00 80     eth0\nx\n";
        assert_eq!(v6_of(table), ["fd00::1".parse::<Ipv6Addr>().unwrap()]);
        assert!(local_addresses().iter().all(|address| !address.is_loopback()));
    }
}
