//! What has gone over the lanes, counted on either end for LANES_DONE: frames, the highest version, and a digest over
//! headers and tables, up to the barrier of the last round on each lane.
//!
//! The engine is not asked: a connection is wrapped, and what passes is looked at. A frame's header and table are one piece to
//! the sender, and two to the receiver; pages' bytes are neither's business here. Each wrapper belongs to its lane's task, and
//! what it has found is put where the other threads see it once a round.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mover::error::NetError;
use mover::memory::GuestPage;
use mover::net::{Receiver, SendPath, Sender};
use mover::units::u64_of;
use mover::wire::frame::{HEADER_BYTES, Header, Kind};

use crate::stream::LanesDone;

/// The count of all lanes.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    lanes: Mutex<Vec<Count>>,
}

/// One lane's, at its last barrier.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    frames: u64,
    version: u64,
    round: u32,
    digest: [u8; 32],
}

impl Tally {
    /// For so many lanes.
    pub(crate) fn new(lanes: u8) -> Arc<Self> {
        Arc::new(Self { lanes: Mutex::new(vec![Count::default(); lanes.into()]) })
    }

    /// What all lanes come to.
    pub(crate) fn total(&self) -> LanesDone {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut digests = blake3::Hasher::new();
        lanes.iter().for_each(|lane| {
            digests.update(&lane.digest);
        });
        LanesDone {
            frames: lanes.iter().map(|lane| lane.frames).sum(),
            version: lanes.iter().map(|lane| lane.version).max().unwrap_or(0),
            round: lanes.iter().map(|lane| lane.round).min().unwrap_or(0),
            digest: *digests.finalize().as_bytes(),
        }
    }

    fn settle(&self, lane: u16, count: Count) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // A lane that is none of ours is the engine's to refuse.
        if let Some(place) = lanes.get_mut(usize::from(lane)) {
            *place = count;
        }
    }
}

/// One lane's running count.
struct Running {
    tally: Arc<Tally>,
    hasher: blake3::Hasher,
    frames: u64,
    version: u64,
}

impl Running {
    fn new(tally: &Arc<Tally>) -> Self {
        Self { tally: Arc::clone(tally), hasher: blake3::Hasher::new(), frames: 0, version: 0 }
    }

    /// A frame is over whose header and table have been hashed.
    fn frame(&mut self, header: &Header) {
        self.frames += 1;
        self.version = self.version.max(header.version.0.into());
        if header.kind == Kind::Barrier {
            let digest = *self.hasher.finalize().as_bytes();
            let (frames, version, round) = (self.frames, self.version, header.round);
            self.tally.settle(header.lane, Count { frames, version, round, digest });
        }
    }
}

/// The header that `bytes` begin with, if they are a frame's and not the handshake's.
fn header(bytes: &[u8]) -> Option<Header> {
    Header::decode(bytes.first_chunk::<HEADER_BYTES>()?).ok()
}

/// A lane's sending half that is counted.
pub(super) struct CountedSender {
    inner: Box<dyn Sender>,
    running: Running,
}

impl CountedSender {
    pub(super) fn around(inner: Box<dyn Sender>, tally: &Arc<Tally>) -> Box<dyn Sender> {
        Box::new(Self { inner, running: Running::new(tally) })
    }
}

impl Sender for CountedSender {
    fn send(&mut self, head: &[u8], pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        if let Some(header) = header(head) {
            self.running.hasher.update(head);
            self.running.frame(&header);
        }
        self.inner.send(head, pages)
    }
    fn backlog_bytes(&self) -> u64 {
        self.inner.backlog_bytes()
    }
    fn path(&self) -> SendPath {
        self.inner.path()
    }
}

/// A lane's receiving half that is counted.
pub(super) struct CountedReceiver {
    inner: Box<dyn Receiver>,
    running: Running,
    /// The frame whose table comes next.
    open: Option<Header>,
}

impl CountedReceiver {
    pub(super) fn around(inner: Box<dyn Receiver>, tally: &Arc<Tally>) -> Box<dyn Receiver> {
        Box::new(Self { inner, running: Running::new(tally), open: None })
    }
}

impl Receiver for CountedReceiver {
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        self.inner.recv(out)?;
        match self.open.take() {
            Some(header) => {
                debug_assert_eq!(u64_of(out.len()), u64_of(header.filled_table_bytes()));
                self.running.hasher.update(out);
                self.running.frame(&header);
            }
            None => {
                self.open = header(out);
                if self.open.is_some() {
                    self.running.hasher.update(out);
                }
            }
        }
        Ok(())
    }
    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        self.inner.recv_pages(pages)
    }
    fn set_patience(&mut self, patience: Option<Duration>) {
        self.inner.set_patience(patience);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mover::units::Version;
    use std::collections::VecDeque;

    #[derive(Clone, Default)]
    struct Wire(Arc<Mutex<VecDeque<u8>>>);

    impl Sender for Wire {
        fn send(&mut self, head: &[u8], _: &[GuestPage<'_>]) -> Result<(), NetError> {
            self.0.lock().unwrap().extend(head);
            Ok(())
        }
        fn backlog_bytes(&self) -> u64 {
            0
        }
        fn path(&self) -> SendPath {
            SendPath::Copy
        }
    }

    impl Receiver for Wire {
        fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
            let mut wire = self.0.lock().unwrap();
            out.iter_mut().for_each(|byte| *byte = wire.pop_front().unwrap());
            Ok(())
        }
        fn recv_pages(&mut self, _: &[GuestPage<'_>]) -> Result<(), NetError> {
            Ok(())
        }
        fn set_patience(&mut self, _: Option<Duration>) {}
    }

    fn frame(kind: Kind, count: usize, round: u32, version: u32, table: u8) -> Vec<u8> {
        let header = Header { kind, lane: 1, count, round, version: Version(version), sequence: 0 };
        let mut out = header.encode().to_vec();
        out.resize(HEADER_BYTES + header.filled_table_bytes(), table);
        out
    }

    /// Sends `frames` over a wire whose bytes `bend` changes; what both ends have counted.
    fn both(frames: &[Vec<u8>], bend: impl Fn(&mut VecDeque<u8>)) -> [LanesDone; 2] {
        let (wire, ends) = (Wire::default(), [Tally::new(2), Tally::new(2)]);
        let mut sender = CountedSender::around(Box::new(wire.clone()), &ends[0]);
        let mut receiver = CountedReceiver::around(Box::new(wire.clone()), &ends[1]);
        sender.send(&[7; 64], &[]).unwrap();
        receiver.recv(&mut [0; 64]).unwrap();
        for frame in frames {
            sender.send(frame, &[]).unwrap();
            bend(&mut wire.0.lock().unwrap());
            receiver.recv(&mut [0; HEADER_BYTES]).unwrap();
            receiver.recv(&mut vec![0; frame.len() - HEADER_BYTES]).unwrap();
        }
        ends.map(|tally| tally.total())
    }

    #[test]
    fn both_ends_count_the_same_up_to_the_last_barrier() {
        let mut frames = vec![frame(Kind::Zero, 3, 1, 5, 1), frame(Kind::References, 9, 1, 6, 2)];
        frames.push(frame(Kind::Barrier, 0, 1, 7, 0));
        let [sent, received] = both(&frames, |_| ());
        assert_eq!(sent, received);
        // The other lane has passed no barrier, so the round is not over.
        assert_eq!((sent.frames, sent.version, sent.round), (3, 7, 0));
        frames.push(frame(Kind::Data, 1, 0, 8, 3));
        assert_eq!(both(&frames, |_| ())[0], sent, "an answer to a refetch behind the barrier");
        frames.push(frame(Kind::Barrier, 0, 2, 9, 0));
        let [more, again] = both(&frames, |_| ());
        assert_eq!(more, again);
        assert!(more.frames == 5 && more.version == 9 && more.digest != sent.digest);
    }

    #[test]
    fn a_table_that_changed_on_the_way_shows() {
        let frames = [frame(Kind::Zero, 3, 1, 5, 1), frame(Kind::Barrier, 0, 1, 7, 0)];
        let bend = |wire: &mut VecDeque<u8>| {
            if let Some(byte) = wire.get_mut(HEADER_BYTES + 8) {
                *byte ^= 1;
            }
        };
        let [sent, received] = both(&frames, bend);
        assert_eq!((sent.frames, sent.version), (received.frames, received.version));
        assert_ne!(sent.digest, received.digest);
    }
}
