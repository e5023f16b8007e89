//! The workload's output, on its way to the console and to the log.

use crate::console::Console;
use crate::context::{Context, Source};
use crate::output_log::{Destination, OutputLog};
use crate::sys::files;
use proto::docker_frames::Stream;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// The workload's standard output and error: our ends of their pipes.
pub struct Output {
    /// Where it goes.
    pub destination: Destination,
    pipes: [Pipe; 2],
}

struct Pipe {
    stream: Stream,
    end: Option<OwnedFd>,
    watched: EventFlags,
}

impl Pipe {
    const fn closed(stream: Stream) -> Self {
        Self {
            stream,
            end: None,
            watched: EventFlags::empty(),
        }
    }
}

/// What became of a piece of output.
#[derive(PartialEq, Eq)]
enum Copied {
    /// It was copied: there may be more.
    Some,
    /// There is none, or no room for it.
    None,
}

impl Output {
    /// No output.
    pub const fn new() -> Self {
        Self {
            destination: Destination::Console,
            pipes: [Pipe::closed(Stream::Stdout), Pipe::closed(Stream::Stderr)],
        }
    }

    /// From now on output comes from these pipes.
    pub fn open(&mut self, output: OwnedFd, errors: Option<OwnedFd>) {
        let [stdout, stderr] = &mut self.pipes;
        stdout.end = Some(output);
        stderr.end = errors;
    }

    /// Waits for output while there is room for it.
    pub fn watch(&mut self, console: &Console, context: &mut Context) {
        for pipe in &mut self.pipes {
            let Some(end) = &pipe.end else {
                continue;
            };
            let has_room = match self.destination {
                Destination::Console => console.has_room(),
                Destination::Log => !context.output_log.room(pipe.stream).is_empty(),
                Destination::Both => {
                    console.has_room() && !context.output_log.room(pipe.stream).is_empty()
                }
            };
            let wanted = match has_room {
                true => EventFlags::IN,
                false => EventFlags::empty(),
            };
            let source = match pipe.stream {
                Stream::Stdout => Source::Workload,
                Stream::Stderr => Source::WorkloadError,
            };
            let token = source.token(Key::default());
            context.poller.watch(end, token, &mut pipe.watched, wanted);
        }
    }

    /// Copies so many pieces of each stream, as far as there is room for them: not for as long as
    /// output comes, as others wait, too. True when there may be more.
    pub fn copy(&mut self, pieces: usize, console: &mut Console, log: &mut OutputLog) -> bool {
        let mut more = false;
        for pipe in &mut self.pipes {
            let copied =
                (0..pieces).all(|_| pipe.copy(self.destination, console, log) == Copied::Some);
            more |= copied && pieces > 0;
        }
        if self.pipes.iter().all(|pipe| pipe.end.is_none()) {
            log.end();
        }
        more
    }
}

impl Pipe {
    fn copy(
        &mut self,
        destination: Destination,
        console: &mut Console,
        log: &mut OutputLog,
    ) -> Copied {
        let Some(end) = &self.end else {
            return Copied::None;
        };
        let read = match destination {
            Destination::Console => {
                let read = read_piece(end, console.room());
                console.commit(*read.as_ref().unwrap_or(&0));
                read
            }
            Destination::Log | Destination::Both => {
                let room = log.room(self.stream);
                let limit = match destination {
                    Destination::Both => console.room().len().min(room.len()),
                    _ => room.len(),
                };
                let room = room.get_mut(..limit).unwrap_or(&mut []);
                let read = read_piece(end, room);
                let count = *read.as_ref().unwrap_or(&0);
                if destination == Destination::Both {
                    console.write(room.get(..count).unwrap_or(&[]));
                }
                log.commit(self.stream, count);
                read
            }
        };
        match read {
            Ok(1..) => Copied::Some,
            Err(Errno::AGAIN) => Copied::None,
            Ok(_) | Err(_) => {
                self.end = None;
                Copied::None
            }
        }
    }
}

/// Reads once, when there is room: EAGAIN when nothing came.
fn read_piece(end: &OwnedFd, room: &mut [u8]) -> Result<usize, Errno> {
    match room.is_empty() {
        true => Err(Errno::AGAIN),
        false => files::read(end, room),
    }
}
