//! `pageferry stream verify --disks`: whether the pages that a file leaves on disks still stand there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mover::ExitClass;
use mover::error::DiskError;
use mover::limits::READ_DEPTH;
use mover::pipeline::load::SWEEP_PAGES;
use mover::pipeline::sweep::{Found, Sweeper};
use mover::pipeline::table::Wanted;
use mover::units::u64_of;
use serde::Serialize;
use xen_glue::restore::frozen;
use xen_glue::stream::FrozenDisks;
use xen_glue::stream::limits::FAULTS_KEPT_MAX;
use xen_glue::stream::scan::Left;

use crate::failure::{Failure, Outcome};
use crate::units::show_count;

/// Faults named on a screen.
const SHOWN_MAX: usize = 20;

/// What has been found on the disks.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Account {
    /// The disks, as "xvda (/dev/vg/desk)".
    pub(crate) disks: Vec<String>,
    /// Pages left there.
    pub(crate) pages: u64,
    /// Pages that still stand there.
    pub(crate) right: u64,
    /// Places with something else.
    pub(crate) other: u64,
    /// Places that can't be read.
    pub(crate) unreadable: u64,
    /// The first of those, a sentence each.
    pub(crate) faults: Vec<String>,
}

/// The disks of a file, open, and what is still to be looked at.
struct Open {
    disks: FrozenDisks,
    sweeper: Sweeper,
    pending: Vec<Wanted>,
}

/// Looks the pages up as the file is read.
pub(crate) struct Lookup {
    paths: BTreeMap<String, PathBuf>,
    open: Option<Open>,
    account: Account,
}

impl Lookup {
    /// On disks at `paths`, or where they were.
    pub(crate) fn new(paths: BTreeMap<String, PathBuf>) -> Self {
        Self { paths, open: None, account: Account::default() }
    }

    /// Takes in what a record says.
    pub(crate) fn take(&mut self, left: Left) -> Outcome {
        match left {
            Left::On(disks) => {
                self.look()?;
                self.account.disks.extend(disks.names());
                let opened = frozen::open(&disks, &self.paths)?;
                let sweeper = Sweeper::new(opened, disks.check_key(), READ_DEPTH)?;
                self.open = Some(Open { disks, sweeper, pending: Vec::new() });
                Ok(())
            }
            Left::At(references) => {
                // Without disks the stream itself is at fault, and that is told.
                let Some(open) = &mut self.open else { return Ok(()) };
                open.pending.extend(references.iter().map(|reference| reference.wanted()));
                if open.pending.len() >= SWEEP_PAGES { self.look() } else { Ok(()) }
            }
        }
    }

    /// Looks at what is pending.
    fn look(&mut self) -> Outcome {
        let Some(Open { disks, sweeper, pending }) = &mut self.open else { return Ok(()) };
        pending.sort_unstable_by_key(|page| (page.block, page.pfn));
        let account = &mut self.account;
        account.pages += u64_of(pending.len());
        sweeper.sweep(pending, &|| true, &mut |pages, found| {
            for (page, found) in pages.iter().zip(found) {
                match found {
                    Found::Right(_) => account.right += 1,
                    Found::Other => account.other += 1,
                    Found::Unreadable(_) => account.unreadable += 1,
                }
                account.faults.extend(frozen::fault(disks, page, found));
                account.faults.truncate(FAULTS_KEPT_MAX);
            }
            Ok::<(), DiskError>(())
        })?;
        pending.clear();
        Ok(())
    }

    /// What it has come to.
    pub(crate) fn finish(mut self) -> Outcome<Account> {
        self.look()?;
        Ok(self.account)
    }
}

impl Account {
    fn wrong(&self) -> u64 {
        self.other + self.unreadable
    }

    /// For a person.
    pub(crate) fn words(&self) -> String {
        if self.disks.is_empty() {
            return "\n  no page is left on a disk".to_owned();
        }
        let disks = self.disks.join(", ");
        let mut out = match self.wrong() {
            0 => format!("\n  {} pages stand on {disks}, as they did at the save", show_count(self.pages)),
            wrong => format!(
                "\n  {} of {} pages left on {disks} stand there no more",
                show_count(wrong),
                show_count(self.pages)
            ),
        };
        for fault in self.faults.iter().take(SHOWN_MAX) {
            out.push_str(&format!("\n  fault {fault}"));
        }
        let hidden = self.wrong().saturating_sub(u64_of(self.faults.len().min(SHOWN_MAX)));
        if hidden > 0 {
            out.push_str(&format!(
                "\n  and {} more; --json has the first {FAULTS_KEPT_MAX}",
                show_count(hidden)
            ));
        }
        out
    }

    /// A failure, if the guest can't be restored.
    pub(crate) fn verdict(&self, file: &str) -> Outcome {
        match (self.wrong(), self.faults.first()) {
            (0, _) | (_, None) => Ok(()),
            (wrong, Some(first)) => {
                let message = format!(
                    "{file} can't be restored: {} of {} pages are not on their disks any more, the first: {first}. The disks \
                     have to be what they were at the save (`--disk NAME=PATH` says where one is)",
                    show_count(wrong),
                    show_count(self.pages)
                );
                Err(Failure::new(ExitClass::Mismatch, message))
            }
        }
    }
}
