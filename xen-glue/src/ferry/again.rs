//! Connections made again after a cut, while the guest runs on the target and pages of it are outstanding: in the direction
//! that works under a toolstack, the target dials and the source is there.
//!
//! ```text
//!   source                                                     target
//!     [`Returning`]: the harbour's own sockets, which          [`Returner`]: the offer's addresses, key, certificates
//!     nobody looks at while the connections hold
//!     lost: lets in who shows the session's secret <========== lost: control, then lanes, at one address after the other
//!     all are there
//!     control: Hello, Resume -------------------------------->
//!            <------------------------------------------------ Welcome, and how far it is
//!     lanes: Hello, Lane ------------------------------------>
//! ```
//! The right to come back is the session's secret, which the target has drawn and told over the first control connection. The
//! offer's token, which has crossed the stream, is good for nothing any more. Key and certificates are as they were.
//!
//! Threads: each half is its engine's, on the one task that dials or accepts; both look without a lock. Invariants: nobody is
//! let in while the connections hold; of two connections with the same number the later one counts, and with a new control
//! connection the lanes begin anew; the source says nothing on the first of them before it has the last, for until then the target
//! waits to be let in, and hears nothing.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use mover::error::NetError;
use mover::limits::LANES_MAX;
use mover::net::entrance::Entrance;
use mover::net::{Acceptor, Caller, Connection};
use mover::wire::hello::{Hello, MigrationId, Purpose, Secret};

use super::{Credentials, dial};
use crate::stream::Offer;

/// How long the source waits for connections before it looks around.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks at all addresses.
const GLANCE: Duration = Duration::from_millis(50);
/// Between two rounds of the target's through all addresses.
const REDIAL: Duration = Duration::from_millis(250);

/// The place of a connection for `purpose` among those of a migration with so many lanes.
fn place(purpose: Purpose, lanes: u8) -> Option<usize> {
    match purpose {
        Purpose::Resume => Some(0),
        Purpose::Lane(number) if number < lanes => Some(usize::from(number) + 1),
        Purpose::Lane(_) | Purpose::Control => None,
    }
}

/// The source's half: who comes back is let in here.
pub(crate) struct Returning {
    entrances: Vec<Entrance>,
    migration: MigrationId,
    lanes: u8,
    /// By number: 0 for control, then the lanes.
    came: Vec<Option<Connection>>,
}

impl Returning {
    /// At these entrances, which the first connections have come in by.
    pub(super) fn new(entrances: Vec<Entrance>, offer: &Offer) -> Self {
        let came = (0..=offer.lanes).map(|_| None).collect();
        Self { entrances, migration: MigrationId(offer.migration), lanes: offer.lanes, came }
    }

    /// The connection that is to be said `hello` on. For control all are waited for, made by who knows its secret.
    pub(super) fn connection(&mut self, hello: &Hello) -> Result<Connection, NetError> {
        let Some(number) = place(hello.purpose, self.lanes) else { return Err(NetError::HungUp) };
        if number == 0 {
            self.all(&hello.secret)?;
        }
        self.came[number].take().ok_or(NetError::HungUp)
    }

    /// Waits until all connections are there, for a while; those that are stay for the next time.
    fn all(&mut self, session: &Secret) -> Result<(), NetError> {
        if self.came[0].is_none() {
            // Lanes of a control connection that was taken and has been lost again.
            self.came.iter_mut().for_each(|place| *place = None);
        }
        let deadline = Instant::now() + LOOK;
        while self.came.iter().any(Option::is_none) {
            if Instant::now() >= deadline {
                let (peer, seconds) = ("the target".to_owned(), LOOK.as_secs());
                return Err(NetError::Stalled { peer, seconds, doing: "it was waited for to dial again" });
            }
            self.let_in(session);
        }
        Ok(())
    }

    /// Looks at all entrances once.
    fn let_in(&mut self, session: &Secret) {
        let glance = GLANCE / u32::try_from(self.entrances.len().max(1)).unwrap_or(1);
        for entrance in &mut self.entrances {
            match entrance.caller(session, glance) {
                Ok(Some(caller)) => {
                    if let Some(number) = number(&caller, self.migration, session, self.lanes) {
                        if number == 0 {
                            self.came.iter_mut().for_each(|place| *place = None);
                        }
                        self.came[number] = Some(caller.connection);
                    }
                }
                Ok(None) => {}
                // This address takes no connections at the moment, as when its interface is gone.
                Err(_) => std::thread::sleep(glance),
            }
            // Who else knocked is nobody's concern here.
            drop(entrance.turned_away());
        }
    }
}

/// Which connection a caller is; none if it has no right to be one.
fn number(caller: &Caller, migration: MigrationId, session: &Secret, lanes: u8) -> Option<usize> {
    let hello = Hello::decode(&caller.hello).ok()?;
    let ours = hello.migration == migration && hello.secret.same(session);
    hello.common_version().filter(|_| ours)?;
    place(hello.purpose, lanes)
}

/// How the target comes back, and for how long it tries.
#[derive(Clone, Debug)]
pub(crate) struct Return {
    /// The certificates it goes by.
    pub(crate) credentials: Option<Credentials>,
    /// How long it tries after a loss.
    pub(crate) redial_for: Duration,
}

/// The target's half: dials until all connections are made anew, one step a call.
pub(super) struct Returner {
    offer: Offer,
    how: Return,
    /// The address that is tried.
    address: usize,
    made: Vec<Connection>,
    /// When the connections were lost that are to be made anew.
    lost: Option<Instant>,
    /// Not before then.
    next: Instant,
}

impl Returner {
    pub(super) fn new(offer: Offer, how: Return) -> Self {
        assert!(usize::from(offer.lanes) <= LANES_MAX && !offer.addresses.is_empty(), "as decoded");
        Self { offer, how, address: 0, made: Vec::new(), lost: None, next: Instant::now() }
    }

    /// Begins anew: all connections are lost.
    pub(super) fn begin(&mut self) {
        self.made.clear();
        self.lost = Some(Instant::now());
    }

    /// One attempt to make the next connection, if one is due; all of them, once they are made.
    pub(super) fn step(&mut self, session: &Secret) -> Option<Vec<Connection>> {
        let lost = self.lost?;
        if Instant::now() < self.next || lost.elapsed() >= self.how.redial_for {
            return None;
        }
        let migration = MigrationId(self.offer.migration);
        let purpose = dial::purpose(self.made.len(), Purpose::Resume);
        let hello = Hello::new(purpose, migration, session.clone());
        let address = &self.offer.addresses[self.address];
        match dial::one(&self.offer, self.how.credentials.as_ref(), address, &hello) {
            Ok(connection) => {
                self.made.push(connection);
                if self.made.len() <= usize::from(self.offer.lanes) {
                    return None;
                }
                self.lost = None;
                Some(std::mem::take(&mut self.made))
            }
            Err(_) => {
                self.made.clear();
                self.address = (self.address + 1) % self.offer.addresses.len();
                if self.address == 0 {
                    self.next = Instant::now() + REDIAL;
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ferry::dial::DialBack;
    use crate::ferry::harbour::{Harbour, Terms};
    use mover::runtime::Threads;

    const SESSION: [u8; 32] = [7; 32];
    const ONCE: Duration = Duration::ZERO;

    /// The source's half of a migration with one lane whose first connections are lost, and what it has offered.
    fn returning(plaintext: bool) -> (Returning, Offer) {
        let terms = Terms { addresses: &["127.0.0.1".to_owned()], lanes: 1, plaintext, authority: None };
        let harbour = Harbour::open(terms, &Threads::new()).unwrap();
        let offer = harbour.offer().clone();
        let dialled = DialBack::start(offer.clone(), None).unwrap().finish(Duration::from_secs(60)).unwrap();
        while !harbour.is_full() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(dialled);
        (harbour.leave().1, offer)
    }

    fn hello(purpose: Purpose, offer: &Offer) -> Hello {
        Hello::new(purpose, MigrationId(offer.migration), Secret::of(&SESSION))
    }

    /// Dials with these while the source waits, once or so often that it finds who comes back; what each end has in the end.
    fn met(
        returning: &mut Returning,
        offer: &Offer,
        dialled: &[Hello],
        patience: Duration,
    ) -> (Result<Connection, NetError>, Vec<Connection>) {
        std::thread::scope(|scope| {
            let dial = |hello| dial::one(offer, None, &offer.addresses[0], hello).ok();
            let dialling = scope.spawn(move || dialled.iter().filter_map(dial).collect());
            let begun = Instant::now();
            let mut came = returning.connection(&hello(Purpose::Resume, offer));
            while came.is_err() && begun.elapsed() < patience {
                came = returning.connection(&hello(Purpose::Resume, offer));
            }
            (came, dialling.join().unwrap())
        })
    }

    fn carries(ours: &mut Connection, theirs: &mut Connection) {
        let mut got = [0; 1];
        ours.sender.send(&[5], &[]).unwrap();
        theirs.receiver.recv(&mut got).unwrap();
        assert_eq!(got, [5]);
    }

    #[test]
    fn the_sessions_secret_lets_in_again_and_nothing_else_does() {
        for plaintext in [false, true] {
            let (mut returning, offer) = returning(plaintext);
            let migration = MigrationId(offer.migration);
            let lane = hello(Purpose::Lane(0), &offer);
            for (what, control) in [
                ("the offer's token", Hello::new(Purpose::Resume, migration, Secret::of(&offer.token))),
                (
                    "the first connection again",
                    Hello::new(Purpose::Control, migration, Secret::of(&offer.token)),
                ),
                ("a new migration", hello(Purpose::Control, &offer)),
                (
                    "another migration",
                    Hello::new(Purpose::Resume, MigrationId([1; 16]), Secret::of(&SESSION)),
                ),
                ("a lane there is none of", hello(Purpose::Lane(1), &offer)),
            ] {
                let (came, _theirs) = met(&mut returning, &offer, &[control, lane.clone()], ONCE);
                assert!(came.is_err(), "{what} is let in");
            }
            let right = [hello(Purpose::Resume, &offer), lane.clone()];
            let (came, mut theirs) = met(&mut returning, &offer, &right, Duration::from_secs(60));
            carries(&mut came.expect("who has the right is turned away"), &mut theirs[0]);
            carries(&mut returning.connection(&lane).expect("its lane is there"), &mut theirs[1]);
        }
    }

    /// What the target has made before it lost the link once more is of no use, and none of it is taken for what it makes now.
    #[test]
    fn who_comes_back_twice_begins_anew() {
        let (mut returning, offer) = returning(true);
        let (control, lane) = (hello(Purpose::Resume, &offer), hello(Purpose::Lane(0), &offer));
        let anew = [lane.clone(), control.clone()];
        let (came, _theirs) = met(&mut returning, &offer, &anew, ONCE);
        assert!(came.is_err(), "a lane of the connection before is taken for one of this");
        let again = [control, lane.clone()];
        let (came, mut theirs) = met(&mut returning, &offer, &again, Duration::from_secs(60));
        carries(&mut came.unwrap(), &mut theirs[0]);
        carries(&mut returning.connection(&lane).unwrap(), &mut theirs[1]);
        assert!(returning.connection(&lane).is_err(), "it is taken once");
    }
}
