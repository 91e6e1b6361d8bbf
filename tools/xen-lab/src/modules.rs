//! Kernel modules for initial RAM disks: what a module needs, in the order in which to load it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::run;

/// The modules of a root.
pub(crate) struct Modules {
    directory: PathBuf,
    /// Name to path below the directory, and the paths it needs.
    loadable: HashMap<String, (String, Vec<String>)>,
    built_in: Vec<String>,
}

/// A module's name: its file's, without endings, with underscores.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl Modules {
    /// Those of the one kernel in `root`.
    pub(crate) fn of(root: &Path) -> Result<Self> {
        let place = root.join("lib/modules");
        let mut versions = fs::read_dir(&place)?.collect::<Result<Vec<_>, _>>()?;
        let (Some(version), true) = (versions.pop(), versions.is_empty()) else {
            bail!("{} should hold one kernel's modules", place.display());
        };
        let directory = version.path();
        let mut loadable = HashMap::new();
        for line in fs::read_to_string(directory.join("modules.dep"))?.lines() {
            let (path, needs) = line.split_once(':').context("modules.dep has a line without a colon")?;
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            loadable.insert(name_of(path), (path.to_owned(), needs));
        }
        let built_in = fs::read_to_string(directory.join("modules.builtin"))?.lines().map(name_of).collect();
        Ok(Self { directory, loadable, built_in })
    }

    /// The kernel's version.
    pub(crate) fn version(&self) -> Result<&str> {
        self.directory.file_name().and_then(|name| name.to_str()).context("a kernel version that is not text")
    }

    /// Puts `names` and what they need into `archive`: `/modules/NAME` each, and `/modules/order`.
    pub(crate) fn pack(&self, names: &[&str], archive: &mut Archive) -> Result<()> {
        let mut order = Vec::new();
        for name in names {
            self.collect(name, &mut order)?;
        }
        archive.directory("modules")?;
        for name in &order {
            let (path, _) = self.loadable.get(name).context("a module that is not there")?;
            archive.file(&format!("modules/{name}"), &self.content(path)?)?;
        }
        archive.file("modules/order", (order.join("\n") + "\n").as_bytes())
    }

    fn collect(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let name = name_of(name);
        if order.contains(&name) || self.built_in.contains(&name) {
            return Ok(());
        }
        let Some((_, needs)) = self.loadable.get(&name) else { bail!("the kernel has no module {name}") };
        for need in needs {
            self.collect(need, order)?;
        }
        // A module it needs may have asked for it in turn.
        if !order.contains(&name) {
            order.push(name);
        }
        Ok(())
    }

    fn content(&self, path: &str) -> Result<Vec<u8>> {
        let file = self.directory.join(path);
        if !path.ends_with(".xz") {
            return fs::read(&file).with_context(|| format!("cannot read {}", file.display()));
        }
        let unpacked = tempfile::NamedTempFile::new()?;
        run::logged(
            Command::new("sh").args(["-c", "xz -dc < \"$1\" > \"$2\"", "sh"]).arg(&file).arg(unpacked.path()),
            Path::new("/dev/stderr"),
            Duration::from_secs(60),
        )?;
        Ok(fs::read(unpacked.path())?)
    }
}
