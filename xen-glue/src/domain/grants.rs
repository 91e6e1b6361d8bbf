//! The two grants every guest is born with: its console's page and xenstore's.
#![forbid(unsafe_code)]

use super::common::{Domain, LOG};
use super::{DomainError, Frames, Wiring};
use crate::abi::{DomainId, GrantEntry, Resource};

/// Puts them into the domain's grant table.
pub(super) fn seed(domain: &Domain, frames: Frames, wiring: &Wiring) -> Result<(), DomainError> {
    let fail = DomainError::call("seed the grant table", domain.id, LOG);
    let mut table = Resource::grant_table(&domain.xen, domain.id, 1).map_err(fail)?;
    let seeds = [
        (GrantEntry::CONSOLE, wiring.console_domain, frames.console),
        (GrantEntry::STORE, wiring.store_domain, frames.store),
    ];
    for (at, peer, frame) in seeds {
        if let Some(entry) = entry(domain.id, peer, frame)? {
            table.set_grant(at, entry);
        }
    }
    Ok(())
}

/// The frames that a domain lets others map now.
pub(super) fn granted(domain: &mut Domain) -> Result<Vec<u64>, DomainError> {
    let fail = || DomainError::call("read the grant table", domain.id, LOG);
    match domain.xen.grant_table(domain.id).map_err(fail())? {
        (0, _) => Ok(Vec::new()),
        (frames, version) => {
            let table = Resource::grant_table(&domain.xen, domain.id, frames).map_err(fail())?;
            Ok(table.granted(version))
        }
    }
}

/// The entry that lets `peer` map `frame`; none where there is no such page or the peer is the guest itself.
fn entry(domain: DomainId, peer: DomainId, frame: u64) -> Result<Option<GrantEntry>, DomainError> {
    if peer == domain || frame == 0 || frame == u64::MAX {
        return Ok(None);
    }
    let frame = u32::try_from(frame).map_err(|_| DomainError::Stream {
        what: format!("frame {frame:#x} of a console or xenstore page is past what a grant can name"),
    })?;
    Ok(Some(GrantEntry { flags: GrantEntry::PERMIT_ACCESS, domain: peer.0, frame }))
}
