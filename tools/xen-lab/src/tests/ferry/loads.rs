//! Loads by grants and by way of a buffer, in turns, in one lab: what each has taken the target. Under emulation only the ratios
//! mean anything.

use anyhow::{Context, Result, bail};

use super::{GRANTS, LENT, ends, loading, moved_so};
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{PROGRAM, number_before};
use crate::speed::median;

const STAGED: &str = "PAGEFERRY_LOADS=staged";
/// Migrations there and back by each way.
const TURNS: usize = 4;

/// What one migration has taken.
struct Taken {
    /// Milliseconds with reads under way.
    busy: u64,
    /// Of processor time, of the whole engine at the target.
    cpu: u64,
    /// Of all of it.
    total: u64,
}

/// A guest goes to and fro; each way has every direction as often, and neither the better place.
pub(super) fn in_turns(lab: &Lab) -> Result<()> {
    let guest = Guest { files_mib: 64, ..Guest::reader(Kind::Pvh) };
    for host in 1..=2 {
        lab.host(host).run(&format!("{PROGRAM} index build /dev/vdb"))?;
    }
    guest.create(lab.host(1))?;
    let ways = [GRANTS, STAGED];
    let mut taken: [Vec<Taken>; 2] = [Vec::new(), Vec::new()];
    let mut costs = Vec::new();
    for turn in 0..TURNS {
        for way in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
            for from in [1, 2] {
                let report = moved_so(lab, &guest, from, &loading(ways[way]), true)?;
                let said = report.target.text();
                let number = |words: &str| {
                    number_before(&said, words)
                        .with_context(|| format!("nothing says how many{words}:\n{said}"))
                };
                if said.contains(LENT) != (way == 0) {
                    bail!("{} is not how it was loaded:\n{said}", ways[way]);
                }
                if way == 0 {
                    costs.push((number(" ns a page to lend")?, number(" ns to take back")?));
                }
                let total = u64::try_from(report.elapsed.as_millis())?;
                let (busy, cpu) =
                    (number(" ms with reads under way")?, last_number(&said, "processor time was")?);
                taken[way].push(Taken { busy, cpu, total });
            }
        }
    }
    for (way, taken) in ways.iter().zip(&taken) {
        let all = |value: fn(&Taken) -> u64| {
            let mut values: Vec<f64> = taken.iter().map(|one| number_of(value(one))).collect();
            values.sort_by(f64::total_cmp);
            format!(
                "{:.0} ({:.0} to {:.0})",
                median(values.iter().copied()),
                values[0],
                values[values.len() - 1]
            )
        };
        let (busy, cpu, total) = (all(|one| one.busy), all(|one| one.cpu), all(|one| one.total));
        eprintln!("    {way}: {busy} ms with reads under way, {cpu} ms of processor time, {total} ms in all");
    }
    let cost = |value: fn(&(u64, u64)) -> u64| median(costs.iter().map(|one| number_of(value(one))));
    eprintln!("    by grants: {:.0} ns a page to lend, {:.0} ns to take back", cost(|c| c.0), cost(|c| c.1));
    ends(lab, &guest, 1, Count::default())
}

fn number_of(value: u64) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

/// The number behind `words`.
fn last_number(text: &str, words: &str) -> Result<u64> {
    let rest = text.lines().find_map(|line| Some(line.split_once(words)?.1));
    let found = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    found.with_context(|| format!("nothing says what number is behind `{words}`:\n{text}"))
}
