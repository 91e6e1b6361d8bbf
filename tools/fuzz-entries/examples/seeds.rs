//! Writes the corpora's seeds: one valid input of each kind, made by the writers of today. `cargo run -p fuzz-entries
//! --example seeds`; what is there is overwritten, what the fuzzers added stays.
#![expect(clippy::unwrap_used, reason = "a tool of the project's own; it ends where it finds an error")]

use std::fs;
use std::io::IoSlice;
use std::path::PathBuf;

use mover::disk::DiskInfo;
use mover::fingerprint::{Check, CheckKey};
use mover::index::file::{self, Meta};
use mover::index::layout::Layout;
use mover::index::table::Table;
use mover::net::pass::{Fingerprint, Pass};
use mover::process::config::GuestConfig;
use mover::process::workload::Workload;
use mover::units::{BlockAddress, DiskId, PAGE_BYTES_U64, Pfn, Sector, Version};
use mover::wire::control::{Account, DiskName, Feedback, Message, Offer, Shape, Standing};
use mover::wire::frame::{Digest, Header, Kind, Reference, ZeroRun};
use mover::wire::hello::{Hello, MigrationId, Purpose, Secret, Verdict, Welcome};
use mover::wire::knock;
use xen_glue::helper::{self, Level, Note};
use xen_glue::stream::{
    DOMAIN_HEADER_BYTES, DomainHeader, Emulator, FrozenDisks, GuestType, HvmParam, IMAGE_HEADER_BYTES, Lanes,
    LanesDone, LibxlRecord, OFFER, OPTIONAL, Offer as LaneOffer, P2mFrames, PageEntry, PageType, PvWidth,
    Reference as PageOnDisk, TscInfo, VcpuKind, Writer, XlHeader, libxl_header,
};

fn put(entry: &str, name: &str, bytes: &[u8]) {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(entry);
    fs::create_dir_all(&corpus).unwrap();
    fs::write(corpus.join(name), bytes).unwrap();
}

fn main() {
    greetings();
    frames();
    messages();
    let token = Secret::of(&[0xa5; 32]);
    for (name, fingerprint) in [("clear", None), ("pinned", Some(Fingerprint([0x1f; 32])))] {
        put("word", name, Pass { token: token.clone(), fingerprint }.to_word().as_bytes());
    }
    put("xen_stream", "hvm", &hvm());
    put("xen_stream", "lanes", &lanes());
    put("xen_stream", "frozen", &frozen());
    put("xen_stream", "pv", &pv());
    put("xen_stream", "version-2", &version_2());
    put("xen_stream", "file", &file(&hvm()));
    put("offer", "pinned", &offer(Some([3; 32])).encode());
    put("offer", "clear", &offer(None).encode());
    helper();
    put("xenstore", "disks", &xenstore());
    clones();
    put("record", "data", b"what it carries\x17\0\0");
    put("record", "key-update", b"\x18\0\0\x01\0\x16");
    put("record", "stranger", b"\x17\x03\x03\0\x14twenty bytes of noise");
    index();
    for name in ["idle-desktop", "file-copy", "overwrite-storm"] {
        put("workload", name, Workload::find(name).unwrap().1.as_bytes());
    }
    let mut guest = GuestConfig::new("desk", 1 << 30);
    guest.runtime_dir = "/run/pageferry".into();
    guest.disks = vec!["/images/desk.img".into()];
    put("config", "desk", &serde_json::to_vec(&guest).unwrap());
}

fn greetings() {
    let hello = |purpose| Hello::new(purpose, MigrationId([7; 16]), Secret::of(&[9; 32])).encode();
    put("greeting", "control", &hello(Purpose::Control));
    put("greeting", "lane", &hello(Purpose::Lane(3)));
    put("greeting", "resume", &hello(Purpose::Resume));
    put("greeting", "refused", &Welcome::refuse(Verdict::Busy).encode());
    put("greeting", "knock", &knock::make(&Secret::of(&[9; 32]), [1; 16]));
}

fn frames() {
    let head = |kind, count| {
        let (lane, round, sequence) = (1, 2, 3);
        Header { kind, lane, count, round, version: Version(5), sequence }.encode().to_vec()
    };
    let with = |name: &str, kind, count, table: &[u8]| {
        put("frame", name, &[head(kind, count), table.to_vec()].concat());
    };
    let block = BlockAddress { disk: DiskId(1), sector: Sector(88_120) };
    with("data", Kind::Data, 2, &[7_u64.to_le_bytes(), 9_u64.to_le_bytes()].concat());
    with("zero", Kind::Zero, 1, zerocopy_bytes(&ZeroRun::new(Pfn(4), 100)));
    with("references", Kind::References, 1, zerocopy_bytes(&Reference::new(Pfn(4), block, Check([3; 16]))));
    with("digests", Kind::Digests, 1, zerocopy_bytes(&Digest::new(Pfn(4), Check([3; 16]))));
    with("barrier", Kind::Barrier, 0, &[]);
}

fn zerocopy_bytes<T: zerocopy::IntoBytes + zerocopy::Immutable>(entry: &T) -> &[u8] {
    entry.as_bytes()
}

fn messages() {
    let disk = DiskName {
        bytes: 1 << 30,
        name: "disk0".to_owned(),
        path: "/images/desk.img".to_owned(),
        identity: "image 42".to_owned(),
    };
    let shape = Shape {
        guest: "desk".to_owned(),
        pages: 1 << 18,
        lanes: 2,
        refers: true,
        lazy: true,
        verify: false,
        key: CheckKey::new([5; 32]),
        disks: vec![disk],
    };
    let offer =
        Offer { disks: vec![Ok(()), Err("not here".to_owned())], lazy: Err("no userfaultfd".to_owned()) };
    let all = [
        Message::Shape(shape),
        Message::Round(1, 1 << 18),
        Message::Final(7, 5),
        Message::State(b"state".to_vec()),
        Message::Commit,
        Message::Finished,
        Message::Ping,
        Message::Verify(8),
        Message::Accept(offer),
        Message::Feedback(Feedback::default()),
        Message::Refetch { urgent: true, pfns: vec![Pfn(3), Pfn(9)] },
        Message::Placed(1),
        Message::Ready,
        Message::Started,
        Message::Drained(Account::default()),
        Message::Standing(Standing::Ready),
        Message::Abort(mover::ExitClass::Cancelled, "by the user".to_owned()),
    ];
    for message in &all {
        put("message", &message.name().to_lowercase(), &message.encode());
    }
}

fn hvm() -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.cpuid_policy(&[7; 48]).unwrap();
    writer.msr_policy(&[8; 32]).unwrap();
    writer.static_data_end().unwrap();
    writer.optional(OPTIONAL | 0x50001, b"an offer").unwrap();
    let pages: Vec<_> = (0..2).map(|pfn| PageEntry::new(Pfn(pfn), PageType::Normal)).collect();
    writer.page_data(&pages, &[IoSlice::new(&[7; 8192])]).unwrap();
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 101]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    writer.end().unwrap()
}

const TSC: TscInfo = TscInfo { mode: 2, khz: 2_400_000, nsec: 123, incarnation: 3 };

/// Page tables of every level, two virtual CPUs with all that one may have, and pages sent once more to be compared.
fn pv() -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Pv, xen_major: 4, xen_minor: 20 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.pv_info(PvWidth::Bits64).unwrap();
    writer.static_data_end().unwrap();
    writer.p2m_frames(&P2mFrames { start: 0, end: 1023, frames: vec![40, 41] }).unwrap();
    let tables = (1..=4).flat_map(|level| [false, true].map(|pinned| PageType::Table { level, pinned }));
    let others = [PageType::AllocateOnly, PageType::Broken, PageType::Invalid];
    let entries: Vec<_> =
        tables.chain(others).zip(3..).map(|(kind, pfn)| PageEntry::new(Pfn(pfn), kind)).collect();
    writer.page_data(&entries, &[IoSlice::new(&[5; 8 * 4096])]).unwrap();
    writer.verify().unwrap();
    let one = [PageEntry::new(Pfn(3), PageType::Table { level: 1, pinned: false })];
    writer.page_data(&one, &[IoSlice::new(&[5; 4096])]).unwrap();
    writer.tsc_info(TSC).unwrap();
    writer.shared_info(&[6; 4096]).unwrap();
    for vcpu in 0..2 {
        writer.vcpu(VcpuKind::Basic, vcpu, &[1; 5168]).unwrap();
        writer.vcpu(VcpuKind::Extended, vcpu, &[2; 128]).unwrap();
        writer.vcpu(VcpuKind::Xsave, vcpu, &[3; 835]).unwrap();
        writer.vcpu(VcpuKind::Msrs, vcpu, &[4; 32]).unwrap();
    }
    writer.end().unwrap()
}

/// As Xen 4.13 and before wrote it: nothing is said to be static.
fn version_2() -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 13 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.static_data_end().unwrap();
    writer.page_data(&[PageEntry::new(Pfn(0), PageType::Normal)], &[IoSlice::new(&[0; 4096])]).unwrap();
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 101]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    let mut bytes = writer.end().unwrap();
    // The version's last byte, and the marker behind the headers.
    bytes[15] = 2;
    let headers = IMAGE_HEADER_BYTES + DOMAIN_HEADER_BYTES;
    bytes.drain(headers..headers + 8);
    bytes
}

/// A file as `xl save` writes it, around `libxc`.
fn file(libxc: &[u8]) -> Vec<u8> {
    let emulator = Emulator { id: 2, index: 0 };
    let keys = b"physmap/1/start_addr\0f0000000\0".to_vec();
    let behind = [
        LibxlRecord::EmulatorXenstoreData { emulator, data: keys },
        LibxlRecord::EmulatorContext { emulator, data: vec![0x51; 77] },
        LibxlRecord::End,
    ];
    let mut out = XlHeader { json: true, libxl: true, config: b"{\"name\":\"one\"}".to_vec() }.encode();
    out.extend(libxl_header());
    out.extend(LibxlRecord::LibxcContext.encode());
    out.extend(libxc);
    behind.iter().for_each(|record| out.extend(record.encode()));
    out
}

fn offer(fingerprint: Option<[u8; 32]>) -> LaneOffer {
    let addresses = vec!["10.77.0.1:4711".to_owned(), "[fd00::1]:4711".to_owned()];
    LaneOffer { migration: [1; 16], token: [2; 32], lanes: 3, fingerprint, addresses }
}

/// An offer, lanes, and what has gone over them.
fn lanes() -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 20 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.static_data_end().unwrap();
    writer.optional(OFFER, &offer(Some([3; 32])).encode()).unwrap();
    writer.lanes(&Lanes { migration: [1; 16], pages: 1000, populated: vec![0..600, 700..1000] }).unwrap();
    writer.lanes_done(&LanesDone { frames: 12, version: 34, round: 5, digest: [6; 32] }).unwrap();
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 101]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    writer.end().unwrap()
}

/// Pages that are left on two disks.
fn frozen() -> Vec<u8> {
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(Vec::new(), domain).unwrap();
    writer.static_data_end().unwrap();
    let disk = |name: &str| DiskInfo {
        name: name.to_owned(),
        path: format!("/images/{name}"),
        bytes: 1 << 20,
        identity: "pf1 wwid=naa.5 blocks=0:00000000000000aa".to_owned(),
    };
    let disks = vec![disk("xvda"), disk("xvdb")];
    writer.frozen_disks(&FrozenDisks { key: Secret::of(&[3; 32]), disks }).unwrap();
    let kinds = [PageType::AllocateOnly, PageType::Normal, PageType::AllocateOnly];
    let pages: Vec<_> =
        kinds.into_iter().zip(4..).map(|(kind, pfn)| PageEntry::new(Pfn(pfn), kind)).collect();
    writer.page_data(&pages, &[IoSlice::new(&[7; 4096])]).unwrap();
    for (pfn, disk) in [(6, 0), (4, 1)] {
        let block = BlockAddress { disk: DiskId(disk), sector: Sector(63) };
        writer.references(&[PageOnDisk { pfn: Pfn(pfn), block, check: Check([8; 16]) }]).unwrap();
    }
    writer.tsc_info(TSC).unwrap();
    writer.hvm_context(&[9; 101]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    writer.end().unwrap()
}

fn helper() {
    let log = helper::Message::Log { level: Level::Info, errno: None, context: "xc", text: "a line" };
    let end = helper::Message::Complete { retval: 0, errno: 0 };
    put("helper", "messages", &[log.encode(), helper::Message::Suspend.encode(), end.encode()].concat());
    let mut notes = Vec::new();
    for note in [Note::Answer(1), Note::Answer(-1), Note::Cancel] {
        note.write(&mut notes).unwrap();
    }
    put("helper", "notes", &notes);
    put("helper", "save", b"--save-domain\x008\x009\x007\x001\x00136\x000");
    put("helper", "restore", b"--restore-domain\x008\x009\x007\x001\x000\x002\x000\x00768\x000");
}

/// Disks of every kind: a block device, files, a clone, another format, another domain's, one that only its script finds, one whose path is
/// none, no disk. Before the first answer comes an event.
fn xenstore() -> Vec<u8> {
    // Its backend; then what `ferry::attached` asks of it, in that order: dev, device-type, params, mode, script.
    let disks: [(&str, [Option<&str>; 5]); 8] = [
        ("0/backend/vbd/7/1", [Some("xvda"), Some("disk"), Some("/dev/vg/desk"), Some("w"), None]),
        ("0/backend/qdisk/7/2", [Some("xvdb"), None, Some("aio:/images/a:b"), Some("r"), None]),
        ("0/backend/qdisk/7/3", [None, None, Some("qcow2:/images/c"), None, None]),
        ("3/backend/vbd/7/4", [Some("xvdd"), None, Some("/dev/x"), None, None]),
        (
            "0/backend/vbd/7/5",
            [Some("xvde"), None, Some("iqn:1"), None, Some("/etc/xen/scripts/block-iscsi")],
        ),
        ("0/backend/vbd/7/6", [Some("xvdf"), None, Some("relative"), None, Some("/etc/xen/scripts/block")]),
        ("0/backend/qdisk/7/7", [Some("hdc"), Some("cdrom"), None, None, None]),
        ("0/backend/qdisk/7/8", [Some("xvdg"), None, Some("qed:/images/d"), None, None]),
    ];
    let answer =
        |said: Option<&str>| said.map_or(b"EENOENT\0".to_vec(), |said| [b".", said.as_bytes()].concat());
    let mut pieces = vec![b"W\x01".to_vec(), b".1\x002\x003\x004\x005\x006\x007\x008\0".to_vec()];
    for (backend, keys) in disks {
        pieces.push(answer(Some(&format!("/local/domain/{backend}"))));
        // Of what is no disk nothing else is asked.
        let asked = if keys[1] == Some("cdrom") { 2 } else { 5 };
        pieces.extend(keys[..asked].iter().map(|key| answer(*key)));
    }
    pieces.join(&0xff)
}

/// Headers as `qemu-img` made them, and a VHD's clone as XenServer's tools write it.
fn clones() {
    let kept = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../mover/tests/kept/clones");
    for name in ["one.qcow2", "two.qcow2", "split.qcow2", "four.qcow2", "fixed.vhd"] {
        put("clone", name, &fs::read(kept.join(name)).unwrap());
    }
    put("clone", "clone.vhd", &vhd());
}

/// A differencing VHD with a path of each kind to its parent.
fn vhd() -> Vec<u8> {
    let seal = |bytes: &mut [u8], at: usize| {
        let sum = bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    };
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[12..16].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    footer[16..24].copy_from_slice(&512_u64.to_be_bytes());
    footer[60..64].copy_from_slice(&4_u32.to_be_bytes());
    footer[68..84].fill(9);
    seal(&mut footer, 64);
    let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let paths: [(&[u8; 4], Vec<u8>); 3] = [
        (b"MacX", b"file://golden.raw".to_vec()),
        (b"W2ru", wide(".\\golden.raw")),
        (b"W2ku", wide("/sr/golden.raw")),
    ];
    let (mut header, mut names) = (vec![0; 1024], Vec::new());
    header[..8].copy_from_slice(b"cxsparse");
    for (number, (code, path)) in paths.iter().enumerate() {
        let at = 576 + number * 24;
        header[at..at + 4].copy_from_slice(*code);
        header[at + 8..at + 12].copy_from_slice(&u32::try_from(path.len()).unwrap().to_be_bytes());
        let offset = u64::try_from(1536 + names.len()).unwrap();
        header[at + 16..at + 24].copy_from_slice(&offset.to_be_bytes());
        names.extend_from_slice(path);
        names.resize(names.len().next_multiple_of(64), 0);
    }
    seal(&mut header, 36);
    [footer.clone(), header, names, footer].concat()
}

fn index() {
    let blocks = 200;
    let layout = Layout::plain(blocks * PAGE_BYTES_U64);
    let table = Table::new(layout, blocks);
    for unit in 0..blocks {
        table.learn(unit, unit.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let meta = Meta {
        key: "a disk".to_owned(),
        path: "/images/desk.img".to_owned(),
        disk_bytes: blocks * PAGE_BYTES_U64,
        blocks,
        ..Meta::default()
    };
    let path = std::env::temp_dir().join(format!("pageferry-seed-{}", std::process::id()));
    file::write(&path, &table, &meta).unwrap();
    put("index", "small", &fs::read(&path).unwrap());
    fs::remove_file(&path).unwrap();
}
