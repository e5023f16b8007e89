//! Short-lived children for operations that may block: mounting, unmounting, file access.
//!
//! A helper is a fork of this program that does one thing, reports to its parent through a pipe, and
//! exits.

use crate::context;
use crate::error;
use crate::error::{Error, Log, Result};
use crate::process::pipe;
use crate::sys::{self, Fork, Stopwatch, files};
use core::fmt::Display;
use proto::message;
use proto::message::MAX_MESSAGE;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// How long a helper may take, in milliseconds: more than replaying a long journal takes.
pub const TIMEOUT: u64 = 30_000;

/// Ends a record: names and paths never contain it.
const END: u8 = b'\0';

/// The type of a record: its first byte.
const WARNING: u8 = b'w';
const STEP: u8 = b's';
const ERROR: u8 = b'e';
#[cfg(feature = "snapshot")]
const RESULT: u8 = b'a';

/// Sends a helper's records to its parent.
pub struct HelperLog(OwnedFd);

impl HelperLog {
    /// A warning for the log.
    pub fn warn(&self, message: &dyn Display) {
        self.send(WARNING, message);
    }

    /// Reports what the helper is doing, for the error if it hangs: `mount /dev/vdb on /data`.
    pub fn step(&self, message: &dyn Display) {
        self.send(STEP, message);
    }

    /// Reports an error. Only the first one counts.
    pub fn fail(&self, message: &dyn Display) {
        self.send(ERROR, message);
    }

    /// Reports the helper's result.
    #[cfg(feature = "snapshot")]
    pub fn result(&self, message: &dyn Display) {
        self.send(RESULT, message);
    }

    /// The pipe, to be kept open.
    pub fn pipe(&self) -> &OwnedFd {
        &self.0
    }

    /// A single write of less than PIPE_BUF bytes, so atomic (pipe(7)). It does not block: records that do
    /// not fit in the pipe are lost.
    fn send(&self, kind: u8, message: &dyn Display) {
        let text = message!("{message}");
        let mut record = heapless::Vec::<u8, { MAX_MESSAGE + 2 }>::new();
        for part in &[&[kind], text.as_bytes(), &[END]] {
            let _fits = record.extend_from_slice(part);
        }
        let _parent_gone = files::write(&self.0, &record);
    }
}

impl Log for &HelperLog {
    fn warn(&mut self, message: &dyn Display) {
        HelperLog::warn(self, message);
    }
}

/// A barrier between a helper with several steps and its parent: one end of a socket pair. Dropping an
/// end releases the peer.
pub struct Rendezvous(OwnedFd);

impl Rendezvous {
    /// In the helper: reports that a step is complete, and waits. Returns whether to continue.
    pub fn arrive_and_wait(&self) -> bool {
        let _parent_gone = files::write(&self.0, &[END]);
        self.wait_for_peer()
    }

    /// Waits for the peer. Returns false if it has exited instead.
    pub fn wait_for_peer(&self) -> bool {
        matches!(files::read(&self.0, &mut [0]), Ok(1))
    }

    /// In the parent: waits until the helper has completed its first step.
    pub fn wait_for_helper(&self, helper: Helper, log: &mut dyn Log) -> Result<Helper> {
        if !poll_until_timeout(&|| sys::is_readable(&self.0, 1)) {
            return Err(helper.kill(log));
        }
        match files::read(&self.0, &mut [0]) {
            Ok(1) => {
                helper.log_warnings(log);
                Ok(helper)
            }
            // It has exited.
            _ => helper
                .wait(log)
                .and_then(|()| Err(error!("a helper was lost"))),
        }
    }

    /// In the parent: the socket, which is readable when [`poll`](Self::poll) has a result.
    pub fn socket(&self) -> &OwnedFd {
        &self.0
    }

    /// In the parent: `Some(true)` when the helper has completed a step, `Some(false)` when it has exited,
    /// `None` while it works.
    pub fn poll(&self) -> Option<bool> {
        let is_there = matches!(sys::is_readable(&self.0, 0), Ok(true));
        is_there.then(|| self.wait_for_peer())
    }

    /// In the parent: lets the helper continue with its next step.
    pub fn release_peer(&self) {
        let _ended = files::write(&self.0, &[END]);
    }
}

/// A running child.
pub struct Helper {
    /// Its process.
    pub pid: Pid,
    /// The read end of its pipe.
    pub log: OwnedFd,
}

/// Forks; the child exits with the code that `work` returns.
pub fn fork(work: &mut dyn FnMut(&HelperLog) -> i32) -> Result<Helper> {
    let (log, end) = pipe::new()?;
    match sys::fork().map_err(context!("fork"))? {
        Fork::Child => {
            drop(log);
            sys::exit(work(&HelperLog(end)))
        }
        Fork::Parent(pid) => Ok(Helper { pid, log }),
    }
}

/// Like [`fork`], but the child is exempt from the OOM killer, like PID 1.
#[cfg(any(
    feature = "files",
    feature = "mounts",
    feature = "snapshot",
    feature = "sysinfo"
))]
pub fn fork_oom_protected(
    proc: &OwnedFd,
    work: &mut dyn FnMut(&HelperLog) -> i32,
) -> Result<Helper> {
    fork(&mut |log| {
        if let Err(error) = crate::process::oom_score::exempt(proc) {
            log.fail(&error);
            return 1;
        }
        work(log)
    })
}

/// What a helper has reported.
#[derive(Default)]
pub struct Reports {
    /// Its error.
    pub error: Option<Error>,
    /// Its last step.
    pub step: Option<Error>,
    /// Its result.
    #[cfg(feature = "snapshot")]
    pub result: Option<Error>,
}

/// Reads what a helper has reported; its warnings go to `log`.
pub fn read_reports(pipe: &OwnedFd, log: &mut dyn Log) -> Reports {
    read(pipe, log, true)
}

/// The same, optionally without steps, each of which costs a page.
fn read(pipe: &OwnedFd, log: &mut dyn Log, with_steps: bool) -> Reports {
    let mut reports = Reports::default();
    let mut record = heapless::Vec::<u8, { MAX_MESSAGE + 1 }>::new();
    let mut piece = [0; 512];
    while let Ok(count @ 1..) = files::read(pipe, &mut piece) {
        for &byte in piece.get(..count).unwrap_or(&[]) {
            if byte != END {
                let _fits = record.push(byte);
                continue;
            }
            if let Some((kind, text)) = record.split_first() {
                let text = core::str::from_utf8(text).unwrap_or("?");
                match *kind {
                    ERROR if reports.error.is_none() => reports.error = Some(error!("{text}")),
                    STEP if with_steps => reports.step = Some(error!("{text}")),
                    #[cfg(feature = "snapshot")]
                    RESULT => reports.result = Some(error!("{text}")),
                    WARNING => log.warn(&text),
                    _ => {}
                }
            }
            record.clear();
        }
    }
    reports
}

/// Sends the error to the parent. Returns the child's exit code.
fn report_error(result: Result, log: &HelperLog) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            log.fail(&error);
            1
        }
    }
}

/// Calls `poll`, which blocks for up to a second, until it returns true or fails. Returns false after
/// [`TIMEOUT`]. In steps of a second, so that a pause of the VM uses up only one.
fn poll_until_timeout(poll: &dyn Fn() -> Result<bool, Errno>) -> bool {
    (0..TIMEOUT / 1000).any(|_| !matches!(poll(), Ok(false)))
}

/// The error of a helper that was killed after [`TIMEOUT`], with the step it was in.
pub fn timed_out(step: Option<Error>) -> Error {
    error!(
        "{}: timed out after {} s",
        step.unwrap_or_else(|| error!("boot")),
        TIMEOUT / 1000
    )
}

impl Helper {
    /// Forks; `work` runs in the child, and its error is the helper's.
    pub fn start(work: &mut dyn FnMut(&HelperLog) -> Result) -> Result<Self> {
        fork(&mut |log| {
            // A file that PID 1 closes must not stay open in this child.
            sys::close_others(&[log.pipe()]);
            report_error(work(log), log)
        })
    }

    /// The same for work in several steps: cheaper than a fork for each.
    pub fn start_with_rendezvous(
        work: &mut dyn FnMut(&HelperLog, &Rendezvous) -> Result,
    ) -> Result<(Self, Rendezvous)> {
        let sockets = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let (ours, theirs) = sockets.map_err(context!("create a pair of sockets"))?;
        let rendezvous = Rendezvous(theirs);
        let helper = fork(&mut |log| {
            sys::close_others(&[log.pipe(), &rendezvous.0]);
            report_error(work(log, &rendezvous), log)
        })?;
        Ok((helper, Rendezvous(ours)))
    }

    /// Logs the warnings of a helper so far.
    pub fn log_warnings(&self, log: &mut dyn Log) {
        let _reports = read(&self.log, log, false);
    }

    /// The result of a helper that was reaped.
    pub fn result(self, status: WaitStatus, log: &mut dyn Log) -> Result {
        match read(&self.log, log, false).error {
            Some(error) => Err(error),
            None if status.exit_status() == Some(0) => Ok(()),
            None => Err(error!(
                "a helper ended with code {}, signal {}",
                status.exit_status().unwrap_or(-1),
                status.terminating_signal().unwrap_or(0)
            )),
        }
    }

    /// Kills a helper that has timed out. The error says what it was doing.
    pub fn kill(self, log: &mut dyn Log) -> Error {
        let step = read_reports(&self.log, log).step;
        let _ended = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
        timed_out(step)
    }

    /// Waits for the helper to exit; kills it after `timeout` milliseconds. Returns whether it exited.
    pub fn wait_for(&self, timeout: u64) -> bool {
        let watch = Stopwatch::start();
        loop {
            match rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) if watch.elapsed() < timeout => sys::sleep(1),
                Ok(None) => {
                    let _ended =
                        rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
                    return false;
                }
                _ => return true,
            }
        }
    }

    /// Waits for the helper to exit, without the event loop; kills it after [`TIMEOUT`].
    pub fn wait(self, log: &mut dyn Log) -> Result {
        // The pipe hangs up when it exits.
        if !poll_until_timeout(&|| sys::has_hung_up(&self.log, 1)) {
            return Err(self.kill(log));
        }
        match rustix::process::waitpid(Some(self.pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => self.result(status, log),
            _ => Err(error!("a helper was lost")),
        }
    }
}
