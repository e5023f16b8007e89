//! The workload's last output, for those who read it over the API.
#![cfg_attr(
    not(feature = "logs"),
    allow(dead_code, reason = "nobody reads it: none is kept")
)]

use crate::sys::Region;
use proto::docker_frames::Stream;
use proto::ring::{self, Cursor, Ring};

/// Where the workload's output goes: `PIGEON_OUTPUT` on the kernel command line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// To the console and to the log.
    Both,
    /// To the console only.
    Console,
    /// To the log only: a serial console costs one exit of the VM a byte.
    Log,
}

/// The workload's last output.
pub struct OutputLog {
    ring: Option<Ring<Region>>,
    /// What the slowest follower still needs; without one the oldest goes.
    keep: u64,
    /// There will be no more.
    ended: bool,
}

impl OutputLog {
    /// No log.
    pub const fn none() -> Self {
        Self {
            ring: None,
            keep: u64::MAX,
            ended: false,
        }
    }

    /// A log that keeps so many bytes; without memory for it there is none.
    pub fn new(size: usize) -> Self {
        let memory = Region::new(size.saturating_add(ring::PIECE));
        Self {
            ring: memory.ok().map(Ring::new),
            ..Self::none()
        }
    }

    /// Whether there is a log.
    pub fn is_kept(&self) -> bool {
        self.ring.is_some()
    }

    /// Room for output of a stream: none while a follower has to read first.
    pub fn room(&mut self, stream: Stream) -> &mut [u8] {
        match &mut self.ring {
            Some(ring) => ring.room(stream as u8, self.keep),
            None => &mut [],
        }
    }

    /// Keeps the first `count` bytes of the last [`room`](Self::room).
    pub fn commit(&mut self, stream: Stream, count: usize) {
        if let Some(ring) = &mut self.ring {
            ring.commit(stream as u8, count);
        }
    }

    /// Says what the slowest follower needs.
    pub fn set_keep(&mut self, keep: u64) {
        self.keep = keep;
    }

    /// All output has come.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether all output has come.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// How many bytes of output have come.
    pub fn written(&self) -> u64 {
        self.ring.as_ref().map_or(0, Ring::written)
    }

    /// A reader's place at an offset, or the nearest one there is.
    pub fn seek(&self, offset: u64) -> Cursor {
        self.ring
            .as_ref()
            .map_or(Cursor::default(), |ring| ring.seek(offset))
    }

    /// The bytes at a reader's place; `None` when it has read everything.
    pub fn read(&self, cursor: &mut Cursor) -> Option<(Stream, &[u8])> {
        let (stream, bytes) = self.ring.as_ref()?.read(cursor)?;
        let stream = match stream {
            2 => Stream::Stderr,
            _ => Stream::Stdout,
        };
        Some((stream, bytes))
    }

    /// So many of those bytes are done with.
    pub fn advance(&self, cursor: &mut Cursor, count: usize) {
        if let Some(ring) = &self.ring {
            ring.advance(cursor, count);
        }
    }
}
