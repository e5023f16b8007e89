//! A connection's socket and buffers.

use super::error::{CallError, error_body};
use crate::context::ARENA;
use crate::sys::{Region, files};
use core::fmt::Display;
use core::ops::Range;
use proto::arena::Arena;
use proto::bodies::{self, Request};
use proto::http::{Content, HEAD_ROOM, JSON, MAX_HEAD, Reply, ResponseHead, Status};
use proto::message;
use proto::websocket::{self, FrameHeader, Opcode};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Maximum size of a request body, in bytes.
pub const MAX_BODY: usize = 128 << 10;
/// Size of the input buffer: a request's head and body, or a message, and the start of what follows.
const INPUT: usize = MAX_BODY + MAX_HEAD + (4 << 10);
const _: () = assert!(INPUT >= websocket::BUFFER && INPUT <= ARENA);
/// Most bytes read from a connection at once, so that other connections get their turn.
const READ_AT_ONCE: usize = 16 << 10;
/// Most output in one message.
pub const MAX_OUTPUT: usize = 64 << 10;
/// Size of the output buffer: a message with its header, and control frames.
const OUTPUT: usize = MAX_OUTPUT + 1024;
/// Space kept free at the end of the output buffer for a control frame, a response's head, or the text around
/// output.
const RESERVE: usize = HEAD_ROOM;
/// Bytes that the host's socket holds for a client that reads nothing. More than these the host may drop soon
/// after this end has closed (Firecracker after 2 s).
pub const HOST_BUFFER: u64 = 64 << 10;
/// How long a client may take to read the last bytes and to close, in milliseconds.
pub const LAST_BYTES_TIMEOUT: u64 = 10_000;
/// Memory is reused if a connection has touched no more than this of each buffer: a page.
const REUSE_LIMIT: usize = 4096;

/// The body of a successful response without data.
pub const OK: &[u8] = br#"{"ok":true}"#;

/// A connection's socket and buffers.
pub struct Io {
    socket: OwnedFd,
    /// The input buffer of [`INPUT`] bytes, then the output buffer of [`OUTPUT`] bytes. Untouched pages cost
    /// nothing.
    memory: Region,
    received: usize,
    /// Where in the memory the unsent bytes are.
    unsent: Range<usize>,
    /// Bytes sent so far.
    sent: u64,
    /// No more than [`REUSE_LIMIT`] bytes of each buffer were ever used.
    used_little: bool,
    /// How the response to the last request is framed.
    pub reply: Reply,
    /// The client has disconnected, or cannot be sent a response.
    pub broken: bool,
}

impl Io {
    /// Memory for a connection.
    pub fn memory() -> Result<Region, Errno> {
        Region::new(INPUT + OUTPUT)
    }

    /// A new connection.
    pub fn new(socket: OwnedFd, memory: Region) -> Self {
        Self {
            socket,
            memory,
            received: 0,
            unsent: INPUT..INPUT,
            sent: 0,
            used_little: true,
            reply: Reply::CLOSE,
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

    /// Its memory, if another connection can use it.
    pub fn into_reusable_memory(self) -> Option<Region> {
        self.used_little.then_some(self.memory)
    }

    /// The input buffer, and the number of bytes received.
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

    /// Removes received bytes; those after them move up.
    pub fn discard(&mut self, range: Range<usize>) {
        if range.start < range.end && range.end <= self.received {
            self.memory
                .copy_within(range.end..self.received, range.start);
            self.received -= range.len();
        }
    }

    /// Removes all of them.
    pub fn discard_received(&mut self) {
        self.received = 0;
    }

    /// Whether there are received bytes.
    pub fn has_received(&self) -> bool {
        self.received > 0
    }

    /// Whether bytes can be received, and a response to them would fit.
    pub fn has_room(&self) -> bool {
        self.received < INPUT && self.has_reserve()
    }

    /// Whether a response's head or a control frame fits after the queued bytes.
    pub fn has_reserve(&self) -> bool {
        INPUT + OUTPUT - self.unsent.end >= RESERVE
    }

    /// Reads from the socket, if it has data.
    pub fn receive(&mut self) {
        let end = INPUT.min(self.received + READ_AT_ONCE);
        let room = self.memory.get_mut(self.received..end).unwrap_or(&mut []);
        match files::read(&self.socket, room) {
            Ok(count @ 1..) => {
                self.received += count;
                self.used_little &= self.received <= REUSE_LIMIT;
            }
            Err(Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.broken = true,
        }
    }

    /// Whether all that was queued is sent.
    pub fn is_sent(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Whether the host may hold some of the sent bytes until the client reads them.
    pub fn may_be_unread(&self) -> bool {
        self.sent > HOST_BUFFER
    }

    /// Discards unsent bytes.
    #[cfg(feature = "tunnel")]
    pub fn drop_unsent(&mut self) {
        self.unsent = INPUT..INPUT;
    }

    /// The free part of the output buffer without the [`RESERVE`]; follow with [`commit`](Self::commit).
    pub fn spare(&mut self) -> &mut [u8] {
        let end = INPUT + OUTPUT - RESERVE;
        self.memory.get_mut(self.unsent.end..end).unwrap_or(&mut [])
    }

    /// Queues the first `count` bytes of [`spare`](Self::spare).
    pub fn commit(&mut self, count: usize) {
        self.unsent.end = self.unsent.end.saturating_add(count).min(INPUT + OUTPUT);
    }

    /// Queues a binary message of at most [`MAX_OUTPUT`] bytes, `first` included. Call when nothing is queued.
    pub fn queue_message(&mut self, first: Option<u8>, bytes: &[u8]) {
        let length = usize::from(first.is_some()) + bytes.len();
        self.queue(FrameHeader::new(Opcode::Binary, length).as_bytes());
        self.queue(first.as_slice());
        self.queue(bytes);
    }

    /// Queues bytes. Breaks the connection if they do not fit.
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

    /// Sends what the socket accepts. Returns whether that was anything.
    pub fn send(&mut self) -> bool {
        let before = self.unsent.start;
        self.used_little &= self.unsent.end <= INPUT + REUSE_LIMIT;
        while !self.unsent.is_empty() {
            let bytes = self.memory.get(self.unsent.clone()).unwrap_or(&[]);
            match files::send(&self.socket, bytes) {
                Ok(count) => {
                    self.unsent.start += count;
                    self.sent = self.sent.saturating_add(count as u64);
                }
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

    /// Queues the head of a JSON response.
    pub fn queue_head(&mut self, status: Status, content: Content) {
        self.queue_head_with(status, content, JSON, None);
    }

    /// Queues the head of a response with content of a media type, and an additional header. Breaks the
    /// connection if it does not fit.
    pub fn queue_head_with(
        &mut self,
        status: Status,
        content: Content,
        media_type: &str,
        header: Option<(&str, &dyn Display)>,
    ) {
        let end = self.unsent.end.saturating_add(HEAD_ROOM);
        let room = self.memory.get_mut(self.unsent.end..end);
        let mut head = ResponseHead::new(room.unwrap_or(&mut []));
        head.begin(status, self.reply, content, media_type);
        if let Some((name, value)) = header {
            head.header(name, value);
        }
        match head.finish() {
            Some(bytes) => self.unsent.end += bytes.len(),
            None => self.broken = true,
        }
    }

    /// Queues a whole JSON response that fits in a message.
    pub fn respond_with_text(&mut self, status: Status, body: &dyn Display) {
        self.respond(status, message!("{body}").as_bytes());
    }

    /// Queues a whole JSON response.
    pub fn respond(&mut self, status: Status, body: &[u8]) {
        self.queue_head(status, Content::Length(body.len() as u64));
        self.queue_body(body);
    }

    /// Queues the content of a response, unless it is one to HEAD.
    pub fn queue_body(&mut self, body: &[u8]) {
        if !self.reply.head_only {
            self.queue(body);
        }
    }

    /// Queues an error response.
    pub fn respond_error(&mut self, error: &CallError) {
        self.respond(error.status, error_body(&error.error).as_bytes());
    }
}

/// Decodes a request's body; its strings are stored in `memory`.
pub fn read_body<'a>(
    body: &mut [u8],
    memory: &'a mut [u8],
    request: &mut dyn Request<'a>,
) -> Result<(), CallError> {
    bodies::decode(body, &mut Arena::new(memory), request).map_err(CallError::bad_request)
}
