//! The process of a command, and PID 1's ends of its streams.

use crate::context::{CommandDefaults, Context};
#[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
use crate::error::Discard;
use crate::error::{Error, Result};
use crate::process::channel::Channel;
use crate::process::exec::{Command, Input, Launch, Streams};
use crate::process::helper::Reports;
#[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
use crate::process::helper::{self, Helper, HelperLog};
use crate::process::pipe;
use crate::sys::signal::SIGKILL;
use crate::sys::{self, GuestFile, GuestThreads, Inherited};
use proto::bodies::CommandSpec;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, WaitStatus};

/// The process of a command, which leads a process group.
pub struct Process {
    /// Until it is reaped.
    pid: Option<Pid>,
    /// How it ended.
    status: Option<WaitStatus>,
    /// It was killed.
    killed: bool,
    origin: Origin,
}

/// How it was started, and so how it reports errors.
enum Origin {
    /// A command.
    Launch(Launch),
    /// A child of this program, with the pipe that it reports through.
    #[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
    Helper(OwnedFd),
}

impl Process {
    /// Starts a command on pipes: with a standard input if `has_input`, and with its standard error separate
    /// from its output if `has_error`.
    pub fn start_on_pipes(
        spec: &CommandSpec,
        has_input: bool,
        has_error: bool,
        context: &Context,
    ) -> Result<(Self, Pipes)> {
        let (output, their_output) = pipe::output()?;
        let input = has_input.then(pipe::input).transpose()?;
        let error = has_error.then(pipe::output).transpose()?;
        let their_error = error.as_ref().map_or(&their_output, |(_, theirs)| theirs);
        let streams = Streams {
            input: match &input {
                Some((_, theirs)) => Input::Pipe(Inherited::new(theirs)),
                None => Input::Null,
            },
            output: Inherited::new(&their_output),
            error: Inherited::new(their_error),
        };
        let launch = Self::launch(spec, streams, context)?;
        let (input, their_input) = input.unzip();
        let (error, their_error) = error.unzip();
        let threads = context.guest_threads;
        launch.resume([their_input, Some(their_output), their_error]);
        let channel = |end| Channel::new(end, threads);
        let pipes = Pipes {
            input: channel(input),
            output: channel(Some(output)),
            error: channel(error),
            slave: None,
        };
        Ok((Self::of(launch.pid, Origin::Launch(launch)), pipes))
    }

    /// Starts a command with these streams.
    pub fn start(spec: &CommandSpec, streams: Streams, context: &Context) -> Result<Self> {
        let launch = Self::launch(spec, streams, context)?;
        launch.resume([const { None }; 3]);
        Ok(Self::of(launch.pid, Origin::Launch(launch)))
    }

    fn launch(spec: &CommandSpec, streams: Streams, context: &Context) -> Result<Launch> {
        let cgroup = context.cgroups.commands.as_ref();
        Launch::start(cgroup, &mut |command| {
            command.streams = Some(streams);
            describe(spec, context.defaults, command)
        })
    }

    /// Starts a child of this program, which exits with the code that `work` returns.
    #[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
    pub fn fork(proc: &OwnedFd, work: &mut dyn FnMut(&HelperLog) -> i32) -> Result<Self> {
        let Helper { pid, log } = helper::fork_oom_protected(proc, work)?;
        Ok(Self::of(pid, Origin::Helper(log)))
    }

    fn of(pid: Pid, origin: Origin) -> Self {
        Self {
            pid: Some(pid),
            status: None,
            killed: false,
            origin,
        }
    }

    /// Whether this is its pid; false once it is reaped.
    pub fn has_pid(&self, pid: Pid) -> bool {
        self.pid == Some(pid)
    }

    /// Its pid, until it is reaped.
    pub fn pid(&self) -> Option<i32> {
        self.pid.map(Pid::as_raw_pid)
    }

    /// Whether it has not been reaped yet.
    pub fn is_running(&self) -> bool {
        self.pid.is_some()
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<WaitStatus> {
        self.status
    }

    /// Whether it has exited or was killed: then only what is left is read from its streams.
    pub fn is_finished(&self) -> bool {
        self.killed || self.status.is_some()
    }

    /// Whether it was killed.
    pub fn was_killed(&self) -> bool {
        self.killed
    }

    /// Whether it has reported progress since the last call ([`HelperLog::step`]).
    #[cfg(feature = "files")]
    pub fn made_progress(&mut self) -> bool {
        self.take_reports().step.is_some()
    }

    /// Kills its whole process group.
    pub fn kill(&mut self) {
        self.killed = true;
        if let Some(pid) = self.pid {
            let _gone = sys::kill_group(pid, SIGKILL);
        }
    }

    /// Records its exit status: it was reaped.
    pub fn set_exited(&mut self, status: WaitStatus) {
        self.pid = None;
        self.status = Some(status);
    }

    /// Frees the memory that it needed until execve.
    pub fn release_launch(&mut self) {
        match &mut self.origin {
            Origin::Launch(launch) => launch.release(),
            #[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
            Origin::Helper(_) => {}
        }
    }

    /// Why it could not be started, if it could not. Call once it has ended.
    pub fn failure(&mut self) -> Option<Error> {
        self.take_reports().error
    }

    /// What it has reported since the last call.
    pub fn take_reports(&mut self) -> Reports {
        match &mut self.origin {
            Origin::Launch(launch) => Reports {
                error: launch.failure(),
                ..Reports::default()
            },
            #[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
            Origin::Helper(log) => helper::read_reports(log, &mut Discard),
        }
    }
}

/// Fills in a command from the request and the workload's defaults.
fn describe(spec: &CommandSpec, defaults: &CommandDefaults, command: &mut Command) -> Result {
    let environment = &mut command.environment;
    environment.copy(&defaults.environment);
    if spec.tty {
        environment.set(b"TERM=xterm-256color", b"")?;
    }
    let mut sets_home = defaults.sets_home;
    for entry in spec.env {
        if let Some(home) = entry.to_bytes().strip_prefix(b"HOME=") {
            sets_home = !home.is_empty();
        }
        environment.set(entry.to_bytes(), b"")?;
    }
    command.set_arguments(&[spec.argv])?;
    command.set_directory(match spec.cwd.is_empty() {
        true => sys::c_str(&defaults.working_dir),
        false => spec.cwd,
    })?;
    command.rlimits = defaults.rlimits.clone();
    if !spec.user.is_empty() {
        return command.set_user(spec.user, !sets_home);
    }
    command.identity.set_root();
    if !sets_home {
        command.environment.set(b"HOME=", &defaults.root_home)?;
    }
    Ok(())
}

/// A pipe for a command's output: our non-blocking end, and the command's.
pub fn output_pipe(threads: &'static GuestThreads) -> Result<(Channel, OwnedFd)> {
    let (ours, theirs) = pipe::output()?;
    Ok((Channel::new(Some(ours), threads), theirs))
}

/// Our ends of a command's standard streams; missing ones are closed channels.
#[derive(Default)]
pub struct Pipes {
    /// Standard input, unless that is a terminal.
    pub input: Channel,
    /// Standard output, or a terminal's master.
    pub output: Channel,
    /// Standard error, unless that goes to `output`.
    pub error: Channel,
    /// A terminal's other end, kept open until the command has exited: a master whose other end is closed
    /// returns EIO, which need not be the end, and makes epoll spin.
    pub slave: Option<GuestFile>,
}
