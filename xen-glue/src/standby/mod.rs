//! A process beside the target's worker that takes its place if it is killed while pages are outstanding.
//!
//! ```text
//!   worker: [`Guard`]                                          standby (`crate::helper`)
//!     the ring's frame is there, paging is on
//!     starts it --- socket, table of pages, pidfd ------------> maps the frame too, which a moment later nobody can
//!            <------------------------------- mapped ---------- or a sentence about why not
//!     the source's shape and the session are known
//!     [`Terms`] -----------------------------------------------> opens the disks, gives up what opening them took
//!     the guest is about to run
//!     armed ---------------------------------------------------> waits for the worker's end
//!     all is there: kills it and waits for its end
//!     is killed .................... pidfd ....................> the drain is its own
//! ```
//! What is outstanding, and where it stands, is in the table of pages, which the worker's engine has in shared memory anyway, so that
//! its hot path does nothing for this. What of it has come, the standby asks the hypervisor; who waits, the ring's page says.
//!
//! Invariants:
//! - One of the two answers the ring: the standby touches it when the kernel says that every thread of the worker has ended.
//! - A worker that is not armed has not told the toolstack that the guest is restored: the toolstack destroys the domain,
//!   and the standby goes without a word.
#![forbid(unsafe_code)]

mod guard;

use mover::wire::control::{HEADER_BYTES, Message, Shape};
use mover::wire::hello::Secret;
use zeroize::Zeroizing;

use crate::stream::Offer;

pub use guard::Guard;
#[cfg(test)]
pub(crate) use guard::make_table;
pub(crate) use guard::{map_table, say_mapped, take_terms, wait_armed};

/// The first argument of a standby, before its descriptors' numbers, the domain, the ring's frame and how many frames the guest has.
pub(crate) const ARGUMENT: &str = "--standby";
/// Most bytes of terms: a shape's message and an offer are each less than half of it.
const TERMS_BYTES_MAX: usize = 2 << 20;

/// What the standby has to know of a migration.
pub(crate) struct Terms {
    /// The hypervisor's end of the ring's event channel.
    pub(crate) port: u32,
    /// What the source shows when it is dialled again.
    pub(crate) session: Secret,
    /// Where it is, and how the lanes are protected.
    pub(crate) offer: Offer,
    /// The guest, its disks, and the key of the checks.
    pub(crate) shape: Shape,
}

impl Terms {
    fn encode(port: u32, session: &Secret, offer: &Offer, shape: &Shape) -> Zeroizing<Vec<u8>> {
        let offer = Zeroizing::new(offer.encode());
        let shape = Zeroizing::new(Message::Shape(shape.clone()).encode());
        let length = u32::try_from(offer.len()).unwrap_or(u32::MAX);
        // Of its full length from the beginning: it is not to leave copies behind as it grows.
        let mut out = Zeroizing::new(Vec::with_capacity(8 + Secret::BYTES + offer.len() + shape.len()));
        out.extend(port.to_le_bytes());
        out.extend(session.bytes());
        out.extend(length.to_le_bytes());
        out.extend(&offer[..]);
        out.extend(&shape[..]);
        assert!(out.len() <= TERMS_BYTES_MAX, "{} bytes of terms", out.len());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (port, rest) = bytes.split_first_chunk::<4>()?;
        let (session, rest) = rest.split_first_chunk::<{ Secret::BYTES }>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (offer, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        let (header, body) = rest.split_first_chunk::<HEADER_BYTES>()?;
        let (kind, length) = Message::header(header).ok()?;
        let Message::Shape(shape) = Message::decode(kind, body).ok().filter(|_| length == body.len())? else {
            return None;
        };
        let (port, session) = (u32::from_le_bytes(*port), Secret::of(session));
        Some(Self { port, session, offer: Offer::decode(offer).ok()?, shape })
    }
}
