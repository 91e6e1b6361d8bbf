//! NH, the keyed sum of products under the check of a page ([`crate::fingerprint`] says what it is and why it is sound).
//!
//! It lives here because the processor's vector instructions need `unsafe` to be called: AVX2 where there is one, SSE2
//! on any other x86-64, words elsewhere; all three give the same sums. Pure, no state, any thread.

use crate::units::PAGE_BYTES;

/// Pairs of 32-bit words in a page.
const PAIRS: usize = PAGE_BYTES / 8;
/// Sums made of a page, each with the key shifted by a pair.
pub const SUMS: usize = 4;
/// NH's key: pairs of 32-bit words, the first in the lower half.
pub type Key = [u64; PAIRS + SUMS - 1];

/// The sums of `page` with `key` shifted by 0, 1, 2 and 3 pairs.
#[must_use]
pub fn nh(page: &[u8; PAGE_BYTES], key: &Key) -> [u64; SUMS] {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2. Worth it: twice as fast as SSE2, and every referenced page passes here.
            unsafe { x86::avx2(page, key) }
        } else {
            // SAFETY: every x86-64 has SSE2. Worth it: half as fast again as what the compiler makes of the words.
            unsafe { x86::sse2(page, key) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    words(page, key)
}

/// Word by word.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn words(page: &[u8; PAGE_BYTES], key: &Key) -> [u64; SUMS] {
    let mut sums = [0_u64; SUMS];
    for (number, bytes) in page.chunks_exact(8).enumerate() {
        let mut pair = [0; 8];
        pair.copy_from_slice(bytes);
        let pair = u64::from_le_bytes(pair);
        for (shift, sum) in sums.iter_mut().enumerate() {
            let key = key[number + shift];
            let low = pair.wrapping_add(key) & u64::from(u32::MAX);
            let high = (pair >> 32).wrapping_add(key >> 32) & u64::from(u32::MAX);
            *sum = sum.wrapping_add(low * high);
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Key, PAGE_BYTES, SUMS};
    use std::arch::x86_64::*;

    /// Two pairs at a time.
    #[target_feature(enable = "sse2")]
    pub(super) fn sse2(page: &[u8; PAGE_BYTES], key: &Key) -> [u64; SUMS] {
        let mut sums = [_mm_setzero_si128(); SUMS];
        for at in 0..PAGE_BYTES / 16 {
            // SAFETY: 16 bytes from 16 * at, at < 256, are inside the page. Worth it: one load in place of 16.
            let message = unsafe { _mm_loadu_si128(page.as_ptr().cast::<__m128i>().add(at)) };
            for (shift, sum) in sums.iter_mut().enumerate() {
                // SAFETY: words 2 * at + shift and the next are at most 2 * 255 + 3 + 1 = 514, the key's last.
                let key = unsafe { _mm_loadu_si128(key.as_ptr().add(2 * at + shift).cast()) };
                let words = _mm_add_epi32(message, key);
                *sum = _mm_add_epi64(*sum, _mm_mul_epu32(words, _mm_srli_epi64::<32>(words)));
            }
        }
        sums.map(|sum| {
            let both = _mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum));
            _mm_cvtsi128_si64(both).cast_unsigned()
        })
    }

    /// Four pairs at a time.
    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(page: &[u8; PAGE_BYTES], key: &Key) -> [u64; SUMS] {
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for at in 0..PAGE_BYTES / 32 {
            // SAFETY: 32 bytes from 32 * at, at < 128, are inside the page. Worth it: one load in place of 32.
            let message = unsafe { _mm256_loadu_si256(page.as_ptr().cast::<__m256i>().add(at)) };
            for (shift, sum) in sums.iter_mut().enumerate() {
                // SAFETY: words 4 * at + shift to the third after are at most 4 * 127 + 3 + 3 = 514, the key's last.
                let key = unsafe { _mm256_loadu_si256(key.as_ptr().add(4 * at + shift).cast()) };
                let words = _mm256_add_epi32(message, key);
                *sum = _mm256_add_epi64(*sum, _mm256_mul_epu32(words, _mm256_srli_epi64::<32>(words)));
            }
        }
        sums.map(|sum| {
            let two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let both = _mm_add_epi64(two, _mm_unpackhi_epi64(two, two));
            _mm_cvtsi128_si64(both).cast_unsigned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u8, out: &mut [u8]) {
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(out);
    }

    /// NH as the paper writes it, over 32-bit words.
    fn by_the_book(page: &[u8; PAGE_BYTES], key: &Key) -> [u64; SUMS] {
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
        let m: Vec<u32> = page.chunks(4).map(word).collect();
        let k: Vec<u32> =
            key.iter().flat_map(|pair| pair.to_le_bytes()).collect::<Vec<u8>>().chunks(4).map(word).collect();
        std::array::from_fn(|shift| {
            (0..m.len()).step_by(2).fold(0_u64, |sum, i| {
                let a = m[i].wrapping_add(k[2 * shift + i]);
                let b = m[i + 1].wrapping_add(k[2 * shift + i + 1]);
                sum.wrapping_add(u64::from(a) * u64::from(b))
            })
        })
    }

    #[test]
    fn every_way_gives_what_the_paper_says() {
        for seed in 0..50 {
            let (mut page, mut raw) = ([seed; PAGE_BYTES], [0xff; (PAIRS + SUMS - 1) * 8]);
            if seed > 1 {
                bytes(seed, &mut raw);
            }
            if seed > 3 {
                bytes(seed ^ 0x80, &mut page);
            }
            let key: Key =
                std::array::from_fn(|n| u64::from_le_bytes(raw[n * 8..n * 8 + 8].try_into().unwrap()));
            let expected = by_the_book(&page, &key);
            assert_eq!(words(&page, &key), expected);
            assert_eq!(nh(&page, &key), expected);
            #[cfg(target_arch = "x86_64")]
            {
                // SAFETY: every x86-64 has SSE2.
                assert_eq!(unsafe { x86::sse2(&page, &key) }, expected);
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: just asked.
                    assert_eq!(unsafe { x86::avx2(&page, &key) }, expected);
                } else {
                    eprintln!("SKIPPED in part: this processor has no AVX2");
                }
            }
        }
    }
}
