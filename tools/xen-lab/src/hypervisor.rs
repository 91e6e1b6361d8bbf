//! The full hypervisor: Debian's source package, built with shadow paging (live migration of PV guests) and memory
//! paging (lazy restore). No distribution ships either.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::spec::Suite;
use crate::{machine, run};

/// Raised when this file builds something else from the same inputs.
const RECIPE: &str = "1";
const CONFIGURATION: &str =
    "CONFIG_UNSUPPORTED=y\nCONFIG_MEM_PAGING=y\nCONFIG_MEM_ACCESS=y\nCONFIG_SHADOW_PAGING=y\n";
const FETCH_LIMIT: Duration = Duration::from_secs(300);
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The object with the full hypervisor of `suite` (`xen`), built if need be.
pub(crate) fn object(cache: &Cache, suite: Suite) -> Result<PathBuf> {
    cache.object(
        &format!("hypervisor-{suite}"),
        &[RECIPE, suite.name(), suite.xen(), CONFIGURATION],
        |into, log| build(suite, into, log),
    )
}

fn build(suite: Suite, into: &Path, log: &Path) -> Result<()> {
    machine::ensure(&machine::TO_BUILD_XEN, log)?;
    let source = fetch(suite, into, log)?;
    fs::write(source.join("arch/x86/configs/lab_defconfig"), CONFIGURATION)?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let make = |target: &[&str]| {
        let mut command = Command::new("make");
        command.arg("-s").arg(format!("-j{processors}")).arg("-C").arg(&source).args(target);
        run::logged(&mut command, log, BUILD_LIMIT)
    };
    make(&["lab_defconfig"])?;
    let configured = fs::read_to_string(source.join(".config"))?;
    for option in CONFIGURATION.lines() {
        if !configured.lines().any(|line| line == option) {
            bail!("{option} did not come into the hypervisor's configuration");
        }
    }
    make(&[])?;
    fs::copy(source.join("xen"), into.join("xen")).context("the build made no hypervisor")?;
    fs::remove_dir_all(into.join("source"))?;
    Ok(())
}

/// Fetches and unpacks the newest source the archive still holds (of a point release just replaced it may not hold it
/// any more, or not yet). Returns the directory `xen` in it. The machine's own apt configuration stays as it is.
fn fetch(suite: Suite, into: &Path, log: &Path) -> Result<PathBuf> {
    let place = into.join("source");
    let lists = place.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let sources = place.join("sources.list");
    fs::write(&sources, machine::sources(suite, "deb-src")?)?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(&place);
        for (option, value) in [
            ("Dir::Etc::SourceList", sources.as_path()),
            ("Dir::Etc::SourceParts", Path::new("-")),
            ("Dir::State::Lists", &lists),
            ("Dir::Cache::PkgCache", Path::new("")),
            ("Dir::Cache::SrcPkgCache", Path::new("")),
            ("APT::Sandbox::User", Path::new("root")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command
    };
    run::logged(apt("apt-get").args(["update", "-q"]), log, FETCH_LIMIT)?;
    let shown = run::output(apt("apt-cache").args(["showsrc", "--only-source", "xen"]), FETCH_LIMIT)?;
    let mut versions: Vec<&str> = shown.lines().filter_map(|line| line.strip_prefix("Version: ")).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions.dedup();
    let fetched = versions.iter().any(|version| {
        let mut command = apt("apt-get");
        command.args(["source", "-q", "--download-only", "--only-source", &format!("xen={version}")]);
        run::logged(&mut command, log, FETCH_LIMIT).is_ok()
    });
    if !fetched {
        bail!(
            "no source package of Xen could be fetched (tried {}); the log has apt's words",
            versions.join(", ")
        );
    }
    // Upstream's own tree: Debian's changes are to the tools.
    let tree = place.join("tree");
    fs::create_dir(&tree)?;
    let unpack = "tar -C tree --strip-components=1 -xf xen_*.orig.tar.*";
    run::logged(Command::new("sh").args(["-c", unpack]).current_dir(&place), log, FETCH_LIMIT)?;
    let source = tree.join("xen");
    if !source.join("arch/x86").is_dir() {
        bail!("the source package has no hypervisor in it");
    }
    Ok(source)
}
