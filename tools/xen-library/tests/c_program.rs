//! The library as C programs meet it, on a machine without Xen: linked, and put before the library they were linked with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// What Xen's own libraries stand under.
const VERSIONS: &str = "VERS_4.17.0 { global: xc_*; local: *; };\n";

/// The library, as cargo has built it beside this test.
fn library() -> PathBuf {
    let ours = std::env::current_exe().expect("a test knows its path");
    let built = ours.with_file_name("libpageferry_xen.so");
    assert!(built.exists(), "{} was not built", built.display());
    built
}

/// A directory with C programs; none without a compiler or with a Xen below, whose domains may be somebody's.
struct Programs(TempDir);

impl Programs {
    fn new() -> Option<Self> {
        if Path::new("/dev/xen/privcmd").exists() {
            eprintln!("SKIPPED: this machine runs Xen, and domain 32000 may be somebody's");
            return None;
        }
        if Command::new("cc").arg("--version").output().is_err() {
            eprintln!("SKIPPED: no C compiler: apt-get install gcc libc6-dev");
            return None;
        }
        Some(Self(tempfile::tempdir().expect("a temporary directory")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn compile(&self, source: &str, to: &str, arguments: &[&str]) -> PathBuf {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let to = self.path(to);
        let output = Command::new("cc")
            .args(["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-I"])
            .arg(here.join("include"))
            .arg(here.join("tests").join(source))
            .arg("-o")
            .arg(&to)
            .args(arguments)
            .output()
            .expect("the compiler starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        to
    }

    /// Linked with our library.
    fn linked(&self) -> PathBuf {
        self.compile("caller.c", "linked", &[library().to_str().expect("an ordinary path")])
    }

    /// Linked with what stands for Xen's own, with its symbols' versions, as Xen's save helper is.
    fn linked_with_xens(&self) -> PathBuf {
        let versions = self.path("versions");
        std::fs::write(&versions, VERSIONS).expect("it is written");
        let script = format!("-Wl,--version-script={}", versions.display());
        let soname = "-Wl,-soname,libxenguest.so.4.17";
        let theirs =
            self.compile("xens_own.c", "libxenguest.so.4.17", &["-shared", "-fPIC", &script, soname]);
        self.compile("caller.c", "theirs", &[theirs.to_str().expect("an ordinary path")])
    }

    fn run(&self, program: &Path, preloaded: bool, words: &str) -> Output {
        let mut command = Command::new(program);
        let ours = library();
        let ours = ours.parent().expect("it is in a directory");
        let places = std::env::join_paths([self.0.path(), ours]).expect("ordinary paths");
        command.args(words.split(' ')).env("LD_LIBRARY_PATH", places).env("PAGEFERRY_POLICY", "stock");
        if preloaded {
            command.env("LD_PRELOAD", library());
        }
        let output = command.output().expect("the program starts");
        assert!(output.status.success(), "{output:?}");
        output
    }
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_program_that_links_it_is_told_why_nothing_can_be_done() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.linked();
    for (words, result, sentence) in [
        ("save 32000 null 1 0", "-1 ENOENT 5 6", "cannot talk to the hypervisor"),
        ("restore 32000 null 0 0", "-1 ENOENT 5 6", "cannot talk to the hypervisor"),
        ("save 32000 -1 1 0", "-1 EBADF 5 6", "the stream's descriptor is -1"),
        ("restore 32000 -1 1 0", "-1 EBADF 5 6", "the stream's descriptor is -1"),
        ("save 32752 null 1 0", "-1 ESRCH 5 6", "there is no domain 32752"),
        ("restore 65536 null 1 0", "-1 ESRCH 5 6", "there is no domain 65536"),
        ("save 32000 null 4 0", "-1 EINVAL 5 6", "the flags are 0x4"),
        ("save-without 32000 null 1 0", "-1 EINVAL 5 6", "was given none"),
        ("save 32000 null 1 1", "-1 EOPNOTSUPP 5 6", "Remus' or COLO's"),
        ("restore 32000 null 1 2", "-1 EOPNOTSUPP 5 6", "Remus' or COLO's"),
        // An interface without libxenctrl can't be told anything.
        ("save 32000 null 1 0 log", "-1 ENOENT 5 6", "cannot talk to the hypervisor"),
    ] {
        let (out, err) = said(&programs.run(&program, false, words));
        assert_eq!(out, format!("{result}\n"), "{words}: {err}");
        assert!(err.starts_with("pageferry: ") && err.contains(sentence), "{words}: {err}");
        assert_eq!(err.lines().count(), 1, "{words}: {err}");
    }
}

/// A caller whose standard error is gone, or full, is told by `errno` alone.
#[test]
fn a_standard_error_that_takes_nothing_ends_nobody() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.linked();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let mut command = Command::new(&program);
    command.args("save 32000 null 1 0".split(' ')).env("PAGEFERRY_POLICY", "stock").stderr(full);
    let places = library().parent().expect("it is in a directory").to_owned();
    let output = command.env("LD_LIBRARY_PATH", places).output().expect("the program starts");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "-1 ENOENT 5 6\n");
}

#[test]
fn before_xens_own_it_takes_plain_streams_and_leaves_the_others() {
    let Some(programs) = Programs::new() else { return };
    let program = programs.linked_with_xens();
    for (preloaded, words, expected) in [
        (false, "save 9 null 1 0", "theirs: save 9 of type 0\n0 0 5 6\n"),
        (true, "save 9 null 1 1", "theirs: save 9 of type 1\n0 0 5 6\n"),
        (true, "restore 9 null 1 2", "theirs: restore 9 of type 2, ports 1 2, back -1\n0 0 77 6\n"),
    ] {
        let (out, err) = said(&programs.run(&program, preloaded, words));
        assert_eq!((out.as_str(), err.as_str()), (expected, ""), "{words}");
    }
    for job in ["save", "restore"] {
        let (out, err) = said(&programs.run(&program, true, &format!("{job} 32000 null 0 0 log")));
        assert!(out.starts_with("logged 1: cannot talk to the hypervisor"), "{out}");
        assert!(out.ends_with("\n-1 ENOENT 5 6\n") && err.is_empty(), "{out}{err}");
    }
}

/// The compiler compares our header with Xen's: what both declare has to be the same.
#[test]
fn the_header_agrees_with_xens() {
    let Some(programs) = Programs::new() else { return };
    let directories = headers();
    if directories.is_empty() {
        eprintln!("SKIPPED: no Xen headers: apt-get install libxen-dev, or cargo xtask ci");
    }
    for directory in directories {
        let theirs = directory.to_str().expect("an ordinary path");
        let ours = library();
        let words = ["-DWITH_XEN", "-isystem", theirs, ours.to_str().expect("a path")];
        let program = programs.compile("caller.c", "both", &words);
        let (out, _) = said(&programs.run(&program, false, "save 32000 null 1 0"));
        assert_eq!(out, "-1 ENOENT 5 6\n", "{theirs}");
    }
}

/// Directories of Xen's headers: this machine's, and those that `cargo xtask ci` has fetched.
fn headers() -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("/usr/include")];
    // target/PROFILE/deps/libpageferry_xen.so
    let fetched = library().ancestors().nth(3).map(|target| target.join("xen-headers"));
    if let Some(fetched) = fetched.and_then(|fetched| fetched.read_dir().ok()) {
        all.extend(fetched.map(|entry| entry.expect("it can be listed").path().join("usr/include")));
    }
    all.retain(|directory| directory.join("xenguest.h").exists());
    all
}
