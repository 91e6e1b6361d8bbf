//! A qcow2 header, as far as it names other files.
//!
//! ```text
//!     0        4        8                    16                20      72                 100
//!     QFI\xfb | version | offset of its name | the name's length | ... | (3) feature bits  | length of this
//!     behind it, up to the name or the end of the first cluster: extensions {type, length, bytes, padding to 8}, type 0 ends them
//! ```
//! Numbers are big-endian. Source: QEMU's `docs/interop/qcow2.txt`.
#![forbid(unsafe_code)]

use super::{Backing, Bytes, Format, Layer, Refusal, name, number, read};
use crate::limits::{CLONE_HEADER_BYTES_MAX, IMAGE_NAME_BYTES_MAX};
use crate::units::{u64_of, usize_of};

const MAGIC: &[u8] = b"QFI\xfb";
/// Bytes of a header of version 2, and the least of version 3.
const HEADER_2: usize = 72;
const HEADER_3: usize = 104;
/// Blocks are in a file of their own.
const DATA_FILE: u64 = 1 << 2;
/// Features without which it can't be read, and which are known: dirty, corrupt, data file, compression, large tables' entries.
const KNOWN: u64 = 0b1_1111;
/// That file is as the guest sees it (an autoclear bit).
const DATA_FILE_RAW: u64 = 1 << 1;
/// Extensions.
const END: u64 = 0;
const BACKING_FORMAT: u64 = 0xe279_2aca;
const DATA_FILE_NAME: u64 = 0x4441_5441;
/// Extensions of one header.
const EXTENSIONS_MAX: usize = 64;

const BROKEN: &str = "Is it whole? `qemu-img check` tells";
const NO_FORMAT: &str = "Name it with `qemu-img rebase -u -F raw -b BASE CLONE`";

/// What `image` says.
pub(super) fn layer(image: &(impl Bytes + ?Sized)) -> Result<Layer, Refusal> {
    let length = image.length().min(u64_of(CLONE_HEADER_BYTES_MAX));
    let head = read(image, "header", 0, length, CLONE_HEADER_BYTES_MAX)?;
    if !head.starts_with(MAGIC) {
        return Err(("it is no qcow2 image".to_owned(), "Does the guest's configuration name its format?"));
    }
    let broken = |why: &str| Err((why.to_owned(), BROKEN));
    if head.len() < HEADER_2 {
        return broken("its header is cut off");
    }
    let (incompatible, autoclear, header) = match number::<4>(&head, 4) {
        2 => (0, 0, HEADER_2),
        3 if head.len() >= HEADER_3 => {
            (number::<8>(&head, 72), number::<8>(&head, 88), usize_of(number::<4>(&head, 100)))
        }
        3 => return broken("its header is cut off"),
        other => return Err((format!("its version is {other}, and 2 and 3 are known"), "Update pageferry")),
    };
    if incompatible & !KNOWN != 0 {
        let why = format!("it has features that are not known ({:#x})", incompatible & !KNOWN);
        return Err((why, "Update pageferry"));
    }
    let cluster_bits = number::<4>(&head, 20);
    if !(9..=21).contains(&cluster_bits) || header < HEADER_2 || header > head.len() {
        return broken("its header's own sizes are wrong");
    }
    let cluster = 1_u64 << cluster_bits;
    let (offset, size) = (number::<8>(&head, 8), number::<4>(&head, 16));
    let end = if offset == 0 { cluster } else { offset.min(cluster) };
    let end = usize_of(end.min(u64_of(head.len())));
    let found = extensions(head.get(header..end).unwrap_or_default())?;
    if offset == 0 {
        return alone(incompatible, autoclear, &found);
    }
    // As QEMU holds it: within the first cluster.
    let fits = offset >= u64_of(header) && offset.checked_add(size).is_some_and(|end| end <= cluster);
    if !fits || size == 0 || size > u64_of(IMAGE_NAME_BYTES_MAX) {
        return broken("the name of the image under it is not where one can be");
    }
    let name = name(&read(image, "name of the image under it", offset, size, IMAGE_NAME_BYTES_MAX)?)?;
    let format = match found.format.as_deref() {
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(b"vpc") => Format::Vhd,
        Some(other) => {
            let shown: String =
                String::from_utf8_lossy(other).chars().filter(|c| !c.is_control()).take(16).collect();
            let why =
                format!("the format of the image under it is `{shown}`; raw, qcow2 and vpc can be followed");
            return Err((why, "Pages are sent"));
        }
        None => {
            return Err(("it does not say the format of the image under it".to_owned(), NO_FORMAT));
        }
    };
    Ok(Layer::Over(Backing { name, format, uuid: None }))
}

/// An image with nothing under it.
fn alone(incompatible: u64, autoclear: u64, found: &Extensions) -> Result<Layer, Refusal> {
    if incompatible & DATA_FILE == 0 || autoclear & DATA_FILE_RAW == 0 {
        return Ok(Layer::Clusters);
    }
    match &found.data_file {
        Some(file) => Ok(Layer::RawIn(name(file)?)),
        None => Err(("it does not name the file its blocks are in".to_owned(), BROKEN)),
    }
}

/// What extensions name.
#[derive(Default)]
struct Extensions {
    format: Option<Vec<u8>>,
    data_file: Option<Vec<u8>>,
}

fn extensions(mut bytes: &[u8]) -> Result<Extensions, Refusal> {
    let mut found = Extensions::default();
    for _ in 0..EXTENSIONS_MAX {
        if bytes.len() < 8 || number::<4>(bytes, 0) == END {
            return Ok(found);
        }
        let (kind, length) = (number::<4>(bytes, 0), usize_of(number::<4>(bytes, 4)));
        let Some(value) = bytes[8..].get(..length) else {
            return Err(("an extension of its header is longer than the header".to_owned(), BROKEN));
        };
        let into = match kind {
            BACKING_FORMAT => Some(&mut found.format),
            DATA_FILE_NAME => Some(&mut found.data_file),
            _ => None,
        };
        if let Some(into) = into
            && into.replace(value.to_owned()).is_some()
        {
            return Err(("its header says twice what it may say once".to_owned(), BROKEN));
        }
        bytes = bytes[8..].get(length.next_multiple_of(8)..).unwrap_or_default();
    }
    Err((format!("its header has more than {EXTENSIONS_MAX} extensions"), BROKEN))
}
