//! Stackful coroutines for the simulator: [`suspend`] can be called from any depth of ordinary blocking code.
//!
//! A coroutine is bound to the thread that made it. Stacks are pooled a thread, since a simulation makes and ends
//! tens of thousands of them. One that has not ended when it is dropped is unwound, so that what its frames own is
//! freed; whatever its destructors call must then neither suspend nor panic.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{CoroutineResult, Yielder};

/// Bytes of a coroutine's stack; only touched pages cost memory. A guard page follows.
const STACK_BYTES: usize = 512 * 1024;

type Yield = Yielder<(), ()>;
type Inner = corosensei::Coroutine<(), (), (), DefaultStack>;

thread_local! {
    static CURRENT: Cell<*const Yield> = const { Cell::new(ptr::null()) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Sets [`CURRENT`] back when a switch is over, by return or by unwinding.
struct Restore(*const Yield);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// How a coroutine came back from [`Coroutine::resume`].
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// It called [`suspend`].
    Suspended,
    /// Its body returned.
    Done,
    /// Its body panicked, with this message.
    Panicked(String),
}

/// A body with a stack of its own.
pub(crate) struct Coroutine {
    inner: Option<Inner>,
}

impl Coroutine {
    /// Makes one; the body starts at the first [`Coroutine::resume`].
    ///
    /// # Panics
    /// If the kernel has no memory for another stack.
    #[must_use]
    pub(crate) fn new(body: Box<dyn FnOnce()>) -> Self {
        let stack = STACKS
            .with_borrow_mut(Vec::pop)
            .unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a coroutine's stack"));
        let inner = Inner::with_stack(stack, move |yielder: &Yield, ()| {
            CURRENT.set(ptr::from_ref(yielder));
            body();
        });
        Self { inner: Some(inner) }
    }

    /// Runs it to its next [`suspend`] or its end.
    ///
    /// # Panics
    /// If it has ended already.
    pub(crate) fn resume(&mut self) -> Step {
        let inner = self.inner.as_mut().expect("a coroutine that has ended is not resumed");
        let _restore = Restore(CURRENT.get());
        let step = match catch_unwind(AssertUnwindSafe(|| inner.resume(()))) {
            Ok(CoroutineResult::Yield(())) => return Step::Suspended,
            Ok(CoroutineResult::Return(())) => Step::Done,
            Err(panic) => Step::Panicked(message(panic.as_ref())),
        };
        self.retire();
        step
    }

    /// Ends it where it stands: its frames are unwound, destructors run, nothing of its body runs on. A body that
    /// catches the unwinding and suspends again is unwound again.
    pub(crate) fn unwind(&mut self) {
        if let Some(inner) = self.inner.as_mut() {
            let _restore = Restore(CURRENT.get());
            inner.force_unwind();
            self.retire();
        }
    }

    fn retire(&mut self) {
        if let Some(inner) = self.inner.take() {
            let stack = inner.into_stack();
            STACKS.with_borrow_mut(|stacks| stacks.push(stack));
        }
    }
}

impl Drop for Coroutine {
    fn drop(&mut self) {
        self.unwind();
    }
}

/// The sentence a panic came with.
fn message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// Whether the caller runs inside a coroutine.
#[must_use]
pub(crate) fn inside() -> bool {
    !CURRENT.get().is_null()
}

/// Gives control back to whoever resumed the running coroutine; returns when it is resumed. May unwind instead.
///
/// # Panics
/// Outside a coroutine.
pub(crate) fn suspend() {
    let current = CURRENT.get();
    assert!(!current.is_null(), "suspend() outside a coroutine");
    let _restore = Restore(current);
    // SAFETY: CURRENT is set on a coroutine's own stack when it starts and again whenever it comes back from here,
    // and set to the resumer's on every way out of it, so it names the yielder of the coroutine that is running this
    // very code: it lives at the base of this stack. Worth it: blocking engine code can suspend at any depth without
    // having a yielder passed through every trait.
    unsafe { (*current).suspend(()) };
}

mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn two_coroutines_take_turns_and_keep_their_locals() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let make = |name: &'static str| {
            let log = Rc::clone(&log);
            Coroutine::new(Box::new(move || {
                for i in 0..3 {
                    log.borrow_mut().push(format!("{name}{i}"));
                    suspend();
                }
            }))
        };
        let (mut a, mut b) = (make("a"), make("b"));
        for _ in 0..3 {
            assert_eq!(a.resume(), Step::Suspended);
            assert_eq!(b.resume(), Step::Suspended);
        }
        assert_eq!((a.resume(), b.resume()), (Step::Done, Step::Done));
        assert_eq!(*log.borrow(), ["a0", "b0", "a1", "b1", "a2", "b2"]);
    }

    #[test]
    fn an_unfinished_one_is_unwound_even_where_its_body_catches_panics() {
        let owned = Rc::new(());
        let inside = Rc::clone(&owned);
        let mut c = Coroutine::new(Box::new(move || {
            let _kept = inside;
            let _ = catch_unwind(suspend);
            suspend();
            unreachable!("an ended coroutine's body runs on");
        }));
        assert_eq!(c.resume(), Step::Suspended);
        drop(c);
        assert_eq!(Rc::strong_count(&owned), 1, "its frames were dropped");
    }

    #[test]
    fn a_panic_comes_out_with_its_message_and_the_stack_is_used_again() {
        let mut c = Coroutine::new(Box::new(|| panic!("on purpose {}", 7)));
        assert_eq!(c.resume(), Step::Panicked("on purpose 7".to_owned()));
        assert_eq!(STACKS.with_borrow(Vec::len), 1);
        let mut d = Coroutine::new(Box::new(suspend));
        assert_eq!(STACKS.with_borrow(Vec::len), 0);
        assert_eq!(d.resume(), Step::Suspended);
    }
}
