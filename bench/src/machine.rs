//! What the figures were measured on.

use std::fs;
use std::process::{Command, Stdio};

use serde::Serialize;

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processor, as the kernel names it.
    pub cpu: String,
    /// Cores this process may use.
    pub cores: usize,
    /// Memory in GiB.
    pub memory_gib: u64,
    /// Kernel release.
    pub kernel: String,
    /// TCP congestion control in force.
    pub congestion: String,
    /// The tree's commit, with `-dirty` where something differs from it; the package's version for an installed copy.
    pub commit: String,
}

/// Looks.
#[must_use]
pub fn describe() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?.split_once(':').map(|(_, value)| value.trim().to_owned())
            })
            .unwrap_or_else(|| "unknown".to_owned())
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib: u64 = memory.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name"),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        memory_gib: kib >> 20,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        congestion: read("/proc/sys/net/ipv4/tcp_congestion_control").trim().to_owned(),
        commit: commit(),
    }
}

/// What the figures are of.
fn commit() -> String {
    let git = Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::null())
        .output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => concat!("version ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

impl Machine {
    /// For the head of a table.
    #[must_use]
    pub fn sentence(&self) -> String {
        format!(
            "{} cores of {}, {} GiB, Linux {}, TCP {}, commit {}",
            self.cores, self.cpu, self.memory_gib, self.kernel, self.congestion, self.commit
        )
    }
}
