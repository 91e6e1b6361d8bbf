//! A host's guests evacuated, a guest of every workload: two at a time in the order they are listed, and in the order that
//! [`mover::evacuation`] makes of what `pageferry plan` says of them. Both in mode `lazy`, there and back in turns.

#![forbid(unsafe_code)]

use anyhow::Result;

use super::modes::WORKLOADS;
use super::{Context, Suite};
use crate::fleet::{Evacuated, Fleet, Order, Setup};
use crate::program;
use crate::report::{Limit, Row};

/// The link, for the lab and for `plan`.
const LINK: (u64, &str) = (1_000_000_000, "1gbit");

/// The suite.
pub(crate) struct Evacuate;

impl Suite for Evacuate {
    fn name(&self) -> &'static str {
        "evacuate"
    }

    fn about(&self) -> &'static str {
        "eight guests off their host: in the order made for them against two at a time as listed (root)"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let (guests, memory, disk) = if context.quick { (4, "128M", "256M") } else { (8, "512M", "1G") };
        let program = program::build()?;
        let mut fleet = Fleet::start(&Setup {
            program: &program,
            workloads: &WORKLOADS[..guests],
            memory,
            disk,
            bits_per_second: LINK.0,
            scratch: &context.scratch,
            nas: false,
        })?;
        let (mut listed, mut planned) = (Vec::new(), Vec::new());
        for round in 0..context.runs {
            let loads = fleet.loads(LINK.1)?;
            let mut both = [Order::Given(2), Order::Planned];
            if round % 2 == 1 {
                both.reverse();
            }
            for order in both {
                let evacuated = fleet.evacuate(order, &loads)?;
                if order == Order::Planned { planned.push(evacuated) } else { listed.push(evacuated) }
            }
        }
        fleet.check()?;
        let case = format!("{guests} guests of {memory}, {}", LINK.1);
        type Take = fn(&Evacuated) -> f64;
        let figures: [(&str, Take); 2] =
            [("until all are away", |all| all.makespan), ("mean time until one is away", |all| all.mean)];
        let mut rows = Vec::new();
        for (what, take) in figures {
            let of = |all: &[Evacuated], how: &str| {
                Row::of(&case, &format!("{what}, {how}"), "s", all.iter().map(take))
            };
            rows.push(of(&listed, "two at a time as listed"));
            rows.push(of(&planned, "in the order made"));
        }
        let ratio = |take: Take| listed.iter().zip(&planned).map(move |(two, made)| take(two) / take(made));
        let all = Row::of(&case, "all away, as listed / in the order made", "", ratio(|all| all.makespan));
        rows.push(all.limited(Limit::AtLeast(1.28)));
        rows.push(Row::of(&case, "mean, as listed / in the order made", "", ratio(|all| all.mean)));
        Ok(rows)
    }
}
