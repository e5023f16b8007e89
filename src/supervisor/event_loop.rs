//! The event loop.

use super::state::{Phase, Supervisor};
use super::workload::MAX_PIECES;
use crate::context::{EventSource, NEVER, Stop};
use crate::process::helper::{self, Helper, Rendezvous};
use crate::sys::signal::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use crate::sys::{self, SignalSet};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// Maximum number of children reaped in one iteration, so that nothing else waits long.
const REAP_AT_ONCE: usize = 256;

/// Time until a failed registration is retried, in milliseconds.
const REGISTER_RETRY: u64 = 100;

/// The signals that are read from the signalfd; all but SIGCHLD are forwarded to the workload.
pub const HANDLED: SignalSet =
    SignalSet::of([SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM, SIGCHLD]);

impl Supervisor {
    /// Starts the API. A VM without vsock has no API, and no events either: for each socket the kernel would
    /// run the root's modprobe and make PID 1 wait for it (__sock_create, net/socket.c).
    pub fn listen(&mut self) {
        if let Err(error) = self.api.listen() {
            self.console.warn(&format_args!("no API: {error}"));
            self.events.disable();
        }
        self.events.send(&"{\"event\":\"ready\"}");
    }

    /// Starts the phase in which a helper prepares what the workload needs.
    pub fn begin_setup(&mut self, helper: Helper) {
        self.helper = Some(helper);
        self.context.now = self.clock();
        self.enter(Phase::Setup, helper::TIMEOUT);
    }

    /// Runs the event loop until the helper has finished; if the helper fails, the boot fails.
    pub fn finish_setup(&mut self, rendezvous: &Rendezvous) {
        let token = EventSource::Helper.token(Key::default());
        let (mut watched, mut wanted) = (EventFlags::empty(), EventFlags::IN);
        loop {
            let poller = &self.context.poller;
            poller.watch(rendezvous.socket(), token, &mut watched, wanted);
            if self.phase != Phase::Setup || self.helper.is_none() {
                return;
            }
            self.run_once();
            if let Some(is_done) = rendezvous.poll() {
                // If it has exited instead, it is reaped soon.
                wanted = EventFlags::empty();
                if let Some(helper) = self.helper.take_if(|_| is_done) {
                    helper.log_warnings(self.console);
                }
            }
        }
    }

    /// One iteration: waits for events, handles them and runs what is due.
    pub fn run_once(&mut self) {
        self.watch();
        self.wait();
        while let Some((token, flags)) = self.context.poller.next() {
            if let Some((source, key)) = EventSource::from_token(token) {
                self.on_event(source, key, flags);
            }
        }
        self.release_launch();
        if self.reap_more {
            self.reap();
        }
        if self.context.guest_threads.settle() {
            self.copy_output(MAX_PIECES);
            self.api.on_any_output(&mut self.context);
        }
        self.api.run_timers(&mut self.context);
        if let Some(stop) = self.context.workload.stop.take() {
            self.stop_workload(stop);
        }
        if self.unlogged_exit.is_some() {
            self.finish_output();
        }
        while self.advance() {}
    }

    /// Dispatches an event to the source's handler.
    fn on_event(&mut self, source: EventSource, key: Key, flags: EventFlags) {
        match source {
            EventSource::Signals => {
                self.read_signal();
            }
            EventSource::Listener => self.api.accept(&mut self.context),
            EventSource::Console => self.console.flush(),
            EventSource::ConsoleInput => self.input.copy(&mut self.context),
            // `finish_setup` checks after each iteration.
            EventSource::Helper => {}
            EventSource::Events => self.events.on_event(flags),
            #[cfg(feature = "snapshot")]
            EventSource::RestoreTrigger => self.context.snapshot.trigger_events |= flags,
            EventSource::WorkloadStdout | EventSource::WorkloadStderr => self.copy_output(1),
            _ => self.api.on_event(source, key, flags, &mut self.context),
        }
    }

    /// Registers the events of all sources that can make progress.
    pub(super) fn watch(&mut self) {
        if self.context.poller.has_failed() {
            self.context.poller.clear_failed();
            self.api.watch(&mut self.context);
        }
        let token = EventSource::Signals.token(Key::default());
        let watched = &mut self.signals_watched;
        let poller = &self.context.poller;
        poller.watch(&self.signals, token, watched, EventFlags::IN);
        self.api.watch_listener(poller);
        self.console.watch(&self.context.poller);
        self.input.watch(&self.context);
        self.events.watch(&self.context.poller);
        self.api.protect_log(&mut self.context);
        self.output.watch(self.console, &mut self.context);
    }

    /// Waits for events, at most until the next deadline, and updates the clock.
    fn wait(&mut self) {
        let deadline = self.next_deadline();
        let remaining = match deadline {
            NEVER => NEVER,
            _ => deadline.saturating_sub(self.clock()),
        };
        self.context.poller.wait(remaining);
        self.update_clock(deadline.saturating_sub(self.context.now));
    }

    /// The next deadline of all modules.
    fn next_deadline(&self) -> u64 {
        let now = self.context.now;
        let (output, log) = (&self.output, &self.context.output_log);
        let deadline = match self.phase {
            _ if self.reap_more || output.can_proceed(self.console, log) => 0,
            // The console's driver does not report when its last byte has been sent.
            Phase::DrainingConsole => now + 1,
            _ => self
                .deadline
                .min(self.api.deadline())
                .min(self.context.deadline()),
        };
        match self.context.poller.has_failed() {
            true => deadline.min(now.saturating_add(REGISTER_RETRY)),
            false => deadline,
        }
    }

    /// Updates `now`. If far more than `timeout` milliseconds have passed since the last update, the VM
    /// was paused: then only half of `timeout` counts, so that pending operations still get some time, and
    /// their deadline is still reached.
    fn update_clock(&mut self, timeout: u64) {
        let start = self.context.now;
        let now = self.clock();
        let elapsed = now.saturating_sub(start);
        self.context.now = now;
        if elapsed > timeout.saturating_add(sys::PAUSE_THRESHOLD) {
            self.context.now = start + timeout.div_ceil(2);
            self.paused += now - self.context.now;
        }
    }

    /// Copies some pieces of the workload's output, and sends them to log followers.
    fn copy_output(&mut self, pieces: usize) {
        // A new follower may have connected in this iteration.
        self.api.protect_log(&mut self.context);
        self.output
            .copy(pieces, self.console, &mut self.context.output_log);
        self.api.on_output(&mut self.context);
    }

    /// Reads the signals that arrived while the boot waited elsewhere.
    pub fn read_signals(&mut self) {
        while self.read_signal() {}
    }

    /// Reads one signal; another pending one wakes the next iteration. Returns whether there was one.
    fn read_signal(&mut self) -> bool {
        let Ok(signal) = sys::read_signal(&self.signals) else {
            return false;
        };
        match signal.number {
            SIGCHLD => self.reap(),
            // Ctrl-Alt-Del: a SIGINT from the kernel (kernel/reboot.c, ctrl_alt_del).
            SIGINT if signal.from_kernel => {
                self.console.info(&"ctrl-alt-del", &"");
                self.stop_workload(Stop::DEFAULT);
            }
            // All other signals of HANDLED are for the workload.
            _ if self.phase == Phase::Setup => self.stop_workload(Stop::DEFAULT),
            number => self.signal_workload(number),
        }
        true
    }

    /// Reaps exited children.
    pub(super) fn reap(&mut self) {
        self.reap_more = false;
        self.has_no_children = false;
        for _ in 0..REAP_AT_ONCE {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.on_child_exit(pid, status),
                Err(Errno::INTR) => {}
                other => {
                    self.has_no_children = other.is_err();
                    return;
                }
            }
        }
        self.reap_more = true;
    }

    /// Handles the exit of a child.
    fn on_child_exit(&mut self, pid: Pid, status: WaitStatus) {
        #[cfg(feature = "snapshot")]
        if self.context.snapshot.helper == Some(pid) {
            self.context.snapshot.helper_status = Some(status);
            return;
        }
        if let Some(workload) = self.workload.take_if(|workload| workload.pid == pid) {
            // A workload that could not be killed in time has an exit code already.
            if matches!(self.phase, Phase::Running | Phase::KillingWorkload) {
                self.on_workload_exit(workload, status);
            }
            return;
        }
        let Some(helper) = self.helper.take_if(|helper| helper.pid == pid) else {
            return self.api.on_exit(pid, status, &mut self.context);
        };
        let log = &mut *self.console;
        match self.phase {
            Phase::Setup => {
                if let Err(error) = helper.result(status, log) {
                    self.fail(error);
                }
            }
            Phase::Unmounting => match helper.result(status, log) {
                Ok(()) => self.drain(),
                Err(error) => self.unmount_by_kernel(&error),
            },
            _ => {}
        }
    }
}
