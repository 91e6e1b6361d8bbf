//! Saves a domain into a stream, while it runs if wanted.
//!
//! ```text
//! prepare -> static state -> rounds -> suspend -> last pages -> (references) -> final state -> end
//!                            (live only)                \-> verify (if asked for) -^
//! ```
//!
//! With a [`Plan`](crate::ferry::Plan), and a target that takes up the offer, page contents go another way from some record on; then
//! the engine's rounds stand in the place of ours. With [`Frozen`] disks a guest saved into a file leaves pages on them.
//!
//! Whatever happens, the log of written pages is off and nothing is mapped afterwards. Until the guest has suspended
//! itself a failure leaves it running; from then on it is the toolstack's to resume or destroy.
#![forbid(unsafe_code)]

mod error;
mod ferry;
mod frozen;
#[cfg(test)]
mod frozen_tests;
mod options;
mod phases;
mod records;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use error::SaveError;
pub use frozen::{Frozen, LeftOut};
pub use options::{Event, Observation, Options, Phase, Policy, Summary, Toolstack, Verdict};

use crate::abi::DomainId;
use crate::domain::{Domain, HvmSource, PvSource, Source};

/// How often to look whether a domain is whole.
const GLANCE: Duration = Duration::from_millis(100);

/// Saves domain `id` into the stream `to`, until it is done or `stop` is set. A call that waits on the stream sees
/// `stop` when a signal interrupts it.
///
/// # Errors
/// It could not be saved; see [`SaveError`].
pub fn domain(
    id: DomainId,
    to: BorrowedFd<'_>,
    options: &Options,
    toolstack: &mut impl Toolstack,
    stop: &AtomicBool,
) -> Result<Summary, SaveError> {
    let mut domain = Domain::open(id)?;
    wait_whole(&mut domain, toolstack, stop)?;
    if domain.is_hvm() {
        run(HvmSource::new(domain)?, to, options, toolstack, stop)
    } else {
        run(PvSource::new(domain)?, to, options, toolstack, stop)
    }
}

/// Waits until no page of a domain that has restarted early is outstanding: to a save such a page has no contents.
fn wait_whole(
    domain: &mut Domain,
    toolstack: &mut impl Toolstack,
    stop: &AtomicBool,
) -> Result<(), SaveError> {
    let mut told = false;
    loop {
        let left = domain.info()?.paged_pages;
        if left == 0 {
            return Ok(());
        }
        if stop.load(Ordering::Relaxed) {
            return Err(SaveError::Cancelled);
        }
        if !std::mem::replace(&mut told, true) {
            let text = format!(
                "{left} pages of the guest are still on their way from the host it came from; it is saved when they are here \
                 (`pageferry status`)"
            );
            toolstack.report(&Event::Note(&text));
        }
        std::thread::sleep(GLANCE);
    }
}

/// Saves `source`, as [`domain`] does a domain.
///
/// # Errors
/// It could not be saved; see [`SaveError`].
pub fn run(
    source: impl Source,
    to: BorrowedFd<'_>,
    options: &Options,
    toolstack: &mut impl Toolstack,
    stop: &AtomicBool,
) -> Result<Summary, SaveError> {
    phases::Save::new(source, to, options, toolstack, stop).run()
}
