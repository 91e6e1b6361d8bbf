//! What stands in a page or a disk block: 4 KiB named by one number, so that a shadow of a whole guest is a list of
//! numbers and a wrong page says which one it is.

use std::sync::LazyLock;

use super::rng::{Rng, mix};
use crate::memory::PageBuf;
use crate::units::{PAGE_BYTES, PAGE_BYTES_U64, usize_of};

/// The name of 4 KiB of bytes. Its own bytes tell the name: every sector begins with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Content(pub(crate) u64);

/// Bytes of no meaning; a page is a stretch of them with its name in every sector. Copying is what makes thousands of
/// seeds a minute.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; 2 * PAGE_BYTES];
    Rng::new(1, "pattern").fill(&mut bytes);
    bytes
});

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
        let from = usize_of(start % PAGE_BYTES_U64);
        out.copy_from_slice(&PATTERN[from..from + PAGE_BYTES]);
        for sector in out.chunks_exact_mut(512) {
            sector[..8].copy_from_slice(&name.to_le_bytes());
        }
        if self.0 & TWIN != 0 {
            out[2056 + usize_of(start >> 32) % 500] ^= 1;
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
