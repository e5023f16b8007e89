//! From a fork to a command: session, identity, directory, environment, execve.

use crate::console::Console;
use crate::files;
use crate::mounts::make_directories;
use crate::sys::{self, SignalSet, Static};
use crate::task::{self, Outcome, Report};
use crate::why;
use core::ffi::CStr;
use pigeon_init::accounts::{self, Identity};
use pigeon_init::command::{self, ENV_ENTRIES, Environment};
use pigeon_init::config::{ARGV, DOCUMENT, PATH};
use pigeon_init::json::Text;
use pigeon_init::text;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// The root's users.
pub const PASSWD: &CStr = c"/etc/passwd";
/// The root's groups.
pub const GROUP: &CStr = c"/etc/group";

/// Exit code of a command that is not there.
const NOT_FOUND: i32 = 127;
/// Exit code of a command that is there and cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// What a child uses between fork and execve; in the parent it stays untouched.
struct Scratch {
    argv_pointers: [usize; ARGV + 1],
    environment_pointers: [usize; ENV_ENTRIES + 1],
}

static SCRATCH: Static<Scratch> = Static::new(Scratch {
    argv_pointers: [0; ARGV + 1],
    environment_pointers: [0; ENV_ENTRIES + 1],
});

/// Who a command of the host's runs as: root, unless it names a user.
pub fn resolve_or_root(user: &[u8], files: &mut [u8; 2 * DOCUMENT]) -> Outcome<Identity> {
    if user.is_empty() {
        Ok(Identity::root())
    } else {
        resolve(user, files)
    }
}

/// Resolves a user from the files of the root.
pub fn resolve(user: &[u8], scratch: &mut [u8; 2 * DOCUMENT]) -> Outcome<Identity> {
    let (passwd, group) = scratch
        .split_at_mut_checked(DOCUMENT)
        .unwrap_or((&mut [], &mut []));
    let passwd = files::read_whole(PASSWD, passwd)?;
    let group = files::read_whole(GROUP, group)?;
    let mut identity = Identity::default();
    identity.resolve(user, passwd, group)?;
    Ok(identity)
}

/// Standard input, output and error of a command.
pub enum Streams<'a> {
    /// Three descriptors.
    Each([BorrowedFd<'a>; 3]),
    /// Output and error; input stays what PID 1's is: /dev/null.
    Output([BorrowedFd<'a>; 2]),
    /// One terminal for all three, which becomes the session's controlling terminal.
    Terminal(BorrowedFd<'a>),
}

/// What a child becomes.
pub struct Command<'a, A: Iterator<Item = Text<'a>> + Clone> {
    /// The arguments; the first is the name to look for.
    pub argv: A,
    /// The environment, PATH among it.
    pub environment: &'a mut Environment,
    /// Who it runs as.
    pub identity: &'a Identity,
    /// Working directory, created if absent; empty is `/`.
    pub directory: Text<'a>,
}

/// First thing in a child: a session of its own, and no descriptors but its streams and its report.
pub fn enter_session(streams: &Streams, report: &Report) -> Outcome {
    use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
    rustix::process::setsid().map_err(why!("start a session"))?;
    let connected = (|| {
        let (input, [output, error]) = match *streams {
            Streams::Each([input, output, error]) => (Some(input), [output, error]),
            Streams::Output(streams) => (None, streams),
            Streams::Terminal(terminal) => {
                rustix::process::ioctl_tiocsctty(terminal)?;
                (Some(terminal), [terminal; 2])
            }
        };
        if let Some(input) = input {
            dup2_stdin(input)?;
        }
        dup2_stdout(output)?;
        dup2_stderr(error)
    })();
    connected.map_err(why!("connect the standard streams"))?;
    sys::close_others(report.pipe(), report.pipe());
    Ok(())
}

/// A failure between fork and execve: the words, and the exit code for it.
struct Failure(text::Line, i32);

impl<'a, A: Iterator<Item = Text<'a>> + Clone> Command<'a, A> {
    /// Turns this process into the command; returns an exit code only when that failed, with the
    /// reason in the report.
    pub fn become_it(self, report: &Report) -> i32 {
        let Some(scratch) = SCRATCH.take() else {
            return NOT_EXECUTABLE;
        };
        match self.execute(scratch) {
            Ok(never) => match never {},
            Err(Failure(why, code)) => {
                report.fail(why);
                code
            }
        }
    }

    fn execute(mut self, scratch: &mut Scratch) -> Result<core::convert::Infallible, Failure> {
        self.enter_directory()?;
        self.drop_privileges().map_err(|errno| {
            Failure(
                task::failure(errno, text!("become the user")),
                NOT_EXECUTABLE,
            )
        })?;
        point(
            &mut scratch.argv_pointers,
            self.argv
                .clone()
                .map(|argument| argument.c_str().to_bytes_with_nul()),
        );
        point(&mut scratch.environment_pointers, self.environment.iter());
        sys::block_signals(SignalSet::EMPTY);
        let command = self.argv.next().map_or(c"", Text::c_str);
        let (errno, code) = search(command, self.environment, |path| {
            // SAFETY: both vectors end with null, and point at NUL-terminated strings that stay.
            unsafe {
                let argv = scratch.argv_pointers.as_ptr().cast();
                sys::execve(path, argv, scratch.environment_pointers.as_ptr().cast())
            }
        });
        Err(Failure(
            task::failure(errno, text!("execute ", command)),
            code,
        ))
    }

    fn enter_directory(&self) -> Result<(), Failure> {
        if self.directory.is_empty() {
            return Ok(());
        }
        let directory = self.directory;
        let entered = match rustix::process::chdir(directory.c_str()) {
            Err(Errno::NOENT) => make_directories(directory.bytes())
                .and_then(|()| rustix::process::chdir(directory.c_str())),
            other => other,
        };
        entered.map_err(|errno| {
            Failure(
                task::failure(errno, text!("enter ", directory)),
                NOT_EXECUTABLE,
            )
        })
    }

    /// Groups first: without root they cannot be set.
    fn drop_privileges(&self) -> Result<(), Errno> {
        use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
        let Identity {
            uid, gid, groups, ..
        } = self.identity;
        let mut list = heapless::Vec::<Gid, { accounts::GROUPS }>::new();
        for group in groups {
            let _fits = list.push(Gid::from_raw(*group));
        }
        let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
        set_thread_groups(&list)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    }
}

/// Fills a vector of pointers for execve(2); the last one is null.
fn point<'s>(pointers: &mut [usize], strings: impl Iterator<Item = &'s [u8]>) {
    pointers
        .iter_mut()
        .zip(strings)
        .for_each(|(slot, string)| *slot = string.as_ptr() as usize);
}

/// Tries the command in the directories of PATH, as execvp(3) does; a name with `/` is a path.
fn search(
    command: &CStr,
    environment: &Environment,
    execute: impl Fn(&CStr) -> Errno,
) -> (Errno, i32) {
    let missing = |errno| matches!(errno, Errno::NOENT | Errno::NOTDIR);
    let answer = |errno| {
        (
            errno,
            if missing(errno) {
                NOT_FOUND
            } else {
                NOT_EXECUTABLE
            },
        )
    };
    if command.is_empty() {
        return answer(Errno::NOENT);
    }
    if command.to_bytes().contains(&b'/') {
        return answer(execute(command));
    }
    let mut failure = Errno::NOENT;
    let path = environment.get(b"PATH").unwrap_or(command::PATH);
    for directory in path.split(|byte| *byte == b':') {
        let mut candidate = heapless::Vec::<u8, { PATH + 256 }>::new();
        // An empty entry is the working directory.
        let directory = if directory.is_empty() {
            b"."
        } else {
            directory
        };
        let fits = [directory, b"/", command.to_bytes_with_nul()]
            .iter()
            .all(|part| candidate.extend_from_slice(part).is_ok());
        let Some(candidate) = CStr::from_bytes_until_nul(&candidate).ok().filter(|_| fits) else {
            continue;
        };
        match execute(candidate) {
            errno if missing(errno) => {}
            Errno::ACCESS => failure = Errno::ACCESS,
            errno => return answer(errno),
        }
    }
    answer(failure)
}

/// The console as a command's standard input: opened anew, so that it blocks as a terminal does.
pub fn console_input(console: &Console) -> Result<OwnedFd, Errno> {
    files::open(console.path(), OFlags::NOCTTY).or_else(|_| files::open(c"/dev/null", OFlags::RDWR))
}
