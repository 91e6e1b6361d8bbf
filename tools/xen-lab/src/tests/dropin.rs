//! Tests of the drop-in: our helper in `libxl-save-helper`'s place at one end or both, under the real `xl`.

use anyhow::{Context, Result};

use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Guest, Kind};
use crate::lab::Lab;
use crate::moves::{self, Helper, Migration};
use crate::wait;

/// Where guests are saved to.
const FILE: &str = "/root/saved";

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |what: String, tier: Tier, body: Body| {
        tests.push(Test::new(pair, &format!("drop-in/{what}"), tier, Needs::Helper, body));
    };
    for kind in Kind::ALL {
        add(
            format!("save-{kind}-then-stock-restores"),
            Tier::Ci,
            Box::new(move |lab| saved_by_us(lab, kind)),
        );
        add(
            format!("stock-saves-then-restore-{kind}"),
            Tier::Ci,
            Box::new(move |lab| restored_by_us(lab, kind)),
        );
    }
    for kind in Kind::ALL.into_iter().filter(|kind| pair.migrates_live(*kind)) {
        for (source, target, tier) in [
            (Helper::Ours, Helper::Ours, Tier::Ci),
            (Helper::Ours, Helper::Stock, if kind == Kind::Hvm { Tier::Full } else { Tier::Ci }),
            (Helper::Stock, Helper::Ours, if kind == Kind::Hvm { Tier::Full } else { Tier::Ci }),
        ] {
            let body = move |lab: &Lab| migrated(lab, kind, source, target);
            add(format!("migrate-{kind}-{source}-to-{target}"), tier, Box::new(body));
        }
        if kind != Kind::Hvm {
            let tier = if kind == Kind::Pvh { Tier::Ci } else { Tier::Full };
            add(format!("ten-migrations-{kind}"), tier, Box::new(move |lab| back_and_forth(lab, kind, 10)));
        }
    }
    add("migrate-pvh-verified".into(), Tier::Ci, Box::new(verified));
    for helper in [Helper::Ours, Helper::Stock] {
        let body = move |lab: &Lab| large(lab, helper);
        add(format!("migrate-1g-2-vcpus-ours-to-{helper}"), Tier::Full, Box::new(body));
    }
    tests
}

/// Ours saves; xen-utils' own checker of streams accepts the file; stock restores.
fn saved_by_us(lab: &Lab, kind: Kind) -> Result<()> {
    let host = lab.host(1);
    let guest = Guest::small(kind);
    let before = guest.create(host)?;
    moves::save(&guest, host, FILE, Helper::Ours)?;
    let checked = host.run_within(&format!("verify-stream-v2 -f xl -i {FILE}"), wait::limit(300));
    checked.context("xen-utils' verify-stream-v2 does not accept what we saved")?;
    let after = moves::restore(&guest, host, FILE, before, Helper::Stock)?;
    guest.verifies_all(host, after)?;
    guest.destroy(host)
}

/// Stock saves, ours restores.
fn restored_by_us(lab: &Lab, kind: Kind) -> Result<()> {
    let host = lab.host(1);
    let guest = Guest::small(kind);
    let before = guest.create(host)?;
    moves::save(&guest, host, FILE, Helper::Stock)?;
    let after = moves::restore(&guest, host, FILE, before, Helper::Ours)?;
    guest.verifies_all(host, after)?;
    guest.destroy(host)
}

/// One live migration of a guest that rewrites pages meanwhile.
fn migrated(lab: &Lab, kind: Kind, source: Helper, target: Helper) -> Result<()> {
    let guest = Guest { vcpus: 2, ..Guest::small(kind) };
    let before = guest.create(lab.host(1))?;
    let after = lab.migrate(&guest, 1, before, &Migration::new(source, target))?;
    guest.verifies_all(lab.host(2), after)?;
    left::nothing(lab, source)?;
    guest.destroy(lab.host(2))
}

/// Back and forth, ours at both ends, a busy guest.
fn back_and_forth(lab: &Lab, kind: Kind, times: usize) -> Result<()> {
    let guest = Guest { vcpus: 2, checked_mib: 32, dirty_per_second: 1000, ..Guest::small(kind) };
    let mut count = guest.create(lab.host(1))?;
    let migration = Migration::new(Helper::Ours, Helper::Ours);
    let mut from = 1;
    for time in 1..=times {
        count = lab
            .migrate(&guest, from, count, &migration)
            .with_context(|| format!("migration {time} of {times}"))?;
        left::nothing_on(lab.host(from), Helper::Ours)?;
        from = 3 - from;
    }
    guest.verifies_all(lab.host(from), count)?;
    guest.destroy(lab.host(from))
}

/// With the pass that compares the target's pages with the source's.
fn verified(lab: &Lab) -> Result<()> {
    let guest = Guest::small(Kind::Pvh);
    let before = guest.create(lab.host(1))?;
    let migration = Migration { verify: true, ..Migration::new(Helper::Ours, Helper::Ours) };
    let after = lab.migrate(&guest, 1, before, &migration)?;
    guest.verifies_all(lab.host(2), after)?;
    guest.destroy(lab.host(2))
}

/// A guest of 1 GiB with two processors, most of it used.
fn large(lab: &Lab, target: Helper) -> Result<()> {
    let guest =
        Guest { memory_mib: 1024, vcpus: 2, checked_mib: 512, files_mib: 256, ..Guest::small(Kind::Pvh) };
    let before = guest.create(lab.host(1))?;
    let mut migration = Migration::new(Helper::Ours, target);
    migration.limit = wait::limit(900);
    let after = lab.migrate(&guest, 1, before, &migration)?;
    guest.verifies_all(lab.host(2), after)?;
    guest.destroy(lab.host(2))
}
