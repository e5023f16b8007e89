//! A connection's socket and buffers.

use crate::context::{ARENA, Context};
use crate::error;
use crate::error::Error;
use crate::sys::{Region, files};
use core::fmt::Display;
use core::ops::Range;
use proto::arena::Arena;
use proto::bodies::{self, Request};
use proto::http::{Content, MAX_HEAD, Reply, ResponseHead, Status};
use proto::json::Quoted;
use proto::message;
use proto::message::Message;
use proto::websocket;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Longest request body that is kept, in bytes.
pub const MAX_BODY: usize = 128 << 10;
/// Received bytes: a request's head, or its body, or a message, and the start of what follows.
const INPUT: usize = MAX_BODY + MAX_HEAD + (4 << 10);
const _: () = assert!(INPUT >= websocket::BUFFER && INPUT <= ARENA);
/// Most bytes taken from a connection at once, so that none takes all the time.
const READ_AT_ONCE: usize = 16 << 10;
/// Output in one message.
pub const MAX_OUTPUT: usize = 64 << 10;
/// Bytes to send: a message with its header, and control frames.
const OUTPUT: usize = MAX_OUTPUT + 1024;
/// Room for a control frame, a response's head, or what stands around output, behind what waits.
const RESERVE: usize = 512;
/// What a connection may have used of its memory for it to be kept: a page in, a page out.
const SMALL: usize = 4096;

/// The body of a response that has nothing to tell.
pub const OK: &[u8] = br#"{"ok":true}"#;

/// Where a connection's bytes come from and go to.
pub struct Io {
    socket: OwnedFd,
    /// [`INPUT`] received bytes, then [`OUTPUT`] bytes to send. Pages that are not touched cost
    /// nothing.
    memory: Region,
    received: usize,
    /// The bytes that are not sent yet, in the memory.
    unsent: Range<usize>,
    /// No more than [`SMALL`] of each part of the memory was ever used.
    small: bool,
    /// The client is gone, or cannot be answered.
    pub broken: bool,
}

impl Io {
    /// Memory for a connection.
    pub fn memory() -> Result<Region, Errno> {
        Region::new(INPUT + OUTPUT)
    }

    /// A connection that has received nothing.
    pub fn new(socket: OwnedFd, memory: Region) -> Self {
        Self {
            socket,
            memory,
            received: 0,
            unsent: INPUT..INPUT,
            small: true,
            broken: false,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The socket, and the bytes received.
    #[cfg(feature = "files")]
    pub fn parts(&mut self) -> (&OwnedFd, &mut [u8]) {
        let received = self.memory.get_mut(..self.received).unwrap_or(&mut []);
        (&self.socket, received)
    }

    /// Its memory for another connection, if little of it was used.
    pub fn reuse(self) -> Option<Region> {
        self.small.then_some(self.memory)
    }

    /// The buffer for received bytes, and how many of them there are.
    pub fn input(&mut self) -> (&mut [u8], &mut usize) {
        let input = self.memory.get_mut(..INPUT).unwrap_or(&mut []);
        (input, &mut self.received)
    }

    /// The bytes received.
    pub fn received(&mut self) -> &mut [u8] {
        self.memory.get_mut(..self.received).unwrap_or(&mut [])
    }

    /// A part of them.
    pub fn part(&mut self, range: Range<usize>) -> &mut [u8] {
        self.received().get_mut(range).unwrap_or(&mut [])
    }

    /// Drops received bytes; what is behind them moves.
    pub fn discard(&mut self, range: Range<usize>) {
        if range.start < range.end && range.end <= self.received {
            self.memory
                .copy_within(range.end..self.received, range.start);
            self.received -= range.len();
        }
    }

    /// Whether received bytes wait.
    pub fn has_received(&self) -> bool {
        self.received > 0
    }

    /// Whether bytes can be received, and an answer to them would find room.
    pub fn has_room(&self) -> bool {
        self.received < INPUT && self.has_reserve()
    }

    /// Whether a response's head or a control frame fits behind what waits to be sent.
    pub fn has_reserve(&self) -> bool {
        INPUT + OUTPUT - self.unsent.end >= RESERVE
    }

    /// Takes bytes from the socket, if there are any.
    pub fn receive(&mut self) {
        let end = INPUT.min(self.received + READ_AT_ONCE);
        let room = self.memory.get_mut(self.received..end).unwrap_or(&mut []);
        match files::read(&self.socket, room) {
            Ok(count @ 1..) => {
                self.received += count;
                self.small &= self.received <= SMALL;
            }
            Err(Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.broken = true,
        }
    }

    /// Whether all that was queued is sent.
    pub fn is_sent(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Forgets what is not sent.
    #[cfg(feature = "tunnel")]
    pub fn drop_unsent(&mut self) {
        self.unsent = INPUT..INPUT;
    }

    /// Room for content behind what waits, but for the [`RESERVE`]; follow with
    /// [`commit`](Self::commit).
    pub fn spare(&mut self) -> &mut [u8] {
        let end = INPUT + OUTPUT - RESERVE;
        self.memory.get_mut(self.unsent.end..end).unwrap_or(&mut [])
    }

    /// Queues the first `count` bytes of [`spare`](Self::spare).
    pub fn commit(&mut self, count: usize) {
        self.unsent.end = self.unsent.end.saturating_add(count).min(INPUT + OUTPUT);
    }

    /// Room for the payload of a message, when nothing waits to be sent; follow with
    /// [`commit_message`](Self::commit_message).
    pub fn message_room(&mut self) -> &mut [u8] {
        let start = INPUT + websocket::MAX_HEADER;
        self.memory
            .get_mut(start..start + MAX_OUTPUT)
            .unwrap_or(&mut [])
    }

    /// Queues a binary message of the first `count` bytes of [`message_room`](Self::message_room).
    pub fn commit_message(&mut self, count: usize) {
        // The header lies directly before the payload.
        let header = websocket::FrameHeader::new(websocket::Opcode::Binary, count);
        let start = INPUT + websocket::MAX_HEADER - header.as_bytes().len();
        self.unsent = start..start;
        self.queue(header.as_bytes());
        self.commit(count);
    }

    /// Queues bytes. There is room, or the connection is over.
    pub fn queue(&mut self, bytes: &[u8]) {
        let end = self.unsent.end.saturating_add(bytes.len());
        match self.memory.get_mut(self.unsent.end..end) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.unsent.end = end;
            }
            None => self.broken = true,
        }
    }

    /// Queues a part of the received bytes.
    pub fn queue_received(&mut self, range: Range<usize>) {
        let end = self.unsent.end.saturating_add(range.len());
        if range.end <= self.received && end <= INPUT + OUTPUT {
            self.memory.copy_within(range, self.unsent.end);
            self.unsent.end = end;
        } else {
            self.broken = true;
        }
    }

    /// Sends what the socket takes; whether that was anything.
    pub fn send(&mut self) -> bool {
        let before = self.unsent.start;
        self.small &= self.unsent.end <= INPUT + SMALL;
        while !self.unsent.is_empty() {
            let bytes = self.memory.get(self.unsent.clone()).unwrap_or(&[]);
            match files::send(&self.socket, bytes) {
                Ok(count) => self.unsent.start += count,
                Err(Errno::AGAIN) => return self.unsent.start > before,
                Err(_) => {
                    self.broken = true;
                    return false;
                }
            }
        }
        let sent = self.unsent.start > before;
        self.unsent = INPUT..INPUT;
        sent
    }

    /// Queues a whole JSON response that a message has room for.
    pub fn respond_with_text(&mut self, reply: Reply, status: Status, body: &dyn Display) {
        self.respond(reply, status, message!("{body}").as_bytes());
    }

    /// Queues a whole JSON response.
    pub fn respond(&mut self, reply: Reply, status: Status, body: &[u8]) {
        let head = ResponseHead::new(status, reply, Content::Length(body.len() as u64));
        self.respond_with(head, reply, body);
    }

    /// Queues a whole response.
    pub fn respond_with(&mut self, head: ResponseHead, reply: Reply, body: &[u8]) {
        self.queue(head.finish().as_bytes());
        if !reply.head_only {
            self.queue(body);
        }
    }

    /// Queues an error response.
    pub fn respond_error(&mut self, reply: Reply, error: &CallError) {
        self.respond(reply, error.status, error_body(&error.error).as_bytes());
    }
}

/// `{"error":"…"}`
pub fn error_body(error: &dyn Display) -> Message {
    message!("{{\"error\":{}}}", Quoted(error))
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::new(Status::InternalServerError, error)
    }
}

/// Reads a request's body, whose strings come to lie in `memory`.
pub fn read_body<'a>(
    body: &mut [u8],
    memory: &'a mut [u8],
    request: &mut dyn Request<'a>,
) -> Result<(), CallError> {
    bodies::decode(body, &mut Arena::new(memory), request).map_err(CallError::bad_request)
}

/// Why a call is refused.
pub struct CallError {
    /// The response's status.
    pub status: Status,
    /// What its body says.
    pub error: Error,
}

impl CallError {
    /// A call that is wrong.
    pub fn bad_request(error: impl Into<Error>) -> Self {
        Self::new(Status::BadRequest, error.into())
    }

    /// An error with any status.
    pub fn new(status: Status, error: Error) -> Self {
        Self { status, error }
    }
}

/// While the workload is held for a snapshot nothing new begins.
pub fn refuse_while_held(context: &Context) -> Result<(), CallError> {
    match context.is_held() {
        false => Ok(()),
        true => {
            let error = error!("the workload is held for a snapshot");
            Err(CallError::new(Status::Conflict, error))
        }
    }
}

/// What is about the workload is refused before it runs, and when it has ended.
pub fn not_running() -> CallError {
    CallError::new(Status::Conflict, error!("the workload is not running"))
}
