//! One thread's share of the checked memory: pages whose content follows from number and version, rewritten at a
//! given rate and verified all the time.

use xen_lab_checker::{PAGE_WORDS, Words};

/// A page, aligned as one, so that a page of ours is a page of the guest.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u64; PAGE_WORDS]);

/// The share.
pub(crate) struct Share {
    pages: Vec<Page>,
    /// Version per page; 0 is a page that stays zero.
    versions: Vec<u64>,
    /// Number of the share's first page among all checked pages.
    first: u64,
    /// Where verifying goes on.
    at: usize,
    /// Source of the choice of pages to rewrite.
    choice: Words,
}

impl Share {
    /// `count` pages from number `first` on, every one written; `zero_percent` of them stay zero.
    pub(crate) fn new(first: u64, count: usize, zero_percent: u64) -> Self {
        let mut share = Self {
            pages: vec![Page([0; PAGE_WORDS]); count],
            versions: vec![0; count],
            first,
            at: 0,
            choice: Words::of_page(first, u64::MAX),
        };
        for at in 0..count {
            let number = share.number(at);
            if number % 100 >= zero_percent {
                share.rewrite(at);
            }
        }
        share
    }

    fn number(&self, at: usize) -> u64 {
        self.first + u64::try_from(at).unwrap_or(u64::MAX)
    }

    fn rewrite(&mut self, at: usize) {
        let number = self.number(at);
        let (Some(page), Some(version)) = (self.pages.get_mut(at), self.versions.get_mut(at)) else { return };
        *version += 1;
        let mut words = Words::of_page(number, *version);
        page.0.fill_with(|| words.next_word());
        std::hint::black_box(page);
    }

    /// Gives `count` pages their next version (those that stay zero are left out).
    pub(crate) fn dirty(&mut self, count: u64) -> u64 {
        let mut done = 0;
        for _ in 0..count {
            let pages = u64::try_from(self.pages.len()).unwrap_or(u64::MAX).max(1);
            let at = usize::try_from(self.choice.next_word() % pages).unwrap_or(0);
            if self.versions.get(at).is_some_and(|version| *version != 0) {
                self.rewrite(at);
                done += 1;
            }
        }
        done
    }

    /// Verifies the next `count` pages. Returns how often that came past the last one.
    pub(crate) fn verify(&mut self, count: usize) -> Result<u64, String> {
        let mut passes = 0;
        for _ in 0..count.min(self.pages.len()) {
            self.verify_page(self.at)?;
            self.at += 1;
            if self.at == self.pages.len() {
                self.at = 0;
                passes += 1;
            }
        }
        Ok(passes)
    }

    fn verify_page(&self, at: usize) -> Result<(), String> {
        let (Some(page), Some(version)) = (self.pages.get(at), self.versions.get(at).copied()) else {
            return Ok(());
        };
        let page = &std::hint::black_box(page).0;
        let number = self.number(at);
        let found = if version == 0 {
            page.iter().position(|word| *word != 0)
        } else {
            let mut words = Words::of_page(number, version);
            page.iter().position(|word| *word != words.next_word())
        };
        let Some(word) = found else { return Ok(()) };
        Err(format!("memory: page {number} version {version}: {}", self.explain(page, number, version, word)))
    }

    /// What stands in a wrong page, as far as it can be told.
    fn explain(&self, page: &[u64; PAGE_WORDS], number: u64, version: u64, word: usize) -> String {
        if page.iter().all(|word| *word == 0) {
            return "it is zero".into();
        }
        for older in 1..version {
            let mut words = Words::of_page(number, older);
            if page.iter().all(|word| *word == words.next_word()) {
                return format!("it is version {older}");
            }
        }
        for (other, version) in self.versions.iter().enumerate() {
            let mut words = Words::of_page(self.number(other), *version);
            if page.iter().all(|word| *word == words.next_word()) {
                return format!("it is page {} version {version}", self.number(other));
            }
        }
        let mut words = Words::of_page(number, version);
        let wrong = page.iter().filter(|word| **word != words.next_word()).count();
        let value = page.get(word).copied().unwrap_or_default();
        format!("{wrong} of {PAGE_WORDS} words differ, the first is word {word}: {value:#018x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_wrong_page_is_found_and_named() {
        let fresh = || {
            let mut share = Share::new(1000, 40, 25);
            share.dirty(500);
            share
        };
        assert_eq!(fresh().verify(40), Ok(1));
        let wrong = |spoil: fn(&mut Share)| {
            let mut share = fresh();
            spoil(&mut share);
            share.verify(40).unwrap_err()
        };
        assert!(wrong(|share| share.pages[30] = Page([0; PAGE_WORDS])).ends_with("it is zero"));
        assert!(wrong(|share| share.pages[30] = share.pages[31].clone()).contains("it is page 1031"));
        assert!(wrong(|share| share.pages[30].0[511] ^= 1).contains("1 of 512 words differ"));
        assert!(wrong(|share| share.pages[0].0[5] = 1).contains("page 1000 version 0"));
        let stale = wrong(|share| {
            let old = share.pages[30].clone();
            share.rewrite(30);
            share.pages[30] = old;
        });
        assert!(stale.contains("it is version"), "{stale}");
    }
}
