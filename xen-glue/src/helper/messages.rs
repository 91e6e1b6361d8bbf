//! What the helper and libxl say to each other, byte for byte (`libxl_save_msgs_gen.pl`): in the order and sizes of
//! the host.
//!
//! ```text
//!   helper -> libxl    u16 length of what follows | u16 message | arguments
//!   libxl -> helper    int, for the messages that want an answer
//!   a string           u32 length, its NUL included | bytes | NUL
//! ```
//!
//! Front and worker pass the same messages on; what the worker is told comes in notes of eight bytes.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};

/// Longest text of a log or progress line, bytes; the rest is left out.
const TEXT_BYTES_MAX: usize = 4096;

/// `xentoollog_level` of `xentoollog.h`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// For who debugs.
    Debug,
    /// For who wants to read much.
    Verbose,
    /// Details.
    Detail,
    /// How far it is.
    Progress,
    /// What goes on.
    Info,
    /// Worth a look.
    Notice,
    /// Something is off.
    Warning,
    /// Something failed.
    Error,
}

impl Level {
    fn number(self) -> u32 {
        match self {
            Self::Debug => 1,
            Self::Verbose => 2,
            Self::Detail => 3,
            Self::Progress => 4,
            Self::Info => 5,
            Self::Notice => 6,
            Self::Warning => 7,
            Self::Error => 8,
        }
    }
}

/// A message to libxl.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    /// 1: a line for its log.
    Log {
        /// How much it matters.
        level: Level,
        /// The error's number; none is -1.
        errno: Option<i32>,
        /// Who speaks: "xc".
        context: &'a str,
        /// The line.
        text: &'a str,
    },
    /// 2: how far it is. A `total` of 0 is a line without a percentage.
    Progress {
        /// Who speaks.
        context: &'a str,
        /// With what.
        what: &'a str,
        /// Done so far.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// 3: suspend the guest. Answered with 0 for failure.
    Suspend,
    /// 7: have QEMU log what it writes, or stop. Answered with 0 for success.
    SwitchQemuLogdirty {
        /// The domain.
        domain: u16,
        /// On or off.
        enable: bool,
    },
    /// 8: what the guest can't change is set. Answered with 0 for success.
    StaticDataDone {
        /// 1 without a CPUID policy, 2 without an MSR policy.
        missing: u32,
    },
    /// 9: where the restored guest's store and console are.
    RestoreResults {
        /// The store's frame.
        store: u64,
        /// The console's frame.
        console: u64,
    },
    /// 10: it is over. The answer means nothing.
    Complete {
        /// 0 or -1.
        retval: i32,
        /// The error's number, or 0.
        errno: i32,
    },
    /// To the front alone: the worker goes on for a while, and is not to be waited for.
    GoesOn,
}

/// Message 8's number, and bit of `CBFLAGS`.
pub(crate) const STATIC_DATA_DONE: u16 = 8;
/// Message 7's number, and bit of `CBFLAGS`.
pub(crate) const SWITCH_QEMU_LOGDIRTY: u16 = 7;
/// Message 3's number, and bit of `CBFLAGS`.
pub(crate) const SUSPEND: u16 = 3;
/// Message 10's number.
pub(crate) const COMPLETE: u16 = 10;
/// What the worker tells the front alone; libxl's numbers are far below.
pub(crate) const GOES_ON: u16 = 0x7066;

impl Message<'_> {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        match self {
            Self::Log { .. } => 1,
            Self::Progress { .. } => 2,
            Self::Suspend => SUSPEND,
            Self::SwitchQemuLogdirty { .. } => SWITCH_QEMU_LOGDIRTY,
            Self::StaticDataDone { .. } => STATIC_DATA_DONE,
            Self::RestoreResults { .. } => 9,
            Self::Complete { .. } => COMPLETE,
            Self::GoesOn => GOES_ON,
        }
    }

    /// Its bytes, the length in front.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.number().to_ne_bytes().to_vec();
        match *self {
            Self::Log { level, errno, context, text } => {
                body.extend(level.number().to_ne_bytes());
                body.extend(errno.unwrap_or(-1).to_ne_bytes());
                put_text(&mut body, context);
                put_text(&mut body, text);
            }
            Self::Progress { context, what, done, total } => {
                put_text(&mut body, context);
                put_text(&mut body, what);
                body.extend(done.to_ne_bytes());
                body.extend(total.to_ne_bytes());
            }
            Self::Suspend | Self::GoesOn => {}
            Self::SwitchQemuLogdirty { domain, enable } => {
                body.extend(u32::from(domain).to_ne_bytes());
                body.extend(u32::from(enable).to_ne_bytes());
            }
            Self::StaticDataDone { missing } => body.extend(missing.to_ne_bytes()),
            Self::RestoreResults { store, console } => {
                body.extend(store.to_ne_bytes());
                body.extend(console.to_ne_bytes());
            }
            Self::Complete { retval, errno } => {
                body.extend(retval.to_ne_bytes());
                body.extend(errno.to_ne_bytes());
            }
        }
        // Two texts of limited length are the most there can be.
        let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
        [&length.to_ne_bytes()[..], &body].concat()
    }
}

/// Puts a string, without what a C string can't have and cut to its limit.
fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let bytes = text[..end].bytes().map(|byte| if byte == 0 { b'?' } else { byte });
    let length = u32::try_from(end + 1).unwrap_or(u32::MAX);
    out.extend(length.to_ne_bytes());
    out.extend(bytes);
    out.push(0);
}

/// A message as it is passed on: its bytes with the length in front, and its number.
#[derive(Debug)]
pub struct Passed {
    /// All of it.
    pub bytes: Vec<u8>,
    /// Its number; 0 if it is too short for one.
    pub number: u16,
}

impl Passed {
    /// Reads one; none at the end of the stream between two.
    ///
    /// # Errors
    /// What reading says; the end amid a message.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut length = [0; 2];
        match from.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut bytes = length.to_vec();
        bytes.resize(2 + usize::from(u16::from_ne_bytes(length)), 0);
        from.read_exact(&mut bytes[2..])?;
        let number = bytes.get(2..4).and_then(|number| number.try_into().ok()).map_or(0, u16::from_ne_bytes);
        Ok(Some(Self { bytes, number }))
    }

    /// Whether libxl answers it.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        matches!(self.number, 3..=8 | COMPLETE)
    }
}

/// What the front tells the worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note {
    /// libxl's answer.
    Answer(i32),
    /// End as soon as can be, and put everything back.
    Cancel,
}

impl Note {
    /// Writes it.
    ///
    /// # Errors
    /// What writing says.
    pub fn write(self, to: &mut impl Write) -> io::Result<()> {
        let (tag, value) = match self {
            Self::Answer(value) => (0u32, value),
            Self::Cancel => (1, 0),
        };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&tag.to_ne_bytes());
        bytes[4..].copy_from_slice(&value.to_ne_bytes());
        to.write_all(&bytes)
    }

    /// Reads one; none at the end of the stream.
    ///
    /// # Errors
    /// What reading says.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; 8];
        match from.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let [a, b, c, d, value @ ..] = bytes;
        Ok(Some(match u32::from_ne_bytes([a, b, c, d]) {
            0 => Self::Answer(i32::from_ne_bytes(value)),
            _ => Self::Cancel,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What libxl's generated code reads, written down by hand for a little-endian machine.
    #[test]
    #[cfg(target_endian = "little")]
    fn bytes_are_those_libxl_reads() {
        let log = Message::Log { level: Level::Error, errno: Some(5), context: "xc", text: "no" };
        let mut expected = vec![24, 0, 1, 0, 8, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, b'x', b'c', 0];
        expected.extend([3, 0, 0, 0, b'n', b'o', 0]);
        assert_eq!(log.encode(), expected);
        let quiet = Message::Log { level: Level::Debug, errno: None, context: "", text: "" };
        assert_eq!(
            quiet.encode(),
            [20, 0, 1, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        );
        let progress = Message::Progress { context: "xc", what: "F", done: 1, total: 258 };
        let mut expected = vec![31, 0, 2, 0, 3, 0, 0, 0, b'x', b'c', 0, 2, 0, 0, 0, b'F', 0];
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(progress.encode(), expected);
        assert_eq!(Message::Suspend.encode(), [2, 0, 3, 0]);
        assert_eq!(
            Message::SwitchQemuLogdirty { domain: 7, enable: true }.encode(),
            [10, 0, 7, 0, 7, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(Message::StaticDataDone { missing: 3 }.encode(), [6, 0, 8, 0, 3, 0, 0, 0]);
        assert_eq!(
            Message::RestoreResults { store: 0xfeffc, console: 2 }.encode(),
            [18, 0, 9, 0, 0xfc, 0xef, 0x0f, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            Message::Complete { retval: -1, errno: 22 }.encode(),
            [10, 0, 10, 0, 0xff, 0xff, 0xff, 0xff, 22, 0, 0, 0]
        );
    }

    #[test]
    fn levels_are_xentoollogs() {
        let levels = [
            Level::Debug,
            Level::Verbose,
            Level::Detail,
            Level::Progress,
            Level::Info,
            Level::Notice,
            Level::Warning,
            Level::Error,
        ];
        assert_eq!(levels.map(Level::number), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn texts_are_cut_and_have_no_nul_within() {
        let long = "ä".repeat(TEXT_BYTES_MAX);
        let bytes = Message::Log { level: Level::Info, errno: None, context: "a\0b", text: &long }.encode();
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        assert_eq!(length + 2, bytes.len());
        assert!(bytes.len() < TEXT_BYTES_MAX + 64);
        assert_eq!(&bytes[16..20], b"a?b\0");
    }

    #[test]
    fn messages_and_notes_are_passed_on() {
        let bytes = [Message::Suspend.encode(), Message::Complete { retval: 0, errno: 0 }.encode()].concat();
        let mut from = &bytes[..];
        let first = Passed::read(&mut from).unwrap().unwrap();
        assert!(first.number == SUSPEND && first.is_answered() && first.bytes == [2, 0, 3, 0]);
        assert_eq!(Passed::read(&mut from).unwrap().unwrap().number, COMPLETE);
        assert!(Passed::read(&mut from).unwrap().is_none());
        assert!(Passed::read(&mut &bytes[..3]).is_err());
        for note in [Note::Answer(-1), Note::Cancel] {
            let mut bytes = Vec::new();
            note.write(&mut bytes).unwrap();
            assert_eq!(Note::read(&mut &bytes[..]).unwrap(), Some(note));
        }
    }
}
