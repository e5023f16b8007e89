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

/// The result of a copy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Copied {
    /// Nothing waits.
    Drained,
    /// There is no room for it.
    Full,
    /// It was copied: there may be more.
    More,
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

    /// Copies at most `pieces` pieces of each stream, as far as there is room for them: not for as long as
    /// output comes, as others wait, too.
    pub fn copy(&mut self, pieces: usize, console: &mut Console, log: &mut OutputLog) -> Copied {
        let mut all = Copied::Drained;
        for pipe in &mut self.pipes {
            let mut copied = Copied::More;
            for _ in 0..pieces {
                copied = pipe.copy(self.destination, console, log);
                if copied != Copied::More {
                    break;
                }
            }
            all = all.max(copied);
        }
        if self.pipes.iter().all(|pipe| pipe.end.is_none()) {
            log.end();
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
    ) -> Copied {
        let Some(end) = &self.end else {
            return Copied::Drained;
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
            Ok(1..) => Copied::More,
            Err(Errno::NOBUFS) => Copied::Full,
            Err(Errno::AGAIN) => Copied::Drained,
            Ok(_) | Err(_) => {
                self.end = None;
                Copied::Drained
            }
        }
    }
}

/// Reads once: EAGAIN when nothing waits, ENOBUFS without room.
fn read_piece(end: &OwnedFd, room: &mut [u8]) -> Result<usize, Errno> {
    match room.is_empty() {
        true => Err(Errno::NOBUFS),
        false => files::read(end, room),
    }
}
