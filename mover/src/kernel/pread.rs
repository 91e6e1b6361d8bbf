//! Batched reads through a few threads with preadv2: the engine behind [`super::reads::SlotReads`] where there is no
//! io_uring. Takes a lock per request, which nothing notices next to a read; not the fast path, and said so in a note.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::reads::{Answer, Destination, ReadFile, Request};

/// Threads at most: a disk gains little from more, a host loses more.
const THREADS_MAX: usize = 4;

#[derive(Default)]
struct Queues {
    requests: VecDeque<Request>,
    answers: Vec<Answer>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    asked: Condvar,
    answered: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that read.
pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Requests whose answers have not been collected.
    under_way: usize,
}

impl Threads {
    pub(super) fn new(files: Arc<[ReadFile]>, slots: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for number in 0..slots.clamp(1, THREADS_MAX) {
            let (shared, files) = (Arc::clone(&shared), Arc::clone(&files));
            let name = format!("disk-read-{number}");
            threads.push(std::thread::Builder::new().name(name).spawn(move || serve(&shared, &files))?);
        }
        Ok(Self { shared, threads, under_way: 0 })
    }

    pub(super) fn push(&mut self, request: Request) {
        self.under_way += 1;
        self.shared.lock().requests.push_back(request);
        self.shared.asked.notify_one();
    }

    pub(super) fn wait(&mut self, answers: &mut Vec<Answer>, timeout: Duration) {
        let deadline = Instant::now().checked_add(timeout);
        let mut queues = self.shared.lock();
        while queues.answers.is_empty() {
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            queues =
                self.shared.answered.wait_timeout(queues, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.under_way -= queues.answers.len();
        answers.append(&mut queues.answers);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.asked.notify_all();
        for thread in self.threads.drain(..) {
            // Reads that never end are what SlotReads gives up on; their threads end with the process.
            if self.under_way == 0 && thread.join().is_err() {
                tracing::error!("a reading thread panicked");
            }
        }
    }
}

fn serve(shared: &Shared, files: &[ReadFile]) {
    let mut queues = shared.lock();
    loop {
        if queues.stop {
            return;
        }
        let Some(request) = queues.requests.pop_front() else {
            queues = shared.asked.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queues);
        let result = read(&files[request.file], request);
        queues = shared.lock();
        queues.answers.push(Answer { slot: request.slot, result });
        shared.answered.notify_one();
    }
}

fn read(file: &ReadFile, request: Request) -> io::Result<usize> {
    let offset = i64::try_from(request.offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let whole;
    let (pieces, count) = match request.to {
        Destination::Arena(address, bytes) => {
            whole = libc::iovec { iov_base: address.as_ptr().cast(), iov_len: bytes };
            (&raw const whole, 1)
        }
        Destination::Pieces(pieces, count) => (pieces.as_ptr().cast_const(), count),
    };
    let count = i32::try_from(count).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: pieces and what they name outlive the request by SlotReads' invariant, which answers for nobody looking
    // at them meanwhile. Worth it: guest pages and slots under a read are never slices.
    let got = unsafe { libc::preadv2(file.fd.as_raw_fd(), pieces, count, offset, file.flags) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
