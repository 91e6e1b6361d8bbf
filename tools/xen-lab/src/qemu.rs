//! One host's QEMU process: its command line, its start, its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::json;

use crate::place::Place;
use crate::qmp::Monitor;
use crate::spec::DOM0_MEMORY_MIB;
use crate::{run, wait};

/// The wire's packet size. Every packet costs an emulated processor the same, so large ones are what makes it a wire
/// worth measuring on.
const WIRE_MTU: u32 = 9000;

/// What one host boots from.
pub(crate) struct Boot {
    /// The hypervisor, an ELF file.
    pub(crate) hypervisor: PathBuf,
    /// The root's object.
    pub(crate) root: PathBuf,
    /// Its memory.
    pub(crate) memory_mib: u32,
}

/// The process of host `number` (1 or 2) in `place`.
pub(crate) struct Machine {
    number: usize,
    directory: PathBuf,
}

impl Machine {
    pub(crate) fn of(place: &Place, number: usize) -> Self {
        Self { number, directory: place.host(number) }
    }

    /// 1 or 2.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    /// The console's log: hypervisor, dom0's kernel, the lab's scripts.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// Starts it: returns when QEMU runs, long before the host does.
    pub(crate) fn start(&self, place: &Place, boot: &Boot) -> Result<()> {
        for old in ["console.log", "qemu.log", "pid", "wire", "monitor", "console"] {
            let _ = fs::remove_file(self.directory.join(old));
        }
        let log = self.directory.join("qemu.log");
        // In a session of its own: it outlives us and the terminal. Not with QEMU's own -daemonize, which goes to the root
        // directory, where the short names of its sockets mean nothing.
        let mut command = Command::new("setsid");
        command.args(["--fork", "qemu-system-x86_64"]);
        // Its overlay over the root is a file without a name in TMPDIR.
        command.current_dir(&self.directory).env("TMPDIR", &self.directory);
        self.describe(&mut command, place, boot);
        run::logged(&mut command, &log, Duration::from_secs(60)).context("QEMU can't be started")?;
        let started = wait::until("QEMU to start", wait::limit(20), Duration::from_millis(50), || {
            Ok(self.monitor().map(drop))
        });
        started.with_context(|| format!("QEMU said:\n{}", run::tail(&log, 8)))
    }

    fn describe(&self, command: &mut Command, place: &Place, boot: &Boot) {
        let host = self.number;
        let peer = 3 - host;
        let drive = |name: &str, file: &Path, more: &str| {
            // A comma in a file name is doubled, else it ends the name.
            let file = file.display().to_string().replace(',', ",,");
            [
                "-drive".to_owned(),
                format!("file={file},if=none,id={name},format=raw,{more}"),
                "-device".to_owned(),
                format!("virtio-blk-pci,drive={name}"),
            ]
        };
        command.args(["-name", &format!("pageferry-lab-host{host}"), "-pidfile", "pid"]);
        // An AMD processor with nested paging: with it, and only so, the emulator offers what PVH and HVM guests need.
        command.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "qemu64,+svm,+npt", "-smp", "1"]);
        command.arg("-m").arg(boot.memory_mib.to_string());
        command.args(["-display", "none", "-vga", "none", "-no-reboot", "-nodefaults", "-no-user-config"]);
        command.arg("-kernel").arg(&boot.hypervisor).arg("-append").arg(format!(
            "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all dom0_mem={DOM0_MEMORY_MIB}M,max:{DOM0_MEMORY_MIB}M \
             noreboot console_timestamps=boot"
        ));
        let kernel = boot.root.join("vmlinuz");
        let ram_disk = self.directory.join("initrd");
        command.arg("-initrd").arg(format!(
            "{} console=hvc0 panic=-1 lab.host={host} lab.mtu={WIRE_MTU},{}",
            kernel.display(),
            ram_disk.display()
        ));
        command.args(drive("root", &boot.root.join("dom0.img"), "snapshot=on,cache=unsafe"));
        command.args(drive("lun", &place.file("lun.img"), "cache=none,file.locking=off"));
        command.args(drive("binaries", &place.file("binaries.img"), "readonly=on"));
        command.args(drive("guests", &self.directory.join("guests.img"), "readonly=on"));
        command.arg("-netdev").arg(format!(
            "dgram,id=wire,local.type=unix,local.path=wire,remote.type=unix,remote.path=../host{peer}/wire"
        ));
        command.arg("-device").arg(format!("virtio-net-pci,netdev=wire,mac=52:54:00:77:00:0{host},romfile="));
        // The line to the agent: the machine reaches the host, the host reaches nothing.
        command.args([
            "-netdev",
            "user,id=line,restrict=on,net=10.99.0.0/24,hostfwd=tcp:127.0.0.1:0-10.99.0.15:7",
        ]);
        command.arg("-device").arg(format!("virtio-net-pci,netdev=line,mac=52:54:00:99:00:0{host},romfile="));
        command.args(["-chardev", "socket,id=console,path=console,server=on,wait=off,logfile=console.log"]);
        command.args(["-serial", "chardev:console", "-qmp", "unix:monitor,server=on,wait=off"]);
    }

    /// Its monitor.
    pub(crate) fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.directory, "monitor")
    }

    /// Its process, if it runs: what the file names, provided that it is a QEMU of this directory (numbers are used
    /// again).
    pub(crate) fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.directory.join("pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?)?;
        test_kill_process(pid).ok()?;
        let here = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()?;
        (here == self.directory).then_some(pid)
    }

    /// Ends it as pulling the plug would.
    pub(crate) fn stop(&self) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        if let Ok(mut monitor) = self.monitor() {
            // It may be gone before it answers.
            let _ = monitor.execute("quit", &json!({}));
        }
        let gone = || {
            wait::until("QEMU to end", Duration::from_secs(10), Duration::from_millis(50), || {
                Ok(if self.pid() == Some(pid) { Err("it runs on") } else { Ok(()) })
            })
        };
        if gone().is_err() {
            kill_process(pid, Signal::KILL).context("QEMU can't be ended")?;
            gone()?;
        }
        Ok(())
    }

    /// Cuts the wire at this host's end, or mends it.
    pub(crate) fn set_wire(&self, up: bool) -> Result<()> {
        self.monitor()?.execute("set_link", &json!({ "name": "wire", "up": up })).map(drop)
    }

    /// Lets this host read so many bytes a second from the shared disk; 0 is any number.
    pub(crate) fn set_disk_rate(&self, bytes_per_second: u64) -> Result<()> {
        let throttle = json!({
            "device": "lun", "bps": 0, "bps_rd": bytes_per_second, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0
        });
        self.monitor()?.execute("block_set_io_throttle", &throttle).map(drop)
    }

    /// An error, with the console's end, if the process is gone.
    pub(crate) fn must_run(&self) -> Result<()> {
        if self.pid().is_some() {
            return Ok(());
        }
        bail!(
            "host {}'s QEMU has ended; its console, {}, ends with:\n{}",
            self.number,
            self.console_log().display(),
            run::tail(&self.console_log(), 25)
        );
    }
}
