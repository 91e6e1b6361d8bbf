//! The first 64 bytes each way on every connection. Nothing else is read, and nothing is kept, before they hold.

use std::ops::{Deref, DerefMut};

use subtle::ConstantTimeEq as _;
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::WireError;
use crate::wire::{VERSION_NEWEST, VERSION_OLDEST};

/// First bytes of both.
pub const MAGIC: [u8; 4] = *b"PGFY";
/// Length of both.
pub const HELLO_BYTES: usize = 64;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// The control connection of a new migration; the secret is the one-time token.
    Control,
    /// A lane of a running one; the secret is the session's.
    Lane(u8),
    /// The control connection again, after a cut behind the commit; the secret is the session's.
    Resume,
}

/// A migration's id: random, names its journal on both ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct MigrationId(pub [u8; 16]);

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::str::FromStr for MigrationId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        parse_hex(text)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a migration id (32 hexadecimal digits)"))
    }
}

/// A one-time token or a session's secret. Overwritten when it is dropped, and it stands on the heap: when it is moved, its
/// address is, and no copy of it stays behind in a stack's frame.
#[derive(Clone)]
pub struct Secret(Box<[u8; Secret::BYTES]>);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Secret {
    /// Its length.
    pub const BYTES: usize = 32;

    /// Of these bytes, which are the caller's to overwrite.
    #[must_use]
    pub fn of(bytes: &[u8; Self::BYTES]) -> Self {
        Self::made(|place| place.copy_from_slice(bytes))
    }
    /// What `fill` puts in its place.
    #[must_use]
    pub fn made(fill: impl FnOnce(&mut [u8])) -> Self {
        let mut made = Self(Box::new([0; Self::BYTES]));
        fill(&mut made.0[..]);
        made
    }
    /// What it is.
    #[must_use]
    pub fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
    /// Whether both are the same, in a time that does not tell where they differ.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0[..]).into()
    }
    /// As a user passes it from one shell to the other: 64 hexadecimal digits, which are overwritten when they are dropped.
    #[must_use]
    pub fn to_hex(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(2 * Self::BYTES));
        for byte in &self.0[..] {
            for digit in [byte >> 4, byte & 0xf] {
                text.push(char::from_digit(digit.into(), 16).expect("half a byte is a digit"));
            }
        }
        text
    }
    /// From what [`Self::to_hex`] wrote.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut right = false;
        let made = Self::made(|place| right = fill_from_hex(text, place));
        right.then_some(made)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    fill_from_hex(text, &mut out).then_some(out)
}

/// Fills `out` from just as many pairs of digits; whether `text` is that.
fn fill_from_hex(text: &str, out: &mut [u8]) -> bool {
    let digits = text.as_bytes();
    if digits.len() != 2 * out.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return false;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let parsed = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let Some(parsed) = parsed else { return false };
        *byte = parsed;
    }
    true
}

/// The dialler's first bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloLayout {
    magic: [u8; 4],
    newest: U16,
    oldest: U16,
    purpose: u8,
    lane: u8,
    reserved: [u8; 6],
    migration: [u8; 16],
    secret: [u8; 32],
}
const _: () = assert!(size_of::<HelloLayout>() == HELLO_BYTES);

/// The answer.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WelcomeLayout {
    magic: [u8; 4],
    version: U16,
    oldest: U16,
    verdict: u8,
    reserved: [u8; 23],
    secret: [u8; 32],
}
const _: () = assert!(size_of::<WelcomeLayout>() == HELLO_BYTES);

/// A Hello's bytes, as they came: with a secret in them, so that they stand on the heap and are overwritten when they are dropped.
pub struct HelloBytes(Box<Zeroizing<[u8; HELLO_BYTES]>>);

impl HelloBytes {
    /// Room for one.
    #[must_use]
    pub fn zeroed() -> Self {
        Self(Box::new(Zeroizing::new([0; HELLO_BYTES])))
    }
}

impl Deref for HelloBytes {
    type Target = [u8; HELLO_BYTES];
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for HelloBytes {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// The dialler's first words.
#[derive(Clone, Debug)]
pub struct Hello {
    /// Newest version it speaks.
    pub newest: u16,
    /// Oldest version it speaks.
    pub oldest: u16,
    /// What it wants.
    pub purpose: Purpose,
    /// Which migration.
    pub migration: MigrationId,
    /// Its right to it.
    pub secret: Secret,
}

impl Hello {
    /// For this end's versions.
    #[must_use]
    pub fn new(purpose: Purpose, migration: MigrationId, secret: Secret) -> Self {
        Self { newest: VERSION_NEWEST, oldest: VERSION_OLDEST, purpose, migration, secret }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let (purpose, lane) = match self.purpose {
            Purpose::Control => (0, 0),
            Purpose::Lane(lane) => (1, lane),
            Purpose::Resume => (2, 0),
        };
        zerocopy::transmute!(HelloLayout {
            magic: MAGIC,
            newest: self.newest.into(),
            oldest: self.oldest.into(),
            purpose,
            lane,
            reserved: [0; 6],
            migration: self.migration.0,
            secret: *self.secret.bytes(),
        })
    }

    /// From bytes. Versions are not judged here: the answer names ours in any case.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        let layout: &HelloLayout = zerocopy::transmute_ref!(bytes);
        if layout.magic != MAGIC {
            return Err(WireError::NotPageferry { found: layout.magic });
        }
        let purpose = match layout.purpose {
            0 => Purpose::Control,
            1 => Purpose::Lane(layout.lane),
            2 => Purpose::Resume,
            n => return Err(WireError::Invalid { what: "the purpose of a connection", found: n.into() }),
        };
        Ok(Self {
            newest: layout.newest.get(),
            oldest: layout.oldest.get(),
            purpose,
            migration: MigrationId(layout.migration),
            secret: Secret::of(&layout.secret),
        })
    }

    /// The version both speak, if there is one.
    #[must_use]
    pub fn common_version(&self) -> Option<u16> {
        let version = self.newest.min(VERSION_NEWEST);
        (version >= self.oldest && version >= VERSION_OLDEST).then_some(version)
    }
}

/// What the acceptor thinks of a Hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Go on.
    Welcome,
    /// The token is wrong, used up or expired.
    WrongToken,
    /// Another migration is being received.
    Busy,
    /// No common version.
    Version,
    /// No such session, or not in this phase.
    NoSession,
}

/// The acceptor's answer.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// The version to speak; where there is none in common, the newest spoken there.
    pub version: u16,
    /// Oldest version spoken there.
    pub oldest: u16,
    /// Its verdict.
    pub verdict: Verdict,
    /// The session's secret, for lanes and for resuming; zero unless welcome on a control connection.
    pub secret: Secret,
}

impl Welcome {
    /// A refusal.
    #[must_use]
    pub fn refuse(verdict: Verdict) -> Self {
        Self { version: VERSION_NEWEST, oldest: VERSION_OLDEST, verdict, secret: Secret::of(&[0; 32]) }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let verdict = match self.verdict {
            Verdict::Welcome => 0,
            Verdict::WrongToken => 1,
            Verdict::Busy => 2,
            Verdict::Version => 3,
            Verdict::NoSession => 4,
        };
        zerocopy::transmute!(WelcomeLayout {
            magic: MAGIC,
            version: self.version.into(),
            oldest: self.oldest.into(),
            verdict,
            reserved: [0; 23],
            secret: *self.secret.bytes(),
        })
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        let layout: &WelcomeLayout = zerocopy::transmute_ref!(bytes);
        if layout.magic != MAGIC {
            return Err(WireError::NotPageferry { found: layout.magic });
        }
        let verdict = match layout.verdict {
            0 => Verdict::Welcome,
            1 => Verdict::WrongToken,
            2 => Verdict::Busy,
            3 => Verdict::Version,
            4 => Verdict::NoSession,
            n => return Err(WireError::Invalid { what: "the verdict on a connection", found: n.into() }),
        };
        let version = layout.version.get();
        if verdict == Verdict::Version || !(VERSION_OLDEST..=VERSION_NEWEST).contains(&version) {
            return Err(WireError::Version {
                theirs: version,
                oldest: VERSION_OLDEST,
                newest: VERSION_NEWEST,
            });
        }
        Ok(Self { version, oldest: layout.oldest.get(), verdict, secret: Secret::of(&layout.secret) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello::new(Purpose::Lane(3), MigrationId([7; 16]), Secret::of(&[9; 32]))
    }

    #[test]
    fn a_hello_survives_the_wire() {
        let back = Hello::decode(&hello().encode()).unwrap();
        assert_eq!(back.purpose, Purpose::Lane(3));
        assert_eq!(back.migration, MigrationId([7; 16]));
        assert!(back.secret.same(&Secret::of(&[9; 32])));
        assert!(!back.secret.same(&Secret::of(&[8; 32])));
    }

    #[test]
    fn garbage_is_named_as_such() {
        let mut bytes = hello().encode();
        bytes[..4].copy_from_slice(b"GET ");
        assert_eq!(Hello::decode(&bytes).unwrap_err(), WireError::NotPageferry { found: *b"GET " });
        let mut bytes = hello().encode();
        bytes[8] = 77;
        assert!(matches!(Hello::decode(&bytes), Err(WireError::Invalid { .. })));
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        let with = |newest, oldest| Hello { newest, oldest, ..hello() }.common_version();
        assert_eq!(with(VERSION_NEWEST, VERSION_OLDEST), Some(VERSION_NEWEST));
        assert_eq!(with(VERSION_NEWEST + 1, VERSION_NEWEST), Some(VERSION_NEWEST));
        assert_eq!(with(VERSION_NEWEST + 2, VERSION_NEWEST + 1), None);
        assert_eq!(with(VERSION_OLDEST - 1, 0), None);
    }

    #[test]
    fn a_token_survives_the_user() {
        let token = Secret::of(&[0xa5; 32]);
        assert!(Secret::from_hex(&token.to_hex()).unwrap().same(&token));
        assert!(Secret::from_hex("xyz").is_none());
        assert!(Secret::from_hex(&"é".repeat(32)).is_none());
        let id = MigrationId([0x1f; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
    }
}
