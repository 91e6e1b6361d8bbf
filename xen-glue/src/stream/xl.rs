//! The header `xl save` puts before libxl's stream, and `xl migrate` sends before it.
//!
//! ```text
//!   0       32          36                40               44                  48
//!   | magic | byteorder | mandatory flags | optional flags | optional data len | optional data |
//!   optional data: u32 length, the domain's configuration; whatever follows is to be skipped
//! ```
//!
//! Source: `struct save_file_header` of `tools/xl/xl.h`.
#![forbid(unsafe_code)]

use std::io::Read;

use mover::units::{u64_of, usize_of};

use super::error::{Fault, StreamError};
use super::fields::{bytes_at, u32_at};
use super::input::Input;
use super::limits::XL_DATA_BYTES_MAX;

pub(crate) const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const HEADER_BYTES: usize = 48;
const BYTE_ORDER: u32 = 0x0102_0304;
const FLAG_JSON: u32 = 1;
const FLAG_STREAM_V2: u32 = 2;

/// xl's file header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XlHeader {
    /// Whether the configuration is JSON, as every xl since 4.5 writes it.
    pub json: bool,
    /// Whether libxl's stream follows; if not, a libxc stream does.
    pub libxl: bool,
    /// The domain's configuration.
    pub config: Vec<u8>,
}

impl XlHeader {
    /// The header's bytes, configuration included. The configuration is under [`XL_DATA_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.config.len()).unwrap_or(u32::MAX);
        assert!(length < XL_DATA_BYTES_MAX - 4, "a domain's configuration of {length} bytes");
        let mut flags = 0;
        flags |= if self.json { FLAG_JSON } else { 0 };
        flags |= if self.libxl { FLAG_STREAM_V2 } else { 0 };
        let mut out = MAGIC.to_vec();
        [BYTE_ORDER, flags, 0, length + 4, length].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(&self.config);
        out
    }

    /// Reads one, from its first byte, and nothing behind it. `offset` is what errors count from. Returns the byte
    /// behind it too.
    ///
    /// # Errors
    /// Reading failed, or this is no xl file, of the other byte order, with flags nobody here knows, or with lengths
    /// that can't be.
    pub fn read<R: Read>(inner: R, offset: u64) -> Result<(Self, u64), StreamError> {
        let mut input = Input::new(inner, offset);
        let mut head = [0; HEADER_BYTES];
        input.exact(&mut head, "xl's file header")?;
        let field = |at: u64, field, found, expected| {
            StreamError::new(offset + at, Fault::Field { field, found: u64::from(found), expected })
        };
        if !head.starts_with(MAGIC) {
            return Err(StreamError::new(offset, Fault::NotAStream { found: bytes_at(&head, 0) }));
        }
        let order = u32_at(&head, 32);
        if order == BYTE_ORDER.swap_bytes() {
            return Err(StreamError::new(offset + 32, Fault::BigEndian));
        }
        if order != BYTE_ORDER {
            return Err(field(32, "the byte order in xl's header", order, "0x1020304"));
        }
        let flags = u32_at(&head, 36);
        if flags & !(FLAG_JSON | FLAG_STREAM_V2) != 0 {
            return Err(field(36, "the mandatory flags of xl's header", flags, "bits 0 and 1"));
        }
        let length = u32_at(&head, 44);
        if length > XL_DATA_BYTES_MAX {
            let (found, limit) = (u64::from(length), u64::from(XL_DATA_BYTES_MAX));
            let what = "the length of xl's optional data";
            return Err(StreamError::new(offset + 44, Fault::Limit { what, found, limit }));
        }
        let data = input.body(usize_of(u64::from(length)), "xl's optional data")?;
        let config = match data.split_first_chunk::<4>() {
            None => Vec::new(),
            Some((size, rest)) => {
                let size = u32::from_le_bytes(*size);
                match rest.get(..usize_of(u64::from(size))) {
                    Some(config) => config.to_vec(),
                    None => {
                        let (found, limit) = (u64::from(size), u64_of(rest.len()));
                        let what = "the length of the configuration in xl's optional data";
                        let at = offset + u64_of(HEADER_BYTES);
                        return Err(StreamError::new(at, Fault::Limit { what, found, limit }));
                    }
                }
            }
        };
        let header = Self { json: flags & FLAG_JSON != 0, libxl: flags & FLAG_STREAM_V2 != 0, config };
        Ok((header, input.offset()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_a_bad_one_is_named() {
        let header = XlHeader { json: true, libxl: true, config: b"{}".to_vec() };
        let bytes = [header.encode(), b"LibxlFmt".to_vec()].concat();
        let mut rest = &bytes[..];
        assert_eq!(XlHeader::read(&mut rest, 0).unwrap(), (header, 54));
        assert_eq!(rest, b"LibxlFmt");
        for (place, value, offset) in
            [(3, b'?', 0), (32, 9, 32), (36, 7, 36), (47, 0x7f, 44), (48, 200, 48), (44, 200, 62)]
        {
            let mut broken = bytes.clone();
            broken[place] = value;
            assert_eq!(XlHeader::read(&broken[..], 0).unwrap_err().offset, offset, "byte {place}");
        }
    }
}
