//! Batched reads through an io_uring: the engine behind [`super::reads::SlotReads`] on any kernel that offers one.
//!
//! The ring is probed before it is trusted: its operations, waiting with a timeout, and, each with a fallback and a
//! note, registered buffers (limited by RLIMIT_MEMLOCK), registered files, and completion work deferred to the owner's
//! own calls (SINGLE_ISSUER, COOP_TASKRUN, DEFER_TASKRUN: Linux 6.1). No SQPOLL: it burns a core to gain nothing here.
//!
//! Owner: the thread of the first push. The ring starts disabled, so that it can be made elsewhere and moved there.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};

use super::reads::{Answer, Destination, ReadFile, Request};
use crate::memory::Arena;
use crate::units::{u64_of, usize_of};

/// Bytes of one registered buffer (io_uring_register(2): 1 GiB); a larger arena is read into unregistered.
const REGISTERED_BYTES_MAX: usize = 1 << 30;

/// An io_uring for reads.
pub(super) struct Uring {
    ring: IoUring,
    enabled: bool,
    fixed_buffers: bool,
    fixed_files: bool,
    fds: Vec<(i32, i32)>,
}

/// Why there is no ring, as a clause with a remedy.
fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring (Linux 5.11 or newer, CONFIG_IO_URING)".to_owned(),
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here (sysctl kernel.io_uring_disabled, or a container's seccomp profile)"
                .to_owned()
        }
        Some(libc::ENOMEM) => {
            "no locked memory left for an io_uring (raise `ulimit -l` or LimitMEMLOCK)".to_owned()
        }
        _ => format!("setting up an io_uring failed: {error}"),
    }
}

impl Uring {
    /// A ring with room for a read per slot of `arena`. `Err` is a clause that says why there is none.
    pub(super) fn new(files: &[ReadFile], arena: &Arena, notes: &mut Vec<String>) -> Result<Self, String> {
        let entries = u32::try_from(arena.slots().next_power_of_two()).map_err(|e| e.to_string())?;
        let ring = match IoUring::builder()
            .setup_clamp()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(entries)
        {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                notes.push("io_uring without deferred completions (Linux 6.1 has them)".to_owned());
                IoUring::builder().setup_clamp().setup_r_disabled().build(entries)
            }
            other => other,
        }
        .map_err(|error| explain(&error))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| explain(&error))?;
        let codes = [opcode::Read::CODE, opcode::ReadFixed::CODE, opcode::Readv::CODE];
        if !codes.iter().all(|code| probe.is_supported(*code)) || !ring.params().is_feature_ext_arg() {
            return Err("this kernel's io_uring is too old (Linux 5.11 or newer)".to_owned());
        }
        if usize_of(ring.params().sq_entries().into()) < arena.slots() {
            return Err(format!("an io_uring of {} entries is not to be had", arena.slots()));
        }
        let fds: Vec<i32> = files.iter().map(|file| file.fd.as_raw_fd()).collect();
        let fixed_files = note(notes, "files", ring.submitter().register_files(&fds));
        let fixed_buffers = arena.mapped_bytes() <= REGISTERED_BYTES_MAX && {
            let whole = libc::iovec { iov_base: arena.base().as_ptr().cast(), iov_len: arena.mapped_bytes() };
            // SAFETY: registering pins the pages, and SlotReads unmaps them only when no read is under way any more.
            // Worth it: registered, a read costs a third less CPU.
            note(notes, "buffers", unsafe { ring.submitter().register_buffers(&[whole]) })
        };
        let fds = files.iter().map(|file| (file.fd.as_raw_fd(), file.flags)).collect();
        Ok(Self { ring, enabled: false, fixed_buffers, fixed_files, fds })
    }

    /// What is registered, as an apposition.
    pub(super) fn registered(&self) -> &'static str {
        match (self.fixed_buffers, self.fixed_files) {
            (true, true) => ", registered buffers and files",
            (true, false) => ", registered buffers",
            (false, true) => ", registered files",
            (false, false) => "",
        }
    }

    /// Queues a request. The caller keeps to one a slot, so the queue never overflows.
    pub(super) fn push(&mut self, request: Request) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        let entry = self.entry(request).user_data(u64_of(request.slot));
        // SAFETY: file, buffers and pieces outlive the completion by SlotReads' invariant. Worth it: the whole point.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring has an entry per slot, and a slot one read");
        Ok(())
    }

    fn entry(&self, request: Request) -> Entry {
        let (fd, flags) = self.fds[request.file];
        // The builders take a registered file and a plain one as different types; the opcodes are few enough.
        macro_rules! build {
            ($fd:expr) => {
                match request.to {
                    Destination::Arena(address, bytes) => {
                        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                        if self.fixed_buffers {
                            opcode::ReadFixed::new($fd, address.as_ptr(), bytes, 0)
                                .offset(request.offset)
                                .rw_flags(flags)
                                .build()
                        } else {
                            opcode::Read::new($fd, address.as_ptr(), bytes)
                                .offset(request.offset)
                                .rw_flags(flags)
                                .build()
                        }
                    }
                    Destination::Pieces(pieces, count) => {
                        let count = u32::try_from(count).unwrap_or(u32::MAX);
                        opcode::Readv::new($fd, pieces.as_ptr(), count)
                            .offset(request.offset)
                            .rw_flags(flags)
                            .build()
                    }
                }
            };
        }
        if self.fixed_files {
            build!(types::Fixed(u32::try_from(request.file).unwrap_or(u32::MAX)))
        } else {
            build!(types::Fd(fd))
        }
    }

    /// Submits, waits at most `timeout` for one completion, and collects all there are.
    pub(super) fn wait(&mut self, answers: &mut Vec<Answer>, timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
            let left = types::Timespec::from(left);
            let args = types::SubmitArgs::new().timespec(&left);
            // Asking for one completion even with no time to wait is what makes the kernel do deferred work.
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => break,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::ETIME | libc::EBUSY | libc::EAGAIN) => break,
                    Some(libc::EEXIST) => {
                        return Err(io::Error::other("a reader belongs to the thread that read first"));
                    }
                    _ => return Err(error),
                },
            }
        }
        answers.extend(self.ring.completion().map(|entry| Answer {
            slot: usize_of(entry.user_data()),
            result: match usize::try_from(entry.result()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            },
        }));
        Ok(())
    }
}

/// Whether registering `what` went well; if not, a note of why.
fn note(notes: &mut Vec<String>, what: &str, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        let remedy = if error.raw_os_error() == Some(libc::ENOMEM) {
            " (raise the limit on locked memory: `ulimit -l`, or LimitMEMLOCK in the service)"
        } else {
            ""
        };
        notes.push(format!("io_uring without registered {what}, which costs some CPU: {error}{remedy}"));
    }
    result.is_ok()
}
