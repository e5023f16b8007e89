//! From a fork to a command: session, identity, directory, environment, execve.

use crate::context;
use crate::error::{self, Error, Result};
use crate::process::helper::HelperLog;
use crate::process::{credentials, rlimits};
use crate::sys::files;
use crate::sys::{self, SignalSet, Static};
use core::ffi::{CStr, c_char};
use core::ptr::null;
use proto::arena::Strings;
use proto::bytes::{find, split};
use proto::config::{ARGV, PATH};
use proto::environment::{self, ENV_ENTRIES, Environment};
use proto::rlimit::Rlimits;
use proto::users::Identity;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Exit code of a command that is not there.
const NOT_FOUND: i32 = 127;
/// Exit code of a command that is there and cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// What a child uses between fork and execve; in the parent it stays untouched.
struct Scratch {
    /// Of two lists, and null.
    argv: [*const c_char; 2 * ARGV + 1],
    environment: [*const c_char; ENV_ENTRIES + 1],
    path: [u8; PATH],
}

static SCRATCH: Static<Scratch> = Static::new(Scratch {
    argv: [null(); 2 * ARGV + 1],
    environment: [null(); ENV_ENTRIES + 1],
    path: [0; PATH],
});

/// Standard input, output and error of a command.
pub struct Streams<'a> {
    /// Without one it stays what PID 1's is: /dev/null.
    pub input: Option<&'a OwnedFd>,
    /// Standard output.
    pub output: &'a OwnedFd,
    /// Standard error.
    pub error: &'a OwnedFd,
}

/// First thing in a child: a session of its own, and no descriptors but its streams and its log.
pub fn enter_session(streams: &Streams, terminal: bool, log: &HelperLog) -> Result {
    rustix::process::setsid().map_err(context!("start a session"))?;
    let controlled = match streams.input {
        Some(input) if terminal => rustix::process::ioctl_tiocsctty(input),
        _ => Ok(()),
    };
    controlled
        .and_then(|()| sys::set_streams(streams.input, streams.output, streams.error))
        .map_err(context!("connect the standard streams"))?;
    sys::close_others(&[log.pipe()]);
    Ok(())
}

/// What a child becomes.
pub struct Command<'a> {
    /// The arguments, a list behind another; the first is the name to look for.
    pub argv: [Strings<'a>; 2],
    /// Who it runs as.
    pub identity: &'a Identity,
    /// Working directory, created if absent; empty is `/`.
    pub directory: &'a CStr,
    /// Its resource limits.
    pub rlimits: &'a Rlimits,
}

/// Why a child has not become a command, and its exit code.
pub struct Failure(Error, i32);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error, 1)
    }
}

impl Failure {
    fn new(error: Error) -> Self {
        Self(error, NOT_EXECUTABLE)
    }

    /// Reports it; the exit code.
    pub fn report(self, log: &HelperLog) -> i32 {
        log.fail(&self.0);
        self.1
    }
}

impl Command<'_> {
    /// Turns this process into the command; returns only when that failed.
    pub fn exec(&self, environment: &Environment) -> Failure {
        if let Err(errno) = self.enter_directory() {
            return Failure::new(error::on("enter", self.directory)(errno));
        }
        if let Err(error) = rlimits::apply(self.rlimits) {
            return Failure::new(error);
        }
        credentials::own_standard_streams(self.identity);
        if let Err(errno) = credentials::drop_to(self.identity) {
            return Failure::new(context!("become the user")(errno));
        }
        let Some(scratch) = SCRATCH.take() else {
            return Failure::new(context!("execute")(Errno::NOMEM));
        };
        let mut slots = scratch.argv.iter_mut();
        let mut name = None;
        for list in &self.argv {
            for argument in list.iter() {
                name = name.or(Some(argument));
                if let Some(slot) = slots.next() {
                    *slot = argument.as_ptr();
                }
            }
        }
        for (slot, entry) in scratch.environment.iter_mut().zip(environment.iter()) {
            *slot = sys::c_str(entry).as_ptr();
        }
        sys::block_signals(SignalSet::EMPTY);
        let name = name.unwrap_or(c"");
        let errno = search(name, environment, scratch);
        let mut failure = Failure::new(error::on("execute", name)(errno));
        if is_missing(errno) {
            failure.1 = NOT_FOUND;
        }
        failure
    }

    fn enter_directory(&self) -> Result<(), Errno> {
        if self.directory.is_empty() {
            return Ok(());
        }
        let enter = || rustix::process::chdir(self.directory);
        match enter() {
            Err(Errno::NOENT) => {
                files::make_directories(self.directory.to_bytes()).and_then(|()| enter())
            }
            other => other,
        }
    }
}

/// Tries the command in the directories of PATH, as execvp(3) does; a name with `/` is a path.
fn search(name: &CStr, environment: &Environment, scratch: &mut Scratch) -> Errno {
    let execute = |path: &CStr| {
        // SAFETY: both vectors end with null, and point at NUL-terminated strings that stay.
        unsafe { sys::execve(path, scratch.argv.as_ptr(), scratch.environment.as_ptr()) }
    };
    let mut failure = Errno::NOENT;
    if name.is_empty() {
        return failure;
    }
    if find(name.to_bytes(), b'/').is_some() {
        return execute(name);
    }
    let path = environment.get(b"PATH=").unwrap_or(environment::PATH);
    for directory in split(path, b':') {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() {
            b"."
        } else {
            directory
        };
        let parts = [directory, b"/", name.to_bytes()];
        let Some(candidate) = files::join(&parts, &mut scratch.path) else {
            continue;
        };
        match execute(candidate) {
            errno if is_missing(errno) => {}
            Errno::ACCESS => failure = Errno::ACCESS,
            errno => return errno,
        }
    }
    failure
}

/// Whether a command is not there, other than that it cannot be executed.
fn is_missing(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR)
}
