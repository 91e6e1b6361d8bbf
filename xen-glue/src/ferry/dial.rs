//! The target's side of the dial-back, on a thread of its own: the stream is read on meanwhile, and goes on without lanes
//! where none can be had.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use super::greeting;
use crate::stream::Offer;

/// How long an address may take to answer before the next one is tried.
const ANSWER: Duration = Duration::from_secs(1);

/// An attempt to dial back. Dropping it hangs up.
pub(crate) struct DialBack {
    offer: Offer,
    outcome: Receiver<Result<Vec<TcpStream>, String>>,
}

impl DialBack {
    /// Begins one.
    ///
    /// # Errors
    /// No thread could be started.
    pub(crate) fn start(offer: Offer) -> io::Result<Self> {
        let (tell, outcome) = mpsc::sync_channel(1);
        let terms = offer.clone();
        std::thread::Builder::new().name("pf-dial".to_owned()).spawn(move || {
            // Nobody may want it any more; the connections are closed then.
            let _ = tell.send(dial(&terms));
        })?;
        Ok(Self { offer, outcome })
    }

    /// The offer it answers.
    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// All connections, by number; else a sentence about why there are none.
    pub(crate) fn finish(self, patience: Duration) -> Result<Vec<TcpStream>, String> {
        match self.outcome.recv_timeout(patience) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(format!("no address answered in {} s", patience.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err("internal error while dialling back".to_owned()),
        }
    }
}

fn dial(offer: &Offer) -> Result<Vec<TcpStream>, String> {
    let mut tried = Vec::new();
    for name in &offer.addresses {
        let found: Vec<SocketAddr> = match name.to_socket_addrs() {
            Ok(found) => found.collect(),
            Err(error) => {
                tried.push(format!("{name}: {error}"));
                continue;
            }
        };
        for address in found {
            match all(offer, address) {
                Ok(streams) => return Ok(streams),
                Err(error) => tried.push(format!("{name}: {error}")),
            }
        }
    }
    Err(tried.join("; "))
}

fn all(offer: &Offer, address: SocketAddr) -> io::Result<Vec<TcpStream>> {
    (0..=offer.lanes)
        .map(|number| {
            let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
            stream.set_write_timeout(Some(ANSWER))?;
            stream.write_all(&greeting::encode(offer, number))?;
            Ok(stream)
        })
        .collect()
}
