//! Which disks a guest has, from what its toolstack has written into xenstore. What the guest may write there is not looked at.
//!
//! ```text
//!   /libxl/DOMID/device/vbd/DEVID/backend = /local/domain/0/backend/KIND/DOMID/DEVID
//!     KIND vbd    params = PATH           a block device, or a file on a loop device
//!     KIND qdisk  params = FORMAT:PATH    QEMU; "aio" is a raw image
//! ```
//! Source: `libxl_disk.c` and `libxl_device.c` of Xen; the same from 4.17 to 4.20.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use mover::disk::image::DiskSpec;
use mover::limits::DISKS_MAX;

use crate::abi::DomainId;
use crate::xenstore::Xenstore;

/// The disks of `domain` that pages may be referred to on, and a sentence for each one that is left out.
///
/// # Errors
/// Xenstore does not answer.
pub fn disks(store: &mut Xenstore, domain: DomainId) -> io::Result<(Vec<DiskSpec>, Vec<String>)> {
    let (mut found, mut notes) = (Vec::new(), Vec::new());
    let all = format!("/libxl/{}/device/vbd", domain.0);
    for device in store.list(&all)? {
        let Some(backend) = store.read(&format!("{all}/{device}/backend"))? else { continue };
        let name = store.read(&format!("{backend}/dev"))?.unwrap_or(device);
        match one(store, &backend, &name)? {
            _ if found.len() == DISKS_MAX => {
                notes.push(format!("disk {name} is left out: {DISKS_MAX} will do"))
            }
            Ok(Some(disk)) => found.push(disk),
            Ok(None) => {}
            Err(why) => notes.push(format!("disk {name} is left out: {why}")),
        }
    }
    Ok((found, notes))
}

/// The disk behind `backend`; none if it is no disk; else why it can't be read.
fn one(store: &mut Xenstore, backend: &str, name: &str) -> io::Result<Result<Option<DiskSpec>, String>> {
    let mut read = |key: &str| store.read(&format!("{backend}/{key}"));
    if read("device-type")?.as_deref() == Some("cdrom") {
        return Ok(Ok(None));
    }
    let params = read("params")?.unwrap_or_default();
    let writable = read("mode")?.is_none_or(|mode| mode.starts_with('w'));
    let script = read("script")?.unwrap_or_default();
    let path = match backend.strip_prefix("/local/domain/0/backend/").and_then(|rest| rest.split('/').next())
    {
        Some("vbd") if script.is_empty() || script.ends_with("/block") => Ok(params),
        Some("vbd") => Err(format!("{script} knows where it is")),
        Some("qdisk") => match params.split_once(':') {
            Some(("aio" | "raw", path)) => Ok(path.to_owned()),
            Some((format, _)) => Err(format!("its format is {format}, and only raw ones can be read")),
            None => Err("nothing says what its format is".to_owned()),
        },
        Some(kind) => Err(format!("its backend is {kind}")),
        None => Err("another domain serves it".to_owned()),
    };
    Ok(path.and_then(|path| match path.starts_with('/') {
        true => Ok(Some(DiskSpec { name: name.to_owned(), path: PathBuf::from(path), writable })),
        false => Err(format!("`{path}` is no path")),
    }))
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
        add(51760, &backend("qdisk", 51760), &[("params", "qcow2:/images/c"), ("dev", "xvdd")]);
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
        let found: Vec<_> = found
            .iter()
            .map(|disk| (disk.name.as_str(), disk.path.to_str().unwrap(), disk.writable))
            .collect();
        assert_eq!(
            found,
            [("xvda", "/dev/vg/desk", true), ("xvdb", "/images/base", false), ("xvdc", "/images/a:b", true)]
        );
        for (disk, why) in [
            ("xvdd", "its format is qcow2"),
            ("xvde", "another domain serves it"),
            ("xvdf", "block-iscsi knows where it is"),
            ("xvdh", "`relative` is no path"),
        ] {
            assert!(notes.iter().any(|note| note.contains(disk) && note.contains(why)), "{notes:#?}");
        }
        assert_eq!(notes.len(), 4, "{notes:#?}");
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
