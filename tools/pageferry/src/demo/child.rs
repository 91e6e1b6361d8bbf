//! The `send` and `receive` processes of one migration: started, listened to, and never left behind.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mover::ExitClass;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::failure::{Failure, OrFail, Outcome};
use crate::told::Line;

/// Lines of a child's complaints that are kept.
const KEPT: usize = 20;
/// How long a child that was asked to end may take to tidy up.
const GRACE: Duration = Duration::from_secs(5);

/// Which end a child is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// `pageferry send`.
    Source,
    /// `pageferry receive`.
    Target,
}

/// What a child said, or that it will say no more.
pub(super) enum Heard {
    /// A line of its standard output.
    Line(End, Line),
    /// Its standard output has ended.
    Silent(End),
}

/// A child. Dropping it ends it.
pub(super) struct Process {
    child: Child,
    listener: Option<JoinHandle<()>>,
    complaints: Option<JoinHandle<VecDeque<String>>>,
}

impl Process {
    /// Starts `command` as `end`; what it says goes to `heard`, its log to our standard error with `loud`.
    pub(super) fn start(mut command: Command, end: End, heard: Sender<Heard>, loud: bool) -> Outcome<Self> {
        let program = || "cannot start a process of this program".to_owned();
        let remedy = "Raise the limit on processes (`ulimit -u`), or free some memory";
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Out of the terminal's foreground: Ctrl-C is for us, and we tell them in the right order.
        command.process_group(0);
        let mut child = command.spawn().or_fail(program, remedy)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut this = Self { child, listener: None, complaints: None };
        let listener = thread::Builder::new().spawn(move || listen(stdout, end, &heard));
        this.listener = Some(listener.or_fail(program, remedy)?);
        let complaints = thread::Builder::new().spawn(move || keep(stderr, loud));
        this.complaints = Some(complaints.or_fail(program, remedy)?);
        Ok(this)
    }

    /// Asks it to end as Ctrl-C would.
    pub(super) fn interrupt(&self) {
        if let Some(pid) = self.pid() {
            // Gone already: as good.
            let _ = kill_process(pid, Signal::INT);
        }
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Outcome<Option<ExitStatus>> {
        self.child.try_wait().or_fail(|| "cannot wait for a process".to_owned(), "Please report it")
    }

    /// Waits for its end, [`GRACE`] at most, then ends it; what it failed with, if it failed.
    pub(super) fn finish(mut self) -> Outcome<Option<Failure>> {
        let deadline = Instant::now() + GRACE;
        let status = loop {
            match self.ended()? {
                Some(status) => break status,
                None if Instant::now() >= deadline => {
                    return Ok(Some(Failure::new(ExitClass::Internal, "it did not end when it should have")));
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        if status.success() {
            return Ok(None);
        }
        let said = self.complaints.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        Ok(Some(Failure::new(class_of(status), sentence(&said, status))))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        // It has had its chance to end by itself; nothing more can be done about an error here. It leads a process group:
        // what it has started goes with it (guests have left the group, and are the stage's to end).
        if let Some(group) = self.pid() {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn listen(stdout: Option<impl Read>, end: End, heard: &Sender<Heard>) {
    let Some(stdout) = stdout else { return };
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(line) => {
                if heard.send(Heard::Line(end, line)).is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!("{end:?} said something else than an event: {line} ({error})"),
        }
    }
    // The other side of the channel may have given up.
    let _ = heard.send(Heard::Silent(end));
}

fn keep(stderr: Option<impl Read>, loud: bool) -> VecDeque<String> {
    let mut kept = VecDeque::new();
    let Some(stderr) = stderr else { return kept };
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if loud {
            eprintln!("{line}");
        }
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    kept
}

/// The class a child's exit code stands for.
fn class_of(status: ExitStatus) -> ExitClass {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.and_then(ExitClass::from_code).unwrap_or(ExitClass::Internal)
}

/// Its last complaint, without the program's name before it.
fn sentence(said: &VecDeque<String>, status: ExitStatus) -> String {
    let own = said.iter().rev().find_map(|line| line.strip_prefix("pageferry: "));
    let any = said.iter().rev().find(|line| !line.trim().is_empty()).map(String::as_str);
    own.or(any).map_or_else(|| format!("it ended with {status} and said nothing"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_child_is_heard_and_its_failure_is_its_sentence_and_class() {
        let (heard, ear) = channel();
        let script = r#"echo '{"event":"listening","address":"a:1","token":"t"}'
            echo 'a log line' >&2; echo 'pageferry: the disk is gone. Find it' >&2; exit 6"#;
        let child = Process::start(shell(script), End::Target, heard, false).expect("sh starts");
        let failure = child.finish().expect("it can be waited for").expect("it fails");
        assert_eq!(failure.class, ExitClass::Disk);
        assert_eq!(failure.message, "the disk is gone. Find it");
        let all: Vec<_> = ear.iter().collect();
        assert!(matches!(&all[..], [Heard::Line(End::Target, Line::Told(_)), Heard::Silent(End::Target)]));
    }

    #[test]
    fn a_dropped_child_is_gone_with_its_own_children() {
        let (heard, ear) = channel();
        let child = Process::start(shell("sleep 600; true"), End::Source, heard, false).expect("sh starts");
        // Time to have a child of its own.
        thread::sleep(Duration::from_millis(300));
        drop(child);
        assert!(matches!(ear.recv(), Ok(Heard::Silent(End::Source))), "its standard output is closed");
    }

    #[test]
    fn an_interrupted_child_ends_by_itself() {
        let (heard, _ear) = channel();
        let child = Process::start(
            shell("trap 'exit 8' INT; while :; do sleep 0.05; done"),
            End::Source,
            heard,
            false,
        )
        .expect("sh starts");
        // The trap has to be set first.
        thread::sleep(Duration::from_millis(300));
        child.interrupt();
        let failure = child.finish().expect("it can be waited for").expect("it was not a success");
        assert_eq!(failure.class, ExitClass::Cancelled);
    }
}
