//! The supervisor's state.

use super::events::Events;
use super::input::ConsoleInput;
use super::output::Output;
use crate::api::Api;
use crate::console::Console;
use crate::context::{Context, Exit, NEVER};
use crate::error::Error;
use crate::process::exec::Launch;
use crate::process::helper::Helper;
use crate::sys;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;

/// Exit code when the workload could not even be started, as in Docker.
const NOT_RUN: i32 = 125;

/// The phase of a VM's life.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The boot; what may wait for a disk runs in a helper.
    Setup,
    /// The workload runs.
    Running,
    /// The workload has been sent SIGKILL.
    KillingWorkload,
    /// The workload has exited; clients can still read its exit code.
    Linger,
    /// Remaining processes have been sent SIGTERM.
    TerminatingProcesses,
    /// Remaining processes have been sent SIGKILL.
    KillingProcesses,
    /// A helper unmounts the file systems.
    Unmounting,
    /// The console's last output is being written, as long as it takes any.
    DrainingConsole,
}

/// The state of PID 1.
pub struct Supervisor {
    /// Log and output.
    pub console: &'static mut Console,
    /// Connections and commands.
    pub api: &'static mut Api,
    /// What all modules share.
    pub context: Context,
    pub(super) phase: Phase,
    /// When the phase times out; while the workload runs, when a workload that was asked to stop is
    /// killed.
    pub(super) deadline: u64,
    /// When the shutdown times out.
    pub(super) shutdown_deadline: u64,
    /// The last iteration reached its limit of children: there may be more to reap.
    pub(super) reap_more: bool,
    /// At the last reaping there were no children left.
    pub(super) has_no_children: bool,
    pub(super) linger: u64,
    /// Bytes that the console had sent at the last check, for a drain that makes progress.
    pub(super) console_sent: usize,
    /// How long the VM was paused while a deadline was running, in milliseconds.
    pub(super) paused: u64,
    /// The helper of this phase.
    pub(super) helper: Option<Helper>,
    /// The workload, until it is reaped.
    pub(super) workload: Option<Launch>,
    /// Events sent to the host.
    pub events: Events,
    /// The workload's standard input, unless that is the console itself.
    pub(super) input: ConsoleInput,
    /// The workload's standard output and error.
    pub(super) output: Output,
    /// The exit code, and whether the workload was OOM-killed; logged once its output is written.
    pub(super) unlogged_exit: Option<(i32, bool)>,
    pub(super) signals: OwnedFd,
    /// Poller events registered for the signalfd.
    pub(super) signals_watched: EventFlags,
    /// /dev/kmsg, positioned at the workload's start.
    pub(super) kernel_log: Option<OwnedFd>,
}

impl Supervisor {
    /// A supervisor in the first phase.
    pub fn new(
        console: &'static mut Console,
        api: &'static mut Api,
        context: Context,
        signals: OwnedFd,
        linger: u64,
    ) -> Self {
        Self {
            console,
            api,
            context,
            phase: Phase::Setup,
            deadline: NEVER,
            shutdown_deadline: NEVER,
            reap_more: false,
            has_no_children: false,
            linger,
            console_sent: 0,
            paused: 0,
            helper: None,
            workload: None,
            events: Events::new(None),
            input: ConsoleInput::default(),
            output: Output::new(),
            unlogged_exit: None,
            signals,
            signals_watched: EventFlags::empty(),
            kernel_log: None,
        }
    }

    /// The time that deadlines are measured in: it does not advance while the VM is paused.
    pub(super) fn clock(&self) -> u64 {
        sys::milliseconds().saturating_sub(self.paused)
    }

    /// Enters a phase, which may take `time` milliseconds.
    pub(super) fn enter(&mut self, phase: Phase, time: u64) {
        self.phase = phase;
        self.deadline = self
            .context
            .now
            .saturating_add(time)
            .min(self.shutdown_deadline);
    }

    /// Whether the workload has exited, or could not be started.
    pub fn has_exit(&self) -> bool {
        self.context.workload.exit.is_some()
    }

    /// The workload cannot run: logs why, and begins the shutdown.
    pub fn fail(&mut self, error: Error) {
        self.fail_with_code(NOT_RUN, error);
    }

    /// The same, with another exit code than 125.
    pub(super) fn fail_with_code(&mut self, code: i32, error: Error) {
        // The boot may have taken some time since the clock was last read.
        self.context.now = self.clock();
        self.console.error(&error);
        // Followers of a workload that was never started, or cannot be killed, wait for nothing more.
        self.context.output_log.end();
        self.set_exit(Exit {
            code,
            oom_killed: false,
            error: Some(error),
        });
        self.api.on_output(&mut self.context);
    }

    /// Reports the exit to clients and begins the shutdown.
    pub(super) fn set_exit(&mut self, exit: Exit) {
        if self.has_exit() {
            return;
        }
        let Exit {
            code, oom_killed, ..
        } = exit;
        self.events.send_exit(&format_args!(
            "{{\"event\":\"exited\",\"code\":{code},\"oom_killed\":{oom_killed}}}"
        ));
        self.context.workload.exit = Some(exit);
        self.context.workload.group = None;
        self.api.on_workload_exit(&mut self.context);
        let linger = if self.api.is_up() { self.linger } else { 0 };
        self.enter(Phase::Linger, linger);
    }

    /// Sends a signal to the workload's process group.
    pub fn signal_workload(&self, number: u32) {
        if let Some(group) = self.context.workload.group {
            let _just_ended = sys::kill_group(group, number);
        }
    }
}
