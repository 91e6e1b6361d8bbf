//! Probes of sending without a copy, of namespaces and shaping, and of the benchmark's yardstick.

use std::process::{Command, Stdio};

use mover::kernel::probe;

use super::Capability;

/// All of them.
pub(super) fn probes() -> Vec<Capability> {
    vec![zero_copy(), shaped_links(), fio()]
}

/// What a program said: standard output if it succeeded, else the last line of its complaint.
fn said(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let (text, other) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(text.trim().to_owned())
    } else {
        let complaint = other.lines().rev().find(|line| !line.trim().is_empty());
        Err(complaint.unwrap_or("it failed without a word").trim().to_owned())
    }
}

fn zero_copy() -> Capability {
    let this =
        Capability::optional("zero-copy send", "every page sent is copied once by the kernel: some CPU time");
    match probe::zero_copy_send() {
        Ok(()) => this.yes(
            "MSG_ZEROCOPY can be asked for; whether the network card does it (loopback never does) shows in each \
             migration's summary as send_path",
        ),
        Err(error) => this.no(format!("the kernel refuses it: {error}"), "Linux 4.14 or newer"),
    }
}

/// Tries it for real, in a namespace that ends with the command.
fn shaped_links() -> Capability {
    let this = Capability::optional(
        "shaped links",
        "`demo --link 1gbit` runs over the unshaped loopback, and the end-to-end benchmarks are left out",
    );
    let script = "ip link add pf0 type veth peer name pf1 && ip link set pf0 up && \
                  tc qdisc add dev pf0 root tbf rate 1gbit burst 256kb latency 20ms";
    match said("unshare", &["--net", "--", "sh", "-c", script]) {
        Ok(_) => this.yes("network namespaces, veth and tc's token bucket work here"),
        Err(why) => this.no(
            why,
            "run as root (or with CAP_NET_ADMIN and CAP_SYS_ADMIN), with iproute2 and util-linux installed",
        ),
    }
}

fn fio() -> Capability {
    let this = Capability::optional("fio", "`cargo xtask bench` can't compare loading with fio's rate");
    match said("fio", &["--version"]) {
        Ok(version) => this.yes(version),
        Err(why) => this.no(why, "apt-get install fio"),
    }
}
