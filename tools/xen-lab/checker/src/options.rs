//! What the checker is asked to do: `check.NAME=NUMBER` words on the guest kernel's command line.

/// The checker's options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// MiB of memory to hold and check (`check.memory`).
    pub(crate) memory_mib: u64,
    /// Pages rewritten per second, over all threads (`check.dirty`).
    pub(crate) dirty_per_second: u64,
    /// Percent of the pages that stay zero (`check.zero`).
    pub(crate) zero_percent: u64,
    /// MiB of the disk's files to read into the page cache at start and to check there (`check.files`).
    pub(crate) files_mib: u64,
    /// Percent of a processor that each thread may use for verifying (`check.duty`).
    pub(crate) duty_percent: u64,
    /// Threads that hold and check memory, one share each (`check.threads`).
    pub(crate) threads: u64,
    /// Milliseconds between two beats on the disk's last block; 0 for none (`check.beat`).
    pub(crate) beat_ms: u64,
    /// Milliseconds that a thread sleeps to see how late it wakes; 0 for no such thread (`check.probe`).
    pub(crate) probe_ms: u64,
    /// Whether files are read past the page cache as well (`check.direct`): not where a test changes what is on the disk.
    pub(crate) direct: bool,
}

impl Options {
    /// From the kernel's command line; what is not said has its default, what is said wrongly is an error.
    pub(crate) fn parse(line: &str, processors: u64) -> Result<Self, String> {
        let mut options = Self {
            memory_mib: 16,
            dirty_per_second: 100,
            zero_percent: 25,
            files_mib: 0,
            duty_percent: 20,
            threads: processors,
            beat_ms: 0,
            probe_ms: 0,
            direct: true,
        };
        for word in line.split_whitespace() {
            let Some((name, value)) = word.strip_prefix("check.").and_then(|rest| rest.split_once('='))
            else {
                continue;
            };
            let number: u64 = value.parse().map_err(|_| format!("`{word}` has no number"))?;
            match name {
                "memory" => options.memory_mib = number,
                "dirty" => options.dirty_per_second = number,
                "zero" => options.zero_percent = number.min(100),
                "files" => options.files_mib = number,
                "duty" => options.duty_percent = number.clamp(1, 100),
                "threads" => options.threads = number.clamp(1, 64),
                "beat" => options.beat_ms = number,
                "probe" => options.probe_ms = number,
                "direct" => options.direct = number != 0,
                _ => return Err(format!("`{word}`: there is no such option")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_taken_and_mistakes_refused() {
        let options = Options::parse("console=hvc0 check.memory=64 quiet check.dirty=0", 2).unwrap();
        assert_eq!((options.memory_mib, options.dirty_per_second, options.threads), (64, 0, 2));
        assert!(Options::parse("check.memory=much", 1).is_err());
        assert!(Options::parse("check.memroy=64", 1).is_err());
    }
}
