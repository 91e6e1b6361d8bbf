//! seccomp(2): a filter over the system calls of every thread of this process. What the filter says is the caller's; here is
//! only the call, which the crate that compiles filters makes without `SECCOMP_FILTER_FLAG_LOG`.

use std::io;

/// An instruction of a filter: `struct sock_filter` of `linux/filter.h`.
pub type Instruction = libc::sock_filter;

/// Has every thread of this process go by `program` from now on, in addition to what they went by before; with `log` the
/// kernel writes down what is refused, where it can (Linux 4.14). The calling thread must have given up new privileges.
///
/// # Errors
/// What `seccomp(2)` says; a thread that goes by another filter than this one.
pub fn filter_all_threads(program: &mut [Instruction], log: bool) -> io::Result<()> {
    let len =
        u16::try_from(program.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let logging = if log { libc::SECCOMP_FILTER_FLAG_LOG } else { 0 };
    let call = |flags: libc::c_ulong| {
        // SAFETY: the kernel copies the program, whose address and length are those of a live slice, and checks it before
        // it is used. Worth it: a refused call that nobody can see is looked for in vain.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter) }
    };
    let mut answer = call(libc::SECCOMP_FILTER_FLAG_TSYNC | logging);
    if answer < 0 && log && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        answer = call(libc::SECCOMP_FILTER_FLAG_TSYNC);
    }
    match answer {
        0 => Ok(()),
        ..0 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!("thread {thread} goes by another filter"))),
    }
}
