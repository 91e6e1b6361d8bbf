//! Tests of what stands beside the drop-in: `libpageferry_xen.so` under Xen's own save helper, which calls the two functions it
//! has, and `pageferry xen`, which runs xl with our helper below or puts it where every xl finds it.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Needs, Pair, Test, Tier, left};
use crate::guest::{Guest, Kind};
use crate::host::Host;
use crate::lab::Lab;
use crate::moves::{self, Helper, Migration, PORT, PROGRAM};
use crate::wait;

/// Where guests are saved to.
const FILE: &str = "/root/saved";

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = vec![
        Test::new(pair, "library/tour-pvh", Tier::Full, Needs::Library, |lab| under_stock(lab, Kind::Pvh)),
        Test::new(pair, "program/tour-pvh", Tier::Full, Needs::Program, program),
        Test::new(pair, "program/installed", Tier::Full, Needs::Program, installed),
    ];
    if pair.migrates_live(Kind::Pv) {
        tests.push(Test::new(pair, "library/tour-pv", Tier::Full, Needs::Library, |lab| {
            under_stock(lab, Kind::Pv)
        }));
    }
    tests
}

/// One guest: saved through the library and restored by stock, saved by stock and restored through the library, migrated
/// through the library at both ends.
fn under_stock(lab: &Lab, kind: Kind) -> Result<()> {
    let (host, guest) = (lab.host(1), Guest::small(kind));
    for number in 1..=2 {
        moves::put_library(lab.host(number))?;
    }
    let mut count = guest.create(host)?;
    refuses_as_ours(
        host,
        &format!("PAGEFERRY_MAX_ROUNDS=0 xl save {} {FILE}", guest.name),
        "PAGEFERRY_MAX_ROUNDS is wrong",
    )?;
    count = guest.counts_on(host, count).context("after a save that was refused")?;
    for (saver, restorer) in [(Helper::Library, Helper::Stock), (Helper::Stock, Helper::Library)] {
        moves::save(&guest, host, FILE, saver)?;
        if restorer == Helper::Library {
            host.run(&format!("head -c 300000 {FILE} > {FILE}.short"))?;
            refuses_as_ours(host, &format!("xl restore {FILE}.short"), "at byte ")?;
        }
        count = moves::restore(&guest, host, FILE, count, restorer)?;
        count = guest
            .verifies_all(host, count)
            .with_context(|| format!("saved by {saver}, restored by {restorer}"))?;
    }
    count = lab.migrate(&guest, 1, count, &Migration::new(Helper::Library, Helper::Library))?;
    guest.verifies_all(lab.host(2), count)?;
    left::nothing(lab, Helper::Library)?;
    guest.destroy(lab.host(2))
}

/// With the library, a command of xl's fails in our words: it is the library that is asked, and its words reach xl.
fn refuses_as_ours(host: &Host, command: &str, words: &str) -> Result<()> {
    let command = format!("{}{command}", Helper::Library.environment());
    let said = host.attempt(&command, wait::limit(120))?;
    if said.code == 0 || !said.text().contains(words) {
        bail!("`{command}` was to fail with `{words}`, and ended with {}:\n{}", said.code, said.text());
    }
    Ok(())
}

/// Installed, an xl that knows nothing of it uses ours; uninstalled, Xen's own, to the byte. Either twice is no error.
fn installed(lab: &Lab) -> Result<()> {
    let (host, guest) = (lab.host(1), Guest::small(Kind::Pvh));
    let digest = || host.run("sha256sum < $(readlink -f /usr/lib/xen-4.*/bin/libxl-save-helper)");
    let stock = digest()?;
    let before = guest.create(host)?;
    let travelled = (|| {
        for _ in 0..2 {
            host.run(&format!("{PROGRAM} xen install"))?;
        }
        let saved = host.run_within(&format!("xl -vvv save {} {FILE} 2>&1", guest.name), wait::limit(300))?;
        let before = guest.counted(host, before)?;
        let restored = host.run_within(&format!("xl -vvv restore {FILE} 2>&1"), wait::limit(300))?;
        for (done, words) in [("saves", saved), ("restores", restored)] {
            if !words.contains("pageferry-save-helper: debug: starting") {
                bail!("an xl that {done} does not use what was installed:\n{words}");
            }
        }
        guest.is_back(host, before)
    })();
    for _ in 0..2 {
        host.run(&format!("{PROGRAM} xen uninstall"))?;
    }
    let restored = travelled?;
    if digest()? != stock || !host.run("dpkg-divert --list '*save-helper*'")?.is_empty() {
        bail!("uninstalled, Xen's own helper is not what and where it was");
    }
    moves::save(&guest, host, FILE, Helper::Stock)?;
    let after = moves::restore(&guest, host, FILE, restored, Helper::Stock)?;
    guest.verifies_all(host, after)?;
    guest.destroy(host)
}

/// One guest through `pageferry xen save`, `restore` and `migrate`, and what the last one says of a guest that is not there.
fn program(lab: &Lab) -> Result<()> {
    let (host, target, guest) = (lab.host(1), lab.host(2), Guest::small(Kind::Pvh));
    let limit = wait::limit(300);
    let before = guest.create(host)?;
    host.run_within(&format!("{PROGRAM} xen save {} {FILE}", guest.name), limit)?;
    if guest.domain(host)?.is_some() {
        bail!("{} is still there after it was saved", guest.name);
    }
    host.run_within(&format!("{PROGRAM} stream verify {FILE}"), limit)?;
    let saved = guest.counted(host, before)?;
    host.run_within(&format!("{PROGRAM} xen restore {FILE}"), limit)?;
    let restored = guest.is_back(host, saved)?;

    let receive = format!(
        "exec socat TCP-LISTEN:{PORT},reuseaddr EXEC:\"env {} xl migrate-receive\",nofork",
        Helper::Ours.environment()
    );
    let receiving = target.start(&receive, limit + Duration::from_secs(10));
    let over = format!("socat -b 262144 -t 600 - TCP:{}:{PORT},retry=100,interval=0.1", target.address());
    let send = format!("{PROGRAM} xen migrate {} --over '{over}' --max-downtime 200ms", guest.name);
    let sent = host.attempt(&send, limit)?;
    if sent.code != 0 {
        target.run("pkill -x socat; true")?;
        bail!("`{send}` ended with {}:\n{}\n{}", sent.code, sent.text(), receiving.wait()?.text());
    }
    receiving.wait()?;
    let moved = guest.counts_on(target, restored)?;
    guest.verifies_all(target, moved)?;
    left::nothing(lab, Helper::Ours)?;

    let absent = host.attempt(&send, limit)?;
    if absent.code != 7 || !absent.text().contains("xl finds no domain") {
        bail!("of a guest that is not there it says, with {}:\n{}", absent.code, absent.text());
    }
    guest.destroy(target)
}
