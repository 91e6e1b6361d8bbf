//! What stands in a page or a disk block: 4 KiB named by one number, so that a shadow of a whole guest is a list of
//! numbers and a wrong page says which one it is.

use super::rng::mix;
use crate::memory::PageBuf;
use crate::units::PAGE_BYTES;

/// The name of 4 KiB of bytes. Its own bytes tell the name: the first word is it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Content(pub(crate) u64);

/// Contents with this bit differ from those without it in a single byte late in the page.
const TWIN: u64 = 1 << 63;

impl Content {
    /// All zero.
    pub(crate) const ZERO: Self = Self(0);

    /// The `generation`-th content of page `place` of something numbered `kind`.
    pub(crate) fn of(kind: u64, place: u64, generation: u64) -> Self {
        Self((kind << 56) | (place << 32) | generation)
    }

    /// One that differs from this in one byte.
    pub(crate) fn twin(self) -> Self {
        Self(self.0 ^ TWIN)
    }

    /// Its bytes.
    pub(crate) fn fill(self, out: &mut [u8; PAGE_BYTES]) {
        if self == Self::ZERO {
            out.fill(0);
            return;
        }
        let name = self.0 & !TWIN;
        let start = mix(name);
        let mut word = start | 1;
        for chunk in out.chunks_exact_mut(8) {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out[..8].copy_from_slice(&name.to_le_bytes());
        if self.0 & TWIN != 0 {
            let [.., a, b] = start.to_be_bytes();
            out[2048 + usize::from(u16::from_be_bytes([a, b]) % 2048)] ^= 1;
        }
    }

    /// Its bytes in a page.
    pub(crate) fn page(self) -> PageBuf {
        let mut page = PageBuf::zeroed();
        self.fill(&mut page.0);
        page
    }
}

/// How found bytes differ from those due, for a report.
pub(crate) fn difference(found: &PageBuf, due: Content) -> String {
    let expected = due.page();
    let mut name = [0; 8];
    name.copy_from_slice(&found.0[..8]);
    let first = found.0.iter().zip(&expected.0).position(|(a, b)| a != b);
    let wrong = found.0.iter().zip(&expected.0).filter(|(a, b)| a != b).count();
    format!(
        "{wrong} bytes differ, the first at {first:?}; due is {:#x}, found looks like {:#x}{}",
        due.0,
        u64::from_le_bytes(name),
        if found.0.iter().all(|b| *b == found.0[0]) {
            format!(" (all bytes {:#04x})", found.0[0])
        } else {
            String::new()
        }
    )
}
