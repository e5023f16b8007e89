//! Short-lived children for what may block: mounting, unmounting, writing files.
//!
//! A task is a fork of this program that does one thing, reports lines over a pipe and exits.

use crate::console::Console;
use crate::files;
use crate::sys::{self, Fork};
use core::ffi::CStr;
use pigeon_init::text;
use pigeon_init::text::{Errno as Name, Line};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// How long a boot task may take, in seconds: what a disk with a long journal needs, and more.
const PATIENCE: u32 = 30;
/// The result of what can fail: the error says what failed, on what, and why.
pub type Outcome<T = ()> = Result<T, Line>;

/// An error: "VERB OBJECT: ERRNO".
#[inline(never)]
pub fn failure(errno: Errno, what: Line) -> Line {
    what.with(": ").with(&name(errno))
}

/// The same of words that are known.
#[inline(never)]
pub fn failed(errno: Errno, what: &str) -> Line {
    failure(errno, text!(what))
}

/// For `map_err`: an errno becomes an error that says what failed, on what, and why.
#[macro_export]
macro_rules! why {
    ($what:literal) => {
        |errno| $crate::task::failed(errno, $what)
    };
    ($($part:expr),* $(,)?) => {
        |errno| $crate::task::failure(errno, pigeon_init::text!($($part),*))
    };
}

/// The errno's name.
pub fn name(errno: Errno) -> Name {
    Name(errno.raw_os_error())
}

/// A child's way to tell its parent something.
pub struct Report(OwnedFd);

impl Report {
    /// A line for the log.
    pub fn warn(&self, line: Line) {
        self.send("w", line);
    }

    /// Why the child gives up. Only the first one counts.
    pub fn fail(&self, line: Line) {
        self.send("e", line);
    }

    /// The pipe, to be kept open.
    pub fn pipe(&self) -> &OwnedFd {
        &self.0
    }

    /// One write of less than PIPE_BUF bytes, so whole; the pipe holds all that a child has to say.
    #[inline(never)]
    fn send(&self, kind: &str, line: Line) {
        let _parent_gone = files::write(&self.0, text!("%%\n", kind, line).as_bytes());
    }
}

/// A child at work.
pub struct Task {
    /// Its process.
    pub pid: Pid,
    /// Where its report is read when it has ended.
    pub report: OwnedFd,
}

/// A pipe, its reading end first; neither end blocks.
#[inline(never)]
pub fn pipe() -> Outcome<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(why!("create a pipe"))
}

/// Makes a command's end of a pipe block, as commands expect.
pub fn block(end: &OwnedFd) -> Outcome {
    rustix::io::ioctl_fionbio(end, false).map_err(why!("create a pipe"))
}

/// Forks; `work` runs in the child and its outcome is the child's exit code.
#[inline(never)]
pub fn start(work: &mut dyn FnMut(&Report) -> Outcome) -> Outcome<Task> {
    spawn(&mut |report| {
        // What PID 1 closes must be closed, whatever this child waits for.
        sys::close_others(report.pipe(), report.pipe());
        finish(work(report), report)
    })
}

/// The exit code for an outcome; the error goes into the report.
pub fn finish(outcome: Outcome, report: &Report) -> i32 {
    match outcome {
        Ok(()) => 0,
        Err(why) => {
            report.fail(why);
            1
        }
    }
}

/// Forks; the child exits with the code that `work` returns.
#[inline(never)]
pub fn spawn(work: &mut dyn FnMut(&Report) -> i32) -> Outcome<Task> {
    let (report, end) = pipe()?;
    match sys::fork().map_err(why!("fork"))? {
        Fork::Child => {
            drop(report);
            sys::exit(work(&Report(end)))
        }
        Fork::Parent(pid) => Ok(Task { pid, report }),
    }
}

/// Reads what a child that has ended said: its warnings are logged. Its error, if it told one.
#[inline(never)]
pub fn read_report(report: &OwnedFd, mut console: Option<&mut Console>) -> Option<Line> {
    let mut error = None;
    let mut kind = 0;
    let mut line = Line::new();
    let mut piece = [0; 64];
    loop {
        let bytes = match files::read(report, &mut piece) {
            Ok(count @ 1..) => piece.get(..count as usize).unwrap_or(&[]),
            // A line that was cut has lost its end.
            _ if kind != 0 => b"\n",
            _ => return error,
        };
        for &byte in bytes {
            match (kind, byte) {
                (0, _) => kind = byte,
                (_, b'\n') => {
                    let told = core::mem::take(&mut line);
                    match &mut console {
                        _ if kind == b'e' => error = error.or(Some(told)),
                        Some(console) => console.warn(told),
                        None => {}
                    }
                    kind = 0;
                }
                _ => line.put(byte),
            }
        }
    }
}

impl Task {
    /// The outcome of a task that was reaped: its warnings are logged.
    pub fn outcome(self, status: WaitStatus, console: &mut Console) -> Outcome {
        outcome(read_report(&self.report, Some(console)), status)
    }

    /// Waits for the end, before there is an event loop: its warnings are logged. One that hangs,
    /// as a disk may, is left alone.
    #[inline(never)]
    pub fn wait(self, what: &CStr, console: &mut Console) -> Outcome {
        // Its end of the pipe is closed with it; until then that holds all it says.
        let mut left = PATIENCE;
        // In steps of a second: a pause of the VM ends one of them.
        while let Ok(0) = sys::poll(&self.report, 0, 1) {
            left -= 1;
            if left == 0 {
                return Err(text!("mount %: no answer after 30 s", what));
            }
        }
        match rustix::process::waitpid(Some(self.pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => self.outcome(status, console),
            _ => Err(text!("a boot task was lost")),
        }
    }
}

/// A finished task's outcome.
fn outcome(error: Option<Line>, status: WaitStatus) -> Outcome {
    match error {
        Some(why) => Err(why),
        None if status.exit_status() == Some(0) => Ok(()),
        None => Err(text!(
            "a task ended with code %, signal %",
            status.exit_status().unwrap_or(-1),
            status.terminating_signal().unwrap_or(0)
        )),
    }
}
