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
//!   loads             PAGEFERRY_LOADS              "auto": the faster by measurement, which is "staged"; "grants": reads of
//!                                                  disks go straight into the guest's pages; "staged": by way of a buffer
//!   throttle          PAGEFERRY_THROTTLE           "off"; "auto": slow the guest down while it writes faster than that
//! ```
//!
//! `PAGEFERRY_CONFIG` names another file. A setting that can't be read is an error, not a default: who has set a limit
//! relies on it.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mover::error::NetError;
use mover::limits::LANES_MAX;
use mover::net::tls::Authority;
use mover::policy::Wish;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::ferry::Credentials;
use crate::save::Policy;
use crate::stream::limits::{OFFER_ADDRESS_BYTES_MAX, OFFER_ADDRESSES_MAX};

/// Where the file is.
pub const FILE: &str = "/etc/pageferry.toml";
/// Most rounds that can be asked for.
const ROUNDS_MAX: u32 = 1000;
/// Longest downtime that can be asked for.
const DOWNTIME_MAX: Duration = Duration::from_secs(3600);

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

/// How pages that are loaded from disks come into the guest's memory, before it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loads {
    /// The faster way, by measurement: [`Self::FASTER`].
    #[default]
    Auto,
    /// Straight: the guest's pages are lent to the disk's reads by grants, where that can be done.
    Grants,
    /// By way of a buffer, from which they are copied past the cache.
    Staged,
}

impl Loads {
    /// What was measured to be faster (docs/BENCHMARKS.md, "Direct loads on Xen").
    const FASTER: Self = Self::Staged;

    /// Whether by grants.
    #[must_use]
    pub fn are_direct(self) -> bool {
        match self {
            Self::Auto => Self::FASTER == Self::Grants,
            Self::Grants => true,
            Self::Staged => false,
        }
    }
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
    /// How pages are loaded from disks.
    pub loads: Loads,
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
            loads: Loads::default(),
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
    loads: Option<Loads>,
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
    if found > DOWNTIME_MAX {
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

fn loads(text: &str) -> Result<Loads, String> {
    match text {
        "auto" => Ok(Loads::Auto),
        "grants" => Ok(Loads::Grants),
        "staged" => Ok(Loads::Staged),
        _ => Err(format!("there are no loads `{text}`; there are auto, grants and staged")),
    }
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
            addresses(
                text.split(',').filter(|part| !part.is_empty()).map(|part| part.trim().to_owned()).collect(),
            )
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
        take(&variable, "PAGEFERRY_LOADS", &mut settings.loads, loads)?;
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
        self.loads = file.loads.unwrap_or(self.loads);
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
             lanes_peer_name = \"here\"\nlanes_ca = \"/a\"\nlanes_cert = \"/b\"\nlanes_key = \"/c\"\nloads = \"staged\"\n\
             throttle = \"auto\"\n";
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
            loads: Loads::Staged,
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
            ("PAGEFERRY_LOADS", "grants"),
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
            loads: Loads::Grants,
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
            "loads",
        ];
        assert!(all.iter().all(|key| keys.contains(key)), "{keys:?}");
    }

    #[test]
    fn wrong_settings_are_named() {
        for (file, words) in [
            ("polcy = \"stock\"", "polcy"),
            ("policy = \"fast\"", "fast"),
            ("max_downtime = \"100\"", "needs a unit"),
            ("max_downtime = \"2h\"", "needs a unit"),
            ("max_downtime = \"99999s\"", "out of range"),
            ("max_rounds = 0", "out of range"),
            ("max_rounds = -1", "max_rounds"),
            ("mode = \"lasy\"", "lasy"),
            ("lanes = 17", "out of range"),
            ("loads = \"direct\"", "direct"),
            ("lanes_address = [\"a b\"]", "is no address"),
        ] {
            let error = load(file, &[]).unwrap_err();
            assert!(error.contains(words) && error.contains("pageferry.toml"), "{file}: {error}");
        }
        for (name, value) in [
            ("PAGEFERRY_POLICY", "Stock"),
            ("PAGEFERRY_MAX_DOWNTIME", "soon"),
            ("PAGEFERRY_MAX_ROUNDS", "many"),
            ("PAGEFERRY_ON_NO_CONVERGENCE", ""),
            ("PAGEFERRY_MODE", "Refer"),
            ("PAGEFERRY_LANES", "0"),
            ("PAGEFERRY_LOADS", "buffer"),
            ("PAGEFERRY_LANES_PLAINTEXT", "1"),
            ("PAGEFERRY_LANES_ADDRESS", "a\tb"),
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
