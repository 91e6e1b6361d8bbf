//! The landing's switch: when the guest's memory becomes the guest's, nobody writes into it any more, and who was
//! writing has been waited for. Pages are real ones, of a mapping that all runs of a model share; that nobody else
//! touches them meanwhile is watched by loom, through a cell a page.
#![forbid(unsafe_code)]

use std::os::fd::AsFd as _;
use std::sync::{Arc, OnceLock};

use loom::thread;

use super::reference;
use crate::bitmap::Bitmap;
use crate::error::GuestError;
use crate::guest::{GuestMemory, HoldBack};
use crate::memory::watched::WatchedPage;
use crate::memory::{GuestPage, Mapping, PageBuf, Window};
use crate::pipeline::landing::{Incoming, Landed, Landing};
use crate::pipeline::table::{Claim, State};
use crate::runtime::Threads;
use crate::units::{PAGE_BYTES, PageCount, Pfn, Version};

const PAGES: u64 = 2;
const PFN: Pfn = Pfn(1);

/// Memory whose every writing through a window is noted in the page's cell.
struct Watched {
    mapping: Arc<Mapping>,
    pages: Vec<Arc<WatchedPage>>,
}

impl GuestMemory for Watched {
    fn pages(&self) -> PageCount {
        PageCount(PAGES)
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(self.mapping.window(capacity))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        pfns.iter().for_each(|pfn| self.pages[pfn.index()].write(1));
        self.mapping.fill(pfns.iter().map(|pfn| Some(*pfn)), window);
        Ok(())
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Notes which pages were taken away and given back.
#[derive(Default)]
struct Held(std::sync::Mutex<(Vec<usize>, Vec<u64>)>);

impl HoldBack for Held {
    fn hold_back(&self, pages: &Bitmap) -> Result<(), GuestError> {
        self.0.lock().unwrap().0 = pages.iter().collect();
        Ok(())
    }
    fn release(&self, pfn: Pfn, _: GuestPage<'_>) -> Result<(), GuestError> {
        self.0.lock().unwrap().1.push(pfn.0);
        Ok(())
    }
    fn wake(&self, _: Pfn) -> Result<(), GuestError> {
        unreachable!("nobody waits in a model")
    }
    fn next_fault(&self, _: std::time::Duration) -> Result<Option<Pfn>, GuestError> {
        unreachable!("nobody waits in a model")
    }
    fn finish(&self) -> Result<(), GuestError> {
        unreachable!("a model does not get that far")
    }
}

fn landing() -> (Arc<Landing>, Arc<WatchedPage>) {
    static SHARED: OnceLock<(Arc<Mapping>, Arc<Threads>)> = OnceLock::new();
    let (mapping, runtime) = SHARED.get_or_init(|| {
        let file = rustix::fs::memfd_create("landing", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        (Arc::new(Mapping::shared(file.as_fd(), 8192, true).unwrap()), Arc::new(Threads::new()))
    });
    let pages: Vec<_> = (0..PAGES).map(|_| WatchedPage::new()).collect();
    let page = Arc::clone(&pages[PFN.index()]);
    let memory = Arc::new(Watched { mapping: Arc::clone(mapping), pages });
    (Arc::new(Landing::new(memory, runtime.clone(), Arc::default())), page)
}

/// Data of `version` lands, as from a lane.
fn land(landing: &Landing, version: u32) -> Landed {
    let mut window = landing.memory.window(1).unwrap();
    landing.land(PFN, Version(version), &mut PageBuf([1; PAGE_BYTES]), &mut window).unwrap()
}

#[test]
fn behind_the_seal_the_memory_is_the_guests() {
    loom::model(|| {
        let (landing, page) = landing();
        let theirs = Arc::clone(&landing);
        let lane = thread::spawn(move || land(&theirs, 3));
        landing.seal().unwrap();
        // The guest runs and writes its page.
        page.write(2);
        let landed = lane.join().unwrap();
        assert_eq!(page.read(), 2, "{landed:?}");
        let state = landing.table.state(PFN);
        assert_eq!(state == State::Placed(Version(3)), landed == Landed::Placed, "{state:?}");
    });
}

#[test]
fn a_held_page_is_given_to_the_guest_once_and_never_written_behind_its_back() {
    loom::model(|| {
        let (landing, page) = landing();
        let (block, check) = reference(5);
        landing.table.refer(PFN, Version(5), block, check);
        let theirs = Arc::clone(&landing);
        let loader = thread::spawn(move || {
            let mut window = theirs.memory.window(1).unwrap();
            let bytes = &mut PageBuf([1; PAGE_BYTES]);
            theirs.land_load(PFN, Version(5), Incoming::Page(bytes), &mut window).unwrap()
        });
        let held = Arc::new(Held::default());
        let hold: Arc<dyn HoldBack> = held.clone();
        let outstanding = landing.hold_back(&hold).unwrap();
        page.write(2);
        let landed = loader.join().unwrap();
        assert_eq!(page.read(), 2);
        let (taken, released) = held.0.lock().unwrap().clone();
        assert_eq!(taken, outstanding.iter().collect::<Vec<_>>());
        match (outstanding.get(PFN.index()), landed) {
            // Before the switch, through the window.
            (false, Landed::Placed) => assert!(released.is_empty()),
            // Behind it, whole.
            (true, Landed::Placed) => assert_eq!(released, [PFN.0]),
            // Amid it: it is wanted again.
            (true, Landed::Dropped) => assert!(released.is_empty() && landing.table.wanted.get(PFN.index())),
            (false, Landed::Dropped) => panic!("a page is neither there nor outstanding"),
        }
    });
}

/// What a lane receives straight into the guest's memory is a claim made early, or none.
#[test]
fn data_on_its_way_into_memory_is_waited_for_and_none_begins_behind_the_switch() {
    loom::model(|| {
        let (landing, page) = landing();
        let (block, check) = reference(5);
        landing.table.refer(PFN, Version(5), block, check);
        let (theirs, their_page) = (Arc::clone(&landing), Arc::clone(&page));
        let lane = thread::spawn(move || {
            let Claim::Granted(before) = theirs.claim_early(PFN, Version(6)) else { return false };
            their_page.write(1);
            theirs.table.placed(PFN, Version(6), before);
            theirs.runtime.ring(&theirs.settled);
            true
        });
        let hold: Arc<dyn HoldBack> = Arc::new(Held::default());
        let outstanding = landing.hold_back(&hold).unwrap();
        // Held, or the guest's.
        page.write(2);
        let placed = lane.join().unwrap();
        assert_eq!(placed, !outstanding.get(PFN.index()));
        assert_eq!(page.read(), 2);
    });
}

/// Two lanes and the seal: the older version never lands on the newer one, and both are done when the seal is set.
#[test]
fn two_lanes_and_the_seal() {
    loom::model(|| {
        let (landing, page) = landing();
        let lanes: Vec<_> = (3..=4)
            .map(|version| {
                let theirs = Arc::clone(&landing);
                thread::spawn(move || land(&theirs, version))
            })
            .collect();
        landing.seal().unwrap();
        page.write(2);
        let sealed = landing.table.state(PFN);
        for lane in lanes {
            lane.join().unwrap();
        }
        assert_eq!(landing.table.state(PFN), sealed, "something landed behind the seal");
        assert_eq!(page.read(), 2);
    });
}
