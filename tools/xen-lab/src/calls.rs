//! How often a migration asks Xen: the helpers of both ends run once under strace, which writes down what they ask of
//! `/dev/xen/privcmd`. It slows them, so nobody times that migration.

use anyhow::{Context, Result, bail};

use crate::guest::{Count, Guest};
use crate::lab::Lab;
use crate::moves::{Helper, Migration, OURS};
use crate::wait;

/// Runs a helper under strace.
const WRAPPER: &str = "/run/lab/counting-helper";
/// What strace has written, a file a process.
const TRACES: &str = "/run/lab/calls";
/// As strace prints requests of privcmd's that it has no name for (include/uapi/xen/privcmd.h of Linux): hypercalls; and
/// mappings of a batch of frames, in both versions.
const HYPERCALL: &str = "0x50, 0, ";
const MAP_BATCH: &str = "0x50, 0x[34], ";

/// What one migration asked of Xen, both ends together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Calls {
    /// Hypercalls of the helpers' own: not those the kernel makes for them.
    pub(crate) hypercalls: u64,
    /// Batches of frames mapped.
    pub(crate) batches: u64,
}

/// Migrates `guest` from host `from`, with `helper` and this environment at both ends, and counts.
pub(crate) fn count(
    lab: &Lab,
    guest: &Guest,
    from: usize,
    before: Count,
    helper: Helper,
    environment: &str,
) -> Result<(Calls, Count)> {
    for number in 1..=2 {
        put_wrapper(lab, number, helper)?;
    }
    let migration = Migration {
        environment: format!("LIBXL_SAVE_HELPER={WRAPPER} {environment}"),
        limit: wait::limit(1800),
        // The environment names the helper.
        ..Migration::new(Helper::Stock, Helper::Stock)
    };
    let after = lab.migrate(guest, from, before, &migration)?;
    let mut calls = Calls { hypercalls: 0, batches: 0 };
    for number in 1..=2 {
        let counted = |what: &str| -> Result<u64> {
            let said = lab.host(number).run(&format!("cat {TRACES}/* | grep -cE '{what}'; true"))?;
            said.trim().parse().with_context(|| format!("grep counts {said:?}"))
        };
        let (hypercalls, batches) = (counted(HYPERCALL)?, counted(MAP_BATCH)?);
        if hypercalls == 0 || batches == 0 {
            bail!("host {number}: strace saw {hypercalls} hypercalls and {batches} batches: it sees nothing");
        }
        calls.hypercalls += hypercalls;
        calls.batches += batches;
    }
    Ok((calls, after))
}

fn put_wrapper(lab: &Lab, number: usize, helper: Helper) -> Result<()> {
    let program = match helper {
        Helper::Ours => OURS,
        Helper::Stock => "/usr/lib/xen-4.*/bin/libxl-save-helper",
        Helper::Library => bail!("the library's calls are not counted"),
    };
    let script = format!(
        "#!/bin/sh\nexec strace -ff -qq --seccomp-bpf -e trace=ioctl -e signal=none -o {TRACES}/of {program} \"$@\"\n"
    );
    let host = lab.host(number);
    host.put(WRAPPER, script.as_bytes())?;
    host.run(&format!("chmod +x {WRAPPER}; rm -rf {TRACES}; mkdir {TRACES}")).map(drop)
}
