//! Short-lived children for what may block: mounting, unmounting, reading and writing files.
//!
//! A helper is a fork of this program that does one thing, sends lines to its parent through a
//! pipe, and exits.

use crate::context;
use crate::error;
use crate::error::{Error, Log, Result};
use crate::process::pipe;
use crate::sys::{self, Fork, Stopwatch, files};
use core::fmt::Display;
use proto::message;
use proto::message::MESSAGE;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// How long a helper may take, in milliseconds: what a disk with a long journal needs, and more.
pub const TIMEOUT: u64 = 30_000;

/// Ends a record: no name and no path has one.
const END: u8 = b'\0';

/// What a record from a helper is; its first byte.
const WARNING: u8 = b'w';
const STEP: u8 = b's';
const ERROR: u8 = b'e';
#[cfg(feature = "snapshot")]
const ANSWER: u8 = b'a';

/// A helper's way to tell its parent something.
pub struct HelperLog(OwnedFd);

impl HelperLog {
    /// A warning for the log.
    pub fn warn(&self, message: &dyn Display) {
        self.send(WARNING, message);
    }

    /// What the helper is at, in case it hangs: `mount /dev/vdb on /data`.
    pub fn step(&self, message: &dyn Display) {
        self.send(STEP, message);
    }

    /// Why the helper gives up. Only the first one counts.
    pub fn fail(&self, message: &dyn Display) {
        self.send(ERROR, message);
    }

    /// What it was to find out.
    #[cfg(feature = "snapshot")]
    pub fn answer(&self, message: &dyn Display) {
        self.send(ANSWER, message);
    }

    /// The pipe, to be kept open.
    pub fn pipe(&self) -> &OwnedFd {
        &self.0
    }

    /// One write of less than PIPE_BUF bytes, so whole (pipe(7)). It does not block: of more than a
    /// pipe holds the end is lost.
    fn send(&self, kind: u8, message: &dyn Display) {
        let text = message!("{message}");
        let mut record = heapless::Vec::<u8, { MESSAGE + 2 }>::new();
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

/// One end of a socket pair, where a helper whose work has parts and its parent wait for each other
/// between them. Who drops an end releases the other side.
pub struct Rendezvous(OwnedFd);

impl Rendezvous {
    /// In the helper: says that a part is done, and waits; whether the next one is wanted.
    pub fn arrive_and_wait(&self) -> bool {
        let _parent_gone = files::write(&self.0, &[END]);
        self.wait_for_peer()
    }

    /// Waits until the other one has done its part; `false` when it has gone instead.
    pub fn wait_for_peer(&self) -> bool {
        matches!(files::read(&self.0, &mut [0]), Ok(1))
    }

    /// In the parent: waits until the helper has done its first part.
    pub fn wait_for_helper(&self, helper: Helper, log: &mut dyn Log) -> Result<Helper> {
        if !in_time(&|| sys::is_readable(&self.0, 1)) {
            return Err(helper.give_up(log));
        }
        match files::read(&self.0, &mut [0]) {
            Ok(1) => {
                helper.warnings(log);
                Ok(helper)
            }
            // Its socket is closed as it has ended.
            _ => helper
                .wait(log)
                .and_then(|()| Err(error!("a helper was lost"))),
        }
    }

    /// In the parent: what is readable when there is news.
    pub fn socket(&self) -> &OwnedFd {
        &self.0
    }

    /// In the parent: whether the helper has done a part, or else has ended; `None` while it works.
    pub fn poll(&self) -> Option<bool> {
        let is_there = matches!(sys::is_readable(&self.0, 0), Ok(true));
        is_there.then(|| self.wait_for_peer())
    }

    /// In the parent: lets the helper do its next part.
    pub fn release_peer(&self) {
        let _ended = files::write(&self.0, &[END]);
    }
}

/// A child at work.
pub struct Helper {
    /// Its process.
    pub pid: Pid,
    /// Where its lines are read.
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

#[cfg(any(
    feature = "files",
    feature = "mounts",
    feature = "snapshot",
    feature = "sysinfo"
))]
/// Forks as [`fork`] does, for work of PID 1's own: the OOM killer spares the child.
pub fn fork_spared(proc: &OwnedFd, work: &mut dyn FnMut(&HelperLog) -> i32) -> Result<Helper> {
    fork(&mut |log| {
        if let Err(error) = crate::process::oom_score::spare(proc) {
            log.fail(&error);
            return 1;
        }
        work(log)
    })
}

/// The lines of a helper so far.
#[derive(Default)]
pub struct Lines {
    /// Why it gave up.
    pub error: Option<Error>,
    /// What it did last.
    pub step: Option<Error>,
    /// What it found out.
    #[cfg(feature = "snapshot")]
    pub answer: Option<Error>,
}

/// Reads what a child has sent; its warnings go to `log`.
pub fn read_lines(pipe: &OwnedFd, log: &mut dyn Log) -> Lines {
    read(pipe, log, true)
}

/// The same; without steps, each of which costs a page, where they are of no interest any more.
fn read(pipe: &OwnedFd, log: &mut dyn Log, with_steps: bool) -> Lines {
    let mut lines = Lines::default();
    let mut line = heapless::Vec::<u8, { MESSAGE + 1 }>::new();
    let mut piece = [0; 512];
    while let Ok(count @ 1..) = files::read(pipe, &mut piece) {
        for &byte in piece.get(..count).unwrap_or(&[]) {
            if byte != END {
                let _fits = line.push(byte);
                continue;
            }
            if let Some((kind, text)) = line.split_first() {
                let text = core::str::from_utf8(text).unwrap_or("?");
                match *kind {
                    ERROR if lines.error.is_none() => lines.error = Some(error!("{text}")),
                    STEP if with_steps => lines.step = Some(error!("{text}")),
                    #[cfg(feature = "snapshot")]
                    ANSWER => lines.answer = Some(error!("{text}")),
                    WARNING => log.warn(&text),
                    _ => {}
                }
            }
            line.clear();
        }
    }
    lines
}

/// What a child exits with after this result, the error being its helper's.
fn report(result: Result, log: &HelperLog) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            log.fail(&error);
            1
        }
    }
}

/// Whether `happens`, which waits a second, is true within [`TIMEOUT`]; an error ends the wait. In
/// steps of a second: a pause of the VM ends one.
fn in_time(happens: &dyn Fn() -> Result<bool, Errno>) -> bool {
    (0..TIMEOUT / 1000).any(|_| !matches!(happens(), Ok(false)))
}

/// Why a helper was given up after [`TIMEOUT`]: what it was at.
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
            // What PID 1 closes must be closed, whatever this child waits for.
            sys::close_others(&[log.pipe()]);
            report(work(log), log)
        })
    }

    /// The same for work of several parts: a fork less than with a helper for each.
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
            report(work(log, &rendezvous), log)
        })?;
        Ok((helper, Rendezvous(ours)))
    }

    /// What a helper that has done its part has warned of goes to `log`.
    pub fn warnings(&self, log: &mut dyn Log) {
        let _lines = read(&self.log, log, false);
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

    /// Gives a helper up that has taken too long: it is killed, and the error says what it was at.
    pub fn give_up(self, log: &mut dyn Log) -> Error {
        let step = read_lines(&self.log, log).step;
        let _ended = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
        timed_out(step)
    }

    /// Waits so many milliseconds for the end at most; one that has not ended is killed. Whether it has.
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

    /// Waits for the end where there is no event loop. One that hangs, as a disk may, is given up.
    pub fn wait(self, log: &mut dyn Log) -> Result {
        // Its end of the pipe is closed with it.
        if !in_time(&|| sys::has_hung_up(&self.log, 1)) {
            return Err(self.give_up(log));
        }
        match rustix::process::waitpid(Some(self.pid), WaitOptions::empty()) {
            Ok(Some((_, status))) => self.result(status, log),
            _ => Err(error!("a helper was lost")),
        }
    }
}
