//! What is done with guests: saved to a file and restored from it, migrated from host to host; by stock Xen's helper or
//! by ours, at either end.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::agent::Output;
use crate::guest::{Count, Guest};
use crate::host::Host;
use crate::lab::Lab;
use crate::wait;

/// Where our helper stands in dom0.
pub const OURS: &str = "/opt/pageferry/pageferry-save-helper";
/// Where the project's program stands in dom0.
pub const PROGRAM: &str = "/opt/pageferry/pageferry";
/// Where the project's library stands in dom0.
pub const LIBRARY: &str = "/opt/pageferry/libpageferry_xen.so";
/// Where [`put_library`] puts what runs Xen's own helper over our library.
const OVER_LIBRARY: &str = "/run/lab/over-library";
/// Where each end writes down in dom0 how a drain went.
pub(crate) const DRAINS: &str = "/var/log/xen/pageferry.log";
/// Seconds a save, restore or migration may take at most.
const MOVE_SECONDS: u32 = 300;
/// The port migrations take.
pub(crate) const PORT: u16 = 9999;

/// TCP's options, for socat: probes of an idle connection, and an end to unanswered data (TCP_USER_TIMEOUT is option 18 of
/// level 6, in ms).
const PATIENCE: &str = "keepalive,keepidle=10,keepintvl=5,keepcnt=3,setsockopt-int=6:18:25000";

/// Whose helper libxl runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helper {
    /// The one that came with Xen.
    Stock,
    /// The project's.
    Ours,
    /// The one that came with Xen, with the project's library in front of its own: see [`put_library`].
    Library,
}

impl Helper {
    /// What goes before `xl` on a command line.
    pub(crate) fn environment(self) -> String {
        match self {
            Self::Stock => String::new(),
            Self::Library => format!("LIBXL_SAVE_HELPER={OVER_LIBRARY} "),
            Self::Ours => format!("LIBXL_SAVE_HELPER={OURS} "),
        }
    }
}

impl fmt::Display for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Ours => "ours",
            Self::Library => "library",
        })
    }
}

/// What goes wrong on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends.
    Cut,
    /// A record's type is one nobody knows.
    Garble,
    /// Everything waits there, until [`Lab::release`].
    Hold,
}

/// Where in libxc's stream: at the beginning of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spot {
    /// Of this number, from 0.
    Number(u32),
    /// The first of this type (docs/specs/libxc-migration-stream of Xen).
    Type(u32),
}

/// A migration.
#[derive(Debug, Clone)]
pub struct Migration {
    /// The source's helper.
    pub source: Helper,
    /// The target's helper.
    pub target: Helper,
    /// The pass that compares the target's pages with the source's (`xl migrate --debug`).
    pub verify: bool,
    /// Environment of both ends' `xl`, `NAME=VALUE` words.
    pub environment: String,
    /// What goes wrong, and where.
    pub fault: Option<(Spot, Fault)>,
    /// The most it may take.
    pub limit: Duration,
}

impl Migration {
    /// One between these helpers.
    #[must_use]
    pub fn new(source: Helper, target: Helper) -> Self {
        let limit = wait::limit(MOVE_SECONDS);
        Self { source, target, verify: false, environment: String::new(), fault: None, limit }
    }

    /// With this going wrong.
    #[must_use]
    pub fn with_fault(mut self, spot: Spot, fault: Fault) -> Self {
        self.fault = Some((spot, fault));
        self
    }

    /// The program that carries the stream to `address`. Either end gives up on a dead wire within half a minute.
    fn carrier(&self, address: &str) -> String {
        let Some((spot, fault)) = self.fault else {
            return format!(
                "socat -b 262144 -t 600 - TCP:{address}:{PORT},retry=100,interval=0.1,{PATIENCE}"
            );
        };
        let spot = match spot {
            Spot::Number(number) => format!("number:{number}"),
            Spot::Type(kind) => format!("type:{kind}"),
        };
        let fault = match fault {
            Fault::Cut => "cut",
            Fault::Garble => "garble",
            Fault::Hold => "hold",
        };
        format!("python3 /run/lab/spoil.py {address} {PORT} {spot} {fault}")
    }
}

/// How a migration went, as far as `xl` at both ends tells.
#[derive(Debug)]
pub struct Report {
    /// The sending xl's exit code and words.
    pub source: Output,
    /// The receiving xl's.
    pub target: Output,
    /// How long the sending xl took.
    pub elapsed: Duration,
}

impl Report {
    /// All that was said.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "source's xl ended with {}:\n{}\ntarget's xl ended with {}:\n{}",
            self.source.code,
            self.source.text(),
            self.target.code,
            self.target.text()
        )
    }
}

impl Lab {
    /// Migrates `guest` from host `from` to the other, live, and returns how that went, well or not.
    pub fn try_migrate(&self, guest: &Guest, from: usize, migration: &Migration) -> Result<Report> {
        let (source, target) = (self.host(from), self.host(3 - from));
        let Migration { environment, limit, .. } = migration;
        // xl has the connection itself: each process in between copies everything once more, dearly under emulation.
        let receive = format!(
            "exec socat TCP-LISTEN:{PORT},reuseaddr,{PATIENCE} EXEC:\"env {environment} {}xl -vvv migrate-receive\",nofork",
            migration.target.environment()
        );
        let receiving = target.start(&receive, *limit + Duration::from_secs(10));
        let begun = Instant::now();
        let verify = if migration.verify { "--debug" } else { "" };
        // The receiver may not listen yet: the sender asks again.
        let send = format!(
            "{environment} {}xl -vvv migrate {verify} -s '' {} '{}'",
            migration.source.environment(),
            guest.name,
            migration.carrier(&target.address())
        );
        let sent = source.attempt(send.trim_start(), *limit);
        let elapsed = begun.elapsed();
        if sent.is_err() && !receiving.is_finished() {
            // Nobody will come any more.
            target.run("pkill -x socat; true")?;
        }
        let received = receiving.wait();
        let sent = sent.with_context(|| match &received {
            Ok(received) => format!("the target's xl said:\n{}", received.text()),
            Err(error) => format!("the target: {error:#}"),
        })?;
        let Migration { source, target, .. } = migration;
        let outcome = if sent.code == 0 { "migrates" } else { "does not migrate" };
        eprintln!(
            "    {} {outcome} from host {from}, {source} to {target}: {:.1} s",
            guest.name,
            elapsed.as_secs_f64()
        );
        Ok(Report { source: sent, target: received?, elapsed })
    }

    /// Waits until an end on `host` notes of itself something that `so` says yes to.
    pub(crate) fn wait_noted(&self, host: usize, what: &str, so: impl Fn(&Value) -> bool) -> Result<()> {
        wait::until(what, wait::limit(120), Duration::from_millis(100), || {
            let said = self.host(host).run(&format!("{PROGRAM} status --json"))?;
            let notes = said.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
            Ok(if notes.iter().any(&so) { Ok(()) } else { Err(said) })
        })
    }

    /// Forgets that one was held, before the next from `host` is to be.
    pub fn hold_anew(&self, host: usize) -> Result<()> {
        self.host(host).run("rm -f /run/lab/held /run/lab/released").map(drop)
    }

    /// Waits until a migration from `host` is held.
    pub fn wait_held(&self, host: usize) -> Result<()> {
        wait::until("the stream to be held", wait::limit(120), Duration::from_millis(500), || {
            let there = self.host(host).attempt("test -e /run/lab/held", wait::limit(30))?;
            Ok(if there.code == 0 { Ok(()) } else { Err("it goes on, or has not begun") })
        })
    }

    /// Lets a held migration from `host` go on.
    pub fn release(&self, host: usize) -> Result<()> {
        self.host(host).run("touch /run/lab/released").map(drop)
    }

    /// Migrates `guest`, which counted to `before` on host `from`, to the other, live; waits until it counts on there and
    /// sees that it is gone from `from`.
    pub fn migrate(&self, guest: &Guest, from: usize, before: Count, migration: &Migration) -> Result<Count> {
        let to = 3 - from;
        let report = self.try_migrate(guest, from, migration)?;
        if report.source.code != 0 {
            bail!("{} from host {from} to {to}: the migration failed:\n{}", guest.name, report.text());
        }
        let after = guest.is_back(self.host(to), before);
        let after =
            after.with_context(|| format!("after its migration, of which was said:\n{}", report.text()))?;
        if let Some(domain) = guest.domain(self.host(from))? {
            bail!(
                "{} is still on host {from}, as domain {domain}, after its migration:\n{}",
                guest.name,
                report.text()
            );
        }
        if migration.verify {
            no_difference(&report, migration.target)?;
        }
        Ok(after)
    }
}

/// The number before `words` in the first line of `text` that has one there.
pub(crate) fn number_before(text: &str, words: &str) -> Option<u64> {
    text.lines().find_map(|line| line.split_once(words)?.0.split_whitespace().next_back()?.parse().ok())
}

/// The pass that compares must have found no page that differs. Ours says how many it has compared; stock names pages that
/// differ (`verify pfn 0x... failed`) and says nothing else.
fn no_difference(report: &Report, target: Helper) -> Result<()> {
    let text = report.target.text();
    let differs = |line: &&str| {
        line.contains("verify pfn") || line.contains("verify:") && !line.contains("verify: none of")
    };
    if let Some(line) = text.lines().find(differs) {
        bail!("a page differs: {line}");
    }
    if target == Helper::Ours && !text.contains("verify: none of") {
        bail!("nothing shows that pages were compared:\n{text}");
    }
    Ok(())
}

/// Makes [`Helper::Library`] possible on `host`.
pub fn put_library(host: &Host) -> Result<()> {
    let script = format!(
        "#!/bin/sh\nfor helper in /usr/lib/xen-*/bin/libxl-save-helper; do\n    LD_PRELOAD={LIBRARY} exec \"$helper\" \"$@\"\n\
         done\n"
    );
    host.put(OVER_LIBRARY, script.as_bytes())?;
    host.run(&format!("chmod +x {OVER_LIBRARY}")).map(drop)
}

/// Saves `guest` on `host` to `file` with this helper; the guest is gone then.
pub fn save(guest: &Guest, host: &Host, file: &str, helper: Helper) -> Result<()> {
    let command = format!("{}xl -vvv save {} {file}", helper.environment(), guest.name);
    let what = format!("{} is saved by {helper}", guest.name);
    wait::timed(&what, || host.run_within(&command, wait::limit(MOVE_SECONDS)))?;
    match guest.domain(host)? {
        None => Ok(()),
        Some(domain) => bail!("{} is still there, as domain {domain}, after it was saved", guest.name),
    }
}

/// Restores `guest`, which had counted to `before`, on `host` from `file` with this helper, and waits until it counts on.
pub fn restore(guest: &Guest, host: &Host, file: &str, before: Count, helper: Helper) -> Result<Count> {
    // Between the count that the caller knows and its end it may have counted on.
    let before = guest.counted(host, before)?;
    let command = format!("{}xl -vvv restore {file}", helper.environment());
    let what = format!("{} is restored by {helper}", guest.name);
    let said = wait::timed(&what, || host.attempt(&command, wait::limit(MOVE_SECONDS)))?;
    if said.code != 0 {
        bail!("host {}: `{command}` ended with {}:\n{}", host.number(), said.code, said.text());
    }
    let after = guest.is_back(host, before);
    after.with_context(|| format!("after its restore, of which was said:\n{}", said.text()))
}
