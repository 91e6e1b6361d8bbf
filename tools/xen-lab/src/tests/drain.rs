//! Guests that run on the target while pages of theirs are outstanding: how those come, and what becomes of them when the guest,
//! or an end, does something else meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::ferry::{GRANTS, LENT, ends, migration};
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{self, DRAINS, Helper, Migration, PROGRAM, Report, number_before};
use crate::wait;

/// What the target's host may read of the shared disk until pages have been outstanding for a while, bytes a second: less than
/// references come in, on a busy machine too.
pub(super) const SLOW_DISK: u64 = 256 << 10;
/// Where a guest is saved to.
const FILE: &str = "/root/saved-early";
/// How long a drain goes on over a slow disk before that is as fast as ever.
const A_WHILE: Duration = Duration::from_secs(5);

/// Of the tests, the one that the short tier has.
const SHORT: &str = "pvh";

/// What happens to an end while pages are outstanding.
#[derive(Clone, Copy)]
enum Strike {
    /// The source's worker is killed.
    SourceKilled,
    /// The wire between the hosts is dead.
    WireCut,
}

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    if !pair.is_broad() {
        return Vec::new();
    }
    let bodies: [(&str, Body); 9] = [
        (SHORT, Box::new(|lab| served(lab, Kind::Pvh, ""))),
        ("hvm", Box::new(|lab| served(lab, Kind::Hvm, ""))),
        ("pvh-by-grants", Box::new(|lab| served(lab, Kind::Pvh, GRANTS))),
        ("then-saved", Box::new(saved)),
        ("then-migrated", Box::new(migrated)),
        ("then-rebooted", Box::new(rebooted)),
        ("then-destroyed", Box::new(destroyed)),
        ("source-killed", Box::new(|lab| struck(lab, Strike::SourceKilled))),
        ("wire-cut", Box::new(|lab| struck(lab, Strike::WireCut))),
    ];
    let test = |(what, body): (&str, Body)| {
        let tier = if what == SHORT { Tier::Ci } else { Tier::Full };
        Test::new(pair, &format!("lazy/{what}"), tier, Needs::Program, body)
    };
    bodies.into_iter().map(test).collect()
}

/// Moves a new guest to host 2, whose disk is slow and whose own helper is ours, and sees it run there with pages outstanding; then
/// does `meanwhile`. Both ends have these variables besides. The disk is as fast as ever afterwards.
fn early<R>(
    lab: &Lab,
    guest: &Guest,
    environment: &str,
    meanwhile: impl FnOnce(&Report, Count) -> Result<R>,
) -> Result<(Report, R)> {
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    let before = guest.create(lab.host(1))?;
    for number in 1..=2 {
        lab.host(number).run(&format!("rm -f {DRAINS}"))?;
    }
    guest.forget_counts(lab.host(2))?;
    lab.host(2).run(&format!("{PROGRAM} xen install"))?;
    lab.set_disk_rate(2, SLOW_DISK)?;
    let done = restarted(lab, guest, environment, before).and_then(|(report, count)| {
        let came = meanwhile(&report, count);
        Ok((came.with_context(|| format!("of the migration was said:\n{}", report.text()))?, report))
    });
    lab.set_disk_rate(2, 0)?;
    let (came, report) = done?;
    Ok((report, came))
}

/// Migrates it from host 1, and waits until it counts on.
fn restarted(lab: &Lab, guest: &Guest, environment: &str, before: Count) -> Result<(Report, Count)> {
    let mut migration = migration("lazy", Helper::Ours);
    migration.environment = format!("{} {environment}", migration.environment);
    let report = lab.try_migrate(guest, 1, &migration)?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let (source, target) = (report.source.text(), report.target.text());
    if !source.contains("this host is needed") || !target.contains("pages of it are outstanding") {
        bail!("no pages were outstanding when the guest restarted:\n{}", report.text());
    }
    Ok((report, before))
}

/// Waits until neither host has anything outstanding. Xen's own helper can be put back then.
fn whole(lab: &Lab) -> Result<()> {
    for number in 1..=2 {
        let done = lab.host(number).run_within(&format!("{PROGRAM} status --wait"), wait::limit(240));
        done.with_context(|| format!("host {number} should be through with it"))?;
    }
    lab.host(2).run(&format!("{PROGRAM} xen uninstall")).map(drop)
}

/// What the end on `host` has written down.
fn words(lab: &Lab, host: usize) -> Result<String> {
    lab.host(host).run(&format!("cat {DRAINS}"))
}

/// The number before `words` in what the drain on host 2 came to.
fn drained(lab: &Lab, what: &str) -> Result<u64> {
    let text = words(lab, 2)?;
    let line = text.lines().find(|line| line.contains(": done. "));
    let found = line.and_then(|line| number_before(line, what));
    found.with_context(|| format!("nothing on host 2 says how many{what}:\n{text}"))
}

/// A guest restarts before its pages are there, gets those it touches over the hypervisor's ring, and is whole in the end.
fn served(lab: &Lab, kind: Kind, environment: &str) -> Result<()> {
    let guest = Guest::reader(kind);
    let (report, count) = early(lab, &guest, environment, |_, count| {
        for number in 1..=2 {
            let said = lab.host(number).run(&format!("{PROGRAM} status"))?;
            if !said.contains("guest runs") {
                bail!("`pageferry status` on host {number} does not show it:\n{said}");
            }
        }
        let refused = lab.host(2).attempt(&format!("{PROGRAM} xen uninstall"), wait::limit(60))?;
        if refused.code == 0 || !refused.text().contains("has pages outstanding") {
            bail!("Xen's own helper should not come back now:\n{}", refused.text());
        }
        std::thread::sleep(A_WHILE);
        Ok(count)
    })?;
    whole(lab)?;
    let outstanding = drained(lab, " pages were outstanding")?;
    let faults = drained(lab, " accesses to them answered")?;
    eprintln!("    {outstanding} pages were outstanding, {faults} accesses to them were answered");
    if outstanding < 500 || faults == 0 {
        bail!("{outstanding} outstanding, {faults} accesses are too few:\n{}", report.text());
    }
    if environment == GRANTS && !report.target.text().contains(LENT) {
        bail!("nothing was loaded by grants before the restart:\n{}", report.text());
    }
    ends(lab, &guest, 2, count)
}

/// It is saved in the middle of it: not before it is whole, and stock's helper restores it.
fn saved(lab: &Lab) -> Result<()> {
    let (guest, host) = (Guest::reader(Kind::Pvh), lab.host(2));
    let (_, count) = early(lab, &guest, "", |_, count| {
        let command = format!("{}xl -vvv save {} {FILE}", Helper::Ours.environment(), guest.name);
        let saving = host.start(&command, wait::limit(300));
        std::thread::sleep(A_WHILE);
        lab.set_disk_rate(2, 0)?;
        let said = saving.wait()?;
        if said.code != 0 || !said.text().contains("it is saved when they are here") {
            bail!("the save ended with {}, and should have waited:\n{}", said.code, said.text());
        }
        Ok(count)
    })?;
    whole(lab)?;
    let count = moves::restore(&guest, host, FILE, count, Helper::Stock)?;
    ends(lab, &guest, 2, count)
}

/// It is migrated back in the middle of it.
fn migrated(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let (_, count) = early(lab, &guest, "", |_, count| {
        // Before it is there again it can't be suspended once more.
        let count = guest.is_back(lab.host(2), count)?;
        guest.forget_counts(lab.host(1))?;
        let back = Migration::new(Helper::Ours, Helper::Ours);
        std::thread::scope(|scope| {
            let going = scope.spawn(|| lab.try_migrate(&guest, 2, &back));
            std::thread::sleep(A_WHILE);
            lab.set_disk_rate(2, 0)?;
            let report = going.join().map_err(|_| anyhow::anyhow!("the migration's thread died"))??;
            if report.source.code != 0 {
                bail!("the migration back failed:\n{}", report.text());
            }
            Ok(count)
        })
    })?;
    whole(lab)?;
    ends(lab, &guest, 1, count)
}

/// It reboots in the middle of it: another domain starts, and nobody waits for the pages of the first.
fn rebooted(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let (report, ()) = early(lab, &guest, "", |_, _| {
        guest.forget_counts(lab.host(2))?;
        // The key that has its kernel reboot (Documentation/admin-guide/sysrq.rst of Linux).
        lab.host(2).run(&format!("xl sysrq {} b", guest.name))?;
        whole(lab)
    })?;
    let started = guest.comes_up(lab.host(2));
    let count =
        started.with_context(|| format!("it should have started again, after:\n{}", report.text()))?;
    ends(lab, &guest, 2, count)
}

/// It is destroyed in the middle of it.
fn destroyed(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    early(lab, &guest, "", |_, _| guest.destroy(lab.host(2)))?;
    whole(lab)?;
    left::nothing(lab, Helper::Ours)
}

/// The two ends lose each other: the target loads the rest from the disk, which has it all.
fn struck(lab: &Lab, strike: Strike) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let (_, count) = early(lab, &guest, "", |_, count| {
        match strike {
            Strike::SourceKilled => {
                lab.host(1).run("pkill -9 -f 'save-helper --worke[r]'")?;
            }
            Strike::WireCut => lab.set_wire(false)?,
        }
        std::thread::sleep(A_WHILE);
        Ok(count)
    })?;
    let through = lab.host(2).run_within(&format!("{PROGRAM} status --wait"), wait::limit(240));
    lab.set_wire(true)?;
    through?;
    let outstanding = drained(lab, " pages were outstanding")?;
    if outstanding < 500 {
        bail!("{outstanding} pages outstanding are too few:\n{}", words(lab, 2)?);
    }
    whole(lab)?;
    ends(lab, &guest, 2, count)
}
