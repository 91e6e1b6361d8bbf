//! The two halves of a connection under TLS, behind the same traits as those in the clear.
//!
//! The sending half gathers a message into records in its own buffer, seals them there and hands them to the kernel a
//! few at a time. The gathering is a copy that plain sends do without, and is needed: the guest writes its pages
//! meanwhile, and a cipher must read bytes once. The receiving half takes whatever is there, opens record by record in
//! its own buffer, and copies to where the bytes belong.
//!
//! Each half belongs to one task. They share only what a change of keys needs ([`Session`]).

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ConnectionTrafficSecrets;
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;

use super::authority::refused;
use super::record::{
    BODY_BYTES_MAX, Broken, HEADER_BYTES, Kind, OVERHEAD_BYTES, Opener, PLAIN_BYTES_MAX, Sealer, body_bytes,
};
use crate::error::NetError;
use crate::memory::GuestPage;
use crate::net::tcp::{TcpReceiver, TcpSender};
use crate::net::{Receiver, SendPath, Sender};
use crate::units::PAGE_BYTES;

/// Records handed to the kernel at once: as many bytes as a socket holds unsent ([`super::super::tcp::Settings`]).
const RECORDS_AT_ONCE: usize = 4;
/// The buffer of a sending half: with room to begin at any place in a cache line.
const SEND_BYTES: usize = RECORDS_AT_ONCE * (PLAIN_BYTES_MAX + OVERHEAD_BYTES) + CACHE_LINE;
/// The buffer of a receiving half.
const RECEIVE_BYTES: usize = 128 * 1024;
/// A buffer begins at the place in a cache line at which its bytes stand in the stream: copies into and out of the
/// kernel's buffers then need no shifting (`crate::wire::frame::ALIGNMENT`).
const CACHE_LINE: usize = 64;
/// "Take my new key from here on, and keep yours" (RFC 8446, section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
/// The same, asking for the other end's too.
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

/// Where the next keys come from.
pub(super) enum Ratchet {
    Dialler(KernelConnection<ClientConnectionData>),
    Acceptor(KernelConnection<ServerConnectionData>),
}

/// What the halves share.
pub(super) struct Session {
    /// Locked for a change of keys only.
    ratchet: Mutex<Ratchet>,
    /// Set when the peer has asked for new keys of ours.
    asked: AtomicBool,
}

impl Session {
    pub(super) fn new(ratchet: Ratchet) -> Self {
        Self { ratchet: Mutex::new(ratchet), asked: AtomicBool::new(false) }
    }

    /// The next keys to send with.
    fn next_sealer(&self) -> Result<Sealer, String> {
        let mut ratchet = self.ratchet.lock().unwrap_or_else(PoisonError::into_inner);
        let next = match &mut *ratchet {
            Ratchet::Dialler(tls) => tls.update_tx_secret(),
            Ratchet::Acceptor(tls) => tls.update_tx_secret(),
        };
        made(next, Sealer::new)
    }

    /// The next keys to receive with.
    fn next_opener(&self) -> Result<Opener, String> {
        let mut ratchet = self.ratchet.lock().unwrap_or_else(PoisonError::into_inner);
        let next = match &mut *ratchet {
            Ratchet::Dialler(tls) => tls.update_rx_secret(),
            Ratchet::Acceptor(tls) => tls.update_rx_secret(),
        };
        made(next, Opener::new)
    }
}

fn made<T>(
    next: Result<(u64, ConnectionTrafficSecrets), rustls::Error>,
    make: fn(u64, &ConnectionTrafficSecrets) -> Result<T, Broken>,
) -> Result<T, String> {
    let (sequence, secrets) = next.map_err(|error| error.to_string())?;
    make(sequence, &secrets).map_err(|broken| broken.0.to_owned())
}

/// The sending half.
pub(super) struct TlsSender {
    inner: TcpSender,
    sealer: Sealer,
    session: Arc<Session>,
    records_per_key: u64,
    buffer: Box<[u8]>,
    /// Where in a cache line the stream stands.
    phase: usize,
}

impl TlsSender {
    pub(super) fn new(inner: TcpSender, sealer: Sealer, session: Arc<Session>, records_per_key: u64) -> Self {
        let buffer = vec![0; SEND_BYTES].into_boxed_slice();
        Self { inner, sealer, session, records_per_key, buffer, phase: 0 }
    }

    /// Changes keys where it is time to.
    fn change_keys(&mut self) -> Result<(), NetError> {
        let asked = self.session.asked.load(SeqCst) && self.session.asked.swap(false, SeqCst);
        if self.sealer.records() < self.records_per_key && !asked {
            return Ok(());
        }
        self.buffer[HEADER_BYTES..][..KEY_UPDATE.len()].copy_from_slice(&KEY_UPDATE);
        let all = self.sealer.seal(&mut self.buffer, KEY_UPDATE.len(), Kind::Handshake);
        self.inner.send(&self.buffer[..all], &[])?;
        self.phase = (self.phase + all) % CACHE_LINE;
        self.sealer = self.session.next_sealer().map_err(|why| self.inner.untrusted(why))?;
        Ok(())
    }
}

/// How many bytes of the message `head`, `pages` the record from byte `done` on carries: pages begin a record, so that
/// they come whole out of it.
fn next_piece(head: usize, all: usize, done: usize) -> usize {
    let end = if done < head { head } else { all };
    (end - done).min(PLAIN_BYTES_MAX)
}

/// Copies bytes of the message from byte `from` on; `out` does not reach from its head into its pages.
fn gather(head: &[u8], pages: &[GuestPage<'_>], from: usize, out: &mut [u8]) {
    match head.get(from..from + out.len()) {
        Some(bytes) => out.copy_from_slice(bytes),
        None => {
            let from = from - head.len();
            for (at, piece) in out.chunks_mut(PAGE_BYTES).enumerate() {
                pages[from / PAGE_BYTES + at].copy_part_to(0, piece);
            }
        }
    }
}

impl Sender for TlsSender {
    fn send(&mut self, head: &[u8], pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        let all = head.len() + pages.len() * PAGE_BYTES;
        let mut done = 0;
        while done < all {
            self.change_keys()?;
            let begin = self.phase;
            let mut end = begin;
            for _ in 0..RECORDS_AT_ONCE {
                let plain = next_piece(head.len(), all, done);
                if plain == 0 || self.sealer.records() >= self.records_per_key {
                    break;
                }
                let record = &mut self.buffer[end..];
                gather(head, pages, done, &mut record[HEADER_BYTES..][..plain]);
                end += self.sealer.seal(record, plain, Kind::Data);
                done += plain;
            }
            self.inner.send(&self.buffer[begin..end], &[])?;
            self.phase = end % CACHE_LINE;
        }
        Ok(())
    }

    fn backlog_bytes(&self) -> u64 {
        self.inner.backlog_bytes()
    }

    fn path(&self) -> SendPath {
        // The bytes that leave are not the guest's: no card could read them in its memory.
        SendPath::Encrypted
    }
}

/// The receiving half.
pub(super) struct TlsReceiver {
    inner: TcpReceiver,
    opener: Opener,
    session: Arc<Session>,
    buffer: Box<[u8]>,
    /// Opened bytes not yet taken.
    plain: Range<usize>,
    /// Bytes received and not yet opened.
    sealed: Range<usize>,
}

impl TlsReceiver {
    pub(super) fn new(inner: TcpReceiver, opener: Opener, session: Arc<Session>) -> Self {
        let buffer = vec![0; RECEIVE_BYTES].into_boxed_slice();
        Self { inner, opener, session, buffer, plain: 0..0, sealed: 0..0 }
    }

    /// Makes sure that at least `bytes` unopened ones are here, at most a record.
    fn gather(&mut self, bytes: usize, amid: bool) -> Result<(), NetError> {
        while self.sealed.len() < bytes {
            if self.sealed.is_empty() {
                let place = self.sealed.start % CACHE_LINE;
                self.sealed = place..place;
            } else if self.sealed.start + HEADER_BYTES + BODY_BYTES_MAX > self.buffer.len() {
                // All that is opened has been taken: what is left moves to the front.
                let place = self.sealed.start % CACHE_LINE;
                self.buffer.copy_within(self.sealed.clone(), place);
                self.sealed = place..place + self.sealed.len();
            }
            let begun = amid || !self.sealed.is_empty();
            let came = self.inner.recv_some(&mut self.buffer[self.sealed.end..], begun)?;
            self.sealed.end += came;
        }
        Ok(())
    }

    /// Opens records until there is something in `plain`. `amid`: whether the caller has had some of its message.
    fn open(&mut self, amid: bool) -> Result<(), NetError> {
        while self.plain.is_empty() {
            self.gather(HEADER_BYTES, amid)?;
            let header = self.buffer[self.sealed.start..][..HEADER_BYTES].try_into();
            let header = header.expect("the slice is that long");
            let body = body_bytes(&header).map_err(|broken| self.inner.untrusted(broken.0.to_owned()))?;
            self.gather(HEADER_BYTES + body, amid)?;
            let start = self.sealed.start;
            let record = &mut self.buffer[start..start + HEADER_BYTES + body];
            let opened = self.opener.open(record);
            let (kind, bytes) = opened.map_err(|broken| self.inner.untrusted(broken.0.to_owned()))?;
            self.sealed.start += HEADER_BYTES + body;
            let carried = start + HEADER_BYTES..start + HEADER_BYTES + bytes;
            match kind {
                Kind::Data if bytes > 0 => self.plain = carried,
                Kind::Data => return Err(self.inner.untrusted("it sends empty records".to_owned())),
                Kind::Handshake => self.handshake(carried)?,
                Kind::Alert => {
                    let alert = self.buffer[carried].get(1).copied().unwrap_or_default();
                    return Err(match refused(alert) {
                        Some(why) => self.inner.refused(why),
                        None => self.inner.closed(amid),
                    });
                }
            }
        }
        Ok(())
    }

    /// A message behind the handshake: new keys, nothing else.
    fn handshake(&mut self, message: Range<usize>) -> Result<(), NetError> {
        let message = &self.buffer[message];
        if message == KEY_UPDATE_REQUESTED {
            self.session.asked.store(true, SeqCst);
        } else if message != KEY_UPDATE {
            return Err(self.inner.untrusted("it goes on shaking hands".to_owned()));
        }
        self.opener = self.session.next_opener().map_err(|why| self.inner.untrusted(why))?;
        Ok(())
    }

    /// At most `limit` opened bytes.
    fn take(&mut self, limit: usize) -> &[u8] {
        let bytes = self.plain.len().min(limit);
        let taken = self.plain.start..self.plain.start + bytes;
        self.plain.start += bytes;
        &self.buffer[taken]
    }
}

impl Receiver for TlsReceiver {
    fn recv(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        let mut done = 0;
        self.inner.begin();
        while done < out.len() {
            self.open(done > 0)?;
            let bytes = self.take(out.len() - done);
            out[done..done + bytes.len()].copy_from_slice(bytes);
            done += bytes.len();
        }
        Ok(())
    }

    fn recv_pages(&mut self, pages: &[GuestPage<'_>]) -> Result<(), NetError> {
        let mut done = 0;
        self.inner.begin();
        while done < pages.len() * PAGE_BYTES {
            self.open(true)?;
            let (page, offset) = (&pages[done / PAGE_BYTES], done % PAGE_BYTES);
            let bytes = self.take(PAGE_BYTES - offset);
            if bytes.len() == PAGE_BYTES {
                page.copy_from_slice(bytes);
            } else {
                page.copy_part_from(offset, bytes);
            }
            done += bytes.len();
        }
        Ok(())
    }

    fn set_patience(&mut self, patience: Option<Duration>) {
        self.inner.set_patience(patience);
    }
}
