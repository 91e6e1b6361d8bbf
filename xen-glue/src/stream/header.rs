//! The two headers every libxc stream begins with.
//!
//! ```text
//!   image header, big-endian                     domain header, little-endian
//!   0        8    12        16        18   24    0      4            6     8           12          16
//!   | marker | id | version | options | 0  |     | type | page_shift | 0   | xen_major | xen_minor |
//! ```
#![forbid(unsafe_code)]

use super::error::Fault;
use super::fields::{bytes_at, u16_at, u32_at};

/// Bytes of the image header.
pub const IMAGE_HEADER_BYTES: usize = 24;
/// Bytes of the domain header.
pub const DOMAIN_HEADER_BYTES: usize = 16;
/// The first eight bytes.
pub(crate) const MARKER: u64 = u64::MAX;
const ID: u32 = 0x5845_4e46;
const BIG_ENDIAN: u16 = 1;
/// The version written here.
pub(crate) const VERSION_WRITTEN: u32 = 3;
/// The oldest version read here.
pub(crate) const VERSION_OLDEST: u32 = 2;
const PAGE_SHIFT: u16 = 12;

/// What kind of guest a stream holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestType {
    /// Paravirtualised.
    Pv,
    /// HVM, and PVH, which is HVM without a device model.
    Hvm,
}

impl GuestType {
    /// The number in the domain header.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Pv => 1,
            Self::Hvm => 2,
        }
    }

    /// "PV", "HVM".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pv => "PV",
            Self::Hvm => "HVM",
        }
    }
}

/// The domain header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DomainHeader {
    /// What kind of guest.
    pub guest: GuestType,
    /// Xen's major version where it was saved; 0 if the stream was converted from the format before Xen 4.6.
    pub xen_major: u32,
    /// Xen's minor version there; of a converted stream, the converter's.
    pub xen_minor: u32,
}

impl DomainHeader {
    /// Its 16 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; DOMAIN_HEADER_BYTES] {
        let mut out = [0; DOMAIN_HEADER_BYTES];
        out[..4].copy_from_slice(&self.guest.number().to_le_bytes());
        out[4..6].copy_from_slice(&PAGE_SHIFT.to_le_bytes());
        out[8..12].copy_from_slice(&self.xen_major.to_le_bytes());
        out[12..].copy_from_slice(&self.xen_minor.to_le_bytes());
        out
    }

    /// From its bytes.
    ///
    /// # Errors
    /// The fault and its place within the header: a type or page size x86 does not have, reserved bits.
    pub fn decode(bytes: &[u8; DOMAIN_HEADER_BYTES]) -> Result<Self, (u64, Fault)> {
        let guest = match u32_at(bytes, 0) {
            1 => GuestType::Pv,
            2 => GuestType::Hvm,
            found => {
                return Err((0, field("the domain header's type", u64::from(found), "1 (PV) or 2 (HVM)")));
            }
        };
        let shift = u16_at(bytes, 4);
        if shift != PAGE_SHIFT {
            return Err((4, field("the domain header's page shift", u64::from(shift), "12 (4 KiB)")));
        }
        let reserved = u16_at(bytes, 6);
        if reserved != 0 {
            return Err((6, Fault::Reserved { field: "the domain header", found: u64::from(reserved) }));
        }
        Ok(Self { guest, xen_major: u32_at(bytes, 8), xen_minor: u32_at(bytes, 12) })
    }
}

/// The image header of a stream written here.
#[must_use]
pub(crate) fn encode_image_header() -> [u8; IMAGE_HEADER_BYTES] {
    let mut out = [0; IMAGE_HEADER_BYTES];
    out[..8].copy_from_slice(&MARKER.to_be_bytes());
    out[8..12].copy_from_slice(&ID.to_be_bytes());
    out[12..16].copy_from_slice(&VERSION_WRITTEN.to_be_bytes());
    out
}

/// The version an image header names, 2 or 3.
///
/// # Errors
/// The fault and its place within the header.
pub(crate) fn decode_image_header(bytes: &[u8; IMAGE_HEADER_BYTES]) -> Result<u32, (u64, Fault)> {
    if u64::from_be_bytes(bytes_at(bytes, 0)) != MARKER {
        return Err((0, Fault::NotAStream { found: bytes_at(bytes, 0) }));
    }
    let id = u32::from_be_bytes(bytes_at(bytes, 8));
    if id != ID {
        return Err((8, field("the image header's id", u64::from(id), "0x58454e46 (\"XENF\")")));
    }
    let version = u32::from_be_bytes(bytes_at(bytes, 12));
    if !(VERSION_OLDEST..=VERSION_WRITTEN).contains(&version) {
        return Err((12, field("the image header's version", u64::from(version), "2 or 3")));
    }
    let options = u16::from_be_bytes(bytes_at(bytes, 16));
    if options & BIG_ENDIAN != 0 {
        return Err((16, Fault::BigEndian));
    }
    if options != 0 {
        return Err((16, Fault::Reserved { field: "the image header's options", found: u64::from(options) }));
    }
    let reserved: [u8; 6] = bytes_at(bytes, 18);
    if let Some(place) = reserved.iter().position(|&byte| byte != 0) {
        let found = u64::from(reserved[place]);
        return Err((18 + mover::units::u64_of(place), Fault::Reserved { field: "the image header", found }));
    }
    Ok(version)
}

fn field(field: &'static str, found: u64, expected: &'static str) -> Fault {
    Fault::Field { field, found, expected }
}
