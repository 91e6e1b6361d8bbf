//! The target's side of the dial-back, on a thread of its own: the stream is read on meanwhile, and goes on without lanes
//! where none can be had.
#![forbid(unsafe_code)]

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use mover::error::NetError;
use mover::net::pass::Fingerprint;
use mover::net::tcp::TcpDialer;
use mover::net::{Connection, Dialer};
use mover::wire::hello::{Hello, MigrationId, Purpose, Secret};

use super::Credentials;
use super::net::settings;
use crate::confine;
use crate::stream::Offer;

/// How long an address may take to answer before the next one is tried.
const ANSWER: Duration = Duration::from_secs(2);

/// An attempt to dial back. Dropping it hangs up.
pub(crate) struct DialBack {
    offer: Offer,
    outcome: Receiver<Result<Vec<Connection>, String>>,
}

impl DialBack {
    /// Begins one; with certificates where there are `credentials`.
    ///
    /// # Errors
    /// No thread could be started.
    pub(crate) fn start(offer: Offer, credentials: Option<Credentials>) -> io::Result<Self> {
        let (tell, outcome) = mpsc::sync_channel(1);
        let terms = offer.clone();
        std::thread::Builder::new().name("pf-dial".to_owned()).spawn(move || {
            // The engine's own thread says so if this fails.
            let _ = confine::faces_the_network();
            // Nobody may want it any more; the connections are closed then.
            let _ = tell.send(dial(&terms, credentials.as_ref()));
        })?;
        Ok(Self { offer, outcome })
    }

    /// The offer it answers.
    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Why it has failed, if it has already.
    pub(crate) fn failure(&self) -> Option<String> {
        self.outcome.try_recv().ok()?.err()
    }

    /// All connections, by number; else a sentence about why there are none.
    pub(crate) fn finish(self, patience: Duration) -> Result<Vec<Connection>, String> {
        match self.outcome.recv_timeout(patience) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(format!("no address answered in {} s", patience.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err("internal error while dialling back".to_owned()),
        }
    }
}

fn dial(offer: &Offer, credentials: Option<&Credentials>) -> Result<Vec<Connection>, String> {
    let mut tried = Vec::new();
    for address in &offer.addresses {
        let all: Result<Vec<_>, _> = (0..=offer.lanes.into())
            .map(|number| one(offer, credentials, address, &first_hello(offer, number)))
            .collect();
        match all {
            Ok(connections) => return Ok(connections),
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    Err(tried.join("; "))
}

/// What connection `number` is for; 0 is the control connection, for `control`.
pub(super) fn purpose(number: usize, control: Purpose) -> Purpose {
    match number.checked_sub(1).map(u8::try_from) {
        Some(lane) => Purpose::Lane(lane.unwrap_or(u8::MAX)),
        None => control,
    }
}

/// What is said first on connection `number` of what `offer` offers.
pub(super) fn first_hello(offer: &Offer, number: usize) -> Hello {
    let purpose = purpose(number, Purpose::Control);
    Hello::new(purpose, MigrationId(offer.migration), Secret::of(&offer.token))
}

/// A connection for `hello`, as `offer` says they are protected, at one of its addresses.
pub(super) fn one(
    offer: &Offer,
    credentials: Option<&Credentials>,
    address: &str,
    hello: &Hello,
) -> Result<Connection, NetError> {
    let mut dialer = TcpDialer::new(address, settings()).pinned(offer.fingerprint.map(Fingerprint));
    if let Some(Credentials { authority, peer_name }) = credentials {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        dialer = dialer.certified(authority.clone(), Some(peer_name.as_deref().unwrap_or(host)))?;
    }
    dialer.call(hello, ANSWER)
}
