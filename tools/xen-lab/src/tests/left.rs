//! What an attempt may leave behind: processes, domains half gone or half come, log-dirty mode, pages that are paged out,
//! claimed memory, ports somebody listens at. A test that looks for them and finds none says so for both hosts.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::lab::Lab;
use crate::moves::{Helper, PORT};
use crate::wait;

/// Ports of dom0's own that somebody may listen at: the lab's agent, libvirt's daemon, and where migrations come in.
const PORTS: [u16; 3] = [7, 16509, PORT];

/// An error, with what it is, unless nothing of what `helper` did is left on either host within a while.
pub(super) fn nothing(lab: &Lab, helper: Helper) -> Result<()> {
    (1..=2).try_for_each(|number| nothing_on(lab.host(number), helper))
}

/// The same for one host.
pub(super) fn nothing_on(host: &Host, helper: Helper) -> Result<()> {
    wait::until("nothing to be left behind", wait::limit(40), Duration::from_secs(1), || {
        let mut left = find(host)?;
        if helper == Helper::Stock {
            // Stock's helper dies of SIGPIPE when the carrier has gone, and leaves the guest in log-dirty mode.
            left.retain(|line| !line.contains("log_dirty"));
        }
        Ok(if left.is_empty() { Ok(()) } else { Err(left.join("; ")) })
    })
    .with_context(|| format!("host {}", host.number()))
}

fn find(host: &Host) -> Result<Vec<String>> {
    let ports = PORTS.map(|port| port.to_string()).join("|");
    // The bracket keeps the shell that looks from finding itself. Xen tells of every domain on the debug key q. Claims are told in
    // MiB.
    let said = host.run(&format!(
        "pgrep -af 'save-helpe[r]'; xl list | grep -E '\\(null\\)|--incoming|--migratedaway'; \
         xl dmesg -c > /dev/null; xl debug-keys q; xl dmesg -c | grep -E 'log_dirty|paged_pages=[1-9]'; \
         xl info | grep -E '^outstanding_claims *: *[1-9]'; \
         ss -Hltn | awk '{{ print \"somebody listens at\", $4 }}' | grep -vE ':({ports})$'; true"
    ))?;
    Ok(said.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}
