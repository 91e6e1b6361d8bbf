//! What the other steps need: components of the toolchain, programs from the registry, packages of the
//! distribution. Installs what is missing and says what for; where it may not, it says how to get it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run;

/// Something of the distribution that some tests use.
struct Package {
    /// A program in the PATH, or a file by its path.
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
}

const PACKAGES: [Package; 8] = [
    Package { program: "mkfs.ext4", package: "e2fsprogs", purpose: "file systems inside test images" },
    Package { program: "sfdisk", package: "fdisk", purpose: "partition tables inside test images" },
    Package { program: "ip", package: "iproute2", purpose: "network namespaces for `--link`" },
    Package { program: "tc", package: "iproute2", purpose: "shaping the link between them" },
    Package {
        program: "/usr/include/xen/domctl.h",
        package: "libxen-dev",
        purpose: "Xen's headers, with which our layouts are compared",
    },
    Package { program: "dh", package: "debhelper", purpose: "the Debian package" },
    Package { program: "lintian", package: "lintian", purpose: "holds that package against Debian's policy" },
    Package { program: "fio", package: "fio", purpose: "the yardstick of the load benchmark" },
];

/// A program from the registry.
struct Tool {
    program: &'static str,
    /// With a version, so that everybody runs the same checks.
    version: &'static str,
    purpose: &'static str,
}

const TOOLS: [Tool; 3] = [
    Tool { program: "cargo-nextest", version: "0.9.143", purpose: "runs the tests, a process each" },
    Tool { program: "cargo-deny", version: "0.20.2", purpose: "checks licences, sources and duplicates" },
    Tool { program: "cargo-fuzz", version: "0.13.2", purpose: "fuzzes what reads bytes from outside" },
];

/// Puts everything in place, or says what is missing.
pub(crate) fn run(install: bool) -> Result<String> {
    for component in ["rustfmt", "clippy"] {
        toolchain_component(component, install)?;
    }
    let mut installed = Vec::new();
    for tool in &TOOLS {
        if registry_tool(tool, install)? {
            installed.push(tool.program);
        }
    }
    let missing = distribution_packages(install)?;
    if let Err(error) = xen_headers(install) {
        println!("Xen's headers of other releases could not be had: {error:#}");
    }
    let done = if installed.is_empty() { "nothing to install".to_owned() } else { installed.join(", ") };
    Ok(match missing.as_slice() {
        [] => format!("complete; from the registry: {done}"),
        names => format!("without {}: tests that need them say SKIPPED", names.join(", ")),
    })
}

fn toolchain_component(component: &str, install: bool) -> Result<()> {
    let program = if component == "clippy" { "cargo-clippy" } else { "cargo-fmt" };
    if run::in_path(program) {
        return Ok(());
    }
    let how = format!("rustup component add {component}");
    if !install || !run::in_path("rustup") {
        bail!("{program} is missing; `{how}` installs it");
    }
    println!("installing {component} ({how})");
    run::succeed(run::command("rustup")?.args(["component", "add", component]))
}

/// Installs `tool` unless it is there. Any version does that is: a person's own may be newer.
fn registry_tool(tool: &Tool, install: bool) -> Result<bool> {
    if run::in_path(tool.program) {
        return Ok(false);
    }
    let how = format!("cargo install --locked {} --version {}", tool.program, tool.version);
    if !install {
        bail!("{} is missing ({}); `{how}` installs it", tool.program, tool.purpose);
    }
    println!("installing {} {} ({}): {how}", tool.program, tool.version, tool.purpose);
    let mut command =
        run::cargo(["install", "--quiet", "--locked", tool.program, "--version", tool.version])?;
    // Outside the workspace's target directory: a clean build must not throw it away.
    run::succeed(command.env_remove("CARGO_TARGET_DIR")).with_context(|| {
        format!("{} is needed ({}) and could not be installed", tool.program, tool.purpose)
    })?;
    Ok(true)
}

/// Installs missing packages where that is possible. Returns the programs still missing; the tests that use them
/// say so one by one.
fn distribution_packages(install: bool) -> Result<Vec<&'static str>> {
    let absent = || PACKAGES.iter().filter(|package| !run::in_path(package.program));
    let mut names: Vec<_> = absent().map(|package| package.package).collect();
    names.dedup();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    for package in absent() {
        println!("{} is missing: {} (package {})", package.program, package.purpose, package.package);
    }
    let how = format!("apt-get install -y --no-install-recommends {}", names.join(" "));
    if !install || !is_root() || !run::in_path("apt-get") {
        println!("not installed here; as root: {how}");
    } else if let Err(error) = apt(&names) {
        println!("could not be installed ({error:#}); as root: {how}");
    }
    Ok(absent().map(|package| package.program).collect())
}

fn apt(names: &[&str]) -> Result<()> {
    println!("installing {}", names.join(" "));
    let install = || -> Result<()> {
        let mut command = run::command("apt-get")?;
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["install", "-y", "-qq", "--no-install-recommends"]).args(names);
        run::output(&mut command).map(drop)
    };
    if install().is_ok() {
        return Ok(());
    }
    // A fresh machine has no package lists yet.
    run::output(run::command("apt-get")?.args(["update", "-qq"]))?;
    install()
}

/// The headers of the Xen versions this machine does not have installed, where the tests look for them.
fn xen_headers(install: bool) -> Result<()> {
    let into = target()?.join("xen-headers");
    if !install || !run::in_path("apt-get") || into.join("trixie").is_dir() && into.join("bookworm").is_dir()
    {
        return Ok(());
    }
    println!("fetching Xen's headers of Debian 12 and 13 into {}", into.display());
    let mut lab = run::cargo(["run", "--quiet", "--locked", "--package", "xen-lab", "--", "headers"])?;
    run::output(lab.arg(into)).map(drop)
}

/// Where cargo builds.
pub(crate) fn target() -> Result<PathBuf> {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(run::root()?.join(named.unwrap_or_else(|| "target".into())))
}

/// Whether this process is root: the owner of its own directory in /proc is its effective user.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    Path::new("/proc/self").metadata().is_ok_and(|data| data.uid() == 0)
}
