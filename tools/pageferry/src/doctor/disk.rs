//! Probes of direct reads where the disks are.

use std::os::fd::OwnedFd;
use std::path::Path;

use mover::ExitClass;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, openat, statx};
use rustix::io::{Errno, pread, pwrite};

use super::Capability;
use crate::failure::{Failure, Outcome};

/// What the probe reads: enough for every alignment there is.
const PIECE: usize = 4096;

/// O_DIRECT and its alignment on `path`, a directory or an image.
pub(super) fn probes(path: &Path) -> Outcome<Vec<Capability>> {
    let this = Capability::optional(
        "O_DIRECT",
        "no references from disks there (`refer` and `lazy` send those pages as data): buffered reads could be stale",
    );
    let shown = path.display();
    let found = match direct_file(path) {
        Ok(file) => file,
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            let remedy =
                "put the images on a file system with direct reads (ext4, xfs, btrfs, most network ones)";
            return Ok(vec![this.no(format!("the file system of {shown} has none"), remedy)]);
        }
        Err(error) => {
            return Err(Failure::new(
                ExitClass::Usage,
                format!(
                    "cannot open {shown} to try direct reads: {error}. Name an image or a directory with --path"
                ),
            ));
        }
    };
    Ok(vec![match read_back(&found) {
        Ok(()) => this.yes(format!("on {shown}: {}", alignment(&found.file))),
        Err(error) => {
            this.no(format!("a direct read on {shown} failed: {error}"), "look at the kernel's log")
        }
    }])
}

/// A file open for direct reads, and whether it is our own to write to.
struct DirectFile {
    file: OwnedFd,
    ours: bool,
}

/// Opens the image, or makes a nameless file in the directory.
fn direct_file(path: &Path) -> Result<DirectFile, Errno> {
    let flags = OFlags::DIRECT | OFlags::CLOEXEC;
    if path.is_dir() {
        let mode = Mode::RUSR | Mode::WUSR;
        match openat(CWD, path, flags | OFlags::TMPFILE | OFlags::RDWR, mode) {
            Ok(file) => return Ok(DirectFile { file, ours: true }),
            // Not ours to write to: any file in it tells as much.
            Err(Errno::ACCESS | Errno::ROFS) => {}
            Err(error) => return Err(error),
        }
        let inside = path.read_dir().map_err(|_| Errno::ACCESS)?.flatten();
        let file = inside.map(|entry| entry.path()).find(|path| path.is_file()).ok_or(Errno::ACCESS)?;
        return Ok(DirectFile { file: open(&file, flags | OFlags::RDONLY, Mode::empty())?, ours: false });
    }
    Ok(DirectFile { file: open(path, flags | OFlags::RDONLY, Mode::empty())?, ours: false })
}

/// Reads the first piece; where the file is ours, what was written there.
fn read_back(direct: &DirectFile) -> Result<(), Errno> {
    let mut buffer = vec![0_u8; 2 * PIECE];
    let start = buffer.as_ptr().align_offset(PIECE);
    let piece = &mut buffer[start..start + PIECE];
    if direct.ours {
        piece.fill(0x5a);
        pwrite(&direct.file, piece, 0)?;
        piece.fill(0);
    }
    let got = pread(&direct.file, &mut *piece, 0)?;
    if direct.ours && (got < PIECE || piece.iter().any(|byte| *byte != 0x5a)) {
        return Err(Errno::IO);
    }
    Ok(())
}

/// What the kernel asks of direct reads, in words.
fn alignment(file: &OwnedFd) -> String {
    match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(data) if StatxFlags::from_bits_retain(data.stx_mask).contains(StatxFlags::DIOALIGN) => {
            format!(
                "offsets aligned to {} bytes, memory to {} (STATX_DIOALIGN)",
                data.stx_dio_offset_align, data.stx_dio_mem_align
            )
        }
        _ => "works; this kernel does not say how to align (Linux 6.1 does), 4096 bytes are used".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn a_directory_an_image_and_nothing() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let probed = probes(directory.path()).expect("a directory can be probed");
        if probed.iter().all(|c| c.state == State::No) {
            eprintln!("SKIPPED: direct reads: {} has none", directory.path().display());
            return;
        }
        let image = directory.path().join("image");
        std::fs::write(&image, vec![1; 3 * PIECE]).expect("writing an image");
        assert_eq!(probes(&image).expect("an image can be probed")[0].state, State::Yes);
        let failure = probes(&directory.path().join("absent")).expect_err("nothing can't");
        assert_eq!(failure.class, ExitClass::Usage);
    }
}
