//! Over real child processes: what the engine does to a guest that it reaches only through descriptors.

mod figures;
mod lazy;
mod puppet;
mod writes;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::{Source, Target, attach_source, attach_target};
use crate::bitmap::Bitmap;
use crate::guest::GuestMemory;
use crate::kernel::uffd::{self, Features, Userfaultfd};
use crate::memory::{Mapping, PageBuf};
use crate::units::{PAGE_BYTES, Pfn};
use puppet::{Own, Puppet, orders, page_of, wait_for};

/// Whether this kernel has what `features` name; says so loudly where it has not.
fn offers(features: Features) -> bool {
    match uffd::open().and_then(|(fd, _)| Userfaultfd::new(fd, features)) {
        Ok(_) => true,
        Err(e) => {
            eprintln!("SKIPPED: {e}");
            false
        }
    }
}

fn set_of(pages: u64, set: impl IntoIterator<Item = u64>) -> Bitmap {
    let mut map = Bitmap::new(usize::try_from(pages).unwrap());
    for page in set {
        map.set(usize::try_from(page).unwrap());
    }
    map
}

fn pages_in(map: &Bitmap) -> Vec<u64> {
    map.iter().map(|page| Pfn::at(page).0).collect()
}

/// The first word of a page, as the engine sees it.
fn word(memory: &dyn GuestMemory, page: u64) -> Option<u64> {
    let mut window = memory.window(1).unwrap();
    memory.map(&[Pfn(page)], &mut window).unwrap();
    let mut copy = PageBuf::zeroed();
    window.page(0)?.copy_to(&mut copy);
    Some(u64::from_le_bytes(copy.0[..8].try_into().unwrap()))
}

/// Pages of our own to release from.
struct Staging(Arc<Mapping>);

impl Staging {
    fn new(pages: usize) -> Self {
        let file = rustix::fs::memfd_create("staging", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = pages * PAGE_BYTES;
        rustix::fs::ftruncate(&file, u64::try_from(bytes).unwrap()).unwrap();
        Self(Arc::new(Mapping::shared(file.as_fd(), bytes, true).unwrap()))
    }
    fn with(&self, slot: u64, word: u64) -> crate::memory::GuestPage<'_> {
        let page = self.0.page(Pfn(slot));
        page.copy_from(&page_of(word));
        page
    }
}

/// An engine in a process of its own, to be killed.
#[test]
#[ignore = "the process that other tests start as an engine"]
fn engine() {
    let Some((dir, what)) = orders() else { return };
    let client = crate::process::client::GuestClient::connect(&dir.join("control")).unwrap();
    let say = |word: &str| drop(std::fs::File::create(dir.join(word)).unwrap());
    match what.as_str() {
        "source" => {
            let mut source = attach_source(client, "m").unwrap();
            crate::guest::DirtyLog::arm(&mut source.tracker).unwrap();
            say("armed");
            loop {
                std::thread::park();
            }
        }
        "target" => {
            let Target { mut guest, .. } = attach_target(client, "m").unwrap();
            let lazy = guest.lazy.unwrap();
            lazy.hold_back(&set_of(guest.memory.pages().0, 10..20)).unwrap();
            lazy.release(Pfn(12), Staging::new(1).with(0, 99)).unwrap();
            guest.life.load_state(&[1]).unwrap();
            guest.life.start().unwrap();
            say("holding");
            // It takes each fault, and answers none.
            loop {
                if lazy.next_fault(Duration::from_secs(1)).unwrap().is_some() {
                    say("told");
                }
            }
        }
        other => panic!("{other}?"),
    }
}
