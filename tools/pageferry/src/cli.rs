//! The command line, defined once: parsing, help, completions and the man page all come from here.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use mover::error::NetError;
use mover::net::tls::Authority;
use mover::report::Mode;

use crate::failure;
use crate::units::{Rate, Size, duration};

/// Moves running guests between hosts, and leaves behind what the other host can fetch for itself.
///
/// Memory pages that also stand on the guest's disk are sent as references; the target loads them from the shared
/// storage, beside the network, and in mode `lazy` even after the guest has restarted there.
#[derive(Parser)]
#[command(
    name = "pageferry",
    version,
    disable_help_subcommand = true,
    after_help = "`pageferry help exit-codes` lists what the exit codes mean.",
    after_long_help = failure::exit_codes_text(),
    max_term_width = 110
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) shared: Shared,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Args)]
pub(crate) struct Shared {
    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet", help_heading = "Output")]
    pub(crate) verbose: u8,
    /// Say nothing but errors and the result
    #[arg(short, long, global = true, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// Print the result as JSON, and nothing else on standard output
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Migrate a guest of this machine live, in each of the four modes, and compare them
    ///
    /// Makes a disk image from files of this machine, starts a guest process with a workload, and moves it from one
    /// process to the next, once in each mode, checking every page. Nothing is left behind.
    Demo(Box<DemoArgs>),
    /// Move a guest of this machine to a target that waits for it
    Send(Box<SendArgs>),
    /// Wait for a guest and take it up; prints the command for the source
    Receive(Box<ReceiveArgs>),
    /// Predict what a migration would take in each mode; nothing is moved
    ///
    /// Looks at the guest's pages and at the index of its disks, watches its writes for a while, and reads the disk here
    /// and there for its speed.
    Plan(PlanArgs),
    /// Show the migrations that run here now: phase, round, rates
    Status {
        /// Return only when none does: this host is not needed by any guest that was moved away, or has all of those moved here
        #[arg(long)]
        wait: bool,
    },
    /// Show what runs here and what has run as metrics for Prometheus, once or to whoever asks on a local socket
    ///
    /// A scrape reads notes that migrations leave anyway: none of them waits for it.
    Metrics(MetricsArgs),
    /// Go on loading the pages of a guest here whose target was lost behind its start
    ///
    /// In mode `lazy` a guest runs before all of its pages are there. If the `receive` that loads them is killed, the guest waits;
    /// this takes its place and has the source, which dials again as long as --redial-for there says, send what is missing.
    Resume(ResumeArgs),
    /// Settle a migration whose end is in doubt
    ///
    /// Without a migration's number: lists those with a record here. A guest that was given up, but whose start on the
    /// other host was never confirmed, stays paused until it is known which host has it: `pageferry resolve` on that
    /// host tells.
    Resolve(ResolveArgs),
    /// Start, look at and end guests that are processes of this machine
    Guest {
        #[command(subcommand)]
        command: GuestCommand,
    },
    /// Look up where contents stand on a disk, so that a migration can refer to them
    Index {
        #[command(subcommand)]
        command: IndexCommand,
    },
    /// Make a disk image out of files of this machine, for a guest to work on
    Image {
        /// Where
        path: PathBuf,
        /// How large
        #[arg(long, value_name = "SIZE", default_value = "2G")]
        size: Size,
        /// How much of it to fill; the rest is a hole [default: half]
        #[arg(long, value_name = "SIZE")]
        content: Option<Size>,
        /// A directory whose files go in; give it again for more [default: /usr, /opt, the Rust toolchain]
        #[arg(long = "from", value_name = "DIR")]
        from: Vec<PathBuf>,
    },
    /// On a Xen host: save, restore and move its guests, or have every toolstack there do it with pageferry
    Xen {
        #[command(subcommand)]
        command: XenCommand,
    },
    /// Look at a stream Xen saved or migrated a guest with: a file of `xl save`, or libxl's or libxc's part of one
    Stream {
        #[command(subcommand)]
        command: StreamCommand,
    },
    /// Try what this kernel and machine offer; say what is lost without it and how to get it
    Doctor {
        /// Where disks are to be read from: an image, or the directory images are in
        #[arg(long, value_name = "PATH", default_value = ".")]
        path: PathBuf,
    },
    /// Measure the engine on this machine: modes, limits and peers; `pageferry bench --list` names the suites
    #[command(disable_help_flag = true)]
    Bench {
        /// Arguments for the harness; --help tells them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Print completions for a shell
    ///
    /// For bash: pageferry completions bash > /etc/bash_completion.d/pageferry
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the man page, or write those of all commands into a directory
    Man {
        /// Where to write pageferry.1, pageferry-send.1 and so on
        #[arg(long = "dir", value_name = "DIR")]
        directory: Option<PathBuf>,
    },
    /// Help on a command, or on `exit-codes`
    Help {
        /// A command's name, or `exit-codes`
        topic: Vec<String>,
    },
}

#[derive(Subcommand)]
pub(crate) enum GuestCommand {
    /// Start a guest; it runs on when this command has ended
    Start {
        /// Its name: letters, digits, `-`, `_`, `.`
        name: String,
        #[command(flatten)]
        shape: GuestShape,
    },
    /// List the guests that run here
    List,
    /// Show what a guest does, what it has done and what it has found
    Status {
        /// Its name, or the path of its control socket
        name: String,
    },
    /// End a guest
    Stop {
        /// Its name, or the path of its control socket
        name: String,
    },
    /// Have a guest check all of its memory now; exit code 10 if it finds a wrong page
    Check {
        /// Its name, or the path of its control socket
        name: String,
    },
    /// Be the process of a guest whose configuration comes on standard input
    #[command(hide = true)]
    Run,
}

/// How `send` moves a guest.
#[derive(Args)]
pub(crate) struct SendArgs {
    /// The guest: its name, or the path of its control socket
    #[arg(long, value_name = "NAME")]
    pub(crate) guest: String,
    /// Where the target listens
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: String,
    /// What `pageferry receive` printed; good for one migration
    #[arg(long, value_name = "TOKEN", env = "PAGEFERRY_TOKEN", hide_env_values = true)]
    pub(crate) token: String,
    /// How pages travel: stock, plain, refer or lazy
    #[arg(long, value_name = "MODE", default_value = "lazy", value_parser = mode)]
    pub(crate) mode: Mode,
    /// Data connections
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) lanes: usize,
    /// Longest downtime to aim for
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = duration)]
    pub(crate) max_downtime: Duration,
    /// Most rounds while the guest runs
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) max_rounds: u32,
    /// Use no more of the link than this
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Rate>,
    /// Whether to slow the guest down when it writes faster than the link carries
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Throttle::Off)]
    pub(crate) throttle: Throttle,
    /// What to do when it still does
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = IfNotConverging::Finish)]
    pub(crate) if_not_converging: IfNotConverging,
    /// How long the other end may be silent before it is taken for lost
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(crate) patience: Duration,
    /// How long to dial the target again when the link is lost behind the commit; then it is for `resolve`
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) redial_for: Duration,
    /// Compare every page on the target with what it was here at the pause; the guest stands still meanwhile
    #[arg(long)]
    pub(crate) verify: bool,
    /// Send in the clear: whoever is on the way sees the guest's memory, and can change it
    #[arg(long)]
    pub(crate) plaintext: bool,
    #[command(flatten)]
    pub(crate) credentials: Credentials,
    /// The name the target's certificate has to be for, with --ca [default: the host in --to]
    #[arg(long, value_name = "NAME", requires = "ca")]
    pub(crate) peer_name: Option<String>,
    /// Let the network card read guest memory, where kernel and card can; encrypted pages are other bytes than those
    #[arg(long, requires = "plaintext")]
    pub(crate) zero_copy: bool,
    /// Print what happens as JSON, a line an event, on standard output
    #[arg(long)]
    pub(crate) json_events: bool,
}

/// Whether to slow a guest down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Throttle {
    /// Never
    Off,
    /// As much as it takes
    Auto,
}

impl Throttle {
    /// As settings call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
        }
    }
}

/// What to do with a guest that does not converge.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum IfNotConverging {
    /// Stop it and copy the rest, however long that takes
    Finish,
    /// Give up; it goes on here
    Abort,
}

impl IfNotConverging {
    /// As settings call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::Abort => "abort",
        }
    }
}

/// An operator's own authority, at both ends or at neither.
#[derive(Args)]
pub(crate) struct Credentials {
    /// Go on only with an end whose certificate one of these has issued; PEM, as the next two
    #[arg(long, value_name = "FILE", requires = "cert", requires = "key", conflicts_with = "plaintext")]
    pub(crate) ca: Option<PathBuf>,
    /// This end's certificate, and those between it and the authority's
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub(crate) cert: Option<PathBuf>,
    /// This end's private key
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub(crate) key: Option<PathBuf>,
}

impl Credentials {
    /// Those of these files, if there are any.
    pub(crate) fn load(&self) -> Result<Option<Authority>, NetError> {
        match (&self.ca, &self.cert, &self.key) {
            (Some(ca), Some(cert), Some(key)) => Authority::load(ca, cert, key).map(Some),
            _ => Ok(None),
        }
    }
}

/// How `receive` takes a guest up.
#[derive(Args)]
pub(crate) struct ReceiveArgs {
    /// Where to listen; port 0 takes any free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7700")]
    pub(crate) listen: String,
    /// The guest's name here [default: the one it has on the source]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Where one of the guest's disks is on this host, if not at the source's path
    #[arg(long = "disk", value_name = "NAME=PATH")]
    pub(crate) disks: Vec<String>,
    /// How long to wait for a source, and how long the token is good
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub(crate) wait: Duration,
    /// Receive in the clear: whoever is on the way sees the guest's memory, and can change it
    #[arg(long)]
    pub(crate) plaintext: bool,
    /// How long the other end may be silent before it is taken for lost
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(crate) patience: Duration,
    #[command(flatten)]
    pub(crate) credentials: Credentials,
    /// How long to wait for a source that was lost once the guest could start here
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) redial_for: Duration,
    /// Load from disks straight into guest memory where that can be done
    #[arg(long)]
    pub(crate) direct: bool,
    /// Reads in flight to the disks
    #[arg(long, value_name = "N")]
    pub(crate) depth: Option<usize>,
    /// Print what happens as JSON, a line an event, on standard output
    #[arg(long)]
    pub(crate) json_events: bool,
}

/// How `resume` goes on.
#[derive(Args)]
pub(crate) struct ResumeArgs {
    /// The guest: its name, or the path of its control socket
    pub(crate) guest: String,
    /// How long the other end may be silent before it is taken for lost
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(crate) patience: Duration,
    /// How long to wait for the source to dial
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) redial_for: Duration,
    /// Print what happens as JSON, a line an event, on standard output
    #[arg(long)]
    pub(crate) json_events: bool,
}

/// What `plan` looks at.
#[derive(Args)]
pub(crate) struct PlanArgs {
    /// The guest: its name, or the path of its control socket
    #[arg(long, value_name = "NAME")]
    pub(crate) guest: String,
    /// What the link carries
    #[arg(long, value_name = "RATE", default_value = "1gbit")]
    pub(crate) link: Rate,
    /// What the disk gives on the target [default: measured here]
    #[arg(long, value_name = "RATE")]
    pub(crate) disk_rate: Option<Rate>,
    /// How long to watch the guest's writes
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    pub(crate) sample: Duration,
    /// Longest downtime to aim for
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = duration)]
    pub(crate) max_downtime: Duration,
    /// Most rounds while the guest runs
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) max_rounds: u32,
}

/// Where `metrics` go.
#[derive(Args)]
pub(crate) struct MetricsArgs {
    /// Answer HTTP on this socket until ended [default: print them once]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
}

/// What `resolve` settles.
#[derive(Args)]
pub(crate) struct ResolveArgs {
    /// The migration's number
    pub(crate) migration: Option<String>,
    /// This host has the guest: take it back where it was given up here; where it runs here, forget the record
    #[arg(long, requires = "migration", conflicts_with = "there")]
    pub(crate) here: bool,
    /// The other host has the guest: end the paused one here, or forget the record of one that does not run here
    #[arg(long, requires = "migration")]
    pub(crate) there: bool,
}

/// What `demo` shows.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// What the guest does: the name of a shipped workload, or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "remote-desktop")]
    pub(crate) workload: String,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub(crate) memory: Size,
    /// The guest's disk [default: twice its memory]
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_size: Option<Size>,
    /// The guest's virtual processors, a thread each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// Where the guest's contents and choices start from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Modes to go through, in this order
    #[arg(long, value_name = "MODE,...", value_delimiter = ',', default_value = "stock,plain,refer,lazy",
          value_parser = mode)]
    pub(crate) modes: Vec<Mode>,
    /// Shape the link to this rate: two network namespaces and a virtual cable, which takes root
    #[arg(long, value_name = "RATE")]
    pub(crate) link: Option<Rate>,
    /// Data connections
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) lanes: usize,
    /// Longest downtime to aim for
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = duration)]
    pub(crate) max_downtime: Duration,
    /// Whether to slow the guest down when it writes faster than the link carries
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Throttle::Off)]
    pub(crate) throttle: Throttle,
    /// Migrate in the clear instead of over TLS
    #[arg(long)]
    pub(crate) plaintext: bool,
    /// Do not compare every page with what the source had at the pause
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// How long the guest checks itself on after the last migration
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub(crate) watch: Duration,
    /// Write a page with timelines and figures, for a browser
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Where the image and all else are kept meanwhile
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) dir: PathBuf,
    /// Leave the guest running at the end
    #[arg(long)]
    pub(crate) keep_running: bool,
    /// Also tell how the guest fared, for the benchmarks: its speed and its accesses before, during and behind each migration
    #[arg(long, hide = true)]
    pub(crate) closely: bool,
    /// How often to look at the guest
    #[arg(long, hide = true, value_name = "TIME", default_value = "20ms", value_parser = duration)]
    pub(crate) look_every: Duration,
}

fn mode(text: &str) -> Result<Mode, String> {
    Mode::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
        format!("there is no mode `{text}`; the modes are {}", Mode::ALL.map(Mode::name).join(", "))
    })
}

#[derive(Subcommand)]
pub(crate) enum IndexCommand {
    /// Read the whole disk and write its index
    Build {
        /// The image or block device
        image: PathBuf,
        /// Read no faster than this
        #[arg(long, value_name = "RATE")]
        rate: Option<Rate>,
    },
    /// Bring an index up to date; a disk that has not changed is not read
    Update {
        /// The image or block device
        image: PathBuf,
        /// Read no faster than this
        #[arg(long, value_name = "RATE")]
        rate: Option<Rate>,
    },
    /// Keep indexes fresh while guests write their disks, until it is ended
    ///
    /// Writes are seen in the kernel of this host: to block devices, and to files under loop devices. What was written is read again
    /// once it has been quiet for a turn. Needs root.
    Watch(WatchArgs),
    /// Compare an index with its disk: a sample, or all of it
    Verify {
        /// The image or block device
        image: PathBuf,
        /// Compare every entry
        #[arg(long)]
        all: bool,
    },
    /// Show what an index holds
    Stat {
        /// The image or block device
        image: PathBuf,
    },
}

#[derive(Args)]
pub(crate) struct WatchArgs {
    /// Images or block devices
    #[arg(required_unless_present = "xen")]
    pub(crate) images: Vec<PathBuf>,
    /// On a Xen host: the disks of all guests there, as they come and go, and the images under them
    #[arg(long)]
    pub(crate) xen: bool,
    /// How long a turn is
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) every: Duration,
    /// Read no faster than this, all disks together
    #[arg(long, value_name = "RATE", default_value = "32MiB/s")]
    pub(crate) rate: Rate,
}

#[derive(Subcommand)]
pub(crate) enum XenCommand {
    /// Have xl, libvirt and whatever else sits on libxl save and move guests with pageferry
    ///
    /// Xen's own helper is diverted (`dpkg-divert`), so that updates of Xen's packages do not undo this. Running it again
    /// brings the installed helper up to date.
    Install {
        /// The helper to install [default: the one beside this program]
        #[arg(long, value_name = "FILE")]
        helper: Option<PathBuf>,
        /// The host's root directory
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
    },
    /// Go back to Xen's own helper
    Uninstall {
        /// The host's root directory
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
    },
    /// Save a guest into a file with pageferry, without installing anything
    ///
    /// xl does what a toolstack has to (the guest's configuration, its devices) and must be there; memory and processors
    /// are pageferry's. The file is one of `xl save`, and `xl restore` reads it.
    Save(XenSaveArgs),
    /// Restore a guest from a file of `xl save` or of this program's, without installing anything
    ///
    /// xl builds the guest and its devices; memory and processors are pageferry's.
    Restore(XenRestoreArgs),
    /// Move a running guest to another Xen host with pageferry, without installing anything
    ///
    /// xl at both ends does what a toolstack has to. The other end is reached with ssh; it uses pageferry where the helper
    /// stands at the same path as here, and otherwise whatever that host saves and restores with. Both read the same stream.
    Migrate(Box<XenMigrateArgs>),
}

/// How `xen save` saves a guest.
#[derive(Args)]
pub(crate) struct XenSaveArgs {
    /// The guest: its name or number
    pub(crate) domain: String,
    /// Where to; what is there is overwritten
    pub(crate) file: PathBuf,
    /// Let the guest run on afterwards
    #[arg(long, conflicts_with = "keep_paused")]
    pub(crate) keep_running: bool,
    /// Leave the guest paused afterwards
    #[arg(long)]
    pub(crate) keep_paused: bool,
    /// Leave pages out of the file that stand on these of the guest's disks (with commas) [without a list: all of them]: they do
    /// not change any more until it is restored
    #[arg(long, value_name = "DISKS", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub(crate) disks_frozen: Option<String>,
    /// The save helper [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub(crate) helper: Option<PathBuf>,
}

/// How `xen restore` restores a guest.
#[derive(Args)]
pub(crate) struct XenRestoreArgs {
    /// Where it was saved to
    pub(crate) file: PathBuf,
    /// A configuration to use in place of the saved one
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Leave the guest paused
    #[arg(long)]
    pub(crate) paused: bool,
    /// Where one of the disks is that pages were left on, if not where it was at the save
    #[arg(long = "disk", value_name = "NAME=PATH")]
    pub(crate) disks: Vec<String>,
    /// The save helper [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub(crate) helper: Option<PathBuf>,
}

/// How `xen migrate` moves a guest.
#[derive(Args)]
pub(crate) struct XenMigrateArgs {
    /// The guest: its name or number
    pub(crate) domain: String,
    /// The other host, as ssh knows it
    #[arg(required_unless_present = "over", conflicts_with = "over")]
    pub(crate) host: Option<String>,
    /// Instead of a host: a shell command whose standard input and output are those of an `xl migrate-receive`
    #[arg(long, value_name = "COMMAND")]
    pub(crate) over: Option<String>,
    /// How to reach the other host: ssh with its options
    #[arg(long, value_name = "COMMAND", default_value = "ssh", conflicts_with = "over")]
    pub(crate) ssh: String,
    /// The save helper on the other host; it is an error if it is not there [default: this host's path, if it is there]
    #[arg(long, value_name = "FILE", conflicts_with = "over")]
    pub(crate) helper_there: Option<PathBuf>,
    /// Leave the guest paused on the other host
    #[arg(long, conflicts_with = "over")]
    pub(crate) paused: bool,
    /// Send all memory a second time, for the other end to say which pages differ; the guest stands still meanwhile
    #[arg(long)]
    pub(crate) compare: bool,
    /// When to stop the guest [default: as /etc/pageferry.toml and PAGEFERRY_POLICY say]
    #[arg(long, value_name = "WHOSE", value_enum)]
    pub(crate) policy: Option<XenPolicy>,
    /// Longest downtime to aim for
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_downtime: Option<Duration>,
    /// Most rounds while the guest runs
    #[arg(long, value_name = "N")]
    pub(crate) max_rounds: Option<u32>,
    /// What to do with a guest that writes faster than the link carries
    #[arg(long, value_name = "WHAT", value_enum)]
    pub(crate) if_not_converging: Option<IfNotConverging>,
    /// Whether to cap the guest's processor time while it writes faster than the link carries
    #[arg(long, value_name = "WHETHER", value_enum)]
    pub(crate) throttle: Option<Throttle>,
    /// The save helper [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub(crate) helper: Option<PathBuf>,
}

/// Whose policy says when a Xen guest is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum XenPolicy {
    /// When the predicted downtime is short enough
    Pageferry,
    /// As Xen does: five rounds, or under 50 pages left
    Stock,
}

impl XenPolicy {
    /// As settings call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pageferry => "pageferry",
            Self::Stock => "stock",
        }
    }
}

#[derive(Subcommand)]
pub(crate) enum StreamCommand {
    /// List what a stream consists of: records, page types, sizes; with `-v` each record of pages by itself
    Inspect {
        /// The file, or `-` for standard input
        file: PathBuf,
    },
    /// Count the pages in a stream that stand on disks too, and how many of them the disks' indexes lead to
    ///
    /// What `refer` and `lazy` could name and what they would: to be asked of what `xl save` wrote of a guest, before it runs on and
    /// writes its disks. Each disk is read whole.
    Findable {
        /// The file, or `-` for standard input
        file: PathBuf,
        /// A disk of the guest, or an image its pages may be referred to on; give it again for more
        #[arg(long = "disk", value_name = "IMAGE", required = true)]
        disks: Vec<PathBuf>,
    },
    /// Hold a stream against the specification and name each fault by its byte; exit code 10 if there is one
    Verify {
        /// The file, or `-` for standard input
        file: PathBuf,
        /// Also look whether the pages that the file leaves on disks still stand there; exit code 6 if a disk is not there, or
        /// another one
        #[arg(long)]
        disks: bool,
        /// Where one of those disks is, if not where it was at the save
        #[arg(long = "disk", value_name = "NAME=PATH", requires = "disks")]
        paths: Vec<String>,
    },
}

/// What a guest is made of.
#[derive(Args)]
pub(crate) struct GuestShape {
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub(crate) memory: Size,
    /// Its virtual processors, a thread each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// The image of a disk; give it again for a second one
    #[arg(long = "disk", value_name = "IMAGE")]
    pub(crate) disks: Vec<PathBuf>,
    /// What it does: the name of a shipped workload, or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "remote-desktop")]
    pub(crate) workload: String,
    /// Where its contents and choices start from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Touch all memory before it boots
    #[arg(long)]
    pub(crate) prefault: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn definitions_hold() {
        Cli::command().debug_assert();
    }
}
