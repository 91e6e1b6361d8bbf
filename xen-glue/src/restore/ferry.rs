//! A restore whose page contents leave the stream: the dial-back on the source's offer, and the engine that receives them while
//! the stream is waited on.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::Duration;

use mover::error::Error;
use mover::report::Event as Told;
use mover::wire::hello::MigrationId;

use super::phases::Restore;
use super::{Event, RestoreError, Toolstack};
use crate::channel::Channel;
use crate::domain::{DomainError, Target};
use crate::ferry::{Arrival, DialBack, Started, arrive};
use crate::stream::{Lanes, LanesDone, Offer};

/// How long to wait for the stream before looking how the engine is.
const GLANCE: Duration = Duration::from_millis(50);
/// How long connections may take that the source says it has got.
const CONNECTED_WITHIN: Duration = Duration::from_secs(5);

/// How page contents come.
#[derive(Default)]
pub(super) enum Ferry {
    /// In the stream.
    #[default]
    None,
    /// In the stream, and the source is being dialled back.
    Dialling(DialBack),
    /// On lanes.
    Receiving(Arrival),
}

fn broken(what: String) -> RestoreError {
    RestoreError::Ferry { what }
}

impl<T: Target, K: Toolstack> Restore<'_, T, K> {
    /// Takes up an offer, if this end may and can. Whatever comes of it, the stream goes on.
    pub(super) fn offered(&mut self, body: Option<&[u8]>) {
        if !self.options.dial_back || !self.target.ferries() || !matches!(self.ferry, Ferry::None) {
            return;
        }
        let offer = Offer::decode(body.unwrap_or_default());
        let offer = offer.and_then(|offer| match (&offer.fingerprint, self.options.plaintext) {
            (None, false) => Err("they are in the clear, and `lanes_plaintext` is not set here".to_owned()),
            _ => Ok(offer),
        });
        let started = offer.and_then(|offer| {
            DialBack::start(offer, self.options.credentials.clone()).map_err(|error| error.to_string())
        });
        match started {
            Ok(dial) => self.ferry = Ferry::Dialling(dial),
            Err(why) => {
                let text = format!("the source offers lanes that can't be taken up: {why}");
                self.toolstack.report(&Event::Note(&text));
            }
        }
    }

    /// From here on page contents come on the lanes.
    pub(super) fn begin_lanes(&mut self, lanes: &Lanes) -> Result<(), RestoreError> {
        let Ferry::Dialling(dial) = std::mem::take(&mut self.ferry) else {
            return Err(no_lanes().into());
        };
        let offer = dial.offer().clone();
        if lanes.migration != offer.migration {
            let what = "its lanes are those of another migration than the one offered".to_owned();
            return Err(DomainError::Stream { what }.into());
        }
        let connections = dial.finish(CONNECTED_WITHIN).map_err(|why| {
            broken(format!("the source means to have been dialled back, and has not been: {why}"))
        })?;
        let memory = self.target.memory(lanes.pages, &lanes.populated)?;
        let lazy = match self.options.not_lazy.clone() {
            Some(why) => Box::new(|| Err(why)),
            None => self.target.hold_back(),
        };
        let arrival = arrive(&offer, connections, memory, lazy, self.options.direct)
            .map_err(|error| broken(format!("cannot start threads for the lanes: {error}")))?;
        self.toolstack.report(&Event::Detail("pages come by lanes"));
        self.toolstack.report(&Event::Lanes(MigrationId(offer.migration)));
        self.ferry = Ferry::Receiving(arrival);
        Ok(())
    }

    /// What the source says has gone over the lanes: all of it has come, or this fails.
    pub(super) fn end_lanes(&mut self, done: &LanesDone) -> Result<(), RestoreError> {
        let Ferry::Receiving(arrival) = &self.ferry else { return Err(no_lanes().into()) };
        let came = arrival.total();
        if came == *done {
            return Ok(());
        }
        Err(broken(format!(
            "what came on the lanes is not what the stream says was sent: {} frames up to version {} and round {}, not {}, {} \
             and {}{}. The connections carry another migration's pages, or were tampered with",
            came.frames,
            came.version,
            came.round,
            done.frames,
            done.version,
            done.round,
            if came.digest == done.digest { "" } else { ", with other contents" }
        )))
    }

    /// Waits for the stream's next record, while the engine is at work.
    pub(super) fn wait_for_record(&mut self, channel: &Channel<'_>) -> Result<(), RestoreError> {
        while let Ferry::Receiving(arrival) = &self.ferry {
            if self.stop.load(Ordering::Relaxed) {
                return Err(RestoreError::Cancelled);
            }
            for told in arrival.told() {
                report(&mut *self.toolstack, &told);
            }
            // It ends before the stream does only if it fails; `Self::give_up` tells why.
            if arrival.is_over() {
                return Err(broken("the lanes have ended before the stream".to_owned()));
            }
            if channel
                .wait(GLANCE)
                .map_err(|error| broken(format!("waiting for the stream failed: {error}")))?
            {
                break;
            }
        }
        Ok(())
    }

    /// The domain could run: has the source told.
    pub(super) fn confirm(&mut self) -> Result<(), RestoreError> {
        let ferry = std::mem::take(&mut self.ferry);
        if let Ferry::Dialling(dial) = &ferry
            && let Some(why) = dial.failure()
        {
            let text = format!("the lanes that the source offered could not be taken up: {why}");
            self.toolstack.report(&Event::Note(&text));
        }
        if let Ferry::Receiving(arrival) = ferry {
            match arrival.go().map_err(|error| broken(error.to_string()))? {
                Started::Whole(account) => {
                    self.restored.references = account.feedback.checked;
                    self.restored.disk_bytes = account.feedback.disk_bytes;
                    self.restored.disk_busy_ms = account.feedback.disk_busy_us / 1000;
                    self.restored.cpu_ms = account.cpu_us / 1000;
                }
                Started::Draining(lingering) => self.toolstack.lingers(lingering).map_err(broken)?,
            }
        }
        Ok(())
    }

    /// The restore has failed with `error`: ends the engine, whose own error goes before what followed from it.
    pub(super) fn give_up(&mut self, error: RestoreError) -> RestoreError {
        let Ferry::Receiving(arrival) = std::mem::take(&mut self.ferry) else { return error };
        for told in arrival.told() {
            report(&mut *self.toolstack, &told);
        }
        let was_over = arrival.is_over();
        match (arrival.stop(), error) {
            (_, RestoreError::Cancelled) => RestoreError::Cancelled,
            // It failed first, or the source has said on the lanes why it ended both.
            (Some(own), _) if was_over => broken(own.to_string()),
            (Some(own @ Error::Peer { .. }), RestoreError::Stream(_)) => broken(own.to_string()),
            (_, error) => error,
        }
    }
}

fn report(toolstack: &mut impl Toolstack, told: &Told) {
    match told {
        Told::Notice { text, .. } => toolstack.report(&Event::Note(text)),
        other => toolstack.report(&Event::Engine(other)),
    }
}

/// Of a stream whose page contents come another way, of which there is none.
fn no_lanes() -> DomainError {
    let what = "its page contents come on lanes, and none were opened from here".to_owned();
    DomainError::Stream { what }
}
