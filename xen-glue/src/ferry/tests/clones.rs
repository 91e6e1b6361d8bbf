//! A guest whose disk is a qcow2 clone, from what xenstore says of it to its pages on the other host.

use super::*;
use crate::abi::DomainId;
use crate::ferry::attached;
use crate::xenstore::Xenstore;
use crate::xenstore::made_up::serve;
use mover::disk::image::Role;

/// As `qemu-img create -f qcow2 -F raw -b ../golden.raw` makes it.
const CLONE: &[u8] = include_bytes!("../../../../mover/tests/kept/clones/one.qcow2");

/// 500 pages stand on the base and 100 on an image that the settings name. Some go by the wire, where that is done with them first.
#[test]
fn pages_that_stand_under_a_clone_are_loaded_from_there() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("clones")).unwrap();
    std::fs::write(at("clones/one.qcow2"), CLONE).unwrap();
    image(&at("golden.raw"), 600);
    let shifted: Vec<u8> = (10_000..10_100).flat_map(|block| block_of(block).0).collect();
    std::fs::write(at("media.raw"), shifted).unwrap();
    let mut on = |_, _| true;
    for name in ["golden.raw", "media.raw"] {
        let mut options = commands::Options { bytes_per_second: None, progress: &mut on };
        commands::build(&at(name), &at("index"), &mut options).unwrap();
    }
    let params = format!("qcow2:{}", at("clones/one.qcow2").display());
    serve(
        &at("socket"),
        &[
            ("/libxl/7/device/vbd/51712/backend", "/local/domain/0/backend/qdisk/7/51712"),
            ("/local/domain/0/backend/qdisk/7/51712/params", &params),
            ("/local/domain/0/backend/qdisk/7/51712/dev", "xvda"),
        ],
    );
    let mut store = Xenstore::at(&at("socket")).unwrap();
    let (mut disks, notes) = attached::disks(&mut store, DomainId(7)).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("disk xvda is a clone"), "{notes:?}");
    assert_eq!(attached::add_references(&mut disks, &[at("media.raw"), at("none.raw")]), [""; 0]);
    let roles: Vec<_> = disks.iter().map(|disk| disk.role).collect();
    assert_eq!(roles, [Role::Base, Role::Reference, Role::Reference]);

    let guest = Guest::new(2000);
    for block in 0..500 {
        guest.borrow().memory.page(Pfn(1000 + block)).copy_from(&block_of(block));
    }
    for block in 0..100 {
        guest.borrow().memory.page(Pfn(200 + block)).copy_from(&block_of(10_000 + block));
    }
    let plan = Plan { disks, indexes: at("index"), ..plan(Mode::Refer) };
    let trip = Journey::new(plan).go(&guest, &mut patient());
    let (saved, restored) = (trip.saved.unwrap(), trip.restored.unwrap());
    assert_same(&guest, &trip.copy);
    let ferried = saved.ferried.unwrap();
    assert!(ferried.references >= 400 && ferried.refetched == 0, "{ferried:?}");
    assert!(restored.references >= 400 && ferried.disk_bytes >= 400 * 4096, "{restored:?}, {ferried:?}");
    let gone = |note: &String| note.contains("disk reference-2 is left out") && note.contains("none.raw");
    assert!(trip.notes.iter().any(gone), "{:?}", trip.notes);
}
