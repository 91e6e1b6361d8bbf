//! A process of ours that does not outlive what it is for.

#![forbid(unsafe_code)]

use std::process::Child;

/// A process. Dropping this ends it.
pub(crate) struct Owned(pub(crate) Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // Ended already: as good.
        let _ = self.0.kill();
        if let Err(error) = self.0.wait() {
            eprintln!("bench: process {} could not be waited for: {error}", self.0.id());
        }
    }
}
