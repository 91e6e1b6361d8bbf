//! The guest's state outside memory as bytes: versioned, little-endian, every length checked.
//!
//! ```text
//!   "PFGUEST" version:u8 | pages | seed | counts | hand, generation | work | workload text | disks | vCPUs | sums
//! ```
//! Sums are the zones' accumulators, 8 bytes for each 256 pages: 16 KiB for 2 GiB.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::content::Rng;
use super::program::{Inside, Vcpu};
use super::workload::Workload;
use crate::process::config::VCPUS_MAX;
use crate::process::control::Work;
use crate::units::{Pfn, u64_of, usize_of};

const MAGIC: &[u8; 7] = b"PFGUEST";
const VERSION: u8 = 1;
/// Bytes of a workload's text, entries of a list.
const TEXT_MAX: u64 = 64 * 1024;
const LIST_MAX: u64 = 1 << 21;

struct Writer(Vec<u8>);

impl Writer {
    fn word(&mut self, n: u64) {
        self.0.extend_from_slice(&n.to_le_bytes());
    }
    fn list(&mut self, words: impl ExactSizeIterator<Item = u64>) {
        self.word(u64_of(words.len()));
        words.for_each(|n| self.word(n));
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) =
            self.0.split_at_checked(n).ok_or_else(|| "the guest's state ends too early".to_owned())?;
        self.0 = rest;
        Ok(head)
    }
    fn word(&mut self) -> Result<u64, String> {
        let mut word = [0; 8];
        word.copy_from_slice(self.bytes(8)?);
        Ok(u64::from_le_bytes(word))
    }
    fn count(&mut self, limit: u64) -> Result<usize, String> {
        let n = self.word()?;
        if n > limit {
            return Err(format!("the guest's state has a list of {n} where {limit} is the limit"));
        }
        Ok(usize_of(n))
    }
    fn list(&mut self) -> Result<Vec<u64>, String> {
        let n = self.count(LIST_MAX)?;
        (0..n).map(|_| self.word()).collect()
    }
}

impl Inside {
    /// The state of the paused guest.
    pub(crate) fn save(&self) -> Result<Vec<u8>, String> {
        let plan = self.plan.get().ok_or("the guest has neither booted nor been loaded")?;
        let mut out = Writer(MAGIC.to_vec());
        out.0.push(VERSION);
        out.word(self.frames.layout.pages);
        out.word(plan.seed);
        let counts = &self.frames.counts;
        for counter in [&counts.free, &counts.cache, &counts.dirty, &self.cache.hand, &self.generation] {
            out.word(counter.load(Ordering::Relaxed));
        }
        let work = self.accounts.work();
        let work = [
            work.operations,
            work.dirtied_bytes,
            work.read_bytes,
            work.written_bytes,
            work.cache_hits,
            work.evicted,
            work.skipped_bytes,
            work.disk_errors,
        ];
        out.list(work.into_iter());
        out.word(u64_of(plan.text.len()));
        out.0.extend_from_slice(plan.text.as_bytes());
        out.list(self.frames.layout.blocks.iter().copied());
        out.word(u64_of(self.vcpus().len()));
        for number in 0..self.vcpus().len() {
            let vcpu = self.vcpu(number);
            out.word(vcpu.rng.0);
            out.list(vcpu.credits.iter().map(|credit| credit.cast_unsigned()));
            out.word(vcpu.stream);
            out.word(vcpu.scratch);
            out.word(u64::from(vcpu.filling));
            out.list(vcpu.churn.iter().map(|pfn| pfn.0));
        }
        out.list(self.frames.accumulators().into_iter());
        Ok(out.0)
    }

    /// Takes the state over; nothing is changed if it does not fit this guest.
    pub(crate) fn load(&self, state: &[u8]) -> Result<(), String> {
        let mut input = Reader(state);
        if input.bytes(MAGIC.len())? != MAGIC {
            return Err(
                "this is no state of a pageferry guest. Is the other end moving another kind of guest?"
                    .to_owned(),
            );
        }
        let version = input.bytes(1)?[0];
        if version != VERSION {
            return Err(format!(
                "the guest's state is of version {version}, understood here is {VERSION}. Update the older end"
            ));
        }
        let pages = input.word()?;
        same("pages of memory", pages, self.frames.layout.pages)?;
        let seed = input.word()?;
        let counts: Vec<u64> = (0..5).map(|_| input.word()).collect::<Result<_, _>>()?;
        let work = work_of(&input.list()?)?;
        let length = input.count(TEXT_MAX)?;
        let text = String::from_utf8(input.bytes(length)?.to_vec())
            .map_err(|_| "the workload in the guest's state is no text".to_owned())?;
        let workload = Workload::parse("in the guest's state", &text).map_err(|e| e.to_string())?;
        let blocks = input.list()?;
        same("disks", u64_of(blocks.len()), u64_of(self.frames.layout.blocks.len()))?;
        for (theirs, ours) in blocks.iter().zip(&self.frames.layout.blocks) {
            same("blocks of a disk", *theirs, *ours)?;
        }
        let count = u64_of(input.count(u64::from(VCPUS_MAX))?);
        let vcpus: Vec<Vcpu> = (0..count).map(|n| vcpu(&mut input, n, pages)).collect::<Result<_, _>>()?;
        let sums = input.list()?;
        same("zones", u64_of(sums.len()), self.frames.layout.zones())?;
        if !input.0.is_empty() {
            return Err("the guest's state is longer than it should be".to_owned());
        }
        let plan = self.make_plan(workload, text, seed, count).map_err(|e| e.to_string())?;
        self.plan.set(plan).map_err(|_| "this guest has its state already".to_owned())?;
        let here = &self.frames.counts;
        let counters = [&here.free, &here.cache, &here.dirty, &self.cache.hand, &self.generation];
        for (counter, n) in counters.into_iter().zip(counts) {
            counter.store(n, Ordering::Relaxed);
        }
        self.accounts.set_work(&work);
        self.set_vcpus(vcpus.into_iter());
        self.frames.set_accumulators(&sums);
        Ok(())
    }
}

fn vcpu(input: &mut Reader<'_>, number: u64, pages: u64) -> Result<Vcpu, String> {
    let rng = Rng(input.word()?);
    let credits: Vec<i64> = input.list()?.into_iter().map(u64::cast_signed).collect();
    let credits = credits.try_into().map_err(|_| "the guest's state has other activities".to_owned())?;
    let (stream, scratch, filling) = (input.word()?, input.word()?, input.word()? != 0);
    let churn = input.list()?;
    if churn.iter().any(|pfn| *pfn >= pages) {
        return Err("the guest's state names a page the guest does not have".to_owned());
    }
    let churn = churn.into_iter().map(Pfn).collect();
    Ok(Vcpu { number, rng, credits, stream, scratch, churn, filling })
}

fn work_of(list: &[u64]) -> Result<Work, String> {
    let [
        operations,
        dirtied_bytes,
        read_bytes,
        written_bytes,
        cache_hits,
        evicted,
        skipped_bytes,
        disk_errors,
    ] = *list
    else {
        return Err("the guest's state has other counters".to_owned());
    };
    Ok(Work {
        operations,
        dirtied_bytes,
        read_bytes,
        written_bytes,
        cache_hits,
        evicted,
        skipped_bytes,
        disk_errors,
    })
}

fn same(what: &str, theirs: u64, ours: u64) -> Result<(), String> {
    if theirs == ours {
        return Ok(());
    }
    Err(format!(
        "the guest has {theirs} {what}, the one prepared here has {ours}. Start the incoming guest with the same \
         memory and disks"
    ))
}
