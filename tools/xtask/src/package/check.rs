//! The package in a clean root: installed, used, upgraded, Xen updated and removed beneath it, removed, purged. What was
//! there before is there behind it, to the byte.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{Profile, build};
use crate::ci::skipped;
use crate::{run, setup};

/// What dpkg, man and apt write for themselves.
const THEIR_OWN: [&str; 7] = [
    "var/lib/dpkg",
    "var/cache",
    "var/log",
    "proc",
    "dev",
    "sys",
    "var/lib/systemd/deb-systemd-helper-enabled",
];

/// Files the package has to have, and their modes.
const FILES: [(&str, u32); 17] = [
    ("usr/bin/pageferry", 0o755),
    ("usr/libexec/pageferry/pageferry-save-helper", 0o755),
    ("usr/lib/pageferry/libpageferry_xen.so", 0o644),
    ("usr/include/pageferry_xen.h", 0o644),
    ("etc/pageferry.toml", 0o644),
    ("usr/lib/systemd/system/pageferry-index@.service", 0o644),
    ("usr/lib/systemd/system/pageferry-index@.timer", 0o644),
    ("usr/lib/systemd/system/pageferry-index-watch.service", 0o644),
    ("usr/lib/systemd/system/pageferry-metrics.service", 0o644),
    ("usr/share/bash-completion/completions/pageferry", 0o644),
    ("usr/share/zsh/vendor-completions/_pageferry", 0o644),
    ("usr/share/fish/vendor_completions.d/pageferry.fish", 0o644),
    ("usr/share/man/man1/pageferry.1.gz", 0o644),
    ("usr/share/man/man1/pageferry-send.1.gz", 0o644),
    ("usr/share/man/man1/pageferry-xen-install.1.gz", 0o644),
    ("usr/share/doc/pageferry/copyright", 0o644),
    ("usr/share/doc/pageferry/changelog.gz", 0o644),
    ("usr/share/doc/pageferry/README.md.gz", 0o644),
];

/// The step of `cargo xtask ci`: with the programs as they are built for tests, which is not what a release has, but is
/// packaged the same.
pub(crate) fn step() -> Result<String> {
    if let Some(obstacle) = obstacle() {
        return Ok(skipped("the package", obstacle));
    }
    let package = build(Profile::Debug)?;
    run(&package)
}

fn obstacle() -> Option<&'static str> {
    if !setup::is_root() {
        return Some("a clean root to install it into needs root (mmdebstrap, chroot)");
    }
    if !Path::new("/etc/debian_version").exists() || !run::in_path("dh") {
        return Some("it is made by Debian's debhelper, which is not here");
    }
    None
}

/// Tries `package`; what of it was seen.
pub(crate) fn run(package: &Path) -> Result<String> {
    let lint = lint(package)?;
    let Some(clean) = clean_root()? else {
        return Ok(skipped("the package", "it was built, but there is no clean root to install it into"));
    };
    let place = package.parent().context("a package stands in a directory")?.join("root");
    let root = Root::copy(&clean, &place)?;
    fs::copy(package, root.path("pageferry.deb"))?;
    fs::copy(clean.join("xen-utils.deb"), root.path("xen-utils.deb"))?;
    let before = root.files()?;
    let helper = root.xen_helper()?;

    let files = installed(&root, &helper)?;
    diverted(&root, &helper)?;
    removed(&root, &helper, &before)?;
    xen_goes_first(&root, &helper)?;
    fs::remove_dir_all(&place)?;
    Ok(format!(
        "{files} files, installed, diverted, upgraded, removed, purged in a clean root; nothing left; {lint}"
    ))
}

/// lintian's opinion; its errors and warnings are ours.
fn lint(package: &Path) -> Result<String> {
    if !run::in_path("lintian") {
        return Ok("NOT CHECKED by lintian, which is not here".into());
    }
    let mut lintian = run::command("lintian")?;
    lintian.args(["--fail-on", "error,warning", "--tag-display-limit", "0", "--allow-root"]).arg(package);
    let output = lintian.output().context("cannot start lintian")?;
    ensure!(
        output.status.success(),
        "lintian finds fault with the package:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok("lintian finds no fault".into())
}

/// What it is copied from: a Debian of this machine's release, from the lab's cache.
fn clean_root() -> Result<Option<PathBuf>> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("unknown");
    let mut lab = run::cargo(["run", "--quiet", "--locked", "--package", "xen-lab", "--"])?;
    match run::output(lab.args(["clean-root", "--suite", suite.trim_matches('"')])) {
        Ok(said) => Ok(Some(PathBuf::from(said.trim()))),
        // No mirror, no room: no fault of the tree.
        Err(error) => {
            println!("no clean root: {error:#}");
            Ok(None)
        }
    }
}

/// Installs; every file, and what one does with them.
fn installed(root: &Root, helper: &Helper) -> Result<usize> {
    root.must("dpkg --install pageferry.deb")?;
    for (file, mode) in FILES {
        let found = fs::metadata(root.path(file)).with_context(|| format!("/{file} was not installed"))?;
        let found = found.permissions().mode() & 0o7777;
        ensure!(found == mode, "/{file} has mode {found:o}, not {mode:o}");
    }
    let listed = root.must("dpkg --listfiles pageferry")?;
    let files = listed.lines().filter(|path| root.path(path.trim_start_matches('/')).is_file()).count();
    let damaged = root.must("dpkg --verify pageferry")?;
    ensure!(damaged.is_empty(), "files are not as the package has them:\n{damaged}");

    let version = root.must("pageferry --version")?;
    ensure!(version.contains(env!("CARGO_PKG_VERSION")), "`pageferry --version` said {version}");
    for (page, words) in [("pageferry", "EXIT STATUS"), ("pageferry-send", "--max-downtime")] {
        let text = root.must(&format!("MANWIDTH=100 man --pager=cat {page} | sed 's/.\\x08//g'"))?;
        ensure!(text.to_uppercase().contains(&words.to_uppercase()), "`man {page}` has no {words}:\n{text}");
    }
    root.must("bash -n /usr/share/bash-completion/completions/pageferry")?;
    units(root)?;
    ensure!(root.read(&helper.path)? == helper.stock, "installing alone has changed Xen's save helper");
    Ok(files)
}

/// systemd reads the units, if this machine has one to ask.
fn units(root: &Root) -> Result<()> {
    if !run::in_path("systemd-analyze") {
        println!("NOT CHECKED: the units; systemd-analyze is not here");
        return Ok(());
    }
    for unit in [
        "pageferry-index@dev-vdb.service",
        "pageferry-index@dev-vdb.timer",
        "pageferry-index-watch.service",
        "pageferry-metrics.service",
    ] {
        let mut analyze = run::command("systemd-analyze")?;
        analyze.arg("--man=no").arg(format!("--root={}", root.directory.display())).args(["verify", unit]);
        let output = analyze.output().context("cannot start systemd-analyze")?;
        let said = String::from_utf8_lossy(&output.stderr);
        // The root has no systemd of its own: the targets that every unit needs are not in there.
        let ours =
            said.lines().filter(|line| line.contains("pageferry") && !line.contains(".target not found"));
        let ours: Vec<_> = ours.collect();
        ensure!(ours.is_empty(), "systemd finds fault with {unit}:\n{}", ours.join("\n"));
    }
    Ok(())
}

/// The diversion, through upgrades of both packages.
fn diverted(root: &Root, helper: &Helper) -> Result<()> {
    let ours = root.read("usr/libexec/pageferry/pageferry-save-helper")?;
    let in_place = |when: &str| -> Result<()> {
        ensure!(root.read(&helper.path)? == ours, "{when}: what libxl starts is not pageferry's helper");
        ensure!(root.read(&helper.kept)? == helper.stock, "{when}: Xen's own is not kept as it was");
        Ok(())
    };
    root.must("pageferry xen install")?;
    in_place("behind `pageferry xen install`")?;
    fs::write(root.path(&helper.path), "an older one")?;
    root.must("dpkg --install pageferry.deb")?;
    in_place("behind an upgrade of pageferry")?;
    root.must("dpkg --force-depends --install xen-utils.deb")?;
    in_place("behind an upgrade of Xen")?;
    fs::remove_file(root.path("xen-utils.deb"))
        .context("the package of Xen's that was installed is not there")?;
    Ok(())
}

/// Removed, then purged.
fn removed(root: &Root, helper: &Helper, before: &Files) -> Result<()> {
    // What an operator has made meanwhile.
    let settings = "policy = \"stock\"\n";
    fs::write(root.path("etc/pageferry.toml"), settings)?;
    fs::create_dir_all(root.path("var/lib/pageferry/index"))?;
    fs::write(root.path("var/lib/pageferry/index/disk"), "an index")?;
    let wants = root.path("etc/systemd/system/timers.target.wants");
    let wants_before = wants.exists();
    fs::create_dir_all(&wants)?;
    let timer = "/usr/lib/systemd/system/pageferry-index@.timer";
    std::os::unix::fs::symlink(timer, wants.join("pageferry-index@dev-vdb.timer"))?;

    root.must("dpkg --remove pageferry")?;
    ensure!(root.read(&helper.path)? == helper.stock, "removing did not bring Xen's own helper back");
    ensure!(!root.path(&helper.kept).exists(), "removing left {} behind", helper.kept);
    let diversions = root.must("dpkg-divert --list '*libxl-save-helper*'")?;
    ensure!(diversions.is_empty(), "removing left a diversion behind: {diversions}");
    ensure!(root.read("etc/pageferry.toml")? == settings.as_bytes(), "removing took the settings along");
    ensure!(!root.path("usr/bin/pageferry").exists(), "removing left the program behind");

    root.must("dpkg --purge pageferry")?;
    if !wants_before {
        fs::remove_dir(&wants).context("purging left a timer behind")?;
    }
    let mut before = before.clone();
    before.remove(Path::new("xen-utils.deb"));
    let left = differences(&before, &root.files()?);
    ensure!(left.is_empty(), "purging does not leave what was there before:\n{}", left.join("\n"));
    Ok(())
}

/// Xen is purged with the diversion in place: nothing of ours stays where it was.
fn xen_goes_first(root: &Root, helper: &Helper) -> Result<()> {
    root.must("dpkg --install pageferry.deb && pageferry xen install")?;
    root.must(&format!("dpkg --force-depends --purge {}", helper.package))?;
    root.must("dpkg --purge pageferry")?;
    ensure!(!root.path(&helper.path).exists(), "{} stays behind where there is no Xen", helper.path);
    let diversions = root.must("dpkg-divert --list '*libxl-save-helper*'")?;
    ensure!(diversions.is_empty(), "a diversion stays behind where there is no Xen: {diversions}");
    Ok(())
}

/// Xen's own save helper in a root.
struct Helper {
    /// Where it is, below the root.
    path: String,
    /// Where `pageferry xen install` keeps it.
    kept: String,
    /// The package it comes in.
    package: String,
    stock: Vec<u8>,
}

/// A root to break.
struct Root {
    directory: PathBuf,
}

/// What is in a root: a mode, and the contents, a link's target, or nothing.
type Files = BTreeMap<PathBuf, (u32, Vec<u8>)>;

impl Root {
    fn copy(clean: &Path, to: &Path) -> Result<Self> {
        let mut copy = run::command("cp")?;
        run::succeed(copy.args(["--archive", "--reflink=auto", "--"]).arg(clean.join("root")).arg(to))?;
        Ok(Self { directory: to.to_owned() })
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.directory.join(inside)
    }

    fn read(&self, inside: &str) -> Result<Vec<u8>> {
        fs::read(self.path(inside)).with_context(|| format!("cannot read /{inside} of the root"))
    }

    /// Runs a line of shell in it as its root; what it printed. In a mount namespace of its own, which takes /proc along
    /// when it ends.
    fn must(&self, line: &str) -> Result<String> {
        let script = "mount -t proc proc \"$1/proc\" && exec chroot \"$1\" /bin/sh -c \"$2\"";
        let mut command = run::command("unshare")?;
        command.args(["--mount", "--", "sh", "-c", script, "sh"]).arg(&self.directory).arg(line);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.env("DEBIAN_FRONTEND", "noninteractive").env("HOME", "/root");
        let output = command.output().context("cannot start unshare (util-linux)")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "in the root, `{line}` ended with {}:\n{said}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(said)
    }

    fn xen_helper(&self) -> Result<Helper> {
        let lib = self.path("usr/lib");
        for entry in fs::read_dir(&lib)? {
            let name = entry?.file_name();
            let Some(version) = name.to_str().and_then(|name| name.strip_prefix("xen-")) else { continue };
            let path = format!("usr/lib/xen-{version}/bin/libxl-save-helper");
            if let Ok(stock) = self.read(&path) {
                let (kept, package) = (format!("{path}.stock"), format!("xen-utils-{version}"));
                return Ok(Helper { path, kept, package, stock });
            }
        }
        bail!("the clean root has no Xen in {}", lib.display())
    }

    /// Everything in it but what package managers write for themselves.
    fn files(&self) -> Result<Files> {
        let mut all = Files::new();
        let mut below = vec![PathBuf::new()];
        while let Some(directory) = below.pop() {
            for entry in fs::read_dir(self.directory.join(&directory))? {
                let inside = directory.join(entry?.file_name());
                if THEIR_OWN.iter().any(|own| inside == Path::new(own)) {
                    continue;
                }
                let path = self.directory.join(&inside);
                let meta = fs::symlink_metadata(&path)?;
                let kind = meta.file_type();
                let contents = if kind.is_symlink() {
                    fs::read_link(&path)?.into_os_string().into_encoded_bytes()
                } else if kind.is_file() {
                    fs::read(&path)?
                } else {
                    ensure!(!kind.is_socket(), "/{} is a socket", inside.display());
                    Vec::new()
                };
                if kind.is_dir() {
                    below.push(inside.clone());
                }
                all.insert(inside, (meta.permissions().mode(), contents));
            }
        }
        Ok(all)
    }
}

/// A line for each path that is not the same in both.
fn differences(before: &Files, after: &Files) -> Vec<String> {
    let gone = before.keys().filter(|path| !after.contains_key(*path)).map(|path| (path, "is gone"));
    let other = after.iter().filter_map(|(path, found)| match before.get(path) {
        None => Some((path, "is left behind")),
        Some(was) if was != found => Some((path, "is another one")),
        Some(_) => None,
    });
    gone.chain(other).map(|(path, what)| format!("/{} {what}", path.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_gone_or_changed_is_named() {
        let files = |all: &[(&str, u32, &str)]| -> Files {
            all.iter().map(|(path, mode, text)| (path.into(), (*mode, text.as_bytes().to_vec()))).collect()
        };
        let before = files(&[("same", 1, "a"), ("gone", 1, ""), ("text", 1, "a"), ("mode", 1, "")]);
        let after = files(&[("same", 1, "a"), ("new", 1, ""), ("text", 1, "b"), ("mode", 2, "")]);
        let lines = differences(&before, &after);
        assert_eq!(
            lines,
            ["/gone is gone", "/mode is another one", "/new is left behind", "/text is another one"]
        );
        assert!(differences(&before, &before).is_empty());
    }
}
