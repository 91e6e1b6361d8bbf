//! Tests of pages that go beside the stream: on lanes, and by reference to the shared disk.

mod loads;

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::drain::SLOW_DISK;
use super::faults::goes_on;
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{Fault, Helper, Migration, PROGRAM, Report, Spot, number_before};
use crate::wait;

/// The type of the record that says what has gone over the lanes (`docs/PROTOCOL.md`).
const LANES_DONE: u32 = 0x5046_0002;
/// What the helper says where pages go by lanes, at the source and at the target.
const SENT: &str = "pages go by lanes";
const CAME: &str = "pages come by lanes";

/// Loads go straight into the guest's pages, and what the target says then.
pub(super) const GRANTS: &str = "PAGEFERRY_LOADS=grants";
pub(super) const LENT: &str = "pages lent to the disk by grants";

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |what: &str, body: Body| {
        tests.push(Test::new(pair, &format!("ferry/{what}"), Tier::Full, Needs::Program, body));
    };
    add("plain-pvh", Box::new(|lab| plain(lab, Kind::Pvh)));
    add("refer-pvh", Box::new(refer));
    add("refer-pvh-by-grants", Box::new(by_grants));
    if !pair.is_broad() {
        add("lazy-is-refer-without-paging", Box::new(without_paging));
        return tests;
    }
    add("lazy-is-refer-unless-installed", Box::new(|lab| not_lazy(lab, "`pageferry xen install`")));
    add("plain-hvm", Box::new(|lab| plain(lab, Kind::Hvm)));
    add("pv-keeps-to-the-stream", Box::new(pv));
    add("to-stock", Box::new(to_stock));
    add("ten-migrations", Box::new(ten));
    add("grants-worker-killed", Box::new(killed_while_lent));
    add("loads-in-turns", Box::new(loads::in_turns));
    for (what, fault) in [("cut", Fault::Cut), ("garbled", Fault::Garble)] {
        add(&format!("{what}-behind-the-pages"), Box::new(move |lab| spoiled(lab, fault)));
    }
    tests
}

/// Ours at the source, in this mode at both ends.
pub(super) fn migration(mode: &str, target: Helper) -> Migration {
    let environment = format!("PAGEFERRY_MODE={mode}");
    Migration { environment, ..Migration::new(Helper::Ours, target) }
}

/// Migrates and counts on; what was said. An error unless pages went by lanes just if they should.
fn moved(lab: &Lab, guest: &Guest, from: usize, mode: &str, target: Helper, lanes: bool) -> Result<Report> {
    moved_so(lab, guest, from, &migration(mode, target), lanes)
}

fn moved_so(lab: &Lab, guest: &Guest, from: usize, migration: &Migration, lanes: bool) -> Result<Report> {
    let before = guest.counts_on(lab.host(from), Count::default())?;
    let report = lab.try_migrate(guest, from, migration)?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let said = (report.source.text().contains(SENT), report.target.text().contains(CAME));
    if said != (lanes, lanes) {
        bail!("pages went by lanes, as source and target say: {said:?}, not {lanes}:\n{}", report.text());
    }
    let after = guest.is_back(lab.host(3 - from), before);
    after.with_context(|| format!("after its migration, of which was said:\n{}", report.text()))?;
    left::nothing(lab, Helper::Ours)?;
    Ok(report)
}

/// It counts on on `host` past `since`, every page is right, nothing is left; then it is destroyed.
pub(super) fn ends(lab: &Lab, guest: &Guest, host: usize, since: Count) -> Result<()> {
    let count = guest.counts_on(lab.host(host), since)?;
    guest.verifies_all(lab.host(host), count)?;
    left::nothing(lab, Helper::Ours)?;
    guest.destroy(lab.host(host))
}

/// The number before `words` in a line of the source's log.
fn number(report: &Report, words: &str) -> Result<u64> {
    let text = report.source.text();
    let mut lines = text.lines().filter(|line| line.contains("lanes ("));
    let found = lines.find_map(|line| number_before(line, words));
    found.with_context(|| format!("nothing says how many pages were{words}:\n{text}"))
}

fn plain(lab: &Lab, kind: Kind) -> Result<()> {
    let guest = Guest { vcpus: 2, ..Guest::small(kind) };
    guest.create(lab.host(1))?;
    let report = moved(lab, &guest, 1, "plain", Helper::Ours, true)?;
    let (sent, zero) = (number(&report, " pages sent")?, number(&report, " zero,")?);
    if sent < 4000 || zero < 1000 || number(&report, " by reference")? != 0 {
        bail!("{sent} pages sent and {zero} zero ones are not this guest's:\n{}", report.text());
    }
    ends(lab, &guest, 2, Count::default())
}

/// A guest that has read 32 MiB of the shared disk's files, of which the source has an index.
fn refer(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    guest.create(lab.host(1))?;
    let there = moved(lab, &guest, 1, "refer", Helper::Ours, true)?;
    let (references, after_all) = (number(&there, " by reference")?, number(&there, " had to be sent")?);
    if references < 32 * 256 * 9 / 10 || after_all > references / 20 {
        bail!("{references} pages by reference, {after_all} of them sent after all:\n{}", there.text());
    }
    if !there.target.text().contains("loaded from disks and checked") {
        bail!("the target loaded nothing:\n{}", there.text());
    }
    // Host 2 has no index: every page is sent, and a line says why.
    let back = moved(lab, &guest, 2, "refer", Helper::Ours, true)?;
    if number(&back, " by reference")? != 0 || !back.source.text().contains("no page is referenced on it") {
        bail!("there is no index on host 2:\n{}", back.text());
    }
    ends(lab, &guest, 1, Count::default())
}

/// Ours at both ends, by reference, with this way of loading.
fn loading(loads: &str) -> Migration {
    let refer = migration("refer", Helper::Ours);
    Migration { environment: format!("{} {loads}", refer.environment), ..refer }
}

/// The same where what is loaded goes straight into the guest's pages.
fn by_grants(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    guest.create(lab.host(1))?;
    let report = moved_so(lab, &guest, 1, &loading(GRANTS), true)?;
    let references = number(&report, " by reference")?;
    let lent = number_before(&report.target.text(), &format!(" {LENT}")).unwrap_or(0);
    if lent < references * 9 / 10 || !report.target.text().contains("loaded by: grants") {
        bail!("{lent} pages of {references} were loaded by grants:\n{}", report.text());
    }
    ends(lab, &guest, 2, Count::default())
}

/// The target's worker is killed while pages are lent: the guest goes on at the source, and neither domain nor mapping is left.
fn killed_while_lent(lab: &Lab) -> Result<()> {
    const WORKER: &str = "save-helper --worke[r]";
    let guest = Guest::reader(Kind::Pvh);
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    let before = guest.create(lab.host(1))?;
    lab.set_disk_rate(2, SLOW_DISK)?;
    let struck = std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.try_migrate(&guest, 1, &loading(GRANTS)));
        let host = lab.host(2);
        let mapped = format!("grep -c gntdev /proc/$(pgrep -f '{WORKER}')/maps 2> /dev/null; true");
        let lent = wait::until("pages to be lent", wait::limit(120), Duration::from_millis(100), || {
            let said = host.run(&mapped)?;
            Ok(if said.trim().parse().unwrap_or(0) > 0 { Ok(()) } else { Err(said) })
        });
        let killed = lent.and_then(|()| host.run(&format!("pkill -9 -f '{WORKER}'")));
        let report = moving.join().map_err(|_| anyhow::anyhow!("the migration's thread died"))?;
        killed.and(report)
    });
    lab.set_disk_rate(2, 0)?;
    goes_on(lab, &guest, before, Helper::Ours, &struck?)?;
    let domains = lab.host(2).run("xl list | tail -n +3")?;
    if !domains.trim().is_empty() {
        bail!("a domain is left on host 2: {domains}");
    }
    guest.destroy(lab.host(1))
}

/// Where ours is what the target runs by itself and the hypervisor pages nothing.
fn without_paging(lab: &Lab) -> Result<()> {
    lab.host(2).run(&format!("{PROGRAM} xen install"))?;
    let done = not_lazy(lab, "no memory paging");
    lab.host(2).run(&format!("{PROGRAM} xen uninstall"))?;
    done
}

/// All is loaded before the restart, and a line says `why`.
fn not_lazy(lab: &Lab, why: &str) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    guest.create(lab.host(1))?;
    let report = moved(lab, &guest, 1, "lazy", Helper::Ours, true)?;
    if !report.source.text().contains(why) || number(&report, " by reference")? == 0 {
        bail!(
            "it should say that pages can't be held back ({why}), and load them before the restart:\n{}",
            report.text()
        );
    }
    ends(lab, &guest, 2, Count::default())
}

/// Page tables are not for lanes yet.
fn pv(lab: &Lab) -> Result<()> {
    let guest = Guest::small(Kind::Pv);
    guest.create(lab.host(1))?;
    moved(lab, &guest, 1, "refer", Helper::Ours, false)?;
    ends(lab, &guest, 2, Count::default())
}

/// Stock passes over the offer.
fn to_stock(lab: &Lab) -> Result<()> {
    let guest = Guest::small(Kind::Pvh);
    guest.create(lab.host(1))?;
    moved(lab, &guest, 1, "plain", Helper::Stock, false)?;
    ends(lab, &guest, 2, Count::default())
}

/// Back and forth, a busy guest.
fn ten(lab: &Lab) -> Result<()> {
    let guest = Guest { vcpus: 2, dirty_per_second: 1000, files_mib: 16, ..Guest::small(Kind::Pvh) };
    for host in 1..=2 {
        lab.host(host).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    }
    guest.create(lab.host(1))?;
    let mut from = 1;
    for time in 1..=10 {
        moved(lab, &guest, from, "refer", Helper::Ours, true).with_context(|| format!("migration {time}"))?;
        from = 3 - from;
    }
    ends(lab, &guest, from, Count::default())
}

/// The stream breaks when all pages have come: the guest goes on at the source, and nothing is left.
fn spoiled(lab: &Lab, fault: Fault) -> Result<()> {
    let guest = Guest::small(Kind::Pvh);
    let before = guest.create(lab.host(1))?;
    let migration = migration("plain", Helper::Ours).with_fault(Spot::Type(LANES_DONE), fault);
    let report = lab.try_migrate(&guest, 1, &migration)?;
    if !report.source.text().contains(SENT) {
        bail!("pages should have gone by lanes before it failed:\n{}", report.text());
    }
    goes_on(lab, &guest, before, Helper::Ours, &report)?;
    guest.destroy(lab.host(1))
}
