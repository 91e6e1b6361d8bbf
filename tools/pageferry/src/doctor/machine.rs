//! Probes of what the machine and this process's limits give.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::Capability;
use crate::units::show_bytes;

/// Bit of CAP_IPC_LOCK in a capability set (linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;
/// Locked memory an end uses for its staging slots and rings.
pub(super) const MEMLOCK_WANTED: u64 = 64 << 20;

/// Processors and memory.
pub(super) fn processors() -> Capability {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let free = meminfo("MemAvailable").map_or_else(|| "unknown".to_owned(), show_bytes);
    let found = format!("{processors} this process may run on; memory available: {free}");
    let this = Capability::optional("processors", "the two ends share what there is");
    if processors >= 2 {
        this.yes(found)
    } else {
        this.partly(
            found,
            "give this machine, container or session two processors or more (`taskset`, cpusets)",
        )
    }
}

/// The others.
pub(super) fn probes() -> Vec<Capability> {
    vec![huge_pages(), shared_huge_pages(), locked_memory()]
}

/// A value of /proc/meminfo in bytes.
fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn huge_pages() -> Capability {
    let this =
        Capability::optional("reserved huge pages", "staging buffers use more of the TLB: some CPU time");
    let directory = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let remedy = "as root: sysctl vm.nr_hugepages=64";
    match (number(&format!("{directory}/nr_hugepages")), number(&format!("{directory}/free_hugepages"))) {
        (Some(all), Some(free)) if free > 0 => this.yes(format!("{free} of {all} free, 2 MiB each")),
        (Some(0), _) => this.no("none reserved (the default)", remedy),
        (Some(all), _) => this.no(format!("all {all} in use"), remedy),
        (None, _) => this.no("this kernel has none of 2 MiB", "a kernel with CONFIG_HUGETLBFS"),
    }
}

fn shared_huge_pages() -> Capability {
    let this = Capability::optional(
        "huge pages in a memfd",
        "a process guest's memory is mapped in pages of 4 KiB: slower copies, nothing else",
    );
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let remedy = format!("as root: echo advise > {path}");
    match fs::read_to_string(path) {
        Ok(text) => {
            let chosen = text.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
            match chosen {
                Some(word @ ("always" | "advise" | "within_size" | "force")) => {
                    this.yes(format!("on ({word})"))
                }
                word => this.no(format!("off ({})", word.unwrap_or("unknown")), remedy),
            }
        }
        Err(_) => this.no("this kernel has none", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
    }
}

fn locked_memory() -> Capability {
    let this = Capability::optional(
        "locked memory",
        "io_uring reads without registered buffers: some CPU time; zero-copy sends may fall back to copying",
    );
    let remedy = "raise the limit (`ulimit -l`, LimitMEMLOCK= in the service, memlock in limits.conf)";
    let limit = getrlimit(Resource::Memlock).current;
    let privileged = effective_capabilities().is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1);
    match limit {
        _ if privileged => this.yes("no limit applies (CAP_IPC_LOCK)"),
        None => this.yes("unlimited"),
        Some(bytes) if bytes >= MEMLOCK_WANTED => this.yes(format!("up to {}", show_bytes(bytes))),
        Some(bytes) => {
            let wanted = show_bytes(MEMLOCK_WANTED);
            this.partly(format!("up to {}; {wanted} are enough for everything", show_bytes(bytes)), remedy)
        }
    }
}

/// This process's effective capabilities.
pub(super) fn effective_capabilities() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let set = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read_as_it_is_written() {
        let total = meminfo("MemTotal").expect("every Linux has it");
        let available = meminfo("MemAvailable").expect("every Linux has it");
        assert!(total > available && total > 1 << 20, "{total} {available}");
        assert_eq!(meminfo("Mem"), None, "only whole keys");
        assert!(effective_capabilities().is_some());
    }
}
