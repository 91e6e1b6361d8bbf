//! A lane on the source: takes a batch of pages, judges each, and sends frames, page data straight from guest memory.
//!
//! Owned by one task a lane. Refetches go before everything else. A batch's version is drawn before any of its bytes
//! are read (invariant 2): a write after that is in the dirty log, so a later version follows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use crate::bitmap::{SharedBitmap, bits_of};
use crate::error::{Error, GuestError, NetError};
use crate::fingerprint::CheckKey;
use crate::guest::GuestMemory;
use crate::index::Duplicates;
use crate::limits::PAGES_PER_FRAME;
use crate::memory::{PageBuf, Window};
use crate::net::pace::Pace;
use crate::net::{SendPath, Sender};
use crate::pipeline::Failure;
use crate::pipeline::judge::{Backlog, Class, Fate, held_up, judge, link_rate, may_refer};
use crate::pipeline::work::{Purpose, Round};
use crate::runtime::{Bell, Moment, Runtime};
use crate::units::{BlockAddress, PAGE_BYTES_U64, Pfn, Version, f64_of, u64_of};
use crate::wire::frame::{
    ALIGNMENT, Digest, HEADER_BYTES, Header, Kind, Reference, TABLE_BYTES_MAX, ZeroRun,
};

/// How long an idle lane waits on the bell before it looks whether the migration is over.
const GLANCE: Duration = Duration::from_millis(100);

/// Pages ahead of the one that is judged whose first bytes are fetched: a page is judged in about 40 ns, memory takes
/// about 100 ns to answer.
const LOOK_AHEAD: usize = 6;

/// Counts of what has been sent, over all lanes.
#[derive(Default)]
pub struct Sent {
    /// Zero pages told.
    pub zero: AtomicU64,
    /// Pages whose bytes were sent, refetches not counted.
    pub data: AtomicU64,
    /// Pages sent as references.
    pub references: AtomicU64,
    /// Pages sent again because a reference did not hold.
    pub refetched: AtomicU64,
    /// Bytes handed to the lanes.
    pub bytes: AtomicU64,
    /// Time lanes spent in sending, all together, a cap's turns included.
    pub busy_ns: AtomicU64,
    /// Of that, time on a processor.
    pub worked_ns: AtomicU64,
    /// Whether any lane sent without a copy.
    pub zero_copy: AtomicBool,
    /// Whether any lane encrypted.
    pub encrypted: AtomicBool,
}

/// What the control task tells the judges, as the bits of `f64` seconds.
pub struct Pipes {
    disk: AtomicU64,
    limit: AtomicU64,
    /// Seconds a reference made now adds to the disk's work.
    per_reference: AtomicU64,
    /// References made since the control task last looked.
    fresh: AtomicU64,
}

impl Default for Pipes {
    fn default() -> Self {
        let zero = || AtomicU64::new(0f64.to_bits());
        let limit = AtomicU64::new(f64::INFINITY.to_bits());
        Self { disk: zero(), limit, per_reference: zero(), fresh: AtomicU64::new(0) }
    }
}

impl Pipes {
    /// Sets what the judges go by until the next call.
    pub fn set(&self, disk_s: f64, disk_limit_s: f64, per_reference_s: f64) {
        self.disk.store(disk_s.to_bits(), SeqCst);
        self.limit.store(disk_limit_s.to_bits(), SeqCst);
        self.per_reference.store(per_reference_s.to_bits(), SeqCst);
        self.fresh.store(0, SeqCst);
    }
    /// With what a lane knows itself: how long the link has to work, and how much of its sending it waits.
    fn backlog(&self, link_s: f64, held_up: f64) -> Backlog {
        let read = |bits: &AtomicU64| f64::from_bits(bits.load(SeqCst));
        let per_reference = read(&self.per_reference);
        let fresh = f64_of(self.fresh.load(SeqCst)) * per_reference;
        // References that need not be loaded before the restart cost nothing of what counts.
        let held_up = if per_reference == 0.0 { 1.0 } else { held_up };
        Backlog { link_s, disk_s: read(&self.disk) + fresh, disk_limit_s: read(&self.limit), held_up }
    }
}

/// What the lanes of a source share.
pub struct Sending {
    /// The guest's memory.
    pub memory: Arc<dyn GuestMemory>,
    /// Time and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Where tasks say that they failed.
    pub failure: Arc<Failure>,
    /// Where pages may stand on disks; `None` where no reference is to be made.
    pub index: Option<Arc<dyn Duplicates>>,
    /// Disks whose references the target can load, a bit each by number.
    pub usable: AtomicU32,
    /// Key of the checks.
    pub key: CheckKey,
    /// Whether zero pages are told instead of sent.
    pub elide_zero: bool,
    /// The bandwidth cap.
    pub pace: Pace,
    /// Lanes there are to be.
    pub lanes: u64,
    /// Pages dirty again since the round began; lanes skip them.
    pub dirty_again: SharedBitmap,
    /// Pages whose references did not hold.
    pub refetch: SharedBitmap,
    /// Pages that were last sent as a reference.
    pub referred: SharedBitmap,
    /// Those of them the target's guest waits for.
    pub urgent: ArrayQueue<Pfn>,
    /// Whether `refetch` or `urgent` may hold something.
    pub refetch_asked: AtomicBool,
    /// The last version drawn.
    pub version: AtomicU32,
    /// How busy the pipes are.
    pub pipes: Pipes,
    /// How long what was sent may stay on its way.
    pub patience: Duration,
    /// Counts.
    pub sent: Sent,
    /// Rung when there is work for the lanes.
    pub work: Bell,
    /// Rung when a lane has finished a round or failed.
    pub done: Arc<Bell>,
    /// Set when the lanes are to end.
    pub finish: AtomicBool,
}

impl Sending {
    /// Draws the next version.
    fn next_version(&self) -> Result<Version, Error> {
        let version = self.version.fetch_add(1, SeqCst) + 1;
        if version > Version::MAX.0 {
            let text = "the migration has used up its version numbers; it can't end any more. Cancel it and start again";
            return Err(GuestError::State(text.into()).into());
        }
        Ok(Version(version))
    }

    /// What the link carries as far as is known, bytes a second, whether or not the lanes always have something to send.
    fn link_rate(&self) -> f64 {
        let busy_s = f64_of(self.sent.busy_ns.load(SeqCst)) / 1e9 / f64_of(self.lanes);
        link_rate(self.sent.bytes.load(SeqCst), busy_s, self.pace.rate())
    }
}

/// One lane's sending end, with all the buffers it will ever need.
pub struct Lane {
    shared: Arc<Sending>,
    number: u16,
    sender: Box<dyn Sender>,
    jobs: Arc<ArrayQueue<Arc<Round>>>,
    sequence: u64,
    window: Window,
    batch: Vec<Pfn>,
    data: Vec<usize>,
    zero: Vec<ZeroRun>,
    references: Vec<Reference>,
    digests: Vec<Digest>,
    head: Vec<u8>,
    page: PageBuf,
    near: Option<BlockAddress>,
    /// Part of the time it has lately spent in sending in which it waited.
    held_up: f64,
    refetch_word: usize,
    /// Bytes that were on their way when the lane became idle or they last became fewer, and when that was.
    stuck: Option<(Moment, u64)>,
}

impl Lane {
    /// For lane `number`, whose handshake is over; rounds come through `jobs`.
    pub fn new(
        shared: Arc<Sending>,
        number: u16,
        sender: Box<dyn Sender>,
        jobs: Arc<ArrayQueue<Arc<Round>>>,
    ) -> Result<Self, Error> {
        let window = shared.memory.window(PAGES_PER_FRAME)?;
        Ok(Self {
            shared,
            number,
            sender,
            jobs,
            sequence: 0,
            window,
            batch: Vec::with_capacity(PAGES_PER_FRAME),
            data: Vec::with_capacity(PAGES_PER_FRAME),
            zero: Vec::with_capacity(PAGES_PER_FRAME),
            references: Vec::with_capacity(PAGES_PER_FRAME),
            digests: Vec::with_capacity(PAGES_PER_FRAME),
            head: Vec::with_capacity(HEADER_BYTES + TABLE_BYTES_MAX),
            page: PageBuf::zeroed(),
            near: None,
            held_up: 1.0,
            refetch_word: 0,
            stuck: None,
        })
    }

    /// Works until told to finish, or until the migration fails.
    pub fn run(mut self) -> Result<(), Error> {
        let mut round: Option<Arc<Round>> = None;
        while !self.shared.finish.load(SeqCst) && !self.shared.failure.is_set() {
            let heard = self.shared.work.heard();
            if self.shared.refetch_asked.load(SeqCst) && self.refetches()? {
                continue;
            }
            if round.is_none() {
                round = self.jobs.pop();
            }
            match &round {
                None => {
                    self.shared.runtime.wait(&self.shared.work, heard, GLANCE);
                    self.check_moving()?;
                }
                Some(current) => {
                    let current = Arc::clone(current);
                    self.stuck = None;
                    if !self.piece(&current)? {
                        self.barrier(&current)?;
                        round = None;
                    }
                }
            }
        }
        Ok(())
    }

    /// What an idle lane has sent must be on its way: a connection that died under it is told by nobody else, as the
    /// others go on.
    fn check_moving(&mut self) -> Result<(), Error> {
        let (now, backlog) = (self.shared.runtime.now(), self.sender.backlog_bytes());
        if backlog == 0 || self.stuck.is_none_or(|(_, bytes)| bytes != backlog) {
            self.stuck = (backlog > 0).then_some((now, backlog));
            return Ok(());
        }
        match self.stuck {
            Some((since, _)) if now.since(since) >= self.shared.patience => {
                let seconds = now.since(since).as_secs();
                let peer = format!("the target's end of lane {}", self.number);
                Err(NetError::Stalled { peer, seconds, doing: "sending to it" }.into())
            }
            _ => Ok(()),
        }
    }

    /// Sends the next piece of a round; `false` if there is none left.
    fn piece(&mut self, round: &Round) -> Result<bool, Error> {
        let skip = (round.purpose == Purpose::Live).then_some(&self.shared.dirty_again);
        round.take(&mut self.batch, skip);
        if self.batch.is_empty() {
            return Ok(false);
        }
        let version = self.shared.next_version()?;
        self.shared.runtime.interleave();
        self.shared.memory.map(&self.batch, &mut self.window)?;
        if round.purpose == Purpose::Digests {
            self.send_digests(round.number, version)?;
            return Ok(true);
        }
        self.sort_out(round.left());
        self.send_zero(round.number, version)?;
        self.send_references(round.number, version)?;
        self.send_data(round.number, version)?;
        self.shared.sent.data.fetch_add(u64_of(self.data.len()), SeqCst);
        Ok(true)
    }

    /// Judges every page of the batch into `zero`, `references` and `data`; `left` pages of the round follow it.
    fn sort_out(&mut self, left: u64) {
        self.zero.clear();
        self.references.clear();
        self.data.clear();
        let link_s = f64_of(left * PAGE_BYTES_U64) / self.shared.link_rate();
        let backlog = self.shared.pipes.backlog(link_s, self.held_up);
        let look_up = may_refer(backlog);
        let mut run: Option<(Pfn, u64)> = None;
        let mut zeroes = 0;
        for at in 0..self.batch.len() {
            let pfn = self.batch[at];
            if at + LOOK_AHEAD < self.batch.len()
                && let Some(later) = self.window.page(at + LOOK_AHEAD)
            {
                later.prefetch();
            }
            // A page that can't be mapped (a hole, ballooned out) has no content: the target's reads as zero.
            let Some((class, block)) = self.classify(at, look_up) else { continue };
            let fate = judge(class, backlog);
            match fate {
                Fate::Reference => self.shared.referred.set(pfn.index()),
                Fate::Zero | Fate::Data => self.shared.referred.clear(pfn.index()),
            };
            match fate {
                Fate::Zero => {
                    zeroes += 1;
                    run = match run {
                        Some((first, pages)) if first.plus(pages) == pfn => Some((first, pages + 1)),
                        Some((first, pages)) => {
                            self.zero.push(ZeroRun::new(first, pages));
                            Some((pfn, 1))
                        }
                        None => Some((pfn, 1)),
                    };
                }
                Fate::Reference => {
                    let block = block.expect("only a duplicate becomes a reference");
                    self.references.push(Reference::new(pfn, block, self.shared.key.check(&self.page)));
                    self.near = Some(block);
                }
                Fate::Data => self.data.push(at),
            }
        }
        self.zero.extend(run.map(|(first, pages)| ZeroRun::new(first, pages)));
        self.shared.sent.zero.fetch_add(zeroes, SeqCst);
        self.shared.sent.references.fetch_add(u64_of(self.references.len()), SeqCst);
        self.shared.pipes.fresh.fetch_add(u64_of(self.references.len()), SeqCst);
    }

    /// The class of the page at place `at` of the batch; for a duplicate its bytes stand in `self.page`, and it comes
    /// with its block, if it is to be looked up. `None` if it is not mapped.
    fn classify(&mut self, at: usize, look_up: bool) -> Option<(Class, Option<BlockAddress>)> {
        let page = self.window.page(at)?;
        if self.shared.elide_zero && page.is_zero() {
            return Some((Class::Zero, None));
        }
        let index = self.shared.index.as_ref().filter(|_| look_up);
        let Some(index) = index else { return Some((Class::Unique, None)) };
        page.copy_to(&mut self.page);
        let found = index.find(&self.page, self.near);
        let usable = self.shared.usable.load(SeqCst);
        Some(match found.filter(|block| usable >> block.disk.0 & 1 == 1) {
            Some(block) => (Class::Duplicate, Some(block)),
            None => (Class::Unique, None),
        })
    }

    fn send_zero(&mut self, round: u32, version: Version) -> Result<(), Error> {
        if self.zero.is_empty() {
            return Ok(());
        }
        self.begin(Kind::Zero, round, self.zero.len(), version);
        self.head.extend_from_slice(self.zero.as_bytes());
        self.flush()
    }

    fn send_references(&mut self, round: u32, version: Version) -> Result<(), Error> {
        if self.references.is_empty() {
            return Ok(());
        }
        self.begin(Kind::References, round, self.references.len(), version);
        self.head.extend_from_slice(self.references.as_bytes());
        self.flush()
    }

    /// Sends the pages of the batch at the places in `data`.
    fn send_data(&mut self, round: u32, version: Version) -> Result<(), Error> {
        let Some(first) = self.data.first().copied() else { return Ok(()) };
        let count = self.data.len();
        self.begin(Kind::Data, round, count, version);
        let mapped = "only mapped pages are sent";
        let mut pages = [self.window.page(first).expect(mapped); PAGES_PER_FRAME];
        for (page, at) in pages.iter_mut().zip(&self.data) {
            *page = self.window.page(*at).expect(mapped);
            self.head.extend_from_slice(U64::new(self.batch[*at].0).as_bytes());
        }
        fill_up(&mut self.head);
        let bytes = u64_of(self.head.len()) + u64_of(count) * PAGE_BYTES_U64;
        let runtime = &self.shared.runtime;
        // A lane that waits for its turn under a cap is held up no less than one that waits for the socket.
        let (began, worked) = (runtime.now(), runtime.task_cpu_time());
        self.shared.pace.take(&**runtime, bytes);
        self.sender.send(&self.head, &pages[..count])?;
        let (spent, worked) = (runtime.now().since(began), runtime.task_cpu_time().saturating_sub(worked));
        self.held_up = match self.sender.path() {
            // A page that is encrypted takes more of the processors than one that is read and checked.
            SendPath::Encrypted => 1.0,
            SendPath::Copy | SendPath::ZeroCopy => held_up(self.held_up, worked, spent),
        };
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.shared.sent.busy_ns.fetch_add(nanoseconds(spent), SeqCst);
        self.shared.sent.worked_ns.fetch_add(nanoseconds(worked), SeqCst);
        self.account(bytes);
        Ok(())
    }

    fn send_digests(&mut self, round: u32, version: Version) -> Result<(), Error> {
        self.digests.clear();
        for at in 0..self.batch.len() {
            match self.window.page(at) {
                Some(page) => page.copy_to(&mut self.page),
                None => self.page = PageBuf::zeroed(),
            }
            self.digests.push(Digest::new(self.batch[at], self.shared.key.check(&self.page)));
        }
        self.begin(Kind::Digests, round, self.digests.len(), version);
        self.head.extend_from_slice(self.digests.as_bytes());
        self.flush()
    }

    fn barrier(&mut self, round: &Round) -> Result<(), Error> {
        let version = self.shared.next_version()?;
        self.begin(Kind::Barrier, round.number, 0, version);
        self.flush()?;
        self.shared.runtime.ring(&self.shared.done);
        Ok(())
    }

    /// Sends pages the target asked for, urgent ones first; `false` if there were none.
    fn refetches(&mut self) -> Result<bool, Error> {
        // Cleared before looking: whatever is asked for from now on sets it again.
        self.shared.refetch_asked.store(false, SeqCst);
        self.batch.clear();
        while self.batch.len() < PAGES_PER_FRAME
            && let Some(pfn) = self.shared.urgent.pop()
        {
            self.shared.refetch.clear(pfn.index());
            if !self.batch.contains(&pfn) {
                self.batch.push(pfn);
            }
        }
        if self.batch.is_empty() {
            self.sweep_refetch();
        }
        if self.batch.is_empty() {
            return Ok(false);
        }
        self.shared.refetch_asked.store(true, SeqCst);
        let version = self.shared.next_version()?;
        self.shared.runtime.interleave();
        self.shared.memory.map(&self.batch, &mut self.window)?;
        self.data.clear();
        self.data.extend((0..self.batch.len()).filter(|at| self.window.page(*at).is_some()));
        self.shared.sent.refetched.fetch_add(u64_of(self.data.len()), SeqCst);
        self.send_data(0, version)?;
        Ok(true)
    }

    fn sweep_refetch(&mut self) {
        let words = self.shared.refetch.words();
        for _ in 0..words {
            if self.batch.len() + 64 > PAGES_PER_FRAME {
                return;
            }
            let word = self.refetch_word;
            self.refetch_word = (word + 1) % words;
            self.batch
                .extend(bits_of(self.shared.refetch.take_word(word)).map(|bit| Pfn::at(word * 64 + bit)));
        }
    }

    fn begin(&mut self, kind: Kind, round: u32, count: usize, version: Version) {
        let header = Header { kind, lane: self.number, count, round, version, sequence: self.sequence };
        self.sequence += 1;
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
    }

    fn flush(&mut self) -> Result<(), Error> {
        fill_up(&mut self.head);
        let bytes = u64_of(self.head.len());
        self.shared.pace.take(&*self.shared.runtime, bytes);
        self.sender.send(&self.head, &[])?;
        self.account(bytes);
        Ok(())
    }

    fn account(&self, bytes: u64) {
        self.shared.sent.bytes.fetch_add(bytes, SeqCst);
        match self.sender.path() {
            SendPath::Copy => {}
            SendPath::ZeroCopy => self.shared.sent.zero_copy.store(true, SeqCst),
            SendPath::Encrypted => self.shared.sent.encrypted.store(true, SeqCst),
        }
    }
}

/// Ends header and table.
fn fill_up(head: &mut Vec<u8>) {
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
}
