//! Two digests of a page, for two purposes that must not be confused.
//!
//! [`hint`] is fast and unkeyed: it finds where a page's content *may* stand on a disk. [`CheckKey::check`] is keyed
//! with a fresh random key per migration, which never leaves the control connection: it decides whether loaded bytes
//! *are* the page. A program inside the guest writes both memory and disk, so it could forge a hint; it can't forge a
//! check whose key it never sees.
//!
//! # The check
//! BLAKE3 keyed with k1, of the 32 bytes NH keyed with k2 makes of the page, cut to 16 bytes; k1 and k2 (4120 bytes)
//! are derived from the migration's 32 with BLAKE3.
//!
//! NH is the first layer of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway, CRYPTO 1999; RFC 4418): the page is 512
//! pairs of 32-bit words, and NH is the sum modulo 2^64 of `(m[2i] + k[2i]) * (m[2i+1] + k[2i+1])`, the inner sums modulo
//! 2^32. For any two different pages chosen without knowledge of k2, the four sums with k2 shifted by one pair each
//! (its Toeplitz construction) are all equal with probability 2^-128 at most. Equal checks of different pages then need
//! either that, or two different inputs of a keyed BLAKE3 with equal first 128 bits: 2^-127 together. A migration
//! compares one pair of pages for each reference it sends; 2^28 pages sent a thousand times each are 2^38 pairs, and
//! the probability that one wrong page passes is below 2^-89. What the guest could see of it is at most that a page was
//! not taken from the disk, which tells it that two checks differed: nothing it did not know.
//!
//! The BLAKE3 around it costs less than a third of the time and makes the values that do cross the lanes useless: a
//! bare universal hash, POLYVAL too, gives its key away to whoever sees a few checks of pages he knows.
//!
//! Chosen by measurement (`docs/DEPENDENCIES.md`): NH needs nothing but 32-bit multiplications. It is several times as
//! fast as keyed BLAKE3 alone; on a processor without AVX or PCLMUL it only halves its speed, where POLYVAL falls to
//! a thirtieth.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zeroize::Zeroize as _;

use crate::memory::{PageBuf, nh};
use crate::units::PAGE_BYTES;

/// The unkeyed fingerprint of a page or a page-sized disk block. Stable: it stands in index files.
#[must_use]
pub fn hint(bytes: &[u8; PAGE_BYTES]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

/// A keyed check value of a page.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Check(pub [u8; 16]);

/// The key of one migration's checks.
#[derive(Clone)]
pub struct CheckKey {
    bytes: [u8; 32],
    derived: Arc<Derived>,
}

/// What is derived from a migration's key.
struct Derived {
    /// NH's key.
    inner: nh::Key,
    /// The key of the BLAKE3 around it.
    outer: [u8; 32],
}

impl Drop for Derived {
    fn drop(&mut self) {
        self.inner.zeroize();
        self.outer.zeroize();
    }
}

impl Drop for CheckKey {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl CheckKey {
    /// From 32 random bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        let outer = blake3::derive_key("pageferry 2026 page check: outer key", &bytes);
        let mut hasher = blake3::Hasher::new_derive_key("pageferry 2026 page check: NH key");
        hasher.update(&bytes);
        let mut stream = hasher.finalize_xof();
        let inner = std::array::from_fn(|_| {
            let mut pair = [0; 8];
            stream.fill(&mut pair);
            u64::from_le_bytes(pair)
        });
        let derived = Derived { inner, outer };
        Self { bytes, derived: Arc::new(derived) }
    }
    /// The bytes, for the handshake on the control connection.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }
    /// The check value of `page`.
    #[must_use]
    pub fn check(&self, page: &PageBuf) -> Check {
        self.check_bytes(&page.0)
    }
    /// The check value of a page in a buffer of our own.
    #[must_use]
    pub fn check_bytes(&self, page: &[u8; PAGE_BYTES]) -> Check {
        let mut sums = [0; nh::SUMS * 8];
        for (bytes, sum) in sums.chunks_exact_mut(8).zip(nh::nh(page, &self.derived.inner)) {
            bytes.copy_from_slice(&sum.to_le_bytes());
        }
        let hash = blake3::keyed_hash(&self.derived.outer, &sums);
        let mut out = [0; 16];
        out.copy_from_slice(&hash.as_bytes()[..16]);
        Check(out)
    }
}

impl fmt::Debug for CheckKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn page(seed: u64) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page);
        page
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_changed_bit_and_any_other_key_changes_the_check(
            seed in any::<u64>(), at in 0..PAGE_BYTES, bit in 0..8_u32, key in any::<[u8; 32]>(),
        ) {
            let (mut page, key) = (page(seed), CheckKey::new(key));
            let before = key.check_bytes(&page);
            prop_assert_eq!(before, key.clone().check(&PageBuf(page)));
            let mut other = *key.bytes();
            other[at % 32] ^= 1;
            prop_assert_ne!(before, CheckKey::new(other).check_bytes(&page));
            page[at] ^= 1_u8 << bit;
            prop_assert_ne!(before, key.check_bytes(&page));
        }
    }

    #[test]
    fn pages_that_are_alike_in_every_way_but_order_differ() {
        let key = CheckKey::new([3; 32]);
        let mut checks = BTreeSet::new();
        // One word at each place, and each two neighbouring places swapped.
        for place in 0..PAGE_BYTES / 4 {
            let mut one = [0; PAGE_BYTES];
            one[place * 4..place * 4 + 4].copy_from_slice(&[1, 2, 3, 4]);
            assert!(checks.insert(key.check_bytes(&one).0), "{place}");
        }
        let counting: Vec<u8> = (0_u32..1024).flat_map(u32::to_le_bytes).collect();
        for place in 0..PAGE_BYTES / 4 - 1 {
            let mut swapped: [u8; PAGE_BYTES] = counting.clone().try_into().unwrap();
            swapped[place * 4..place * 4 + 8].rotate_left(4);
            assert!(checks.insert(key.check_bytes(&swapped).0), "{place}");
        }
    }

    #[test]
    fn values_are_the_same_on_every_machine() {
        // Both ends of a migration compute these; one of them may run on another processor.
        let check = CheckKey::new([7; 32]).check_bytes(&page(1));
        let hex: String = check.0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "00e732869d37c8c849b2a4146cf388d6");
        assert_eq!(hint(&page(1)), 0x164b_fd38_afd9_4666);
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", CheckKey::new([9; 32])), "CheckKey(..)");
    }
}
