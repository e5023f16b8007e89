//! Loads the configuration from Firecracker's metadata service (MMDS) or from a file in the initrd.

use crate::boot::network::{self, NetlinkSocket};
use crate::context;
use crate::error;
use crate::error::{Error, Result};
use crate::page::PageBox;
use crate::sys::files;
use crate::sys::{self, Stopwatch};
use core::ffi::CStr;
use core::fmt::Display;
use core::net::{IpAddr, SocketAddrV4};
use core::time::Duration;
use proto::arena::Arena;
use proto::config::Config;
use proto::message::ToLossy;
use proto::mmds;
use proto::netlink::{self, Request};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// The configuration in the initrd.
const FILE: &CStr = c"/pigeon/run.json";
/// How long MMDS is polled, in milliseconds, unless the kernel command line sets another value.
pub const MMDS_TIMEOUT: u64 = 3000;
/// Timeout of a call on the socket, in milliseconds. Short, as MMDS never retransmits a lost segment.
const SOCKET_TIMEOUT: u64 = 250;
/// Time between two polls in milliseconds: initial and maximum.
const POLL_INTERVALS: (u64, u64) = (1, 50);

/// Which sources are used: `PIGEON_CONFIG` on the kernel command line.
#[derive(Clone, Copy, PartialEq)]
pub enum Source {
    /// MMDS if there is an eth0, then the file.
    Auto,
    /// MMDS only.
    Mmds,
    /// The file only.
    File,
}

/// A configuration's text.
pub struct Loaded {
    /// Length in bytes.
    pub length: usize,
    /// Where it comes from: [`Source::Mmds`] or [`Source::File`].
    pub source: Source,
    /// Why it does not come from MMDS, if that was polled first.
    pub mmds_error: Option<Error>,
}

/// Loads the configuration's text into `document`. MMDS is polled for at most `timeout` milliseconds. The
/// error names each source and why it has no configuration.
///
/// `eth0` is the index of the interface to MMDS, if MMDS is to be used; `memory` is for decoding a document
/// from MMDS, to see whether it has a command.
pub fn load(
    source: Source,
    eth0: Option<u32>,
    timeout: u64,
    document: &mut [u8],
    memory: &mut [u8],
) -> Result<Loaded> {
    let mut mmds_error = None;
    if let Some(eth0) = eth0 {
        match fetch(eth0, timeout, document, memory) {
            Ok(length) => {
                return Ok(Loaded {
                    length,
                    source: Source::Mmds,
                    mmds_error,
                });
            }
            Err(FetchError::Invalid(error)) => {
                return Err(error!("configuration from MMDS: {error}"));
            }
            Err(FetchError::NoDocument(error)) => mmds_error = Some(error),
        }
    }
    if source != Source::Mmds
        && let Some(document) = files::read_whole(FILE, document)?
    {
        return Ok(Loaded {
            length: document.len(),
            source: Source::File,
            mmds_error,
        });
    }
    let mut error = error!("no configuration");
    if source != Source::File {
        let why: &dyn Display = match &mmds_error {
            Some(error) => error,
            None => &"no network interface eth0",
        };
        error.append(format_args!("; MMDS: {why}"));
    }
    if source != Source::Mmds {
        error.append(format_args!("; {}: no such file", FILE.lossy()));
    }
    Err(error)
}

/// The index of the interface to MMDS, if it exists and MMDS is to be used.
pub fn mmds_interface(source: Source) -> Option<u32> {
    match source {
        Source::File => None,
        _ => network::eth0_index(),
    }
}

/// Decodes a document; its strings are stored in `memory`.
pub fn decode<'a>(document: &mut [u8], memory: &'a mut [u8]) -> Result<PageBox<Config<'a>>> {
    let mut config = empty()?;
    config.decode(document, &mut Arena::new(memory))?;
    Ok(config)
}

/// An empty configuration.
pub fn empty<'a>() -> Result<PageBox<Config<'a>>> {
    PageBox::new(Config::new).map_err(context!("allocate memory"))
}

/// Decodes and checks a document, which must have a command.
pub fn decode_checked<'a>(
    document: &mut [u8],
    memory: &'a mut [u8],
) -> Result<PageBox<Config<'a>>> {
    let config = decode(document, memory)?;
    config.check()?;
    match config.has_command() {
        true => Ok(config),
        false => Err(error!("nothing to run")),
    }
}

/// Why there is no configuration from MMDS.
pub enum FetchError {
    /// An invalid document: waiting does not help.
    Invalid(Error),
    /// No document with a command, yet.
    NoDocument(Error),
}

/// Polls MMDS over the interface `eth0` until it returns a document with a command, for at most `timeout`
/// milliseconds. The interface has an address and a route to MMDS meanwhile.
///
/// Writes the text to `document` and returns its length.
pub fn fetch(
    eth0: u32,
    timeout: u64,
    document: &mut [u8],
    memory: &mut [u8],
) -> Result<usize, FetchError> {
    let socket = NetlinkSocket::open().map_err(FetchError::NoDocument)?;
    let guest = IpAddr::V4(mmds::GUEST);
    let request = |request: &Request| socket.request(request, format_args!("prepare eth0"));
    let up = request(&netlink::link_up(eth0, None))
        .and_then(|()| request(&netlink::add_address(eth0, &guest, mmds::PREFIX)))
        .and_then(|()| request(&netlink::add_host_route(eth0, mmds::ADDRESS)));
    let mut session = Session {
        watch: Stopwatch::start(),
        timeout,
        connection: None,
        document,
    };
    let result = match up {
        Ok(()) => session.poll(memory),
        Err(why) => Err(FetchError::NoDocument(why)),
    };
    remove_mmds_route(&socket, eth0);
    result
}

/// Removes the route and address for MMDS, if they exist.
fn remove_mmds_route(socket: &NetlinkSocket, index: u32) {
    let guest = IpAddr::V4(mmds::GUEST);
    let request = |request: &Request| socket.request(request, format_args!("leave MMDS"));
    let _not_there = request(&netlink::remove_host_route(index, mmds::ADDRESS));
    let _not_there = request(&netlink::remove_address(index, &guest, mmds::PREFIX));
}

/// Removes the address and route that a killed helper has left behind.
#[cfg(feature = "snapshot")]
pub fn remove_stale_mmds_route() -> Result {
    if let Some(index) = network::eth0_index() {
        remove_mmds_route(&NetlinkSocket::open()?, index);
    }
    Ok(())
}

/// A session with MMDS over one connection at a time.
struct Session<'d> {
    watch: Stopwatch,
    /// Time limit of the session, in milliseconds.
    timeout: u64,
    connection: Option<OwnedFd>,
    /// Buffer that receives the responses.
    document: &'d mut [u8],
}

impl Session<'_> {
    fn poll(&mut self, memory: &mut [u8]) -> Result<usize, FetchError> {
        let (mut wait, longest) = POLL_INTERVALS;
        // The request for the document, once it is known whether it needs a token.
        let mut request = None;
        let mut before = None;
        loop {
            let why = match self.request_document(&mut request) {
                Ok((200, length)) => match check_document(self.body(length), memory) {
                    Ok(()) => return Ok(length),
                    Err(FetchError::NoDocument(error)) => error,
                    Err(wrong) => return Err(wrong),
                },
                Ok((status, _)) => error!("status {}", u32::from(status)),
                Err(why) => {
                    self.connection = None;
                    // If the last poll had no time for its response, the error before it says more.
                    before.filter(|_| self.remaining() == 0).unwrap_or(why)
                }
            };
            if self.remaining() <= wait {
                return Err(FetchError::NoDocument(why));
            }
            before = Some(why);
            sys::sleep(wait as i64);
            wait = longest.min(wait * 2);
        }
    }

    /// Requests the document. Returns the response's status, and the length of its body.
    fn request_document(&mut self, request: &mut Option<mmds::Request>) -> Result<(u16, usize)> {
        if request.is_none() {
            let (status, length) = self.exchange(mmds::TOKEN_REQUEST)?;
            // V2 was refused: request the document without a token.
            let token = mmds::token(self.body(length)).filter(|_| status == 200);
            *request = mmds::document_request(token);
        }
        let response = match request {
            Some(request) => self.exchange(request)?,
            None => return Err(error!("the token is too long")),
        };
        if response.0 == 401 {
            // The token is unknown or missing: start over with V2.
            *request = None;
        }
        Ok(response)
    }

    /// Remaining time, in milliseconds.
    fn remaining(&self) -> u64 {
        self.timeout.saturating_sub(self.watch.elapsed())
    }

    fn body(&mut self, length: usize) -> &mut [u8] {
        self.document.get_mut(..length).unwrap_or(&mut [])
    }

    /// Sends a request and reads the whole response. Returns its status and the length of its body, which is
    /// then at the start of `document`.
    fn exchange(&mut self, request: &[u8]) -> Result<(u16, usize)> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        // A restore's helper, unlike PID 1, would die of a SIGPIPE.
        let sent = files::send(&connection, request);
        if sent.map_err(context!("send"))? != request.len() {
            return Err(error!("send: short"));
        }
        let mut filled = 0;
        let head = loop {
            filled += self.receive(&connection, filled)?;
            match mmds::parse_head(self.document.get(..filled).unwrap_or(&[])) {
                Ok(Some(head)) => break head,
                Ok(None) => {}
                Err(error) => return Err(error!("{error}")),
            }
        };
        let length = head.content_length as usize;
        if length > self.document.len() {
            return Err(error!("a document over {} bytes", self.document.len()));
        }
        self.document.copy_within(head.length..filled, 0);
        filled -= head.length;
        while filled < length {
            filled += self.receive(&connection, filled)?;
        }
        self.connection = Some(connection);
        Ok((head.status, length))
    }

    /// Receives more of a response, after its first `filled` bytes.
    fn receive(&mut self, connection: &OwnedFd, filled: usize) -> Result<usize> {
        if self.remaining() == 0 {
            return Err(error!("no answer"));
        }
        let room = self.document.get_mut(filled..).unwrap_or(&mut []);
        match files::read(connection, room) {
            Ok(0) => Err(error!("closed before its answer was whole")),
            Ok(count) => Ok(count),
            Err(errno) => Err(socket_error(errno, "receive")),
        }
    }

    /// Opens a connection whose calls time out after [`SOCKET_TIMEOUT`], or the remaining time.
    fn connect(&self) -> Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
            .map_err(context!("create a socket"))?;
        let timeout = Some(Duration::from_millis(
            self.remaining().clamp(1, SOCKET_TIMEOUT),
        ));
        set_socket_timeout(&socket, Timeout::Send, timeout)
            .and_then(|()| set_socket_timeout(&socket, Timeout::Recv, timeout))
            .map_err(context!("limit the time of a socket"))?;
        // Bound first: to choose a port in connect(), the kernel would need randomness, which takes 6 ms.
        rustix::net::bind(&socket, &SocketAddrV4::new(mmds::GUEST, 0))
            .and_then(|()| rustix::net::connect(&socket, &SocketAddrV4::new(mmds::ADDRESS, 80)))
            .map_err(|errno| socket_error(errno, "connect"))?;
        Ok(socket)
    }
}

/// Checks the body of a 200 response: the configuration, `null` before the host's push, or invalid data.
fn check_document(body: &mut [u8], memory: &mut [u8]) -> Result<(), FetchError> {
    let content = body.trim_ascii();
    if content.is_empty() {
        return Err(FetchError::NoDocument(error!("an empty document")));
    }
    if content == b"null" {
        return Err(FetchError::NoDocument(error!("null")));
    }
    match decode(body, memory) {
        Ok(config) if config.has_command() => Ok(()),
        Ok(_) => Err(FetchError::NoDocument(error!("nothing to run"))),
        Err(why) => Err(FetchError::Invalid(why)),
    }
}

/// The error of a call on the socket, which may be a timeout (SO_RCVTIMEO and SO_SNDTIMEO, socket(7)).
fn socket_error(errno: Errno, what: &str) -> Error {
    match errno {
        Errno::AGAIN | Errno::INPROGRESS => error!("no answer"),
        _ => context!("{what}")(errno),
    }
}
