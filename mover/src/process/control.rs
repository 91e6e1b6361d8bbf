//! The control protocol between an engine and a guest process: messages, descriptors, rules.
//!
//! A unix `SOCK_SEQPACKET` socket; a packet is one JSON message, a [`Request`] one way and a [`Reply`] the other,
//! strictly in turn. Descriptors travel with the reply (`SCM_RIGHTS`):
//!
//! | reply | descriptors, in this order |
//! |---|---|
//! | [`Reply::Attached`] | guest memory, pagemap of the guest, log of disk writes, gate, and a userfaultfd unless [`FaultFd::Absent`] |
//! | [`Reply::State`] | a memory file with the state |
//!
//! `LoadState` and `Keep` carry a memory file the other way. What was kept comes back behind the userfaultfd when a target
//! attaches again.
//!
//! ```text
//!              Pause           Release
//!   running ---------> paused ---------> released ---> Destroy: the process ends
//!      ^  <---------     |    <---------
//!      |    Resume       |     Reclaim
//!      |                 `-- SaveState
//!      |
//!      `----- loaded <--------- incoming
//!       Start         LoadState
//! ```
//!
//! One engine is attached at a time; a second one is told so. `Status` and `Check` need no attachment, on any number
//! of connections. When an attached engine's connection ends, however it ends:
//!
//! | attached as | guest is | then |
//! |---|---|---|
//! | source | running | it runs on, unthrottled |
//! | source | paused | it resumes |
//! | source | released | it stays so: only `Reclaim` or `Destroy` by a new attachment change that |
//! | target | incoming, loaded | the process ends and leaves nothing |
//! | target | running, pages held back | vCPUs wait at the absent pages; a new target attachment gets the same userfaultfd |
//! | target | running | it runs on |
//!
//! The guest process keeps its own copy of a target's userfaultfd until `HoldsDone`, so that the kernel never takes
//! the registration of absent pages away, which would let them read as zero.

use serde::{Deserialize, Serialize};

/// Which end of a migration an engine is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It moves the guest away.
    Source,
    /// It brings the guest here.
    Target,
}

/// What an engine or a tool asks of a guest process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Attach this connection. Answered by [`Reply::Attached`].
    Attach {
        /// As what.
        role: Role,
        /// Whose migration this is: any word, shown to a second engine that tries.
        migration: String,
    },
    /// Stop all vCPUs between two operations, disk I/O finished. Source, while running.
    Pause,
    /// Go on. Source, while paused.
    Resume,
    /// The state outside memory. Source, while paused. Answered by [`Reply::State`] and a memory file.
    SaveState,
    /// Take the state outside memory from the memory file that comes along. Target, while incoming.
    LoadState {
        /// Its length.
        bytes: u64,
    },
    /// Keep the memory file that comes along until `HoldsDone`, for a target that attaches again. Target, before the start.
    Keep {
        /// Its length.
        bytes: u64,
    },
    /// Run. Target, once loaded.
    Start {
        /// Whether pages are held back: the guest then keeps its copy of the userfaultfd until `HoldsDone`.
        holding: bool,
    },
    /// End at once: outstanding pages can't be had any more. Target, once started.
    Stop,
    /// Slow down to `percent` (1 to 100) of the guest's rates. Source.
    Throttle {
        /// 100 is full speed.
        percent: u8,
    },
    /// Give the paused guest up: it is not resumed when the connection ends. Source, while paused.
    Release,
    /// Take a released guest back, still paused. Source.
    Reclaim,
    /// End the process and free its memory. Source, once released; or by anyone while nobody is attached.
    Destroy,
    /// No page is held back any more: the guest drops its copy of the userfaultfd. Target, once started.
    HoldsDone,
    /// How it is. Answered by [`Reply::Status`].
    Status,
    /// Check every page now, in full. Answered by [`Reply::Status`] once that is done. Needs a running or paused
    /// guest; may take seconds.
    Check,
}

/// What a guest process answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To `Attach`.
    Attached(Attached),
    /// Done; to requests with nothing to tell.
    Done,
    /// To `SaveState`.
    State {
        /// Length of the state in the memory file that comes along.
        bytes: u64,
    },
    /// To `Status` and `Check`.
    Status(Box<Status>),
    /// The request was refused or failed; the connection stays as it was.
    Failed {
        /// Cause and remedy.
        sentence: String,
    },
}

/// What an engine learns when it attaches.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attached {
    /// The guest's name.
    pub guest: String,
    /// Bytes of guest memory, a whole number of pages.
    pub memory_bytes: u64,
    /// Where the guest process itself has its memory mapped: the addresses its userfaultfd and pagemap speak of.
    pub base_address: u64,
    /// The guest's process.
    pub pid: u32,
    /// vCPU threads.
    pub vcpus: u32,
    /// Its disks, in the order of [`crate::units::DiskId`].
    pub disks: Vec<GuestDisk>,
    /// What kind of userfaultfd came along. It is new (its features not chosen yet) but for a target that attaches
    /// again while pages are held back.
    pub fault_fd: FaultFd,
    /// What the guest is doing.
    pub phase: Phase,
    /// Length of what an earlier target had the guest keep, if that comes along.
    #[serde(default)]
    pub kept_bytes: Option<u64>,
}

/// One of a guest's disks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestDisk {
    /// "disk0", "disk1".
    pub name: String,
    /// Its image file.
    pub path: String,
    /// The image's size.
    pub bytes: u64,
}

/// The userfaultfd that came along.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultFd {
    /// Handles every fault.
    Full,
    /// Handles faults from user mode only (`UFFD_USER_MODE_ONLY`). Enough here: the guest touches each page from
    /// user mode before it hands it to the kernel.
    UserModeOnly,
    /// The kernel refused.
    Absent {
        /// What it said, and what to do.
        why: String,
    },
}

/// What a guest is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Filling its memory.
    Booting,
    /// Waiting for a migration to fill it.
    Incoming,
    /// Its state is there, its vCPUs have not started.
    Loaded,
    /// Running.
    Running,
    /// Paused by a source engine.
    Paused,
    /// Paused and given up by a source engine.
    Released,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Booting => "booting",
            Self::Incoming => "waiting for its memory",
            Self::Loaded => "loaded but not started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Released => "given up to the other end",
        })
    }
}

/// How a guest is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub guest: String,
    /// Its process.
    pub pid: u32,
    /// What it is doing.
    pub phase: Phase,
    /// The migration an engine is attached for.
    pub migration: Option<String>,
    /// Whether pages are still held back from it.
    pub holding: bool,
    /// Its workload's name.
    pub workload: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Milliseconds since this process took it up.
    pub uptime_ms: u64,
    /// Speed it is allowed, percent.
    pub throttle_percent: u8,
    /// What it has done since its birth; moves with it.
    pub work: Work,
    /// Access times since this process took it up.
    pub access: AccessTimes,
    /// Of these, how long was waited for pages that were not there while some were held back.
    #[serde(default)]
    pub waits: AccessTimes,
    /// Pages checked in this process, by the scrubber, by accesses and on demand.
    pub pages_checked: u64,
    /// Times the scrubber went through all of memory in this process.
    pub full_checks: u64,
    /// Pages found wrong in this process.
    pub wrong_pages: u64,
    /// The first of them.
    pub first_wrong: Vec<WrongPage>,
}

/// What a guest has done since its birth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Work {
    /// Operations: page accesses, reads, writes of every kind.
    pub operations: u64,
    /// Bytes of anonymous memory dirtied.
    pub dirtied_bytes: u64,
    /// Bytes read from its disks.
    pub read_bytes: u64,
    /// Bytes written to its disks.
    pub written_bytes: u64,
    /// Reads that the page cache answered, in pages.
    pub cache_hits: u64,
    /// Pages evicted from the page cache.
    pub evicted: u64,
    /// Operations left out because the guest fell behind its rates (a pause, a slow disk, absent pages), in bytes.
    pub skipped_bytes: u64,
    /// Disk operations that failed; the pages concerned were left out.
    pub disk_errors: u64,
}

/// A histogram of how long an access to a page took, eight buckets to a power of two: bucket 8k + m counts those from
/// (8 + m) * 2^k / 8 nanoseconds on, up to where the next begins.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AccessTimes {
    /// Counts, up to the last that is not zero.
    pub buckets: Vec<u64>,
    /// All time in accesses, nanoseconds.
    pub total_ns: u64,
}

impl AccessTimes {
    /// Buckets there can be: up to 2^40 ns, 18 minutes.
    pub const BUCKETS: usize = 8 * 40;

    /// The bucket of an access that took so many nanoseconds.
    #[must_use]
    pub fn bucket(ns: u64) -> usize {
        let (ns, limit) = (ns.max(1), (1 << 40) - 1);
        let power = ns.min(limit).ilog2();
        let eighths = (u128::from(ns.min(limit)) * 8) >> power;
        crate::units::usize_of(u64::from(power) * 8 + u64::try_from(eighths & 7).unwrap_or(0))
    }
    /// Where a bucket ends, in nanoseconds, rounded up.
    fn end_ns(bucket: usize) -> u64 {
        let (power, eighth) = (bucket / 8, crate::units::u64_of(bucket % 8));
        ((8 + eighth + 1) << power.min(50)).div_ceil(8)
    }
    /// This and `other` counted together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let count = |times: &Self, n: usize| times.buckets.get(n).copied().unwrap_or(0);
        let buckets = (0..self.buckets.len().max(other.buckets.len()))
            .map(|n| count(self, n) + count(other, n))
            .collect();
        Self { buckets, total_ns: self.total_ns + other.total_ns }
    }
    /// Accesses counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
    /// What was counted here and not yet in `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |n: usize| earlier.buckets.get(n).copied().unwrap_or(0);
        let buckets =
            self.buckets.iter().enumerate().map(|(n, count)| count.saturating_sub(before(n))).collect();
        Self { buckets, total_ns: self.total_ns.saturating_sub(earlier.total_ns) }
    }
    /// The time in nanoseconds that `share` (0 to 1) of the accesses stayed under, as the upper bound of its bucket;
    /// `None` without accesses.
    #[must_use]
    pub fn quantile_ns(&self, share: f64) -> Option<u64> {
        let count = self.count();
        let wanted = crate::units::f64_of(count) * share.clamp(0.0, 1.0);
        let mut seen = 0;
        let at = self.buckets.iter().position(|n| {
            seen += n;
            *n > 0 && crate::units::f64_of(seen) >= wanted
        })?;
        Some(Self::end_ns(at))
    }
}

/// A page whose content is not what it must be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WrongPage {
    /// Its frame.
    pub pfn: u64,
    /// What it holds: "free", "cache", "anonymous", "metadata".
    pub kind: String,
    /// How it was noticed and what it means.
    pub what: String,
    /// Content hash it must have.
    pub expected: u64,
    /// Content hash found.
    pub found: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_name_the_upper_bound_of_their_bucket() {
        let mut times = AccessTimes { buckets: vec![0; AccessTimes::BUCKETS], total_ns: 0 };
        for (ns, count) in [(1000, 98), (4000, 1), (400_000, 1)] {
            times.buckets[AccessTimes::bucket(ns)] += count;
        }
        // Of 512 to 1024 the eighths are 64 long, of 2048 to 4096 they are 256, of 262,144 on 32,768.
        assert_eq!(times.quantile_ns(0.5), Some(1024));
        assert_eq!(times.quantile_ns(0.99), Some(4096));
        assert_eq!(times.quantile_ns(1.0), Some(262_144 + 5 * 32_768));
        assert_eq!(AccessTimes::default().quantile_ns(0.5), None);
        let few = |counts: &[u64], total_ns| AccessTimes { buckets: counts.to_vec(), total_ns };
        let (early, late) = (few(&[0, 98, 1], 5), few(&[0, 98, 1, 0, 3], 9));
        assert_eq!(late.since(&early), few(&[0, 0, 0, 0, 3], 4));
        assert_eq!(early.plus(&few(&[1, 2, 0, 4], 2)), few(&[1, 100, 1, 4], 7));
    }

    #[test]
    fn every_time_lies_below_its_buckets_end_and_not_below_the_one_before() {
        for ns in (0..40).flat_map(|power| [1u64 << power, (1 << power) * 3 / 2, (1 << power) + 1]) {
            let bucket = AccessTimes::bucket(ns);
            assert!(ns < AccessTimes::end_ns(bucket).max(2), "{ns} in {bucket}");
            assert!(bucket < 8 || ns >= AccessTimes::end_ns(bucket - 1) - 1, "{ns} in {bucket}");
        }
        assert_eq!(AccessTimes::bucket(u64::MAX), AccessTimes::BUCKETS - 1);
    }

    #[test]
    fn an_unknown_request_or_field_is_refused() {
        assert!(serde_json::from_str::<Request>(r#"{"request":"fly"}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"request":"throttle","percent":5,"x":1}"#).is_err());
        assert_eq!(
            serde_json::from_str::<Request>(r#"{"request":"throttle","percent":5}"#).unwrap(),
            Request::Throttle { percent: 5 }
        );
    }
}
