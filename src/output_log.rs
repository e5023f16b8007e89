//! The workload's last output, for those who read it over the API.
#![cfg_attr(
    not(feature = "logs"),
    allow(dead_code, reason = "nobody reads it: none is kept")
)]

use crate::sys::Region;
use proto::docker_frames::Stream;
use proto::ring::{Cursor, Ring};

/// Memory beside what is to be kept, in bytes, so that a piece of output is seldom cut in two by the
/// memory's end: a follower gets a quarter more in the same time.
const SPARE: usize = 36 << 10;

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
    /// Without memory when none is kept.
    ring: Ring<Region>,
    /// What the slowest follower still needs; without one the oldest goes.
    keep: u64,
    /// There will be no more.
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

    /// Whether there is a log.
    pub fn is_kept(&self) -> bool {
        self.ring.has_memory()
    }

    /// Room for output: none while a follower has to read first.
    pub fn room(&self) -> usize {
        match cfg!(feature = "logs") {
            true => self.ring.room(self.keep),
            false => 0,
        }
    }

    /// Keeps output, for which there is [`room`](Self::room).
    pub fn write(&mut self, stream: Stream, output: &[u8]) {
        if cfg!(feature = "logs") {
            self.ring.push(stream as u8, output, self.keep);
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
        self.ring.written()
    }

    /// A reader's place at an offset, or the nearest one there is.
    pub fn seek(&self, offset: u64) -> Cursor {
        self.ring.seek(offset)
    }

    /// The bytes at a reader's place; `None` when it has read everything.
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
