//! Tests of the lab itself: stock Xen's own save, restore and migration. Where one of these fails, no other says anything
//! about our code.

use anyhow::Result;

use super::{Needs, Pair, Test, Tier};
use crate::guest::{Guest, Kind};
use crate::lab::Lab;
use crate::moves::{self, Helper, Migration};

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let mut tests = Vec::new();
    for kind in Kind::ALL {
        let what = format!("stock/save-restore-{kind}");
        tests.push(Test::new(pair, &what, Tier::All, Needs::Nothing, move |lab| save_restore(lab, kind)));
        if pair.migrates_live(kind) {
            let what = format!("stock/migrate-{kind}");
            tests.push(Test::new(pair, &what, Tier::All, Needs::Nothing, move |lab| migrate(lab, kind)));
        }
    }
    let verified = |lab: &Lab| super::dropin::verified(lab, Helper::Stock);
    tests.push(Test::new(pair, "stock/migrate-pvh-verified", Tier::All, Needs::Nothing, verified));
    tests
}

fn save_restore(lab: &Lab, kind: Kind) -> Result<()> {
    let host = lab.host(1);
    let guest = Guest::small(kind);
    let before = guest.create(host)?;
    moves::save(&guest, host, "/root/saved", Helper::Stock)?;
    let after = moves::restore(&guest, host, "/root/saved", before, Helper::Stock)?;
    guest.verifies_all(host, after)?;
    guest.destroy(host)
}

fn migrate(lab: &Lab, kind: Kind) -> Result<()> {
    let guest = Guest::small(kind);
    let before = guest.create(lab.host(1))?;
    let after = lab.migrate(&guest, 1, before, &Migration::new(Helper::Stock, Helper::Stock))?;
    guest.verifies_all(lab.host(2), after)?;
    guest.destroy(lab.host(2))
}
