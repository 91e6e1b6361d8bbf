//! The knock: what comes before TLS. A dialler shows with 64 bytes that it knows the secret, without telling it; an
//! acceptor looks at nothing else of a connection before it has seen them. So whoever does not know the secret reaches
//! 64 bytes of buffer and one keyed hash of this program, and gets no answer.
//!
//! ```text
//!   0      4   5        16         32                               64
//!   | PGFK | 1 | zero   | nonce    | BLAKE3 of bytes 0 to 31, keyed  |
//! ```
//! The key is BLAKE3 in derive-key mode of the secret. The knock proves nothing more than that its maker knew the
//! secret or has overheard it being used: the secret itself is shown in the Hello, inside TLS, to the pinned target.

use subtle::ConstantTimeEq as _;
use zeroize::Zeroize as _;

use crate::wire::hello::{HELLO_BYTES, Secret};

/// Length of a knock: that of a Hello, so that an acceptor reads as much of a stranger either way.
pub const KNOCK_BYTES: usize = HELLO_BYTES;
/// First bytes.
pub const MAGIC: [u8; 4] = *b"PGFK";
/// The only layout there is.
const LAYOUT: u8 = 1;
/// What the hash covers.
const COVERED: usize = 32;
/// Where the nonce is.
const NONCE: std::ops::Range<usize> = 16..COVERED;
/// What the hash's key is derived for.
const CONTEXT: &str = "pageferry 2026 knock";

/// A knock by who knows `secret`; `nonce` is random.
#[must_use]
pub fn make(secret: &Secret, nonce: [u8; 16]) -> [u8; KNOCK_BYTES] {
    let mut knock = [0; KNOCK_BYTES];
    knock[..MAGIC.len()].copy_from_slice(&MAGIC);
    knock[MAGIC.len()] = LAYOUT;
    knock[NONCE].copy_from_slice(&nonce);
    let tag = tag(&knock[..COVERED], secret);
    knock[COVERED..].copy_from_slice(tag.as_bytes());
    knock
}

/// Whether `knock` was made by someone who knows `secret`. Takes as long whatever is wrong with its hash.
#[must_use]
pub fn is_right(knock: &[u8; KNOCK_BYTES], secret: &Secret) -> bool {
    let (covered, claimed) = knock.split_at(COVERED);
    let plain = covered[..MAGIC.len()] == MAGIC
        && covered[MAGIC.len()] == LAYOUT
        && covered[MAGIC.len() + 1..NONCE.start].iter().all(|byte| *byte == 0);
    plain && bool::from(tag(covered, secret).as_bytes()[..].ct_eq(claimed))
}

fn tag(covered: &[u8], secret: &Secret) -> blake3::Hash {
    let mut key = blake3::derive_key(CONTEXT, secret.bytes());
    let tag = blake3::keyed_hash(&key, covered);
    key.zeroize();
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_knows_the_secret_knocks_right() {
        let (ours, other) = (Secret::of(&[3; 32]), Secret::of(&[4; 32]));
        let knock = make(&ours, [9; 16]);
        assert!(is_right(&knock, &ours));
        assert!(!is_right(&knock, &other));
        assert_ne!(knock, make(&ours, [8; 16]));
        for at in 0..KNOCK_BYTES {
            let mut bent = knock;
            bent[at] ^= 1;
            assert!(!is_right(&bent, &ours), "byte {at}");
        }
        assert!(!knock.windows(32).any(|w| w == ours.bytes()), "the secret does not travel");
    }

    /// Another implementation's first test.
    #[test]
    fn the_layout_is_the_documented_one() {
        let knock = make(&Secret::of(b"0123456789abcdef0123456789abcdef"), *b"nonce of 16 byte");
        let hex: String = knock.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(&hex[..64], "5047464b0100000000000000000000006e6f6e6365206f662031362062797465");
        let mut key = blake3::derive_key("pageferry 2026 knock", b"0123456789abcdef0123456789abcdef");
        assert_eq!(knock[32..], blake3::keyed_hash(&key, &knock[..32]).as_bytes()[..]);
        key[0] ^= 1;
        assert_ne!(knock[32..], blake3::keyed_hash(&key, &knock[..32]).as_bytes()[..]);
    }
}
