//! A lab: started, found again, stopped; its wire; its logs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::agent::Agent;
use crate::cache::{self, Cache};
use crate::host::Host;
use crate::place::{Place, Record};
use crate::qemu::{Boot, Machine};
use crate::spec::{HOST_MEMORY_MIB, HostSpec, Hypervisor, Spec};
use crate::{hypervisor, machine, payload, root, wait};

/// Seconds a host may take from power-on to a toolstack.
const BOOT_SECONDS: u32 = 240;

/// How long tests of somebody else on the same lab are waited for.
const TESTS_LIMIT: Duration = Duration::from_secs(3600);

/// Two running hosts.
pub struct Lab {
    place: Place,
    record: Record,
    hosts: [Host; 2],
}

/// Builds, or finds built, what hosts like those of `spec` boot from. Returns for each its hypervisor and its root.
pub fn build(cache: &Cache, spec: &Spec) -> Result<[(PathBuf, PathBuf); 2]> {
    machine::ensure(&machine::TO_RUN, &cache.log("packages"))?;
    payload::lun_object(cache)?;
    let boots = spec.hosts.map(|host| {
        let root = root::object(cache, host.suite)?;
        let xen = match host.hypervisor {
            Hypervisor::Stock => root.clone(),
            Hypervisor::Full => hypervisor::object(cache, host.suite)?,
        };
        Ok::<_, anyhow::Error>((xen.join("xen"), root))
    });
    let [first, second] = boots;
    Ok([first?, second?])
}

impl Lab {
    /// Starts the lab `name`: builds what is missing, boots both hosts, and returns when both toolstacks answer. A lab of
    /// that name that runs already is an error.
    pub fn up(cache: &Cache, name: &str, spec: Spec) -> Result<Self> {
        let place = Place::of(cache, name)?;
        let _lock = place.lock()?;
        let machines = [Machine::of(&place, 1), Machine::of(&place, 2)];
        if machines.iter().any(|machine| machine.pid().is_some()) {
            bail!("the lab `{name}` is up already; `xen-lab down --name {name}` ends it");
        }
        let boots = build(cache, &spec)?;
        let log = place.file("up.log");
        let _ = fs::remove_file(&log);
        let token = token()?;
        let checker = payload::checker()?;
        let names = payload::binaries_disk(&place.file("binaries.img"), &spec.binaries, &log)?;
        let lun = payload::lun_object(cache)?.join("lun.img");
        payload::shared_disk(&lun, &place.file("lun.img"), &log)?;
        let begun = Instant::now();
        for (machine, (hypervisor, root)) in machines.iter().zip(boots) {
            let directory = place.host(machine.number());
            write_private(&directory.join("initrd"), &payload::boot_ram_disk(&root, &token)?)?;
            payload::guests_disk(&directory.join("guests.img"), &root, &checker, &log)?;
            machine.start(&place, &Boot { hypervisor, root, memory_mib: spec.memory_mib })?;
        }
        let ports = machines.each_ref().map(|machine| machine.monitor()?.forwarded_port());
        let [first, second] = ports;
        let record = Record { spec, token, ports: [first?, second?] };
        place.keep(&record)?;
        let lab = Self::with(place, record);
        if let Err(error) = lab.wait_ready() {
            let logs = lab.save_logs("up")?;
            return Err(error.context(format!("the lab did not come up; its logs: {}", logs.display())));
        }
        let binaries = if names.is_empty() {
            format!("none of ours (none in {})", lab.record.spec.binaries.display())
        } else {
            names.join(", ")
        };
        eprintln!(
            "the lab `{name}` is up after {:.0} s: host 1 {}, host 2 {}; binaries: {binaries}",
            begun.elapsed().as_secs_f64(),
            lab.record.spec.hosts[0],
            lab.record.spec.hosts[1],
        );
        Ok(lab)
    }

    /// Brings up the lab `name` with the full hypervisor on both hosts, does `work` on it, and ends it; where that fails,
    /// the logs are kept and their place is said.
    pub(crate) fn for_one<T>(
        cache: &Cache,
        name: &str,
        binaries: &Path,
        occasion: &str,
        work: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let hosts = [HostSpec::BOOKWORM_FULL; 2];
        let spec = Spec { hosts, memory_mib: HOST_MEMORY_MIB, binaries: binaries.to_path_buf() };
        let lab = Self::up(cache, name, spec)?;
        let done = work(&lab);
        if done.is_err() {
            eprintln!("logs: {}", lab.save_logs(occasion)?.display());
        }
        Self::down(cache, name)?;
        done
    }

    /// The running lab `name`.
    pub fn attach(cache: &Cache, name: &str) -> Result<Self> {
        Self::find(cache, name)?.with_context(|| {
            format!("there is no lab `{name}` running; `xen-lab up --name {name}` starts it")
        })
    }

    /// The running lab `name`, if it runs.
    pub fn find(cache: &Cache, name: &str) -> Result<Option<Self>> {
        let place = Place::of(cache, name)?;
        let Some(record) = place.record()? else { return Ok(None) };
        let lab = Self::with(place, record);
        Ok((1..=2).all(|host| lab.machine(host).pid().is_some()).then_some(lab))
    }

    /// Ends the lab `name`, whatever state it is in. Its logs stay.
    pub fn down(cache: &Cache, name: &str) -> Result<()> {
        let _lock = Place::of(cache, name)?.lock()?;
        Self::abandon(cache, name)
    }

    /// As [`down`](Self::down), when who holds the lab's lock is told to end it.
    pub(crate) fn abandon(cache: &Cache, name: &str) -> Result<()> {
        let place = Place::of(cache, name)?;
        for host in 1..=2 {
            Machine::of(&place, host).stop()?;
        }
        for image in ["lun.img", "binaries.img", "host1/guests.img", "host2/guests.img"] {
            let _ = fs::remove_file(place.file(image));
        }
        place.forget()
    }

    /// Keeps others from running tests on the lab `name` meanwhile; waits for those that run.
    pub(crate) fn lock_for_tests(cache: &Cache, name: &str) -> Result<fs::File> {
        cache::lock(&Place::of(cache, name)?.file("tests"), TESTS_LIMIT)
    }

    /// As [`down`](Self::down), and nothing stays.
    pub(crate) fn forget(cache: &Cache, name: &str) -> Result<()> {
        let place = Place::of(cache, name)?;
        let _lock = place.lock()?;
        Self::abandon(cache, name)?;
        fs::remove_dir_all(place.directory()).context("the lab's directory can't be removed")
    }

    fn with(place: Place, record: Record) -> Self {
        let hosts = [1, 2].map(|number| {
            let agent = Agent { port: record.ports[number - 1], token: record.token.clone() };
            Host::new(number, agent)
        });
        Self { place, record, hosts }
    }

    fn machine(&self, host: usize) -> Machine {
        Machine::of(&self.place, host)
    }

    /// What it was started from.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.record.spec
    }

    /// Host 1 or 2.
    ///
    /// # Panics
    /// Where there is no such host.
    #[must_use]
    pub fn host(&self, number: usize) -> &Host {
        assert!((1..=2).contains(&number), "a lab has hosts 1 and 2, not {number}");
        &self.hosts[number - 1]
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.place.directory()
    }

    fn wait_ready(&self) -> Result<()> {
        for number in 1..=2 {
            let limit = wait::limit(BOOT_SECONDS);
            let what = format!("host {number}'s toolstack");
            wait::until(&what, limit, Duration::from_millis(250), || {
                self.machine(number).must_run()?;
                let console = fs::read(self.machine(number).console_log()).unwrap_or_default();
                let console = String::from_utf8_lossy(&console).into_owned();
                if let Some(failed) = console.lines().find(|line| line.contains("LAB: failed")) {
                    bail!("host {number} says {failed}");
                }
                if !console.contains("LAB: ready") {
                    let last = console.lines().rev().find(|line| !line.trim().is_empty());
                    return Ok(Err(format!(
                        "its console's last line is `{}`",
                        last.unwrap_or_default().trim()
                    )));
                }
                let answer = self.host(number).run_within("test -e /run/lab/ready", wait::limit(20));
                Ok(answer.map(drop).map_err(|error| error.to_string()))
            })?;
        }
        Ok(())
    }

    /// Cuts the wire between the hosts, or mends it.
    pub fn set_wire(&self, up: bool) -> Result<()> {
        (1..=2).try_for_each(|host| self.machine(host).set_wire(up))
    }

    /// Lets host `number` read so many bytes a second from the shared disk; 0 is any number.
    pub fn set_disk_rate(&self, number: usize, bytes_per_second: u64) -> Result<()> {
        self.machine(number).set_disk_rate(bytes_per_second)
    }

    /// Copies everything that tells what happened into a directory of its own, and says where: the hosts' consoles, the
    /// guests' consoles, the toolstack's logs, Xen's log. What can't be had any more is left out with a line.
    pub fn save_logs(&self, occasion: &str) -> Result<PathBuf> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let clean: String =
            occasion.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
        let directory = self.place.logs().join(format!("{clean}-{seconds}"));
        fs::create_dir_all(&directory)?;
        for number in 1..=2 {
            for file in ["console.log", "qemu.log"] {
                let _ = fs::copy(
                    self.place.host(number).join(file),
                    directory.join(format!("host{number}-{file}")),
                );
            }
            let gathered = self.host(number).attempt(
                "xl dmesg > /var/log/xen/xl-dmesg.log 2>&1; xl list -l > /var/log/xen/xl-list.log 2>&1; \
                 ps axfww > /var/log/xen/ps.log; dmesg > /var/log/xen/dmesg.log; \
                 tar -C /var/log -cf - xen",
                wait::limit(30),
            );
            let note = match gathered {
                Ok(output) => {
                    fs::write(directory.join(format!("host{number}-var-log.tar")), output.out)?;
                    continue;
                }
                Err(error) => format!("host {number}'s own logs could not be had: {error:#}\n"),
            };
            fs::write(directory.join(format!("host{number}-MISSING.txt")), note)?;
        }
        Ok(directory)
    }
}

fn token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("the kernel gives no random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a file only its owner reads.
fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().context("a file has a directory")?)?;
    std::io::Write::write_all(&mut file, content)?;
    file.persist(path)?;
    Ok(())
}
