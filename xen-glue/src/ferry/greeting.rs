//! The first 64 bytes of a connection that the target dials back (`docs/PROTOCOL.md`, "Greeting"). They show the right to
//! it without showing the token, which crosses the stream alone.
#![forbid(unsafe_code)]

use mover::wire::hello::Secret;

use crate::stream::Offer;

/// Length of a greeting.
pub(super) const BYTES: usize = 64;
const MAGIC: [u8; 4] = *b"PGDB";
const VERSION: u16 = 1;
/// What the proof is of, before the connection's number.
const PROVEN: &[u8] = b"pageferry 2026 dial back";
/// What the token of the connection for control is derived for.
const CONTROL: &str = "pageferry 2026 dial back: control";

/// The greeting of connection `number` of what `offer` offers.
pub(super) fn encode(offer: &Offer, number: u8) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[6] = number;
    out[16..32].copy_from_slice(&offer.migration);
    out[32..].copy_from_slice(&proof(&offer.token, number));
    out
}

/// Which connection of what `offer` offers these bytes are the greeting of; none if they are not.
pub(super) fn decode(offer: &Offer, bytes: &[u8; BYTES]) -> Option<u8> {
    let number = bytes[6];
    let mut shown = [0; 32];
    shown.copy_from_slice(&bytes[32..]);
    let right = Secret(shown).same(&Secret(proof(&offer.token, number)));
    let head = bytes[..4] == MAGIC && bytes[4..6] == VERSION.to_le_bytes() && bytes[7..16] == [0; 9];
    (right && head && bytes[16..32] == offer.migration && number <= offer.lanes).then_some(number)
}

fn proof(token: &[u8; 32], number: u8) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(token);
    hasher.update(PROVEN).update(&[number]);
    *hasher.finalize().as_bytes()
}

/// The token that the source shows on the connection for control.
pub(super) fn control_token(offer: &Offer) -> Secret {
    Secret(blake3::derive_key(CONTROL, &offer.token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::tests::samples::offer;

    #[test]
    fn a_greeting_is_good_for_its_number_its_migration_and_its_token_alone() {
        let ours = offer();
        for number in 0..=2 {
            let bytes = encode(&ours, number);
            assert_eq!(decode(&ours, &bytes), Some(number));
            for bit in 0..BYTES * 8 {
                let mut bent = bytes;
                bent[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(&ours, &bent), None, "bit {bit}");
            }
        }
        assert_eq!(decode(&ours, &encode(&ours, 3)), None, "there are two lanes");
        assert_eq!(decode(&Offer { token: [9; 32], ..ours.clone() }, &encode(&ours, 1)), None);
        assert_eq!(decode(&Offer { migration: [9; 16], ..ours.clone() }, &encode(&ours, 1)), None);
        assert!(!control_token(&ours).same(&Secret(ours.token)));
    }
}
