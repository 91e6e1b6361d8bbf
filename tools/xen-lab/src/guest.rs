//! Test guests: domains whose only program checks its memory, the shared disk and the clock, and counts on the console.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::Host;
use crate::wait;

/// How a guest is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Paravirtualised: the guest's own page tables hold machine frames.
    Pv,
    /// Hardware-virtualised, without a device model.
    Pvh,
    /// Hardware-virtualised, with QEMU as its device model.
    Hvm,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pv, Self::Pvh, Self::Hvm];

    /// As `xl` writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A guest to be.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name; one per host.
    pub name: String,
    /// How it is virtualised.
    pub kind: Kind,
    /// Its memory, in MiB: 96 (HVM: 128) or more.
    pub memory_mib: u32,
    /// Its processors.
    pub vcpus: u32,
    /// The shared disk's path in dom0; none has no disk.
    pub disk: Option<String>,
    /// MiB of its memory that the checker holds and verifies.
    pub checked_mib: u32,
    /// Pages the checker rewrites per second.
    pub dirty_per_second: u32,
    /// Percent of the checked pages that stay zero.
    pub zero_percent: u32,
    /// MiB of the shared disk's files it reads into its page cache at start.
    pub files_mib: u32,
    /// Milliseconds between two beats on the shared disk's last block; 0 for none.
    pub beat_ms: u32,
    /// Milliseconds it sleeps to see how late it wakes; 0 if it does not.
    pub probe_ms: u32,
    /// Whether it reads the files past its page cache too: not where a test changes what is on the disk.
    pub direct: bool,
}

/// The last thing a guest's console said of the checker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Its count: one more each second.
    pub number: u64,
    /// How often every checked page was verified.
    pub pass: u64,
    /// Pages rewritten so far.
    pub dirtied: u64,
    /// Pages verified so far.
    pub verified: u64,
    /// Milliseconds by the guest's clock.
    pub at_ms: u64,
}

/// Where consoles are logged.
pub(crate) const CONSOLES: &str = "/var/log/xen/console";
/// Seconds from `xl create` to the first count, at most.
const START_SECONDS: u32 = 240;
/// Seconds a running guest may take to count on, at most.
const COUNT_SECONDS: u32 = 120;

impl Guest {
    /// A small guest of this kind: 128 MiB (HVM 160), one processor, 32 MiB of it checked, 100 pages a second rewritten.
    #[must_use]
    pub fn small(kind: Kind) -> Self {
        Self {
            name: format!("{kind}-guest"),
            kind,
            memory_mib: if kind == Kind::Hvm { 160 } else { 128 },
            vcpus: 1,
            disk: Some("/dev/vdb".into()),
            checked_mib: 32,
            dirty_per_second: 100,
            zero_percent: 25,
            files_mib: 0,
            beat_ms: 0,
            probe_ms: 0,
            direct: true,
        }
    }

    /// A guest without a disk that does nothing but sleep for 50 ms and see how late it wakes: emulated, that is work enough.
    #[must_use]
    pub fn probe() -> Self {
        let (memory_mib, checked_mib, dirty_per_second) = (96, 0, 0);
        Self {
            name: "probe".into(),
            disk: None,
            memory_mib,
            checked_mib,
            dirty_per_second,
            probe_ms: 50,
            ..Self::small(Kind::Pvh)
        }
    }

    /// A guest of 192 MiB and two processors that has read 32 MiB of the shared disk's files, and goes on reading them.
    #[must_use]
    pub fn reader(kind: Kind) -> Self {
        Self { vcpus: 2, memory_mib: 192, files_mib: 32, ..Self::small(kind) }
    }

    /// The domain's configuration for xl.
    #[must_use]
    pub fn configuration(&self) -> String {
        let Self { name, kind, memory_mib, vcpus, disk, .. } = self;
        let more = match kind {
            Kind::Hvm => "vnc=0\nvga='none'\n",
            Kind::Pv | Kind::Pvh => "",
        };
        let disks = disk.iter().map(|disk| format!("'phy:{disk},xvda,w'")).collect::<String>();
        format!(
            "name='{name}'\ntype='{kind}'\nkernel='/lab/vmlinuz'\nramdisk='/lab/initrd'\nmemory={memory_mib}\n\
             vcpus={vcpus}\nextra='{}'\ndisk=[{disks}]\non_crash='preserve'\n{more}",
            self.command_line()
        )
    }

    /// The guest kernel's command line.
    fn command_line(&self) -> String {
        // Looking for an AGP bridge, port by emulated port, would take half a minute; timers and ports nobody needs, seconds.
        let more = if self.kind == Kind::Hvm { "pci=noearly hpet=disable 8250.nr_uarts=0" } else { "" };
        format!(
            "console=hvc0 quiet panic=0 {more} check.memory={} check.dirty={} check.zero={} check.files={} \
             check.beat={} check.probe={} check.direct={}",
            self.checked_mib,
            self.dirty_per_second,
            self.zero_percent,
            self.files_mib,
            self.beat_ms,
            self.probe_ms,
            u8::from(self.direct)
        )
    }

    /// Creates it on `host` and waits until it counts. What one of its name said there before is forgotten; what one said on
    /// the other host would be taken for what it says once it has moved there ([`forget_all_counts`]).
    pub fn create(&self, host: &Host) -> Result<Count> {
        let file = format!("/run/lab/{}.cfg", self.name);
        host.put(&file, self.configuration().as_bytes())?;
        self.boots_by(host, &format!("xl create -q {file}"))
    }

    /// Creates it on `host` by this command and waits until it counts.
    pub fn boots_by(&self, host: &Host, command: &str) -> Result<Count> {
        self.forget_counts(host)?;
        wait::timed(&format!("{} boots on host {}", self.name, host.number()), || {
            host.run(command)?;
            self.comes_up(host)
        })
    }

    /// Removes what it has said on `host`: what counts there from now on is another start of it.
    pub fn forget_counts(&self, host: &Host) -> Result<()> {
        host.run(&format!("rm -f {CONSOLES}/guest-{0}.log {CONSOLES}/guest-{0}--incoming.log", self.name))
            .map(drop)
    }

    /// Waits until a guest that starts on `host` counts.
    pub fn comes_up(&self, host: &Host) -> Result<Count> {
        let first = self.wait_count(host, Count::default(), wait::limit(START_SECONDS));
        first.with_context(|| format!("{} does not come to counting", self.name))
    }

    /// What its console on `host` says; nothing before its first count. An error if anything there is wrong.
    pub fn count(&self, host: &Host) -> Result<Option<Count>> {
        // A migrated guest's console is logged under the name it had when it arrived.
        let logs = format!("{CONSOLES}/guest-{0}.log {CONSOLES}/guest-{0}--incoming.log", self.name);
        let text = host.run(&format!(
            "grep -ahE 'CHECK: BAD|Kernel panic|BUG:|Oops|soft lockup|rcu.*stall|Call Trace' {logs} 2>/dev/null | head -20; \
             tail -qn 2 {logs} 2>/dev/null; true"
        ))?;
        let wrong: Vec<&str> =
            text.lines().filter(|line| !line.trim().is_empty() && !is_progress(line)).collect();
        let complaints = ["CHECK: BAD", "panic", "BUG:", "Oops", "lockup", "stall", "Call Trace"];
        if let Some(line) = wrong.iter().find(|line| complaints.iter().any(|word| line.contains(word))) {
            bail!("{} on host {} says: {}", self.name, host.number(), line.trim());
        }
        Ok(text.lines().filter_map(parse).max_by_key(|count| count.number))
    }

    /// Waits until it has counted past `since` on `host`, which shows that it runs there and finds nothing wrong.
    pub fn counts_on(&self, host: &Host, since: Count) -> Result<Count> {
        self.wait_count(host, since, wait::limit(COUNT_SECONDS))
    }

    /// What it had counted to on `host` when it was suspended there, if that is past `before`.
    pub fn counted(&self, host: &Host, before: Count) -> Result<Count> {
        Ok(self.count(host)?.filter(|count| count.number > before.number).unwrap_or(before))
    }

    /// [`Self::counts_on`] for a guest that was suspended: waits until it has read its disk again as well. Before that Linux can't be
    /// suspended once more: the thread that would connect the disk is the one that suspends.
    pub fn is_back(&self, host: &Host, since: Count) -> Result<Count> {
        // The first count may be of a read from before; between the first and the second there is a whole one.
        let first = self.counts_on(host, since)?;
        self.counts_on(host, first)
    }

    fn wait_count(&self, host: &Host, since: Count, limit: Duration) -> Result<Count> {
        self.wait_for(host, limit, &format!("count past {}", since.number), |count| {
            count.number > since.number
        })
    }

    /// Waits until every checked page has been verified since `since`: the pass then under way is not whole, the one
    /// after it is.
    pub fn verifies_all(&self, host: &Host, since: Count) -> Result<Count> {
        let what = format!("verify every page (pass {} and one more)", since.pass + 1);
        wait::timed(&format!("{} verifies every page on host {}", self.name, host.number()), || {
            self.wait_for(host, wait::limit(START_SECONDS), &what, |count| count.pass >= since.pass + 2)
        })
    }

    /// Waits until every checked page has been filled and verified for the first time.
    pub fn verifies_once(&self, host: &Host, since: Count) -> Result<Count> {
        wait::timed(&format!("{} fills its memory", self.name), || {
            self.wait_for(host, wait::limit(START_SECONDS), "verify every page", |count| {
                count.number > since.number && count.pass > 0
            })
        })
    }

    fn wait_for(
        &self,
        host: &Host,
        limit: Duration,
        what: &str,
        done: impl Fn(&Count) -> bool,
    ) -> Result<Count> {
        let what = format!("{} to {what} on host {}", self.name, host.number());
        wait::until(&what, limit, Duration::from_millis(700), || {
            Ok(match self.count(host)? {
                Some(count) if done(&count) => Ok(count),
                Some(count) => Err(format!("{count:?}")),
                None => Err("no count".to_owned()),
            })
        })
    }

    /// Its domain's number on `host`; nothing where it is not.
    pub fn domain(&self, host: &Host) -> Result<Option<u32>> {
        let output = host.attempt(&format!("xl domid {}", self.name), wait::limit(60))?;
        Ok(String::from_utf8_lossy(&output.out).trim().parse().ok())
    }

    /// Destroys it on `host`.
    pub fn destroy(&self, host: &Host) -> Result<()> {
        host.run(&format!("xl destroy {}", self.name)).map(drop)
    }
}

/// Removes what guests that are gone have said on `host`.
pub fn forget_all_counts(host: &Host) -> Result<()> {
    host.run(&format!("rm -f {CONSOLES}/guest-*.log")).map(drop)
}

fn is_progress(line: &str) -> bool {
    line.contains("CHECK: ") && line.contains(" ok ")
}

/// Reads one line of the checker's; nothing if it is another, or torn.
fn parse(line: &str) -> Option<Count> {
    let (_, rest) = line.split_once("CHECK: ")?;
    let mut words = rest.split_whitespace();
    let number = words.next()?.parse().ok()?;
    if words.next() != Some("ok") {
        return None;
    }
    // "17.204": the point left out, it is milliseconds.
    let at_ms = words.next()?.strip_prefix("t=")?.replace('.', "").parse().ok()?;
    let mut value =
        |name: &str| words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
    let pass = value("pass")?;
    let dirtied = value("dirtied")?;
    let verified = value("verified")?;
    // The last word of the line: without it, the line is torn.
    value("reads")?;
    Some(Count { number, pass, dirtied, verified, at_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read_and_torn_ones_are_not() {
        let line = "CHECK: 17 ok t=17.204 pages=4096 pass=9 dirtied=1700 verified=38912 reads=17\r";
        let count = Count { number: 17, pass: 9, dirtied: 1700, verified: 38_912, at_ms: 17_204 };
        assert_eq!(parse(line), Some(count));
        for end in 0..line.len() - 5 {
            assert_eq!(parse(&line[..end]), None, "{}", &line[..end]);
        }
        assert_eq!(parse("CHECK: BAD memory: page 1"), None);
    }
}
