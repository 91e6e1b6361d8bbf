//! What an operator does once link and hosts are back: asks both hosts for their records, and has each settled by
//! `pageferry resolve`, by what the documentation says and nothing else.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use mover::net::lab::End;
use mover::process::control::Phase;
use serde_json::Value;

use crate::world::{ENDS, World, complaint, name_of};

/// Where a guest waits for pages that nobody loads any more, has them loaded; whether that was so. Waits for who loads them otherwise.
pub(crate) fn take_over(world: &World) -> Result<bool> {
    for end in ENDS {
        let waits = |world: &World| {
            world.status(end).is_some_and(|s| s.phase == Phase::Running && s.holding && s.migration.is_none())
        };
        if waits(world) {
            let output =
                world.run(end, &["resume", "desk", "--quiet", "--patience", "5s", "--redial-for", "15s"])?;
            ensure!(output.status.success(), "`resume` at the {}: {}", name_of(end), complaint(&output));
            return Ok(true);
        }
    }
    Ok(false)
}

/// Settles every record on either host; the commands that took.
pub(crate) fn settle(world: &World) -> Result<Vec<String>> {
    let mut done = Vec::new();
    // Names what killed processes left in their runtime directories, and clears it.
    for end in ENDS {
        world.must(end, &["status", "--quiet"])?;
    }
    for end in ENDS {
        let other = if end == End::Source { End::Target } else { End::Source };
        for record in world.records(end)?.into_iter().filter(|record| record["role"] == "source") {
            let id = word(&record, "migration")?;
            let there = world.records(other)?.into_iter().find(|other| other["migration"] == id.as_str());
            let runs_there = match &there {
                Some(there) => there["entry"] == "started" && there["guest_phase"] == "running",
                // No record there: it was settled, so that what counts is where the guest is.
                None => world.runs(other),
            };
            let verdict = if record["entry"] == "committed" && runs_there { "--there" } else { "--here" };
            done.push(resolve(world, end, &id, verdict)?);
        }
    }
    for end in ENDS {
        for record in world.records(end)? {
            let id = word(&record, "migration")?;
            let runs = record["entry"] == "started" && record["guest_phase"] == "running";
            done.push(resolve(world, end, &id, if runs { "--here" } else { "--there" })?);
        }
    }
    Ok(done)
}

fn word(record: &Value, key: &str) -> Result<String> {
    Ok(record[key].as_str().with_context(|| format!("a record has {key}"))?.to_owned())
}

fn resolve(world: &World, end: End, id: &str, verdict: &str) -> Result<String> {
    let output = world.run(end, &["resolve", id, verdict, "--quiet"])?;
    ensure!(
        output.status.success(),
        "`resolve {verdict}` at the {} was refused: {}",
        name_of(end),
        complaint(&output)
    );
    Ok(format!("{} {verdict}", name_of(end)))
}
