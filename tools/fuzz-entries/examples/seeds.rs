//! Writes the corpora's seeds: one valid input of each kind, made by the writers of today. `cargo run -p fuzz-entries
//! --example seeds`; what is there is overwritten, what the fuzzers added stays.
#![expect(clippy::unwrap_used, reason = "a tool of the project's own; it ends where it finds an error")]

use std::fs;
use std::io::IoSlice;
use std::path::PathBuf;

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
use xen_glue::stream::{DomainHeader, GuestType, HvmParam, OPTIONAL, PageEntry, PageType, TscInfo, Writer};

fn put(entry: &str, name: &str, bytes: &[u8]) {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(entry);
    fs::create_dir_all(&corpus).unwrap();
    fs::write(corpus.join(name), bytes).unwrap();
}

fn main() {
    greetings();
    frames();
    messages();
    let token = Secret([0xa5; 32]);
    for (name, fingerprint) in [("clear", None), ("pinned", Some(Fingerprint([0x1f; 32])))] {
        put("word", name, Pass { token: token.clone(), fingerprint }.to_word().as_bytes());
    }
    put("xen_stream", "hvm", &hvm());
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
    let hello = |purpose| Hello::new(purpose, MigrationId([7; 16]), Secret([9; 32])).encode();
    put("greeting", "control", &hello(Purpose::Control));
    put("greeting", "lane", &hello(Purpose::Lane(3)));
    put("greeting", "resume", &hello(Purpose::Resume));
    put("greeting", "refused", &Welcome::refuse(Verdict::Busy).encode());
    put("greeting", "knock", &knock::make(&Secret([9; 32]), [1; 16]));
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
    writer.tsc_info(TscInfo { mode: 2, khz: 2_400_000, nsec: 123, incarnation: 3 }).unwrap();
    writer.hvm_context(&[9; 101]).unwrap();
    writer.hvm_params(&[HvmParam { index: 1, value: 0xfeff_c000 }]).unwrap();
    writer.end().unwrap()
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
