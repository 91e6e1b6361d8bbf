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

/// Early: before any page. Middle: among the pages of the first pass. Late: when the guest is suspended.
const SPOTS: [(&str, Spot); 3] =
    [("early", Spot::Type(PAGE_DATA)), ("middle", Spot::Number(12)), ("late", Spot::Type(X86_TSC_INFO))];

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    // With stock helpers too: it shows that the tests ask nothing of ours that Xen itself does not do.
    for (group, helper, needs) in
        [("stock", Helper::Stock, Needs::Nothing), ("drop-in", Helper::Ours, Needs::Helper)]
    {
        let mut add = |what: String, tier: Tier, body: Body| {
            let tier = if helper == Helper::Stock { Tier::Full } else { tier };
            tests.push(Test::new(pair, &format!("{group}/{what}"), tier, needs, body));
        };
        for (place, spot) in SPOTS {
            let tier = if place == "middle" { Tier::Ci } else { Tier::Full };
            add(format!("cut-{place}"), tier, Box::new(move |lab| spoiled(lab, helper, spot, Fault::Cut)));
            let garbled = move |lab: &Lab| spoiled(lab, helper, spot, Fault::Garble);
            add(format!("garbled-{place}"), Tier::Full, Box::new(garbled));
        }
        add("wire-cut".into(), Tier::Full, Box::new(move |lab| wire_cut(lab, helper)));
        add("receiver-killed".into(), Tier::Ci, Box::new(move |lab| receiver_killed(lab, helper)));
        add("sender-killed".into(), Tier::Full, Box::new(move |lab| sender_killed(lab, helper)));
        // A PV guest is powered off: a PVH one says `Power down` and spins, its domain never ends.
        for (what, kind, key) in
            [("crashes", Kind::Pvh, 'c'), ("reboots", Kind::Pvh, 'b'), ("powers-off", Kind::Pv, 'o')]
        {
            let body = move |lab: &Lab| guest_ends(lab, helper, kind, key);
            add(format!("guest-{what}"), Tier::Full, Box::new(body));
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
fn goes_on(lab: &Lab, guest: &Guest, before: Count, helper: Helper, report: &Report) -> Result<()> {
    if report.source.code == 0 {
        bail!("the migration should have failed, and xl says it did not:\n{}", report.text());
    }
    if report.source.err.is_empty() {
        bail!("xl does not say why the migration failed");
    }
    let after = guest.counts_on(lab.host(1), before);
    let after = after.with_context(|| format!("it should go on on the source:\n{}", report.text()))?;
    left::nothing(lab, helper).with_context(|| format!("of the migration was said:\n{}", report.text()))?;
    guest.verifies_all(lab.host(1), after)?;
    guest.destroy(lab.host(1))
}

fn spoiled(lab: &Lab, helper: Helper, spot: Spot, fault: Fault) -> Result<()> {
    let (guest, before) = begin(lab)?;
    let report = lab.try_migrate(&guest, 1, &Migration::new(helper, helper).with_fault(spot, fault))?;
    goes_on(lab, &guest, before, helper, &report)
}

/// Runs a migration that is held among the pages of the first pass while `meanwhile` happens, then released.
fn held(lab: &Lab, guest: &Guest, helper: Helper, meanwhile: impl FnOnce() -> Result<()>) -> Result<Report> {
    let migration = Migration::new(helper, helper).with_fault(Spot::Number(12), Fault::Hold);
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

/// The wire is dead from the middle of the first pass on; the transport notices after a while.
fn wire_cut(lab: &Lab, helper: Helper) -> Result<()> {
    let (guest, before) = begin(lab)?;
    let report = std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.try_migrate(&guest, 1, &Migration::new(helper, helper)));
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
    })?;
    goes_on(lab, &guest, before, helper, &report)
}

/// The receiving helper is killed while the stream is held.
fn receiver_killed(lab: &Lab, helper: Helper) -> Result<()> {
    let (guest, before) = begin(lab)?;
    let kill = || lab.host(2).run("pkill -9 -f 'save-helper --restore-domai[n]'").map(drop);
    let report = held(lab, &guest, helper, kill)?;
    goes_on(lab, &guest, before, helper, &report)
}

/// The sending helper is killed: what it was in the middle of is undone all the same.
fn sender_killed(lab: &Lab, helper: Helper) -> Result<()> {
    let (guest, before) = begin(lab)?;
    let kill = || lab.host(1).run("pkill -9 -f 'save-helper --save-domai[n]'").map(drop);
    let report = held(lab, &guest, helper, kill)?;
    goes_on(lab, &guest, before, helper, &report)
}

/// The guest ends meanwhile, by this key of its kernel's: xl says that it can't be migrated, and nothing arrives.
fn guest_ends(lab: &Lab, helper: Helper, kind: Kind, key: char) -> Result<()> {
    let guest = Guest::small(kind);
    guest.create(lab.host(1))?;
    let domain = guest.domain(lab.host(1))?;
    let end = || {
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
    goes_on(lab, &guest, before, helper, &report)
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
    goes_on(lab, &guest, before, helper, &report)
}
