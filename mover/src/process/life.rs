//! What may happen to a guest when: the rules of [`super::control`] as one state machine, without threads or sockets.
//!
//! The server holds it under a lock and hands it every request; it drives the machine and decides what the end of a
//! connection means.

#![forbid(unsafe_code)]

use super::control::{Phase, Request, Role};

/// The guest's machinery, as far as the rules drive it. Errors are sentences.
pub(super) trait Machinery {
    /// Stops the vCPUs between two operations, disk I/O finished.
    fn pause(&mut self) -> Result<(), String>;
    /// Lets them go on.
    fn resume(&mut self);
    /// The state outside memory.
    fn save(&mut self) -> Result<Vec<u8>, String>;
    /// Takes it.
    fn load(&mut self, state: &[u8]) -> Result<(), String>;
    /// Starts a loaded guest; whether pages are held back from it.
    fn start(&mut self, holding: bool);
    /// Slows down to so many percent.
    fn throttle(&mut self, percent: u8);
    /// No page is held back any more.
    fn holds_done(&mut self);
}

/// What the server does with a request that was granted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Grant {
    /// Answer that it is done.
    Done,
    /// Answer with the attachment and its descriptors.
    Attached {
        /// Hand out the userfaultfd that is kept, not a new one.
        again: bool,
    },
    /// Answer with this state.
    State(Vec<u8>),
    /// Answer that it is done, and end the process.
    End,
}

#[derive(Debug)]
struct Engine {
    connection: u64,
    role: Role,
    migration: String,
}

/// The guest's phase and who is attached.
#[derive(Debug)]
pub(super) struct Life {
    phase: Phase,
    engine: Option<Engine>,
    holding: bool,
}

impl Life {
    /// Of a guest in `phase`.
    pub(super) fn new(phase: Phase) -> Self {
        Self { phase, engine: None, holding: false }
    }
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }
    pub(super) fn holding(&self) -> bool {
        self.holding
    }
    /// The migration an engine is attached for.
    pub(super) fn migration(&self) -> Option<&str> {
        self.engine.as_ref().map(|engine| engine.migration.as_str())
    }

    /// Grants or refuses a request of `connection`; `state` is what came with `LoadState`.
    pub(super) fn handle(
        &mut self,
        connection: u64,
        request: &Request,
        state: &[u8],
        machine: &mut impl Machinery,
    ) -> Result<Grant, String> {
        match request {
            Request::Attach { role, migration } => self.attach(connection, *role, migration),
            Request::Pause => {
                self.as_engine(connection, Role::Source, &[Phase::Running], "paused")?;
                machine.pause()?;
                self.now(Phase::Paused)
            }
            Request::Resume => {
                self.as_engine(connection, Role::Source, &[Phase::Paused], "resumed")?;
                machine.resume();
                self.now(Phase::Running)
            }
            Request::SaveState => {
                let phases = [Phase::Paused, Phase::Released];
                self.as_engine(connection, Role::Source, &phases, "saved")?;
                machine.save().map(Grant::State)
            }
            Request::Release => {
                self.as_engine(connection, Role::Source, &[Phase::Paused], "released")?;
                self.now(Phase::Released)
            }
            Request::Reclaim => {
                self.as_engine(connection, Role::Source, &[Phase::Released], "reclaimed")?;
                self.now(Phase::Paused)
            }
            Request::Throttle { percent } => {
                let phases = [Phase::Running, Phase::Paused];
                self.as_engine(connection, Role::Source, &phases, "throttled")?;
                if !(1..=100).contains(percent) {
                    return Err(format!("a guest can't be throttled to {percent} %: give 1 to 100"));
                }
                machine.throttle(*percent);
                Ok(Grant::Done)
            }
            Request::LoadState { .. } => {
                self.as_engine(connection, Role::Target, &[Phase::Incoming], "loaded")?;
                machine.load(state)?;
                self.now(Phase::Loaded)
            }
            Request::Keep { .. } => {
                let phases = [Phase::Incoming, Phase::Loaded];
                self.as_engine(connection, Role::Target, &phases, "given something to keep")?;
                Ok(Grant::Done)
            }
            Request::Start { holding } => {
                self.as_engine(connection, Role::Target, &[Phase::Loaded], "started")?;
                self.holding = *holding;
                machine.start(*holding);
                self.now(Phase::Running)
            }
            Request::HoldsDone => {
                self.as_engine(connection, Role::Target, &[Phase::Running], "given all its pages")?;
                self.holding = false;
                machine.holds_done();
                Ok(Grant::Done)
            }
            Request::Stop => {
                self.as_engine(connection, Role::Target, &[Phase::Running], "stopped")?;
                Ok(Grant::End)
            }
            Request::Destroy => self.destroy(connection),
            Request::Status | Request::Check => Err("status requests need no rules".to_owned()),
        }
    }

    /// What the end of `connection` means; whether the process ends with it.
    pub(super) fn lost(&mut self, connection: u64, machine: &mut impl Machinery) -> bool {
        let Some(engine) = self.engine.take_if(|engine| engine.connection == connection) else {
            return false;
        };
        match (engine.role, self.phase) {
            (Role::Target, Phase::Incoming | Phase::Loaded) => return true,
            (Role::Source, Phase::Paused) => {
                machine.throttle(100);
                machine.resume();
                self.phase = Phase::Running;
            }
            (Role::Source, Phase::Running) => machine.throttle(100),
            _ => {}
        }
        false
    }

    fn attach(&mut self, connection: u64, role: Role, migration: &str) -> Result<Grant, String> {
        if let Some(engine) = &self.engine {
            return Err(format!(
                "another migration ({}) has this guest already. Wait for its end or cancel it",
                engine.migration
            ));
        }
        let again = role == Role::Target && self.phase == Phase::Running && self.holding;
        match (role, self.phase) {
            (Role::Target, Phase::Incoming) => {}
            (Role::Target, Phase::Running) if again => {}
            (Role::Source, Phase::Running) if self.holding => {
                return Err(
                    "pages of this guest are still outstanding from the migration that brought it here. \
                            It can be moved on once they are there"
                        .to_owned(),
                );
            }
            (Role::Source, Phase::Running | Phase::Released) => {}
            (_, phase) => {
                let (as_what, wanted) = match role {
                    Role::Source => ("moved away", "running"),
                    Role::Target => ("the target of a migration", "started with --incoming and unused"),
                };
                return Err(format!("this guest is {phase}: to be {as_what} it must be {wanted}"));
            }
        }
        self.engine = Some(Engine { connection, role, migration: migration.to_owned() });
        Ok(Grant::Attached { again })
    }

    fn destroy(&self, connection: u64) -> Result<Grant, String> {
        match &self.engine {
            None => Ok(Grant::End),
            Some(engine) if engine.connection != connection => Err(format!(
                "a migration ({}) has this guest: it can't be ended by others. Cancel that first",
                engine.migration
            )),
            Some(_) if self.phase == Phase::Released => Ok(Grant::End),
            Some(_) => Err(format!("this guest is {}: only a released one is ended", self.phase)),
        }
    }

    fn as_engine(&self, connection: u64, role: Role, phases: &[Phase], done: &str) -> Result<(), String> {
        match &self.engine {
            Some(engine) if engine.connection == connection && engine.role == role => {}
            _ => {
                let end = if role == Role::Source { "source" } else { "target" };
                return Err(format!(
                    "this guest can be {done} only by the {end} of its migration: attach first"
                ));
            }
        }
        if phases.contains(&self.phase) {
            Ok(())
        } else {
            Err(format!("this guest is {}, it can't be {done} now", self.phase))
        }
    }

    fn now(&mut self, phase: Phase) -> Result<Grant, String> {
        self.phase = phase;
        Ok(Grant::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<String>);

    impl Machinery for Recorder {
        fn pause(&mut self) -> Result<(), String> {
            self.0.push("pause".into());
            Ok(())
        }
        fn resume(&mut self) {
            self.0.push("resume".into());
        }
        fn save(&mut self) -> Result<Vec<u8>, String> {
            Ok(vec![1, 2])
        }
        fn load(&mut self, state: &[u8]) -> Result<(), String> {
            if state.is_empty() { Err("empty".into()) } else { Ok(()) }
        }
        fn start(&mut self, holding: bool) {
            self.0.push(format!("start {holding}"));
        }
        fn throttle(&mut self, percent: u8) {
            self.0.push(format!("throttle {percent}"));
        }
        fn holds_done(&mut self) {
            self.0.push("holds done".into());
        }
    }

    fn attach(role: Role) -> Request {
        Request::Attach { role, migration: "m1".into() }
    }

    /// Plays requests of connection 1 that must all be granted, and gives what the machine was told.
    fn play(life: &mut Life, requests: &[Request]) -> Recorder {
        let mut machine = Recorder::default();
        for request in requests {
            life.handle(1, request, &[9], &mut machine).unwrap_or_else(|e| panic!("{request:?}: {e}"));
        }
        machine
    }

    #[test]
    fn a_lost_source_leaves_a_guest_that_runs_unless_it_was_released() {
        use Request::{Pause, Reclaim, Release};
        let throttle = Request::Throttle { percent: 20 };
        let cases: [(&[Request], Phase, &[&str]); 5] = [
            (&[attach(Role::Source)], Phase::Running, &["throttle 100"]),
            (&[attach(Role::Source), throttle], Phase::Running, &["throttle 100"]),
            (&[attach(Role::Source), Pause], Phase::Running, &["throttle 100", "resume"]),
            (&[attach(Role::Source), Pause, Release], Phase::Released, &[]),
            (&[attach(Role::Source), Pause, Release, Reclaim], Phase::Running, &["throttle 100", "resume"]),
        ];
        for (requests, phase, told) in cases {
            let mut life = Life::new(Phase::Running);
            play(&mut life, requests);
            let mut machine = Recorder::default();
            assert!(!life.lost(2, &mut machine) && life.migration().is_some(), "another connection's end");
            assert!(!life.lost(1, &mut machine));
            assert_eq!((life.phase(), machine.0), (phase, told.iter().map(|s| (*s).to_owned()).collect()));
            assert_eq!(life.migration(), None);
        }
    }

    #[test]
    fn a_lost_target_ends_the_guest_until_it_was_started() {
        use Request::HoldsDone;
        let load = Request::LoadState { bytes: 1 };
        let start = Request::Start { holding: true };
        let cases: [(&[Request], bool); 4] = [
            (&[attach(Role::Target)], true),
            (&[attach(Role::Target), load.clone()], true),
            (&[attach(Role::Target), load.clone(), start.clone()], false),
            (&[attach(Role::Target), load.clone(), start.clone(), HoldsDone], false),
        ];
        for (requests, ends) in cases {
            let mut life = Life::new(Phase::Incoming);
            play(&mut life, requests);
            assert_eq!(life.lost(1, &mut Recorder::default()), ends, "{requests:?}");
        }
    }

    #[test]
    fn only_a_target_before_the_start_has_something_kept() {
        let keep = Request::Keep { bytes: 1 };
        let mut life = Life::new(Phase::Incoming);
        let mut machine = play(&mut life, &[attach(Role::Target)]);
        assert_eq!(life.handle(1, &keep, &[], &mut machine), Ok(Grant::Done));
        assert!(life.handle(2, &keep, &[], &mut machine).is_err(), "not attached");
        for request in [Request::LoadState { bytes: 1 }, Request::Start { holding: true }] {
            life.handle(1, &request, &[1], &mut machine).unwrap();
        }
        assert!(life.handle(1, &keep, &[], &mut machine).unwrap_err().contains("running"));
    }

    #[test]
    fn a_target_with_pages_held_back_can_be_attached_again_and_not_moved_on() {
        let mut life = Life::new(Phase::Incoming);
        let mut machine = play(
            &mut life,
            &[attach(Role::Target), Request::LoadState { bytes: 1 }, Request::Start { holding: true }],
        );
        assert_eq!(machine.0, ["start true"]);
        life.lost(1, &mut machine);
        assert!(
            life.handle(2, &attach(Role::Source), &[], &mut machine).unwrap_err().contains("outstanding")
        );
        let granted = life.handle(2, &attach(Role::Target), &[], &mut machine);
        assert_eq!(granted, Ok(Grant::Attached { again: true }));
        life.handle(2, &Request::HoldsDone, &[], &mut machine).unwrap();
        assert_eq!(machine.0.last().unwrap(), "holds done");
        life.lost(2, &mut machine);
        assert!(life.handle(3, &attach(Role::Target), &[], &mut machine).is_err());
        assert!(life.handle(3, &attach(Role::Source), &[], &mut machine).is_ok());
    }

    #[test]
    fn out_of_turn_requests_are_refused_and_change_nothing() {
        let mut life = Life::new(Phase::Running);
        let mut machine = Recorder::default();
        let no = |life: &mut Life, connection, request: &Request, word: &str| {
            let mut machine = Recorder::default();
            let before = life.phase();
            let sentence = life.handle(connection, request, &[], &mut machine).unwrap_err();
            assert!(sentence.contains(word), "{sentence}");
            assert_eq!((life.phase(), machine.0.len()), (before, 0));
        };
        no(&mut life, 1, &Request::Pause, "attach first");
        no(&mut life, 1, &attach(Role::Target), "--incoming");
        life.handle(1, &attach(Role::Source), &[], &mut machine).unwrap();
        no(&mut life, 2, &attach(Role::Source), "another migration (m1)");
        no(&mut life, 2, &Request::Pause, "attach first");
        no(&mut life, 2, &Request::Destroy, "can't be ended by others");
        no(&mut life, 1, &Request::Destroy, "only a released one");
        no(&mut life, 1, &Request::Release, "is running");
        no(&mut life, 1, &Request::Throttle { percent: 0 }, "1 to 100");
        no(&mut life, 1, &Request::Start { holding: false }, "target");
        life.handle(1, &Request::Pause, &[], &mut machine).unwrap();
        no(&mut life, 1, &Request::Pause, "is paused");
        life.handle(1, &Request::Release, &[], &mut machine).unwrap();
        no(&mut life, 1, &Request::Resume, "given up");
        assert_eq!(life.handle(1, &Request::Destroy, &[], &mut machine), Ok(Grant::End));
    }
}
