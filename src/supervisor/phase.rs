//! The phases of a VM's life, and how one follows the other.

use super::{SIGKILL, SIGTERM, Supervisor};
use crate::context::NEVER;
use crate::error;
use crate::error::Discard;
use crate::process::helper;
use crate::{shutdown, sys};

/// How long a workload that is asked to stop may take, in milliseconds.
const STOP_GRACE: u64 = 10_000;
/// How long what is left after the workload may take to stop, in milliseconds.
const TERM_GRACE: u64 = 500;
/// How long what is killed may take to go, in milliseconds: a process in the kernel may stay.
const KILL_TIMEOUT: u64 = 2000;
/// How long the disks may take, in milliseconds.
const UNMOUNT_TIMEOUT: u64 = 30_000;
/// How long a console that takes nothing is waited for at the end, in milliseconds.
const CONSOLE_DRAIN_TIMEOUT: u64 = 3000;

/// What is going on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The boot; what may wait for a disk runs in a helper.
    Setup,
    /// The workload runs.
    Running,
    /// It has ended; somebody may yet ask how.
    Linger,
    /// What is left is asked to go.
    Terminate,
    /// What is left is killed.
    Kill,
    /// The file systems are being left clean.
    Unmount,
    /// The console gets its last bytes, as long as it takes any.
    Drain,
}

impl Supervisor {
    /// The next phase, and how long it may take in milliseconds.
    pub(super) fn enter(&mut self, phase: Phase, time: u64) {
        self.phase = phase;
        self.deadline = self.context.now.saturating_add(time);
    }

    /// Asks the workload to stop; one that does not is killed after [`STOP_GRACE`].
    pub(super) fn stop_workload(&mut self) {
        self.console
            .info(&"ctrl-alt-del: stopping the workload", &"");
        match self.phase {
            Phase::Running if self.deadline == NEVER => {
                self.signal_workload(SIGTERM);
                self.deadline = self.context.now + STOP_GRACE;
            }
            Phase::Setup => self.fail(error!("stopped before the workload was started")),
            _ => {}
        }
    }

    /// Goes on when what is waited for has happened, or has taken too long; whether it did.
    pub(super) fn advance(&mut self) -> bool {
        let late = self.deadline <= self.context.now;
        match self.phase {
            Phase::Setup if late => {
                self.deadline = NEVER;
                if let Some(helper) = self.child.take() {
                    let error = helper.give_up(self.console);
                    self.fail(error);
                }
            }
            Phase::Running if late => {
                self.console
                    .warn(&format_args!("the workload does not stop: killed"));
                self.signal_workload(SIGKILL);
                self.deadline = NEVER;
            }
            Phase::Linger if late || self.context.workload.exit_code_delivered => {
                self.api.close(&mut self.context);
                sys::kill_all(SIGTERM);
                self.enter(Phase::Terminate, TERM_GRACE);
                self.reap();
            }
            Phase::Terminate | Phase::Kill if self.childless => self.unmount(),
            Phase::Terminate if late => {
                sys::kill_all(SIGKILL);
                self.enter(Phase::Kill, KILL_TIMEOUT);
                self.reap();
            }
            Phase::Kill if late => {
                self.console
                    .warn(&format_args!("a process cannot be killed"));
                self.unmount();
            }
            Phase::Unmount if late => {
                let step = self
                    .child
                    .as_ref()
                    .and_then(|helper| helper::read_lines(&helper.log, &mut Discard).step);
                self.console.warn(&format_args!(
                    "timed out {}",
                    step.unwrap_or_else(|| error!("unmounting"))
                ));
                self.drain();
            }
            Phase::Drain => {
                self.finish_drain(late);
                return false;
            }
            _ => return false,
        }
        true
    }

    /// Leaves the file systems clean, in a helper: a disk may take its time.
    fn unmount(&mut self) {
        let scratch = &mut *self.context.scratch;
        let mounts = self.mounts.as_ref();
        let helper = helper::spawn(None, &mut |log| {
            match mounts {
                Some(mounts) => sys::close_others(&[mounts, log.pipe()]),
                None => sys::close_others(&[log.pipe()]),
            }
            shutdown::unmount_all(mounts, scratch, &mut &*log);
            0
        });
        match helper {
            Ok(helper) => {
                self.child = Some(helper);
                self.enter(Phase::Unmount, UNMOUNT_TIMEOUT);
            }
            // No memory, or a limit that the workload has put on PID 1. Nobody waits for PID 1 now.
            Err(error) => {
                self.console.warn(&error);
                shutdown::unmount_all(self.mounts.as_ref(), self.context.scratch, self.console);
                self.context.now = self.clock();
                self.drain();
            }
        }
    }

    /// Only the console is left.
    pub(super) fn drain(&mut self) {
        self.enter(Phase::Drain, CONSOLE_DRAIN_TIMEOUT);
    }

    /// Reboots when the console has taken all, or has taken nothing for too long.
    fn finish_drain(&mut self, late: bool) {
        let before = self.console.waiting();
        let more = self.finish_output();
        self.console.flush();
        let left = self.console.waiting();
        if left == 0 && !more || late {
            shutdown::reboot();
        }
        if left != before {
            self.drain();
        }
    }
}
