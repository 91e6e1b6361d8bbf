//! What a migration tells its user while it runs and when it has ended. Scripts rely on the JSON keys.

use serde::{Deserialize, Serialize};

/// How pages travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What libxenguest does: every page, zero or not, one connection, at most 5 rounds or under 50 dirty pages.
    Stock,
    /// Zero pages elided, lanes, own round policy, no references.
    Plain,
    /// Disk-duplicated pages as references, all loaded before the restart.
    Refer,
    /// As `refer`, but the guest restarts first and the rest is loaded behind it.
    Lazy,
}

impl Mode {
    /// All, in the order a comparison shows them.
    pub const ALL: [Self; 4] = [Self::Stock, Self::Plain, Self::Refer, Self::Lazy];

    /// Its name on the command line and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Plain => "plain",
            Self::Refer => "refer",
            Self::Lazy => "lazy",
        }
    }
    /// Whether pages may travel as references.
    #[must_use]
    pub fn refers(self) -> bool {
        matches!(self, Self::Refer | Self::Lazy)
    }
}

/// Where a migration stands. The source's phases; the target's are the same seen from there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Dialling, handshake, disks compared, lanes opened.
    Connect,
    /// Dirty log armed, index brought up to date.
    Arm,
    /// Rounds while the guest runs.
    Rounds,
    /// Guest paused, the last round and the state outside memory on their way.
    Stop,
    /// Digests of every page compared, where asked for.
    Verify,
    /// Guest handed over.
    Commit,
    /// Guest runs on the target; outstanding pages are loaded.
    Drain,
    /// Over.
    Done,
}

/// Something that happened, as it happens. One JSON object each on request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A phase begins.
    Phase {
        /// Milliseconds since the migration began.
        at_ms: f64,
        /// Which one.
        phase: Phase,
    },
    /// A round begins.
    Round {
        /// Milliseconds since the migration began.
        at_ms: f64,
        /// Its number, from 1.
        round: u32,
        /// Pages to send in it.
        pages: u64,
    },
    /// A regular sample, about ten a second.
    Sample(Sample),
    /// Something the user should know and that ends nothing: a disk left out, a fallback taken.
    Notice {
        /// Milliseconds since the migration began.
        at_ms: f64,
        /// The sentence.
        text: String,
    },
}

/// A regular sample of a running migration.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since the migration began.
    pub at_ms: f64,
    /// Current round.
    pub round: u32,
    /// Pages known dirty and not yet sent again, and those of the round still to go.
    pub pages_left: u64,
    /// Bytes over the link so far, headers included.
    pub link_bytes: u64,
    /// Bytes read from disks on the target so far.
    pub disk_bytes: u64,
    /// Link rate over the last sample, bytes a second.
    pub link_rate: f64,
    /// Disk rate over the last sample, bytes a second.
    pub disk_rate: f64,
    /// Pages referenced and not yet loaded.
    pub outstanding: u64,
    /// Predicted time to the restart, where there is a prediction.
    pub restart_in_ms: Option<f64>,
    /// Whether the guest is paused right now.
    pub paused: bool,
    /// Pages by what became of them so far. A target knows of the last three alone.
    #[serde(default)]
    pub pages: PageCounts,
    /// The downtime, once it is over.
    #[serde(default)]
    pub downtime_ms: Option<f64>,
}

/// Pages, by what became of them; transmissions, so that one sent in two rounds counts twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageCounts {
    /// Told to be zero.
    pub zero: u64,
    /// Sent as bytes, refetches not counted.
    pub data: u64,
    /// Sent as references.
    pub by_reference: u64,
    /// Sent after a reference did not hold.
    pub refetched: u64,
    /// References whose loaded bytes were checked.
    pub checked: u64,
    /// Those whose bytes on disk were not the page's.
    pub check_failures: u64,
    /// Faults of the guest on outstanding pages that were answered.
    pub faults_served: u64,
}

/// Where events go. Called from the control path only; must not block for long.
pub trait Observer: Send + Sync {
    /// Takes one.
    fn event(&self, event: Event);
}

/// An observer that drops everything.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}

/// The end of a successful migration, as JSON. The first group of keys is promised to scripts.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Mode, by name.
    pub mode: String,
    /// Workload or guest name.
    pub workload: String,
    /// Guest size.
    pub guest_bytes: u64,
    /// From the start until the source is not needed any more (verification taken out).
    pub total_ms: f64,
    /// From the pause until the target's guest is known to run, seen from the source (verification taken out).
    pub downtime_ms: f64,
    /// From the start until the guest runs on the target (verification taken out).
    pub restart_ms: f64,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// Pages told to be zero.
    pub pages_zero: u64,
    /// Pages whose bytes were sent (refetches not counted).
    pub pages_data: u64,
    /// Pages sent as references.
    pub pages_by_reference: u64,
    /// Pages sent after a reference did not hold.
    pub pages_refetched: u64,
    /// Pages outstanding at the restart.
    pub pages_lazy: u64,
    /// Faults on held pages answered.
    pub faults_served: u64,
    /// Bytes sent by the source, all connections, headers included.
    pub link_bytes: u64,
    /// Bytes read from disks by the target.
    pub disk_bytes: u64,
    /// Pages compared with the digest the source took at the pause.
    pub verified_pages: u64,
    /// Pages of those that differed.
    pub mismatched_pages: u64,
    /// Lanes.
    pub lanes: u32,
    /// How sent pages left this host: "encrypted" (TLS), or in the clear by "copy" or "zero-copy" of the kernel's.
    pub send_path: String,
    /// How referenced pages were loaded: "none", "staged", "direct".
    pub load_path: String,
    /// CPU time of the source's engine.
    pub cpu_ms_source: f64,
    /// CPU time of the target's engine.
    pub cpu_ms_target: f64,

    /// Time the verification pass took while the guest was paused; only `--verify` spends it.
    pub verify_ms: f64,
    /// References whose loaded bytes were checked.
    pub pages_checked: u64,
    /// References whose bytes on disk were not the page's.
    pub check_failures: u64,
    /// Bytes of state outside memory.
    pub state_bytes: u64,
    /// What the downtime consists of, in order.
    pub downtime_parts: Vec<Part>,
    /// Highest resident memory of the source's engine beyond the guest, mapped index apart.
    pub extra_memory_source_bytes: u64,
    /// The same of the target's.
    pub extra_memory_target_bytes: u64,
    /// Bytes of the index mapped on the source.
    pub index_bytes: u64,
}

/// A named piece of the downtime.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its length.
    pub ms: f64,
}
