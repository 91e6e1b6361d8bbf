//! The guest's life on either end: requests on its control socket, one at a time.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Line;
use crate::error::GuestError;
use crate::guest::{SourceLife, TargetLife};

/// A guest to be moved away.
pub(super) struct SourceEnd(Arc<Line>);

impl SourceEnd {
    pub(super) fn new(line: Arc<Line>) -> Self {
        Self(line)
    }
}

impl SourceLife for SourceEnd {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.client().pause()
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.0.client().resume()
    }
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.0.client().save_state()
    }
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.0.client().throttle(percent)
    }
    fn release(&mut self) -> Result<(), GuestError> {
        self.0.client().release()
    }
    fn reclaim(&mut self) -> Result<(), GuestError> {
        self.0.client().reclaim()
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        self.0.client().destroy()
    }
}

/// A guest that comes here. The guest process ends by itself when this connection does before the start.
pub(super) struct TargetEnd(Arc<Line>);

impl TargetEnd {
    pub(super) fn new(line: Arc<Line>) -> Self {
        Self(line)
    }
}

impl TargetLife for TargetEnd {
    fn load_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.0.client().load_state(state)
    }
    fn start(&mut self) -> Result<(), GuestError> {
        let client = self.0.client();
        client.start(self.0.holding.load(Ordering::SeqCst))?;
        self.0.started.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn stop(&mut self) -> Result<(), GuestError> {
        self.0.client().stop()
    }
}
