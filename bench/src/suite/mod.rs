//! The suites, one a file.

mod bare;
mod bell;
mod clean;
mod disk;
mod evacuate;
mod limits;
mod link;
mod load;
mod micro;
mod modes;
mod peers;
mod scale;
mod stream;
mod tcp;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::demo::Link;
use crate::report::Row;

/// What every suite is given.
pub struct Context {
    /// Runs of each case.
    pub runs: usize,
    /// Smaller sizes, for a look.
    pub quick: bool,
    /// Workloads to go through; none named: all.
    pub workloads: Vec<String>,
    /// Links to go through.
    pub links: Vec<Link>,
    /// Where disks are.
    pub storage: Vec<Storage>,
    /// Where files may be made.
    pub scratch: PathBuf,
}

impl Context {
    /// The same once its scratch directory is there.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn ready(self) -> Result<Self> {
        let Self { scratch, .. } = &self;
        std::fs::create_dir_all(scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        Ok(self)
    }
}

/// Where a guest's disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Storage {
    /// Where the link is not needed for it.
    Own,
    /// On the link: what is read from it shares the rate with what is sent.
    Nas,
}

/// One comparison.
pub trait Suite {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// What it measures, in a line.
    fn about(&self) -> &'static str;
    /// Measures.
    ///
    /// # Errors
    /// When something it needs is missing, with the way to get it.
    fn run(&self, context: &Context) -> Result<Vec<Row>>;
}

/// What `--quick` runs where no suite is named.
pub const QUICK: [&str; 6] = ["stream", "load", "clean-round", "modes", "limits", "evacuate"];
/// The workloads it goes through.
pub const QUICK_WORKLOADS: [&str; 2] = ["remote-desktop", "overwrite-storm"];

/// All of them, in the order `all` runs them.
#[must_use]
pub fn all() -> Vec<Box<dyn Suite>> {
    vec![
        Box::new(stream::Stream),
        Box::new(load::Load),
        Box::new(clean::Clean),
        Box::new(modes::Modes),
        Box::new(limits::Limits),
        Box::new(peers::Peers),
        Box::new(scale::Scale),
        Box::new(evacuate::Evacuate),
        Box::new(micro::Micro),
        Box::new(bare::Bare),
        Box::new(tcp::Tcp),
        Box::new(link::Link),
        Box::new(disk::Disk),
        Box::new(bell::Bells),
    ]
}
