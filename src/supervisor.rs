//! The event loop: from the first moment at which something can happen to the reboot.

use crate::api::{Api, Exit, Host, NEVER, SINK};
use crate::console::Console;
use crate::poll::Source;
use crate::spawn::{self, Command, Failure};
use crate::sys::{self, SignalSet};
use crate::task::{self, Outcome, Report, Task};
use crate::why;
use crate::{end, files, setup};
use pigeon_init::accounts::Identity;
use pigeon_init::config::Config;
use pigeon_init::slab::Key;
use pigeon_init::text::{Level, Line};
use pigeon_init::{kmsg, text};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// Exit code when the workload could not even be started, as in Docker.
const NOT_RUN: i32 = 125;
/// What a killed process's exit code is counted from, as in a shell.
const KILLED: i32 = 128;

/// How long the API waits for somebody to read the exit code, in milliseconds.
pub const LINGER: u64 = 1000;
/// How long a workload that is asked to stop may take, in milliseconds.
const STOP: u64 = 10_000;
/// How long what is left after the workload may take to stop, in milliseconds.
const LEFTOVERS: u64 = 500;
/// How long what is killed may take to go, in milliseconds: a process in the kernel may stay.
const UNKILLABLE: u64 = 2000;
/// How long the disks may take, in milliseconds.
const QUIESCE: u64 = 30_000;
/// How long a console that takes nothing is waited for at the end, in milliseconds.
const SILENCE: u64 = 3000;

/// Pieces of output copied at the end: together more than a pipe holds (pipe(7)).
const PIECES: usize = 8;
/// Records of the kernel's log looked at: more than there can be, unless somebody writes on.
const RECORDS: usize = 1 << 16;

const SIGCHLD: u32 = 17;
const SIGKILL: u32 = 9;
const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
/// All signals that are read from the signalfd: SIGCHLD, and HUP INT QUIT USR1 USR2 TERM, which are
/// sent on to the workload.
pub const HANDLED: SignalSet = SignalSet::of([1, SIGINT, 3, 10, 12, SIGTERM, SIGCHLD]);

/// What is going on.
#[derive(Clone, Copy)]
enum Phase {
    /// Steps 11 to 13 run in a child.
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
    Quiesce,
    /// The console gets its last bytes, as long as it takes any.
    Drain,
}

/// The program's state once it is PID 1.
#[repr(C)]
pub struct Supervisor {
    /// Log and output.
    pub console: &'static mut Console,
    /// Connections and commands.
    pub api: &'static mut Api,
    phase: Phase,
    /// There are more children to reap than were reaped at once.
    reap_more: bool,
    /// There was no child left when one was last reaped.
    alone: bool,
    /// When the phase has taken too long; while the workload runs, when one that was asked to stop
    /// is killed.
    until: u64,
    linger: u64,
    /// How long the VM was paused, as far as deadlines ran meanwhile, in milliseconds.
    paused: u64,
    /// What this phase is about: a task, or the workload.
    child: Option<Task>,
    /// The workload's standard output and error.
    output: Option<OwnedFd>,
    /// How it ended, to be logged behind its output.
    note: Option<Line>,
    output_watched: EventFlags,
    signals: OwnedFd,
    /// /dev/kmsg, from the workload's start on.
    kernel_log: Option<OwnedFd>,
    /// /proc/self/mountinfo, opened before anybody could hide it.
    mounts: Option<OwnedFd>,
    /// What others need, too.
    pub host: Host,
}

impl Supervisor {
    /// A supervisor that does not run yet: [`run`](Self::run) or [`fail`](Self::fail) comes next.
    pub fn new(
        console: &'static mut Console,
        api: &'static mut Api,
        host: Host,
        signals: OwnedFd,
        linger: u64,
    ) -> Self {
        let (key, mut watched) = (Key::default(), EventFlags::empty());
        let wanted = EventFlags::IN;
        host.poller
            .watch(&signals, Source::Signals, key, &mut watched, wanted);
        Self {
            console,
            api,
            phase: Phase::Running,
            reap_more: false,
            alone: false,
            until: NEVER,
            linger,
            paused: 0,
            child: None,
            output: None,
            note: None,
            output_watched: EventFlags::empty(),
            signals,
            kernel_log: None,
            mounts: None,
            host,
        }
    }

    /// The time that deadlines are measured in: it stands still while the VM is paused.
    #[inline(never)]
    fn clock(&self) -> u64 {
        sys::milliseconds().saturating_sub(self.paused)
    }

    /// Steps 11 to 15, to the reboot.
    pub fn run(&mut self, config: &Config, identity: &Identity) -> Outcome {
        self.mounts = files::open(c"/proc/self/mountinfo", OFlags::RDONLY).ok();
        if setup::may_block(config) {
            let task = task::start(&mut |report| {
                setup::disks(config, identity, self.host.scratch, report)
            })?;
            self.child = Some(task);
            self.phase = Phase::Setup;
        }
        setup::network(config, &mut |why| self.console.warn(why))?;
        while let Phase::Setup = self.phase {
            self.turn();
        }
        if self.host.workload.exit.is_none() {
            self.kernel_log = files::open(c"/dev/kmsg", OFlags::NONBLOCK).ok();
            self.start_workload(config, identity)?;
        }
        Ok(())
    }

    /// Something that has to be there is not: says so, and goes to the end.
    pub fn fail(&mut self, why: Line) {
        // Before the first turn there was no look at the clock.
        self.host.now = self.clock();
        self.console.error(text!(why));
        self.ended(Exit {
            code: NOT_RUN,
            oom_killed: false,
            error: Some(why),
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
        let deadline = match self.phase {
            _ if self.reap_more => 0,
            // The console's driver does not tell when its last byte is out.
            Phase::Drain => self.host.now + 1,
            _ => self.until.min(self.api.deadline()),
        };
        // From the last look at the clock on: the VM may also have been paused in the midst of a turn.
        let start = self.host.now;
        let timeout = deadline.saturating_sub(start);
        self.host.poller.wait(deadline.saturating_sub(self.clock()));
        self.host.now = self.clock();
        // Half of it counts: what is waited for has a chance then, and its time still comes.
        if self.host.now.saturating_sub(start) > timeout.saturating_add(sys::PAUSED) {
            let then = start + timeout.div_ceil(2);
            self.paused += self.host.now - then;
            self.host.now = then;
        }
        while let Some((source, key, flags)) = self.host.poller.next() {
            match source {
                Source::Signals => self.read_signal(),
                Source::Listener => self.api.accept(&mut self.host),
                Source::Console => self.console.flush(),
                Source::Workload => {
                    self.copy_output(1);
                }
                _ => self.api.on_event(source, key, flags, &mut self.host),
            }
        }
        if self.reap_more {
            self.reap();
        }
        self.api.on_time(&mut self.host);
        if self.note.is_some() {
            self.finish_output();
        }
        while self.move_on() {}
    }

    /// Registers for what can be done next.
    fn watch(&mut self) {
        let poller = &self.host.poller;
        self.console.watch(poller);
        if let Some(output) = &self.output {
            let wanted = match self.console.has_room() {
                true => EventFlags::IN,
                false => EventFlags::empty(),
            };
            let (output, watched) = (output, &mut self.output_watched);
            poller.watch(output, Source::Workload, Key::default(), watched, wanted);
        }
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
        if let Some(group) = self.host.workload.group {
            let _just_ended = sys::kill_group(group, number);
        }
    }

    fn stop_workload(&mut self) {
        let note = text!("ctrl-alt-del: stopping the workload");
        self.console.log(Level::Info, note, Line::new());
        match self.phase {
            Phase::Running if self.until == NEVER => {
                self.signal_workload(SIGTERM);
                self.until = self.host.now + STOP;
            }
            Phase::Setup => self.fail(text!("stopped before the workload was started")),
            _ => {}
        }
    }

    /// Takes the exit codes of children, so many that nothing else waits long.
    fn reap(&mut self) {
        const AT_ONCE: usize = 256;
        self.reap_more = false;
        for _ in 0..AT_ONCE {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.reaped(pid, status),
                Err(Errno::INTR) => {}
                other => {
                    self.alone = other.is_err();
                    return;
                }
            }
        }
        self.reap_more = true;
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) {
        let Some(child) = self.child.take_if(|child| child.pid == pid) else {
            return self.api.on_exit(pid, status, &mut self.host);
        };
        match self.phase {
            Phase::Running => self.workload_ended(child, status),
            Phase::Setup => match child.outcome(status, self.console) {
                Ok(()) => self.phase = Phase::Running,
                Err(why) => self.fail(why),
            },
            Phase::Quiesce => {
                if let Err(why) = child.outcome(status, self.console) {
                    self.console.warn(why);
                }
                self.enter(Phase::Drain, SILENCE);
            }
            _ => {}
        }
    }

    /// Step 14.
    fn start_workload(&mut self, config: &Config, identity: &Identity) -> Outcome {
        let mut end = None;
        spawn::pipe(false, &mut self.output, &mut end)?;
        let task = task::spawn(&mut |report| {
            let failure = self.become_workload(config, identity, end.take(), report);
            failure.unwrap_or_else(Failure::from).tell(report)
        })?;
        // The workload has the kernel's default; what PID 1 forks from now on is spared like itself.
        sys::set_oom_score(b"-1000");
        self.host.workload.group = Some(task.pid);
        let fields = text!(" pid=", task.pid.as_raw_pid());
        self.console
            .log(Level::Info, text!("workload started"), fields);
        self.child = Some(task);
        Ok(())
    }

    /// In the child: becomes the workload.
    fn become_workload(
        &self,
        config: &Config,
        identity: &Identity,
        end: Option<OwnedFd>,
        report: &Report,
    ) -> Outcome<Failure> {
        let input = spawn::console_input(self.console).map_err(why!("open standard input"))?;
        spawn::enter_session(&[Some(input), end, None], false, report)?;
        let command = Command {
            argv: config.arguments(),
            environment: self.host.environment,
            identity,
            directory: config.working_dir(),
        };
        Ok(command.become_it())
    }

    fn workload_ended(&mut self, workload: Task, status: WaitStatus) {
        if let Some(why) = task::read_report(&workload.report, None) {
            self.console.error(why);
        }
        let signal = status.terminating_signal();
        let oom_killed =
            signal == Some(SIGKILL as i32) && self.killed_by_oom(workload.pid.as_raw_pid() as u32);
        let code = match status.exit_status() {
            Some(code) => code,
            None => KILLED + signal.unwrap_or(0),
        };
        self.note = Some(text!(" exit_code=% oom_killed=%", code, oom_killed));
        self.finish_output();
        self.host.workload.group = None;
        self.ended(Exit {
            code,
            oom_killed,
            error: None,
        });
    }

    /// Whether the kernel's log says so, as far as it is written.
    fn killed_by_oom(&mut self, pid: u32) -> bool {
        let Some(log) = &self.kernel_log else {
            return false;
        };
        // CONSOLE_EXT_LOG_MAX, kernel/printk
        const _: () = assert!(SINK >= 8192);
        for _ in 0..RECORDS {
            match files::read(log, &mut *self.host.sink) {
                Ok(0) => return false,
                Ok(count) => {
                    let record = self.host.sink.get(..count as usize).unwrap_or(&[]);
                    if kmsg::killed_by_oom(record, pid) {
                        return true;
                    }
                }
                // EPIPE: records were overwritten; the next read goes on behind them.
                Err(Errno::PIPE) => {}
                Err(_) => return false,
            }
        }
        false
    }

    /// How it ended is known: those who wait are told, and the end begins.
    fn ended(&mut self, exit: Exit) {
        if self.host.workload.exit.is_some() {
            return;
        }
        self.host.workload.exit = Some(exit);
        self.api.on_workload_exit(&mut self.host);
        let wait = if self.api.is_up() { self.linger } else { 0 };
        self.enter(Phase::Linger, wait);
    }

    /// Copies so many pieces of the workload's output to the console, as far as that has room for
    /// them: not for as long as output comes, as others wait, too. True when there may be more.
    fn copy_output(&mut self, pieces: usize) -> bool {
        for _ in 0..pieces {
            let Some(output) = &self.output else {
                return false;
            };
            if !self.console.has_room() {
                return false;
            }
            match files::read(output, self.console.room()) {
                Ok(count @ 1..) => self.console.commit(count as usize),
                Err(Errno::AGAIN) => return false,
                Ok(_) | Err(_) => self.output = None,
            }
        }
        true
    }

    /// Copies what is left of the output, and says behind it how the workload ended. True when there
    /// may be more.
    fn finish_output(&mut self) -> bool {
        let more = self.copy_output(PIECES);
        if !more
            && self.console.has_room()
            && let Some(fields) = self.note.take()
        {
            self.console
                .log(Level::Info, text!("workload exited"), fields);
        }
        more
    }

    /// The next phase, and how long it may take in milliseconds.
    fn enter(&mut self, phase: Phase, time: u64) {
        self.phase = phase;
        self.until = self.host.now.saturating_add(time);
    }

    /// Moves on when what is waited for has happened, or has taken too long; whether it did.
    fn move_on(&mut self) -> bool {
        let late = self.until <= self.host.now;
        match self.phase {
            Phase::Running if late => {
                self.console
                    .warn(text!("the workload does not stop: killed"));
                self.signal_workload(SIGKILL);
                self.until = NEVER;
            }
            Phase::Linger if late || self.host.workload.told => {
                self.api.close(&mut self.host);
                sys::kill_all(SIGTERM);
                self.enter(Phase::Terminate, LEFTOVERS);
                self.reap();
            }
            Phase::Terminate | Phase::Kill if self.alone => self.quiesce(),
            Phase::Terminate if late => {
                sys::kill_all(SIGKILL);
                self.enter(Phase::Kill, UNKILLABLE);
                self.reap();
            }
            Phase::Kill if late => {
                self.console.warn(text!("a process cannot be killed"));
                self.quiesce();
            }
            Phase::Quiesce if late => {
                self.console
                    .warn(text!("the file systems cannot be left clean in time"));
                self.enter(Phase::Drain, SILENCE);
            }
            Phase::Drain => {
                self.drain(late);
                return false;
            }
            _ => return false,
        }
        true
    }

    /// Leaves the file systems clean, in a child: a disk may take its time.
    fn quiesce(&mut self) {
        let task = task::spawn(&mut |report| {
            let keep = self.mounts.as_ref().unwrap_or(report.pipe());
            sys::close_others(report.pipe(), keep);
            end::quiesce(self.mounts.as_ref(), self.host.scratch, &mut |why| {
                report.warn(why)
            });
            0
        });
        match task {
            Ok(task) => {
                self.child = Some(task);
                self.enter(Phase::Quiesce, QUIESCE);
            }
            // No memory, or a limit that the workload has put on PID 1. Nobody waits for PID 1 now.
            Err(why) => {
                self.console.warn(why);
                end::quiesce(self.mounts.as_ref(), self.host.scratch, &mut |why| {
                    self.console.warn(why)
                });
                self.host.now = self.clock();
                self.enter(Phase::Drain, SILENCE);
            }
        }
    }

    /// Reboots when the console has taken all, or has taken nothing for too long.
    fn drain(&mut self, late: bool) {
        let before = self.console.waiting();
        let more = self.finish_output();
        self.console.flush();
        let left = self.console.waiting();
        if left == 0 && !more || late {
            end::reboot();
        }
        if left != before {
            self.enter(Phase::Drain, SILENCE);
        }
    }
}
