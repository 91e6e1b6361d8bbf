//! A guest that does nothing, or that writes at a rate: a buffer as its memory, a state of a few bytes, no disks. What a
//! migration of it costs is the engine's own cost. One process sends it, another receives it, as `pageferry send` and `receive` do.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::Result;
use mover::bitmap::Bitmap;
use mover::disk::image::{DiskSpec, ImageDisks, Role};
use mover::disk::{Disks, WriteLog};
use mover::error::{DiskError, Error, GuestError};
use mover::guest::{DirtyLog, GuestMemory, SourceGuest, SourceLife, TargetGuest, TargetLife};
use mover::index::Duplicates;
use mover::journal::{Entry, Journal};
use mover::memory::{Mapping, Window};
use mover::net::entrance::{Entrance, Lock};
use mover::net::pass::Fingerprint;
use mover::net::tcp::{Settings, TcpAcceptor, TcpDialer};
use mover::net::tls::Identity;
use mover::report::{Mode, Silent, Summary};
use mover::runtime::Threads;
use mover::source::{self, Surroundings};
use mover::target;
use mover::units::{DiskId, PageCount, Pfn};
use mover::wire::hello::{MigrationId, Secret};

use crate::writer::{Writer, WriterLife, Writes};

/// Both ends know it; nobody else is there.
static TOKEN: LazyLock<Secret> = LazyLock::new(|| Secret::of(&[7; 32]));

/// The guest's memory.
struct Memory(Arc<Mapping>);

impl GuestMemory for Memory {
    fn pages(&self) -> PageCount {
        self.0.pages()
    }
    fn pinnable(&self) -> bool {
        true
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(self.0.window(capacity))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        self.0.fill(pfns.iter().map(|pfn| Some(*pfn)), window);
        Ok(())
    }
    fn untouched(&self, _into: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Everything else of it.
struct Idle;

impl DirtyLog for Idle {
    fn arm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn harvest(&mut self, _into: &mut Bitmap) -> Result<PageCount, GuestError> {
        Ok(PageCount(0))
    }
    fn disarm(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl WriteLog for Idle {
    fn harvest(&mut self, _disk: DiskId, _into: &mut Bitmap) -> Result<u64, DiskError> {
        Ok(0)
    }
}

/// Its life on the source; that of what writes in it, if anything does.
struct Life(Option<WriterLife>);

impl SourceLife for Life {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.iter().for_each(WriterLife::pause);
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.0.iter().for_each(WriterLife::resume);
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(vec![0; 4096])
    }
    fn throttle(&mut self, _percent: u8) -> Result<(), GuestError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn reclaim(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl TargetLife for Idle {
    fn load_state(&mut self, _state: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn start(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn stop(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl Journal for Idle {
    fn record(&mut self, _entry: Entry) -> Result<(), Error> {
        Ok(())
    }
    fn close(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

fn surroundings() -> Surroundings {
    Surroundings {
        runtime: Arc::new(Threads::new()),
        observer: Arc::new(Silent),
        cancel: Arc::new(source::Cancel::default()),
    }
}

/// How an idle guest is migrated.
pub struct Plan {
    /// Mode.
    pub mode: Mode,
    /// Lanes.
    pub lanes: usize,
    /// Cap on the link, bytes a second.
    pub bandwidth: Option<u64>,
    /// The image both ends read as the guest's disk, if it has one.
    pub disk: Option<PathBuf>,
    /// Where pages stand on it.
    pub known: Option<Arc<dyn Duplicates>>,
    /// The target's key; none: in the clear.
    pub pin: Option<Fingerprint>,
    /// What it writes meanwhile, if anything.
    pub writes: Option<Writes>,
}

impl Plan {
    /// Everything as data, as fast as it goes.
    #[must_use]
    pub fn plain(lanes: usize) -> Self {
        Self { mode: Mode::Plain, lanes, bandwidth: None, disk: None, known: None, pin: None, writes: None }
    }
}

fn disks(path: Option<&Path>) -> Result<Arc<dyn Disks>, DiskError> {
    let spec =
        path.map(|path| DiskSpec { name: "disk0".to_owned(), path: path.to_owned(), role: Role::ReadOnly });
    ImageDisks::open(spec.as_slice())
}

/// Sends a guest whose memory is `buffer` to the process listening on `port`.
///
/// # Errors
/// When the migration fails.
pub fn send(buffer: &Arc<Mapping>, port: u16, plan: Plan) -> Result<Summary> {
    let writer = plan.writes.map(|writes| Writer::start(buffer, writes)).transpose()?;
    let dirty: Box<dyn DirtyLog> = match &writer {
        Some(writer) => Box::new(writer.log()),
        None => Box::new(Idle),
    };
    let guest = SourceGuest {
        memory: Arc::new(Memory(Arc::clone(buffer))),
        dirty,
        life: Box::new(Life(writer.as_ref().map(Writer::life))),
        disks: disks(plan.disk.as_deref())?,
        writes: Box::new(Idle),
    };
    let parts = source::Parts {
        guest,
        name: "idle".to_owned(),
        index: plan.known,
        keeper: None,
        dialer: Arc::new(TcpDialer::new(&format!("127.0.0.1:{port}"), Settings::default()).pinned(plan.pin)),
        token: TOKEN.clone(),
        migration: MigrationId([1; 16]),
        journal: Box::new(Idle),
    };
    let Plan { mode, lanes, bandwidth, .. } = plan;
    let config = source::Config { mode, lanes, bandwidth, ..source::Config::default() };
    Ok(source::migrate(parts, config, surroundings())?)
}

/// Where a target waits, on any port of loopback.
///
/// # Errors
/// When it can't listen.
pub fn entrance(encrypted: bool) -> Result<Entrance> {
    let lock = if encrypted { Lock::Tls(Identity::new()?) } else { Lock::Plain };
    Ok(Entrance::new(TcpAcceptor::listen("127.0.0.1:0", Settings::default())?, lock))
}

/// Receives a guest into `buffer`, its disk read from `disk`.
///
/// # Errors
/// When the migration fails, or nobody comes.
pub fn receive(buffer: &Arc<Mapping>, entrance: Entrance, disk: Option<&Path>) -> Result<()> {
    let memory = Arc::new(Memory(Arc::clone(buffer)));
    let disks = disk.map(|path| disks(Some(path))).transpose()?;
    let host = move |_: &_| {
        let lazy = Err("this guest has nothing to hold back".to_owned());
        let guest = TargetGuest { memory, life: Box::new(Idle), lazy, gate: None };
        let readable = disks.iter().map(|_| Ok(())).collect();
        Ok(target::Host { guest, disks, readable })
    };
    let parts = target::Parts {
        acceptor: Box::new(entrance),
        token: TOKEN.clone(),
        host: Box::new(host),
        journal: Box::new(|_, _, _| Ok(Box::new(Idle))),
    };
    let config = target::Config { wait: Some(Duration::from_secs(10)), ..target::Config::default() };
    target::receive(parts, config, surroundings())?;
    Ok(())
}
