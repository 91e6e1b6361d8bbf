//! A guest most of whose pages stand on a disk that is overwritten, every other block, when the guest is stopped: of the pages that
//! are outstanding then, the source alone has those.

use std::os::unix::fs::FileExt;

use super::*;

/// Pages that stand on the disk, from page `FIRST` on.
pub(super) const SHELVED: u64 = 3000;
pub(super) const FIRST: u64 = 500;
/// Pages of the guest's.
pub(super) const PAGES: usize = 4000;
/// The least pages that have to be outstanding for a test to say anything.
pub(super) const ENOUGH: usize = 50;

/// Whether the page's block is overwritten when the guest is stopped.
pub(super) fn is_gone(pfn: Pfn) -> bool {
    (FIRST..FIRST + SHELVED).contains(&pfn.0) && pfn.0 % 2 == 1
}

pub(super) struct Overwritten {
    pub(super) guest: Rc<RefCell<Guest>>,
    pub(super) plan: Plan,
    /// What overwrites the blocks.
    pub(super) toolstack: SimToolstack,
    pub(super) _directory: tempfile::TempDir,
}

/// One that is to restart early.
pub(super) fn overwritten() -> Overwritten {
    let directory = tempfile::tempdir().unwrap();
    let (path, indexes) = (directory.path().join("image"), directory.path().join("index"));
    image(&path, SHELVED);
    let mut on = |_, _| true;
    commands::build(&path, &indexes, &mut commands::Options { bytes_per_second: None, progress: &mut on })
        .unwrap();
    let guest = Guest::new(PAGES);
    for block in 0..SHELVED {
        guest.borrow().memory.page(Pfn(FIRST + block)).copy_from(&block_of(block));
    }
    let disk = DiskSpec { name: "xvda".into(), path: path.clone(), role: Role::Own };
    let plan = Plan { disks: vec![disk], indexes, ..plan(Mode::Lazy) };
    let mut toolstack = patient();
    let mut waiting = toolstack.watch.take().unwrap();
    toolstack.watch = Some(Box::new(move |event| {
        if let Event::Phase(save::Phase::Suspend) = event {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            for block in (0..SHELVED).filter(|block| is_gone(Pfn(FIRST + block))) {
                file.write_all_at(&[0x44; PAGE_BYTES], block * 4096).unwrap();
            }
            file.sync_all().unwrap();
        }
        waiting(event);
    }));
    Overwritten { guest, plan, toolstack, _directory: directory }
}
