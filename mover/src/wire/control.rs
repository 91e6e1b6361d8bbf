//! Messages on the control connection: a header of 8 bytes (kind u16, zero u16, length u32) and a body.
//!
//! Bodies are fields in the order of the enum's documentation, little-endian, strings as u16 length and UTF-8.
//! A body longer than its fields is an error, as is one shorter: versions, not slack, carry extensions.

use crate::error::{ExitClass, WireError};
use crate::fingerprint::CheckKey;
use crate::limits::{
    CONTROL_MESSAGE_BYTES_MAX, DISKS_MAX, GUEST_PAGES_MAX, LANES_MAX, REFETCHES_PER_MESSAGE, STATE_BYTES_MAX,
};
use crate::units::{Pfn, u64_of};
use crate::wire::within;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 8;
/// Longest text in a message, in bytes; a longer one is cut before it is sent.
const TEXT_BYTES_MAX: usize = 2048;
/// Bytes of state in one [`Message::State`].
pub const STATE_CHUNK_BYTES: usize = 32 * 1024;

/// A disk as the source names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskName {
    /// Guest's name for it.
    pub name: String,
    /// Path on the source.
    pub path: String,
    /// What tells it from others.
    pub identity: String,
    /// Its size.
    pub bytes: u64,
}

/// What is to be moved; the first message.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Guest's name.
    pub guest: String,
    /// Guest's size in pages.
    pub pages: u64,
    /// Lanes that will be dialled.
    pub lanes: u8,
    /// Whether references will come.
    pub refers: bool,
    /// Whether the guest may restart before its last page.
    pub lazy: bool,
    /// Whether digests of all pages come at the pause.
    pub verify: bool,
    /// Key of the migration's checks.
    pub key: CheckKey,
    /// Its disks.
    pub disks: Vec<DiskName>,
}

/// The target's running counts, sent about twenty times a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Feedback {
    /// Pages referenced and not yet there.
    pub outstanding: u64,
    /// References loaded and checked, good or not.
    pub checked: u64,
    /// Those whose bytes were not the page's.
    pub failed: u64,
    /// Bytes read from disks.
    pub disk_bytes: u64,
    /// Time the disks were busy with that, microseconds.
    pub disk_busy_us: u64,
    /// Faults on held pages answered.
    pub faults: u64,
    /// Pages compared with their digest.
    pub verified: u64,
    /// Pages of those that differed.
    pub mismatched: u64,
}

/// How far the target has come, as it tells a source that dials again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Everything is there, no commit has arrived.
    Ready,
    /// The guest runs here.
    Started,
    /// The guest runs here and nothing is outstanding.
    Drained,
    /// The guest was given up here before any commit arrived; it never ran.
    Discarded,
}

/// The target's closing account.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Account {
    /// Final counts.
    pub feedback: Feedback,
    /// Pages outstanding at the restart.
    pub lazy: u64,
    /// CPU time of the target's engine, microseconds.
    pub cpu_us: u64,
    /// Its highest private memory, bytes.
    pub memory_bytes: u64,
    /// Whether any load went straight into guest memory.
    pub direct: bool,
}

/// What the target can do for the guest it was told of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// For each disk, whether its references can be loaded; else why not.
    pub disks: Vec<Result<(), String>>,
    /// Whether the guest can restart before its last page; else why not.
    pub lazy: Result<(), String>,
}

/// A control message.
#[derive(Clone, Debug)]
pub enum Message {
    /// Source, 1: what is to be moved.
    Shape(Shape),
    /// Source, 2: a round begins: round u32, pages u64.
    Round(u32, u64),
    /// Source, 3: the guest is paused; the last round is under way: round u32, bytes of state u32.
    Final(u32, u32),
    /// Source, 4: the next piece of the guest's state.
    State(Vec<u8>),
    /// Source, 5: the guest is yours.
    Commit,
    /// Source, 6: nothing more is needed from you; good-bye.
    Finished,
    /// Source, 7: I am here.
    Ping,
    /// Source, 8: the digests will come next, in this round: round u32.
    Verify(u32),
    /// Target, 32: can do.
    Accept(Offer),
    /// Target, 33: counts.
    Feedback(Feedback),
    /// Target, 34: references that did not hold: send these pages; urgent u8 where the guest waits for them.
    Refetch {
        /// Before all others.
        urgent: bool,
        /// Which.
        pfns: Vec<Pfn>,
    },
    /// Target, 35: all that came before the barriers of this round is placed: round u32.
    Placed(u32),
    /// Target, 36: the guest could start now.
    Ready,
    /// Target, 37: the guest runs here.
    Started,
    /// Target, 38: nothing is outstanding any more.
    Drained(Account),
    /// Target, 39: how far I had come, first message on a resumed connection.
    Standing(Standing),
    /// Either, 64: it ends here: class u8, reason.
    Abort(ExitClass, String),
}

impl Message {
    /// Its name, for errors and traces.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shape(_) => "Shape",
            Self::Round(..) => "Round",
            Self::Final(..) => "Final",
            Self::State(_) => "State",
            Self::Commit => "Commit",
            Self::Finished => "Finished",
            Self::Ping => "Ping",
            Self::Verify(_) => "Verify",
            Self::Accept(_) => "Accept",
            Self::Feedback(_) => "Feedback",
            Self::Refetch { .. } => "Refetch",
            Self::Placed(_) => "Placed",
            Self::Ready => "Ready",
            Self::Started => "Started",
            Self::Drained(_) => "Drained",
            Self::Standing(_) => "Standing",
            Self::Abort(..) => "Abort",
        }
    }

    /// Header and body.
    ///
    /// # Panics
    /// If a field is over its limit; the sender keeps to them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(vec![0; HEADER_BYTES]);
        let kind: u16 = match self {
            Self::Shape(shape) => {
                out.shape(shape);
                1
            }
            Self::Round(round, pages) => {
                out.u32(*round);
                out.u64(*pages);
                2
            }
            Self::Final(round, bytes) => {
                out.u32(*round);
                out.u32(*bytes);
                3
            }
            Self::State(bytes) => {
                out.0.extend_from_slice(bytes);
                4
            }
            Self::Commit => 5,
            Self::Finished => 6,
            Self::Ping => 7,
            Self::Verify(round) => {
                out.u32(*round);
                8
            }
            Self::Accept(Offer { disks, lazy }) => {
                out.u8(u8::try_from(disks.len()).expect("DISKS_MAX fits"));
                for disk in disks {
                    out.outcome(disk);
                }
                out.outcome(lazy);
                32
            }
            Self::Feedback(feedback) => {
                out.feedback(feedback);
                33
            }
            Self::Refetch { urgent, pfns } => {
                out.u8((*urgent).into());
                for pfn in pfns {
                    out.u64(pfn.0);
                }
                34
            }
            Self::Placed(round) => {
                out.u32(*round);
                35
            }
            Self::Ready => 36,
            Self::Started => 37,
            Self::Drained(account) => {
                out.feedback(&account.feedback);
                out.u64(account.lazy);
                out.u64(account.cpu_us);
                out.u64(account.memory_bytes);
                out.u8(account.direct.into());
                38
            }
            Self::Standing(standing) => {
                out.u8(match standing {
                    Standing::Ready => 0,
                    Standing::Started => 1,
                    Standing::Drained => 2,
                    Standing::Discarded => 3,
                });
                39
            }
            Self::Abort(class, reason) => {
                out.u8(class.code());
                out.text(reason);
                64
            }
        };
        let body = out.0.len() - HEADER_BYTES;
        assert!(body <= CONTROL_MESSAGE_BYTES_MAX, "{} of {body} bytes", self.name());
        out.0[..2].copy_from_slice(&kind.to_le_bytes());
        out.0[4..8].copy_from_slice(&u32::try_from(body).unwrap_or(u32::MAX).to_le_bytes());
        out.0
    }

    /// Kind and length of the body from a header.
    pub fn header(bytes: &[u8; HEADER_BYTES]) -> Result<(u16, usize), WireError> {
        let kind = u16::from_le_bytes([bytes[0], bytes[1]]);
        if !matches!(kind, 1..=8 | 32..=39 | 64) || bytes[2..4] != [0, 0] {
            return Err(WireError::Invalid { what: "the kind of a control message", found: kind.into() });
        }
        let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        Ok((kind, within("the length of a control message", length.into(), CONTROL_MESSAGE_BYTES_MAX)?))
    }

    /// A message from its kind and body.
    pub fn decode(kind: u16, body: &[u8]) -> Result<Self, WireError> {
        let mut input = Reader(body);
        let message = match kind {
            1 => Self::Shape(input.shape()?),
            2 => Self::Round(input.u32()?, input.u64()?),
            3 => {
                let (round, bytes) = (input.u32()?, input.u32()?);
                within("the guest's state", bytes.into(), STATE_BYTES_MAX)?;
                Self::Final(round, bytes)
            }
            4 => Self::State(std::mem::take(&mut input.0).to_vec()),
            5 => Self::Commit,
            6 => Self::Finished,
            7 => Self::Ping,
            8 => Self::Verify(input.u32()?),
            32 => {
                let count = within("the number of disks", input.u8()?.into(), DISKS_MAX)?;
                let disks = (0..count).map(|_| input.outcome()).collect::<Result<_, _>>()?;
                Self::Accept(Offer { disks, lazy: input.outcome()? })
            }
            33 => Self::Feedback(input.feedback()?),
            34 => {
                let urgent = input.flag()?;
                let count = within("the number of refetches", u64_of(body.len() / 8), REFETCHES_PER_MESSAGE)?;
                Self::Refetch {
                    urgent,
                    pfns: (0..count).map(|_| input.u64().map(Pfn)).collect::<Result<_, _>>()?,
                }
            }
            35 => Self::Placed(input.u32()?),
            36 => Self::Ready,
            37 => Self::Started,
            38 => Self::Drained(Account {
                feedback: input.feedback()?,
                lazy: input.u64()?,
                cpu_us: input.u64()?,
                memory_bytes: input.u64()?,
                direct: input.flag()?,
            }),
            39 => Self::Standing(match input.u8()? {
                0 => Standing::Ready,
                1 => Standing::Started,
                2 => Standing::Drained,
                3 => Standing::Discarded,
                n => return Err(WireError::Invalid { what: "a standing", found: n.into() }),
            }),
            64 => {
                let code = input.u8()?;
                Self::Abort(ExitClass::from_code(code).unwrap_or(ExitClass::Internal), input.text()?)
            }
            n => return Err(WireError::Invalid { what: "the kind of a control message", found: n.into() }),
        };
        match input.0.len() {
            0 => Ok(message),
            n => {
                Err(WireError::Invalid { what: "the bytes left over in a control message", found: u64_of(n) })
            }
        }
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, n: u8) {
        self.0.push(n);
    }
    fn u32(&mut self, n: u32) {
        self.0.extend_from_slice(&n.to_le_bytes());
    }
    fn u64(&mut self, n: u64) {
        self.0.extend_from_slice(&n.to_le_bytes());
    }
    /// A string; one over the length of its field is cut at a character, with dots.
    fn text(&mut self, text: &str) {
        let cut = if text.len() > TEXT_BYTES_MAX {
            let end = (0..=TEXT_BYTES_MAX - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            format!("{}...", &text[..end])
        } else {
            text.to_owned()
        };
        self.0.extend_from_slice(&u16::try_from(cut.len()).unwrap_or(u16::MAX).to_le_bytes());
        self.0.extend_from_slice(cut.as_bytes());
    }
    fn outcome(&mut self, outcome: &Result<(), String>) {
        self.u8(outcome.is_ok().into());
        self.text(outcome.as_ref().err().map_or("", String::as_str));
    }
    fn feedback(&mut self, f: &Feedback) {
        for n in [
            f.outstanding,
            f.checked,
            f.failed,
            f.disk_bytes,
            f.disk_busy_us,
            f.faults,
            f.verified,
            f.mismatched,
        ] {
            self.u64(n);
        }
    }
    fn shape(&mut self, shape: &Shape) {
        self.u64(shape.pages);
        self.u8(shape.lanes);
        for flag in [shape.refers, shape.lazy, shape.verify] {
            self.u8(flag.into());
        }
        self.0.extend_from_slice(shape.key.bytes());
        self.text(&shape.guest);
        self.u8(u8::try_from(shape.disks.len()).expect("DISKS_MAX fits"));
        for disk in &shape.disks {
            self.u64(disk.bytes);
            for text in [&disk.name, &disk.path, &disk.identity] {
                self.text(text);
            }
        }
    }
}

struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, bytes: usize) -> Result<&'b [u8], WireError> {
        match self.0.split_at_checked(bytes) {
            Some((head, rest)) => {
                self.0 = rest;
                Ok(head)
            }
            None => {
                Err(WireError::Invalid { what: "the bytes short in a control message", found: u64_of(bytes) })
            }
        }
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }
    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            n => Err(WireError::Invalid { what: "a flag", found: n.into() }),
        }
    }
    fn text(&mut self) -> Result<String, WireError> {
        let length = u16::from_le_bytes(self.array()?);
        within("the length of a text", length.into(), TEXT_BYTES_MAX)?;
        let bytes = self.take(length.into())?;
        String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Invalid {
            what: "a text that is not UTF-8, of bytes",
            found: length.into(),
        })
    }
    fn outcome(&mut self) -> Result<Result<(), String>, WireError> {
        match (self.flag()?, self.text()?) {
            (true, why) if why.is_empty() => Ok(Ok(())),
            (true, why) => Err(WireError::Invalid {
                what: "a reason for what is good, of bytes",
                found: u64_of(why.len()),
            }),
            (false, why) => Ok(Err(why)),
        }
    }
    fn feedback(&mut self) -> Result<Feedback, WireError> {
        Ok(Feedback {
            outstanding: self.u64()?,
            checked: self.u64()?,
            failed: self.u64()?,
            disk_bytes: self.u64()?,
            disk_busy_us: self.u64()?,
            faults: self.u64()?,
            verified: self.u64()?,
            mismatched: self.u64()?,
        })
    }
    fn shape(&mut self) -> Result<Shape, WireError> {
        let pages = self.u64()?;
        if pages == 0 || pages > GUEST_PAGES_MAX {
            return Err(WireError::TooLong {
                what: "a guest in pages",
                found: pages,
                limit: GUEST_PAGES_MAX,
            });
        }
        let lanes = self.u8()?;
        if within("the number of lanes", lanes.into(), LANES_MAX)? == 0 {
            return Err(WireError::Invalid { what: "the number of lanes", found: 0 });
        }
        let (refers, lazy, verify) = (self.flag()?, self.flag()?, self.flag()?);
        let key = CheckKey::new(self.array()?);
        let guest = self.text()?;
        let count = within("the number of disks", self.u8()?.into(), DISKS_MAX)?;
        let disks = (0..count)
            .map(|_| {
                let bytes = self.u64()?;
                Ok(DiskName { bytes, name: self.text()?, path: self.text()?, identity: self.text()? })
            })
            .collect::<Result<_, WireError>>()?;
        Ok(Shape { guest, pages, lanes, refers, lazy, verify, key, disks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Message> {
        let disk = DiskName { name: "disk0".into(), path: "/a".into(), identity: "x".into(), bytes: 1 << 30 };
        let shape = Shape {
            guest: "desk".into(),
            pages: 77,
            lanes: 2,
            refers: true,
            lazy: false,
            verify: true,
            key: CheckKey::new([5; 32]),
            disks: vec![disk.clone(), disk],
        };
        let feedback = Feedback { outstanding: 1, checked: 2, mismatched: 8, ..Feedback::default() };
        vec![
            Message::Shape(shape),
            Message::Round(3, 9),
            Message::Final(4, 100),
            Message::State(vec![1, 2, 3]),
            Message::Commit,
            Message::Finished,
            Message::Ping,
            Message::Verify(5),
            Message::Accept(Offer { disks: vec![Ok(()), Err("no".into())], lazy: Err("kernel".into()) }),
            Message::Feedback(feedback),
            Message::Refetch { urgent: true, pfns: vec![Pfn(1), Pfn(9)] },
            Message::Placed(2),
            Message::Ready,
            Message::Started,
            Message::Drained(Account { feedback, lazy: 3, cpu_us: 4, memory_bytes: 5, direct: true }),
            Message::Standing(Standing::Drained),
            Message::Abort(ExitClass::Disk, "gone".into()),
        ]
    }

    fn round_trip(bytes: &[u8]) -> Message {
        let (kind, length) = Message::header(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(length, bytes.len() - HEADER_BYTES);
        Message::decode(kind, &bytes[HEADER_BYTES..]).unwrap()
    }

    #[test]
    fn every_message_survives_the_wire() {
        for message in samples() {
            let back = round_trip(&message.encode());
            assert_eq!(format!("{message:?}"), format!("{back:?}"));
            assert_eq!(message.encode(), back.encode(), "{}", message.name());
        }
    }

    #[test]
    fn a_body_cut_or_stretched_is_an_error() {
        for message in samples().into_iter().filter(|m| !matches!(m, Message::State(_))) {
            let bytes = message.encode();
            let (kind, _) = Message::header(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap();
            let body = &bytes[HEADER_BYTES..];
            assert!(Message::decode(kind, &[body, &[0]].concat()).is_err(), "{} stretched", message.name());
            if !body.is_empty() {
                assert!(Message::decode(kind, &body[..body.len() - 1]).is_err(), "{} cut", message.name());
            }
        }
    }

    #[test]
    fn an_overlong_reason_is_cut_at_a_character() {
        let Message::Abort(_, reason) =
            round_trip(&Message::Abort(ExitClass::Disk, "ä".repeat(4000)).encode())
        else {
            panic!("not an abort")
        };
        assert!(reason.ends_with("...") && reason.len() <= 2048);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_cleanly(kind in 0u16..70, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(message) = Message::decode(kind, &body) {
                prop_assert_eq!(round_trip(&message.encode()).encode(), message.encode());
            }
        }
    }
}
