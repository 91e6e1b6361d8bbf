//! What a source needs to be let in, in one word: the one-time token, and the fingerprint of the key that the target
//! will show in TLS. One is made for every migration, so there is nothing to configure and nothing to keep.
//!
//! ```text
//!   TOKEN-FINGERPRINT     64 and 64 hexadecimal digits: TLS, the target's key is the one with this SHA-256
//!   TOKEN                 64 hexadecimal digits: in the clear
//! ```
//! Whatever carries it to the other host (a person's paste, an orchestrator, an offer record in a stream of Xen's) has
//! to keep it secret, and whoever can change it can be the target: it is worth what the way it took is worth.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::wire::hello::{Secret, parse_hex};

/// SHA-256 of a public key's SubjectPublicKeyInfo (RFC 5280, section 4.1; RFC 7250), which names the key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of that SubjectPublicKeyInfo, in DER.
    #[must_use]
    pub fn of(key: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, key).as_ref());
        Self(out)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        parse_hex(text)
            .map(Self)
            .ok_or_else(|| "that is not a fingerprint (64 hexadecimal digits)".to_owned())
    }
}

/// Longest word: the digits of a token and of a fingerprint, with a hyphen between them.
pub const WORD_BYTES_MAX: usize = 4 * Secret::BYTES + 1;

/// A token and what it is good at. Printing it with `{:?}` does not tell the token; [`Pass::to_word`] does.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Shown once, on the control connection.
    pub token: Secret,
    /// The key of the target that may see it; `None` where connections are in the clear.
    pub fingerprint: Option<Fingerprint>,
}

impl Pass {
    /// As a user passes it from one shell to the other.
    #[must_use]
    pub fn to_word(&self) -> Zeroizing<String> {
        let Some(fingerprint) = &self.fingerprint else { return self.token.to_hex() };
        // Made as long as it gets: what a String leaves where it grew out of its place, nobody overwrites.
        let mut word = Zeroizing::new(String::with_capacity(WORD_BYTES_MAX));
        word.push_str(&self.token.to_hex());
        word.push('-');
        word.push_str(&fingerprint.to_string());
        word
    }
}

impl FromStr for Pass {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let wrong = "that is not a token: it has 64 hexadecimal digits, and behind a hyphen 64 more, as the target \
                     that waits printed them";
        let (token, fingerprint) = match word.split_once('-') {
            Some((token, print)) => (token, Some(print.parse().map_err(|_| wrong)?)),
            None => (word, None),
        };
        Ok(Self { token: Secret::from_hex(token).ok_or(wrong)?, fingerprint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_survives_the_user() {
        let token = Secret::of(&[0xa5; 32]);
        for fingerprint in [None, Some(Fingerprint([0x1f; 32]))] {
            let pass = Pass { token: token.clone(), fingerprint };
            let back: Pass = pass.to_word().parse().unwrap();
            assert!(back.token.same(&token));
            assert_eq!(back.fingerprint, fingerprint);
            assert!(!format!("{pass:?}").contains("a5a5"), "a token is not for logs");
        }
        for wrong in ["", "-", "a5", &format!("{}-", *token.to_hex()), &"a5".repeat(64)] {
            assert!(wrong.parse::<Pass>().is_err(), "{wrong}");
        }
    }
}
