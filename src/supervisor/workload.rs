//! The workload: its start, its output, its exit.

use super::oom;
use super::state::{Phase, Supervisor};
use crate::context::{Exit, NEVER};
use crate::error::Result;
use crate::output_log::{Destination, OutputLog};
use crate::process::channel::Channel;
use crate::process::exec::{Command, Input, Launch, Streams};
use crate::process::pipe;
use crate::supervisor::output::CopyResult;
use crate::sys::signal::SIGKILL;
use crate::sys::{GuestFile, Inherited, files};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::process::WaitStatus;

/// Exit code of a process killed by a signal, minus the signal's number, as in a shell.
pub(super) const SIGNAL_BASE: i32 = 128;

/// How long PID 1 leaves the processor to the new workload, in milliseconds: execve(2) reads a disk.
const HEAD_START: u64 = 5;

/// Pieces of output copied at once after the exit: together more than a pipe holds (pipe(7)).
pub(super) const MAX_PIECES: usize = 8;

impl Supervisor {
    /// Sets where the workload's output goes.
    pub fn set_output(&mut self, destination: Destination, log: OutputLog) {
        // There may have been no memory for the log.
        self.output.destination = match log.is_kept() {
            true => destination,
            false => Destination::Console,
        };
        self.context.output_log = log;
    }

    /// Starts the workload, which runs as `uid`.
    ///
    /// Standard output and error are one pipe, which keeps their order, unless `separate_stderr`.
    pub fn start_workload(
        &mut self,
        uid: u32,
        separate_stderr: bool,
        describe: &dyn Fn(&mut Command) -> Result,
    ) -> Result {
        self.kernel_log = files::open(c"/dev/kmsg", OFlags::NONBLOCK).ok();
        let threads = self.context.guest_threads;
        let (output, their_output) = pipe::output()?;
        let errors = match separate_stderr {
            true => Some(pipe::output()?),
            false => None,
        };
        let their_errors = errors.as_ref().map_or(&their_output, |(_, theirs)| theirs);
        // Root gets the console itself.
        let their_input = match uid {
            0 => None,
            _ => self.open_console_pipe()?,
        };
        let streams = Streams {
            input: match (&their_input, self.console.input()) {
                (Some(pipe), _) => Input::Pipe(Inherited::new(pipe)),
                (None, Some((directory, name))) if uid == 0 => {
                    Input::Device(Inherited::new(directory), name)
                }
                _ => Input::Null,
            },
            output: Inherited::new(&their_output),
            error: Inherited::new(their_errors),
        };
        let environment = &self.context.defaults.environment;
        let launch = Launch::start(self.context.cgroups.workload.as_ref(), &mut |command| {
            command.streams = Some(streams);
            command.environment.copy(environment);
            describe(command)
        })?;
        let (errors, their_errors) = errors.unzip();
        launch.resume([their_input, Some(their_output), their_errors]);
        let channel = |end| Channel::new(end, threads);
        self.output.open(channel(Some(output)), channel(errors));
        let pid = launch.pid;
        self.context.workload.group = Some(pid);
        self.workload = Some(launch);
        let pid = pid.as_raw_pid();
        let event = format_args!("{{\"event\":\"started\",\"pid\":{pid}}}");
        self.events.send(&event);
        self.enter(Phase::Running, NEVER);
        self.yield_to_workload();
        self.console
            .info(&"workload started", &format_args!(" pid={pid}"));
        Ok(())
    }

    /// Starts copying the console's input to a pipe. Returns the workload's end of it, `None` without a console.
    fn open_console_pipe(&mut self) -> Result<Option<OwnedFd>> {
        let Some(console) = self.console.reader() else {
            return Ok(None);
        };
        let (ours, theirs) = pipe::input()?;
        let ours = GuestFile::new(ours, self.context.guest_threads);
        self.input.open(console, ours);
        Ok(Some(theirs))
    }

    /// Yields the processor to the workload until it has started, or until an event arrives: on a single
    /// processor, PID 1 would otherwise continue before it.
    fn yield_to_workload(&mut self) {
        self.watch();
        self.context.poller.wait(HEAD_START);
        self.events.flush();
    }

    /// Frees the memory that the workload needed until execve.
    pub(super) fn release_launch(&mut self) {
        if let Some(workload) = &mut self.workload {
            workload.release();
        }
    }

    /// Handles the exit of the workload's process.
    pub(super) fn on_workload_exit(&mut self, mut workload: Launch, status: WaitStatus) {
        if let Some(error) = workload.failure() {
            self.console.error(&error);
        }
        let signal = status.terminating_signal();
        let pid = workload.pid.as_raw_pid() as u32;
        let oom_killed = signal == Some(SIGKILL as i32)
            && self
                .kernel_log
                .as_ref()
                .is_some_and(|log| oom::was_oom_killed(log, pid, self.context.temp));
        let code = match status.exit_status() {
            Some(code) => code,
            None => SIGNAL_BASE + signal.unwrap_or(0),
        };
        self.unlogged_exit = Some((code, oom_killed));
        self.finish_output();
        self.set_exit(Exit {
            code,
            oom_killed,
            error: None,
        });
    }

    /// Copies the remaining output, and logs the exit after it. Returns true if there may be more output.
    pub(super) fn finish_output(&mut self) -> bool {
        self.api.protect_log(&mut self.context);
        let log = &mut self.context.output_log;
        let copied = self.output.copy(MAX_PIECES, self.console, log);
        // Other processes may keep the pipes open indefinitely, and locked until they are killed.
        let is_complete = match copied {
            CopyResult::Drained => true,
            CopyResult::Locked => self.phase == Phase::DrainingConsole,
            CopyResult::Full | CopyResult::More => false,
        };
        if is_complete {
            log.end();
        }
        self.api.on_output(&mut self.context);
        if is_complete
            && self.console.room() > 0
            && let Some((code, oom_killed)) = self.unlogged_exit.take()
        {
            let fields = format_args!(" exit_code={code} oom_killed={oom_killed}");
            self.console.info(&"workload exited", &fields);
        }
        copied == CopyResult::More
    }
}
