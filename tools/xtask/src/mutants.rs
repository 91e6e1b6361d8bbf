//! `cargo xtask mutants`: are the tests of the invariants worth anything? Each planted bug below breaks one invariant on
//! purpose, in a copy of the tree; the test that guards it must fail. A bug that is not found is an error, and so is one
//! that does not apply any more or does not build.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::run;

/// nextest's exit code when tests have failed (its manual, "exit codes").
const TESTS_FAILED: i32 = 100;

/// A bug to plant.
struct Mutant {
    /// Which of docs/ARCHITECTURE.md's invariants it breaks; 0: a promise of docs/SECURITY.md, or what loom's models are for.
    invariant: u8,
    /// What it does.
    name: &'static str,
    file: &'static str,
    find: &'static str,
    replace: &'static str,
    package: &'static str,
    /// The test that must fail.
    test: &'static str,
}

const SEEDS: &str = "sim::seeds::seeds";
/// What the tests' names begin with that loom runs.
const MODELS: &str = "loom_models::";

const MUTANTS: &[Mutant] = &[
    Mutant {
        invariant: 0,
        name: "any key is taken for the target's",
        file: "mover/src/net/tls/mod.rs",
        find: "match chain.is_empty() && Fingerprint::of(key) == self.pin {",
        replace: "match chain.is_empty() || Fingerprint::of(key) == self.pin {",
        package: "mover",
        test: "another_key_is_found_out_before_anything_is_told",
    },
    Mutant {
        invariant: 0,
        name: "strangers need no token to be greeted",
        file: "mover/src/net/entrance.rs",
        find: "Lock::Tls(identity) if knock::is_right(bytes, secret) => {",
        replace: "Lock::Tls(identity) if knock::is_right(bytes, secret) || true => {",
        package: "mover",
        test: "net::tls::tests::a_wrong_token_gets_no_answer",
    },
    Mutant {
        invariant: 0,
        name: "a record's nonce is used again",
        file: "mover/src/net/tls/record.rs",
        find: "        self.sequence += 1;\n",
        replace: "",
        package: "mover",
        test: "net::tls::record",
    },
    Mutant {
        invariant: 0,
        name: "strangers stay as long as they like",
        file: "mover/src/net/entrance.rs",
        find: "Ok(None) if now >= self.deadline() =>",
        replace: "Ok(None) if now >= self.deadline() + GREETING_TIME * 9 =>",
        package: "mover",
        test: "a_stranger_holds_a_socket_and_64_bytes",
    },
    Mutant {
        invariant: 1,
        name: "a loaded page is not checked",
        file: "mover/src/pipeline/load.rs",
        find: "if key.check_bytes(bytes) != wanted.check {",
        replace: "if key.check_bytes(bytes) != wanted.check && false {",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 1,
        name: "a page whose reference did not hold is not asked for",
        file: "mover/src/pipeline/load.rs",
        find: "landing.table.ask.set(pfn.index());\n        landing.runtime.ring(&landing.work);",
        replace: "landing.runtime.ring(&landing.work);",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 1,
        name: "a refetch that is asked for is dropped",
        file: "mover/src/pipeline/send.rs",
        find: "if !self.batch.contains(&pfn) {\n                self.batch.push(pfn);",
        replace: "if false && !self.batch.contains(&pfn) {\n                self.batch.push(pfn);",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 2,
        name: "older data is placed over newer",
        file: "mover/src/pipeline/table.rs",
        find: "State::Placed(v) if v >= version => return Claim::Stale,",
        replace: "",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 2,
        name: "a load under way is not waited for",
        file: "mover/src/pipeline/table.rs",
        find: "State::Busy(v) if v < version => return Claim::Busy,",
        replace: "State::Busy(v) if v < version => {}",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 2,
        name: "what was written since the last harvest is forgotten",
        file: "mover/src/source/stop.rs",
        find: "self.harvest()?;\n",
        replace: "",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 2,
        name: "a direct load under way is not waited for",
        file: "mover/src/pipeline/load.rs",
        find: "        if !good {\n            for wanted in &sweep[..claimed] {",
        replace: "        {\n            for wanted in &sweep[..claimed] {",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 2,
        name: "what was seen dirty amid a round is not put back for the next",
        file: "mover/src/source/rounds.rs",
        find: "            self.sending.dirty_again.copy_from(&self.next);\n        }",
        replace: "            self.sending.dirty_again.copy_from(&self.next);\n            self.next.clear_all();\n        }",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 4,
        name: "a page that is held back since it was mapped is received where the guest never sees it",
        file: "mover/src/pipeline/receive.rs",
        find: "Claim::Granted(before) if landing.is_ahead(*pfn) => {",
        replace: "Claim::Granted(before) if landing.is_ahead(*pfn) && false => {",
        package: "mover",
        test: "sim::seeds::seeds_that_found_something",
    },
    Mutant {
        invariant: 3,
        name: "the commit is sent before the guest is given up",
        file: "mover/src/source/commit.rs",
        find: "self.life.release()?;\n        self.hold = Hold::Released;\n        let mut told = self.tell(&Message::Commit);",
        replace: "let mut told = self.tell(&Message::Commit);\n        self.life.release()?;\n        self.hold = Hold::Released;",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 3,
        name: "one attempt to come back uses up the time for all",
        file: "mover/src/source/commit.rs",
        find: "patience.min(ATTEMPT.max(redial_for / ATTEMPTS))",
        replace: "patience",
        package: "mover",
        test: "sim::seeds::seeds_that_found_something",
    },
    Mutant {
        invariant: 3,
        name: "under a toolstack the source dials again while the guest changes hands",
        file: "mover/src/source/commit.rs",
        find: "Err(error) if self.config.toolstack => return Err(error),",
        replace: "Err(error) if self.config.toolstack && false => return Err(error),",
        package: "xen-glue",
        test: "what_is_cut_while_the_guest_changes_hands_is_not_dialled_again",
    },
    Mutant {
        invariant: 1,
        name: "a golden base may differ in some blocks, as a disk that is written may",
        file: "mover/src/disk/identity.rs",
        find: "Role::Base | Role::Reference => 0,",
        replace: "Role::Base | Role::Reference => SAMPLE_STRAY_MAX * theirs.blocks.len() / SAMPLE_BLOCKS,",
        package: "mover",
        test: "of_what_nobody_writes_no_block_may_differ",
    },
    Mutant {
        invariant: 3,
        name: "a lane that loses its connection behind the end makes the source say that the guest has stayed",
        file: "mover/src/source/migration.rs",
        find: "let outcome = outcome.map_err(|error| match (&error, &self.peer) {",
        replace: "let outcome = outcome.and_then(|()| self.failure.check()).map_err(|error| match (&error, &self.peer) {",
        package: "mover",
        test: "sim::fleet::fleets_that_found_something",
    },
    Mutant {
        invariant: 4,
        name: "the source lets its pages go while some are outstanding",
        file: "mover/src/source/commit.rs",
        find: "self.wait_for(|m| m.heard.account.is_some())",
        replace: "self.wait_for(|_| true)",
        package: "mover",
        test: SEEDS,
    },
    Mutant {
        invariant: 4,
        name: "a drain under a toolstack whose connections are cut stays cut",
        file: "xen-glue/src/ferry/net.rs",
        find: "            self.returner.begin();\n",
        replace: "",
        package: "xen-glue",
        test: "ferry::tests::cut",
    },
    Mutant {
        invariant: 4,
        name: "who has seen the offer comes back in the target's place",
        file: "xen-glue/src/ferry/again.rs",
        find: "hello.migration == migration && hello.secret.same(session);",
        replace: "hello.migration == migration;",
        package: "xen-glue",
        test: "the_sessions_secret_lets_in_again_and_nothing_else_does",
    },
    Mutant {
        invariant: 4,
        name: "the gate stays open for blocks that are still to be loaded",
        file: "mover/src/pipeline/gate.rs",
        find: "blocks.set_range(usize_of(start / PAGE_BYTES_U64).min(end), end);",
        replace: "blocks.set_range(end, end);",
        package: "mover",
        test: "the_gate_closes_on_every_block_an_outstanding_page_needs",
    },
    Mutant {
        invariant: 4,
        name: "the guest's write does not wait at the gate",
        file: "mover/src/process/inside/drive.rs",
        find: "if blocks.clone().any(|block| self.gate.held(self.id, block)) {",
        replace: "if false {",
        package: "mover",
        test: "a_write_is_logged_before_it_changes_the_disk_and_waits_at_the_gate",
    },
    Mutant {
        invariant: 5,
        name: "every migration has the same key",
        file: "mover/src/source/migration.rs",
        find: "around.runtime.random(&mut key);",
        replace: "",
        package: "bench",
        test: "checks_are_keyed_anew_for_every_migration",
    },
    Mutant {
        invariant: 6,
        name: "a frame's receipt allocates",
        file: "mover/src/pipeline/receive.rs",
        find: "let bytes = header.filled_table_bytes();",
        replace: "std::hint::black_box(vec![0_u8; 64 + header.count]);\n        let bytes = header.filled_table_bytes();",
        package: "bench",
        test: "the_hot_path_does_not_allocate",
    },
    Mutant {
        invariant: 7,
        name: "a send that the kernel copied counts as zero-copy",
        file: "mover/src/net/tcp.rs",
        find: "if done.copied {",
        replace: "if done.copied && self.link.peer.is_empty() {",
        package: "mover",
        test: "zero_copy_that_the_kernel_does_not_grant",
    },
    Mutant {
        invariant: 0,
        name: "weak: a word of bits is taken without what it announces",
        file: "mover/src/bitmap.rs",
        find: "_ => self.words[word].swap(0, SeqCst),",
        replace: "_ => self.words[word].swap(0, crate::sync::Ordering::Relaxed),",
        package: "mover",
        test: "loom_models::bitmap",
    },
    Mutant {
        invariant: 0,
        name: "weak: a page is settled without its bytes",
        file: "mover/src/pipeline/table.rs",
        find: ".swap(to.word(), SeqCst);",
        replace: ".swap(to.word(), Relaxed);",
        package: "mover",
        test: "loom_models::table",
    },
    Mutant {
        invariant: 0,
        name: "weak: a claim does not see who was before",
        file: "mover/src/pipeline/table.rs",
        find: "State::Busy(version).word(), SeqCst, SeqCst) {\n                Ok(_) => return Claim::Granted(state),",
        replace: "State::Busy(version).word(), Relaxed, Relaxed) {\n                Ok(_) => return Claim::Granted(state),",
        package: "mover",
        test: "loom_models::table",
    },
    Mutant {
        invariant: 0,
        name: "weak: a reference is written before its page is claimed",
        file: "mover/src/pipeline/table.rs",
        find: "            fence(Release);\n",
        replace: "",
        package: "mover",
        test: "loom_models::table",
    },
    Mutant {
        invariant: 0,
        name: "weak: a reference is read after its page was looked at again",
        file: "mover/src/pipeline/table.rs",
        find: "            fence(Acquire);\n",
        replace: "",
        package: "mover",
        test: "loom_models::table",
    },
    Mutant {
        invariant: 0,
        name: "weak: the switch does not see a claim, nor the claim the switch",
        file: "mover/src/pipeline/landing.rs",
        find: "self.mode.store(SWITCHING, SeqCst);",
        replace: "self.mode.store(SWITCHING, crate::sync::Ordering::Release);",
        package: "mover",
        test: "loom_models::landing",
    },
    Mutant {
        invariant: 0,
        name: "a page is released that is not held yet",
        file: "mover/src/pipeline/landing.rs",
        find: "Some(hold) if self.mode.load(SeqCst) == HELD || ahead =>",
        replace: "Some(hold) if !self.is_early() || ahead =>",
        package: "mover",
        test: "loom_models::landing",
    },
    Mutant {
        invariant: 0,
        name: "a mode seen before the claim is taken for the claim's",
        file: "mover/src/pipeline/landing.rs",
        find: "if self.is_early() { self.claim_in(EARLY, pfn, version) } else",
        replace: "if self.is_early() { self.claim(pfn, version) } else",
        package: "mover",
        test: "loom_models::landing",
    },
    Mutant {
        invariant: 0,
        name: "weak: a ringer does not see who falls asleep",
        file: "mover/src/runtime/threads.rs",
        find: "if bell.waiters.load(Ordering::SeqCst) != 0 {",
        replace: "if bell.waiters.load(Ordering::Relaxed) != 0 {",
        package: "mover",
        test: "loom_models::bell",
    },
    Mutant {
        invariant: 0,
        name: "a lane listens for a change of the cap too late",
        file: "mover/src/net/pace.rs",
        find: "        let heard = self.changed.heard();\n        let Some(rate) = self.rate() else { return };\n",
        replace: "        let Some(rate) = self.rate() else { return };\n        let heard = self.changed.heard();\n",
        package: "mover",
        test: "loom_models::lanes",
    },
    Mutant {
        invariant: 0,
        name: "two lanes book the same moment",
        file: "mover/src/net/pace.rs",
        find: "Err(other) => seen = other,",
        replace: "Err(_) => return Moment(start),",
        package: "mover",
        test: "loom_models::lanes",
    },
    Mutant {
        invariant: 0,
        name: "two lanes take the same pages",
        file: "mover/src/pipeline/work.rs",
        find: "let step = self.cursor.fetch_add(1, SeqCst);",
        replace: "let step = self.cursor.load(SeqCst);\n            self.cursor.store(step + 1, SeqCst);",
        package: "mover",
        test: "loom_models::lanes",
    },
    Mutant {
        invariant: 0,
        name: "what was forgotten is still found",
        file: "mover/src/index/table.rs",
        find: "        self.set_tag(unit, 0);\n        if let Some((slot, bucket)) = self.slot_of(unit, low) {",
        replace: "        if let Some((slot, bucket)) = self.slot_of(unit, low).filter(|_| false) {",
        package: "mover",
        test: "loom_models::index",
    },
];

/// Plants every bug, or those whose names contain `filter`.
pub(crate) fn run(filter: Option<&str>) -> Result<()> {
    let chosen: Vec<_> =
        MUTANTS.iter().filter(|mutant| filter.is_none_or(|word| mutant.name.contains(word))).collect();
    ensure!(!chosen.is_empty(), "no planted bug has `{}` in its name", filter.unwrap_or_default());
    let tree = copy_of_the_tree()?;
    let tests: Vec<_> = chosen.iter().map(|mutant| (mutant.package, mutant.test)).collect();
    println!("the tests, without any bug:");
    for (at, (package, test)) in tests.iter().enumerate() {
        if !tests[..at].contains(&(package, test)) {
            ensure!(outcome(&tree, package, test)? == Some(0), "{package} {test} fails without any bug");
        }
    }
    let mut survivors = Vec::new();
    for mutant in chosen {
        let begun = Instant::now();
        let found = planted(&tree, mutant)?;
        let word = if found { "found" } else { "NOT FOUND" };
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "invariant {}: {word} by {} ({seconds:.0} s): {}",
            mutant.invariant, mutant.test, mutant.name
        );
        if !found {
            survivors.push(mutant.name);
        }
    }
    ensure!(survivors.is_empty(), "no test minds: {}", survivors.join("; "));
    Ok(())
}

/// Whether the mutant's test fails with it.
fn planted(tree: &Path, mutant: &Mutant) -> Result<bool> {
    let path = tree.join(mutant.file);
    let whole = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let places = whole.matches(mutant.find).count();
    ensure!(places == 1, "`{}` is {places} times in {}, not once: {}", mutant.find, mutant.file, mutant.name);
    fs::write(&path, whole.replace(mutant.find, mutant.replace))?;
    let code = outcome(tree, mutant.package, mutant.test);
    fs::write(&path, whole)?;
    match code? {
        Some(0) => Ok(false),
        Some(TESTS_FAILED) => Ok(true),
        code => bail!("with the bug \"{}\" the tests do not even run (exit code {code:?})", mutant.name),
    }
}

/// nextest's exit code.
fn outcome(tree: &Path, package: &str, test: &str) -> Result<Option<i32>> {
    let mut command =
        run::cargo(["nextest", "run", "--cargo-quiet", "--no-fail-fast", "--package", package, test])?;
    if test.starts_with(MODELS) {
        command.args(["--features", "loom"]).env("LOOM_MAX_PREEMPTIONS", "2");
        // A panic's backtrace overflows the small stacks of loom's threads, and the test hangs instead of failing.
        command.env("RUST_BACKTRACE", "0");
    }
    command.current_dir(tree).env("CARGO_TARGET_DIR", tree.with_file_name("build"));
    // What a bug makes a test say is of no interest; that the build fails is, and the exit code tells it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status().context("cannot start cargo nextest; `cargo xtask ci` installs it")?.code())
}

/// The tree's files as git lists them, changes included, in `target/mutants/tree`. Those that are the same already are
/// not written again, so that cargo need not build them again.
fn copy_of_the_tree() -> Result<PathBuf> {
    let root = run::root()?;
    let tree = root.join("target/mutants/tree");
    let listed =
        run::output(run::command("git")?.args(["ls-files", "--cached", "--others", "--exclude-standard"]))?;
    for name in listed.lines() {
        let Ok(bytes) = fs::read(root.join(name)) else { continue };
        let copy = tree.join(name);
        if fs::read(&copy).ok().as_ref() != Some(&bytes) {
            fs::create_dir_all(copy.parent().context("a file in a directory")?)?;
            fs::write(&copy, bytes)?;
        }
    }
    Ok(tree)
}
