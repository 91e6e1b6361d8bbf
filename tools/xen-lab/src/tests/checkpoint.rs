//! Guests saved into files that leave pages on the shared disk, and restored from both.

use anyhow::{Context, Result, bail};

use super::ferry::ends;
use super::{Body, Needs, Pair, Test, Tier, left};
use crate::agent::Output;
use crate::guest::{Guest, Kind};
use crate::host::Host;
use crate::lab::Lab;
use crate::moves::{self, Helper, OURS, PROGRAM, number_before};
use crate::wait;

/// Where guests are saved to.
const FILE: &str = "/root/saved-frozen";
/// Where a block of the disk is kept meanwhile.
const BLOCK: &str = "/root/block";
/// Pages of the shared disk's files that the guest has read.
const READ_PAGES: u64 = 32 * 256;

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let of = |kind: Kind| {
        let body: Body = Box::new(move |lab| checkpoint(lab, kind));
        Test::new(pair, &format!("checkpoint/{kind}"), Tier::Full, Needs::Program, body)
    };
    [Kind::Pvh, Kind::Pv].map(of).into()
}

fn attempt(host: &Host, command: &str) -> Result<Output> {
    host.attempt(command, wait::limit(300))
}

/// A guest that has read the shared disk's files is saved with references, and restored while the disk is what it was: by
/// nobody else, and not with a block that is another one.
fn checkpoint(lab: &Lab, kind: Kind) -> Result<()> {
    let (host, guest) = (lab.host(1), Guest::reader(kind));
    host.run(&format!("{PROGRAM} index build /dev/vdb"))?;
    let before = guest.create(host)?;
    let before = guest.counts_on(host, before)?;
    saved(host, &guest)?;
    goes_with_its_disk(host, true)?;
    refused(lab, &guest, &format!("xl -vvv restore {FILE}"), "0x50460003")?;
    // One block is another one, and then what it was again.
    let listed = host.run(&format!("{PROGRAM} stream inspect {FILE}"))?;
    let sector = listed.split_once("from sector ").and_then(|(_, rest)| rest.split(' ').next());
    let sector = sector.with_context(|| format!("nothing says where pages stand:\n{listed}"))?;
    let put = |from: &str| {
        let how = "bs=512 count=8 oflag=direct conv=notrunc,fsync";
        host.run(&format!("dd if={from} of=/dev/vdb seek={sector} {how}")).map(drop)
    };
    host.run(&format!("dd if=/dev/vdb of={BLOCK} skip={sector} bs=512 count=8 iflag=direct"))?;
    put("/dev/urandom")?;
    let spoiled = goes_with_its_disk(host, false).and_then(|()| {
        refused(lab, &guest, &format!("LIBXL_SAVE_HELPER={OURS} xl -vvv restore {FILE}"), "any more")
    });
    put(BLOCK)?;
    spoiled?;
    goes_with_its_disk(host, true)?;
    let count = moves::restore(&guest, host, FILE, before, Helper::Ours)?;
    ends(lab, &guest, 1, count)
}

/// Saves it; most of what it has read stays on the disk, and the file is so much smaller.
fn saved(host: &Host, guest: &Guest) -> Result<()> {
    let command = format!("{PROGRAM} xen save {} {FILE} --disks-frozen -v", guest.name);
    let said = wait::timed("it is saved with references", || attempt(host, &command))?;
    let text = said.text();
    let references = number_before(&text, " pages by reference on frozen disks").unwrap_or(0);
    if said.code != 0 || references < READ_PAGES * 9 / 10 {
        bail!("the save ended with {}, and {references} pages by reference:\n{text}", said.code);
    }
    let size: u64 = host.run(&format!("stat -c %s {FILE}"))?.trim().parse().context("a file's size")?;
    let memory = u64::from(guest.memory_mib) << 20;
    eprintln!(
        "    {references} pages by reference; a file of {} MiB of a guest of {}",
        size >> 20,
        guest.memory_mib
    );
    if size + READ_PAGES * 4096 * 8 / 10 > memory + (4 << 20) {
        bail!("the file has {size} bytes, the guest {memory}:\n{text}");
    }
    Ok(())
}

/// `pageferry stream verify --disks` says whether file and disk go together.
fn goes_with_its_disk(host: &Host, yes: bool) -> Result<()> {
    let said = attempt(host, &format!("{PROGRAM} stream verify --disks {FILE}"))?;
    let expected = if yes { "as they did at the save" } else { "stand there no more" };
    if said.code != if yes { 0 } else { 10 } || !said.text().contains(expected) {
        bail!(
            "`stream verify --disks` ended with {} and should say `{expected}`:\n{}",
            said.code,
            said.text()
        );
    }
    Ok(())
}

/// The restore ends with a sentence that has `words`, and leaves no domain.
fn refused(lab: &Lab, guest: &Guest, command: &str, words: &str) -> Result<()> {
    let host = lab.host(1);
    let said = attempt(host, command)?;
    if said.code == 0 || !said.text().contains(words) {
        bail!("`{command}` ended with {} and should say `{words}`:\n{}", said.code, said.text());
    }
    let why: Vec<_> = said.text().lines().filter(|line| line.contains(words)).map(str::to_owned).collect();
    eprintln!("    refused: {}", why.join(" | "));
    left::nothing_on(host, Helper::Ours)?;
    match guest.domain(host)? {
        None => Ok(()),
        Some(domain) => bail!("domain {domain} is left of it:\n{}", said.text()),
    }
}
