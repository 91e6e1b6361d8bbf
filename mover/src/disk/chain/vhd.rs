//! A VHD's footer and header, as far as they name another image.
//!
//! ```text
//!     last 512 bytes, and a copy at byte 0 unless it is fixed:
//!       conectix | ... 16: offset of the header | ... 60: kind | 64: sum | 68: its own UUID
//!     header (1 KiB), where it is not fixed:
//!       cxsparse | ... 36: sum | 40: the parent's UUID | ... 576: eight locators {code, space, length, 0, offset}
//! ```
//! Numbers are big-endian; a sum is the complement of all other bytes' sum. A parent without UUID is a raw image: so XenServer's
//! `vhd-util` writes it, which also writes the paths: `MacX` a file URL, `W2ru` and `W2ku` a relative and an absolute path
//! in UTF-16, little-endian. Source: Microsoft's Virtual Hard Disk Image Format Specification, 1.0.
#![forbid(unsafe_code)]

use super::{Backing, Bytes, Format, Layer, Refusal, name, number, read};
use crate::limits::IMAGE_NAME_BYTES_MAX;

const FOOTER: usize = 512;
const HEADER: usize = 1024;
const VERSION: u64 = 0x0001_0000;
const FIXED: u64 = 2;
const DYNAMIC: u64 = 3;
const DIFFERENCING: u64 = 4;
/// Where the eight locators are, and how long each is.
const LOCATORS: std::ops::Range<usize> = 576..768;
const LOCATOR: usize = 24;
const MACX: &[u8] = b"MacX";
const RELATIVE: &[u8] = b"W2ru";
const ABSOLUTE: &[u8] = b"W2ku";

const BROKEN: &str = "Is it whole? `qemu-img check` tells";

/// What `image` says; it has to be the one with `uuid`, if another names it.
pub(super) fn layer(image: &(impl Bytes + ?Sized), uuid: Option<&[u8; 16]>) -> Result<Layer, Refusal> {
    let footer = footer(image)?;
    if uuid.is_some_and(|uuid| footer[68..84] != *uuid) {
        let why = "it is not the image that the clone was made of: its UUID is another".to_owned();
        return Err((why, "Put the clone's own parent in its place"));
    }
    match number::<4>(&footer, 60) {
        FIXED => Ok(Layer::Raw),
        DYNAMIC => Ok(Layer::Clusters),
        DIFFERENCING => over(image, number::<8>(&footer, 16)),
        other => Err((format!("its kind is {other}, which no VHD is"), BROKEN)),
    }
}

/// The footer at the end, or its copy at the beginning, where one is whole.
fn footer(image: &(impl Bytes + ?Sized)) -> Result<Vec<u8>, Refusal> {
    let no_vhd = || ("it is no VHD".to_owned(), "Does the guest's configuration name its format?");
    let last = image.length().checked_sub(FOOTER.try_into().unwrap_or(u64::MAX)).ok_or_else(no_vhd)?;
    for offset in [last, 0] {
        let bytes = read(image, "footer", offset, 512, FOOTER)?;
        // A copy at the beginning of a fixed one would be the guest's own blocks.
        let fixed = number::<4>(&bytes, 60) == FIXED;
        if bytes.starts_with(b"conectix")
            && number::<4>(&bytes, 12) == VERSION
            && sum_is_right(&bytes, 64)
            && (offset == last || !fixed)
        {
            return Ok(bytes);
        }
    }
    Err(no_vhd())
}

/// Whether the four bytes at `at` are the complement of the others' sum.
fn sum_is_right(bytes: &[u8], at: usize) -> bool {
    let all = |bytes: &[u8]| bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
    let sum = all(bytes).wrapping_sub(all(&bytes[at..at + 4]));
    u64::from(!sum) == number::<4>(bytes, at)
}

/// What a clone's header, at `offset`, says of its parent.
fn over(image: &(impl Bytes + ?Sized), offset: u64) -> Result<Layer, Refusal> {
    let header = read(image, "header", offset, 1024, HEADER)?;
    if !header.starts_with(b"cxsparse") || !sum_is_right(&header, 36) {
        return Err(("its header is damaged".to_owned(), BROKEN));
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&header[40..56]);
    let raw = uuid == [0; 16];
    let (format, uuid) = if raw { (Format::Raw, None) } else { (Format::Vhd, Some(uuid)) };
    let mut refusal = ("it does not say where its parent is".to_owned(), BROKEN);
    for wanted in [MACX, RELATIVE, ABSOLUTE] {
        let all = header[LOCATORS].chunks_exact(LOCATOR);
        for locator in all.filter(|locator| locator.starts_with(wanted)) {
            match path(image, locator) {
                Ok(name) => return Ok(Layer::Over(Backing { name, format, uuid })),
                Err(why) => refusal = why,
            }
        }
    }
    Err(refusal)
}

/// The path that a locator stands for.
fn path(image: &(impl Bytes + ?Sized), locator: &[u8]) -> Result<String, Refusal> {
    let (length, offset) = (number::<4>(locator, 8), number::<8>(locator, 16));
    // Two bytes a character at most; a URL has a few more.
    let bytes = read(image, "parent's path", offset, length, 2 * IMAGE_NAME_BYTES_MAX)?;
    if locator.starts_with(MACX) {
        let path = bytes.strip_prefix(b"file://").unwrap_or(&bytes);
        return name(path);
    }
    let units: Vec<u16> = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect();
    let text = String::from_utf16(&units)
        .map_err(|_| ("its parent's path is no text".to_owned(), "Make the clone anew"))?;
    name(text.replace('\\', "/").as_bytes())
}

const _: () = assert!(LOCATORS.end - LOCATORS.start == 8 * LOCATOR && LOCATORS.end <= HEADER);

#[cfg(test)]
pub(super) mod made {
    //! VHDs as XenServer's tools write them.
    use super::*;

    fn seal(bytes: &mut [u8], at: usize) {
        let sum = bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    }

    /// A footer of `kind` whose header is at byte 512.
    pub(crate) fn footer(kind: u32, uuid: [u8; 16]) -> Vec<u8> {
        let mut bytes = vec![0; FOOTER];
        bytes[..8].copy_from_slice(b"conectix");
        bytes[12..16].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
        bytes[16..24].copy_from_slice(&512_u64.to_be_bytes());
        bytes[60..64].copy_from_slice(&kind.to_be_bytes());
        bytes[68..84].copy_from_slice(&uuid);
        seal(&mut bytes, 64);
        bytes
    }

    /// A clone of `parent` (its UUID; none for a raw one) with these locators.
    pub(crate) fn clone(parent: [u8; 16], locators: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
        let mut header = vec![0; HEADER];
        header[..8].copy_from_slice(b"cxsparse");
        header[40..56].copy_from_slice(&parent);
        let mut paths = Vec::new();
        for (number, (code, path)) in locators.iter().enumerate() {
            let at = LOCATORS.start + number * LOCATOR;
            let offset = u64::try_from(FOOTER + HEADER + paths.len()).unwrap();
            header[at..at + 4].copy_from_slice(*code);
            header[at + 8..at + 12].copy_from_slice(&u32::try_from(path.len()).unwrap().to_be_bytes());
            header[at + 16..at + 24].copy_from_slice(&offset.to_be_bytes());
            paths.extend_from_slice(path);
            paths.resize(paths.len().next_multiple_of(512), 0);
        }
        seal(&mut header, 36);
        let footer = footer(4, [0xc1; 16]);
        [footer.clone(), header, paths, footer].concat()
    }

    pub(crate) fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }
}

#[cfg(test)]
mod sizes {
    #[test]
    fn a_length_is_held_against_what_a_path_has() {
        use super::*;
        let image = made::clone([0; 16], &[(b"MacX", vec![b'a'; 4096])]);
        let (why, _) = layer(&image[..], None).unwrap_err();
        assert!(why.contains("4096 bytes long"), "{why}");
    }
}
