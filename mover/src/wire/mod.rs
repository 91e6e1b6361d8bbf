//! What crosses the wire. `docs/PROTOCOL.md` has the whole story; the layouts are here.
//!
//! ```text
//!   source                                   target
//!     | -- control: Hello(token) ------------> |     a connection says one Hello of 64 bytes, and
//!     | <------------- Welcome(secret) ------- |     gets one Welcome of 64 bytes back
//!     | -- Shape ----------------------------> |
//!     | <------------------------- Accept ---- |
//!     | == lane 1..n: Hello(secret) =========> |
//!     | == Data, Zero, References, Barrier ==> |     lanes: frames, source to target only
//!     | <------- Feedback, Refetch, Placed --- |     control: messages, both ways
//!     | -- Final, State ---------------------> |
//!     | <-------------------------- Ready ---- |
//!     | -- Commit ---------------------------> |
//!     | <------------------------ Started ---- |
//!     | <-------- Refetch, .. , Drained ------ |
//!     | -- Finished -------------------------> |
//! ```
//!
//! All integers are little-endian. Every length is held against [`crate::limits`] before anything is read or
//! allocated for it. Version rule: an end speaks its newest version and the one before; the connection runs on the
//! highest both speak; a field's meaning never changes within a version.
#![forbid(unsafe_code)]

pub mod control;
pub mod frame;
pub mod hello;
pub mod knock;

use crate::error::WireError;

/// The newest protocol version spoken here.
pub const VERSION_NEWEST: u16 = 1;
/// The oldest protocol version understood here.
pub const VERSION_OLDEST: u16 = 1;

/// Holds a length from the wire against its limit.
fn within(what: &'static str, found: u64, limit: usize) -> Result<usize, WireError> {
    match usize::try_from(found) {
        Ok(n) if n <= limit => Ok(n),
        _ => Err(WireError::TooLong { what, found, limit: crate::units::u64_of(limit) }),
    }
}
