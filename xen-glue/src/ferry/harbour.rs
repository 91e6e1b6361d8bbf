//! The source's side of the dial-back: listens, and lets in who shows the offer's right, each number once. A thread of its
//! own, so that the stream goes on meanwhile. How a stranger is kept out is `mover`'s [`Entrance`].
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mover::error::NetError;
use mover::net::entrance::{Entrance, Lock};
use mover::net::tcp::TcpAcceptor;
use mover::net::tls::{Authority, Identity};
use mover::net::{Acceptor, Caller, Connection};
use mover::runtime::Runtime;
use mover::wire::hello::{Hello, Purpose, Secret};

use super::again::Returning;
use super::net::settings;
use crate::confine;
use crate::stream::Offer;
use crate::stream::limits::OFFER_ADDRESSES_MAX;

/// How long to wait for connections before looking whether the harbour is closed.
const GLANCE: Duration = Duration::from_millis(50);

/// What the keeper's thread and the save share.
struct Berths {
    /// By number: 0 for control, then the lanes.
    taken: Mutex<Vec<Option<Connection>>>,
    free: AtomicUsize,
    closed: AtomicBool,
}

/// Waits for the target to dial back. Dropping it turns away whoever still comes.
pub(crate) struct Harbour {
    offer: Offer,
    berths: Arc<Berths>,
    /// Ends with the entrances it has kept.
    keeper: Option<JoinHandle<Vec<Entrance>>>,
}

/// Where and how to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    /// `HOST` or `HOST:PORT` each, and nowhere else; none is every address of this host.
    pub(crate) addresses: &'a [String],
    /// Data connections.
    pub(crate) lanes: u8,
    /// Without TLS.
    pub(crate) plaintext: bool,
    /// Who issues certificates to both ends, if anybody does.
    pub(crate) authority: Option<&'a Authority>,
}

impl Harbour {
    /// Listens.
    ///
    /// # Errors
    /// An address is not this host's, or its port is taken.
    pub(crate) fn open(terms: Terms<'_>, runtime: &dyn Runtime) -> Result<Self, NetError> {
        let (acceptors, addresses) = match terms.addresses {
            [] => everywhere()?,
            these => at_these(these)?,
        };
        // One key for all of them: the offer has room for one.
        let identity = match (terms.plaintext, terms.authority) {
            (true, _) => None,
            (false, None) => Some(Identity::new()?),
            (false, Some(authority)) => Some(authority.identity()?),
        };
        let lock = || identity.clone().map_or(Lock::Plain, Lock::Tls);
        let fingerprint = identity.as_ref().map(|identity| identity.fingerprint().0);
        let entrances: Vec<_> =
            acceptors.into_iter().map(|acceptor| Entrance::new(acceptor, lock())).collect();
        let (mut migration, mut token) = ([0; 16], [0; 32]);
        runtime.random(&mut migration);
        runtime.random(&mut token);
        let offer = Offer { migration, token, lanes: terms.lanes, fingerprint, addresses };
        let count = usize::from(terms.lanes) + 1;
        let berths = Arc::new(Berths {
            taken: Mutex::new((0..count).map(|_| None).collect()),
            free: AtomicUsize::new(count),
            closed: AtomicBool::new(false),
        });
        let (theirs, right) = (Arc::clone(&berths), offer.clone());
        let keeper = std::thread::Builder::new()
            .name("pf-harbour".to_owned())
            .spawn(move || keep(entrances, &right, &theirs))
            .map_err(|source| NetError::Os {
                doing: "cannot start a thread".to_owned(),
                remedy: "Is the limit on processes (ulimit -u) or memory used up?",
                source,
            })?;
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

    /// The connections by number, of a full harbour, and what lets in who comes back when they are lost. Until then nobody
    /// looks who knocks at the harbour's addresses.
    pub(crate) fn leave(mut self) -> (Vec<Connection>, Returning) {
        // A panic of the keeper's would have left a place free.
        let entrances = self.keeper.take().and_then(|keeper| keeper.join().ok()).unwrap_or_default();
        let mut taken = self.berths.taken.lock().unwrap_or_else(PoisonError::into_inner);
        (taken.drain(..).flatten().collect(), Returning::new(entrances, &self.offer))
    }
}

impl Drop for Harbour {
    fn drop(&mut self) {
        self.berths.closed.store(true, SeqCst);
    }
}

/// Lets connections in until all are there or the harbour is closed.
fn keep(mut entrances: Vec<Entrance>, offer: &Offer, berths: &Berths) -> Vec<Entrance> {
    // The engine's own thread says so if this fails.
    let _ = confine::faces_the_network();
    let token = Secret::of(&offer.token);
    let glance = GLANCE / u32::try_from(entrances.len().max(1)).unwrap_or(1);
    while berths.free.load(SeqCst) > 0 && !berths.closed.load(SeqCst) {
        for entrance in &mut entrances {
            match entrance.caller(&token, glance) {
                Ok(Some(caller)) => let_in(caller, offer, berths),
                Ok(None) => {}
                // This address takes no more connections; if it was the last one, the stream is what is left.
                Err(_) => std::thread::sleep(glance),
            }
            // Who else knocked is nobody's concern here.
            drop(entrance.turned_away());
        }
    }
    entrances
}

/// Gives a caller with the right its place.
fn let_in(caller: Caller, offer: &Offer, berths: &Berths) {
    let Some(number) = number(&caller, offer) else { return };
    let mut taken = berths.taken.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(place) = taken.get_mut(number).filter(|place| place.is_none()) {
        *place = Some(caller.connection);
        berths.free.fetch_sub(1, SeqCst);
    }
}

/// Which connection a caller is; none if it has no right to be one.
fn number(caller: &Caller, offer: &Offer) -> Option<usize> {
    let hello = Hello::decode(&caller.hello).ok()?;
    let ours = hello.migration.0 == offer.migration && hello.secret.same(&Secret::of(&offer.token));
    hello.common_version().filter(|_| ours)?;
    match hello.purpose {
        Purpose::Control => Some(0),
        Purpose::Lane(number) if number < offer.lanes => Some(usize::from(number) + 1),
        Purpose::Lane(_) | Purpose::Resume => None,
    }
}

type Open = (Vec<TcpAcceptor>, Vec<String>);

/// On every address of this host.
fn everywhere() -> Result<Open, NetError> {
    let v6 = TcpAcceptor::listen("[::]:0", settings());
    let dual = v6.is_ok();
    let acceptor = v6.or_else(|_| TcpAcceptor::listen("0.0.0.0:0", settings()))?;
    let port = acceptor.local().port();
    let mut all = local_addresses();
    all.retain(|address| dual || address.is_ipv4());
    all.truncate(OFFER_ADDRESSES_MAX);
    if all.is_empty() {
        return Err(NetError::Os {
            doing: "this host has no address but its own loop".to_owned(),
            remedy: "Is its network up?",
            source: std::io::ErrorKind::AddrNotAvailable.into(),
        });
    }
    Ok((vec![acceptor], all.into_iter().map(|ip| SocketAddr::new(ip, port).to_string()).collect()))
}

/// On those addresses alone.
fn at_these(addresses: &[String]) -> Result<Open, NetError> {
    let mut open = (Vec::new(), Vec::new());
    for address in addresses.iter().take(OFFER_ADDRESSES_MAX) {
        let acceptor = TcpAcceptor::listen(&with_port(address), settings())?;
        open.1.push(acceptor.local().to_string());
        open.0.push(acceptor);
    }
    Ok(open)
}

/// `HOST` with any free port, `HOST:PORT` as it is.
fn with_port(address: &str) -> String {
    if let Ok(ip) = address.parse::<IpAddr>() {
        return SocketAddr::new(ip, 0).to_string();
    }
    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { address.to_owned() } else { format!("{address}:0") }
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
    use crate::ferry::dial::{self, DialBack};
    use mover::runtime::Threads;
    use std::time::Instant;

    fn harbour(lanes: u8, plaintext: bool) -> Harbour {
        let terms = Terms { addresses: &["127.0.0.1".to_owned()], lanes, plaintext, authority: None };
        Harbour::open(terms, &Threads::new()).unwrap()
    }

    fn full(harbour: &Harbour) -> bool {
        let patience = Instant::now() + Duration::from_secs(60);
        while !harbour.is_full() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        harbour.is_full()
    }

    /// Dials as purpose `number` of `offer`, and waits until the harbour has done with it.
    fn dial(offer: &Offer, number: usize) -> Option<Connection> {
        let hello = dial::first_hello(offer, number);
        let mut connection = dial::one(offer, None, &offer.addresses[0], &hello).ok()?;
        connection.receiver.set_patience(Some(Duration::from_millis(300)));
        // Nothing is ever answered: silence is a place, an end is none.
        match connection.receiver.recv(&mut [0; 1]) {
            Err(NetError::Stalled { .. }) => Some(connection),
            _ => None,
        }
    }

    #[test]
    fn who_has_the_right_is_let_in_once_and_nobody_else() {
        for plaintext in [false, true] {
            let harbour = harbour(1, plaintext);
            let offer = harbour.offer().clone();
            assert_eq!(offer.fingerprint.is_none(), plaintext);
            let control = dial(&offer, 0);
            assert!(control.is_some(), "the right one is turned away");
            assert!(dial(&offer, 0).is_none(), "a number twice");
            assert!(dial(&offer, 2).is_none(), "there is one lane");
            assert!(dial(&Offer { token: [1; 32], ..offer.clone() }, 1).is_none());
            assert!(dial(&Offer { migration: [1; 16], ..offer.clone() }, 1).is_none());
            let other = Offer { fingerprint: if plaintext { Some([3; 32]) } else { None }, ..offer.clone() };
            assert!(dial(&other, 1).is_none(), "the other protection");
            assert!(!harbour.is_full());
            let lane = dial(&offer, 1);
            assert!(full(&harbour) && lane.is_some());
            assert_eq!(harbour.leave().0.len(), 2);
        }
    }

    #[test]
    fn connections_are_handed_over_by_number_and_carry_both_ways() {
        for plaintext in [false, true] {
            let harbour = harbour(2, plaintext);
            let dialled = DialBack::start(harbour.offer().clone(), None).unwrap();
            let mut theirs = dialled.finish(Duration::from_secs(60)).unwrap();
            assert!(full(&harbour));
            for (number, (ours, theirs)) in (7..).zip(harbour.leave().0.iter_mut().zip(&mut theirs)) {
                let mut got = [0; 1];
                ours.sender.send(&[number], &[]).unwrap();
                theirs.receiver.recv(&mut got).unwrap();
                assert_eq!(got, [number]);
                theirs.sender.send(&[number + 1], &[]).unwrap();
                ours.receiver.recv(&mut got).unwrap();
                assert_eq!(got, [number + 1]);
            }
        }
    }

    #[test]
    fn a_closed_harbour_turns_everyone_away() {
        let harbour = harbour(1, false);
        let offer = harbour.offer().clone();
        drop(harbour);
        let patience = Instant::now() + Duration::from_secs(60);
        while dial(&offer, 0).is_some() {
            assert!(Instant::now() < patience, "it lets callers in");
        }
    }

    #[test]
    fn another_key_is_not_dialled() {
        let harbour = harbour(1, false);
        let offer = Offer { fingerprint: Some([9; 32]), ..harbour.offer().clone() };
        let error = DialBack::start(offer, None).unwrap().finish(Duration::from_secs(60)).err().unwrap();
        assert!(error.contains("127.0.0.1"), "{error}");
        assert!(!harbour.is_full());
    }

    #[test]
    fn addresses_may_have_a_port() {
        for (given, wanted) in [
            ("10.0.0.1", "10.0.0.1:0"),
            ("10.0.0.1:7", "10.0.0.1:7"),
            ("fd00::1", "[fd00::1]:0"),
            ("[fd00::1]:7", "[fd00::1]:7"),
            ("host", "host:0"),
            ("host:7", "host:7"),
        ] {
            assert_eq!(with_port(given), wanted);
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
