//! The command line, defined once: parsing, help, completions and the man page all come from here.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::failure;
use crate::units::Size;

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
    /// Start, look at and end guests that are processes of this machine
    Guest {
        #[command(subcommand)]
        command: GuestCommand,
    },
    /// Try what this kernel and machine offer; say what is lost without it and how to get it
    Doctor {
        /// Where disks are to be read from: an image, or the directory images are in
        #[arg(long, value_name = "PATH", default_value = ".")]
        path: PathBuf,
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
