//! What happens to a lazy migration on its way, and behind it: in the rounds, while the guest stands still, and in the drain. An end
//! is killed or lost before the commit: the guest goes on at the source, and nothing is left. Blocks that are referenced are
//! overwritten, or the target's memory is given to another guest: it is migrated, and never has a wrong page. The target's worker is
//! killed behind the commit: its standby goes on, or, killed too, leaves a guest that waits and can be destroyed.
//! (`ferry/index-stale` has blocks overwritten before the first round; `drain` what happens to an end behind the commit.)

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::drain::{A_WHILE, drained, moved_early, poised, restarted, says, whole, words};
use super::faults::goes_on;
use super::ferry::{LANES_DONE, ends, migration};
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::guest::{Guest, Kind};
use crate::lab::Lab;
use crate::moves::{Fault, Helper, PROGRAM, Report, Spot, number_before};
use crate::pattern::Overwritten;

/// References that have gone when a strike is in the rounds.
const REFERENCES: u64 = 500;
/// Pages that have to be sent after all, at least: of the 8,192 that the guest has read and that are overwritten, more are
/// outstanding at any time.
const AFTER_ALL_MIN: u64 = 500;
/// MiB that a target whose memory is filled has left for others, at most.
const LEFT_MIB: u64 = 64;
/// An xl that restores a guest has a lock until that is done, which another xl waits for that is to create one. Other toolstacks
/// have no such lock: this is an xl with one of its own.
const CREATE_BESIDE: &str = "cp /etc/xen/xl.conf /run/lab/xl.conf; echo 'lockfile=\"/run/lab/other.lock\"' >> /etc/xen/xl.conf; \
     xl create -q -p /run/lab/other.cfg; created=$?; cp /run/lab/xl.conf /etc/xen/xl.conf; exit $created";
/// Processes: the one that libxl knows, at the source and at the target, and the one behind either.
const ENDS: [(&str, usize, &str); 4] = [
    ("the source's front", 1, "save-helper --save-domai[n]"),
    ("the source's worker", 1, "save-helper --worke[r]"),
    ("the target's front", 2, "save-helper --restore-domai[n]"),
    ("the target's worker", 2, "save-helper --worke[r]"),
];

/// When it happens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// Pages have gone by lanes, references too.
    Rounds,
    /// The guest is suspended, all that goes before the restart has gone.
    Pause,
    /// The guest runs on the target.
    Drain,
}

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    if !pair.is_broad() {
        return Vec::new();
    }
    let bodies: [(&str, Body); 10] = [
        ("killed-in-the-rounds", Box::new(|lab| killed(lab, When::Rounds))),
        ("killed-at-the-pause", Box::new(|lab| killed(lab, When::Pause))),
        ("wire-cut-in-the-rounds", Box::new(wire_cut)),
        ("overwritten-in-the-rounds", Box::new(|lab| overwritten(lab, When::Rounds))),
        ("overwritten-at-the-pause", Box::new(|lab| overwritten(lab, When::Pause))),
        ("overwritten-in-the-drain", Box::new(|lab| overwritten(lab, When::Drain))),
        ("memory-filled-at-the-pause", Box::new(|lab| memory_filled(lab, When::Pause))),
        ("memory-filled-in-the-drain", Box::new(|lab| memory_filled(lab, When::Drain))),
        ("worker-killed-in-the-drain", Box::new(worker_killed)),
        ("worker-and-standby-killed", Box::new(both_killed)),
    ];
    let test = |(what, body): (&str, Body)| {
        Test::new(pair, &format!("lazy/{what}"), Tier::Full, Needs::Program, body)
    };
    bodies.into_iter().map(test).collect()
}

impl When {
    /// Migrates the guest from host 1, and does `strike` then.
    fn strikes<T>(self, lab: &Lab, guest: &Guest, strike: impl FnOnce() -> Result<T>) -> Result<(Report, T)> {
        let mut migration = migration("lazy", Helper::Ours);
        if self == Self::Pause {
            migration = migration.with_fault(Spot::Type(LANES_DONE), Fault::Hold);
            lab.hold_anew(1)?;
        }
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| lab.try_migrate(guest, 1, &migration));
            let mut strike = Some(strike);
            let mut struck = None;
            if self != Self::Drain {
                let reached = if self == Self::Pause { lab.wait_held(1) } else { referring(lab) };
                struck = strike.take().map(|strike| reached.and_then(|()| strike()));
            }
            let released = if self == Self::Pause { lab.release(1) } else { Ok(()) };
            let report = moving.join().map_err(|_| anyhow!("the migration's thread died"))??;
            released?;
            if let Some(strike) = strike {
                struck = Some(restarted(&report).and_then(|()| strike()));
            }
            let struck = struck.context("it is struck before or behind the commit")?;
            let struck = struck.with_context(|| format!("of the migration was said:\n{}", report.text()))?;
            Ok((report, struck))
        })
    }
}

/// Waits until the source says that references have gone.
fn referring(lab: &Lab) -> Result<()> {
    lab.wait_noted(1, "references to go", |note: &Value| {
        let references = note["sample"]["pages"]["by_reference"].as_u64().unwrap_or(0);
        note["phase"] == "rounds" && references >= REFERENCES
    })
}

/// One end after the other is killed; the guest goes on each time, and is migrated well in the end.
fn killed(lab: &Lab, when: When) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let (_, count) = poised(lab, &guest, |mut count| {
        for (what, host, like) in ENDS {
            eprintln!("    {what} is killed");
            let kill = || lab.host(host).run(&format!("pkill -9 -f '{like}'")).map(drop);
            let struck = when.strikes(lab, &guest, kill).and_then(|(report, ())| {
                goes_on(lab, &guest, count, Helper::Ours, &report)?;
                // Before that it can't be suspended again.
                guest.is_back(lab.host(1), count)
            });
            count = struck.with_context(|| format!("{what} was killed"))?;
        }
        let report = lab.try_migrate(&guest, 1, &migration("lazy", Helper::Ours))?;
        restarted(&report)?;
        Ok((report, count))
    })?;
    whole(lab)?;
    ends(lab, &guest, 2, count)
}

/// The wire dies while pages go: both ends find out, the guest goes on.
fn wire_cut(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    poised(lab, &guest, |count| {
        let struck = When::Rounds.strikes(lab, &guest, || lab.set_wire(false));
        lab.set_wire(true)?;
        goes_on(lab, &guest, count, Helper::Ours, &struck?.0).map(drop)
    })?;
    lab.host(2).run(&format!("{PROGRAM} xen uninstall"))?;
    guest.destroy(lab.host(1))
}

/// All that the guest has read of the disk is overwritten: what is outstanding is found out and sent.
fn overwritten(lab: &Lab, when: When) -> Result<()> {
    // What is overwritten is not to be read past its page cache.
    let guest = Guest { direct: false, ..Guest::reader(Kind::Pvh) };
    let (report, overwritten, count) = poised(lab, &guest, |count| {
        let (report, overwritten) = when.strikes(lab, &guest, || Overwritten::files(lab, 2))?;
        restarted(&report)?;
        Ok((report, overwritten, count))
    })?;
    whole(lab)?;
    drop(overwritten);
    let said = words(lab, 1)?;
    let after_all = number_before(&said, " had to be sent");
    eprintln!("    {after_all:?} pages were sent after all");
    if after_all.is_none_or(|pages| pages < AFTER_ALL_MIN) {
        bail!("{after_all:?} pages sent after all are too few:\n{said}\n{}", report.text());
    }
    ends(lab, &guest, 2, count)
}

/// Another guest takes all of the target's memory that nobody has claimed: there is room for the pages that are paged out.
fn memory_filled(lab: &Lab, when: When) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    let other = poised(lab, &guest, |count| {
        let (report, other) = when.strikes(lab, &guest, || fill(lab))?;
        restarted(&report)?;
        Ok((other, count))
    });
    let (other, count) = other?;
    whole(lab)?;
    other.destroy(lab.host(2))?;
    ends(lab, &guest, 2, count)
}

/// The target's worker is killed while pages are outstanding, half of them overwritten on the disk: its standby loads them and has the
/// source send the others, and the guest is whole.
fn worker_killed(lab: &Lab) -> Result<()> {
    // What is overwritten is not to be read past its page cache.
    let guest = Guest { direct: false, ..Guest::reader(Kind::Pvh) };
    let (report, (overwritten, count)) = poised(lab, &guest, |before| {
        moved_early(lab, &guest, before, |_, count| {
            let overwritten = Overwritten::files(lab, 2)?;
            lab.host(2).run("pkill -9 -f 'save-helper --worke[r]'")?;
            says(lab, 2, "its standby goes on")?;
            says(lab, 2, "the source is there again")?;
            let said = lab.host(2).run(&format!("{PROGRAM} status"))?;
            if !said.contains("guest runs") {
                bail!("`pageferry status` on host 2 does not show who has taken over:\n{said}");
            }
            std::thread::sleep(A_WHILE);
            Ok((overwritten, count))
        })
    })?;
    whole(lab)?;
    drop(overwritten);
    let (outstanding, sent) =
        (drained(lab, " pages were outstanding")?, drained(lab, " of them had to be sent")?);
    eprintln!("    {outstanding} pages were outstanding when the standby took over, {sent} were sent");
    if outstanding < REFERENCES || sent == 0 {
        bail!("{outstanding} outstanding, {sent} sent after all are too few:\n{}", report.text());
    }
    ends(lab, &guest, 2, count)
}

/// The standby is killed, and the worker: the guest waits, nothing is torn down with it, and it can be destroyed.
fn both_killed(lab: &Lab) -> Result<()> {
    let guest = Guest::reader(Kind::Pvh);
    poised(lab, &guest, |before| {
        moved_early(lab, &guest, before, |_, _| {
            for like in ["save-helper --standb[y]", "save-helper --worke[r]"] {
                lab.host(2).run(&format!("pkill -9 -f '{like}'"))?;
            }
            std::thread::sleep(A_WHILE);
            lab.host(2).run(&format!("xl list {}", guest.name))?;
            guest.destroy(lab.host(2))
        })
    })?;
    whole(lab)?;
    left::nothing(lab, Helper::Ours)
}

/// Creates a guest on host 2 that leaves next to nothing for others.
fn fill(lab: &Lab) -> Result<Guest> {
    let host = lab.host(2);
    let figure = |what: &str| -> Result<u64> {
        let said = host.run(&format!("xl info {what}"))?;
        said.trim().parse().with_context(|| format!("`xl info {what}` says {said:?}"))
    };
    let (free, claimed) = (figure("free_memory")?, figure("outstanding_claims")?);
    if claimed == 0 {
        bail!("no memory is claimed for pages that are out, {free} MiB are free");
    }
    // What is free for anybody is less by what is claimed already; a guest takes some more than its memory.
    let memory_mib = u32::try_from((free * 97 / 100).saturating_sub(24))?;
    let other = Guest { name: "other".into(), memory_mib, disk: None, ..Guest::small(Kind::Pvh) };
    host.put("/run/lab/other.cfg", other.configuration().as_bytes())?;
    host.run(CREATE_BESIDE)?;
    let (left, still) = (figure("free_memory")?, figure("outstanding_claims")?);
    eprintln!(
        "    {free} MiB free, {claimed} of them claimed; with another guest {left}, {still} of them claimed"
    );
    if still == 0 || left > still + LEFT_MIB {
        bail!("{left} MiB are free with another guest of {memory_mib} MiB, {still} of them claimed");
    }
    Ok(other)
}
