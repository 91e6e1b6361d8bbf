//! The three records by which two pageferries take page contents out of the stream (`docs/PROTOCOL.md`, "Under a
//! toolstack"): what stands in them, and their limits. All integers are little-endian.
//!
//! ```text
//!   OFFER       optional    the source can be dialled back: who does not know it passes over it
//!   LANES       mandatory   page contents come on the lanes from here on
//!   LANES_DONE  mandatory   and what has come on them, to be compared
//! ```
#![forbid(unsafe_code)]

use std::ops::Range;

use mover::limits::{GUEST_PAGES_MAX, LANES_MAX};
use mover::units::{u64_of, usize_of};

use super::body::BodyFault;
use super::error::Fault;
use super::fields::{bytes_at, u16_at, u32_at, u64_at};
use super::kind::OPTIONAL;
use super::limits::{OFFER_ADDRESS_BYTES_MAX, OFFER_ADDRESSES_MAX, RUNS_MAX};

/// OFFER's type: bit 31 says that it may be passed over; the rest is 'P', 'F' and a number.
pub const OFFER: u32 = OPTIONAL | 0x5046_0000;
/// The version of all three.
const VERSION: u16 = 1;

const OFFER_HEAD: usize = 88;
/// How connections are protected: not at all, or by TLS 1.3 with a raw public key.
const CLEAR: u8 = 0;
const TLS: u8 = 1;
pub(super) const LANES_HEAD: u32 = 32;
pub(super) const RUN_BYTES: u32 = 16;
/// Bytes of LANES_DONE.
pub(super) const LANES_DONE_BYTES: u32 = 56;

/// OFFER: where and with what right the target may dial back.
#[derive(Clone, PartialEq, Eq)]
pub struct Offer {
    /// The migration's id.
    pub migration: [u8; 16],
    /// The right to dial back, good once. It crosses only the stream, which the toolstack protects (ssh).
    pub token: [u8; 32],
    /// Data connections there are to be, besides one for control.
    pub lanes: u8,
    /// The key that the source shows in TLS, by SHA-256 of its SubjectPublicKeyInfo; none where connections are in the clear.
    pub fingerprint: Option<[u8; 32]>,
    /// Where: `HOST:PORT`, IPv6 in brackets, to be tried in this order.
    pub addresses: Vec<String>,
}

impl std::fmt::Debug for Offer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { migration, lanes, fingerprint, addresses, .. } = self;
        let mut shown = f.debug_struct("Offer");
        shown
            .field("migration", migration)
            .field("lanes", lanes)
            .field("fingerprint", fingerprint)
            .field("addresses", addresses);
        shown.finish_non_exhaustive()
    }
}

impl Offer {
    /// As a record's body. Asserts that the numbers are within their limits; who makes an offer keeps to them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!((1..=LANES_MAX).contains(&usize::from(self.lanes)), "{} lanes", self.lanes);
        assert!(
            (1..=OFFER_ADDRESSES_MAX).contains(&self.addresses.len()),
            "{} addresses",
            self.addresses.len()
        );
        let mut out = Vec::with_capacity(OFFER_HEAD + 32 * self.addresses.len());
        out.extend(VERSION.to_le_bytes());
        out.extend([self.lanes, if self.fingerprint.is_some() { TLS } else { CLEAR }]);
        out.extend(u16::try_from(self.addresses.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend([0; 2]);
        out.extend(self.migration);
        out.extend(self.token);
        out.extend(self.fingerprint.unwrap_or_default());
        for address in &self.addresses {
            assert!((1..=OFFER_ADDRESS_BYTES_MAX).contains(&address.len()), "address {address}");
            out.extend(u16::try_from(address.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend(address.as_bytes());
        }
        out
    }

    /// From a record's body.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it; the stream is good without it.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        if body.len() < OFFER_HEAD {
            return Err(format!("it has {} bytes, too few", body.len()));
        }
        let version = u16_at(body, 0);
        if version != VERSION {
            return Err(format!("it is of version {version}, and {VERSION} is spoken here"));
        }
        let (lanes, security) = (body[2], body[3]);
        let fingerprint = match (security, bytes_at::<32>(body, 56)) {
            (CLEAR, none) if none == [0; 32] => None,
            (TLS, fingerprint) => Some(fingerprint),
            _ => return Err("it asks for a protection of the lanes that is not known here".to_owned()),
        };
        if u16_at(body, 6) != 0 {
            return Err("its reserved bytes are set".to_owned());
        }
        let count = usize::from(u16_at(body, 4));
        if !(1..=LANES_MAX).contains(&usize::from(lanes)) || !(1..=OFFER_ADDRESSES_MAX).contains(&count) {
            return Err(format!("{lanes} lanes at {count} addresses are past the limits"));
        }
        let mut rest = &body[OFFER_HEAD..];
        let mut addresses = Vec::with_capacity(count);
        for _ in 0..count {
            let (address, behind) = text(rest).ok_or("an address of it is none")?;
            addresses.push(address);
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(format!("{} bytes follow behind its addresses", rest.len()));
        }
        let (migration, token) = (bytes_at(body, 8), bytes_at(body, 24));
        Ok(Self { migration, token, lanes, fingerprint, addresses })
    }
}

/// The address `bytes` begin with, and what is behind it.
fn text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let length = usize::from(u16_at(bytes.get(..2)?, 0));
    let address = bytes.get(2..2 + length)?;
    let plain = (1..=OFFER_ADDRESS_BYTES_MAX).contains(&length) && address.iter().all(u8::is_ascii_graphic);
    let address = std::str::from_utf8(address).ok().filter(|_| plain)?;
    Some((address.to_owned(), &bytes[2 + length..]))
}

/// LANES: page contents come on the lanes from here on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lanes {
    /// The migration's id, as in the offer.
    pub migration: [u8; 16],
    /// The guest's frames are numbered from 0 up to this; those of lanes too.
    pub pages: u64,
    /// Frames that have memory, as far as known, in ascending runs that neither touch nor overlap: what to get memory
    /// for at once. Others may come all the same.
    pub populated: Vec<Range<u64>>,
}

impl Lanes {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(usize_of(u64::from(LANES_HEAD)) + 16 * self.populated.len());
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 2]);
        out.extend(u32::try_from(self.populated.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(self.migration);
        out.extend(self.pages.to_le_bytes());
        for run in &self.populated {
            out.extend(run.start.to_le_bytes());
            out.extend((run.end - run.start).to_le_bytes());
        }
        out
    }

    /// From a body whose length has been held against the record's shape.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, BodyFault> {
        version("LANES", body)?;
        reserved("LANES", u16_at(body, 2).into())?;
        let count = usize_of(u32_at(body, 4).into());
        let runs = &body[usize_of(u64::from(LANES_HEAD))..];
        if count != runs.len() / 16 {
            let expected = format!("its {count} runs take {}", u64::from(LANES_HEAD) + 16 * u64_of(count));
            return Err((4, Fault::Length { record: "LANES", found: u64_of(body.len()), expected }));
        }
        let pages = u64_at(body, 24);
        let populated = runs
            .chunks_exact(16)
            .map(|run| u64_at(run, 0)..u64_at(run, 0).saturating_add(u64_at(run, 8)))
            .collect();
        let lanes = Self { migration: bytes_at(body, 8), pages, populated };
        lanes.check()?;
        Ok(lanes)
    }

    /// Holds the numbers against their limits.
    pub(crate) fn check(&self) -> Result<(), BodyFault> {
        let limit = |at, what, found, limit| Err((at, Fault::Limit { what, found, limit }));
        if self.pages == 0 || self.pages > GUEST_PAGES_MAX {
            return limit(24, "the number of LANES' frames", self.pages, GUEST_PAGES_MAX);
        }
        if self.populated.len() > RUNS_MAX {
            return limit(4, "the number of LANES' runs", u64_of(self.populated.len()), u64_of(RUNS_MAX));
        }
        let mut free = 0;
        for (at, run) in (u64::from(LANES_HEAD)..).step_by(16).zip(&self.populated) {
            if run.start < free || run.is_empty() || run.end > self.pages {
                let what = Fault::Text { what: "LANES' runs do not ascend within its frames" };
                return Err((at, what));
            }
            // The next one does not touch it.
            free = run.end + 1;
        }
        Ok(())
    }
}

/// LANES_DONE: what has gone over the lanes, up to the barrier of the last round on each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LanesDone {
    /// Frames of all lanes.
    pub frames: u64,
    /// The highest version of any of them.
    pub version: u64,
    /// The round of the last barriers.
    pub round: u32,
    /// Digest over headers and tables of all frames, see `docs/PROTOCOL.md`.
    pub digest: [u8; 32],
}

impl LanesDone {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(usize_of(u64::from(LANES_DONE_BYTES)));
        out.extend(self.frames.to_le_bytes());
        out.extend(self.version.to_le_bytes());
        out.extend(self.round.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.digest);
        out
    }

    /// From a body of just its length.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, BodyFault> {
        let spare = u32_at(body, 20);
        if spare != 0 {
            return Err((20, Fault::Reserved { field: "LANES_DONE", found: spare.into() }));
        }
        let digest = bytes_at(body, 24);
        Ok(Self { frames: u64_at(body, 0), version: u64_at(body, 8), round: u32_at(body, 16), digest })
    }
}

fn version(field: &'static str, body: &[u8]) -> Result<(), BodyFault> {
    match u16_at(body, 0) {
        VERSION => Ok(()),
        found => Err((0, Fault::Field { field, found: found.into(), expected: "version 1" })),
    }
}

fn reserved(field: &'static str, found: u64) -> Result<(), BodyFault> {
    if found == 0 { Ok(()) } else { Err((2, Fault::Reserved { field, found })) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn offer() -> impl Strategy<Value = Offer> {
        let head = (any::<[u8; 16]>(), any::<[u8; 32]>(), 1..=16u8, any::<Option<[u8; 32]>>());
        (head, vec("[!-~]{1,40}", 1..=OFFER_ADDRESSES_MAX)).prop_map(
            |((migration, token, lanes, fingerprint), addresses)| Offer {
                migration,
                token,
                lanes,
                fingerprint,
                addresses,
            },
        )
    }

    proptest! {
        #[test]
        fn an_offer_comes_back_and_a_shorter_or_longer_one_does_not(offer in offer(), cut in 1..60usize) {
            let mut body = offer.encode();
            prop_assert_eq!(Offer::decode(&body), Ok(offer.clone()));
            prop_assert!(Offer::decode(&body[..body.len().saturating_sub(cut)]).is_err());
            body.push(0);
            prop_assert!(Offer::decode(&body).is_err());
        }

        #[test]
        fn any_bytes_are_an_offer_that_keeps_to_the_limits_or_none(
            mut body in vec(any::<u8>(), 0..300), right in any::<bool>()
        ) {
            if right && body.len() > OFFER_HEAD {
                body[..8].copy_from_slice(&[1, 0, 2, 0, 1, 0, 0, 0]);
                body[3] = u8::from(body[56] != 0);
                if body[56] == 0 {
                    body[56..OFFER_HEAD].fill(0);
                }
            }
            if let Ok(offer) = Offer::decode(&body) {
                prop_assert_eq!(offer.encode(), body);
            }
        }

        #[test]
        fn any_bytes_are_lanes_that_keep_to_the_limits_or_none(
            mut body in vec(any::<u8>(), 32..200), numbers in vec(0..5u64, 20)
        ) {
            body.truncate(body.len() / 16 * 16);
            body[..4].copy_from_slice(&[1, 0, 0, 0]);
            let runs = body.len() / 16 - 2;
            body[4..8].copy_from_slice(&u32::try_from(runs).unwrap().to_le_bytes());
            body[24..32].copy_from_slice(&40u64.to_le_bytes());
            let mut at = 0;
            for (place, pair) in body[32..].chunks_exact_mut(16).zip(numbers.chunks_exact(2)) {
                at += pair[0];
                place[..8].copy_from_slice(&at.to_le_bytes());
                place[8..].copy_from_slice(&pair[1].to_le_bytes());
                at += pair[1];
            }
            if let Ok(lanes) = Lanes::decode(&body) {
                prop_assert!(lanes.populated.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert!(lanes.populated.iter().all(|run| !run.is_empty() && run.end <= 40));
                prop_assert_eq!(lanes.encode(), body);
            }
        }
    }

    #[test]
    fn tokens_are_not_shown() {
        let addresses = vec!["10.0.0.1:1".to_owned()];
        let offer = Offer { migration: [1; 16], token: [0xab; 32], lanes: 1, fingerprint: None, addresses };
        assert!(!format!("{offer:?}").contains("171"));
    }
}
