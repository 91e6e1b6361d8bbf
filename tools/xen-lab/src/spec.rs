//! What a lab is made of: two hosts, each a Debian release and a hypervisor.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Error, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A Debian release, whose Xen, kernel and toolstack a host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
pub enum Suite {
    /// Debian 12, Xen 4.17.
    Bookworm,
    /// Debian 13, Xen 4.20.
    Trixie,
}

impl Suite {
    /// Every release the lab knows.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Trixie];

    /// The release's name in the archive.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The version of Xen in it, as Debian's package names have it.
    #[must_use]
    pub fn xen(self) -> &'static str {
        match self {
            Self::Bookworm => "4.17",
            Self::Trixie => "4.20",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which hypervisor a host boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
pub enum Hypervisor {
    /// As Debian ships it: no shadow paging (so no live migration of PV guests), no memory paging.
    Stock,
    /// Built from Debian's source package with both.
    Full,
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Full => "full",
        })
    }
}

/// One host, written `SUITE` or `SUITE:HYPERVISOR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostSpec {
    /// Its release.
    pub suite: Suite,
    /// Its hypervisor.
    pub hypervisor: Hypervisor,
}

impl HostSpec {
    /// Debian 12 as it is.
    pub const BOOKWORM: Self = Self { suite: Suite::Bookworm, hypervisor: Hypervisor::Stock };
    /// Debian 12 with the hypervisor that has everything.
    pub const BOOKWORM_FULL: Self = Self { suite: Suite::Bookworm, hypervisor: Hypervisor::Full };
    /// Debian 13 as it is.
    pub const TRIXIE: Self = Self { suite: Suite::Trixie, hypervisor: Hypervisor::Stock };
}

impl fmt::Display for HostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.suite, self.hypervisor)
    }
}

impl FromStr for HostSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (suite, hypervisor) = text.split_once(':').unwrap_or((text, "stock"));
        let suite = match suite {
            "bookworm" => Suite::Bookworm,
            "trixie" => Suite::Trixie,
            other => bail!("there is no release `{other}` in the lab; it has bookworm and trixie"),
        };
        let hypervisor = match hypervisor {
            "stock" => Hypervisor::Stock,
            "full" => Hypervisor::Full,
            other => bail!("there is no hypervisor `{other}`; it is stock or full"),
        };
        Ok(Self { suite, hypervisor })
    }
}

/// A lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Host 1 and host 2.
    pub hosts: [HostSpec; 2],
    /// Memory of each host, in MiB.
    pub memory_mib: u32,
    /// Where the project's binaries are taken from.
    pub binaries: PathBuf,
}

/// Memory of a host unless told otherwise: room for dom0 and a guest of 1 GiB, or a few small ones.
pub const HOST_MEMORY_MIB: u32 = 2560;
/// What dom0 has of it.
pub const DOM0_MEMORY_MIB: u32 = 800;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_they_are_written() {
        for host in [HostSpec::BOOKWORM, HostSpec::BOOKWORM_FULL, HostSpec::TRIXIE] {
            assert_eq!(host.to_string().parse::<HostSpec>().unwrap(), host);
        }
        assert_eq!("trixie".parse::<HostSpec>().unwrap(), HostSpec::TRIXIE);
        assert!("sid".parse::<HostSpec>().is_err());
        assert!("trixie:best".parse::<HostSpec>().is_err());
    }
}
