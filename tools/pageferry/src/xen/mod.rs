//! `pageferry xen ...`: pageferry on a Xen host.

mod install;
mod xl;

use crate::cli::XenCommand;
use crate::console::Console;
use crate::failure::Outcome;

/// Does what the command says.
pub(crate) fn run(command: &XenCommand, console: &Console) -> Outcome {
    match command {
        XenCommand::Install { helper, root } => install::install(helper.as_deref(), root, console),
        XenCommand::Uninstall { root } => install::uninstall(root, console),
        XenCommand::Save(args) => xl::save(args, console),
        XenCommand::Restore(args) => xl::restore(args, console),
        XenCommand::Migrate(args) => xl::migrate(args, console),
    }
}
