//! What a guest's process keeps for an engine that goes on with its outstanding pages when the one that brought it was lost: how the
//! source reaches this host, and what both show each other then.
//!
//! It is as secret as the migration's session, and as short-lived: it is in memory files alone, of the engine's making and in the
//! guest's keeping, and the guest drops it as soon as no page is held back.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::guest::Session;
use crate::wire::hello::{MigrationId, Secret};

/// How the source reaches an engine.
#[derive(Clone)]
pub struct Way {
    /// The address it listens on, as a host and a port.
    pub listen: String,
    /// The key pair it shows ([`crate::net::tls::Identity::pair`]); `None` where connections are in the clear.
    pub pair: Option<Zeroizing<Vec<u8>>>,
}

/// What is kept.
pub struct Keepsake {
    /// The migration.
    pub migration: MigrationId,
    /// What the source shows when it comes in again.
    pub secret: Secret,
    /// Lanes it comes with.
    pub lanes: u8,
    /// How it comes.
    pub way: Way,
}

/// The same as text.
#[derive(Serialize, Deserialize)]
struct Written {
    migration: String,
    secret: String,
    lanes: u8,
    listen: String,
    pair: Option<Vec<u8>>,
}

impl Drop for Written {
    fn drop(&mut self) {
        self.secret.zeroize();
        self.pair.zeroize();
    }
}

impl Keepsake {
    /// As bytes.
    #[must_use]
    pub fn encode(session: &Session<'_>, way: &Way) -> Zeroizing<Vec<u8>> {
        let written = Written {
            migration: session.migration.to_string(),
            secret: session.secret.to_hex().to_string(),
            lanes: session.lanes,
            listen: way.listen.clone(),
            pair: way.pair.as_ref().map(|pair| pair.to_vec()),
        };
        Zeroizing::new(serde_json::to_vec(&written).expect("words and numbers can be written"))
    }

    /// From [`Self::encode`]'s bytes.
    ///
    /// # Errors
    /// They are something else: a sentence.
    pub fn decode(bytes: Vec<u8>) -> Result<Self, String> {
        let bytes = Zeroizing::new(bytes);
        let wrong = "what the guest kept for another engine can't be read. Is the guest of this version of pageferry?";
        let mut written: Written =
            serde_json::from_slice(&bytes).map_err(|error| format!("{wrong} ({error})"))?;
        Ok(Self {
            migration: written.migration.parse()?,
            secret: Secret::from_hex(&written.secret).ok_or(wrong)?,
            lanes: written.lanes,
            way: Way { listen: written.listen.clone(), pair: written.pair.take().map(Zeroizing::new) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        let secret = Secret::of(&[7; 32]);
        let session = Session { migration: MigrationId([3; 16]), secret: &secret, lanes: 4 };
        for pair in [None, Some(Zeroizing::new(vec![1, 2, 3]))] {
            let way = Way { listen: "10.0.0.1:7700".to_owned(), pair: pair.clone() };
            let back = Keepsake::decode(Keepsake::encode(&session, &way).to_vec()).unwrap();
            assert!(back.secret.same(&secret));
            assert_eq!((back.migration, back.lanes), (session.migration, 4));
            assert_eq!((back.way.listen.as_str(), back.way.pair), ("10.0.0.1:7700", pair));
        }
        assert!(Keepsake::decode(b"{}".to_vec()).is_err_and(|why| why.contains("can't be read")));
    }
}
