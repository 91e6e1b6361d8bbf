//! Network namespaces without names (`namespaces(7)`, `setns(2)`): each is held by a descriptor alone, so the kernel
//! takes it away, with every interface in it, when its holders and the processes inside are gone, however they end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// A network namespace, alive at least as long as this.
pub(crate) struct Namespace {
    descriptor: OwnedFd,
}

impl Namespace {
    /// A new one with nothing in it but a loopback interface that is down. Needs `CAP_SYS_ADMIN`.
    pub(crate) fn new() -> io::Result<Self> {
        let descriptor = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                // SAFETY: NEWNET takes nothing from the thread that other threads rely on (no files, no memory),
                // and this thread ends right after.
                // Worth it: a namespace of its own for a thread needs no name, and so leaves none behind.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
                open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            });
            made.join().unwrap_or(Err(rustix::io::Errno::AGAIN))
        })?;
        Ok(Self { descriptor })
    }

    /// A path that leads to it for as long as this process holds it; for programs that want one.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd())
    }

    /// Lets `command` run inside.
    pub(crate) fn enter(&self, command: &mut Command) -> io::Result<()> {
        let descriptor = self.descriptor.try_clone()?;
        let enter = move || {
            let inside = move_into_link_name_space(descriptor.as_fd(), Some(LinkNameSpaceType::Network));
            inside.map_err(io::Error::from)
        };
        // SAFETY: between fork and exec the closure makes one system call, on a descriptor that the command owns,
        // and allocates nothing.
        // Worth it: the child is the program itself; `ip netns exec` would also give it mounts of its own.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }

    /// Runs `work` on a thread inside. Sockets opened there stay inside for good, whoever uses them.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let working = scope.spawn(|| {
                move_into_link_name_space(self.descriptor.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            match working.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}
