//! libvirt's Xen driver over our helper: `virsh save`, `restore` and `migrate --live`, its daemons talking over the wire.

use anyhow::{Context, Result, bail};

use super::{Needs, Pair, Test, Tier, left};
use crate::guest::{Guest, Kind};
use crate::host::Host;
use crate::lab::Lab;
use crate::moves::{Helper, OURS};
use crate::wait;

/// Where guests are saved to.
const FILE: &str = "/root/saved";
/// What the daemon is told: to listen on the wire, and to ask nobody who they are. (The wire is the lab's own.)
const DAEMON: &str = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nauth_unix_rw = \"none\"\n";
/// What it says of what it does, and what libxl says to it.
const LOG: &str = "/var/log/libvirt/lab.log";

pub(super) fn tests(pair: Pair) -> Vec<Test> {
    let tour = |kind: Kind| {
        let what = format!("libvirt/tour-{kind}");
        Test::new(pair, &what, Tier::Full, Needs::Helper, move |lab| tour(lab, kind))
    };
    [Kind::Pvh, Kind::Pv].map(tour).into()
}

/// One guest, saved, restored and migrated live by libvirt.
fn tour(lab: &Lab, kind: Kind) -> Result<()> {
    for number in 1..=2 {
        start_daemon(lab.host(number))?;
    }
    let travelled = travel(lab, kind);
    let said = |host: &Host| host.run(&format!("tail -n 40 {LOG} /var/log/libvirt/libxl/*.log"));
    let logs = if travelled.is_err() {
        format!("{}\n{}", said(lab.host(1))?, said(lab.host(2))?)
    } else {
        String::new()
    };
    for number in 1..=2 {
        lab.host(number).run("pkill -x libvirtd; while pgrep -x libvirtd > /dev/null; do sleep 0.2; done")?;
    }
    travelled.with_context(|| format!("libvirt's logs:\n{logs}"))
}

fn travel(lab: &Lab, kind: Kind) -> Result<()> {
    let (host, target, guest) = (lab.host(1), lab.host(2), Guest::small(kind));
    let name = &guest.name;
    let configuration = "/run/lab/libvirt.cfg";
    host.put(configuration, guest.configuration().as_bytes())?;
    host.run(&format!("virsh domxml-from-native xen-xl {configuration} > /run/lab/libvirt.xml"))?;
    let created = guest.boots_by(host, "virsh create /run/lab/libvirt.xml")?;

    virsh(host, &format!("save {name} {FILE}"))?;
    if guest.domain(host)?.is_some() {
        bail!("{name} is still there after it was saved");
    }
    let saved = guest.counted(host, created)?;
    virsh(host, &format!("restore {FILE}"))?;
    let restored = guest.is_back(host, saved)?;
    uses_ours(host)?;

    virsh(host, &format!("migrate --live {name} xen+tcp://{}/system", target.address()))?;
    let moved = guest.counts_on(target, restored)?;
    uses_ours(target)?;
    guest.verifies_all(target, moved)?;
    left::nothing(lab, Helper::Ours)?;
    virsh(target, &format!("destroy {name}"))
}

fn start_daemon(host: &Host) -> Result<()> {
    host.put("/etc/libvirt/libvirtd.conf", DAEMON.as_bytes())?;
    // Only Xen's driver is wanted; QEMU's, which comes with it, asks for a user that it has no package to make.
    host.run("rm -f /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")?;
    // Every CPU model that libvirt has wants VME, which QEMU does not emulate, or SEP, which Xen hides on AMD: without one that
    // fits, its driver does not start.
    host.run("sed -i /vme/d /usr/share/libvirt/cpu_map/x86_486.xml")?;
    host.run(&format!(
        "mkdir -p /var/log/libvirt /run/libvirt; rm -f {LOG} /var/log/libvirt/libxl/*.log; \
         LIBXL_SAVE_HELPER={OURS} LIBVIRT_DEBUG=1 LIBVIRT_LOG_OUTPUTS=2:file:{LOG} libvirtd --daemon --listen"
    ))?;
    let answers = format!(
        "until virsh -c xen:///system version >/dev/null 2>&1; do
             pgrep -x libvirtd > /dev/null || {{ cat {LOG}; exit 1; }}; sleep 0.5
         done"
    );
    host.run_within(&answers, wait::limit(90)).map(drop).context("libvirtd does not come up")
}

fn virsh(host: &Host, command: &str) -> Result<()> {
    wait::timed(&format!("virsh {command}"), || {
        host.run_within(&format!("virsh -c xen:///system {command}"), wait::limit(300)).map(drop)
    })
}

/// An error unless it was our helper that libvirt's libxl ran.
fn uses_ours(host: &Host) -> Result<()> {
    host.run("grep -q pageferry-save-helper /var/log/libvirt/libxl/*.log")
        .map(drop)
        .with_context(|| format!("nothing on host {} shows that libvirt ran our helper", host.number()))
}
