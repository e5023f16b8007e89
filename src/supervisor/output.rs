//! Copies the workload's output to the console and the log.

use crate::console::Console;
use crate::context::{Context, EventSource};
use crate::output_log::{Destination, OutputLog};
use crate::process::channel::Channel;
use proto::docker_frames::Stream;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;

/// The read ends of the workload's standard output and error.
pub struct Output {
    /// Where the output goes.
    pub destination: Destination,
    pipes: [Pipe; 2],
}

struct Pipe {
    stream: Stream,
    channel: Channel,
}

impl Pipe {
    fn closed(stream: Stream) -> Self {
        Self {
            stream,
            channel: Channel::default(),
        }
    }
}

/// The result of a copy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CopyResult {
    /// The pipe is empty.
    Drained,
    /// Another process holds the pipe's lock.
    Locked,
    /// The destination is full.
    Full,
    /// Something was copied, and there may be more.
    More,
}

impl Output {
    /// No output.
    pub fn new() -> Self {
        Self {
            destination: Destination::Console,
            pipes: [Pipe::closed(Stream::Stdout), Pipe::closed(Stream::Stderr)],
        }
    }

    /// Starts reading from these pipes.
    pub fn open(&mut self, output: Channel, errors: Channel) {
        let [stdout, stderr] = &mut self.pipes;
        stdout.channel = output;
        stderr.channel = errors;
    }

    /// Waits for output while the destination has room.
    pub fn watch(&mut self, console: &Console, context: &mut Context) {
        for pipe in &mut self.pipes {
            let wanted = match room(self.destination, console, &context.output_log) {
                1.. => EventFlags::IN,
                0 => EventFlags::empty(),
            };
            let source = match pipe.stream {
                Stream::Stdout => EventSource::WorkloadStdout,
                Stream::Stderr => EventSource::WorkloadStderr,
            };
            let token = source.token(Key::default());
            pipe.channel.watch(token, wanted, &context.poller);
        }
    }

    /// Whether a pending read has returned and can be copied: the poller does not report that.
    pub fn can_proceed(&self, console: &Console, log: &OutputLog) -> bool {
        let has_returned = self.pipes.iter().any(|pipe| pipe.channel.has_returned());
        has_returned && room(self.destination, console, log) > 0
    }

    /// Copies at most `pieces` pieces of each stream, as far as they fit: without a limit, a stream that
    /// never pauses would starve the event loop.
    pub fn copy(
        &mut self,
        pieces: usize,
        console: &mut Console,
        log: &mut OutputLog,
    ) -> CopyResult {
        let mut all = CopyResult::Drained;
        for pipe in &mut self.pipes {
            let mut copied = CopyResult::More;
            for _ in 0..pieces {
                copied = pipe.copy(self.destination, console, log);
                if copied != CopyResult::More {
                    break;
                }
            }
            all = all.max(copied);
        }
        all
    }
}

impl Pipe {
    fn copy(
        &mut self,
        destination: Destination,
        console: &mut Console,
        log: &mut OutputLog,
    ) -> CopyResult {
        if !self.channel.is_open() {
            return CopyResult::Drained;
        }
        let room = room(destination, console, log);
        if room == 0 {
            return CopyResult::Full;
        }
        let count = self.channel.read(room, false, &mut |output| {
            if destination != Destination::Log {
                console.write(output);
            }
            if destination != Destination::Console {
                log.write(self.stream, output);
            }
        });
        match count {
            1.. => CopyResult::More,
            0 if self.channel.is_locked() => CopyResult::Locked,
            0 => CopyResult::Drained,
        }
    }
}

/// How much output the destination accepts now, in bytes.
fn room(destination: Destination, console: &Console, log: &OutputLog) -> usize {
    match destination {
        Destination::Console => console.room(),
        Destination::Log => log.room(),
        Destination::Both => console.room().min(log.room()),
    }
}
