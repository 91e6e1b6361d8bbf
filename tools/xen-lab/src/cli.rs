//! The command line.

#![expect(clippy::print_stdout, reason = "what a command-line program prints is its result")]

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::cache::Cache;
use crate::lab::{self, Lab};
use crate::spec::{HOST_MEMORY_MIB, HostSpec, Hypervisor, Spec, Suite};
use crate::tests::Tier;
use crate::tests::runner::Order;
use crate::{clean_root, compare, headers, payload, shell, speed, wait};

/// Two real Xen hosts under QEMU's software emulation, and guests that are migrated between them.
#[derive(Parser)]
#[command(name = "cargo xtask xen-lab", bin_name = "cargo xtask xen-lab")]
pub struct Cli {
    /// Which lab: several may be up at once.
    #[arg(long, global = true, default_value = "default", value_name = "NAME")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what the lab needs and builds what its hosts boot, as far as it is not there yet.
    Build(Hosts),
    /// Boots both hosts, with the project's binaries at /opt/pageferry.
    Up {
        #[command(flatten)]
        hosts: Hosts,
        /// Memory of each host, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = HOST_MEMORY_MIB)]
        memory: u32,
        /// Where the binaries are taken from; target/release unless told otherwise.
        #[arg(long, value_name = "DIRECTORY")]
        binaries: Option<PathBuf>,
    },
    /// A shell in a host's dom0, on this terminal.
    Shell {
        /// 1 or 2.
        #[arg(value_parser = clap::value_parser!(u8).range(1..=2))]
        host: u8,
    },
    /// Runs commands in a host's dom0; output and exit code are theirs.
    Run {
        /// 1 or 2.
        #[arg(value_parser = clap::value_parser!(u8).range(1..=2))]
        host: u8,
        /// For bash.
        commands: String,
        /// Most seconds it may take.
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        limit: u32,
        /// Gives them our standard input, all of it.
        #[arg(long)]
        input: bool,
    },
    /// Puts files into a running lab's /opt/pageferry, on both hosts: a new build is tried within seconds.
    Push {
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Runs tests; brings up the hosts they need, or takes the lab that is up if it has such hosts.
    Test {
        /// Parts of names; all of the tier if none is given.
        names: Vec<String>,
        /// Names the tests instead.
        #[arg(long)]
        list: bool,
        /// How much.
        #[arg(long, value_enum, default_value = "ci")]
        tier: Tier,
        /// Where the project's binaries are taken from; built into target/release unless given.
        #[arg(long, value_name = "DIRECTORY")]
        binaries: Option<PathBuf>,
    },
    /// Fetches the C headers of each release's Xen, with which tests compare our layouts.
    Headers {
        /// Where they go: DIRECTORY/RELEASE/usr/include.
        directory: PathBuf,
    },
    /// Prints where a Debian with Xen's toolstack and little else is; builds it if need be.
    CleanRoot {
        /// Debian release.
        #[arg(long, value_enum, default_value = "bookworm")]
        suite: Suite,
    },
    /// Migrates a guest of 512 MiB by stock's helper and by ours, over the stream and by lanes, in turns, and prints how long each
    /// took: about 20 minutes.
    Speed {
        /// Migrations there and back by each helper.
        #[arg(long, value_name = "NUMBER", default_value_t = 3)]
        runs: usize,
        /// How much of the guest's memory is zero, in percent; a guest for each.
        #[arg(long, value_name = "PERCENT", default_values_t = [0, 50], value_parser = clap::value_parser!(u32).range(0..=100))]
        zero: Vec<u32>,
        /// Leaves out how often Xen is asked, for which each way takes a slow migration of its own.
        #[arg(long)]
        no_calls: bool,
        /// Where the project's binaries are taken from; built into target/release unless given.
        #[arg(long, value_name = "DIRECTORY")]
        binaries: Option<PathBuf>,
    },
    /// Migrates a guest that has read files of the shared disk by stock's helper and by ours in each mode, in turns, over a wire shaped to
    /// half of what stock takes unshaped: about ten minutes a run.
    Compare {
        /// Migrations each way is measured for.
        #[arg(long, value_name = "NUMBER", default_value_t = 3)]
        runs: usize,
        /// MiB of files it has read.
        #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=384))]
        files: u32,
        /// Adds each run to this file, and tells of all that are in it: runs may be of several days.
        #[arg(long, value_name = "FILE")]
        record: Option<PathBuf>,
        /// Where the project's binaries are taken from; built into target/release unless given.
        #[arg(long, value_name = "DIRECTORY")]
        binaries: Option<PathBuf>,
    },
    /// Copies what tells what happened (consoles, toolstack, guests) into a directory, and says where.
    Logs,
    /// Ends the lab.
    Down,
}

/// What the hosts are.
#[derive(Args)]
struct Hosts {
    /// Debian release of both hosts.
    #[arg(long, value_enum, default_value = "bookworm")]
    suite: Suite,
    /// Hypervisor of both hosts.
    #[arg(long, value_enum, default_value = "stock")]
    hypervisor: Hypervisor,
    /// Host 1, where it shall differ: SUITE or SUITE:HYPERVISOR.
    #[arg(long, value_name = "HOST")]
    host1: Option<HostSpec>,
    /// Host 2, where it shall differ.
    #[arg(long, value_name = "HOST")]
    host2: Option<HostSpec>,
}

impl Hosts {
    fn spec(&self, memory_mib: u32, binaries: PathBuf) -> Spec {
        let both = HostSpec { suite: self.suite, hypervisor: self.hypervisor };
        Spec { hosts: [self.host1.unwrap_or(both), self.host2.unwrap_or(both)], memory_mib, binaries }
    }
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> Result<ExitCode> {
        let cache = Cache::open()?;
        match self.command {
            Command::Build(hosts) => {
                lab::build(&cache, &hosts.spec(HOST_MEMORY_MIB, payload::release_directory()?))?;
            }
            Command::Up { hosts, memory, binaries } => {
                let binaries = binaries.map_or_else(payload::release_directory, Ok)?;
                Lab::up(&cache, &self.name, hosts.spec(memory, binaries))?;
            }
            Command::Shell { host } => {
                let code = shell::run(Lab::attach(&cache, &self.name)?.host(host.into()))?;
                return Ok(exit_code(code));
            }
            Command::Run { host, commands, limit, input } => {
                return run(&Lab::attach(&cache, &self.name)?, host, &commands, limit, input);
            }
            Command::Push { files } => push(&Lab::attach(&cache, &self.name)?, &files)?,
            Command::Test { names, list, tier, binaries } => {
                let order = Order { lab: self.name, names, tier, binaries };
                if list {
                    order.list()?.iter().for_each(|name| println!("{name}"));
                } else if !order.run(&cache)? {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Command::Headers { directory } => {
                for directory in headers::fetch(&directory)? {
                    println!("{}", directory.display());
                }
            }
            Command::CleanRoot { suite } => println!("{}", clean_root::object(&cache, suite)?.display()),
            Command::Speed { runs, zero, no_calls, binaries } => {
                let binaries = binaries.map_or_else(payload::built, Ok)?;
                let order =
                    speed::Order { lab: self.name, runs: runs.max(1), zero, calls: !no_calls, binaries };
                println!("{}", order.run(&cache)?);
            }
            Command::Compare { runs, files, record, binaries } => {
                let binaries = binaries.map_or_else(payload::built, Ok)?;
                let order =
                    compare::Order { lab: self.name, runs: runs.max(1), files_mib: files, record, binaries };
                println!("{}", order.run(&cache)?);
            }
            Command::Logs => {
                println!("{}", Lab::attach(&cache, &self.name)?.save_logs("asked-for")?.display())
            }
            Command::Down => Lab::down(&cache, &self.name)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn exit_code(code: i32) -> ExitCode {
    // As shells have it for signals.
    let code = if code < 0 { 128 - code } else { code };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

fn run(lab: &Lab, host: u8, commands: &str, limit: u32, with_input: bool) -> Result<ExitCode> {
    let mut input = Vec::new();
    if with_input {
        io::stdin().read_to_end(&mut input)?;
    }
    let mut sink = |is_error: bool, bytes: &[u8]| {
        // Who reads our output may have gone; the command goes on.
        let _ = if is_error { io::stderr().write_all(bytes) } else { io::stdout().write_all(bytes) };
        let _ = io::stdout().flush();
    };
    let output = lab.host(host.into()).watch(commands, &input, wait::limit(limit), &mut sink)?;
    Ok(exit_code(output.code))
}

fn push(lab: &Lab, files: &[PathBuf]) -> Result<()> {
    for file in files {
        let name = file.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        for host in 1..=2 {
            lab.host(host).put(&format!("/opt/pageferry/{name}"), &content)?;
        }
        println!("{name}: {} bytes, on both hosts", content.len());
    }
    Ok(())
}
