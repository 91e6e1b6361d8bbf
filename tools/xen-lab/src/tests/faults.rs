//! What goes wrong on the way: the connection, the wire, the other end, the guest itself, the target. Before commit every
//! failure leaves the guest running on the source as if nothing had happened, and nothing on the target.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{Fault, Helper, Migration, Report, Spot};
use crate::wait;

/// Types of libxc's records (docs/specs/libxc-migration-stream of Xen).
const PAGE_DATA: u32 = 1;
const X86_TSC_INFO: u32 = 8;

/// Before any page; among the pages of the first pass; when the guest is suspended.
const EARLY: Spot = Spot::Type(PAGE_DATA);
const MIDDLE: Spot = Spot::Number(12);
const LATE: Spot = Spot::Type(X86_TSC_INFO);

/// What can happen to a migration so that it fails and the guest goes on where it is.
#[derive(Clone, Copy)]
enum Trouble {
    /// The stream is spoiled there.
    Stream(Spot, Fault),
    /// The wire is dead from the middle of the first pass on; the transport notices after a while.
    WireCut,
    /// While the stream is held, the process on this host whose command line is like that is killed.
    Killed(usize, &'static str),
}

const TROUBLES: [(&str, Trouble); 10] = [
    ("cut-early", Trouble::Stream(EARLY, Fault::Cut)),
    ("cut-middle", Trouble::Stream(MIDDLE, Fault::Cut)),
    ("cut-late", Trouble::Stream(LATE, Fault::Cut)),
    ("garbled-early", Trouble::Stream(EARLY, Fault::Garble)),
    ("garbled-middle", Trouble::Stream(MIDDLE, Fault::Garble)),
    ("garbled-late", Trouble::Stream(LATE, Fault::Garble)),
    ("wire-cut", Trouble::WireCut),
    ("receiver-killed", Trouble::Killed(2, "save-helper --restore-domai[n]")),
    ("sender-killed", Trouble::Killed(1, "save-helper --save-domai[n]")),
    // Ours alone has one, behind the helper that libxl knows.
    ("worker-killed", Trouble::Killed(1, "save-helper --worke[r]")),
];
/// Of those, the ones that the short tier has one by one.
const SHORT: [&str; 2] = ["cut-middle", "receiver-killed"];

/// The key that has a guest's kernel reboot (Documentation/admin-guide/sysrq.rst of Linux).
const REBOOT: char = 'b';

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    // With stock helpers too: it shows that the tests ask nothing of ours that Xen itself does not do.
    for (group, helper, needs) in
        [("stock", Helper::Stock, Needs::Nothing), ("drop-in", Helper::Ours, Needs::Helper)]
    {
        let mut add = |what: String, tier: Tier, body: Body| {
            let tier = if helper == Helper::Stock { Tier::All } else { tier };
            tests.push(Test::new(pair, &format!("{group}/{what}"), tier, needs, body));
        };
        for (what, trouble) in TROUBLES {
            if helper == Helper::Ours || what != "worker-killed" {
                let tier = if SHORT.contains(&what) { Tier::Ci } else { Tier::All };
                add(what.to_owned(), tier, Box::new(move |lab| strikes(lab, helper, &[(what, trouble)])));
            }
        }
        // A PV guest is powered off: a PVH one says `Power down` and spins, its domain never ends.
        for (what, kind, key) in
            [("crashes", Kind::Pvh, 'c'), ("reboots", Kind::Pvh, REBOOT), ("powers-off", Kind::Pv, 'o')]
        {
            let body = move |lab: &Lab| guest_ends(lab, helper, kind, key);
            add(format!("guest-{what}"), Tier::Full, Box::new(body));
        }
        if helper == Helper::Ours {
            add("cut-late-while-slowed-down".into(), Tier::Full, Box::new(slowed_down));
            add("every-trouble".into(), Tier::Full, Box::new(|lab| strikes(lab, Helper::Ours, &TROUBLES)));
        }
        add("guest-balloons".into(), Tier::Full, Box::new(move |lab| guest_balloons(lab, helper)));
        add("no-disk-at-target".into(), Tier::Full, Box::new(move |lab| no_disk(lab, helper)));
        add("no-memory-at-target".into(), Tier::Full, Box::new(move |lab| no_memory(lab, helper)));
    }
    tests
}

fn begin(lab: &Lab) -> Result<(Guest, Count)> {
    let guest = Guest::small(Kind::Pvh);
    let count = guest.create(lab.host(1))?;
    Ok((guest, count))
}

/// The migration failed with words, the guest goes on on host 1, every page of it right, and nothing is left of the attempt.
pub(super) fn goes_on(
    lab: &Lab,
    guest: &Guest,
    before: Count,
    helper: Helper,
    report: &Report,
) -> Result<Count> {
    if report.source.code == 0 {
        bail!("the migration should have failed, and xl says it did not:\n{}", report.text());
    }
    if report.source.err.is_empty() {
        bail!("xl does not say why the migration failed");
    }
    let after = guest.counts_on(lab.host(1), before);
    let after = after.with_context(|| format!("it should go on on the source:\n{}", report.text()))?;
    left::nothing(lab, helper).with_context(|| format!("of the migration was said:\n{}", report.text()))?;
    guest.verifies_all(lab.host(1), after)
}

/// One guest goes through these, one after the other, and goes on each time.
fn strikes(lab: &Lab, helper: Helper, troubles: &[(&str, Trouble)]) -> Result<()> {
    let (guest, mut count) = begin(lab)?;
    for (what, trouble) in troubles {
        let struck = trouble.strike(lab, &guest, helper);
        let gone_on = struck.and_then(|report| goes_on(lab, &guest, count, helper, &report));
        count = gone_on.with_context(|| format!("{what}, {helper}"))?;
    }
    guest.destroy(lab.host(1))
}

impl Trouble {
    /// Migrates `guest` from host 1, into this.
    fn strike(self, lab: &Lab, guest: &Guest, helper: Helper) -> Result<Report> {
        match self {
            Self::Stream(spot, fault) => {
                lab.try_migrate(guest, 1, &Migration::new(helper, helper).with_fault(spot, fault))
            }
            Self::WireCut => wire_cut(lab, guest, helper),
            Self::Killed(host, like) => {
                held(lab, guest, helper, || lab.host(host).run(&format!("pkill -9 -f '{like}'")).map(drop))
            }
        }
    }
}

/// A guest that writes faster than the wire carries is slowed down; after the failure it has all its processor time again.
fn slowed_down(lab: &Lab) -> Result<()> {
    let guest =
        Guest { memory_mib: 192, checked_mib: 64, dirty_per_second: 20_000, ..Guest::small(Kind::Pvh) };
    let created = guest.create(lab.host(1))?;
    // It rewrites pages only when all are filled.
    let before = guest.verifies_once(lab.host(1), created)?;
    let environment = "PAGEFERRY_THROTTLE=auto PAGEFERRY_MAX_DOWNTIME=60ms".to_owned();
    let migration = Migration { environment, ..Migration::new(Helper::Ours, Helper::Ours) };
    let report = lab.try_migrate(&guest, 1, &migration.with_fault(LATE, Fault::Cut))?;
    if !report.source.text().contains("slowed down to") {
        bail!("nothing shows that it was slowed down:\n{}", report.text());
    }
    // The heading, then name, number, weight, cap.
    let said = lab.host(1).run(&format!("xl sched-credit2 -d {} | awk 'END {{ print $4 }}'", guest.name))?;
    if said.trim() != "0" {
        bail!("its cap is {} %, not 0, after:\n{}", said.trim(), report.text());
    }
    goes_on(lab, &guest, before, Helper::Ours, &report)?;
    guest.destroy(lab.host(1))
}

/// Runs a migration that is held among the pages of the first pass while `meanwhile` happens, then released.
fn held(lab: &Lab, guest: &Guest, helper: Helper, meanwhile: impl FnOnce() -> Result<()>) -> Result<Report> {
    let migration = Migration::new(helper, helper).with_fault(MIDDLE, Fault::Hold);
    lab.hold_anew(1)?;
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.try_migrate(guest, 1, &migration));
        let happened = lab.wait_held(1).and_then(|()| meanwhile());
        let released = lab.release(1);
        let report = moving.join().map_err(|_| anyhow::anyhow!("the migration's thread died"))?;
        happened?;
        released?;
        report
    })
}

/// Runs a migration whose wire dies as soon as records have come.
fn wire_cut(lab: &Lab, guest: &Guest, helper: Helper) -> Result<Report> {
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.try_migrate(guest, 1, &Migration::new(helper, helper)));
        // The target's domain stands: records have come.
        let host = lab.host(2);
        let begun = wait::until("records to come", wait::limit(120), Duration::from_millis(300), || {
            let list = host.run("xl list")?;
            Ok(if list.contains("--incoming") { Ok(()) } else { Err(list) })
        });
        let cut = begun.and_then(|()| lab.set_wire(false));
        let report = moving.join().map_err(|_| anyhow::anyhow!("the migration's thread died"))?;
        lab.set_wire(true)?;
        cut.and(report)
    })
}

/// The guest ends meanwhile, by this key of its kernel's: xl says that it can't be migrated, and nothing arrives.
fn guest_ends(lab: &Lab, helper: Helper, kind: Kind, key: char) -> Result<()> {
    let guest = Guest::small(kind);
    guest.create(lab.host(1))?;
    let domain = guest.domain(lab.host(1))?;
    let end = || {
        guest.forget_counts(lab.host(1))?;
        lab.host(1).run(&format!("xl sysrq {} {key}", guest.name))?;
        wait::until("the guest to end", wait::limit(60), Duration::from_millis(500), || {
            let list = lab.host(1).run("xl list")?;
            let line = list.lines().find(|line| line.starts_with(&guest.name)).unwrap_or_default();
            let mut words = line.split_whitespace().skip(1);
            // One that reboots is another domain at once.
            let other = words.next().and_then(|id| id.parse().ok()) != domain;
            let ended = words.nth(2).is_none_or(|state| state.contains(['s', 'c']));
            Ok(if other || ended { Ok(()) } else { Err(line.to_owned()) })
        })
    };
    let report = held(lab, &guest, helper, end)?;
    if report.source.code == 0 || report.source.err.is_empty() {
        bail!("the guest had ended, and xl does not say that it can't be migrated:\n{}", report.text());
    }
    if let Some(domain) = guest.domain(lab.host(2))? {
        bail!("a domain {domain} stands on the target:\n{}", report.text());
    }
    // What is left of it where it was is as its configuration says: preserved, started again, or nothing.
    if key == REBOOT {
        guest.comes_up(lab.host(1)).context("it should have started again")?;
    }
    if guest.domain(lab.host(1))?.is_some() {
        guest.destroy(lab.host(1))?;
    }
    left::nothing(lab, helper).with_context(|| format!("of the migration was said:\n{}", report.text()))
}

/// The guest gives memory back meanwhile: the migration goes well without those pages.
fn guest_balloons(lab: &Lab, helper: Helper) -> Result<()> {
    let (guest, before) = begin(lab)?;
    let shrink =
        || lab.host(1).run(&format!("xl mem-set {} {}", guest.name, guest.memory_mib - 16)).map(drop);
    let report = held(lab, &guest, helper, shrink)?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let after = guest.counts_on(lab.host(2), before)?;
    guest.verifies_all(lab.host(2), after)?;
    left::nothing(lab, helper)?;
    guest.destroy(lab.host(2))
}

/// The guest's disk is not there on the target.
fn no_disk(lab: &Lab, helper: Helper) -> Result<()> {
    lab.host(1).run("ln -sf /dev/vdb /dev/lun-of-host1")?;
    let guest = Guest { disk: Some("/dev/lun-of-host1".into()), ..Guest::small(Kind::Pvh) };
    let before = guest.create(lab.host(1))?;
    let report = lab.try_migrate(&guest, 1, &Migration::new(helper, helper))?;
    goes_on(lab, &guest, before, helper, &report)?;
    guest.destroy(lab.host(1))
}

/// Another guest has the target's memory.
fn no_memory(lab: &Lab, helper: Helper) -> Result<()> {
    let free: u32 = lab.host(2).run("xl info free_memory")?.trim().parse()?;
    let guest = Guest { memory_mib: 512, ..Guest::small(Kind::Pvh) };
    let memory_mib = free.saturating_sub(256);
    let other = Guest { name: "other".into(), memory_mib, disk: None, ..Guest::small(Kind::Pvh) };
    lab.host(2).put("/run/lab/other.cfg", other.configuration().as_bytes())?;
    lab.host(2).run("xl create -q -p /run/lab/other.cfg")?;
    let before = guest.create(lab.host(1))?;
    let report = lab.try_migrate(&guest, 1, &Migration::new(helper, helper))?;
    other.destroy(lab.host(2))?;
    goes_on(lab, &guest, before, helper, &report)?;
    guest.destroy(lab.host(1))
}
