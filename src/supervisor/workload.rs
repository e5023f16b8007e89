//! The workload: its start, its output, its end.

use super::console::Console;
use super::phase::Phase;
use super::{SIGKILL, Supervisor, oom};
use crate::context;
use crate::context::{Context, Exit, NEVER, Source};
use crate::error::{Discard, Result};
use crate::output_log::{Destination, OutputLog};
use crate::process::exec::{self, Command, Failure, Streams};
use crate::process::helper::{self, Helper, HelperLog};
use crate::process::oom_score;
use crate::sys::files;
use proto::docker_frames::Stream;
use proto::environment::Environment;
use proto::message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::WaitStatus;

/// What a killed process's exit code is counted from, as in a shell.
const KILLED: i32 = 128;

/// Pieces of output copied at the end: together more than a pipe holds (pipe(7)).
const PIECES: usize = 8;

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

impl Supervisor {
    /// Says where the workload's output goes.
    pub fn set_output(&mut self, destination: Destination, log: OutputLog) {
        // Without memory for a log there is none.
        self.output.destination = match log.is_kept() {
            true => destination,
            false => Destination::Console,
        };
        self.context.output_log = log;
    }

    /// Starts the workload.
    ///
    /// Standard output and error are one pipe, which keeps their order, unless `separate_stderr`.
    pub fn start_workload(&mut self, command: &Command, separate_stderr: bool) -> Result {
        self.kernel_log = files::open(c"/dev/kmsg", OFlags::NONBLOCK).ok();
        let (output, their_output) = output_pipe()?;
        let errors = match separate_stderr {
            true => Some(output_pipe()?),
            false => None,
        };
        let their_errors = errors.as_ref().map_or(&their_output, |(_, theirs)| theirs);
        let environment = &self.context.defaults.environment;
        let console = &*self.console;
        let proc = &self.context.proc;
        let cgroup = self.context.cgroups.workload.as_ref();
        let child = helper::spawn(cgroup, &mut |log| {
            let streams = (&their_output, their_errors);
            exec_workload(command, environment, proc, console, streams, log)
                .unwrap_or_else(Failure::from)
                .report(log)
        })?;
        let [stdout, stderr] = &mut self.output.pipes;
        stdout.end = Some(output);
        stderr.end = errors.map(|(ours, _)| ours);
        self.context.workload.group = Some(child.pid);
        let pid = child.pid.as_raw_pid();
        self.console
            .info(&"workload started", &format_args!(" pid={pid}"));
        self.child = Some(child);
        self.enter(Phase::Running, NEVER);
        Ok(())
    }

    /// The workload's process was reaped.
    pub(super) fn workload_ended(&mut self, workload: Helper, status: WaitStatus) {
        if let Some(error) = helper::read_lines(&workload.log, &mut Discard).error {
            self.console.error(&error);
        }
        let signal = status.terminating_signal();
        let pid = workload.pid.as_raw_pid() as u32;
        let oom_killed = signal == Some(SIGKILL as i32)
            && self
                .kernel_log
                .as_ref()
                .is_some_and(|log| oom::killed(log, pid, self.context.sink));
        let code = match status.exit_status() {
            Some(code) => code,
            None => KILLED + signal.unwrap_or(0),
        };
        self.exit_fields = Some(message!(" exit_code={code} oom_killed={oom_killed}"));
        self.finish_output();
        self.context.workload.group = None;
        self.ended(Exit {
            code,
            oom_killed,
            error: None,
        });
    }

    /// Copies what is left of the output, and says behind it how the workload ended. True when there
    /// may be more.
    pub(super) fn finish_output(&mut self) -> bool {
        let log = &mut self.context.output_log;
        let more = self.output.copy(PIECES, self.console, log);
        self.api.on_output(&mut self.context);
        if !more
            && self.console.has_room()
            && let Some(fields) = self.exit_fields.take()
        {
            self.console.info(&"workload exited", &fields);
        }
        more
    }
}

/// A pipe for output: our end, which does not block, and the workload's.
fn output_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = helper::pipe()?;
    helper::set_blocking(&theirs)?;
    Ok((ours, theirs))
}

/// In the child: becomes the workload.
fn exec_workload(
    command: &Command,
    environment: &Environment,
    proc: &OwnedFd,
    console: &Console,
    (output, error): (&OwnedFd, &OwnedFd),
    log: &HelperLog,
) -> Result<Failure> {
    oom_score::set(proc, oom_score::DEFAULT)?;
    let input = console
        .open_input()
        .map_err(context!("open standard input"))?;
    let streams = Streams {
        input: Some(&input),
        output,
        error,
    };
    exec::enter_session(&streams, false, log)?;
    Ok(command.exec(environment))
}
