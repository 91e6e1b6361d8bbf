//! Tests of the drop-in: our helper in `libxl-save-helper`'s place at one end or both, under the real `xl`.

use anyhow::{Context, Result, bail};

use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Guest, Kind};
use crate::host::Host;
use crate::lab::Lab;
use crate::moves::{self, Helper, Migration, OURS};
use crate::wait;

/// Where guests are saved to.
const FILE: &str = "/root/saved";
/// Whose helpers a guest migrates between, source and target.
const WAYS: [(Helper, Helper); 3] =
    [(Helper::Ours, Helper::Ours), (Helper::Ours, Helper::Stock), (Helper::Stock, Helper::Ours)];

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |what: String, tier: Tier, body: Body| {
        tests.push(Test::new(pair, &format!("drop-in/{what}"), tier, Needs::Helper, body));
    };
    for kind in Kind::ALL.into_iter().filter(|_| pair.goes_back()) {
        // An HVM guest takes minutes to boot under emulation.
        let tier = if kind == Kind::Hvm { Tier::Full } else { Tier::Ci };
        let live = pair.migrates_live(kind);
        add(format!("tour-{kind}"), tier, Box::new(move |lab| tour(lab, kind, live)));
    }
    for kind in Kind::ALL {
        add(
            format!("save-{kind}-then-stock-restores"),
            Tier::All,
            Box::new(move |lab| saved_by_us(lab, kind)),
        );
        add(
            format!("stock-saves-then-restore-{kind}"),
            Tier::All,
            Box::new(move |lab| restored_by_us(lab, kind)),
        );
    }
    for kind in Kind::ALL.into_iter().filter(|kind| pair.migrates_live(*kind)) {
        for (source, target) in WAYS {
            let body = move |lab: &Lab| migrated(lab, kind, source, target);
            let tier = if pair.goes_back() { Tier::All } else { Tier::Full };
            add(format!("migrate-{kind}-{source}-to-{target}"), tier, Box::new(body));
        }
    }
    if !pair.is_broad() {
        return tests;
    }
    add("file-ends-early".into(), Tier::Ci, Box::new(file_ends_early));
    for kind in [Kind::Pvh, Kind::Pv] {
        let body = move |lab: &Lab| back_and_forth(lab, kind, 10);
        add(format!("ten-migrations-{kind}"), Tier::Full, Box::new(body));
    }
    add("migrate-pvh-verified".into(), Tier::Full, Box::new(|lab| verified(lab, Helper::Ours)));
    for helper in [Helper::Ours, Helper::Stock] {
        let body = move |lab: &Lab| large(lab, helper);
        let tier = if helper == Helper::Ours { Tier::Full } else { Tier::All };
        add(format!("migrate-1g-2-vcpus-ours-to-{helper}"), tier, Box::new(body));
    }
    tests
}

/// One guest all the ways there are: it boots once, and whatever goes wrong with its memory on the way its checker never
/// forgets. What the single tests below do one by one, in a third of the time. It goes from host to host where it can live.
fn tour(lab: &Lab, kind: Kind, live: bool) -> Result<()> {
    let guest = Guest { vcpus: 2, ..Guest::small(kind) };
    let mut count = guest.create(lab.host(1))?;
    moves::save(&guest, lab.host(1), FILE, Helper::Ours)?;
    accepted(lab.host(1))?;
    count = moves::restore(&guest, lab.host(1), FILE, count, Helper::Stock)?;
    moves::save(&guest, lab.host(1), FILE, Helper::Stock)?;
    count = moves::restore(&guest, lab.host(1), FILE, count, Helper::Ours)?;
    let mut from = 1;
    for (source, target) in WAYS.into_iter().filter(|_| live) {
        let way = || format!("{source} to {target}");
        count = lab.migrate(&guest, from, count, &Migration::new(source, target)).with_context(way)?;
        left::nothing(lab, source).with_context(way)?;
        from = 3 - from;
    }
    left::nothing(lab, Helper::Ours)?;
    guest.verifies_all(lab.host(from), count)?;
    guest.destroy(lab.host(from))
}

/// A file of ours that ends too early gives no guest, but a sentence; the whole one still does.
fn file_ends_early(lab: &Lab) -> Result<()> {
    let host = lab.host(1);
    let guest = Guest::small(Kind::Pvh);
    let before = guest.create(host)?;
    moves::save(&guest, host, FILE, Helper::Ours)?;
    // Among the pages; and in what comes behind them. (libxl itself does not miss the last record of its own.)
    for keep in ["$((size / 2))", "$((size - 6000))"] {
        let cut = format!("size=$(stat -c %s {FILE}); head -c {keep} {FILE} > {FILE}.cut");
        host.run(&cut)?;
        let restore = format!("LIBXL_SAVE_HELPER={OURS} xl restore {FILE}.cut");
        let said = wait::timed("half a file is restored", || host.attempt(&restore, wait::limit(120)))?;
        if said.code == 0 || said.err.is_empty() {
            bail!("{keep} bytes of the file should be refused with a reason:\n{}", said.text());
        }
        left::nothing_on(host, Helper::Ours)?;
        if let Some(domain) = guest.domain(host)? {
            bail!("domain {domain} came out of {keep} bytes of the file:\n{}", said.text());
        }
    }
    let after = moves::restore(&guest, host, FILE, before, Helper::Ours)?;
    guest.verifies_all(host, after)?;
    guest.destroy(host)
}

/// xen-utils' own checker of streams accepts what was saved.
fn accepted(host: &Host) -> Result<()> {
    let command = format!("verify-stream-v2 -f xl -i {FILE}");
    let checked = wait::timed("verify-stream-v2 reads it", || host.run_within(&command, wait::limit(300)));
    checked.map(drop).context("xen-utils' verify-stream-v2 does not accept what we saved")
}

/// Ours saves; xen-utils' own checker of streams accepts the file; stock restores.
fn saved_by_us(lab: &Lab, kind: Kind) -> Result<()> {
    let host = lab.host(1);
    let guest = Guest::small(kind);
    let before = guest.create(host)?;
    moves::save(&guest, host, FILE, Helper::Ours)?;
    accepted(host)?;
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

/// With the pass that compares the target's pages with the source's. Of a guest without a disk: what a backend writes
/// through a grant that it keeps mapped is in no log of written pages. (Nor need it be: the guest has copied it by then, or
/// asks for it again when it resumes.) With a disk one such page differs, under stock as under ours.
pub(super) fn verified(lab: &Lab, helper: Helper) -> Result<()> {
    let guest = Guest { disk: None, ..Guest::small(Kind::Pvh) };
    let before = guest.create(lab.host(1))?;
    let migration = Migration { verify: true, ..Migration::new(helper, helper) };
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
