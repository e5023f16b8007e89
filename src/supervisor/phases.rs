//! The phases of a VM's life, and the transitions between them.

use super::state::{Phase, Supervisor};
use super::workload::SIGNAL_BASE;
use crate::context::{NEVER, Stop};
use crate::error;
use crate::error::Error;
use crate::process::oom_score;
use crate::shutdown::budget::{
    self, CONSOLE_DRAIN_TIMEOUT, KILL_TIMEOUT, TERM_GRACE, UNMOUNT_TIMEOUT,
};
use crate::shutdown::{self, last_resort};
use crate::sys;
use crate::sys::files;
use crate::sys::signal::{SIGKILL, SIGTERM};
use proto::signal::Signal;

impl Supervisor {
    /// Asks the workload to stop, and sets the deadline for it. A second call does not extend the
    /// deadline.
    pub(super) fn stop_workload(&mut self, stop: Stop) {
        match self.phase {
            Phase::Running => {
                let own = self.context.workload.stop_signal;
                let signal = stop.signal.or(own).map_or(SIGTERM, Signal::number);
                let timeout = stop.timeout;
                let fields = format_args!(" signal={signal} timeout_ms={timeout}");
                self.console.info(&"stopping the workload", &fields);
                self.signal_workload(signal);
                let deadline = self.context.now.saturating_add(timeout);
                self.deadline = self.deadline.min(deadline);
            }
            Phase::Setup => self.fail(error!("stopped before the workload was started")),
            _ => {}
        }
    }

    /// Whether the workload runs and no stop was requested.
    #[cfg(feature = "snapshot")]
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running && self.deadline == NEVER
    }

    /// Enters the next phase if this one is complete or has timed out. Returns whether it did.
    pub(super) fn advance(&mut self) -> bool {
        let late = self.deadline <= self.context.now;
        match self.phase {
            Phase::Setup if late => {
                self.deadline = NEVER;
                if let Some(helper) = self.helper.take() {
                    let error = helper.kill(self.console);
                    self.fail(error);
                }
            }
            Phase::Running if late => {
                self.console.warn(&"the workload does not stop: killed");
                self.signal_workload(SIGKILL);
                self.enter(Phase::KillingWorkload, KILL_TIMEOUT);
            }
            // It is blocked in the kernel, for instance by a hung disk.
            Phase::KillingWorkload if late => {
                let code = SIGNAL_BASE + SIGKILL as i32;
                self.fail_with_code(code, error!("the workload cannot be killed"));
            }
            Phase::Linger if late || self.exit_is_delivered() => {
                self.api.close(&mut self.context);
                self.shutdown_deadline = self.context.now.saturating_add(budget::begin());
                // The helpers of the shutdown inherit it.
                if let Err(error) = oom_score::exempt(&self.context.proc) {
                    self.console.warn(&error);
                }
                sys::kill_all(SIGTERM);
                self.enter(Phase::TerminatingProcesses, TERM_GRACE);
                self.reap();
            }
            Phase::TerminatingProcesses | Phase::KillingProcesses if self.has_no_children => {
                self.unmount()
            }
            Phase::TerminatingProcesses if late => {
                sys::kill_all(SIGKILL);
                self.helper = shutdown::kill_remaining().ok();
                self.enter(Phase::KillingProcesses, KILL_TIMEOUT);
                self.reap();
            }
            Phase::KillingProcesses if late => {
                self.console.warn(&"a process cannot be killed");
                self.unmount();
            }
            Phase::Unmounting if late => {
                if let Some(helper) = self.helper.take() {
                    last_resort::log_reports(&helper, false, self.console);
                }
                self.drain();
            }
            Phase::DrainingConsole => {
                self.finish_drain(late);
                return false;
            }
            _ => return false,
        }
        true
    }

    /// Whether a client has the exit code, and all log readers have the last output.
    fn exit_is_delivered(&self) -> bool {
        let is_delivered =
            self.context.workload.exit_code_delivered || self.events.has_delivered_exit();
        is_delivered && self.context.log_readers == 0
    }

    /// Starts unmounting the file systems.
    fn unmount(&mut self) {
        if let Some(switch) = &self.context.rcu_expedited {
            // Kernel 6.12 waits 11 ms for grace periods when it makes an ext4 read-only.
            let _slower = files::write(switch, b"1");
        }
        match shutdown::quiesce() {
            Ok(helper) => {
                self.helper = Some(helper);
                self.enter(Phase::Unmounting, UNMOUNT_TIMEOUT);
            }
            // Out of memory.
            Err(error) => self.unmount_by_kernel(&error),
        }
    }

    /// Falls back to the kernel's emergency remount. It blocks, but nothing waits for PID 1 any more.
    pub(super) fn unmount_by_kernel(&mut self, error: &Error) {
        self.console.warn(error);
        let left = self.shutdown_deadline.saturating_sub(self.clock());
        let timeout = left.saturating_sub(CONSOLE_DRAIN_TIMEOUT);
        last_resort::remount_by_kernel(timeout.min(UNMOUNT_TIMEOUT), self.console);
        self.context.now = self.clock();
        self.drain();
    }

    /// Starts draining the console: the last phase.
    pub(super) fn drain(&mut self) {
        self.enter(Phase::DrainingConsole, CONSOLE_DRAIN_TIMEOUT);
    }

    /// Reboots once the console has accepted everything, or nothing for too long.
    fn finish_drain(&mut self, late: bool) {
        let more = self.finish_output();
        self.console.flush();
        if late {
            // Silences the kernel's last lines: it would wait 10 ms for each of their bytes
            // (wait_for_xmitr, drivers/tty/serial/8250/8250_port.c).
            let _printed = files::write_at(&self.context.proc, c"sys/kernel/printk", b"0");
        }
        if self.console.pending() == 0 && !more || late {
            shutdown::reboot();
        }
        // Compared by bytes sent, as new output may have been queued meanwhile.
        let sent = self.console.sent();
        if sent != self.console_sent {
            self.console_sent = sent;
            self.drain();
        }
    }
}
