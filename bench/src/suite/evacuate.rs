//! A host's guests evacuated, a guest of every workload: two at a time in the order they are listed, and in the order that
//! [`mover::evacuation`] makes of what `pageferry plan` says of them. Both in mode `lazy`, there and back in turns.

#![forbid(unsafe_code)]

use anyhow::{Context as _, Result};
use mover::units::f64_of;

use super::modes::WORKLOADS;
use super::{Context, Suite};
use crate::demo::Link;
use crate::fleet::{Evacuated, Fleet, Order, Setup};
use crate::program;
use crate::report::{Limit, Row};

/// The link, for the lab and for `plan`.
const LINK: Link = Link::One;
const MIB: f64 = 1_048_576.0;

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
            bits_per_second: LINK.bits_per_second(),
            scratch: &context.scratch,
            nas: false,
        })?;
        let (mut listed, mut planned) = (Vec::new(), Vec::new());
        for round in 0..context.runs {
            let loads = fleet.loads(LINK.name())?;
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
        let case = format!("{guests} guests of {memory}, {}", LINK.name());
        let rate = LINK.bytes_per_second().context("a shaped link has a rate")?;
        type Take<'a> = &'a dyn Fn(&Evacuated) -> f64;
        let figures: [(&str, &'static str, Take<'_>); 5] = [
            ("until all are away", "s", &|all| all.makespan),
            ("mean time until one is away", "s", &|all| all.mean),
            ("over the link", "MiB", &|all| f64_of(all.link_bytes) / MIB),
            ("from disk", "MiB", &|all| f64_of(all.disk_bytes) / MIB),
            ("part of the time that the link was busy", "", &|all| {
                f64_of(all.link_bytes) / rate / all.makespan
            }),
        ];
        let mut rows = Vec::new();
        for (what, unit, take) in figures {
            let of = |all: &[Evacuated], how: &str| {
                Row::of(&case, &format!("{what}, {how}"), unit, all.iter().map(take))
            };
            rows.push(of(&listed, "two at a time as listed"));
            rows.push(of(&planned, "in the order made"));
        }
        let ratio = |take: fn(&Evacuated) -> f64| {
            listed.iter().zip(&planned).map(move |(two, made)| take(two) / take(made))
        };
        let all = Row::of(&case, "all away, as listed / in the order made", "", ratio(|all| all.makespan));
        rows.push(all.limited(Limit::AtLeast(1.28)));
        rows.push(Row::of(&case, "mean, as listed / in the order made", "", ratio(|all| all.mean)));
        Ok(rows)
    }
}
