//! A shaped link on this machine: two network namespaces joined by a virtual cable, for demonstrations and
//! measurements.
//!
//! ```text
//!   namespace "source"                      namespace "target"
//!   10.42.0.1  pageferry0 ====== veth ====== pageferry0  10.42.0.2
//!              tbf, RATE ->                <- tbf, RATE
//! ```
//! Nothing outside the two namespaces changes, and nothing has a name there: when this process and those it started
//! inside are gone, killed or not, so is the link. It needs root and the programs `ip` and `tc`.

#![forbid(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::NetError;
use crate::kernel::namespace::Namespace;

/// Which end of the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The source's namespace.
    Source,
    /// The target's namespace.
    Target,
}

impl End {
    /// Its address on the link.
    #[must_use]
    pub fn address(self) -> IpAddr {
        match self {
            Self::Source => IpAddr::V4(Ipv4Addr::new(10, 42, 0, 1)),
            Self::Target => IpAddr::V4(Ipv4Addr::new(10, 42, 0, 2)),
        }
    }
}

/// How the link is shaped, in both directions alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Bits a second on the wire, Ethernet headers included; TCP gets about 95 % of it with a frame of 1500 bytes.
    pub bits_per_second: u64,
    /// Bytes that may leave at once after a silence.
    pub burst_bytes: u64,
    /// How long a packet may queue before it is dropped.
    pub queue: Duration,
}

impl Shape {
    /// A link of that rate whose queue stays short and whose rate TCP can use in full.
    #[must_use]
    pub fn of(bits_per_second: u64) -> Self {
        let bytes_per_second = bits_per_second / 8;
        // One millisecond's worth, but always a few of the 64 KiB packets that the stack hands down: with less,
        // tbf cuts them up one by one.
        let burst_bytes = (bytes_per_second / 1_000).max(192 * 1024);
        Self { bits_per_second, burst_bytes, queue: Duration::from_millis(8) }
    }
}

/// The link. Dropping it takes it away as soon as no process started on it runs any more.
pub struct Lab {
    source: Namespace,
    target: Namespace,
    shape: Shape,
}

const CABLE: &str = "pageferry0";

impl Lab {
    /// Lays the link.
    ///
    /// # Errors
    /// Without root, without `ip` and `tc`, or where the kernel lacks veth or tbf: a sentence that says so.
    pub fn new(shape: Shape) -> Result<Self, NetError> {
        let make = || {
            Namespace::new().map_err(|source| NetError::Os {
                doing: "cannot make a network namespace".to_owned(),
                remedy: "A shaped link needs root (CAP_SYS_ADMIN); run this with sudo, or without --link",
                source,
            })
        };
        let lab = Self { source: make()?, target: make()?, shape };
        lab.run(
            End::Source,
            "ip",
            &format!("link add {CABLE} type veth peer name {CABLE} netns {}", lab.target.path()),
        )?;
        for end in [End::Source, End::Target] {
            lab.run(end, "ip", "link set lo up")?;
            lab.run(end, "ip", &format!("address add {}/30 dev {CABLE}", end.address()))?;
            lab.run(end, "ip", &format!("link set {CABLE} up"))?;
            lab.run(end, "tc", &format!("qdisc add dev {CABLE} root {}", shaper(shape)))?;
        }
        Ok(lab)
    }

    /// The shape it has.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Changes the shape while connections go on.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn reshape(&mut self, shape: Shape) -> Result<(), NetError> {
        for end in [End::Source, End::Target] {
            self.run(end, "tc", &format!("qdisc replace dev {CABLE} root {}", shaper(shape)))?;
        }
        self.shape = shape;
        Ok(())
    }

    /// Pulls the cable out or puts it back: packets are lost, connections stay.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn plug(&self, plugged: bool) -> Result<(), NetError> {
        self.run(End::Source, "ip", &format!("link set {CABLE} {}", if plugged { "up" } else { "down" }))
    }

    /// Makes `command` run at that end of the link.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn place(&self, end: End, command: &mut Command) -> Result<(), NetError> {
        self.namespace(end).enter(command).map_err(|source| NetError::Os {
            doing: "cannot put a process at its end of the link".to_owned(),
            remedy: "Raise the limit on open files (ulimit -n)",
            source,
        })
    }

    /// Runs `work` on a thread at that end of the link; sockets it opens stay there.
    ///
    /// # Errors
    /// When the namespace can't be entered.
    pub fn inside<T: Send>(&self, end: End, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        self.namespace(end).inside(work).map_err(|source| NetError::Os {
            doing: "cannot enter a network namespace".to_owned(),
            remedy: "A shaped link needs root (CAP_SYS_ADMIN)",
            source,
        })
    }

    fn namespace(&self, end: End) -> &Namespace {
        match end {
            End::Source => &self.source,
            End::Target => &self.target,
        }
    }

    /// Runs `ip` or `tc` at that end.
    fn run(&self, end: End, program: &str, arguments: &str) -> Result<(), NetError> {
        let failed = |source: io::Error, remedy: &'static str| NetError::Os {
            doing: format!("`{program} {arguments}` failed"),
            remedy,
            source,
        };
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace()).stdin(Stdio::null());
        self.place(end, &mut command)?;
        let output = command.output().map_err(|source| {
            let remedy = "Install iproute2, or add /usr/sbin and /sbin to PATH";
            failed(source, remedy)
        })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(failed(
            io::Error::other(said),
            "The kernel needs veth (CONFIG_VETH) and the tbf queue (CONFIG_NET_SCH_TBF), and this user root",
        ))
    }
}

fn shaper(shape: Shape) -> String {
    format!(
        "tbf rate {}bit burst {} latency {}us",
        shape.bits_per_second,
        shape.burst_bytes,
        shape.queue.as_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    /// A link, or a loud word about why there is none.
    fn lab(bits_per_second: u64) -> Option<Lab> {
        match Lab::new(Shape::of(bits_per_second)) {
            Ok(lab) => Some(lab),
            Err(error) => {
                eprintln!("SKIPPED: no shaped link here: {error}");
                None
            }
        }
    }

    /// A connection from source to target over the link.
    fn connected(lab: &Lab) -> (TcpStream, TcpStream) {
        let address = (End::Target.address(), 0);
        let listener = lab.inside(End::Target, || TcpListener::bind(address)).unwrap().unwrap();
        let there = listener.local_addr().unwrap();
        let source = lab.inside(End::Source, || TcpStream::connect(there)).unwrap().unwrap();
        (source, listener.accept().unwrap().0)
    }

    /// The bucket lets through what the rate carries, one burst and what queues in the packet being sent, never more.
    #[test]
    fn the_link_is_never_faster_than_its_shape() {
        let Some(lab) = lab(200_000_000) else { return };
        for reversed in [false, true] {
            let (mut source, mut target) = connected(&lab);
            if reversed {
                std::mem::swap(&mut source, &mut target);
            }
            let sending = std::thread::spawn(move || {
                let began = Instant::now();
                source.write_all(&vec![1; 5 << 20]).unwrap();
                (began, source)
            });
            let mut came = vec![0; 5 << 20];
            target.read_exact(&mut came).unwrap();
            let ended = Instant::now();
            let (began, _source) = sending.join().unwrap();
            let seconds = ended.duration_since(began).as_secs_f64();
            let allowed = 25e6 * seconds + 192.0 * 1024.0;
            assert!(5_242_880.0 <= allowed, "5 MiB in {seconds} s is more than 200 Mbit/s");
        }
    }

    /// A child process lives at its end: it sees the link's address there and only there.
    #[test]
    fn children_run_at_their_end() {
        let Some(lab) = lab(1_000_000_000) else { return };
        for (end, other) in [(End::Source, End::Target), (End::Target, End::Source)] {
            let mut command = Command::new("ip");
            command.args(["-oneline", "address", "show"]);
            lab.place(end, &mut command).unwrap();
            let output = command.output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(&end.address().to_string()), "{text}");
            assert!(!text.contains(&other.address().to_string()), "{text}");
        }
    }

    /// Nothing is left in the system, and nothing of it shows outside while it exists.
    #[test]
    fn nothing_shows_outside() {
        let Some(lab) = lab(1_000_000_000) else { return };
        let outside = || std::fs::read_to_string("/proc/net/dev").unwrap();
        assert!(!outside().contains(CABLE));
        let inside =
            lab.inside(End::Source, || std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        assert!(inside.unwrap().contains(CABLE));
        drop(lab);
        assert!(!outside().contains(CABLE));
    }

    /// Pulling the cable stops data without closing connections; they go on when it is back.
    #[test]
    fn the_cable_can_be_pulled() {
        let Some(mut lab) = lab(1_000_000_000) else { return };
        let (mut source, mut target) = connected(&lab);
        lab.plug(false).unwrap();
        source.write_all(b"late").unwrap();
        target.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(target.read(&mut [0; 4]).is_err());
        lab.plug(true).unwrap();
        lab.reshape(Shape::of(10_000_000)).unwrap();
        assert_eq!(lab.shape().bits_per_second, 10_000_000);
        target.set_read_timeout(None).unwrap();
        let mut came = [0; 4];
        target.read_exact(&mut came).unwrap();
        assert_eq!(&came, b"late");
    }
}
