//! The machine in a few words, for whoever reads figures measured on it.

use std::fs;

use mover::units::f64_of;

/// Name and value.
pub(crate) fn facts() -> Vec<(String, String)> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".to_owned());
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|text| text.strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map_or_else(|| "unknown".to_owned(), |kib| format!("{:.0} GiB", f64_of(kib) / f64_of(1 << 20)));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    [
        ("Machine", format!("{processors} processors ({model}), {memory}")),
        ("Kernel", format!("Linux {}", kernel.trim())),
        ("Pageferry", format!("{version}{}", if cfg!(debug_assertions) { ", DEBUG BUILD" } else { "" })),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// The value of the first line `key : value` of a file in /proc.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
    value.map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::facts;

    #[test]
    fn every_fact_has_a_value() {
        for (name, value) in facts() {
            assert!(!value.trim().is_empty() && !value.contains("unknown,"), "{name}: {value}");
        }
    }
}
