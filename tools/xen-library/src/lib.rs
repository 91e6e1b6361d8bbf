//! `libpageferry_xen.so`: Xen's `xc_domain_save` and `xc_domain_restore` for programs that link them, as `include/pageferry_xen.h`
//! declares them. `xen_glue::abi::entry` has the whole story.

#![forbid(unsafe_code)]

pub use xen_glue::abi::entry::{xc_domain_restore, xc_domain_save};
