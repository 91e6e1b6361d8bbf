//! A clean root directory: a Debian with nothing but its essential packages, Xen's toolstack and a reader of man pages,
//! to install a package of the project into. Whoever uses it takes a copy.
//!
//! The object holds `root`, and `xen-utils.deb`, Xen's own package once more, so that an update of it can be played.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::cache::Cache;
use crate::spec::Suite;
use crate::{machine, run};

/// Raised when this file builds something else from the same inputs.
const RECIPE: &str = "1";
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// Downloads Xen's own package beside the root, by the lists that have just filled it: this machine's own may be older, and
/// name another version.
const KEEP_XEN: &str = "cd \"$1/..\" && APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get -q -o APT::Sandbox::User= \
                        download \"$XEN_UTILS\" && mv ./xen-utils-*.deb xen-utils.deb";

/// The root of `suite`, built if need be.
pub(crate) fn object(cache: &Cache, suite: Suite) -> Result<PathBuf> {
    let xen = format!("xen-utils-{}", suite.xen());
    let packages = format!("man-db,{xen}");
    let inputs = [RECIPE, suite.name(), &packages, KEEP_XEN];
    cache
        .object(&format!("clean-root-{suite}"), &inputs, |into, log| build(suite, &packages, &xen, into, log))
}

fn build(suite: Suite, packages: &str, xen: &str, into: &Path, log: &Path) -> Result<()> {
    machine::require_root()?;
    machine::ensure(&[("mmdebstrap", "mmdebstrap")], log)?;
    let sources = into.join("sources.list");
    fs::write(&sources, machine::sources(suite, "deb")?)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=essential", "--format=directory"]);
    command.arg(format!("--include={packages}")).arg(format!("--customize-hook={KEEP_XEN}"));
    command.env("XEN_UTILS", xen).arg(suite.name()).arg(into.join("root")).arg(&sources);
    run::logged(&mut command, log, LIMIT)
}
