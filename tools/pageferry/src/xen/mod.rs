//! `pageferry xen ...`: pageferry on a Xen host.

mod install;

use crate::cli::XenCommand;
use crate::console::Console;
use crate::failure::Outcome;

/// Does what the command says.
pub(crate) fn run(command: &XenCommand, console: &Console) -> Outcome {
    match command {
        XenCommand::Install { helper, root } => install::install(helper.as_deref(), root, console),
        XenCommand::Uninstall { root } => install::uninstall(root, console),
    }
}
