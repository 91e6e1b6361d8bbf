//! Which disks a guest has, from what its toolstack has written into xenstore. What the guest may write there is not looked at.
//!
//! ```text
//!   /libxl/DOMID/device/vbd/DEVID/backend = /local/domain/0/backend/KIND/DOMID/DEVID
//!     KIND vbd    params = PATH           a block device, or a file on a loop device
//!     KIND qdisk  params = FORMAT:PATH    QEMU; "aio" is a raw image, "qcow2" and "vhd" may be clones of one
//! ```
//! A clone's own clusters are not read as blocks, but the raw image under it is: it counts as a disk. Clones of one base share it.
//! Source: `libxl_disk.c` and `libxl_device.c` of Xen; the same from 4.17 to 4.20.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use mover::disk::chain::{self, Bottom, Format};
use mover::disk::image::{DiskSpec, Role};
use mover::error::DiskError;
use mover::limits::DISKS_MAX;

use crate::abi::DomainId;
use crate::xenstore::Xenstore;

/// What finds the raw image under a clone.
pub type Follow<'f> = &'f dyn Fn(&Path, Format) -> Result<Bottom, DiskError>;

/// The disks of `domain` that pages may be referred to on, behind them the images under those that are clones, and a sentence for
/// each one that is left out.
///
/// # Errors
/// Xenstore does not answer.
pub fn disks(store: &mut Xenstore, domain: DomainId) -> io::Result<(Vec<DiskSpec>, Vec<String>)> {
    disks_over(store, domain, &chain::bottom)
}

/// The same, where clones are looked into by other means than opening them.
///
/// # Errors
/// Xenstore does not answer.
pub fn disks_over(
    store: &mut Xenstore,
    domain: DomainId,
    follow: Follow<'_>,
) -> io::Result<(Vec<DiskSpec>, Vec<String>)> {
    let (mut found, mut bases, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let all = format!("/libxl/{}/device/vbd", domain.0);
    for device in store.list(&all)? {
        let Some(backend) = store.read(&format!("{all}/{device}/backend"))? else { continue };
        let name = store.read(&format!("{backend}/dev"))?.unwrap_or(device);
        match one(store, &backend, &name, follow)? {
            Ok(Some(disk)) if disk.role == Role::Base => {
                notes.push(format!(
                    "disk {name} is a clone: pages are referred to on {}, which is under it, and what the guest has written since \
                     is sent",
                    disk.path.display()
                ));
                bases.push(disk);
            }
            Ok(Some(disk)) => found.push(disk),
            Ok(None) => {}
            Err(why) => notes.push(format!("disk {name} is left out: {why}")),
        }
    }
    add(&mut found, bases, &mut notes);
    for disk in found.drain(DISKS_MAX.min(found.len())..) {
        notes.push(format!("disk {} is left out: {DISKS_MAX} will do", disk.name));
    }
    Ok((found, notes))
}

/// Puts `more` behind `disks`, each file once.
fn add(disks: &mut Vec<DiskSpec>, more: impl IntoIterator<Item = DiskSpec>, notes: &mut Vec<String>) {
    for disk in more {
        match disks.iter().find(|known| known.path == disk.path) {
            None => disks.push(disk),
            Some(known) if known.role == Role::Own => notes.push(format!(
                "{} is the guest's own disk {} and under {} as well: is that meant?",
                known.path.display(),
                known.name,
                disk.name
            )),
            Some(_) => {}
        }
    }
}

/// Puts `images` of the settings, which pages may be referred to on, behind the guest's `disks`. A sentence for each that is left out.
pub fn add_references(disks: &mut Vec<DiskSpec>, images: &[PathBuf]) -> Vec<String> {
    let mut notes = Vec::new();
    for (number, path) in (1..).zip(images) {
        if disks.iter().any(|disk| disk.path == *path) {
            continue;
        }
        if disks.len() >= DISKS_MAX {
            notes.push(format!("{} is left out: {DISKS_MAX} disks will do", path.display()));
            continue;
        }
        let name = format!("reference-{number}");
        disks.push(DiskSpec { name, path: path.clone(), role: Role::Reference });
    }
    notes
}

/// The disk behind `backend`; none if it is no disk; else why it can't be read.
fn one(
    store: &mut Xenstore,
    backend: &str,
    name: &str,
    follow: Follow<'_>,
) -> io::Result<Result<Option<DiskSpec>, String>> {
    let mut read = |key: &str| store.read(&format!("{backend}/{key}"));
    if read("device-type")?.as_deref() == Some("cdrom") {
        return Ok(Ok(None));
    }
    let params = read("params")?.unwrap_or_default();
    let role = match read("mode")? {
        Some(mode) if !mode.starts_with('w') => Role::ReadOnly,
        _ => Role::Own,
    };
    let script = read("script")?.unwrap_or_default();
    let (path, format) =
        match backend.strip_prefix("/local/domain/0/backend/").and_then(|rest| rest.split('/').next()) {
            Some("vbd") if script.is_empty() || script.ends_with("/block") => (params, Format::Raw),
            Some("vbd") => return Ok(Err(format!("{script} knows where it is"))),
            Some("qdisk") => match params.split_once(':') {
                Some(("aio" | "raw", path)) => (path.to_owned(), Format::Raw),
                Some(("qcow2", path)) => (path.to_owned(), Format::Qcow2),
                Some(("vhd" | "vpc", path)) => (path.to_owned(), Format::Vhd),
                Some((format, _)) => {
                    return Ok(Err(format!("its format is {format}; raw, qcow2 and vhd ones can be read")));
                }
                None => return Ok(Err("nothing says what its format is".to_owned())),
            },
            Some(kind) => return Ok(Err(format!("its backend is {kind}"))),
            None => return Ok(Err("another domain serves it".to_owned())),
        };
    if !path.starts_with('/') {
        return Ok(Err(format!("`{path}` is no path")));
    }
    let under = match follow(Path::new(&path), format) {
        Ok(bottom) => bottom,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let disk = match under {
        Bottom { path, written: true } => DiskSpec { name: name.to_owned(), path, role },
        Bottom { path, written: false } => DiskSpec { name: format!("{name}-base"), path, role: Role::Base },
    };
    Ok(Ok(Some(disk)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xenstore::made_up::serve;

    #[test]
    fn raw_disks_are_found_and_others_are_left_out_with_a_word() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let backend = |kind: &str, number: u32| format!("/local/domain/0/backend/{kind}/7/{number}");
        let mut tree: Vec<(String, String)> = Vec::new();
        let mut add = |number: u32, backend: &str, keys: &[(&str, &str)]| {
            tree.push((format!("/libxl/7/device/vbd/{number}/backend"), backend.to_owned()));
            // What the guest may write says something else.
            tree.push((format!("/local/domain/7/device/vbd/{number}/backend"), "/elsewhere".to_owned()));
            tree.extend(keys.iter().map(|(key, value)| (format!("{backend}/{key}"), (*value).to_owned())));
        };
        add(
            51712,
            &backend("vbd", 51712),
            &[
                ("params", "/dev/vg/desk"),
                ("mode", "w"),
                ("dev", "xvda"),
                ("script", "/etc/xen/scripts/block"),
            ],
        );
        add(51728, &backend("vbd", 51728), &[("params", "/images/base"), ("mode", "r"), ("dev", "xvdb")]);
        add(51744, &backend("qdisk", 51744), &[("params", "aio:/images/a:b"), ("dev", "xvdc")]);
        add(51760, &backend("qdisk", 51760), &[("params", "qed:/images/c"), ("dev", "xvdd")]);
        add(51776, "/local/domain/3/backend/vbd/7/51776", &[("params", "/dev/x"), ("dev", "xvde")]);
        add(
            51792,
            &backend("vbd", 51792),
            &[("params", "iqn:1"), ("dev", "xvdf"), ("script", "/etc/xen/scripts/block-iscsi")],
        );
        add(
            51808,
            &backend("qdisk", 51808),
            &[("params", "aio:"), ("dev", "xvdg"), ("device-type", "cdrom")],
        );
        add(51824, &backend("vbd", 51824), &[("params", "relative"), ("dev", "xvdh")]);
        let tree: Vec<(&str, &str)> =
            tree.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        serve(&path, &tree);
        let (found, notes) = disks(&mut Xenstore::at(&path).unwrap(), DomainId(7)).unwrap();
        let found: Vec<_> =
            found.iter().map(|disk| (disk.name.as_str(), disk.path.to_str().unwrap(), disk.role)).collect();
        assert_eq!(
            found,
            [
                ("xvda", "/dev/vg/desk", Role::Own),
                ("xvdb", "/images/base", Role::ReadOnly),
                ("xvdc", "/images/a:b", Role::Own)
            ]
        );
        for (disk, why) in [
            ("xvdd", "its format is qed"),
            ("xvde", "another domain serves it"),
            ("xvdf", "block-iscsi knows where it is"),
            ("xvdh", "`relative` is no path"),
        ] {
            assert!(notes.iter().any(|note| note.contains(disk) && note.contains(why)), "{notes:#?}");
        }
        assert_eq!(notes.len(), 4, "{notes:#?}");
    }

    /// The images under clones come behind the guest's own disks, each once; a clone without one is left out with a word.
    #[test]
    fn under_clones_are_bases() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut tree: Vec<(String, String)> = Vec::new();
        let mut add = |number: u32, params: &str, name: &str| {
            let backend = format!("/local/domain/0/backend/qdisk/7/{number}");
            tree.push((format!("/libxl/7/device/vbd/{number}/backend"), backend.clone()));
            tree.push((format!("{backend}/params"), params.to_owned()));
            tree.push((format!("{backend}/dev"), name.to_owned()));
        };
        for (number, params, name) in [
            (1, "qcow2:/images/one.qcow2", "xvda"),
            (2, "vhd:/images/two.vhd", "xvdb"),
            (3, "qcow2:/images/split.qcow2", "xvdc"),
            (4, "qcow2:/images/alone.qcow2", "xvdd"),
            (5, "aio:/images/plain", "xvde"),
            (6, "aio:/images/golden.raw2", "xvdf"),
        ] {
            add(number, params, name);
        }
        let tree: Vec<(&str, &str)> =
            tree.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        serve(&path, &tree);
        let follow = |path: &Path, format: Format| match (path.to_str().unwrap(), format) {
            ("/images/one.qcow2", Format::Qcow2) | ("/images/two.vhd", Format::Vhd) => {
                Ok(Bottom { path: "/images/golden.raw".into(), written: false })
            }
            ("/images/split.qcow2", Format::Qcow2) => {
                Ok(Bottom { path: "/images/desk.data".into(), written: true })
            }
            (path, Format::Raw) => Ok(Bottom { path: path.into(), written: true }),
            (path, _) => {
                let (path, why) = (path.to_owned(), "there is none".to_owned());
                Err(DiskError::Chain { path, why, remedy: "Pages are sent" })
            }
        };
        let (mut found, notes) = disks_over(&mut Xenstore::at(&path).unwrap(), DomainId(7), &follow).unwrap();
        let seen = |found: &[DiskSpec]| -> Vec<_> {
            let one = |disk: &DiskSpec| format!("{} {} {:?}", disk.name, disk.path.display(), disk.role);
            found.iter().map(one).collect()
        };
        assert_eq!(
            seen(&found),
            [
                "xvdc /images/desk.data Own",
                "xvde /images/plain Own",
                "xvdf /images/golden.raw2 Own",
                "xvda-base /images/golden.raw Base"
            ]
        );
        for words in
            ["disk xvda is a clone", "disk xvdb is a clone", "disk xvdd is left out: /images/alone.qcow2"]
        {
            assert!(notes.iter().any(|note| note.contains(words)), "{notes:#?}");
        }
        assert_eq!(notes.len(), 3, "{notes:#?}");
        let more: Vec<PathBuf> =
            ["/images/golden.raw", "/images/other.raw"].iter().map(PathBuf::from).collect();
        assert_eq!(add_references(&mut found, &more), [""; 0]);
        assert_eq!(seen(&found)[4..], ["reference-2 /images/other.raw Reference"], "and none twice");
        let many: Vec<PathBuf> = (0..DISKS_MAX).map(|n| format!("/images/{n}").into()).collect();
        assert_eq!(add_references(&mut found, &many).len(), 5);
        assert_eq!(found.len(), DISKS_MAX);
    }

    #[test]
    fn a_guest_without_disks_has_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        serve(&path, &[("/libxl/8/x", "")]);
        let (found, notes) = disks(&mut Xenstore::at(&path).unwrap(), DomainId(7)).unwrap();
        assert!(found.is_empty() && notes.is_empty());
    }
}
