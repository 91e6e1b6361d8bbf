//! A process that lets everybody else go first.

use std::io;

/// `ioprio_set(2)`: this process; the class for who reads when nobody else does.
const WHO_PROCESS: libc::c_int = 1;
const CLASS_IDLE: libc::c_int = 3 << 13;

/// Takes the last place for processors and disks (the latter where the device's scheduler knows places). A sentence for each that was
/// refused.
#[must_use = "a sentence for each that failed"]
pub fn yield_to_all() -> Vec<String> {
    let cpu = rustix::process::nice(19).map(drop).map_err(io::Error::from);
    // SAFETY: the call takes numbers alone. Worth it: neither libc nor rustix has it, and a scan beside a guest's own reads is
    // what it is for.
    let disk = match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, CLASS_IDLE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    [("processors", cpu), ("disks", disk)]
        .into_iter()
        .filter_map(|(what, outcome)| outcome.err().map(|error| (what, error)))
        .map(|(what, error)| format!("this does not go behind others at the {what}: {error}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// nextest runs each test in a process of its own, so this one may go last.
    #[test]
    fn the_last_place_is_taken() {
        assert_eq!(yield_to_all(), [""; 0]);
        assert_eq!(rustix::process::nice(0).unwrap(), 19);
        // SAFETY: numbers alone.
        let class = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
        assert_eq!(class, i64::from(CLASS_IDLE));
    }
}
