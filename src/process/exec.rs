//! Starts a command: session, streams, identity, directory, environment, execve.

use crate::context;
use crate::error;
use crate::error::{Error, Result};
use crate::process::{credentials, rlimits};
use crate::sys::{self, Inherited, Region, SignalSet, Spawn, files};
use core::ffi::{CStr, c_char};
use core::fmt::{self, Display, Write};
use core::ops::Range;
use core::ptr::null;
use proto::arena::Strings;
use proto::bytes::{find, split};
use proto::config::{MAX_ARGS, PATH_MAX};
use proto::environment::{self, ENV_ENTRIES, Environment};
use proto::message::{Message, ToLossy};
use proto::rlimit::Rlimits;
use proto::users::Identity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;

/// Exit code of a command that was not found.
const NOT_FOUND: i32 = 127;
/// Exit code of a command that cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// Maximum length of a `user:group`, in bytes.
const USER: usize = 512;

/// Standard input, output and error of a command.
#[derive(Clone, Copy)]
pub struct Streams {
    /// Standard input.
    pub input: Input,
    /// Standard output.
    pub output: Inherited,
    /// Standard error.
    pub error: Inherited,
}

/// Standard input of a command.
#[derive(Clone, Copy)]
pub enum Input {
    /// PID 1's own: /dev/null.
    Null,
    /// A pipe.
    Pipe(Inherited),
    /// A terminal, which becomes the session's controlling terminal.
    Terminal(Inherited),
    /// A device, by directory and name; /dev/null if it cannot be opened.
    Device(Inherited, &'static CStr),
}

/// A command to execute. Owns copies of all its data, as the parent continues meanwhile.
pub struct Command {
    /// Its standard input, output and error.
    pub streams: Option<Streams>,
    /// Who it runs as, unless `user` is set.
    pub identity: Identity,
    /// Its resource limits.
    pub rlimits: Rlimits,
    user: Option<User>,
    /// Its arguments, stored with the environment's strings.
    arguments: Range<usize>,
    directory: Range<usize>,
    /// Why the command could not be executed; empty on success.
    failure: Message,
    /// Its environment.
    pub environment: Environment,
    /// In the child: argv and envp, each null-terminated.
    pointers: heapless::Vec<*const c_char, { 2 * MAX_ARGS + ENV_ENTRIES + 2 }>,
}

/// A user to look up in the root's files. The child reads them, as a disk may hang.
struct User {
    name: heapless::String<USER>,
    /// Set HOME to that user's home directory.
    sets_home: bool,
    /// Buffer for the files.
    files: Region,
}

/// The command failed; [`Command::failure`] says why.
struct Failed;

/// A started command.
pub struct Launch {
    /// Its process.
    pub pid: Pid,
    child: Option<Spawn<Command>>,
}

impl Launch {
    /// Starts the command that `describe` fills in, in `cgroup`, or in PID 1's cgroup if that fails (root
    /// may have removed it). The child waits for [`resume`](Self::resume).
    pub fn start(
        cgroup: Option<&OwnedFd>,
        describe: &mut dyn FnMut(&mut Command) -> Result,
    ) -> Result<Self> {
        let failed = context!("start a process");
        let mut child = Spawn::new(Command::new, Command::run).map_err(&failed)?;
        if let Some(command) = child.value() {
            describe(command)?;
        }
        let started = child.start(cgroup).or_else(|_| child.start(None));
        let pid = started.map_err(failed)?;
        let child = Some(child);
        Ok(Self { pid, child })
    }

    /// Closes PID 1's copies of the child's ends of pipes, then lets the child continue.
    ///
    /// In this order, since the program may reopen a pipe, lock it and close its own end: PID 1's close would
    /// then be the last, and block.
    pub fn resume(&self, ends: [Option<OwnedFd>; 3]) {
        drop(ends);
        if let Some(child) = &self.child {
            child.resume();
        }
    }

    /// Frees the memory that the child needed until execve.
    pub fn release(&mut self) {
        let child = self.child.as_mut().and_then(Spawn::value);
        if child.is_some_and(|command| command.failure.is_empty()) {
            self.child = None;
        }
    }

    /// Why exec failed, if it did.
    pub fn failure(&mut self) -> Option<Error> {
        let failure = &self.child.as_mut()?.value()?.failure;
        (!failure.is_empty()).then(|| error!("{failure}"))
    }
}

impl Command {
    /// An empty command.
    fn new() -> Self {
        Self {
            streams: None,
            identity: Identity::default(),
            rlimits: Rlimits::new(),
            user: None,
            arguments: 0..0,
            directory: 0..0,
            failure: Message::new(),
            environment: Environment::new(),
            pointers: heapless::Vec::new(),
        }
    }

    /// Sets its arguments, from several lists; the first argument is also the program's name.
    pub fn set_arguments(&mut self, lists: &[Strings]) -> Result {
        self.arguments = self.environment.store(&[])?;
        for list in lists {
            self.arguments.end = self.environment.store(list.as_bytes())?.end;
        }
        Ok(())
    }

    /// Sets its working directory, which is created if missing; empty is `/`.
    pub fn set_directory(&mut self, directory: &CStr) -> Result {
        self.directory = self.environment.store(directory.to_bytes_with_nul())?;
        Ok(())
    }

    /// Sets the user, which the child looks up, and whether HOME is set to that user's home directory.
    pub fn set_user(&mut self, name: &str, sets_home: bool) -> Result {
        let unknown = |_| error!("unknown user {}", name.as_bytes().lossy());
        self.user = Some(User {
            name: heapless::String::try_from(name).map_err(unknown)?,
            sets_home,
            files: context::document_memory()?,
        });
        Ok(())
    }

    /// In the child: executes the command. Returns the exit code on failure.
    fn run(&mut self) -> i32 {
        match self.prepare() {
            Ok(()) => self.exec(),
            Err(Failed) => NOT_EXECUTABLE,
        }
    }

    fn prepare(&mut self) -> Result<(), Failed> {
        let Self {
            identity, failure, ..
        } = self;
        if let Some(streams) = &self.streams {
            let what = format_args!("connect the standard streams");
            enter_session(streams).map_err(|errno| note(failure, what, errno))?;
        }
        if let Some(user) = &mut self.user {
            let resolved = credentials::resolve(&user.name, &mut user.files, identity);
            resolved.map_err(|message| note_text(failure, &message))?;
            if user.sets_home {
                let set = self.environment.set(b"HOME=", &identity.home);
                set.map_err(|error| note_text(failure, &error))?;
            }
        }
        let directory = sys::c_str(self.environment.stored(self.directory.clone()));
        let what = format_args!("enter {}", directory.lossy());
        enter(directory).map_err(|errno| note(failure, what, errno))?;
        rlimits::apply(&self.rlimits).map_err(|(resource, errno)| {
            note(
                failure,
                format_args!("set the limit {}", resource.name()),
                errno,
            )
        })?;
        credentials::own_standard_streams(identity);
        let what = format_args!("become the user");
        credentials::drop_to(identity).map_err(|errno| note(failure, what, errno))
    }

    /// Executes it; returns only on failure.
    fn exec(&mut self) -> i32 {
        let arguments = Strings::new(self.environment.stored(self.arguments.clone()));
        // `pointers` has room for everything, both nulls included.
        for argument in arguments.iter().take(2 * MAX_ARGS) {
            let _fits = self.pointers.push(argument.as_ptr());
        }
        let _fits = self.pointers.push(null());
        let envp = self.pointers.len();
        for entry in self.environment.iter() {
            let _fits = self.pointers.push(sys::c_str(entry).as_ptr());
        }
        let _fits = self.pointers.push(null());
        sys::block_signals(SignalSet::EMPTY);
        let name = arguments.first().unwrap_or_default();
        let (argv, envp) = self.pointers.split_at_checked(envp).unwrap_or_default();
        let errno = search(name, &self.environment, argv, envp);
        let Failed = note(
            &mut self.failure,
            format_args!("execute {}", name.lossy()),
            errno,
        );
        match is_missing(errno) {
            true => NOT_FOUND,
            false => NOT_EXECUTABLE,
        }
    }
}

/// Records what failed, and why. In place, as the child must not map memory for an [`Error`].
fn note(failure: &mut Message, what: fmt::Arguments<'_>, errno: Errno) -> Failed {
    note_text(failure, &format_args!("{what}: {}", error::name(errno)))
}

fn note_text(failure: &mut Message, text: &dyn Display) -> Failed {
    // A message truncates what does not fit.
    let _truncated = write!(failure, "{text}");
    Failed
}

/// Starts a new session, and closes all descriptors but the streams.
fn enter_session(streams: &Streams) -> Result<(), Errno> {
    rustix::process::setsid()?;
    if let Input::Terminal(terminal) = streams.input {
        rustix::process::ioctl_tiocsctty(terminal)?;
    }
    streams.connect()?;
    sys::close_others(&[]);
    Ok(())
}

impl Streams {
    fn connect(&self) -> Result<(), Errno> {
        let connect = |input: Option<BorrowedFd>| sys::set_streams(input, self.output, self.error);
        match &self.input {
            Input::Null => connect(None),
            Input::Pipe(end) | Input::Terminal(end) => connect(Some(end.as_fd())),
            Input::Device(directory, name) => {
                match files::open_at(directory, name, OFlags::NOCTTY) {
                    Ok(device) => connect(Some(device.as_fd())),
                    Err(_) => connect(None),
                }
            }
        }
    }
}

/// Makes a directory the working directory.
fn enter(directory: &CStr) -> Result<(), Errno> {
    if directory.is_empty() {
        return Ok(());
    }
    let enter = || rustix::process::chdir(directory);
    match enter() {
        Err(Errno::NOENT) => files::make_directories(directory.to_bytes()).and_then(|()| enter()),
        other => other,
    }
}

/// Tries the command in the directories of PATH, as execvp(3) does; a name with `/` is a path.
fn search(
    name: &CStr,
    environment: &Environment,
    argv: &[*const c_char],
    envp: &[*const c_char],
) -> Errno {
    let execute = |path: &CStr| {
        // SAFETY: both vectors end with null, and point to NUL-terminated strings that stay valid.
        unsafe { sys::execve(path, argv.as_ptr(), envp.as_ptr()) }
    };
    let mut failure = Errno::NOENT;
    if name.is_empty() {
        return failure;
    }
    if find(name.to_bytes(), b'/').is_some() {
        return execute(name);
    }
    let path = environment
        .get(b"PATH=")
        .unwrap_or(environment::DEFAULT_PATH);
    let mut candidate = [0; PATH_MAX];
    for directory in split(path, b':') {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() {
            b"."
        } else {
            directory
        };
        let parts = [directory, b"/", name.to_bytes()];
        let Some(path) = files::join(&parts, &mut candidate) else {
            continue;
        };
        match execute(path) {
            errno if is_missing(errno) => {}
            Errno::ACCESS => failure = Errno::ACCESS,
            errno => return errno,
        }
    }
    failure
}

/// Whether the error means that there is no such file.
fn is_missing(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR)
}
