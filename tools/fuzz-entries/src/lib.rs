//! A function for each decoder of bytes that come from outside: whatever the bytes, it returns, and what it took for
//! valid keeps what the decoder promises. `../fuzz` feeds them new bytes, `tests/corpus.rs` those once found worth keeping.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io::{Cursor, Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;

use mover::disk::chain::{self, Bottom, Format, Layer};
use mover::index::file;
use mover::limits::{DISKS_MAX, GUEST_PAGES_MAX, IMAGE_NAME_BYTES_MAX};
use mover::net::pass::Pass;
use mover::net::tls::open_anything;
use mover::process::config::GuestConfig;
use mover::process::workload::Workload;
use mover::units::{PAGE_BYTES, PageCount, Sector};
use mover::wire::control::{self, Message};
use mover::wire::frame::{self, Digest, Header, Kind, Reference, ZeroRun, pfn_within};
use mover::wire::hello::{Hello, Secret, Welcome};
use mover::wire::knock;
use xen_glue::abi::DomainId;
use xen_glue::ferry::attached;
use xen_glue::helper::{Note, Passed, arguments};
use xen_glue::stream::{Offer, scan};
use xen_glue::xenstore::Xenstore;

/// A decoder's entry.
pub type Entry = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const ENTRIES: &[(&str, Entry)] = &[
    ("greeting", greeting),
    ("frame", frame),
    ("message", message),
    ("word", word),
    ("xen_stream", xen_stream),
    ("offer", offer),
    ("helper", helper),
    ("xenstore", xenstore),
    ("clone", clone),
    ("record", record),
    ("index", index),
    ("workload", workload),
    ("config", config),
];

/// The first 64 bytes of a connection: a Hello, its answer, or a knock.
pub fn greeting(bytes: &[u8]) {
    let Some(first) = bytes.first_chunk() else { return };
    if let Ok(hello) = Hello::decode(first) {
        let again = Hello::decode(&hello.encode()).expect("what was written is read");
        assert_eq!((again.purpose, again.migration), (hello.purpose, hello.migration));
        assert!(again.secret.same(&hello.secret));
    }
    if let Ok(welcome) = Welcome::decode(first) {
        let again = Welcome::decode(&welcome.encode()).expect("what was written is read");
        assert_eq!((again.version, again.verdict), (welcome.version, welcome.verdict));
    }
    assert!(!knock::is_right(first, &Secret::of(&[0x5c; 32])), "a knock was guessed");
}

/// A frame of a lane, without page bytes: nothing it names is outside the guest or the disks.
pub fn frame(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first_chunk() else { return };
    let Ok(header) = Header::decode(first) else { return };
    assert!(header.count <= header.kind.limit());
    assert!(header.filled_table_bytes() <= frame::TABLE_BYTES_MAX);
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    let Some(table) = rest.get(..header.table_bytes()) else { return };
    // A guest of a prime number of pages, with three disks.
    let (guest, disks) = (PageCount(65_521), 3);
    match header.kind {
        Kind::Data => {
            for word in frame::table(table) {
                if let Ok(pfn) = pfn_within(*word, guest) {
                    assert!(pfn.0 < guest.0);
                }
            }
        }
        Kind::Zero => {
            for run in frame::table::<ZeroRun>(table) {
                if let Ok(pages) = run.range(guest) {
                    assert!(pages.end <= guest.0 && pages.start <= pages.end);
                }
            }
        }
        Kind::References => {
            for reference in frame::table::<Reference>(table) {
                if let Ok((pfn, block, _)) = reference.parts(guest, disks) {
                    assert!(pfn.0 < guest.0 && usize::from(block.disk.0) < disks);
                }
            }
        }
        Kind::Digests => {
            for digest in frame::table::<Digest>(table) {
                if let Ok((pfn, _)) = digest.parts(guest) {
                    assert!(pfn.0 < guest.0);
                }
            }
        }
        Kind::Barrier => assert_eq!(header.count, 0),
    }
}

/// A control message: what is read is written back as the same bytes.
pub fn message(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first_chunk::<{ control::HEADER_BYTES }>() else { return };
    let Ok((kind, length)) = Message::header(first) else { return };
    let Some(body) = rest.get(..length) else { return };
    let Ok(message) = Message::decode(kind, body) else { return };
    if let Message::Shape(shape) = &message {
        assert!(shape.pages <= GUEST_PAGES_MAX && shape.disks.len() <= DISKS_MAX);
    }
    let again = message.encode();
    assert_eq!(again[..control::HEADER_BYTES], first[..], "{}", message.name());
    // A newer peer's class of error, unknown here, is read as "internal".
    let from = usize::from(matches!(message, Message::Abort(mover::ExitClass::Internal, _)));
    assert_eq!(again[control::HEADER_BYTES + from..], body[from..], "{}", message.name());
}

/// A token's word.
pub fn word(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(pass) = text.parse::<Pass>() {
        assert!(pass.to_word().eq_ignore_ascii_case(text));
    }
}

/// What Xen's toolstack saved, with or without its frames.
pub fn xen_stream(bytes: &[u8]) {
    let mut items = 0_usize;
    let outcome = scan::scan(Cursor::new(bytes), &mut |_| {
        items += 1;
        Ok::<(), std::convert::Infallible>(())
    });
    let survey = outcome.expect("a slice can be read");
    assert!(items <= bytes.len(), "{items} items from {} bytes", bytes.len());
    assert!(survey.bytes <= mover::units::u64_of(bytes.len()));
    assert!(
        survey.complete || !survey.faults.is_empty() || survey.more_faults > 0,
        "neither whole nor at fault"
    );
}

/// The body of the record in which a source says where its lanes are.
pub fn offer(bytes: &[u8]) {
    if let Ok(offer) = Offer::decode(bytes) {
        assert!(offer.encode() == bytes, "written in another way");
        assert!(offer.addresses.iter().all(|address| address.bytes().all(|byte| byte.is_ascii_graphic())));
    }
}

/// What the save helper's front and worker tell each other, either way, and what libxl calls it with.
pub fn helper(bytes: &[u8]) {
    let (mut from, mut passed) = (bytes, Vec::new());
    while let Ok(Some(message)) = Passed::read(&mut from) {
        assert!(
            message.bytes.len() <= 2 + usize::from(u16::MAX)
                && (message.number != 0 || !message.is_answered())
        );
        passed.extend(message.bytes);
    }
    assert!(bytes.starts_with(&passed), "what is passed on is what came");
    let (mut from, mut notes) = (bytes, 0);
    while let Ok(Some(note)) = Note::read(&mut from) {
        let mut again = Vec::new();
        note.write(&mut again).expect("memory");
        assert_eq!(Note::read(&mut &again[..]).expect("whole"), Some(note));
        notes += 1;
    }
    assert_eq!(notes, bytes.len() / 8);
    let words = bytes.split(|byte| *byte == 0).take(32);
    let words: Vec<_> = words.map(|word| OsStr::from_bytes(word).to_owned()).collect();
    let _ = arguments::parse(&words);
}

/// Whatever answers in xenstore's place: each of its messages is the next piece of the bytes, up to an 0xff. A piece's first
/// byte says what it does to the answer's header.
struct Store {
    pieces: std::vec::IntoIter<Vec<u8>>,
    asked: [u8; 8],
    answer: Cursor<Vec<u8>>,
}

impl Write for Store {
    fn write(&mut self, question: &[u8]) -> std::io::Result<usize> {
        self.asked = question[..8].try_into().expect("a header");
        self.answer = Cursor::default();
        Ok(question.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Read for Store {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.answer.position() == u64::try_from(self.answer.get_ref().len()).unwrap_or(0) {
            let Some(piece) = self.pieces.next() else { return Ok(0) };
            let (how, payload) = piece.split_first().map_or((0, &[][..]), |(how, payload)| (*how, payload));
            let [kind, request] =
                [0, 4].map(|at| u32::from_ne_bytes(self.asked[at..at + 4].try_into().expect("four")));
            let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            // Mostly what was asked for; else an error, an event, another kind, another question's, another length.
            let words = match how {
                b'E' => [16, request, 0, length],
                b'W' => [15, 0, 0, length],
                b'K' => [kind + 1, request, 0, length],
                b'R' => [kind, request.wrapping_add(1), 0, length],
                b'L' => [kind, request, 0, length.wrapping_mul(0x0101_0101)],
                _ => [kind, request, 0, length],
            };
            let head: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.answer = Cursor::new([&head, payload].concat());
        }
        self.answer.read(out)
    }
}

/// Xenstore's answers about a guest's disks: no disk but one with a path, and not more than may be.
pub fn xenstore(bytes: &[u8]) {
    let pieces: Vec<Vec<u8>> = bytes.split(|byte| *byte == 0xff).map(<[u8]>::to_vec).collect();
    let most = pieces.len();
    let store = Store { pieces: pieces.into_iter(), asked: [0; 8], answer: Cursor::default() };
    // No file is opened: a path may be any.
    let follow = |path: &std::path::Path, format| match format {
        Format::Raw => Ok(Bottom { path: path.to_owned(), written: true }),
        Format::Qcow2 | Format::Vhd => Ok(Bottom { path: path.join("base"), written: false }),
    };
    if let Ok((disks, notes)) = attached::disks_over(&mut Xenstore::over(store), DomainId(7), &follow) {
        assert!(disks.len() <= DISKS_MAX && disks.len() + notes.len() <= bytes.len() + most);
        assert!(disks.iter().all(|disk| disk.path.is_absolute()));
    }
}

/// A clone's header, of every format: what it names is a path within its limit.
pub fn clone(bytes: &[u8]) {
    for (format, uuid) in [(Format::Qcow2, None), (Format::Vhd, None), (Format::Vhd, Some([9; 16]))] {
        if let Ok(Layer::Over(chain::Backing { name, .. }) | Layer::RawIn(name)) =
            chain::layer(bytes, format, uuid.as_ref())
        {
            assert!(!name.is_empty() && name.len() <= IMAGE_NAME_BYTES_MAX);
            assert!(!name.chars().any(char::is_control));
        }
    }
}

/// A record of TLS, from a stranger and from a peer that has the keys.
pub fn record(bytes: &[u8]) {
    if let Some((kind, carried)) = open_anything(bytes) {
        assert!((21..=23).contains(&kind) && carried < bytes.len());
    }
}

/// An index file. Its sums are made right first, or nothing behind them would ever be reached.
pub fn index(bytes: &[u8]) {
    let bytes = with_sums(bytes);
    let key = key_of(&bytes);
    let file = rustix::fs::memfd_create("index", rustix::fs::MemfdFlags::CLOEXEC).expect("memory for a file");
    let mut file = std::fs::File::from(file);
    file.write_all(&bytes).expect("memory for a file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(Some((table, _))) = file::open(path.as_ref(), &key) else { return };
    for hint in [0, 1, u64::MAX, 0x5851_f42d_4c95_7f2d] {
        for near in [None, Some(Sector(0)), Some(Sector(u64::MAX - 8))] {
            let _ = table.find(hint, near);
        }
        assert!(!table.holds(u64::MAX, hint) || table.knows(u64::MAX));
    }
    let _ = table.known_units().take(1000).count();
}

/// Bytes of an index file under one sum.
const SUM_BYTES: usize = 1 << 20;
/// Where the fields are: the file's length, the sum of its sums, its key.
const FILE_BYTES_AT: usize = 16;
const SUMS_SUM_AT: usize = 112;
const KEY_AT: usize = 120;

/// An index file with every sum right; one too short for sums as it is.
#[must_use]
pub fn with_sums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let _ = put_sums(&mut bytes);
    bytes
}

/// Puts every sum right, as far as the header says where they are.
fn put_sums(bytes: &mut [u8]) -> Option<()> {
    let all = bytes.len();
    bytes.get_mut(FILE_BYTES_AT..FILE_BYTES_AT + 8)?.copy_from_slice(&u64::try_from(all).ok()?.to_le_bytes());
    // Small files have one page of sums, the last one.
    let sums = all.checked_sub(PAGE_BYTES).filter(|at| *at >= PAGE_BYTES)?;
    let count = (sums - PAGE_BYTES).div_ceil(SUM_BYTES).min(PAGE_BYTES / 8);
    for piece in 0..count {
        let from = PAGE_BYTES + piece * SUM_BYTES;
        let sum = twox_hash::XxHash3_64::oneshot(&bytes[from..sums.min(from + SUM_BYTES)]);
        bytes[sums + piece * 8..][..8].copy_from_slice(&sum.to_le_bytes());
    }
    let of_sums = twox_hash::XxHash3_64::oneshot(&bytes[sums..sums + count * 8]);
    bytes[SUMS_SUM_AT..SUMS_SUM_AT + 8].copy_from_slice(&of_sums.to_le_bytes());
    let header = twox_hash::XxHash3_64::oneshot(&bytes[..PAGE_BYTES - 8]);
    bytes[PAGE_BYTES - 8..PAGE_BYTES].copy_from_slice(&header.to_le_bytes());
    Some(())
}

/// The key an index file says it has.
fn key_of(bytes: &[u8]) -> String {
    let field = bytes.get(KEY_AT..KEY_AT + 256).unwrap_or_default();
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// A workload's TOML.
pub fn workload(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(error) = Workload::parse("fuzz", text) {
        assert!(error.to_string().contains("workload fuzz"));
    }
}

/// What a guest's process is started with.
pub fn config(bytes: &[u8]) {
    if let Ok(config) = serde_json::from_slice::<GuestConfig>(bytes)
        && config.check().is_ok()
    {
        assert!(!config.name.contains('/') && !config.name.is_empty());
        assert!(config.socket().starts_with(&config.runtime_dir));
    }
}
