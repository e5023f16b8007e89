//! The configuration from Firecracker's metadata service, or from the initrd's file.

use crate::interface::{self, Channel};
use crate::sys::Watch;
use crate::task::{Outcome, name};
use crate::why;
use crate::{files, root};
use core::ffi::CStr;
use core::net::{IpAddr, SocketAddrV4};
use pigeon_init::bytes::decimal;
use pigeon_init::config::Config;
use pigeon_init::json::Spans;
use pigeon_init::mmds::{self, TOKEN};
use pigeon_init::text::Line;
use pigeon_init::{netlink, text};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The configuration baked into the initrd.
const FILE: &CStr = c"/pigeon/run.json";
/// How long the service is asked, in milliseconds, unless the kernel command line says otherwise.
const PATIENCE: u64 = 3000;
/// How long an answer may pause, in milliseconds: a lost segment is never sent again.
const PAUSE: u64 = 250;
/// Time between two questions: the first, and the longest, in milliseconds.
const POLL: (u64, u64) = (1, 50);

/// Which sources are asked: `PIGEON_CONFIG` on the kernel command line.
#[derive(Clone, Copy, PartialEq)]
pub enum Source {
    /// The service where there is a network interface, else the file.
    Auto,
    /// The service only.
    Mmds,
    /// The file only.
    File,
}

impl Source {
    /// Reads `auto`, `mmds` or `file`.
    pub fn parse(word: &[u8]) -> Option<Self> {
        match word {
            b"auto" => Some(Self::Auto),
            b"mmds" => Some(Self::Mmds),
            b"file" => Some(Self::File),
            _ => None,
        }
    }
}

/// Reads a decimal number of milliseconds.
pub fn milliseconds(word: &[u8]) -> Option<u64> {
    decimal(word).map(u64::from)
}

/// Loads the configuration into `document`, decoded: its spans, and where it came from.
pub fn load(
    source: Source,
    patience: Option<u64>,
    document: &mut [u8],
) -> Outcome<(Spans, &'static str)> {
    let mut answers = text!("no configuration");
    if source != Source::File {
        match fetch(patience.unwrap_or(PATIENCE), document) {
            Ok(spans) => return Ok((spans, "mmds")),
            Err(Answer::Wrong(why)) => return Err(text!("configuration from MMDS: ", why)),
            Err(Answer::None(why)) => answers.add("; MMDS: ").add(why),
        };
    }
    if source != Source::Mmds {
        match files::read_found(FILE, document)? {
            Some(length) => {
                let found = document.get_mut(..length).unwrap_or(&mut []);
                let spans =
                    decode(found).map_err(|why| text!("configuration in ", FILE, ": ", why))?;
                let spans =
                    spans.ok_or_else(|| text!("configuration in ", FILE, ": nothing to run"))?;
                return Ok((spans, "file"));
            }
            None => answers.add("; ").add(FILE).add(": no such file"),
        };
    }
    Err(answers)
}

/// Decodes a document; `None` when it has nothing to run.
fn decode(document: &mut [u8]) -> Outcome<Option<Spans>> {
    let spans = Config::decode(document)?;
    Ok(Config::new(document, spans).has_command().then_some(spans))
}

/// Why the service gave no configuration.
enum Answer {
    /// A document that is wrong: waiting does not make it better.
    Wrong(Line),
    /// No document with something to run, yet.
    None(Line),
}

/// Asks the service until it gives a document with something to run, or time is up.
fn fetch(patience: u64, document: &mut [u8]) -> Result<Spans, Answer> {
    let index =
        interface::eth0_index().ok_or_else(|| Answer::None(text!("no network interface eth0")))?;
    let channel = Channel::open().map_err(Answer::None)?;
    let guest = IpAddr::V4(mmds::GUEST);
    let up = channel
        .request(&netlink::link_up(index, None))
        .and_then(|()| channel.ensure(&netlink::add_address(index, guest, mmds::PREFIX)))
        .and_then(|()| channel.ensure(&netlink::add_host_route(index, mmds::ADDRESS)));
    let answer = match up {
        Ok(()) => ask_for(patience, document),
        Err(refusal) => Err(Answer::None(text!("prepare eth0: ", refusal))),
    };
    // Whether it worked or not; what was never added cannot be removed.
    let _route = channel.request(&netlink::remove_host_route(index, mmds::ADDRESS));
    let _address = channel.request(&netlink::remove_address(index, guest, mmds::PREFIX));
    answer
}

fn ask_for(patience: u64, document: &mut [u8]) -> Result<Spans, Answer> {
    let mut session = Session {
        watch: Watch::start(),
        patience,
        connection: None,
        token: None,
        plain: false,
    };
    let (mut wait, longest) = POLL;
    loop {
        let why = match session.ask(document) {
            Ok((200, length)) => match read_answer(document, length) {
                Err(Answer::None(why)) => why,
                found => return found,
            },
            Ok((status, _)) => text!("status ", u32::from(status)),
            Err(why) => {
                session.connection = None;
                why
            }
        };
        // A last question without time for its answer would only hide this one.
        if session.watch.passed().saturating_add(wait) >= patience {
            return Err(Answer::None(why));
        }
        root::pause(wait as i64);
        wait = longest.min(wait * 2);
    }
}

/// A body of status 200: the configuration, `null` before the host's push, or something wrong.
fn read_answer(document: &mut [u8], length: usize) -> Result<Spans, Answer> {
    let body = document.get_mut(..length).unwrap_or(&mut []);
    match body.trim_ascii() {
        b"" => return Err(Answer::None(text!("an empty document"))),
        b"null" => return Err(Answer::None(text!("null"))),
        _ => {}
    }
    match decode(body) {
        Ok(Some(spans)) => Ok(spans),
        Ok(None) => Err(Answer::None(text!("nothing to run"))),
        Err(why) => Err(Answer::Wrong(why)),
    }
}

/// A conversation with the service over one connection at a time.
struct Session {
    watch: Watch,
    /// How long the watch may run, in milliseconds.
    patience: u64,
    connection: Option<OwnedFd>,
    token: Option<heapless::Vec<u8, TOKEN>>,
    /// V2 was refused: ask without a token.
    plain: bool,
}

impl Session {
    /// One document request: its status, and the length of its body in `document`.
    fn ask(&mut self, document: &mut [u8]) -> Outcome<(u16, usize)> {
        if self.token.is_none() && !self.plain {
            let (status, length) = self.exchange(mmds::TOKEN_REQUEST, document)?;
            let body = document.get(..length).unwrap_or(&[]);
            self.token = mmds::token(body).filter(|_| status == 200);
            self.plain = self.token.is_none();
        }
        let request = mmds::document_request(self.token.as_deref());
        let answer = self.exchange(&request, document)?;
        if answer.0 == 401 {
            // The token is unknown or there was none: start over with V2.
            self.token = None;
            self.plain = false;
        }
        Ok(answer)
    }

    /// Sends a request and reads its whole response.
    fn exchange(&mut self, request: &[u8], document: &mut [u8]) -> Outcome<(u16, usize)> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let sent =
            rustix::net::send(&connection, request, SendFlags::NOSIGNAL).map_err(why!("send"))?;
        if sent != request.len() {
            return Err(text!("send: short"));
        }
        let mut head = [0; mmds::HEAD];
        let mut filled = 0;
        let head = loop {
            let room = head.get_mut(filled..).unwrap_or(&mut []);
            filled += self.receive(&connection, room)?;
            match mmds::head(head.get(..filled).unwrap_or(&[])) {
                Ok(Some(found)) => {
                    let start = head.get(found.length..filled).unwrap_or(&[]);
                    let Some(body) = document.get_mut(..found.body) else {
                        return Err(text!("a document over ", document.len(), " bytes"));
                    };
                    let count = start.len().min(body.len());
                    body.iter_mut()
                        .zip(start)
                        .for_each(|(to, from)| *to = *from);
                    filled = count;
                    break found;
                }
                Ok(None) => {}
                Err(mmds::Fault::Malformed) => return Err(text!("an answer that is not HTTP")),
                Err(mmds::Fault::LongHead) => return Err(text!("an answer's header is too long")),
                Err(mmds::Fault::NoLength) => return Err(text!("an answer without a length")),
            }
        };
        while let Some(room @ [_, ..]) = document.get_mut(filled..head.body) {
            filled += self.receive(&connection, room)?;
        }
        self.connection = Some(connection);
        Ok((head.status, head.body))
    }

    fn connect(&self) -> Outcome<OwnedFd> {
        let what = why!("connect");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
            .map_err(what)?;
        // With a port of its own: choosing one in connect() costs the kernel 6 ms of randomness.
        rustix::net::bind(&socket, &SocketAddrV4::new(mmds::GUEST, 0)).map_err(what)?;
        let address = SocketAddrV4::new(mmds::ADDRESS, 80);
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => {
                self.wait(&socket, PollFlags::OUT)?;
                let failed = rustix::net::sockopt::socket_error(&socket).map_err(what)?;
                failed.map_err(what)?;
            }
            Err(errno) => return Err(what(errno)),
        }
        Ok(socket)
    }

    fn receive(&self, socket: &OwnedFd, room: &mut [u8]) -> Outcome<usize> {
        self.wait(socket, PollFlags::IN)?;
        match rustix::net::recv(socket, room, RecvFlags::empty()) {
            Ok((0, _)) => Err(text!("closed before its answer was whole")),
            Ok((count, _)) => Ok(count),
            Err(errno) => Err(text!("receive: ", name(errno))),
        }
    }

    /// Waits for the socket, as long as an answer may pause and time is not up.
    fn wait(&self, socket: &OwnedFd, events: PollFlags) -> Outcome {
        let left = self.patience.saturating_sub(self.watch.passed()).min(PAUSE);
        let time = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: left as i64 * 1_000_000,
        };
        match rustix::event::poll(&mut [PollFd::new(socket, events)], Some(&time)) {
            Ok(0) => Err(text!("no answer")),
            Ok(_) => Ok(()),
            Err(errno) => Err(text!("poll: ", name(errno))),
        }
    }
}
