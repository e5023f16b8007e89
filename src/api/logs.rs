//! `GET /v1/logs`: the workload's output in Docker's frames, written from the log directly to the socket.

use super::error::CallError;
use super::io::Io;
use crate::context::Context;
use crate::error;
use crate::sys::files;
use core::fmt::{Display, Write};
use proto::decimal;
use proto::docker_frames::{self, MEDIA_TYPE};
use proto::http::{Content, LAST_CHUNK, Status, Target};
use proto::ring::Cursor;
use rustix::io::{Errno, IoSlice};

/// Most frames sent in one turn, so that other connections get theirs.
const FRAMES: usize = 8;

/// After a chunk's content.
const CRLF: &[u8] = b"\r\n";

/// Maximum length of a chunk's size line and a frame's header.
const PREFIX: usize = 32;

/// The parameters of a call.
#[derive(Clone, Copy, Default)]
pub struct LogsRequest {
    follow: bool,
    offset: u64,
}

impl LogsRequest {
    /// Reads `follow` and `offset`.
    pub fn parse(target: &Target) -> Result<Self, CallError> {
        let number = |name| match target.parameter(name) {
            None => Ok(0),
            Some(text) => decimal::parse(text.as_bytes())
                .ok_or_else(|| CallError::bad_request(error!("{name}: not a number"))),
        };
        Ok(Self {
            follow: number("follow")? != 0,
            offset: number("offset")?,
        })
    }
}

/// A reader of the log.
pub struct LogReader {
    cursor: Cursor,
    /// Offset at which to stop; `None`: at the end of the output.
    end: Option<u64>,
    chunked: bool,
    /// The frame being sent: what precedes its bytes, their number, and how much of it all is sent.
    prefix: heapless::Vec<u8, PREFIX>,
    length: usize,
    sent: usize,
}

/// What a reader did.
#[derive(PartialEq, Eq)]
pub enum Progress {
    /// It has sent everything available.
    Idle,
    /// The client has to read first, or other connections get their turn.
    Blocked,
    /// The response is complete.
    Done,
}

impl LogReader {
    /// Begins a response.
    pub fn start(request: LogsRequest, io: &mut Io, context: &Context) -> Result<Self, CallError> {
        let log = &context.output_log;
        if !log.is_kept() {
            let error = error!("the output is not kept: PIGEON_OUTPUT, PIGEON_LOG_KIB");
            return Err(CallError::new(Status::NotFound, error));
        }
        let cursor = log.seek(request.offset);
        let content = io.reply.stream();
        let offset = cursor.offset();
        let more = Some(("Log-Offset", &offset as &dyn Display));
        io.queue_head_with(Status::Ok, content, MEDIA_TYPE, more);
        Ok(Self {
            cursor,
            end: (!request.follow).then(|| log.written()),
            chunked: content == Content::Chunked,
            prefix: heapless::Vec::new(),
            length: 0,
            sent: 0,
        })
    }

    /// The position from which the log must be kept, so that the reader misses nothing.
    pub fn needs(&self) -> u64 {
        self.cursor.position()
    }

    /// Its position, to detect progress.
    pub fn position(&self) -> (u64, usize) {
        (self.cursor.offset(), self.sent)
    }

    /// Sends what is available and the socket accepts.
    pub fn proceed(&mut self, io: &mut Io, context: &Context) -> Progress {
        if io.reply.head_only {
            return Progress::Done;
        }
        for _ in 0..FRAMES {
            if self.length == 0 && !self.begin_frame(context) {
                let ended = match self.end {
                    Some(end) => self.cursor.offset() >= end,
                    None => context.output_log.has_ended(),
                };
                if !ended {
                    return Progress::Idle;
                }
                if self.chunked {
                    io.queue(LAST_CHUNK);
                }
                return Progress::Done;
            }
            match self.send_frame(io, context) {
                Ok(true) => {}
                Ok(false) => return Progress::Blocked,
                Err(_) => {
                    io.broken = true;
                    return Progress::Blocked;
                }
            }
        }
        Progress::Blocked
    }

    /// Begins a frame with the next bytes. Returns false if there are none to send.
    fn begin_frame(&mut self, context: &Context) -> bool {
        let Some((stream, bytes)) = context.output_log.read(&mut self.cursor) else {
            return false;
        };
        let left = self
            .end
            .map_or(u64::MAX, |end| end.saturating_sub(self.cursor.offset()));
        self.length = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
        let header = docker_frames::header(stream, self.length as u32);
        self.prefix.clear();
        self.sent = 0;
        // A chunk's size line (RFC 9112 section 7.1) is at most 18 bytes, and a header 8.
        if self.chunked {
            let _fits = write!(self.prefix, "{:x}\r\n", header.len() + self.length);
        }
        let _fits = self.prefix.extend_from_slice(&header);
        self.length > 0
    }

    /// Sends what the socket accepts of the frame. Returns whether the frame is complete.
    fn send_frame(&mut self, io: &Io, context: &Context) -> Result<bool, Errno> {
        let mut cursor = self.cursor;
        let bytes = context.output_log.read(&mut cursor).map(|(_, bytes)| bytes);
        let bytes = bytes.and_then(|bytes| bytes.get(..self.length));
        let end = if self.chunked { CRLF } else { &[] };
        let parts = [&self.prefix, bytes.unwrap_or(&[]), end];
        let mut skip = self.sent;
        let slices = parts.map(|part| {
            let start = skip.min(part.len());
            skip -= start;
            IoSlice::new(part.get(start..).unwrap_or(&[]))
        });
        let sent = match files::write_vectored(io.socket(), &slices) {
            // No contiguous memory for all of it: send one part.
            Err(Errno::NOMEM) => {
                let mut slices = slices.iter().map(IoSlice::as_slice);
                let next = slices.find(|slice| !slice.is_empty());
                files::send(io.socket(), next.unwrap_or(&[]))
            }
            sent => sent,
        };
        match sent {
            Ok(count) => self.sent += count,
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno),
        }
        let total = parts.iter().map(|part| part.len()).sum::<usize>();
        if self.sent < total {
            return Ok(false);
        }
        context.output_log.advance(&mut self.cursor, self.length);
        self.length = 0;
        Ok(true)
    }
}
