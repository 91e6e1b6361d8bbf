//! One JSON message a packet over a SOCK_SEQPACKET socket, descriptors beside it.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::CONTROL_MESSAGE_BYTES_MAX;

/// Descriptors that may come with one packet.
pub(super) const DESCRIPTORS_MAX: usize = 8;

/// Why a packet could not be taken.
#[derive(Debug)]
pub(super) enum PacketError {
    /// The socket failed.
    Io(io::Error),
    /// It is no message of this protocol; the sentence says how.
    Garbage(String),
}

impl From<rustix::io::Errno> for PacketError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// A message and what came beside it.
pub(super) type Packet<T> = (T, Vec<OwnedFd>);

/// Sends `message` and `descriptors` as one packet.
pub(super) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    assert!(descriptors.len() <= DESCRIPTORS_MAX);
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > CONTROL_MESSAGE_BYTES_MAX {
        return Err(io::Error::other(format!("a message of {} bytes is over the limit", bytes.len())));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "the space is made for the most there may be");
    }
    let sent =
        retry(|| rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Takes one packet; `None` when the other side has gone.
pub(super) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<Packet<T>>, PacketError> {
    let mut bytes = vec![0; CONTROL_MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = match retry(|| {
        rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    }) {
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(PacketError::Garbage(format!(
            "a packet is longer than {CONTROL_MESSAGE_BYTES_MAX} bytes or brings more than {DESCRIPTORS_MAX} \
             descriptors. Is the program on the other side of this socket a pageferry of this version?"
        )));
    }
    serde_json::from_slice(&bytes[..got.bytes]).map(|message| Some((message, descriptors))).map_err(|e| {
        PacketError::Garbage(format!(
            "a packet is no message of the guest's control protocol ({e}). Is the program on the other side of \
             this socket a pageferry of this version?"
        ))
    })
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}
