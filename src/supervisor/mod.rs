//! The event loop: from the first moment at which something can happen to the reboot.

pub mod console;
mod oom;
mod phase;
mod workload;

use crate::api::Api;
use crate::context::{Context, Exit, NEVER, Source};
use crate::error::Error;
use crate::process::helper::{self, Helper};
use crate::sys::{self, SignalSet};
use console::Console;
use phase::Phase;
use proto::message::Message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use workload::Output;

/// Exit code when the workload could not even be started, as in Docker.
const NOT_RUN: i32 = 125;

/// How long the API waits for somebody to read the exit code, in milliseconds.
pub const LINGER: u64 = 1000;

/// Children reaped in a turn: so many that nothing else waits long.
const REAP_AT_ONCE: usize = 256;

const SIGCHLD: u32 = 17;
const SIGKILL: u32 = 9;
const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;

/// All signals that are read from the signalfd: SIGCHLD, and HUP INT QUIT USR1 USR2 TERM, which are
/// passed on to the workload.
pub const HANDLED: SignalSet = SignalSet::of([1, SIGINT, 3, 10, 12, SIGTERM, SIGCHLD]);

/// The program's state once it is PID 1.
pub struct Supervisor {
    /// Log and output.
    pub console: &'static mut Console,
    /// Connections and commands.
    pub api: &'static mut Api,
    /// What all rooms share.
    pub context: Context,
    phase: Phase,
    /// When the phase has taken too long; while the workload runs, when one that was asked to stop
    /// is killed.
    deadline: u64,
    /// When the end has taken too long.
    end: u64,
    /// There are more children to reap than were reaped at once.
    reap_more: bool,
    /// There was no child left when one was last reaped.
    childless: bool,
    linger: u64,
    /// How long the VM was paused, as far as deadlines ran meanwhile, in milliseconds.
    paused: u64,
    /// What this phase is about: a helper, or the workload.
    child: Option<Helper>,
    /// The workload's standard output and error.
    output: Output,
    /// How the workload ended, as fields of a log line that stands behind its output.
    exit_fields: Option<Message>,
    signals: OwnedFd,
    /// /dev/kmsg, from the workload's start on.
    kernel_log: Option<OwnedFd>,
}

impl Supervisor {
    /// A supervisor that does not run yet.
    pub fn new(
        console: &'static mut Console,
        api: &'static mut Api,
        context: Context,
        signals: OwnedFd,
        linger: u64,
    ) -> Self {
        let token = Source::Signals.token(Key::default());
        let mut watched = EventFlags::empty();
        context
            .poller
            .watch(&signals, token, &mut watched, EventFlags::IN);
        Self {
            console,
            api,
            context,
            phase: Phase::Setup,
            deadline: NEVER,
            end: NEVER,
            reap_more: false,
            childless: false,
            linger,
            paused: 0,
            child: None,
            output: Output::new(),
            exit_fields: None,
            signals,
            kernel_log: None,
        }
    }

    /// The time that deadlines are measured in: it stands still while the VM is paused.
    fn clock(&self) -> u64 {
        sys::milliseconds().saturating_sub(self.paused)
    }

    /// Opens the API; a VM without vsock goes on without.
    pub fn listen(&mut self) {
        if let Err(error) = self.api.listen(&self.context) {
            self.console.warn(&format_args!("no API: {error}"));
        }
    }

    /// From now on a helper prepares what the workload needs.
    pub fn begin_setup(&mut self, helper: Helper) {
        self.child = Some(helper);
        self.context.now = self.clock();
        self.enter(Phase::Setup, helper::TIMEOUT);
    }

    /// Serves until the helper has ended; one that fails is the end of the boot.
    pub fn finish_setup(&mut self) {
        while self.phase == Phase::Setup && self.child.is_some() {
            self.turn();
        }
    }

    /// Whether the boot is over without a workload.
    pub fn has_ended(&self) -> bool {
        self.context.workload.exit.is_some()
    }

    /// Something that has to be there is not: says so, and goes to the end.
    pub fn fail(&mut self, error: Error) {
        // Before the first turn there was no look at the clock.
        self.context.now = self.clock();
        self.console.error(&error);
        self.ended(Exit {
            code: NOT_RUN,
            oom_killed: false,
            error: Some(error),
        });
    }

    /// Serves until the reboot.
    pub fn serve(&mut self) -> ! {
        loop {
            self.turn();
        }
    }

    /// Waits for something to happen and does what follows from it.
    fn turn(&mut self) {
        self.watch();
        self.wait();
        while let Some((token, flags)) = self.context.poller.next() {
            let Some((source, key)) = Source::of_token(token) else {
                continue;
            };
            match source {
                Source::Signals => self.read_signal(),
                Source::Listener => self.api.accept(&mut self.context),
                Source::Console => self.console.flush(),
                Source::Workload | Source::WorkloadError => self.copy_output(),
                _ => self.api.on_event(source, key, flags, &mut self.context),
            }
        }
        if self.reap_more {
            self.reap();
        }
        self.api.on_time(&mut self.context);
        if self.exit_fields.is_some() {
            self.finish_output();
        }
        while self.advance() {}
    }

    /// Registers for what can be done next.
    fn watch(&mut self) {
        self.console.watch(&self.context.poller);
        self.api.protect_log(&mut self.context);
        self.output.watch(self.console, &mut self.context);
    }

    /// Waits for events, at most until the next deadline, and looks at the clock.
    fn wait(&mut self) {
        let deadline = match self.phase {
            _ if self.reap_more => 0,
            // The console's driver does not tell when its last byte is out.
            Phase::Drain => self.context.now + 1,
            _ => self.deadline.min(self.api.deadline()),
        };
        // From the last look at the clock on: the VM may also have been paused in the midst of a turn.
        let start = self.context.now;
        let timeout = deadline.saturating_sub(start);
        let remaining = deadline.saturating_sub(self.clock());
        self.context.poller.wait(remaining);
        self.context.now = self.clock();
        // Half of it counts: what is waited for has a chance then, and its time still comes.
        let elapsed = self.context.now.saturating_sub(start);
        if elapsed > timeout.saturating_add(sys::PAUSED) {
            let then = start + timeout.div_ceil(2);
            self.paused += self.context.now - then;
            self.context.now = then;
        }
    }

    /// Copies a piece of the workload's output, and lets those who follow it read it.
    fn copy_output(&mut self) {
        self.output
            .copy(1, self.console, &mut self.context.output_log);
        self.api.on_output(&mut self.context);
    }

    /// One a turn: those that wait make the next turn.
    fn read_signal(&mut self) {
        let Ok(signal) = sys::read_signal(&self.signals) else {
            return;
        };
        match signal.number {
            SIGCHLD => self.reap(),
            // Ctrl-Alt-Del: the kernel's own SIGINT (kernel/reboot.c, ctrl_alt_del).
            SIGINT if signal.from_kernel => self.stop_workload(),
            // HANDLED has no other: they are for the workload.
            number => self.signal_workload(number),
        }
    }

    fn signal_workload(&self, number: u32) {
        if let Some(group) = self.context.workload.group {
            let _just_ended = sys::kill_group(group, number);
        }
    }

    /// Takes the exit codes of children.
    fn reap(&mut self) {
        self.reap_more = false;
        self.childless = false;
        for _ in 0..REAP_AT_ONCE {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.reaped(pid, status),
                Err(Errno::INTR) => {}
                other => {
                    self.childless = other.is_err();
                    return;
                }
            }
        }
        self.reap_more = true;
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) {
        let Some(child) = self.child.take_if(|child| child.pid == pid) else {
            return self.api.on_exit(pid, status, &mut self.context);
        };
        let log = &mut *self.console;
        match self.phase {
            Phase::Running => self.workload_ended(child, status),
            Phase::Setup => {
                if let Err(error) = child.result(status, log) {
                    self.fail(error);
                }
            }
            Phase::Unmount => {
                if let Err(error) = child.result(status, log) {
                    self.console.warn(&error);
                }
                self.drain();
            }
            _ => {}
        }
    }

    /// How it ended is known: those who wait are told, and the end begins.
    fn ended(&mut self, exit: Exit) {
        if self.has_ended() {
            return;
        }
        self.context.workload.exit = Some(exit);
        self.api.on_workload_exit(&mut self.context);
        let linger = if self.api.is_up() { self.linger } else { 0 };
        self.enter(Phase::Linger, linger);
    }
}
