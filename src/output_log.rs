//! The workload's last output, kept for API clients.
#![cfg_attr(
    not(feature = "logs"),
    allow(dead_code, reason = "nobody reads it: none is kept")
)]

use crate::sys::Region;
use proto::docker_frames::Stream;
use proto::ring::{Cursor, Ring};

/// Memory in addition to the log's size, in bytes, so that few pieces of output are split at the end of
/// the memory: a follower is a quarter faster.
const SPARE: usize = 36 << 10;

/// Where the workload's output goes: `PIGEON_OUTPUT` on the kernel command line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// To the console and to the log.
    Both,
    /// To the console only.
    Console,
    /// To the log only: a serial console costs a VM exit per byte.
    Log,
}

/// The workload's last output.
pub struct OutputLog {
    /// Has no memory if no log is kept.
    ring: Ring<Region>,
    /// The position from which the slowest follower still needs output; without a follower, the oldest
    /// output is dropped.
    keep: u64,
    /// No more output will come.
    ended: bool,
}

impl OutputLog {
    /// No log.
    pub fn none() -> Self {
        Self::of(Region::default())
    }

    /// A log that keeps `size` bytes; no log if there is no memory for it.
    pub fn new(size: usize) -> Self {
        Self::of(Region::new(size.saturating_add(SPARE)).unwrap_or_default())
    }

    fn of(memory: Region) -> Self {
        Self {
            ring: Ring::new(memory),
            keep: u64::MAX,
            ended: false,
        }
    }

    /// Whether a log is kept.
    pub fn is_kept(&self) -> bool {
        self.ring.has_memory()
    }

    /// Free space for output, in bytes; 0 while a follower has to read first.
    pub fn room(&self) -> usize {
        match cfg!(feature = "logs") {
            true => self.ring.room(self.keep),
            false => 0,
        }
    }

    /// Appends output, no more than there is [`room`](Self::room) for.
    pub fn write(&mut self, stream: Stream, output: &[u8]) {
        if cfg!(feature = "logs") {
            self.ring.push(stream as u8, output, self.keep);
        }
    }

    /// Sets the position from which the slowest follower needs output.
    pub fn set_keep(&mut self, keep: u64) {
        self.keep = keep;
    }

    /// Marks the output as complete.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the output is complete.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Total number of bytes of output.
    pub fn written(&self) -> u64 {
        self.ring.written()
    }

    /// A cursor at an offset, or at the nearest one that is kept.
    pub fn seek(&self, offset: u64) -> Cursor {
        self.ring.seek(offset)
    }

    /// The bytes at a cursor; `None` when everything was read.
    pub fn read(&self, cursor: &mut Cursor) -> Option<(Stream, &[u8])> {
        let (stream, bytes) = self.ring.read(cursor)?;
        let stream = match stream {
            2 => Stream::Stderr,
            _ => Stream::Stdout,
        };
        Some((stream, bytes))
    }

    /// Marks `count` bytes of the last [`read`](Self::read) as consumed.
    pub fn advance(&self, cursor: &mut Cursor, count: usize) {
        self.ring.advance(cursor, count);
    }
}
