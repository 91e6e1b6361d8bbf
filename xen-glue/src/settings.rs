//! What an operator can set for saves under a toolstack, which has no words for it: `/etc/pageferry.toml`, and
//! variables that go before it.
//!
//! ```text
//!   policy            PAGEFERRY_POLICY             "pageferry", or "stock": five rounds, or under 50 pages
//!   max_downtime      PAGEFERRY_MAX_DOWNTIME       "100ms"
//!   max_rounds        PAGEFERRY_MAX_ROUNDS         5
//!   on_no_convergence PAGEFERRY_ON_NO_CONVERGENCE  "finish": stop the guest and copy the rest, however long that takes;
//!                                                  "abort": give up
//!   mode              PAGEFERRY_MODE               "stock": pages go in the stream, as Xen's own do; "plain": beside it, on
//!                                                  lanes; "refer": the same, and what stands on disks is loaded from there;
//!                                                  "lazy": the same, in part after the restart, where the hypervisor can
//!   lanes             PAGEFERRY_LANES              2: connections for pages
//!   lanes_plaintext   PAGEFERRY_LANES_PLAINTEXT    false: under TLS; true: in the clear, where both ends say so
//!   lanes_address     PAGEFERRY_LANES_ADDRESS      [] (the variable: with commas): where to listen for them, HOST or HOST:PORT;
//!                                                  none is every address of this host
//!   lanes_ca          PAGEFERRY_LANES_CA           none: files in PEM format, all three or none. Lanes are for hosts alone that
//!   lanes_cert        PAGEFERRY_LANES_CERT         this authority has certified, with this host's certificate and private key
//!   lanes_key         PAGEFERRY_LANES_KEY
//!   lanes_peer_name   PAGEFERRY_LANES_PEER_NAME    none: the host dialled; what the source's certificate has to be for
//!   reference_images  PAGEFERRY_REFERENCE_IMAGES   [] (the variable: with commas): raw images that nobody writes and both hosts
//!                                                  have at these paths; pages of any guest may be referred to on them
//!   redial_for        PAGEFERRY_REDIAL_FOR         "300s": with "lazy", how long the two hosts look for each other again when they
//!                                                  have lost each other while pages are outstanding
//!   frozen_disks      PAGEFERRY_FROZEN_DISKS       []; disks ("xvda", "/images/base", "all") that do not change any more: a guest
//!                                                  saved into a file leaves its pages there that stand on them
//!   disk_paths        PAGEFERRY_DISK_PATHS         [] ("xvda=/dev/vg/snapshot"): where such disks are when it is restored
//!   throttle          PAGEFERRY_THROTTLE           "off"; "auto": slow the guest down while it writes faster than that
//! ```
//!
//! `PAGEFERRY_CONFIG` names another file. A setting that can't be read is an error, not a default: who has set a limit
//! relies on it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mover::disk::image::DiskSpec;
use mover::error::NetError;
use mover::limits::{DISKS_MAX, LANES_MAX};
use mover::net::tls::Authority;
use mover::policy::Wish;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::ferry::Credentials;
use crate::save::Policy;
use crate::stream::limits::{DISK_TEXT_BYTES_MAX, OFFER_ADDRESS_BYTES_MAX, OFFER_ADDRESSES_MAX};

/// Where the file is.
pub const FILE: &str = "/etc/pageferry.toml";
/// What declares every disk of a guest frozen.
pub const ALL_DISKS: &str = "all";
/// Most disks that a host's settings may name.
const FROZEN_DISKS_MAX: usize = 64;
/// Most rounds that can be asked for.
const ROUNDS_MAX: u32 = 1000;
/// Longest time that can be asked for, of any kind.
const TIME_MAX: Duration = Duration::from_secs(3600);

/// When a guest that is saved while it runs is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyName {
    /// As libxenguest does.
    Stock,
    /// When the predicted downtime is short enough.
    #[default]
    Pageferry,
}

/// What to do with a guest that writes faster than the link carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNoConvergence {
    /// Stop it and copy the rest.
    #[default]
    Finish,
    /// Leave it where it is.
    Abort,
}

/// How page contents travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeName {
    /// In the stream. No lanes are offered, and none are taken up.
    #[default]
    Stock,
    /// On lanes, where the other end takes them up.
    Plain,
    /// The same, and by reference what stands on disks that both hosts can read.
    Refer,
    /// The same, and the guest restarts before all of that is loaded, where the hypervisor can hold pages back.
    Lazy,
}

/// Whether a guest may be slowed down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Throttle {
    /// It keeps its speed.
    #[default]
    Off,
    /// While it writes faster than the link carries.
    Auto,
}

/// The settings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// When to stop the guest.
    pub policy: PolicyName,
    /// Downtime aimed for.
    pub max_downtime: Duration,
    /// Most rounds while the guest runs.
    pub max_rounds: u32,
    /// What to do where that can't be had.
    pub on_no_convergence: OnNoConvergence,
    /// How page contents travel.
    pub mode: ModeName,
    /// Connections for them.
    pub lanes: u8,
    /// Whether they are in the clear.
    pub lanes_plaintext: bool,
    /// Where to listen for those, `HOST` or `HOST:PORT`; none is everywhere.
    pub lanes_address: Vec<String>,
    /// The certificates of the operator's authority for those, in PEM format.
    pub lanes_ca: Option<PathBuf>,
    /// This host's certificate.
    pub lanes_cert: Option<PathBuf>,
    /// Its private key.
    pub lanes_key: Option<PathBuf>,
    /// What a source's certificate has to be for, if not for the host dialled.
    pub lanes_peer_name: Option<String>,
    /// Images besides a guest's disks that its pages may be referred to on.
    pub reference_images: Vec<PathBuf>,
    /// How long to look for the other host again that was lost while pages are outstanding.
    pub redial_for: Duration,
    /// Disks that do not change any more, by the guest's names or paths, or [`ALL_DISKS`].
    pub frozen_disks: Vec<String>,
    /// Where disks are that a restore loads pages from, by the guest's names; the others are where they were.
    pub disk_paths: BTreeMap<String, PathBuf>,
    /// Whether to slow the guest down before it comes to that.
    pub throttle: Throttle,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: PolicyName::default(),
            max_downtime: Duration::from_millis(100),
            // As many as stock, so that a guest that does not converge is not slower to move.
            max_rounds: 5,
            on_no_convergence: OnNoConvergence::default(),
            mode: ModeName::default(),
            lanes: 2,
            lanes_plaintext: false,
            lanes_address: Vec::new(),
            lanes_ca: None,
            lanes_cert: None,
            lanes_key: None,
            lanes_peer_name: None,
            reference_images: Vec::new(),
            redial_for: Duration::from_secs(300),
            frozen_disks: Vec::new(),
            disk_paths: BTreeMap::new(),
            throttle: Throttle::default(),
        }
    }
}

/// Why the settings could not be read.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}. Make it readable, or remove it for the defaults")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The file does not say what it may.
    #[error("{path} is wrong: {what}")]
    File {
        /// The file.
        path: String,
        /// Where and why.
        what: String,
    },
    /// What is said of certificates does not go together.
    #[error("the settings for lanes' certificates are wrong: {what}")]
    Lanes {
        /// Why.
        what: &'static str,
    },
    /// Certificates can't be used.
    #[error(transparent)]
    Certificates(#[from] NetError),
    /// A variable does not.
    #[error("{name} is wrong: {what}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Why.
        what: String,
    },
}

/// The file as it stands; what it does not say is left as it is.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    policy: Option<PolicyName>,
    #[serde(default, deserialize_with = "duration_field")]
    max_downtime: Option<Duration>,
    max_rounds: Option<u32>,
    on_no_convergence: Option<OnNoConvergence>,
    mode: Option<ModeName>,
    lanes: Option<u32>,
    lanes_plaintext: Option<bool>,
    lanes_address: Option<Vec<String>>,
    lanes_ca: Option<PathBuf>,
    lanes_cert: Option<PathBuf>,
    lanes_key: Option<PathBuf>,
    lanes_peer_name: Option<String>,
    reference_images: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "duration_field")]
    redial_for: Option<Duration>,
    frozen_disks: Option<Vec<String>>,
    disk_paths: Option<Vec<String>>,
    throttle: Option<Throttle>,
}

fn duration_field<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    duration(&text).map(Some).map_err(serde::de::Error::custom)
}

/// "50ms", "2s".
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let number: f64 =
        number.parse().map_err(|_| format!("`{text}` is no time; write it as \"100ms\" or \"2s\""))?;
    let seconds = match unit.trim() {
        "ms" => number / 1e3,
        "s" => number,
        _ => return Err(format!("`{text}` needs a unit, ms or s")),
    };
    let found = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if found > TIME_MAX {
        return Err(format!("`{text}` is out of range; at most an hour will do"));
    }
    Ok(found)
}

fn rounds(number: u32) -> Result<u32, String> {
    if (1..=ROUNDS_MAX).contains(&number) {
        return Ok(number);
    }
    Err(format!("{number} rounds are out of range; 1 to {ROUNDS_MAX} will do"))
}

fn policy(text: &str) -> Result<PolicyName, String> {
    match text {
        "stock" => Ok(PolicyName::Stock),
        "pageferry" => Ok(PolicyName::Pageferry),
        _ => Err(format!("there is no policy `{text}`; there are stock and pageferry")),
    }
}

fn on_no_convergence(text: &str) -> Result<OnNoConvergence, String> {
    match text {
        "finish" => Ok(OnNoConvergence::Finish),
        "abort" => Ok(OnNoConvergence::Abort),
        _ => Err(format!("`{text}` is neither finish nor abort")),
    }
}

fn mode(text: &str) -> Result<ModeName, String> {
    match text {
        "stock" => Ok(ModeName::Stock),
        "plain" => Ok(ModeName::Plain),
        "refer" => Ok(ModeName::Refer),
        "lazy" => Ok(ModeName::Lazy),
        _ => Err(format!("there is no mode `{text}`; there are stock, plain, refer and lazy")),
    }
}

fn lanes(number: u32) -> Result<u8, String> {
    match u8::try_from(number) {
        Ok(lanes) if (1..=LANES_MAX).contains(&usize::from(lanes)) => Ok(lanes),
        _ => Err(format!("{number} lanes are out of range; 1 to {LANES_MAX} will do")),
    }
}

/// Addresses to listen on, as far as that can be seen without looking them up.
fn addresses(found: Vec<String>) -> Result<Vec<String>, String> {
    let wrong = |address: &&String| {
        address.is_empty()
            || address.len() > OFFER_ADDRESS_BYTES_MAX - 8
            || !address.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match found.iter().find(wrong) {
        Some(address) => Err(format!("`{address}` is no address; HOST or HOST:PORT is")),
        None if found.len() > OFFER_ADDRESSES_MAX => Err(format!("{OFFER_ADDRESSES_MAX} addresses will do")),
        None => Ok(found),
    }
}

/// Paths of images, as far as that can be seen without opening them.
fn images(found: Vec<PathBuf>) -> Result<Vec<PathBuf>, String> {
    match found.iter().find(|path| !path.is_absolute() || path.to_str().is_none()) {
        Some(path) => Err(format!("`{}` is no whole path", path.display())),
        None if found.len() > DISKS_MAX => Err(format!("{DISKS_MAX} images will do")),
        None => Ok(found),
    }
}

/// Parts of a variable's value, between commas.
fn parts(text: &str) -> Vec<String> {
    text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// Disks by the guest's names for them, or by paths.
fn disks(found: Vec<String>) -> Result<Vec<String>, String> {
    let wrong = |disk: &&String| {
        disk.is_empty() || disk.len() > DISK_TEXT_BYTES_MAX || disk.contains('/') && !disk.starts_with('/')
    };
    match found.iter().find(wrong) {
        Some(disk) => Err(format!("`{disk}` is no disk; \"xvda\", \"/dev/vg/base\" and \"{ALL_DISKS}\" are")),
        None if found.len() > FROZEN_DISKS_MAX => Err(format!("{FROZEN_DISKS_MAX} disks will do")),
        None => Ok(found),
    }
}

/// Where disks are, `NAME=PATH` each.
///
/// # Errors
/// A sentence about one that is not written so.
pub fn disk_paths(found: &[String]) -> Result<BTreeMap<String, PathBuf>, String> {
    if found.len() > FROZEN_DISKS_MAX {
        return Err(format!("{FROZEN_DISKS_MAX} disks will do"));
    }
    let pair = |text: &String| match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && path.starts_with('/') => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err(format!("`{text}` does not say where a disk is; \"xvda=/dev/vg/snapshot\" does")),
    };
    found.iter().map(pair).collect()
}

fn throttle(text: &str) -> Result<Throttle, String> {
    match text {
        "off" => Ok(Throttle::Off),
        "auto" => Ok(Throttle::Auto),
        _ => Err(format!("`{text}` is neither off nor auto")),
    }
}

impl Settings {
    /// When a save of a running domain stops it.
    #[must_use]
    pub fn save_policy(&self) -> Policy {
        match self.policy {
            PolicyName::Stock => Policy::Stock,
            PolicyName::Pageferry => Policy::Predict(Wish {
                max_downtime: self.max_downtime,
                max_rounds: self.max_rounds,
                throttle: self.throttle == Throttle::Auto,
                finish: self.on_no_convergence == OnNoConvergence::Finish,
            }),
        }
    }

    /// Whether `disk` is among those that do not change any more.
    #[must_use]
    pub fn is_frozen(&self, disk: &DiskSpec) -> bool {
        let path = disk.path.to_string_lossy();
        self.frozen_disks.iter().any(|frozen| *frozen == ALL_DISKS || *frozen == disk.name || *frozen == path)
    }

    /// From this process's environment and its file.
    ///
    /// # Errors
    /// The file, if there is one, can't be read, or one of both says what can't be.
    pub fn load() -> Result<Self, SettingsError> {
        Self::read(std::env::var_os)
    }

    /// From these variables and the file they name, or that of this host.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn read(variable: impl Fn(&'static str) -> Option<OsString>) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        let chosen = variable("PAGEFERRY_CONFIG").map(PathBuf::from);
        let path = chosen.as_deref().unwrap_or(Path::new(FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => settings.take_file(path, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && chosen.is_none() => {}
            Err(source) => return Err(SettingsError::Read { path: path.display().to_string(), source }),
        }
        take(&variable, "PAGEFERRY_POLICY", &mut settings.policy, policy)?;
        take(&variable, "PAGEFERRY_MAX_DOWNTIME", &mut settings.max_downtime, duration)?;
        take(&variable, "PAGEFERRY_MAX_ROUNDS", &mut settings.max_rounds, |text| {
            rounds(text.parse().map_err(|_| format!("`{text}` is no number of rounds"))?)
        })?;
        take(&variable, "PAGEFERRY_ON_NO_CONVERGENCE", &mut settings.on_no_convergence, on_no_convergence)?;
        take(&variable, "PAGEFERRY_MODE", &mut settings.mode, mode)?;
        take(&variable, "PAGEFERRY_LANES", &mut settings.lanes, |text| {
            lanes(text.parse().map_err(|_| format!("`{text}` is no number of lanes"))?)
        })?;
        take(&variable, "PAGEFERRY_LANES_PLAINTEXT", &mut settings.lanes_plaintext, |text| match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(format!("`{text}` is neither true nor false")),
        })?;
        take(&variable, "PAGEFERRY_LANES_ADDRESS", &mut settings.lanes_address, |text| {
            addresses(parts(text))
        })?;
        for (name, into) in [
            ("PAGEFERRY_LANES_CA", &mut settings.lanes_ca),
            ("PAGEFERRY_LANES_CERT", &mut settings.lanes_cert),
            ("PAGEFERRY_LANES_KEY", &mut settings.lanes_key),
        ] {
            take(&variable, name, into, |text| Ok((!text.is_empty()).then(|| PathBuf::from(text))))?;
        }
        take(&variable, "PAGEFERRY_LANES_PEER_NAME", &mut settings.lanes_peer_name, |text| {
            Ok((!text.is_empty()).then(|| text.to_owned()))
        })?;
        take(&variable, "PAGEFERRY_REFERENCE_IMAGES", &mut settings.reference_images, |text| {
            images(parts(text).into_iter().map(PathBuf::from).collect())
        })?;
        take(&variable, "PAGEFERRY_REDIAL_FOR", &mut settings.redial_for, duration)?;
        take(&variable, "PAGEFERRY_FROZEN_DISKS", &mut settings.frozen_disks, |text| disks(parts(text)))?;
        take(&variable, "PAGEFERRY_DISK_PATHS", &mut settings.disk_paths, |text| disk_paths(&parts(text)))?;
        take(&variable, "PAGEFERRY_THROTTLE", &mut settings.throttle, throttle)?;
        settings.agree()?;
        Ok(settings)
    }

    /// Whether what is said of certificates goes together.
    fn agree(&self) -> Result<(), SettingsError> {
        let given = [&self.lanes_ca, &self.lanes_cert, &self.lanes_key].map(Option::is_some);
        let what = match given {
            [true, true, true] if self.lanes_plaintext => "say either lanes_plaintext or lanes_ca",
            [true, true, true] => return Ok(()),
            [false, false, false] if self.lanes_peer_name.is_none() => return Ok(()),
            [false, false, false] => "it goes with lanes_ca, lanes_cert and lanes_key",
            _ => "lanes_ca, lanes_cert and lanes_key go together",
        };
        Err(SettingsError::Lanes { what })
    }

    /// The certificates for lanes, if there are any; read now, while whose they are can be.
    ///
    /// # Errors
    /// A file can't be read, or does not hold what it should.
    pub fn credentials(&self) -> Result<Option<Credentials>, SettingsError> {
        let (Some(ca), Some(cert), Some(key)) = (&self.lanes_ca, &self.lanes_cert, &self.lanes_key) else {
            return Ok(None);
        };
        let authority = Authority::load(ca, cert, key)?;
        Ok(Some(Credentials { authority, peer_name: self.lanes_peer_name.clone() }))
    }

    fn take_file(&mut self, path: &Path, text: &str) -> Result<(), SettingsError> {
        let wrong = |what: &dyn fmt::Display| SettingsError::File {
            path: path.display().to_string(),
            what: what.to_string().trim_end().to_owned(),
        };
        let file: File = toml::from_str(text).map_err(|error| wrong(&error))?;
        self.policy = file.policy.unwrap_or(self.policy);
        self.max_downtime = file.max_downtime.unwrap_or(self.max_downtime);
        if let Some(number) = file.max_rounds {
            self.max_rounds = rounds(number).map_err(|error| wrong(&error))?;
        }
        self.on_no_convergence = file.on_no_convergence.unwrap_or(self.on_no_convergence);
        self.mode = file.mode.unwrap_or(self.mode);
        if let Some(number) = file.lanes {
            self.lanes = lanes(number).map_err(|error| wrong(&error))?;
        }
        self.lanes_plaintext = file.lanes_plaintext.unwrap_or(self.lanes_plaintext);
        if let Some(found) = file.lanes_address {
            self.lanes_address = addresses(found).map_err(|error| wrong(&error))?;
        }
        self.lanes_ca = file.lanes_ca;
        self.lanes_cert = file.lanes_cert;
        self.lanes_key = file.lanes_key;
        self.lanes_peer_name = file.lanes_peer_name;
        if let Some(found) = file.reference_images {
            self.reference_images = images(found).map_err(|error| wrong(&error))?;
        }
        self.redial_for = file.redial_for.unwrap_or(self.redial_for);
        if let Some(found) = file.frozen_disks {
            self.frozen_disks = disks(found).map_err(|error| wrong(&error))?;
        }
        if let Some(found) = file.disk_paths {
            self.disk_paths = disk_paths(&found).map_err(|error| wrong(&error))?;
        }
        self.throttle = file.throttle.unwrap_or(self.throttle);
        Ok(())
    }
}

/// Takes a variable's value, if it is set.
fn take<T>(
    variable: impl Fn(&'static str) -> Option<OsString>,
    name: &'static str,
    into: &mut T,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<(), SettingsError> {
    if let Some(value) = variable(name) {
        let text = value.to_string_lossy();
        *into = parse(&text).map_err(|what| SettingsError::Variable { name, what })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mover::disk::image::Role;

    fn load(file: &str, variables: &[(&str, &str)]) -> Result<Settings, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pageferry.toml");
        std::fs::write(&path, file).unwrap();
        let found =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        let variable = |name: &'static str| match name {
            "PAGEFERRY_CONFIG" => Some(path.clone().into_os_string()),
            _ => found(name),
        };
        Settings::read(variable).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_goes_before_defaults_and_variables_before_the_file() {
        assert_eq!(load("", &[]), Ok(Settings::default()));
        let file = "policy = \"stock\"\nmax_downtime = \"1.5s\"\nmax_rounds = 9\non_no_convergence = \"abort\"\n\
             mode = \"refer\"\nlanes = 4\nlanes_plaintext = false\nlanes_address = [\"10.0.0.1\", \"[fd00::1]:7000\"]\n\
             lanes_peer_name = \"here\"\nlanes_ca = \"/a\"\nlanes_cert = \"/b\"\nlanes_key = \"/c\"\nredial_for = \"60s\"\n\
             reference_images = [\"/images/golden.raw\"]\nfrozen_disks = [\"xvdb\", \"/images/base\"]\n\
             disk_paths = [\"xvda=/dev/vg/a=b\"]\nthrottle = \"auto\"\n";
        let read = Settings {
            policy: PolicyName::Stock,
            max_downtime: Duration::from_millis(1500),
            max_rounds: 9,
            on_no_convergence: OnNoConvergence::Abort,
            mode: ModeName::Refer,
            lanes: 4,
            lanes_plaintext: false,
            lanes_address: vec!["10.0.0.1".into(), "[fd00::1]:7000".into()],
            lanes_ca: Some("/a".into()),
            lanes_cert: Some("/b".into()),
            lanes_key: Some("/c".into()),
            lanes_peer_name: Some("here".into()),
            reference_images: vec!["/images/golden.raw".into()],
            redial_for: Duration::from_secs(60),
            frozen_disks: vec!["xvdb".into(), "/images/base".into()],
            disk_paths: [("xvda".to_owned(), PathBuf::from("/dev/vg/a=b"))].into(),
            throttle: Throttle::Auto,
        };
        assert_eq!(load(file, &[]), Ok(read));
        let variables = [
            ("PAGEFERRY_POLICY", "pageferry"),
            ("PAGEFERRY_MAX_DOWNTIME", "20ms"),
            ("PAGEFERRY_MAX_ROUNDS", "30"),
            ("PAGEFERRY_ON_NO_CONVERGENCE", "finish"),
            ("PAGEFERRY_MODE", "plain"),
            ("PAGEFERRY_LANES", "16"),
            ("PAGEFERRY_LANES_PLAINTEXT", "true"),
            ("PAGEFERRY_LANES_ADDRESS", "host:1, 10.0.0.2"),
            ("PAGEFERRY_LANES_CA", ""),
            ("PAGEFERRY_LANES_CERT", ""),
            ("PAGEFERRY_LANES_KEY", ""),
            ("PAGEFERRY_LANES_PEER_NAME", ""),
            ("PAGEFERRY_REFERENCE_IMAGES", "/a b,/c"),
            ("PAGEFERRY_REDIAL_FOR", "0s"),
            ("PAGEFERRY_FROZEN_DISKS", "all"),
            ("PAGEFERRY_DISK_PATHS", ""),
            ("PAGEFERRY_THROTTLE", "off"),
        ];
        let set = Settings {
            policy: PolicyName::Pageferry,
            max_downtime: Duration::from_millis(20),
            max_rounds: 30,
            on_no_convergence: OnNoConvergence::Finish,
            mode: ModeName::Plain,
            lanes: 16,
            lanes_plaintext: true,
            lanes_address: vec!["host:1".into(), "10.0.0.2".into()],
            reference_images: vec!["/a b".into(), "/c".into()],
            redial_for: Duration::ZERO,
            frozen_disks: vec!["all".into()],
            throttle: Throttle::Off,
            ..Settings::default()
        };
        assert_eq!(load(file, &variables), Ok(set));
    }

    /// The file of the Debian package: as it is it changes nothing, and each of its lines is a default.
    #[test]
    fn the_file_shipped_shows_the_defaults() {
        let shipped = include_str!("../../tools/package/pageferry.toml");
        assert_eq!(load(shipped, &[]), Ok(Settings::default()));
        let set: Vec<_> = shipped
            .lines()
            .filter_map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')))
            .collect();
        assert_eq!(load(&set.join("\n"), &[]), Ok(Settings::default()));
        let keys: Vec<_> = set.iter().filter_map(|line| Some(line.split_once(" = ")?.0)).collect();
        let all = [
            "policy",
            "max_downtime",
            "max_rounds",
            "on_no_convergence",
            "throttle",
            "mode",
            "lanes",
            "reference_images",
            "redial_for",
            "frozen_disks",
        ];
        assert!(all.iter().all(|key| keys.contains(key)), "{keys:?}");
    }

    #[test]
    fn disks_are_frozen_by_name_by_path_or_all_of_them() {
        let disk = DiskSpec { name: "xvda".into(), path: "/images/a".into(), role: Role::Own };
        for (declared, frozen) in
            [("", false), ("xvda", true), ("xvdb,/images/a", true), ("xvdb,/images/aa", false), ("all", true)]
        {
            let settings = load("", &[("PAGEFERRY_FROZEN_DISKS", declared)]).unwrap();
            assert_eq!(settings.is_frozen(&disk), frozen, "{declared}");
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        for (file, words) in [
            ("polcy = \"stock\"", "polcy"),
            ("policy = \"fast\"", "fast"),
            ("max_downtime = \"100\"", "needs a unit"),
            ("max_downtime = \"2h\"", "needs a unit"),
            ("max_downtime = \"99999s\"", "out of range"),
            ("redial_for = \"5m\"", "needs a unit"),
            ("max_rounds = 0", "out of range"),
            ("max_rounds = -1", "max_rounds"),
            ("mode = \"lasy\"", "lasy"),
            ("lanes = 17", "out of range"),
            ("lanes_address = [\"a b\"]", "is no address"),
            ("reference_images = [\"golden.raw\"]", "is no whole path"),
            ("frozen_disks = [\"images/base\"]", "is no disk"),
            ("disk_paths = [\"xvda\"]", "where a disk is"),
        ] {
            let error = load(file, &[]).unwrap_err();
            assert!(error.contains(words) && error.contains("pageferry.toml"), "{file}: {error}");
        }
        for (name, value) in [
            ("PAGEFERRY_POLICY", "Stock"),
            ("PAGEFERRY_MAX_DOWNTIME", "soon"),
            ("PAGEFERRY_MAX_ROUNDS", "many"),
            ("PAGEFERRY_REDIAL_FOR", "later"),
            ("PAGEFERRY_ON_NO_CONVERGENCE", ""),
            ("PAGEFERRY_MODE", "Refer"),
            ("PAGEFERRY_LANES", "0"),
            ("PAGEFERRY_LANES_PLAINTEXT", "1"),
            ("PAGEFERRY_LANES_ADDRESS", "a\tb"),
            ("PAGEFERRY_REFERENCE_IMAGES", "/images/a,b"),
            ("PAGEFERRY_FROZEN_DISKS", "a/b"),
            ("PAGEFERRY_DISK_PATHS", "xvda=b"),
        ] {
            let error = load("", &[(name, value)]).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
        let all = "lanes_ca = \"/a\"\nlanes_cert = \"/b\"\nlanes_key = \"/c\"\n";
        for (file, words) in [
            ("lanes_ca = \"/a\"\n".to_owned(), "go together"),
            ("lanes_key = \"/a\"\n".to_owned(), "go together"),
            ("lanes_peer_name = \"a\"\n".to_owned(), "goes with"),
            (format!("{all}lanes_plaintext = true\n"), "either"),
        ] {
            let error = load(&file, &[]).unwrap_err();
            assert!(error.contains(words), "{file}: {error}");
        }
        let unreadable = Settings { lanes_ca: Some("/nowhere/ca".into()), ..Settings::default() };
        assert!(unreadable.credentials().unwrap().is_none(), "not without the others");
        let path = || Some("/nowhere/ca".into());
        let unreadable = Settings { lanes_ca: path(), lanes_cert: path(), lanes_key: path(), ..unreadable };
        let error = unreadable.credentials().unwrap_err().to_string();
        assert!(error.contains("/nowhere/ca"), "{error}");
        let missing = |name: &'static str| (name == "PAGEFERRY_CONFIG").then(|| "/nowhere/x.toml".into());
        let error = Settings::read(missing).unwrap_err().to_string();
        assert!(error.contains("/nowhere/x.toml"), "{error}");
    }
}
