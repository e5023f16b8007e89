//! The process of a command, and our ends of its streams.

use crate::context::{CommandDefaults, Context, Source};
use crate::error::{Discard, Error, Result};
use crate::process::exec::{self, Command, Failure, Streams};
use crate::process::helper::{self, Helper, HelperLog, Lines};
use crate::process::{credentials, pipe};
use crate::sys::signal::SIGKILL;
use crate::sys::{self, files};
use core::ffi::CStr;
use proto::arena::Strings;
use proto::slab::Key;
use proto::users::Identity;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, WaitStatus};

/// What a pipe can be made to hold (pipe-max-size, pipe(7)): all that a command that has ended can
/// have left in it.
const PIPE: usize = 1 << 20;

/// What a command is.
pub struct Spec<'a> {
    /// Its arguments; the first is the name to look for.
    pub argv: Strings<'a>,
    /// Set on top of the workload's environment.
    pub env: Strings<'a>,
    /// Its working directory; empty is the workload's.
    pub cwd: &'a CStr,
    /// Who it runs as; empty is root.
    pub user: &'a str,
    /// Its streams are a terminal.
    pub tty: bool,
}

/// The process of a command, which leads a process group.
pub struct Process {
    /// Until it is reaped.
    pid: Option<Pid>,
    /// How it ended.
    status: Option<WaitStatus>,
    /// It was killed.
    killed: bool,
    log: OwnedFd,
}

impl Process {
    /// Starts a command with these streams.
    pub fn start(spec: &Spec, streams: &Streams, context: &mut Context) -> Result<Self> {
        let Context {
            defaults,
            scratch,
            cgroups,
            ..
        } = context;
        let child = helper::spawn(cgroups.commands.as_ref(), &mut |log| {
            exec_command(spec, streams, defaults, scratch, log)
                .unwrap_or_else(Failure::from)
                .report(log)
        })?;
        Ok(Self::of(child))
    }

    /// Starts a child of this program, which exits with the code that `work` returns.
    #[cfg(any(feature = "files", feature = "mounts", feature = "sysinfo"))]
    pub fn fork(proc: &OwnedFd, work: &mut dyn FnMut(&HelperLog) -> i32) -> Result<Self> {
        helper::spawn_spared(proc, work).map(Self::of)
    }

    fn of(Helper { pid, log }: Helper) -> Self {
        Self {
            pid: Some(pid),
            status: None,
            killed: false,
            log,
        }
    }

    /// Whether this is its process, not reaped yet.
    pub fn is(&self, pid: Pid) -> bool {
        self.pid == Some(pid)
    }

    /// Its number, until it is reaped.
    pub fn pid(&self) -> Option<i32> {
        self.pid.map(Pid::as_raw_pid)
    }

    /// Whether it was not reaped yet.
    pub fn runs(&self) -> bool {
        self.pid.is_some()
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<WaitStatus> {
        self.status
    }

    /// Whether it has ended, or was killed: then nothing new is to be read from its streams.
    pub fn is_over(&self) -> bool {
        self.killed || self.status.is_some()
    }

    /// Whether it was killed.
    pub fn was_killed(&self) -> bool {
        self.killed
    }

    /// Whether it has said since it was last asked that it gets on ([`HelperLog::step`]).
    #[cfg(feature = "files")]
    pub fn has_moved(&self) -> bool {
        self.lines().step.is_some()
    }

    /// Kills its whole process group.
    pub fn kill(&mut self) {
        self.killed = true;
        if let Some(pid) = self.pid {
            let _gone = sys::kill_group(pid, SIGKILL);
        }
    }

    /// It was reaped.
    pub fn ended(&mut self, status: WaitStatus) {
        self.pid = None;
        self.status = Some(status);
    }

    /// Why it could not be started, if so; to be asked when it has ended.
    pub fn failure(&self) -> Option<Error> {
        self.lines().error
    }

    /// What it has said since it was last asked.
    pub fn lines(&self) -> Lines {
        helper::read_lines(&self.log, &mut Discard)
    }
}

/// In the child: becomes the command.
fn exec_command(
    spec: &Spec,
    streams: &Streams,
    defaults: &mut CommandDefaults,
    scratch: &mut [u8],
    log: &HelperLog,
) -> Result<Failure> {
    exec::enter_session(streams, spec.tty, log)?;
    let mut identity = Identity::default();
    if spec.user.is_empty() {
        identity.set_root();
        identity.home = defaults.root_home.clone();
    } else {
        credentials::resolve(spec.user, scratch, &mut identity)?;
    }
    if !defaults.sets_home {
        defaults.environment.set(b"HOME=", &identity.home)?;
    }
    if spec.tty {
        defaults.environment.set(b"TERM=xterm-256color", b"")?;
    }
    defaults.environment.set_all(spec.env)?;
    let directory = match spec.cwd.is_empty() {
        true => sys::c_str(&defaults.working_dir),
        false => spec.cwd,
    };
    let command = Command {
        argv: [spec.argv, Strings::default()],
        identity: &identity,
        directory,
        rlimits: &defaults.rlimits,
    };
    Ok(command.exec(&defaults.environment))
}

/// A pipe to read a command's output from: our end, which does not block, and the command's.
pub fn output_pipe() -> Result<(Channel, OwnedFd)> {
    let (ours, theirs) = pipe::output()?;
    Ok((Channel::new(ours), theirs))
}

/// A pipe to write a command's input to.
pub fn input_pipe() -> Result<(Channel, OwnedFd)> {
    let (ours, theirs) = pipe::input()?;
    Ok((Channel::new(ours), theirs))
}

/// Our end of a command's pipe or terminal, until the other end is closed.
#[derive(Default)]
pub struct Channel {
    end: Option<OwnedFd>,
    watched: EventFlags,
    /// Bytes read since the command was over.
    late: usize,
}

/// What a read of a channel gave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing waits.
    Empty,
    /// There will be nothing more: nobody has the other end open.
    End,
}

impl Channel {
    /// A channel that is open.
    pub fn new(end: OwnedFd) -> Self {
        Self {
            end: Some(end),
            ..Self::default()
        }
    }

    /// Our end, while it is open.
    pub fn end(&self) -> Option<&OwnedFd> {
        self.end.as_ref()
    }

    /// Closes our end.
    pub fn close(&mut self) {
        self.end = None;
    }

    /// Waits for `wanted` events; what is not waited for is not registered, as a hang-up is reported
    /// even to who asks for nothing.
    pub fn watch(&mut self, source: Source, key: Key, wanted: EventFlags, context: &Context) {
        if let Some(end) = &self.end {
            let token = source.token(key);
            context.poller.watch(end, token, &mut self.watched, wanted);
        }
    }

    /// Reads once. `over`: the command has ended. Others may write for ever into its pipe: no more is
    /// taken then than it can have left.
    pub fn read(&mut self, room: &mut [u8], over: bool) -> Read {
        let Some(end) = &self.end else {
            return Read::End;
        };
        let limit = room.len().min(PIPE - self.late);
        match files::read(end, room.get_mut(..limit).unwrap_or(&mut [])) {
            Ok(count @ 1..) => {
                if over {
                    self.late += count;
                }
                Read::Bytes(count)
            }
            Err(Errno::AGAIN) => Read::Empty,
            // EIO: a terminal whose other end nobody has open.
            Ok(_) | Err(_) => Read::End,
        }
    }

    /// Writes as much as is taken now; what nobody reads any more is taken and dropped.
    pub fn write(&self, bytes: &[u8]) -> usize {
        match self.end.as_ref().map(|end| files::write(end, bytes)) {
            Some(Ok(count)) => count,
            Some(Err(Errno::AGAIN)) => 0,
            Some(Err(_)) | None => bytes.len(),
        }
    }
}
