//! Tests of pages that go beside the stream: on lanes, and by reference to the shared disk.

use anyhow::{Context, Result, bail};

use super::faults::goes_on;
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{DRAINS, Fault, Helper, Migration, PROGRAM, Report, Spot, number_before};
use crate::pattern::Overwritten;

/// The type of the record that says what has gone over the lanes (`docs/PROTOCOL.md`).
pub(super) const LANES_DONE: u32 = 0x5046_0002;
/// What the helper says where pages go by lanes, at the source and at the target.
const SENT: &str = "pages go by lanes";
const CAME: &str = "pages come by lanes";

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |what: &str, body: Body| {
        tests.push(Test::new(pair, &format!("ferry/{what}"), Tier::Full, Needs::Program, body));
    };
    add("plain-pvh", Box::new(|lab| plain(lab, Kind::Pvh)));
    add("refer-pvh", Box::new(move |lab| refer(lab, pair.goes_back())));
    if !pair.is_broad() {
        add("lazy-is-refer-without-paging", Box::new(without_paging));
        return tests;
    }
    add("lazy-is-refer-unless-installed", Box::new(|lab| not_lazy(lab, "`pageferry xen install`")));
    add("plain-hvm", Box::new(|lab| plain(lab, Kind::Hvm)));
    add("pv-keeps-to-the-stream", Box::new(pv));
    add("to-stock", Box::new(to_stock));
    add("another-disk", Box::new(|lab| another_disk(lab, "")));
    // The file system's superblocks say the same: its UUID is the same.
    add("clone-with-the-same-uuid", Box::new(|lab| another_disk(lab, "dd if=/dev/vdb bs=64k count=16")));
    add("index-stale", Box::new(stale));
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

/// What the two ends have said of a migration: `xl`'s words, and what the source wrote down when `xl` had gone on without it, as a
/// lazy source does whose target is not through at once.
struct Moved {
    report: Report,
    written: String,
}

impl Moved {
    fn text(&self) -> String {
        format!("{}\nthe source wrote down:\n{}", self.report.text(), self.written)
    }

    /// The number before `words` in the source's account of its lanes.
    fn number(&self, words: &str) -> Result<u64> {
        let said = self.report.source.text();
        let mut lines = said.lines().chain(self.written.lines()).filter(|line| line.contains("lanes ("));
        let found = lines.find_map(|line| number_before(line, words));
        found.with_context(|| format!("nothing says how many pages were{words}:\n{}", self.text()))
    }
}

/// Migrates and counts on; what was said. An error unless pages went by lanes just if they should.
fn moved(lab: &Lab, guest: &Guest, from: usize, mode: &str, target: Helper, lanes: bool) -> Result<Moved> {
    let before = guest.counts_on(lab.host(from), Count::default())?;
    lab.host(from).run(&format!("rm -f {DRAINS}"))?;
    let report = lab.try_migrate(guest, from, &migration(mode, target))?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    let said = (report.source.text().contains(SENT), report.target.text().contains(CAME));
    if said != (lanes, lanes) {
        bail!("pages went by lanes, as source and target say: {said:?}, not {lanes}:\n{}", report.text());
    }
    let after = guest.is_back(lab.host(3 - from), before);
    after.with_context(|| format!("after its migration, of which was said:\n{}", report.text()))?;
    // Whoever writes something down is gone then, and has written it.
    left::nothing(lab, Helper::Ours)?;
    let written = lab.host(from).run(&format!("cat {DRAINS} 2>/dev/null; true"))?;
    Ok(Moved { report, written })
}

/// It counts on on `host` past `since`, every page is right, nothing is left; then it is destroyed.
pub(super) fn ends(lab: &Lab, guest: &Guest, host: usize, since: Count) -> Result<()> {
    let count = guest.counts_on(lab.host(host), since)?;
    guest.verifies_all(lab.host(host), count)?;
    left::nothing(lab, Helper::Ours)?;
    guest.destroy(lab.host(host))
}

fn plain(lab: &Lab, kind: Kind) -> Result<()> {
    let guest = Guest { vcpus: 2, ..Guest::small(kind) };
    guest.create(lab.host(1))?;
    let went = moved(lab, &guest, 1, "plain", Helper::Ours, true)?;
    let (sent, zero) = (went.number(" pages sent")?, went.number(" zero,")?);
    if sent < 4000 || zero < 1000 || went.number(" by reference")? != 0 {
        bail!("{sent} pages sent and {zero} zero ones are not this guest's:\n{}", went.text());
    }
    ends(lab, &guest, 2, Count::default())
}

/// A guest that has read 32 MiB of the shared disk's files, of which the source has an index.
fn refer(lab: &Lab, goes_back: bool) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    guest.create(lab.host(1))?;
    let there = moved(lab, &guest, 1, "refer", Helper::Ours, true)?;
    let (references, after_all) = (there.number(" by reference")?, there.number(" had to be sent")?);
    if references < 32 * 256 * 9 / 10 || after_all > references / 20 {
        bail!("{references} pages by reference, {after_all} of them sent after all:\n{}", there.text());
    }
    if !there.report.target.text().contains("loaded from disks and checked") {
        bail!("the target loaded nothing:\n{}", there.text());
    }
    if !goes_back {
        return ends(lab, &guest, 2, Count::default());
    }
    // Host 2 has no index, whoever was here before: every page is sent, and a line says why.
    lab.host(2).run("rm -rf /var/lib/pageferry/index")?;
    let back = moved(lab, &guest, 2, "refer", Helper::Ours, true)?;
    if back.number(" by reference")? != 0
        || !back.report.source.text().contains("no page is referenced on it")
    {
        bail!("there is no index on host 2:\n{}", back.text());
    }
    ends(lab, &guest, 1, Count::default())
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
    let went = moved(lab, &guest, 1, "lazy", Helper::Ours, true)?;
    if !went.report.source.text().contains(why) || went.number(" by reference")? == 0 {
        bail!(
            "it should say that pages can't be held back ({why}), and load them before the restart:\n{}",
            went.text()
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

/// What stands on the disk is not what the index says, of no page: each is sent after all.
fn stale(lab: &Lab) -> Result<()> {
    // It can't be let read past its page cache what is overwritten.
    let guest = Guest { direct: false, ..Guest::reader(Kind::Pvh) };
    lab.host(1).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    guest.create(lab.host(1))?;
    let overwritten = Overwritten::files(lab, 2)?;
    let went = moved(lab, &guest, 1, "refer", Helper::Ours, true)?;
    drop(overwritten);
    let (references, after_all) = (went.number(" by reference")?, went.number(" had to be sent")?);
    eprintln!("    {references} pages by reference, {after_all} of them sent after all");
    if after_all < 32 * 256 * 9 / 10 {
        bail!("{after_all} of {references} pages sent after all are too few:\n{}", went.text());
    }
    ends(lab, &guest, 2, Count::default())
}

/// Under the path of the guest's disk the target has a disk of the same size that is another one, into which `copied` has copied
/// something of the guest's: that refuses, and the guest goes on.
fn another_disk(lab: &Lab, copied: &str) -> Result<()> {
    const DISK: &str = "/dev/lun-of-both";
    const OTHER: &str = "/run/lab/another.img";
    let copy = if copied.is_empty() { String::new() } else { format!("{copied} of={OTHER} conv=notrunc; ") };
    lab.host(1).run(&format!("ln -sfn /dev/vdb {DISK}"))?;
    lab.host(2).run(&format!(
        "truncate -s $(blockdev --getsize64 /dev/vdb) {OTHER}; {copy}ln -sfn $(losetup -f --show {OTHER}) {DISK}"
    ))?;
    let guest = Guest { disk: Some(DISK.into()), ..Guest::reader(Kind::Pvh) };
    lab.host(1).run(&format!("{PROGRAM} index build {DISK}"))?;
    let before = guest.create(lab.host(1))?;
    let report = lab.try_migrate(&guest, 1, &migration("refer", Helper::Ours))?;
    lab.host(2).run(&format!("losetup -d $(readlink {DISK}); rm {DISK} {OTHER}"))?;
    if !report.text().contains("is not the disk the source means") {
        bail!("it should be said that the disk is another one:\n{}", report.text());
    }
    goes_on(lab, &guest, before, Helper::Ours, &report)?;
    guest.destroy(lab.host(1))
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
