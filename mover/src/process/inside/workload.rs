//! Workloads: what share of memory is what, and what the guest's programs do at which rates. TOML files, eight of
//! them built in.

#![forbid(unsafe_code)]

use std::path::Path;

use serde::{Deserialize, Deserializer};

use crate::error::GuestError;

/// The built-in workloads: name and TOML text.
pub const SHIPPED: [(&str, &str); 8] = [
    ("idle-desktop", include_str!("../../../workloads/idle-desktop.toml")),
    ("remote-desktop", include_str!("../../../workloads/remote-desktop.toml")),
    ("package-upgrade", include_str!("../../../workloads/package-upgrade.toml")),
    ("compile", include_str!("../../../workloads/compile.toml")),
    ("file-copy", include_str!("../../../workloads/file-copy.toml")),
    ("video", include_str!("../../../workloads/video.toml")),
    ("memory-hog", include_str!("../../../workloads/memory-hog.toml")),
    ("overwrite-storm", include_str!("../../../workloads/overwrite-storm.toml")),
];

/// A workload. Activities that are not named do not happen.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// One line about it.
    pub description: String,
    /// What memory holds.
    pub memory: Shares,
    /// Anonymous pages rewritten at random.
    pub dirty: Option<Dirty>,
    /// Files read from the disk into the page cache, at random.
    pub read: Option<Rated>,
    /// New files written through the page cache.
    pub write: Option<Rated>,
    /// Files read, and written elsewhere, at this rate each.
    pub copy: Option<Rated>,
    /// Short-lived anonymous pages: taken from free memory, filled, freed (zeroed) again.
    pub churn: Option<Rated>,
    /// One long file read from end to end.
    pub stream: Option<Rated>,
    /// Cached blocks rewritten on the disk past the page cache, whose pages stay as they were.
    pub overwrite: Option<Rated>,
    /// Cached pages looked at.
    pub touch: Option<Rated>,
}

/// Shares of memory in percent; together 100. The guest's own tables count as anonymous.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    /// Page cache of the disks.
    pub cache: u8,
    /// Anonymous, incompressible.
    pub anonymous: u8,
    /// Free, zero.
    pub free: u8,
}

/// An activity with a rate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rated {
    /// Bytes a second: `"20MiB/s"`.
    #[serde(deserialize_with = "rate")]
    pub rate: u64,
}

/// Whole anonymous pages rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dirty {
    /// Bytes a second.
    #[serde(deserialize_with = "rate")]
    pub rate: u64,
    /// Percent of the anonymous pages it keeps to.
    #[serde(default = "all")]
    pub over_percent: u8,
}

fn all() -> u8 {
    100
}

/// Most bytes a second an activity may ask for: 64 GiB.
const RATE_MAX: u64 = 64 << 30;

fn rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_rate(&text).ok_or_else(|| {
        serde::de::Error::custom(format!(
            "{text:?} is no rate: write a whole number with a unit, as in \"20MiB/s\", \"500KiB/s\" or \"1GiB/s\""
        ))
    })
}

fn parse_rate(text: &str) -> Option<u64> {
    let number = text.strip_suffix("/s")?;
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((number.strip_suffix(name)?, *unit)))?;
    let rate = number.trim().parse::<u64>().ok()?.checked_mul(unit)?;
    (1..=RATE_MAX).contains(&rate).then_some(rate)
}

impl Workload {
    /// The workload called `name_or_path`: a built-in one, or else a TOML file. Also its text.
    ///
    /// # Errors
    /// No such workload or file; a wrong file, with the line and what may stand there.
    pub fn find(name_or_path: &str) -> Result<(Self, String), GuestError> {
        let (origin, text) = match SHIPPED.iter().find(|(name, _)| *name == name_or_path) {
            Some((name, text)) => (format!("built-in {name}"), (*text).to_owned()),
            None => {
                let text = std::fs::read_to_string(Path::new(name_or_path)).map_err(|e| {
                    let names: Vec<_> = SHIPPED.iter().map(|(name, _)| *name).collect();
                    GuestError::State(format!(
                        "there is no workload {name_or_path}: no built-in one has that name, and as a file it can't \
                         be read ({e}). Built in are {}",
                        names.join(", ")
                    ))
                })?;
                (name_or_path.to_owned(), text)
            }
        };
        Ok((Self::parse(&origin, &text)?, text))
    }

    /// From TOML text that came from `origin`.
    ///
    /// # Errors
    /// What is wrong, in which line, and what may stand there.
    pub fn parse(origin: &str, text: &str) -> Result<Self, GuestError> {
        let workload: Self = toml::from_str(text).map_err(|e| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or("");
            let line = before.matches('\n').count() + 1;
            GuestError::State(format!(
                "workload {origin}, line {line}: {}. A workload has name, description, [memory] with cache, \
                 anonymous and free in percent, and any of [dirty], [read], [write], [copy], [churn], [stream], \
                 [overwrite], [touch], each with a rate",
                e.message().replace('\n', " ")
            ))
        })?;
        workload.check().map_err(|what| GuestError::State(format!("workload {origin}: {what}")))?;
        Ok(workload)
    }

    fn check(&self) -> Result<(), String> {
        let Shares { cache, anonymous, free } = self.memory;
        let sum = u32::from(cache) + u32::from(anonymous) + u32::from(free);
        if sum != 100 {
            return Err(format!("cache, anonymous and free are {sum} % together. They must make up 100"));
        }
        let cached = [
            ("read", self.read),
            ("write", self.write),
            ("copy", self.copy),
            ("stream", self.stream),
            ("overwrite", self.overwrite),
            ("touch", self.touch),
        ];
        if cache == 0
            && let Some((name, _)) = cached.iter().find(|(_, rated)| rated.is_some())
        {
            return Err(format!(
                "[{name}] needs page cache, of which there is none. Give [memory] some cache"
            ));
        }
        match self.dirty {
            Some(dirty) if !(1..=100).contains(&dirty.over_percent) => {
                Err(format!("[dirty] over_percent is {}. Give 1 to 100", dirty.over_percent))
            }
            Some(_) if anonymous == 0 => Err("[dirty] needs anonymous memory. Give [memory] some".to_owned()),
            _ if self.churn.is_some() && free == 0 => {
                Err("[churn] needs free memory. Give [memory] some".to_owned())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_ones_are_what_they_are_said_to_be() {
        const MIB: u64 = 1 << 20;
        let find = |name: &str| Workload::find(name).unwrap().0;
        for (name, _) in SHIPPED {
            assert_eq!(find(name).name, name);
        }
        let shares = |name: &str| {
            let Shares { cache, anonymous, free } = find(name).memory;
            (cache, anonymous, free)
        };
        let rated = |rate: u64| Some(Rated { rate: rate * MIB });
        assert_eq!(shares("idle-desktop"), (45, 20, 35));
        assert_eq!(find("idle-desktop").dirty.unwrap().rate, 2 * MIB);
        assert_eq!(shares("remote-desktop"), (50, 30, 20));
        assert_eq!(find("remote-desktop").dirty, Some(Dirty { rate: 20 * MIB, over_percent: 10 }));
        assert_eq!(find("remote-desktop").read, rated(5));
        assert_eq!(shares("package-upgrade"), (60, 15, 25));
        assert_eq!((find("package-upgrade").write, find("package-upgrade").read), (rated(30), rated(30)));
        assert_eq!(shares("compile"), (40, 35, 25));
        assert_eq!(find("compile").churn, rated(60));
        assert_eq!(shares("file-copy"), (75, 10, 15));
        assert_eq!(find("file-copy").copy, rated(50));
        assert_eq!(shares("video"), (70, 15, 15));
        assert_eq!(find("video").stream, rated(8));
        assert_eq!(shares("memory-hog"), (0, 95, 5));
        assert_eq!(find("memory-hog").dirty, Some(Dirty { rate: 20 * MIB, over_percent: 100 }));
        assert_eq!(shares("overwrite-storm"), (60, 20, 20));
        assert_eq!(find("overwrite-storm").overwrite, rated(40));
    }

    #[test]
    fn a_wrong_file_is_refused_with_its_line_and_a_remedy() {
        let good = "name = \"x\"\ndescription = \"y\"\n[memory]\ncache = 50\nanonymous = 30\nfree = 20\n";
        assert!(Workload::parse("t", good).is_ok());
        for (text, parts) in [
            (format!("{good}[dirty]\nrate = \"20MB\"\n"), ["line 8", "20MiB/s"]),
            (format!("{good}[dirty]\nrate = 5\n"), ["line 8", "string"]),
            (format!("{good}[fly]\nrate = \"1MiB/s\"\n"), ["line 7", "[churn]"]),
            (good.replace("50", "51"), ["101 %", "make up 100"]),
            (good.replace("cache = 50", "cache = "), ["line 4", "A workload has"]),
            (
                format!("{good}[dirty]\nrate = \"1MiB/s\"\nover_percent = 0\n"),
                ["over_percent is 0", "1 to 100"],
            ),
            (
                good.replace("50", "0").replace("30", "80") + "[stream]\nrate = \"1MiB/s\"\n",
                ["[stream] needs page cache", "Give"],
            ),
        ] {
            let said = Workload::parse("t", &text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        }
        let said = Workload::find("/nowhere/at-all.toml").unwrap_err().to_string();
        assert!(said.contains("memory-hog"), "{said}");
    }
}
