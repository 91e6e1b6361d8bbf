//! Migrations under load: [`row`], one guest a thousand times; [`many`], several at once; [`flood`], one beside a hundred thousand
//! strangers.

#![forbid(unsafe_code)]

pub(crate) mod flood;
pub(crate) mod many;
pub(crate) mod row;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use mover::net::lab::End;
use serde_json::Value;

use crate::faults::case::Ending;
use crate::world::{World, complaint};

/// A target that waits for its source.
struct Waiting {
    target: Ending,
    /// Where it listens.
    address: String,
    token: String,
}

impl Waiting {
    /// Starts one at `to`.
    fn start(world: &World, to: End) -> Result<Self> {
        let listen = format!("{}:0", to.address());
        let mut receive = world.command(to)?;
        receive.args(["receive", "--listen", &listen, "--json", "--quiet"]).stdout(Stdio::piped());
        let mut target = Ending(receive.spawn()?);
        let said = target.0.stdout.take().context("a pipe")?;
        let line = BufReader::new(said).lines().next().context("the target said nothing")??;
        let listening: Value = serde_json::from_str(&line)?;
        let word = |key: &str| listening[key].as_str().map(str::to_owned).context("an address and a token");
        Ok(Self { target, address: word("address")?, token: word("token")? })
    }

    /// Moves `guest` there from `from`; the summary.
    fn moved(mut self, world: &World, guest: &str, from: End, mode: &str) -> Result<Value> {
        let (to, token) = (self.address.as_str(), self.token.as_str());
        let send =
            ["send", "--guest", guest, "--to", to, "--token", token, "--mode", mode, "--json", "--quiet"];
        let sent = world.run(from, &send)?;
        ensure!(sent.status.success(), "it failed: {}", complaint(&sent));
        ensure!(self.target.0.wait()?.success(), "the target failed");
        Ok(serde_json::from_slice(&sent.stdout)?)
    }
}

/// The end across the cable.
fn across(end: End) -> End {
    match end {
        End::Source => End::Target,
        End::Target => End::Source,
    }
}

/// Numbers that look random and are the same for the same seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of 0 to `sides - 1`.
    fn throw(&mut self, sides: u64) -> u64 {
        self.next() % sides
    }
}
