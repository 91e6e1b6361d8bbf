//! Blocks of the shared disk's pattern files, overwritten in the image behind everybody's back, and put right again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use xen_lab_checker::{FILE_BYTES, PAGE_BYTES, Words, fill_blocks};

use crate::lab::Lab;

/// Bytes looked at in one read.
const LOOK_BYTES: usize = 1 << 20;

/// Where a block of a pattern file stands in the image.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    file: u64,
    block: u64,
}

/// Blocks that have been overwritten. Dropped, they hold again what guests expect there.
pub(crate) struct Overwritten {
    image: File,
    places: Vec<Place>,
}

impl Overwritten {
    /// Every block of the first `files` pattern files. Guests that read those past their page cache find it out.
    pub(crate) fn files(lab: &Lab, files: u64) -> Result<Self> {
        let path = lab.directory().join("lun.img");
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let image = opened.with_context(|| format!("cannot open {}", path.display()))?;
        let places = find(&image, files)?;
        let blocks = files * FILE_BYTES / u64::try_from(PAGE_BYTES)?;
        if u64::try_from(places.len())? != blocks {
            bail!("{} of {blocks} blocks of {files} files stand in {}", places.len(), path.display());
        }
        let overwritten = Self { image, places };
        for Place { at, .. } in &overwritten.places {
            // Another content in each, and none of a pattern file's.
            let content = at.to_le_bytes().repeat(PAGE_BYTES / 8);
            overwritten.image.write_all_at(&content, *at)?;
        }
        overwritten.image.sync_data()?;
        Ok(overwritten)
    }

    fn put_right(&self) -> std::io::Result<()> {
        let mut content = vec![0; PAGE_BYTES];
        for Place { at, file, block } in &self.places {
            fill_blocks(*file, *block, &mut content);
            self.image.write_all_at(&content, *at)?;
        }
        self.image.sync_data()
    }
}

impl Drop for Overwritten {
    fn drop(&mut self) {
        if let Err(error) = self.put_right() {
            eprintln!("the shared disk can't be put right, start the lab again: {error}");
        }
    }
}

/// Finds the blocks of the first `files` files, each by its first word.
fn find(image: &File, files: u64) -> Result<Vec<Place>> {
    let blocks = FILE_BYTES / u64::try_from(PAGE_BYTES)?;
    let mut wanted: HashMap<u64, (u64, u64)> = (0..files)
        .flat_map(|file| (0..blocks).map(move |block| (file, block)))
        .map(|(file, block)| (Words::of_block(file, block).next_word(), (file, block)))
        .collect();
    let (mut places, mut chunk, mut at) = (Vec::new(), vec![0; LOOK_BYTES], 0);
    let length = image.metadata()?.len();
    while at < length {
        let bytes = usize::try_from(length - at)?.min(LOOK_BYTES);
        image.read_exact_at(&mut chunk[..bytes], at)?;
        for (block_at, content) in (at..).step_by(PAGE_BYTES).zip(chunk[..bytes].chunks_exact(PAGE_BYTES)) {
            let first = u64::from_le_bytes(content[..8].try_into()?);
            if let Some((file, block)) = wanted.remove(&first) {
                places.push(Place { at: block_at, file, block });
            }
        }
        at += u64::try_from(bytes)?;
    }
    Ok(places)
}
