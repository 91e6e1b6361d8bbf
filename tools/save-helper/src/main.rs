//! `pageferry-save-helper`: what libxl starts for every save and restore, in the place of `libxl-save-helper`. It takes
//! libxl's arguments and nothing else; `xen_glue::helper` has the whole story.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use xen_glue::helper::{self, Hypervisor};

fn main() -> ExitCode {
    helper::main(&Hypervisor)
}
