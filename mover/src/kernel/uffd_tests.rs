use super::*;
use crate::memory::Mapping;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// Prints what is missing, so that a run that proves nothing says so.
pub(crate) fn skipped(what: &str, why: &dyn std::fmt::Display) {
    eprintln!("SKIPPED: {what}: {why}");
}

#[test]
fn the_abi_is_the_c_headers() {
    let ours: [(&str, u64); 31] = [
        ("UFFDIO_API", UFFDIO_API.into()),
        ("UFFDIO_REGISTER", UFFDIO_REGISTER.into()),
        ("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER.into()),
        ("UFFDIO_WAKE", UFFDIO_WAKE.into()),
        ("UFFDIO_COPY", UFFDIO_COPY.into()),
        ("UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE.into()),
        ("UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT.into()),
        ("USERFAULTFD_IOC_NEW", USERFAULTFD_IOC_NEW.into()),
        ("UFFDIO_REGISTER_MODE_MISSING", Watch::MISSING.0),
        ("UFFDIO_REGISTER_MODE_WP", Watch::WRITES.0),
        ("UFFDIO_WRITEPROTECT_MODE_WP", WRITEPROTECT_MODE_WP),
        ("UFFD_USER_MODE_ONLY", USER_MODE_ONLY.into()),
        ("UFFD_EVENT_PAGEFAULT", EVENT_PAGEFAULT.into()),
        ("UFFD_EVENT_FORK", EVENT_FORK.into()),
        ("UFFD_EVENT_REMAP", EVENT_REMAP.into()),
        ("UFFD_EVENT_REMOVE", EVENT_REMOVE.into()),
        ("UFFD_EVENT_UNMAP", EVENT_UNMAP.into()),
        ("UFFD_PAGEFAULT_FLAG_WRITE", PAGEFAULT_FLAG_WRITE),
        ("UFFD_PAGEFAULT_FLAG_WP", PAGEFAULT_FLAG_WP),
        ("UFFD_FEATURE_PAGEFAULT_FLAG_WP", Features::PAGEFAULT_FLAG_WP.0),
        ("UFFD_FEATURE_EVENT_FORK", Features::EVENT_FORK.0),
        ("UFFD_FEATURE_EVENT_REMAP", Features::EVENT_REMAP.0),
        ("UFFD_FEATURE_EVENT_REMOVE", Features::EVENT_REMOVE.0),
        ("UFFD_FEATURE_EVENT_UNMAP", Features::EVENT_UNMAP.0),
        ("UFFD_FEATURE_MISSING_SHMEM", Features::MISSING_SHMEM.0),
        ("UFFD_FEATURE_SIGBUS", Features::SIGBUS.0),
        ("UFFD_FEATURE_THREAD_ID", Features::THREAD_ID.0),
        ("UFFD_FEATURE_EXACT_ADDRESS", Features::EXACT_ADDRESS.0),
        ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", Features::WP_HUGETLBFS_SHMEM.0),
        ("UFFD_FEATURE_WP_UNPOPULATED", Features::WP_UNPOPULATED.0),
        ("UFFD_FEATURE_WP_ASYNC", Features::WP_ASYNC.0),
    ];
    check_against_c("linux/userfaultfd.h", &ours);
}

/// Compares constants with what a C compiler takes from `header`. One that this machine's header is too old for is
/// named, not passed over.
pub(crate) fn check_against_c(header: &str, ours: &[(&str, u64)]) {
    use std::fmt::Write;
    let mut program = format!("#include <stdio.h>\n#include <{header}>\nint main(void) {{\n");
    for (name, _) in ours {
        writeln!(
            program,
            "#ifdef {name}\nprintf(\"{name} %llu\\n\", (unsigned long long)({name}));\n#else\nprintf(\"{name} -\\n\");\n#endif"
        )
        .unwrap();
    }
    program.push_str("return 0; }\n");
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("abi.c"), dir.path().join("abi"));
    std::fs::write(&source, program).unwrap();
    match Command::new("cc").arg("-o").arg(&binary).arg(&source).output() {
        Err(e) => return skipped("comparison with the C header, for want of a C compiler `cc`", &e),
        Ok(run) if !run.status.success() => {
            return skipped(
                "comparison with the C header, which does not compile",
                &String::from_utf8_lossy(&run.stderr),
            );
        }
        Ok(_) => {}
    }
    let told = String::from_utf8(Command::new(&binary).output().unwrap().stdout).unwrap();
    let mut compared = 0;
    for (line, (name, value)) in told.lines().zip(ours) {
        match line.strip_prefix(name).unwrap().trim() {
            "-" => skipped(name, &format!("this machine's {header} is too old to have it")),
            theirs => {
                assert_eq!(theirs, value.to_string(), "{name}");
                compared += 1;
            }
        }
    }
    assert!(compared > 0 || ours.len() < 10, "no constant at all was compared");
}

/// A memfd mapped twice: as the engine would, and as the guest would.
pub(crate) struct Pair {
    pub(crate) memfd: OwnedFd,
    pub(crate) engine: Mapping,
    pub(crate) guest: Mapping,
}

impl Pair {
    pub(crate) fn new(pages: u64) -> Self {
        let memfd = rustix::fs::memfd_create("test guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = pages * PAGE_BYTES_U64;
        rustix::fs::ftruncate(&memfd, bytes).unwrap();
        let map = || Mapping::shared(memfd.as_fd(), crate::units::usize_of(bytes), false).unwrap();
        let (engine, guest) = (map(), map());
        Self { memfd, engine, guest }
    }
    pub(crate) fn span(&self) -> Span {
        Span {
            start: crate::units::u64_of(self.guest.address().as_ptr().addr()),
            bytes: self.guest.pages().bytes().0,
        }
    }
}

fn open_or_skip(features: Features) -> Option<Userfaultfd> {
    match open().and_then(|(fd, _)| Userfaultfd::new(fd, features)) {
        Ok(uffd) => Some(uffd),
        Err(e) => {
            skipped("userfaultfd test", &e);
            None
        }
    }
}

/// Reads the first byte of a page as the guest would.
fn peek(guest: &Mapping, page: u64) -> u8 {
    let mut copy = crate::memory::PageBuf::zeroed();
    guest.page(crate::units::Pfn(page)).copy_to(&mut copy);
    copy.0[0]
}

#[test]
fn a_missing_page_is_told_of_waits_and_gets_what_it_is_given() {
    let Some(uffd) = open_or_skip(Features::HOLD_BACK.and(Features::THREAD_ID)) else { return };
    let pair = Pair::new(8);
    let (span, done) = (pair.span(), AtomicBool::new(false));
    uffd.register(span, Watch::MISSING).unwrap();
    let mut events = Vec::new();
    uffd.events(Duration::from_millis(1), &mut events).unwrap();
    assert!(events.is_empty(), "nobody has touched anything");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let got = peek(&pair.guest, 3);
            done.store(true, Ordering::SeqCst);
            got
        });
        while events.is_empty() {
            uffd.events(Duration::from_secs(1), &mut events).unwrap();
        }
        let [Event::Fault { address, write: false, protected: false, thread }] = events[..] else {
            panic!("{events:?}")
        };
        assert_eq!(address, span.start + 3 * PAGE_BYTES_U64);
        assert_ne!(thread, 0);
        assert!(!done.load(Ordering::SeqCst), "it waits");
        let other = Pair::new(1);
        other.engine.page(crate::units::Pfn(0)).copy_from_slice(&[7; crate::units::PAGE_BYTES]);
        uffd.copy_page(address, other.engine.page(crate::units::Pfn(0))).unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        let again = uffd.copy_page(address, other.engine.page(crate::units::Pfn(0))).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(uffd.zero_page(address).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    });
    uffd.zero_page(span.start).unwrap();
    assert_eq!(peek(&pair.guest, 0), 0);
    uffd.unregister(span).unwrap();
    assert_eq!(peek(&pair.guest, 5), 0, "no longer watched: the kernel gives a zero page");
}

#[test]
fn one_descriptor_holds_back_first_and_logs_writes_later() {
    let Some(uffd) = open_or_skip(Features::HOLD_BACK.and(Features::LOG_WRITES)) else { return };
    let Some(second) = open_or_skip(Features::LOG_WRITES) else { return };
    let pair = Pair::new(8);
    uffd.register(pair.span(), Watch::MISSING).unwrap();
    let busy = second.register(pair.span(), Watch::WRITES).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY), "a range answers to one descriptor");
    for page in 0..8 {
        uffd.zero_page(pair.span().start + page * PAGE_BYTES_U64).unwrap();
    }
    uffd.unregister(pair.span()).unwrap();
    uffd.register(pair.span(), Watch::WRITES).unwrap();
    uffd.protect(pair.span()).unwrap();
    pair.guest.page(crate::units::Pfn(2)).fill_zero();
    let mut scanner =
        super::super::pagemap::Scanner::new(super::super::pagemap::Scanner::open_own().unwrap());
    let mut runs = Vec::new();
    scanner.written(pair.span(), |from, to| runs.push((from, to))).unwrap();
    let at = pair.span().start + 2 * PAGE_BYTES_U64;
    assert_eq!(runs, [(at, at + PAGE_BYTES_U64)]);
    // A fresh one can have the range only when the first has let go of it.
    uffd.unregister(pair.span()).unwrap();
    second.register(pair.span(), Watch::WRITES).unwrap();
}

#[test]
fn events_other_than_faults_are_told() {
    let Some(uffd) = open_or_skip(Features::HOLD_BACK.and(Features::EVENT_REMOVE).and(Features::EVENT_UNMAP))
    else {
        return;
    };
    let pair = Pair::new(8);
    let span = pair.span();
    uffd.register(span, Watch::MISSING).unwrap();
    let mut events = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(pair));
        while events.is_empty() {
            uffd.events(Duration::from_secs(1), &mut events).unwrap();
        }
    });
    assert!(matches!(events[..], [Event::Unmap(gone)] if gone == span), "{events:?}");
    let mut removed = Message { event: EVENT_REMOVE, ..Message::default() };
    removed.argument = [4096, 12288, 0];
    assert!(matches!(decode(&removed), Ok(Event::Remove(Span { start: 4096, bytes: 8192 }))));
    assert!(decode(&Message { event: 0x7f, ..Message::default() }).is_err());
}

#[test]
fn the_living_and_the_dead_are_told_apart() {
    let Some(uffd) = open_or_skip(Features::HOLD_BACK) else { return };
    assert!(uffd.is_alive());
    assert!(Userfaultfd::offered().unwrap().has(Features::HOLD_BACK));
    assert_eq!(
        Userfaultfd::new(open().unwrap().0, Features(1 << 60)).unwrap_err().kind(),
        io::ErrorKind::Unsupported
    );
}

/// One read from the start of a file straight into a guest's page, as a guest's disk does it; bytes read.
pub(crate) fn pread_into(file: BorrowedFd<'_>, page: crate::memory::GuestPage<'_>) -> usize {
    // SAFETY: a page is mapped at this address for as long as `page` lives. A test of what the kernel writes there.
    let read =
        unsafe { libc::pread(file.as_raw_fd(), page.address().as_ptr().cast(), crate::units::PAGE_BYTES, 0) };
    usize::try_from(read).unwrap_or_else(|_| panic!("{}", io::Error::last_os_error()))
}
