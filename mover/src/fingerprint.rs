//! Two digests of a page, for two purposes that must not be confused.
//!
//! [`hint`] is fast and unkeyed: it finds where a page's content *may* stand on a disk. [`CheckKey::check`] is keyed
//! with a fresh random key per migration, which never leaves the control connection: it decides whether loaded bytes
//! *are* the page. A program inside the guest writes both memory and disk, so it could forge a hint; it can't forge a
//! check whose key it never sees.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::memory::PageBuf;
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
pub struct CheckKey([u8; 32]);

impl CheckKey {
    /// From 32 random bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// The bytes, for the handshake on the control connection.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
    /// The check value of `page`.
    #[must_use]
    pub fn check(&self, page: &PageBuf) -> Check {
        self.check_bytes(&page.0)
    }
    /// The check value of a page in a buffer of our own.
    #[must_use]
    pub fn check_bytes(&self, page: &[u8; PAGE_BYTES]) -> Check {
        let hash = blake3::keyed_hash(&self.0, page);
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
