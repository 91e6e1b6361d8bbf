//! What has come over the ring of a guest whose pages are held back, and who of those that wait can go on.
//!
//! Requests are answered in the order in which they came, so that the ring's page says by itself who waits ([`PagingRing`]). One
//! whose page is there takes those before it along: a virtual CPU that is answered early looks again, finds that its page is still
//! out, and asks again. Its page has been told of then, and is not told of twice.
//!
//! Invariant: every request has its response, or is `open`: the ring has eight places, and so many are open at most.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use mover::bitmap::{Bitmap, SharedBitmap};
use mover::units::{Pfn, usize_of};

use crate::abi::{PagingEvent, PagingRing};

/// Places of the ring.
const PLACES: usize = 8;

/// The ring, and what has come over it.
#[derive(Debug)]
pub(super) struct Requests {
    ring: PagingRing,
    /// Taken and not answered, in the ring's order.
    open: VecDeque<PagingEvent>,
    /// Held pages that somebody waits for, each once.
    faults: VecDeque<Pfn>,
    told: Bitmap,
    given_up: VecDeque<Pfn>,
}

impl Requests {
    /// Over `ring`, of a guest with so many frames.
    pub(super) fn new(ring: PagingRing, frames: u64) -> Self {
        Self {
            ring,
            open: VecDeque::with_capacity(PLACES),
            faults: VecDeque::new(),
            told: Bitmap::new(usize_of(frames)),
            given_up: VecDeque::new(),
        }
    }

    /// Over the ring of a process that has ended: goes on where that one has stopped.
    pub(super) fn after(mut ring: PagingRing, frames: u64) -> Self {
        ring.take_up();
        Self::new(ring, frames)
    }

    /// The page it names, if the guest has such a page.
    fn page(&self, event: &PagingEvent) -> Option<Pfn> {
        (usize_of(event.frame) < self.told.len()).then_some(Pfn(event.frame))
    }

    /// Whether an answer to it would be an early one.
    fn waits(&self, event: &PagingEvent, held: &SharedBitmap) -> bool {
        !event.is_given_up() && self.page(event).is_some_and(|pfn| held.get(pfn.index()))
    }

    /// Takes what has come. `forget` is told of held pages that the guest has given back, and says whether they were held.
    /// Whether somebody has been answered.
    pub(super) fn take_in(&mut self, held: &SharedBitmap, forget: impl Fn(Pfn) -> bool) -> bool {
        while let Some(event) = self.ring.take() {
            match self.page(&event) {
                Some(pfn) if event.is_given_up() && forget(pfn) => self.given_up.push_back(pfn),
                Some(pfn) if self.waits(&event, held) && self.told.set(pfn.index()) => {
                    self.faults.push_back(pfn);
                }
                _ => {}
            }
            self.open.push_back(event);
        }
        self.settle(held)
    }

    /// Answers whose page is not held any more, and who has come before them. Whether there was somebody.
    pub(super) fn settle(&mut self, held: &SharedBitmap) -> bool {
        let Some(last) = self.open.iter().rposition(|event| !self.waits(event, held)) else { return false };
        self.ring.answer(last + 1);
        self.open.drain(..=last);
        true
    }

    /// A page somebody waits for.
    pub(super) fn fault(&mut self) -> Option<Pfn> {
        self.faults.pop_front()
    }

    /// A page the guest has given back.
    pub(super) fn given_up(&mut self) -> Option<Pfn> {
        self.given_up.pop_front()
    }

    /// Whether there is one.
    pub(super) fn has_given_up(&self) -> bool {
        !self.given_up.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::atomic::Ordering::SeqCst;

    use mover::memory::Mapping;
    use mover::units::{PAGE_BYTES, u64_of};
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const FRAMES: u64 = 24;
    const CPUS: usize = 6;
    /// Places of counters and of an entry's fields, in half words.
    const REQUESTS_PUT: usize = 0;
    const RESPONSES_PUT: usize = 2;
    const ENTRIES: usize = 16;
    const ENTRY: usize = 100;
    const CPU: usize = 3;
    const FRAME: usize = 6;
    const FLAGS: usize = 9;

    /// The hypervisor's end, and a guest whose processors touch pages.
    struct Guest {
        page: Arc<Mapping>,
        put: u32,
        seen: u32,
        out: Vec<bool>,
        /// What each processor stands still for.
        stands: Vec<Option<u64>>,
        /// How often one was let go on in vain.
        in_vain: u32,
    }

    impl Guest {
        fn new() -> Self {
            let file = memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, u64_of(PAGE_BYTES)).unwrap();
            let page = Arc::new(Mapping::shared(file.as_fd(), PAGE_BYTES, true).unwrap());
            let out = vec![true; usize_of(FRAMES)];
            Self { page, put: 0, seen: 0, out, stands: vec![None; CPUS], in_vain: 0 }
        }

        fn ask(&mut self, cpu: usize, frame: u64, flags: u32) {
            assert!(self.put - self.seen < 8, "there is room for as many as stand still");
            let at = ENTRIES + usize_of((self.put % 8).into()) * ENTRY;
            let words = self.page.half_words();
            words[at + CPU].store(u32::try_from(cpu).unwrap(), SeqCst);
            words[at + FRAME].store(u32::try_from(frame).unwrap(), SeqCst);
            words[at + FLAGS].store(flags, SeqCst);
            self.put += 1;
            words[REQUESTS_PUT].store(self.put, SeqCst);
        }

        fn touch(&mut self, cpu: usize, frame: u64) {
            if self.out[usize_of(frame)] && self.stands[cpu].is_none() && self.put - self.seen < 8 {
                self.stands[cpu] = Some(frame);
                self.ask(cpu, frame, 0);
            }
        }

        fn give_back(&mut self, frame: u64) {
            if self.out[usize_of(frame)] && self.put - self.seen < 8 {
                self.out[usize_of(frame)] = false;
                self.ask(0, frame, 1);
            }
        }

        /// The port was rung.
        fn hear(&mut self) {
            let answered = self.page.half_words()[RESPONSES_PUT].load(SeqCst);
            assert!(answered.wrapping_sub(self.seen) <= self.put - self.seen, "more responses than requests");
            while self.seen != answered {
                let at = ENTRIES + usize_of((self.seen % 8).into()) * ENTRY;
                let word = |of: usize| self.page.half_words()[at + of].load(SeqCst);
                let (cpu, frame, flags) = (usize_of(word(CPU).into()), u64::from(word(FRAME)), word(FLAGS));
                self.seen += 1;
                if flags == 0 {
                    assert_eq!(self.stands[cpu].take(), Some(frame), "a response to another request");
                    if self.out[usize_of(frame)] {
                        self.in_vain += 1;
                        self.touch(cpu, frame);
                    }
                }
            }
        }
    }

    /// Who pages in, until it is killed.
    struct Pager {
        requests: Requests,
        held: SharedBitmap,
        told: Vec<Pfn>,
    }

    impl Pager {
        fn new(guest: &Guest) -> Self {
            Self::over(guest, Requests::new(PagingRing::made(Arc::clone(&guest.page)), FRAMES))
        }

        fn over(guest: &Guest, requests: Requests) -> Self {
            let held = SharedBitmap::new(guest.out.len());
            for at in (0..guest.out.len()).filter(|at| guest.out[*at]) {
                held.set(at);
            }
            Self { requests, held, told: Vec::new() }
        }

        /// Another one, in its place: it asks what is out, and rings once.
        fn after(guest: &mut Guest) -> Self {
            let ring = PagingRing::made(Arc::clone(&guest.page));
            let this = Self::over(guest, Requests::after(ring, FRAMES));
            guest.hear();
            this
        }

        fn look(&mut self) -> bool {
            let held = &self.held;
            let answered = self.requests.take_in(held, |pfn| held.clear(pfn.index()));
            while let Some(pfn) = self.requests.fault() {
                assert!(!self.told.contains(&pfn), "{pfn} is told of twice");
                self.told.push(pfn);
            }
            answered
        }
    }

    /// What happens next.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Touch(usize, u64),
        GiveBack(u64),
        Look,
        /// A page is paged in, and who waits for it answered.
        Release(u64),
        /// The same, but the pager is killed behind one of the four steps of that.
        Killed(u64, u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..CPUS, 0..FRAMES).prop_map(|(cpu, frame)| Step::Touch(cpu, frame)),
            1 => (0..FRAMES).prop_map(Step::GiveBack),
            4 => Just(Step::Look),
            3 => (0..FRAMES).prop_map(Step::Release),
            1 => (0..FRAMES, 0..4u8).prop_map(|(frame, at)| Step::Killed(frame, at)),
        ];
        proptest::collection::vec(step, 1..120)
    }

    /// Pages `frame` in and answers, as far as the pager lives for it: 0 to 3 of the steps, 4 are all.
    fn release(guest: &mut Guest, pager: &mut Pager, frame: u64, lives: u8) {
        if lives >= 1 && pager.look() {
            guest.hear();
        }
        if lives >= 2 {
            guest.out[usize_of(frame)] = false;
        }
        if lives >= 3 {
            pager.held.clear(usize_of(frame));
            // Killed behind that and before the port is rung: nobody has heard it yet.
            if pager.requests.settle(&pager.held) && lives >= 4 {
                guest.hear();
            }
        }
    }

    proptest! {
        /// However often the pager is killed, wherever: no processor is forgotten, none is answered twice.
        #[test]
        fn who_waits_goes_on_in_the_end(steps in steps()) {
            let mut guest = Guest::new();
            let mut pager = Pager::new(&guest);
            for step in steps {
                match step {
                    Step::Touch(cpu, frame) => guest.touch(cpu, frame),
                    Step::GiveBack(frame) => guest.give_back(frame),
                    Step::Look => if pager.look() { guest.hear() },
                    Step::Release(frame) => release(&mut guest, &mut pager, frame, 4),
                    Step::Killed(frame, lives) => {
                        release(&mut guest, &mut pager, frame, lives);
                        pager = Pager::after(&mut guest);
                    }
                }
            }
            for frame in 0..FRAMES {
                release(&mut guest, &mut pager, frame, 4);
            }
            prop_assert_eq!(guest.stands, vec![None; CPUS]);
            prop_assert_eq!(guest.put, guest.seen, "every request has its response");
        }
    }

    /// Pages that come in another order than they were asked for cost each who waits a look, and nobody a second page.
    #[test]
    fn who_is_answered_early_asks_again_and_is_not_told_of_again() {
        let mut guest = Guest::new();
        let mut pager = Pager::new(&guest);
        for cpu in 0..3 {
            guest.touch(cpu, u64_of(cpu));
        }
        pager.look();
        assert_eq!(pager.told, [Pfn(0), Pfn(1), Pfn(2)]);
        release(&mut guest, &mut pager, 2, 4);
        assert_eq!((guest.in_vain, &guest.stands[..3]), (2, &[Some(0), Some(1), None][..]));
        release(&mut guest, &mut pager, 1, 4);
        release(&mut guest, &mut pager, 0, 4);
        assert_eq!((guest.in_vain, pager.told.len()), (3, 3));
        assert_eq!(guest.stands, [None; CPUS]);
    }
}
