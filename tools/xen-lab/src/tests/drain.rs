//! Guests that run on the target while pages of theirs are outstanding: how those come, and what becomes of them when the guest,
//! or an end, does something else meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::ferry::{ends, migration};
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{self, DRAINS, Helper, Migration, PROGRAM, Report, number_before};
use crate::wait;

/// What the target's host may read of the shared disk until pages have been outstanding for a while, bytes a second: less than
/// references come in, on a busy machine too.
const SLOW_DISK: u64 = 256 << 10;
/// Where a guest is saved to.
const FILE: &str = "/root/saved-early";
/// Where mke2fs has put the files that a reader has read, where it has put nothing, and how much is copied from there to here, in
/// MiB. Were they elsewhere, no page would go by reference, and the test would say so.
const FILES_AT: u32 = 8;
const FREE_AT: u32 = 400;
const COPIED: u32 = 34;
/// How long ends that have lost each other look for each other, in seconds: less than [`whole`] waits.
const REDIAL_FOR: u32 = 120;
/// How long both ends may take to find that they have lost each other, or have found each other again, in seconds.
const NOTICED_WITHIN: u32 = 120;
/// How long a drain goes on over a slow disk before that is as fast as ever.
pub(super) const A_WHILE: Duration = Duration::from_secs(5);

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
    let bodies: [(&str, Body); 10] = [
        (SHORT, Box::new(|lab| served(lab, Kind::Pvh))),
        ("hvm", Box::new(|lab| served(lab, Kind::Hvm))),
        ("then-saved", Box::new(saved)),
        ("then-migrated", Box::new(migrated)),
        ("then-rebooted", Box::new(rebooted)),
        ("then-destroyed", Box::new(destroyed)),
        ("source-killed", Box::new(|lab| struck(lab, Strike::SourceKilled))),
        ("wire-cut", Box::new(|lab| struck(lab, Strike::WireCut))),
        ("wire-cut-and-back", Box::new(cut_and_back)),
        ("ten-migrations", Box::new(ten)),
    ];
    let test = |(what, body): (&str, Body)| {
        let tier = if what == SHORT { Tier::Ci } else { Tier::Full };
        Test::new(pair, &format!("lazy/{what}"), tier, Needs::Program, body)
    };
    bodies.into_iter().map(test).collect()
}

/// Creates the guest on host 1, with an index of its disk there; host 2's own helper is ours, and its disk slow: does `work` with
/// that, the disk is as fast as ever afterwards.
pub(super) fn poised<R>(lab: &Lab, guest: &Guest, work: impl FnOnce(Count) -> Result<R>) -> Result<R> {
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    poised_by_index(lab, guest, work)
}

/// The same, by the index that host 1 has.
fn poised_by_index<R>(lab: &Lab, guest: &Guest, work: impl FnOnce(Count) -> Result<R>) -> Result<R> {
    let before = guest.create(lab.host(1))?;
    for number in 1..=2 {
        lab.host(number).run(&format!("rm -f {DRAINS}"))?;
    }
    guest.forget_counts(lab.host(2))?;
    lab.host(2).run(&format!("{PROGRAM} xen install"))?;
    lab.set_disk_rate(2, SLOW_DISK)?;
    let done = work(before);
    lab.set_disk_rate(2, 0)?;
    done
}

/// Moves a new guest to host 2 and sees it run there with pages outstanding; then does `meanwhile`.
fn early<R>(
    lab: &Lab,
    guest: &Guest,
    meanwhile: impl FnOnce(&Report, Count) -> Result<R>,
) -> Result<(Report, R)> {
    poised(lab, guest, |before| moved_early(lab, guest, before, meanwhile))
}

/// Moves it, and does that.
pub(super) fn moved_early<R>(
    lab: &Lab,
    guest: &Guest,
    before: Count,
    meanwhile: impl FnOnce(&Report, Count) -> Result<R>,
) -> Result<(Report, R)> {
    let mut migration = migration("lazy", Helper::Ours);
    migration.environment += &format!(" PAGEFERRY_REDIAL_FOR={REDIAL_FOR}s");
    let report = lab.try_migrate(guest, 1, &migration)?;
    restarted(&report)?;
    let came = meanwhile(&report, before);
    let came = came.with_context(|| format!("of the migration was said:\n{}", report.text()))?;
    Ok((report, came))
}

/// An error unless it went well and pages were outstanding at the restart.
pub(super) fn restarted(report: &Report) -> Result<()> {
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let (source, target) = (report.source.text(), report.target.text());
    if !source.contains("this host is needed") || !target.contains("pages of it are outstanding") {
        bail!("no pages were outstanding when the guest restarted:\n{}", report.text());
    }
    Ok(())
}

/// Waits until neither host has anything outstanding. Xen's own helper can be put back then.
pub(super) fn whole(lab: &Lab) -> Result<()> {
    for number in 1..=2 {
        let done = lab.host(number).run_within(&format!("{PROGRAM} status --wait"), wait::limit(240));
        done.with_context(|| format!("host {number} should be through with it"))?;
    }
    lab.host(2).run(&format!("{PROGRAM} xen uninstall")).map(drop)
}

/// What the end on `host` has written down.
pub(super) fn words(lab: &Lab, host: usize) -> Result<String> {
    lab.host(host).run(&format!("cat {DRAINS}"))
}

/// The number before `words` in what the drain on host 2 came to.
pub(super) fn drained(lab: &Lab, what: &str) -> Result<u64> {
    let text = words(lab, 2)?;
    let line = text.lines().find(|line| line.contains(": done. "));
    let found = line.and_then(|line| number_before(line, what));
    found.with_context(|| format!("nothing on host 2 says how many{what}:\n{text}"))
}

/// A guest restarts before its pages are there, gets those it touches over the hypervisor's ring, and is whole in the end.
fn served(lab: &Lab, kind: Kind) -> Result<()> {
    let guest = Guest::reader(kind);
    let (report, count) = early(lab, &guest, |_, count| {
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
    ends(lab, &guest, 2, count)
}

/// It is saved in the middle of it: not before it is whole, and stock's helper restores it.
fn saved(lab: &Lab) -> Result<()> {
    let (guest, host) = (Guest::reader(Kind::Pvh), lab.host(2));
    let (_, count) = early(lab, &guest, |_, count| {
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
    let (_, count) = early(lab, &guest, |_, count| {
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
    let (report, ()) = early(lab, &guest, |_, _| {
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
    early(lab, &guest, |_, _| guest.destroy(lab.host(2)))?;
    whole(lab)?;
    left::nothing(lab, Helper::Ours)
}

/// The two ends lose each other: the target loads the rest from the disk, which has it all.
fn struck(lab: &Lab, strike: Strike) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let (_, count) = early(lab, &guest, |_, count| {
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

/// Copies `COPIED` MiB of the shared disk from one place to another, past the cache.
fn copy(lab: &Lab, from: u32, to: u32) -> Result<()> {
    let what = format!("if=/dev/vdb of=/dev/vdb bs=1M skip={from} seek={to} count={COPIED}");
    let command = format!("dd {what} iflag=direct oflag=direct conv=notrunc status=none");
    lab.host(1).run_within(&command, wait::limit(120)).map(drop)
}

/// Overwrites as much there.
fn overwrite(lab: &Lab, at: u32) -> Result<()> {
    let what = format!("if=/dev/zero of=/dev/vdb bs=1M seek={at} count={COPIED}");
    let command = format!("dd {what} oflag=direct conv=notrunc,fsync status=none");
    lab.host(1).run_within(&command, wait::limit(120)).map(drop)
}

/// Waits until the end on `host` has written down `what`.
pub(super) fn says(lab: &Lab, host: usize, what: &str) -> Result<()> {
    wait::until(what, wait::limit(NOTICED_WITHIN), Duration::from_secs(1), || {
        let said = words(lab, host)?;
        Ok(if said.contains(what) { Ok(()) } else { Err(said) })
    })
}

/// The two ends lose each other and find each other again, while pages are outstanding whose blocks have been overwritten: the
/// source sends those. Host 1's index knows of a copy of the files alone, where nobody else looks, so that no more than
/// references break with it.
fn cut_and_back(lab: &Lab) -> Result<()> {
    copy(lab, FILES_AT, FREE_AT)?;
    overwrite(lab, FILES_AT)?;
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    copy(lab, FREE_AT, FILES_AT)?;
    let guest = Guest::reader(Kind::Pvh);
    let (report, count) = poised_by_index(lab, &guest, |before| {
        moved_early(lab, &guest, before, |_, count| {
            lab.set_wire(false)?;
            let lost = overwrite(lab, FREE_AT)
                .and_then(|()| says(lab, 1, "dialling again"))
                .and_then(|()| says(lab, 2, "waiting for it to be there again"));
            lab.set_wire(true)?;
            lost?;
            says(lab, 1, "the target is there again")?;
            says(lab, 2, "the source is there again")?;
            Ok(count)
        })
    })?;
    whole(lab)?;
    let (outstanding, sent) =
        (drained(lab, " pages were outstanding")?, drained(lab, " of them had to be sent")?);
    eprintln!("    {outstanding} pages were outstanding, {sent} references did not hold");
    if outstanding < 500 || sent < 100 {
        bail!("{outstanding} outstanding, {sent} sent after all are too few:\n{}", report.text());
    }
    ends(lab, &guest, 2, count)
}

/// Back and forth, a busy guest that reads files, while the hosts have something else on the wire too.
fn ten(lab: &Lab) -> Result<()> {
    let guest = Guest { dirty_per_second: 1000, ..Guest::reader(Kind::Pvh) };
    for number in 1..=2 {
        lab.host(number).run(&format!("{PROGRAM} index build /dev/vdb && {PROGRAM} xen install"))?;
    }
    let traffic = Traffic::begin(lab)?;
    let done = there_and_back(lab, &guest, 10);
    traffic.end(lab)?;
    for number in 1..=2 {
        lab.set_disk_rate(number, 0)?;
        lab.host(number).run(&format!("{PROGRAM} xen uninstall"))?;
    }
    let (count, outstanding, faults) = done?;
    eprintln!("    {outstanding} pages were outstanding in all, {faults} accesses to them were answered");
    if outstanding < 5000 || faults == 0 {
        bail!("{outstanding} outstanding, {faults} accesses are too few in ten migrations");
    }
    ends(lab, &guest, 1, count)
}

/// So many lazy migrations, one after the other; the guest's count, and of all: pages outstanding, accesses to them.
fn there_and_back(lab: &Lab, guest: &Guest, times: usize) -> Result<(Count, u64, u64)> {
    let (mut count, mut outstanding, mut faults) = (guest.create(lab.host(1))?, 0, 0);
    let mut from = 1;
    for time in 1..=times {
        let to = 3 - from;
        lab.host(to).run(&format!("rm -f {DRAINS}"))?;
        guest.forget_counts(lab.host(to))?;
        // However long the rounds take on this machine, pages are outstanding at the restart; and here soon.
        lab.set_disk_rate(to, SLOW_DISK)?;
        let moved = lab.migrate(guest, from, count, &migration("lazy", Helper::Ours));
        count = moved.with_context(|| format!("migration {time} of {times}"))?;
        lab.set_disk_rate(to, 0)?;
        for number in 1..=2 {
            lab.host(number).run_within(&format!("{PROGRAM} status --wait"), wait::limit(240))?;
        }
        // Where all was there at the restart nobody has written anything down.
        let drained = lab.host(to).run(&format!("cat {DRAINS} 2>/dev/null; true"))?;
        outstanding += number_before(&drained, " pages were outstanding").unwrap_or(0);
        faults += number_before(&drained, " accesses to them answered").unwrap_or(0);
        left::nothing(lab, Helper::Ours).with_context(|| format!("migration {time} of {times}"))?;
        from = to;
    }
    Ok((count, outstanding, faults))
}

/// Some 3 MiB a second from host 1 to host 2 that have nothing to do with any guest.
struct Traffic;

impl Traffic {
    const PORT: u16 = 16509;

    fn begin(lab: &Lab) -> Result<Self> {
        let port = Self::PORT;
        lab.host(2).run(&format!("(socat -u TCP-LISTEN:{port} OPEN:/dev/null & echo $! > /run/lab/drain) </dev/null >/dev/null 2>&1"))?;
        let send = "import socket, time\ns = socket.create_connection(('10.77.0.2', PORT))\n\
                    while True:\n    s.sendall(bytes(65536))\n    time.sleep(0.02)\n";
        lab.host(1).put("/run/lab/traffic.py", send.replace("PORT", &port.to_string()).as_bytes())?;
        lab.host(1)
            .run("(python3 /run/lab/traffic.py & echo $! > /run/lab/traffic) </dev/null >/dev/null 2>&1")?;
        Ok(Self)
    }

    /// Ends it. An error if it has ended before.
    fn end(self, lab: &Lab) -> Result<()> {
        lab.host(1).run("kill $(cat /run/lab/traffic)").context("the traffic beside should have gone on")?;
        lab.host(2).run("kill $(cat /run/lab/drain) 2>/dev/null; true").map(drop)
    }
}
