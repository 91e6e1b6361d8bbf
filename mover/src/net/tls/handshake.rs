//! The handshake, a record at a time: rustls is given whole records and never a byte behind the last one, so that what
//! follows the handshake is still in the socket when it is over. It does no I/O: a dialler drives it over blocking
//! calls, an acceptor over many sockets at once (`super::super::entrance`).

#![forbid(unsafe_code)]

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CertificateError, ClientConfig};

use super::authority::judged;
use super::halves::{self, Ratchet, TlsReceiver, TlsSender};
use super::record::{BODY_BYTES_MAX, Broken, HEADER_BYTES, Opener, RECORDS_PER_KEY, Sealer, body_bytes};
use super::{Identity, Wanted};
use crate::error::NetError;
use crate::net::tcp::Halves;
use crate::net::{Connection, Receiver as _, Sender as _};
use crate::wire::hello::{HELLO_BYTES, Hello, HelloBytes};
use crate::wire::knock;

/// Longest record of a handshake, body alone, that an acceptor reads: a ClientHello takes some 300 bytes.
const ACCEPTED_BODY_MAX: usize = 4096;
/// Records an end takes until the handshake has to be over; ours needs three or six.
const RECORDS_MAX: u32 = 16;
/// What a Hello's record is long.
const HELLO_RECORD_BYTES: usize = HELLO_BYTES + super::record::OVERHEAD_BYTES;

/// Which side of the handshake.
enum Side {
    Dialler(Box<UnbufferedClientConnection>),
    Acceptor(Box<UnbufferedServerConnection>),
}

/// Where a handshake stands after a record.
enum Next {
    /// It goes on as soon as rustls is asked again.
    Again,
    /// A record has to come in.
    Wait,
    /// It is over.
    Over,
}

/// A handshake under way.
pub(crate) struct Handshake {
    side: Side,
    incoming: Vec<u8>,
    records: u32,
    body_max: usize,
}

/// A handshake that is over: what both directions go on with.
pub(crate) struct Keys {
    sealer: Sealer,
    opener: Opener,
    ratchet: Ratchet,
}

impl Handshake {
    fn of(side: Side, body_max: usize) -> Self {
        Self { side, incoming: Vec::new(), records: 0, body_max }
    }

    fn dialler(config: Arc<ClientConfig>) -> Result<Self, rustls::Error> {
        // No name is sent, and whoever looks at one knows it already.
        let nobody = ServerName::try_from("pageferry").expect("a name of letters");
        let side = Side::Dialler(Box::new(UnbufferedClientConnection::new(config, nobody)?));
        Ok(Self::of(side, BODY_BYTES_MAX))
    }

    /// An acceptor's.
    pub(crate) fn acceptor(identity: &Identity) -> Result<Self, rustls::Error> {
        let side = Side::Acceptor(Box::new(UnbufferedServerConnection::new(identity.config())?));
        // Certificates are longer than what a knock leads to otherwise.
        Ok(Self::of(side, if identity.is_mutual() { BODY_BYTES_MAX } else { ACCEPTED_BODY_MAX }))
    }

    /// The length of the body behind that header, if it may be part of a handshake.
    pub(crate) fn body_bytes(&self, header: &[u8; HEADER_BYTES]) -> Result<usize, Broken> {
        let [kind, 3, _, high, low] = *header else { return Err(Broken("it does not speak TLS")) };
        let bytes = usize::from(u16::from_be_bytes([high, low]));
        if !(20..=23).contains(&kind) || bytes == 0 || bytes > self.body_max {
            return Err(Broken("it does not speak TLS as pageferry does"));
        }
        Ok(bytes)
    }

    /// Takes a whole record, none to begin with; puts what is to be sent behind `out`. True when it is over.
    pub(crate) fn advance(&mut self, record: &[u8], out: &mut Vec<u8>) -> Result<bool, rustls::Error> {
        self.records += 1;
        if self.records > RECORDS_MAX {
            return Err(rustls::Error::General("the handshake does not come to an end".into()));
        }
        self.incoming.extend_from_slice(record);
        loop {
            let (discard, next) = match &mut self.side {
                Side::Dialler(tls) => react(tls.process_tls_records(&mut self.incoming), out),
                Side::Acceptor(tls) => react(tls.process_tls_records(&mut self.incoming), out),
            };
            self.incoming.drain(..discard);
            match next? {
                Next::Again => {}
                Next::Wait => return Ok(false),
                Next::Over => return Ok(true),
            }
        }
    }

    /// Whether this is an acceptor's that wants its dialler's certificate.
    pub(crate) fn asks_for_certificates(&self) -> bool {
        matches!(self.side, Side::Acceptor(_)) && self.body_max != ACCEPTED_BODY_MAX
    }

    /// What is to be told the other end when [`Self::advance`] has failed, for its user to read; nothing if nothing is.
    pub(crate) fn last_words(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        // What it was about to say, and that something is wrong; behind that comes the error again.
        for _ in 0..RECORDS_MAX {
            let (discard, next) = match &mut self.side {
                Side::Dialler(tls) => react(tls.process_tls_records(&mut self.incoming), &mut out),
                Side::Acceptor(tls) => react(tls.process_tls_records(&mut self.incoming), &mut out),
            };
            self.incoming.drain(..discard);
            if !matches!(next, Ok(Next::Again)) {
                break;
            }
        }
        out
    }

    /// The keys, once it is over.
    pub(crate) fn into_keys(self) -> Result<Keys, String> {
        let say = |error: rustls::Error| error.to_string();
        let (secrets, ratchet) = match self.side {
            Side::Dialler(tls) => {
                let (secrets, kernel) = tls.dangerous_into_kernel_connection().map_err(say)?;
                (secrets, Ratchet::Dialler(kernel))
            }
            Side::Acceptor(tls) => {
                let (secrets, kernel) = tls.dangerous_into_kernel_connection().map_err(say)?;
                (secrets, Ratchet::Acceptor(kernel))
            }
        };
        let make = |broken: Broken| broken.0.to_owned();
        let sealer = Sealer::new(secrets.tx.0, &secrets.tx.1).map_err(make)?;
        let opener = Opener::new(secrets.rx.0, &secrets.rx.1).map_err(make)?;
        Ok(Keys { sealer, opener, ratchet })
    }
}

/// What rustls wants done.
fn react<D>(status: UnbufferedStatus<'_, '_, D>, out: &mut Vec<u8>) -> (usize, Result<Next, rustls::Error>) {
    let next = status.state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut data) => {
            let from = out.len();
            if let Err(EncodeError::InsufficientSize(short)) = data.encode(&mut []) {
                out.resize(from + short.required_size, 0);
                let again = data.encode(&mut out[from..]);
                again.map_err(|error| rustls::Error::General(error.to_string()))?;
            }
            Ok(Next::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            // Stands in `out`, which goes out before anything else does.
            data.done();
            Ok(Next::Again)
        }
        ConnectionState::BlockedHandshake => Ok(Next::Wait),
        ConnectionState::WriteTraffic(_) => Ok(Next::Over),
        _ => Err(rustls::Error::General("the peer does not keep to the handshake".into())),
    });
    (status.discard, next)
}

impl Keys {
    /// The length of the record a Hello comes in.
    pub(crate) fn hello_record_bytes(header: &[u8; HEADER_BYTES]) -> Result<usize, Broken> {
        match body_bytes(header)? {
            bytes if bytes == HELLO_RECORD_BYTES - HEADER_BYTES => Ok(bytes),
            _ => Err(Broken("it does not begin with a Hello")),
        }
    }

    /// The Hello in that record.
    pub(crate) fn open_hello(&mut self, record: &mut [u8]) -> Result<HelloBytes, Broken> {
        let (kind, bytes) = self.opener.open(record)?;
        let told = record.get(HEADER_BYTES..HEADER_BYTES + bytes);
        let told = told.filter(|told| told.len() == HELLO_BYTES && kind == super::record::Kind::Data);
        let told = told.ok_or(Broken("it does not begin with a Hello"))?;
        let mut hello = HelloBytes::zeroed();
        hello.copy_from_slice(told);
        Ok(hello)
    }

    /// The connection that these keys protect.
    pub(crate) fn connection(self, halves: Halves) -> Connection {
        self.connection_with(halves, RECORDS_PER_KEY)
    }

    fn connection_with(self, halves: Halves, records_per_key: u64) -> Connection {
        let Self { sealer, opener, ratchet } = self;
        let Halves { sender, receiver, link } = halves;
        let session = Arc::new(halves::Session::new(ratchet));
        Connection {
            peer: link.peer().to_owned(),
            sender: Box::new(TlsSender::new(sender, sealer, Arc::clone(&session), records_per_key)),
            receiver: Box::new(TlsReceiver::new(receiver, opener, session)),
            hang_up: link,
        }
    }
}

/// Knocks, shakes hands and says `hello` over a connection just dialled.
pub(crate) fn dial(halves: Halves, wanted: &Wanted, hello: &Hello) -> Result<Connection, NetError> {
    dial_with(halves, wanted, hello, RECORDS_PER_KEY)
}

/// The same, with another number of records until keys are changed.
pub(super) fn dial_with(
    mut halves: Halves,
    wanted: &Wanted,
    hello: &Hello,
    records_per_key: u64,
) -> Result<Connection, NetError> {
    let peer = halves.link.peer().to_owned();
    let untrusted = |why: String| NetError::Untrusted { peer: peer.clone(), why };
    let failed = |error: rustls::Error| match error.clone() {
        rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
            NetError::OtherKey { peer: peer.clone() }
        }
        rustls::Error::InvalidCertificate(error) => {
            NetError::Certificate { peer: peer.clone(), why: judged(&error) }
        }
        rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(_) => untrusted(format!(
            "{error}. Either both ends have certificates of an authority (--ca, --cert, --key; lanes_ca and so on on a Xen host), \
                 or neither has"
        )),
        other => untrusted(other.to_string()),
    };
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(|error| untrusted(error.to_string()))?;
    let mut out = knock::make(&hello.secret, nonce).to_vec();
    let mut handshake = Handshake::dialler(wanted.config()?).map_err(failed)?;
    let mut over = handshake.advance(&[], &mut out).map_err(failed)?;
    let mut record = Vec::new();
    let mut answered = false;
    loop {
        halves.sender.send(&out, &[])?;
        out.clear();
        if over {
            break;
        }
        let mut header = [0; HEADER_BYTES];
        match halves.receiver.recv(&mut header) {
            Err(NetError::Closed { peer, .. }) if !answered => return Err(NetError::TurnedAway { peer }),
            other => other?,
        }
        answered = true;
        let body = handshake.body_bytes(&header).map_err(|broken| untrusted(broken.0.to_owned()))?;
        record.clear();
        record.extend_from_slice(&header);
        record.resize(HEADER_BYTES + body, 0);
        halves.receiver.recv(&mut record[HEADER_BYTES..])?;
        over = handshake.advance(&record, &mut out).map_err(failed)?;
    }
    let mut connection = handshake.into_keys().map_err(untrusted)?.connection_with(halves, records_per_key);
    connection.sender.send(&hello.encode(), &[])?;
    Ok(connection)
}
