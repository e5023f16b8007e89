//! Short-lived children for what may block: mounting, unmounting, writing files.
//!
//! A task is a fork of this program that does one thing, reports lines over a pipe and exits.

use crate::console::Console;
use crate::sys::{self, Fork};
use core::cell::Cell;
use pigeon_init::text;
use pigeon_init::text::{Errno as Name, Line, Show};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// How long a boot task may take: what a disk with a long journal needs, and more.
const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// The result of what can fail: the error says what failed, on what, and why.
pub type Outcome<T = ()> = Result<T, Line>;

/// An error: "VERB OBJECT: ERRNO".
#[inline(never)]
pub fn failure(errno: Errno, what: Line) -> Line {
    text!(what, ": ", name(errno))
}

/// For `map_err`: an errno becomes an error that says what failed, on what, and why.
#[macro_export]
macro_rules! why {
    ($($part:expr),* $(,)?) => {
        |errno| $crate::task::failure(errno, pigeon_init::text!($($part),*))
    };
}

/// The errno's name.
pub fn name(errno: Errno) -> Name {
    Name(errno.raw_os_error())
}

/// A child's way to tell its parent something.
pub struct Report {
    pipe: OwnedFd,
    failed: Cell<bool>,
}

impl Report {
    /// A line for the log.
    pub fn warn(&self, line: impl Show) {
        self.send(b'w', &line);
    }

    /// Why the child gives up. Only the first one counts.
    pub fn fail(&self, line: impl Show) {
        if !self.failed.replace(true) {
            self.send(b'e', &line);
        }
    }

    /// The pipe, to be kept open.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// One write of less than PIPE_BUF bytes, so whole; the parent reads while the child lives.
    #[inline(never)]
    fn send(&self, kind: u8, text: &dyn Show) {
        let mut line = Line::new();
        line.put(kind);
        text.show(&mut line);
        line.put(b'\n');
        let _parent_gone = rustix::io::write(&self.pipe, line.as_bytes());
    }
}

/// A child at work.
pub struct Task {
    /// Its process.
    pub pid: Pid,
    /// Where its report is read, to the end of file.
    pub report: OwnedFd,
}

/// Forks; `work` runs in the child and its outcome is the child's exit code.
pub fn start(work: &mut dyn FnMut(&Report) -> Outcome) -> Outcome<Task> {
    spawn(PipeFlags::CLOEXEC, &mut |report| {
        // What PID 1 closes must be closed, whatever this child waits for.
        sys::close_others(&[report.as_fd()]);
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

/// Forks; the child exits with the code that `work` returns. With NONBLOCK, neither end blocks.
pub fn spawn(flags: PipeFlags, work: &mut dyn FnMut(&Report) -> i32) -> Outcome<Task> {
    let (report, pipe) = rustix::pipe::pipe_with(flags).map_err(why!("create a pipe"))?;
    match sys::fork().map_err(why!("fork"))? {
        Fork::Child => {
            drop(report);
            let report = Report {
                pipe,
                failed: Cell::new(false),
            };
            sys::exit(work(&report))
        }
        Fork::Parent(pid) => Ok(Task { pid, report }),
    }
}

/// Reads what a child reports, to the end of file or as far as it has come: its warnings go to the
/// log, its error is the answer.
#[inline(never)]
pub fn read_report(report: &OwnedFd, mut console: Option<&mut Console>) -> Option<Line> {
    let mut error = None;
    let mut line = Line::new();
    let mut buffer = [0; 512];
    loop {
        let count = match rustix::io::read(report, &mut buffer) {
            Ok(count @ 1..) => count,
            Err(Errno::INTR) => continue,
            Ok(_) | Err(_) => return error,
        };
        for &byte in buffer.iter().take(count) {
            if byte != b'\n' {
                line.put(byte);
                continue;
            }
            match (line.as_bytes(), &mut console) {
                ([b'e', why @ ..], _) => error = Some(text!(why)),
                ([_, warning @ ..], Some(console)) => console.warn(text!(warning)),
                _ => {}
            }
            line = Line::new();
        }
    }
}

impl Task {
    /// Waits for the end, before there is an event loop: its warnings are logged. One that hangs,
    /// as a disk may, is left alone.
    pub fn wait(self, what: &dyn Show, console: &mut Console) -> Outcome {
        // Its end of the pipe is closed with it; until then that holds all it says.
        let hang_up = PollFd::new(&self.report, PollFlags::empty());
        if let Ok(0) = poll(&mut [hang_up], Some(&PATIENCE)) {
            return Err(text!("mount ", what, ": no answer after 30 s"));
        }
        let error = read_report(&self.report, Some(console));
        loop {
            match rustix::process::waitpid(Some(self.pid), WaitOptions::empty()) {
                Err(Errno::INTR) => {}
                Ok(Some((_, status))) => return outcome(error, status),
                _ => return Err(text!("a boot task was lost")),
            }
        }
    }
}

/// A finished task's outcome.
pub fn outcome(error: Option<Line>, status: WaitStatus) -> Outcome {
    match error {
        Some(why) => Err(why),
        None if status.exit_status() == Some(0) => Ok(()),
        None => Err(text!(
            "a task ended with code ",
            status.exit_status().unwrap_or(-1),
            ", signal ",
            status.terminating_signal().unwrap_or(0)
        )),
    }
}
