//! The two records by which a saved guest's pages are left where they stand on disks that do not change any more
//! (`docs/PROTOCOL.md`, "Files with references"): what stands in them, and their limits. All integers are little-endian.
//!
//! ```text
//!   FROZEN_DISKS  mandatory   which disks, and the key of the checks; before any page
//!   PAGE_DATA ..              a frame that comes by reference is XALLOC: it gets memory, and is owed its contents
//!   REFERENCES .. mandatory   where they stand; behind all PAGE_DATA, each frame once
//! ```
//!
//! Invariant: a frame has one way to its contents. A reference pays what PAGE_DATA left owed, nothing but references follows the
//! first one, and END wants nothing to be owed: whatever a stream says, no reference is loaded over newer contents.
#![forbid(unsafe_code)]

use mover::disk::DiskInfo;
use mover::fingerprint::{Check, CheckKey};
use mover::limits::DISKS_MAX;
use mover::pipeline::table::Wanted;
use mover::units::{BlockAddress, PAGE_BYTES_U64, Pfn, SECTOR_BYTES, Version, u64_of};
use mover::wire::frame::{pack_place, unpack_place};
use mover::wire::hello::Secret;

use super::body::{BodyFault, reserved};
use super::error::Fault;
use super::fields::{bytes_at, u16_at, u32_at, u64_at};
use super::limits::{DISK_TEXT_BYTES_MAX, PFN_END};

const VERSION: u16 = 1;
/// Bytes of FROZEN_DISKS before its first disk.
pub(super) const FROZEN_HEAD: u32 = 40;
/// Bytes of a disk whose texts are empty: its size and three lengths.
pub(super) const DISK_BYTES: u32 = 14;
/// Bytes of REFERENCES before the first one.
pub(super) const REFERENCES_HEAD: u32 = 8;
/// Bytes of a reference.
pub const REFERENCE_BYTES: u32 = 32;

/// FROZEN_DISKS: on which disks pages are left.
#[derive(Clone, Debug)]
pub struct FrozenDisks {
    /// The key of the checks, made for this one save when its guest had stopped.
    pub key: Secret,
    /// The disks, in the order that numbers them.
    pub disks: Vec<DiskInfo>,
}

impl FrozenDisks {
    /// The key of the checks, ready for use.
    #[must_use]
    pub fn check_key(&self) -> CheckKey {
        CheckKey::new(*self.key.bytes())
    }

    /// The disks' names and paths, for a sentence.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.disks.iter().map(name_of)
    }

    /// The place on a disk, for a sentence.
    #[must_use]
    pub fn words(&self, block: BlockAddress) -> String {
        match self.disks.get(usize::from(block.disk.0)) {
            Some(disk) => format!("sector {} of disk {}", block.sector.0, name_of(disk)),
            None => format!("sector {} of disk {}", block.sector.0, block.disk.0),
        }
    }

    /// Holds the numbers against their limits.
    pub(super) fn check(&self) -> Result<(), BodyFault> {
        let count = u64_of(self.disks.len());
        if !(1..=DISKS_MAX).contains(&self.disks.len()) {
            let what = "the number of FROZEN_DISKS' disks";
            return Err((2, Fault::Limit { what, found: count, limit: u64_of(DISKS_MAX) }));
        }
        let texts = self.disks.iter().flat_map(|disk| [&disk.name, &disk.path, &disk.identity]);
        match texts.map(String::len).find(|length| *length > DISK_TEXT_BYTES_MAX) {
            Some(found) => Err((u64::from(FROZEN_HEAD), text_limit(found))),
            None => Ok(()),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend(VERSION.to_le_bytes());
        out.extend(u16::try_from(self.disks.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.key.bytes());
        for disk in &self.disks {
            out.extend(disk.bytes.to_le_bytes());
            for text in [&disk.name, &disk.path, &disk.identity] {
                out.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
                out.extend(text.as_bytes());
            }
        }
        out
    }

    /// From a body that has at least its head.
    pub(super) fn decode(body: &[u8]) -> Result<Self, BodyFault> {
        let version = u16_at(body, 0);
        if version != VERSION {
            let field = "the version of FROZEN_DISKS";
            return Err((0, Fault::Field { field, found: version.into(), expected: "version 1" }));
        }
        reserved("FROZEN_DISKS", 4, u32_at(body, 4).into())?;
        let count = usize::from(u16_at(body, 2));
        let mut frozen = Self { key: Secret::of(&bytes_at(body, 8)), disks: Vec::new() };
        let mut rest = Rest { body, at: mover::units::usize_of(FROZEN_HEAD.into()) };
        // No more than there can be: their number is held against its limit last.
        for _ in 0..count.min(DISKS_MAX + 1) {
            let bytes = u64_at(rest.take(8)?, 0);
            let (name, path, identity) = (rest.text()?, rest.text()?, rest.text()?);
            frozen.disks.push(DiskInfo { name, path, bytes, identity });
        }
        frozen.check()?;
        match body.len() - rest.at {
            0 => Ok(frozen),
            _ => {
                Err((u64_of(rest.at), Fault::Text { what: "there are bytes behind FROZEN_DISKS' last disk" }))
            }
        }
    }
}

fn name_of(disk: &DiskInfo) -> String {
    format!("{} ({})", disk.name, disk.path)
}

fn text_limit(found: usize) -> Fault {
    let limit = u64_of(DISK_TEXT_BYTES_MAX);
    Fault::Limit { what: "the length of a text in FROZEN_DISKS", found: u64_of(found), limit }
}

/// What is left of a body.
struct Rest<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], BodyFault> {
        let found = self.body.get(self.at..self.at + bytes).ok_or({
            let what = "FROZEN_DISKS ends within a disk";
            (u64_of(self.at), Fault::Text { what })
        })?;
        self.at += bytes;
        Ok(found)
    }

    fn text(&mut self) -> Result<String, BodyFault> {
        let at = u64_of(self.at);
        let length = usize::from(u16_at(self.take(2)?, 0));
        if length > DISK_TEXT_BYTES_MAX {
            return Err((at, text_limit(length)));
        }
        let what = "a text in FROZEN_DISKS is none that can be shown";
        let text =
            std::str::from_utf8(self.take(length)?).ok().filter(|text| !text.chars().any(char::is_control));
        text.map(str::to_owned).ok_or((at + 2, Fault::Text { what }))
    }
}

/// One of REFERENCES: where a page stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reference {
    /// The page.
    pub pfn: Pfn,
    /// Its first sector.
    pub block: BlockAddress,
    /// What its bytes give.
    pub check: Check,
}

impl Reference {
    /// For a sweep over the disks.
    #[must_use]
    pub fn wanted(self) -> Wanted {
        // The one there is of it.
        Wanted { pfn: self.pfn, version: Version(1), block: self.block, check: self.check }
    }

    /// Holds it against the sizes of the disks.
    pub(super) fn check(&self, disks: &[u64]) -> Result<(), Fault> {
        if self.pfn.0 >= PFN_END {
            let what = "a frame number in REFERENCES";
            return Err(Fault::Limit { what, found: self.pfn.0, limit: PFN_END - 1 });
        }
        let Some(&bytes) = disks.get(usize::from(self.block.disk.0)) else {
            let (found, limit) = (self.block.disk.0.into(), u64_of(disks.len()).saturating_sub(1));
            return Err(Fault::Limit { what: "the number of a disk in REFERENCES", found, limit });
        };
        let last = (bytes / SECTOR_BYTES).checked_sub(PAGE_BYTES_U64 / SECTOR_BYTES);
        match last {
            Some(limit) if self.block.sector.0 <= limit => Ok(()),
            _ => {
                let (found, limit) = (self.block.sector.0, last.unwrap_or(0));
                Err(Fault::Limit { what: "a sector in REFERENCES", found, limit })
            }
        }
    }

    pub(super) fn encode_all(references: &[Self]) -> Vec<u8> {
        // Writers hold the number against its limit first.
        let count = u32::try_from(references.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(8 + 32 * references.len());
        out.extend(count.to_le_bytes());
        out.extend([0; 4]);
        for reference in references {
            out.extend(reference.pfn.0.to_le_bytes());
            out.extend(pack_place(reference.block).to_le_bytes());
            out.extend(reference.check.0);
        }
        out
    }

    /// From a body whose length has been held against the record's shape.
    pub(super) fn decode_all(body: &[u8]) -> Result<Vec<Self>, BodyFault> {
        let count = u64::from(u32_at(body, 0));
        if 8 + 32 * count != u64_of(body.len()) {
            let expected = format!("its {count} references take {}", 8 + 32 * count);
            let (record, found) = ("REFERENCES", u64_of(body.len()));
            return Err((0, Fault::Length { record, found, expected }));
        }
        reserved("REFERENCES", 4, u32_at(body, 4).into())?;
        let one = |entry: &[u8]| Self {
            pfn: Pfn(u64_at(entry, 0)),
            block: unpack_place(u64_at(entry, 8)),
            check: Check(bytes_at(entry, 16)),
        };
        Ok(body[8..].chunks_exact(32).map(one).collect())
    }
}

/// The place of reference `at` in its record's body.
pub(super) fn place_of(at: usize) -> u64 {
    8 + 32 * u64_of(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mover::units::{DiskId, Sector};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn disk() -> impl Strategy<Value = DiskInfo> {
        (any::<u64>(), "[ -~é]{0,30}", "/[ -~]{0,30}", "[ -~]{0,200}")
            .prop_map(|(bytes, name, path, identity)| DiskInfo { name, path, bytes, identity })
    }

    proptest! {
        #[test]
        fn disks_come_back_and_shorter_or_longer_ones_do_not(
            key in any::<[u8; 32]>(), disks in vec(disk(), 1..=DISKS_MAX), cut in 1..60usize
        ) {
            let frozen = FrozenDisks { key: Secret::of(&key), disks };
            let mut body = frozen.encode();
            let again = FrozenDisks::decode(&body).unwrap();
            prop_assert_eq!((again.key.bytes(), &again.disks), (&key, &frozen.disks));
            let short = body.len().saturating_sub(cut).max(40);
            prop_assert!(FrozenDisks::decode(&body[..short]).is_err());
            body.push(0);
            prop_assert!(FrozenDisks::decode(&body).is_err());
        }

        #[test]
        fn any_bytes_are_disks_that_keep_to_the_limits_or_none(mut body in vec(any::<u8>(), 40..300), count in 0..20u16) {
            body[..2].copy_from_slice(&1u16.to_le_bytes());
            body[2..4].copy_from_slice(&count.to_le_bytes());
            body[4..8].fill(0);
            // Lengths that may be.
            for at in (48..body.len()).step_by(3) {
                body[at] = 0;
            }
            if let Ok(frozen) = FrozenDisks::decode(&body) {
                prop_assert!(frozen.disks.len() <= DISKS_MAX);
                prop_assert_eq!(frozen.encode(), body);
            }
        }

        #[test]
        fn references_come_back(all in vec((any::<u64>(), any::<u8>(), 0..1u64 << 56, any::<[u8; 16]>()), 0..40)) {
            let all: Vec<_> = all.into_iter().map(|(pfn, disk, sector, check)| Reference {
                pfn: Pfn(pfn),
                block: BlockAddress { disk: DiskId(disk), sector: Sector(sector) },
                check: Check(check),
            }).collect();
            prop_assert_eq!(Reference::decode_all(&Reference::encode_all(&all)).unwrap(), all);
        }
    }

    #[test]
    fn too_many_disks_and_texts_too_long_are_refused() {
        let disk = DiskInfo { name: "xvda".into(), path: "/a".into(), bytes: 4096, identity: String::new() };
        let frozen = |disks| FrozenDisks { key: Secret::of(&[1; 32]), disks };
        let refused = |frozen: &FrozenDisks| {
            assert!(frozen.check().is_err());
            FrozenDisks::decode(&frozen.encode()).unwrap_err()
        };
        refused(&frozen(Vec::new()));
        refused(&frozen(vec![disk.clone(); DISKS_MAX + 1]));
        let long = DiskInfo { path: "x".repeat(DISK_TEXT_BYTES_MAX + 1), ..disk.clone() };
        refused(&frozen(vec![long]));
        let unseen = DiskInfo { path: "/a\x1b[2J".into(), ..disk };
        assert!(FrozenDisks::decode(&frozen(vec![unseen]).encode()).is_err(), "a path that can't be shown");
    }

    #[test]
    fn a_reference_lies_on_its_disk() {
        let at = |disk, sector| Reference {
            pfn: Pfn(1),
            block: BlockAddress { disk: DiskId(disk), sector: Sector(sector) },
            check: Check([0; 16]),
        };
        let disks = [10 * 512, 100];
        assert!(at(0, 0).check(&disks).is_ok() && at(0, 2).check(&disks).is_ok());
        for bad in [at(0, 3), at(0, (1 << 56) - 1), at(1, 0), at(2, 0)] {
            assert!(bad.check(&disks).is_err(), "{bad:?}");
        }
        assert!(Reference { pfn: Pfn(PFN_END), ..at(0, 0) }.check(&disks).is_err());
    }

    #[test]
    fn the_key_is_not_shown() {
        let frozen = FrozenDisks { key: Secret::of(&[0xab; 32]), disks: Vec::new() };
        assert!(!format!("{frozen:?}").contains("171"));
    }
}
