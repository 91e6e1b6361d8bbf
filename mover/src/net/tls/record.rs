//! TLS 1.3 records (RFC 8446, section 5) over buffers of the caller's: sealed and opened in place, one call a record,
//! nothing allocated, nothing shared. Each direction of a connection has its own key, counter and task.
//!
//! ```text
//!   0     1        3        5                       5 + plain   +1      +16
//!   | 23  | 0x0303 | length | plain, encrypted  ... | kind      | tag   |
//! ```
//! The five bytes of the header are authenticated, the counter of the record makes its nonce (section 5.3).

#![forbid(unsafe_code)]

use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Bytes of a record's header.
pub(crate) const HEADER_BYTES: usize = 5;
/// Most bytes a record carries (`2^14`, section 5.1).
pub(crate) const PLAIN_BYTES_MAX: usize = 16 * 1024;
/// Bytes of a tag; all ciphers of TLS 1.3 in use here have it.
const TAG_BYTES: usize = 16;
/// What a record is longer than what it carries: header, kind and tag.
pub(crate) const OVERHEAD_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;
/// Longest length in a header (`2^14 + 256`, section 5.2).
pub(crate) const BODY_BYTES_MAX: usize = PLAIN_BYTES_MAX + 256;
/// Records under one key. AES-GCM is good for 2^24.5 of the longest (section 5.5); rustls takes 2^24 as well.
pub(crate) const RECORDS_PER_KEY: u64 = 1 << 24;

/// What a record carries (section 5.1, 4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Alert,
    Handshake,
    Data,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }
}

/// A record that was not made by the peer, or not as it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Broken(pub(crate) &'static str);

impl From<Broken> for String {
    fn from(broken: Broken) -> Self {
        broken.0.to_owned()
    }
}

/// A direction's key and how far it has come.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Cipher {
    fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Broken> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Broken("the cipher is none of TLS 1.3")),
        };
        let key =
            UnboundKey::new(algorithm, key.as_ref()).map_err(|_| Broken("the key has another length"))?;
        let iv = iv.as_ref().try_into().map_err(|_| Broken("the nonce has another length"))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The nonce of the next record.
    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, of) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of;
        }
        // A key is given up long before (RECORDS_PER_KEY).
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// The length of the body that a record with this header has.
pub(crate) fn body_bytes(header: &[u8; HEADER_BYTES]) -> Result<usize, Broken> {
    let [kind, 3, 3, high, low] = *header else { return Err(Broken("it is no TLS record")) };
    let bytes = usize::from(u16::from_be_bytes([high, low]));
    if kind != Kind::Data.code() {
        return Err(Broken("it is a record in the clear"));
    }
    if bytes <= TAG_BYTES || bytes > BODY_BYTES_MAX {
        return Err(Broken("its length can't be"));
    }
    Ok(bytes)
}

/// Opens what a peer might send, for the fuzzers: `bytes` as a record of its own, whose seal is nobody's; and as the inside of a
/// record that the peer has sealed, with whatever kind and padding. Of the latter returns what it carries, as its kind's code
/// and a length.
///
/// # Panics
/// If a record opens that nobody sealed, or another way than it was sealed: broken invariants.
#[must_use]
pub fn open_anything(bytes: &[u8]) -> Option<(u8, usize)> {
    let secrets = ConnectionTrafficSecrets::Aes256Gcm { key: [7; 32].into(), iv: [9; 12].into() };
    let of = |sequence| Cipher::new(sequence, &secrets).expect("a key of the right length");
    if let Some((header, _)) = bytes.split_first_chunk::<HEADER_BYTES>()
        && let Ok(body) = body_bytes(header)
    {
        assert!(body <= BODY_BYTES_MAX);
        let mut record = bytes[..bytes.len().min(HEADER_BYTES + body)].to_vec();
        assert!(Opener(of(0)).open(&mut record).is_err(), "nobody sealed that");
    }
    let inside = &bytes[..bytes.len().min(BODY_BYTES_MAX - TAG_BYTES)];
    let [high, low] = u16::try_from(inside.len() + TAG_BYTES).ok()?.to_be_bytes();
    let header = [Kind::Data.code(), 3, 3, high, low];
    let mut record = [&header[..], inside].concat();
    let mut cipher = of(1);
    let nonce = cipher.next_nonce();
    let sealed = cipher.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut record[HEADER_BYTES..]);
    record.extend(sealed.expect("a record is far shorter than the cipher's limit").as_ref());
    let (kind, carried) = Opener(of(1)).open(&mut record).ok()?;
    assert!(carried <= PLAIN_BYTES_MAX && inside[carried] == kind.code());
    assert!(record[HEADER_BYTES..][..carried] == inside[..carried]);
    Some((kind.code(), carried))
}

/// Makes records.
pub(crate) struct Sealer(Cipher);

impl Sealer {
    pub(crate) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Broken> {
        Cipher::new(sequence, secrets).map(Self)
    }

    /// Records made under this key.
    pub(crate) fn records(&self) -> u64 {
        self.0.sequence
    }

    /// Makes a record of the `plain` bytes that stand behind the room for its header, at the front of `record`; its
    /// length. There is room for header and overhead, and `plain` is at most [`PLAIN_BYTES_MAX`].
    pub(crate) fn seal(&mut self, record: &mut [u8], plain: usize, kind: Kind) -> usize {
        assert!(plain <= PLAIN_BYTES_MAX);
        let all = plain + OVERHEAD_BYTES;
        let length = u16::try_from(all - HEADER_BYTES).expect("held against its limit above");
        let [high, low] = length.to_be_bytes();
        let header = [Kind::Data.code(), 3, 3, high, low];
        let (front, rest) = record[..all].split_at_mut(HEADER_BYTES);
        front.copy_from_slice(&header);
        let (body, room) = rest.split_at_mut(plain + 1);
        body[plain] = kind.code();
        let nonce = self.0.next_nonce();
        let tag = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(header), body);
        room.copy_from_slice(tag.expect("a record is far shorter than the cipher's limit").as_ref());
        all
    }
}

/// Opens records.
pub(crate) struct Opener(Cipher);

impl Opener {
    pub(crate) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Broken> {
        Cipher::new(sequence, secrets).map(Self)
    }

    /// Opens a whole record where it stands: what it is and how many bytes it carries, behind the header.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<(Kind, usize), Broken> {
        let (header, body) = record.split_at_mut(HEADER_BYTES);
        let header: [u8; HEADER_BYTES] = header.try_into().map_err(|_| Broken("it is cut off"))?;
        if body_bytes(&header)? != body.len() {
            return Err(Broken("it is cut off"));
        }
        let (sealed, tag) = body.split_at_mut(body.len() - TAG_BYTES);
        let tag = Tag::try_from(&*tag).map_err(|_| Broken("it is cut off"))?;
        let nonce = self.0.next_nonce();
        self.0
            .key
            .open_in_place_separate_tag(nonce, Aad::from(header), tag, sealed, 0..)
            .map_err(|_| Broken("it was changed on its way, or is not the peer's"))?;
        // Zeros behind the kind are padding.
        let kind_at = sealed.iter().rposition(|byte| *byte != 0).ok_or(Broken("it is of no kind"))?;
        let kind = match sealed[kind_at] {
            21 => Kind::Alert,
            22 => Kind::Handshake,
            23 => Kind::Data,
            _ => return Err(Broken("it is of no known kind")),
        };
        if kind_at > PLAIN_BYTES_MAX {
            return Err(Broken("it carries too much"));
        }
        Ok((kind, kind_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::cipher::{AeadKey, Iv};

    fn secrets(byte: u8) -> ConnectionTrafficSecrets {
        ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([byte; 32]), iv: Iv::from([byte; 12]) }
    }

    fn both() -> (Sealer, Opener) {
        (Sealer::new(0, &secrets(7)).unwrap(), Opener::new(0, &secrets(7)).unwrap())
    }

    #[test]
    fn records_of_every_length_come_back_and_in_their_order_only() {
        let (mut sealer, mut opener) = both();
        let mut room = vec![0; PLAIN_BYTES_MAX + OVERHEAD_BYTES];
        for plain in [0, 1, 15, 16, 17, 4096, PLAIN_BYTES_MAX] {
            room[HEADER_BYTES..][..plain].fill(0xab);
            let all = sealer.seal(&mut room, plain, Kind::Data);
            assert_eq!(all, plain + OVERHEAD_BYTES);
            assert!(plain < 16 || !room[HEADER_BYTES..][..plain].iter().all(|byte| *byte == 0xab));
            let mut replayed = room[..all].to_vec();
            assert_eq!(opener.open(&mut room[..all]), Ok((Kind::Data, plain)));
            assert!(room[HEADER_BYTES..][..plain].iter().all(|byte| *byte == 0xab));
            assert!(opener.open(&mut replayed).is_err(), "a record holds once");
            // The counter has moved on by the attempt; both go on from the next.
            sealer.seal(&mut room, 0, Kind::Data);
        }
    }

    #[test]
    fn no_bit_of_a_record_can_be_changed() {
        let mut first = vec![9; 40 + OVERHEAD_BYTES];
        both().0.seal(&mut first, 40, Kind::Handshake);
        for bit in 0..first.len() * 8 {
            let mut bent = first.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert!(both().1.open(&mut bent).is_err(), "bit {bit}");
        }
        for cut in 0..first.len() {
            let mut short = first[..cut].to_vec();
            assert!(short.len() < HEADER_BYTES || both().1.open(&mut short).is_err(), "{cut} bytes");
        }
        assert_eq!(both().1.open(&mut first), Ok((Kind::Handshake, 40)));
    }
}
