//! `cargo xtask sanitize address|thread`: the tests under a sanitizer, the standard library built with it too. What a sanitizer
//! can't run is named in [`LEFT_OUT`], each with its reason, and printed before the rest is run.

use anyhow::Result;
use clap::ValueEnum;

use crate::nightly::{self, SOURCE, TARGET};
use crate::run;

/// The sanitizers.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sanitizer {
    /// Accesses outside of what is allocated, after it is freed, and what is never freed.
    Address,
    /// Accesses of two threads to one place with no order between them.
    Thread,
}

/// The packages whose tests are run.
const PACKAGES: &[&str] = &["mover", "xen-glue"];

/// A test, or all whose names begin so, that a sanitizer can't run.
struct LeftOut {
    sanitizer: Sanitizer,
    test: &'static str,
    reason: &'static str,
}

use Sanitizer::{Address, Thread};

const LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        sanitizer: Thread,
        test: "sim::",
        reason: "a simulation runs on one thread, and switches its stacks without this sanitizer's knowing",
    },
    LeftOut { sanitizer: Address, test: "sim::fleet::an_hour", reason: MEMORY },
    LeftOut { sanitizer: Address, test: "stream::tests::hostile::bent", reason: MEMORY },
    LeftOut { sanitizer: Address, test: "stream::tests::hostile::claims", reason: MEMORY },
];
const MEMORY: &str =
    "it holds against each other what the process has mapped, and the sanitizer keeps what is freed";

/// How many seeds of the simulator are run: it is slower under a sanitizer, which keeps memory of every stack it has seen.
const SEEDS: [(&str, &str); 2] = [("PAGEFERRY_SEEDS", "100"), ("PAGEFERRY_FLEETS", "6")];

impl Sanitizer {
    fn name(self) -> &'static str {
        match self {
            Address => "address",
            Thread => "thread",
        }
    }

    /// What the compiler is told. System calls through the C library, where the sanitizer sees what they fill; and under the
    /// address sanitizer page copies that it sees too. To the thread sanitizer they stay as opaque as they are to the
    /// compiler: a guest that writes its memory while it is copied is meant to.
    fn flags(self) -> String {
        let copies = if self == Address { " --cfg plain_copies" } else { "" };
        format!("-Zsanitizer={} --cfg rustix_use_libc{copies}", self.name())
    }

    /// What it is told when it runs. A fault ends a test with an exit code that is no test's own.
    fn options(self) -> (&'static str, &'static str) {
        match self {
            Address => ("ASAN_OPTIONS", "detect_stack_use_after_return=1:strict_init_order=1"),
            Thread => ("TSAN_OPTIONS", "halt_on_error=1:second_deadlock_stack=1"),
        }
    }
}

/// Runs the tests of [`PACKAGES`], or those with `name` in their names, under `sanitizer`.
pub(crate) fn run(sanitizer: Sanitizer, name: Option<&str>) -> Result<()> {
    nightly::need(&[SOURCE])?;
    let left_out: Vec<_> = LEFT_OUT.iter().filter(|one| one.sanitizer == sanitizer).collect();
    for one in &left_out {
        println!("left out under the {} sanitizer: {}: {}", sanitizer.name(), one.test, one.reason);
    }
    let mut command = nightly::cargo(sanitizer.name())?;
    command.env("RUSTFLAGS", sanitizer.flags());
    let (variable, options) = sanitizer.options();
    command.env(variable, options).envs(SEEDS);
    command.args(["nextest", "run", "-Zbuild-std", "--target", TARGET, "--locked", "--no-fail-fast"]);
    command.args(["--no-tests=fail", "--cargo-quiet"]);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    if sanitizer == Address {
        command.args(["--features", "corosensei/sanitizer"]);
    }
    let mut filter: Vec<_> = left_out.iter().map(|one| format!("not test(/^{}/)", one.test)).collect();
    filter.extend(name.map(|name| format!("test({name})")));
    run::succeed(
        command
            .args(["--filterset", &if filter.is_empty() { "all()".to_owned() } else { filter.join(" & ") }]),
    )
}
