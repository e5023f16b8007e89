//! The event loop: from the first moment at which something can happen to the reboot.

use crate::api::{Api, Exit, Host, Workload};
use crate::commands::Context;
use crate::console::Console;
use crate::poll::{EVENTS, Poller, Source};
use crate::spawn::{self, Command, Streams};
use crate::sys::{self, SignalSet};
use crate::task::{self, Outcome, Report, Task};
use crate::why;
use crate::{end, files, setup};
use pigeon_init::accounts::Identity;
use pigeon_init::command::Environment;
use pigeon_init::config::{Config, DOCUMENT};
use pigeon_init::text::{Level, Line, Show};
use pigeon_init::{kmsg, text};
use rustix::event::epoll::EventFlags;
use rustix::fd::{AsFd, OwnedFd};
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

const SIGCHLD: u32 = 17;
const SIGKILL: u32 = 9;
const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
/// HUP INT QUIT USR1 USR2 TERM: what is sent on to the workload.
const FORWARDED: [u32; 6] = [1, SIGINT, 3, 10, 12, SIGTERM];

/// Output that is dropped, a piece at a time.
pub const SINK: usize = 16 << 10;

/// All signals that are read from the signalfd.
pub const HANDLED: SignalSet = SignalSet::of([1, SIGINT, 3, 10, 12, SIGTERM, SIGCHLD]);

/// What is going on.
enum Phase {
    /// Steps 11 to 13 run in a child.
    Setup(Task),
    /// The workload runs.
    Running,
    /// It has ended; somebody may yet ask how.
    Linger(u64),
    /// What is left is asked to go until then.
    Terminate(u64),
    /// What is left is killed, and waited for until then.
    Kill(u64),
    /// The file systems are being left clean, until then.
    Quiesce(Task, u64),
    /// The console gets its last bytes, as long as it takes any until then.
    Drain(u64),
}

/// The program's state once it is PID 1.
pub struct Supervisor {
    /// Log and output.
    pub console: &'static mut Console,
    /// Connections and commands.
    pub api: &'static mut Api,
    /// The workload's environment.
    pub environment: &'static mut Environment,
    /// Room for files.
    pub scratch: &'static mut [u8; 2 * DOCUMENT],
    sink: &'static mut [u8; SINK],
    /// The event loop's descriptor.
    pub poller: Poller,
    signals: OwnedFd,
    /// /dev/kmsg, from the workload's start on.
    kernel_log: Option<OwnedFd>,
    /// /proc/self/mountinfo, opened before anybody could hide it.
    mounts: Option<OwnedFd>,
    phase: Phase,
    workload: Workload,
    process: Option<Process>,
    linger: u64,
    /// When a workload that was asked to stop is killed.
    stop: Option<u64>,
    /// There are more children to reap than were reaped at once.
    reap_more: bool,
    console_watched: EventFlags,
    /// When this turn's events came, in milliseconds.
    now: u64,
    /// How long the VM was paused, as far as deadlines ran meanwhile, in milliseconds.
    paused: u64,
}

/// The workload's process.
struct Process {
    /// Until it is reaped.
    pid: Option<Pid>,
    report: OwnedFd,
    /// Its standard output and error.
    output: Option<OwnedFd>,
    watched: EventFlags,
}

/// What the supervisor is made of.
pub struct Parts {
    /// Log and output.
    pub console: &'static mut Console,
    /// Connections and commands.
    pub api: &'static mut Api,
    /// The workload's environment.
    pub environment: &'static mut Environment,
    /// Room for files.
    pub scratch: &'static mut [u8; 2 * DOCUMENT],
    /// Where output goes that nobody gets.
    pub sink: &'static mut [u8; SINK],
    /// The event loop's descriptor.
    pub poller: Poller,
    /// The signals.
    pub signals: OwnedFd,
    /// How long to wait for a late reader.
    pub linger: u64,
}

impl Supervisor {
    /// A supervisor that does not run yet: [`run`](Self::run) or [`fail`](Self::fail) comes next.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            console,
            api,
            environment,
            scratch,
            sink,
            poller,
            signals,
            linger,
        } = parts;
        poller.watch(
            &signals,
            Source::Signals,
            EventFlags::empty(),
            EventFlags::IN,
        );
        Self {
            console,
            api,
            environment,
            scratch,
            sink,
            poller,
            signals,
            kernel_log: None,
            mounts: None,
            phase: Phase::Running,
            workload: Workload::default(),
            process: None,
            linger,
            stop: None,
            reap_more: false,
            console_watched: EventFlags::empty(),
            now: sys::milliseconds(),
            paused: 0,
        }
    }

    /// The time that deadlines are measured in: it stands still while the VM is paused.
    fn clock(&self) -> u64 {
        sys::milliseconds().saturating_sub(self.paused)
    }

    /// Steps 11 to 15, to the reboot.
    pub fn run(&mut self, config: &Config, identity: &Identity) -> Outcome {
        self.mounts = files::open(c"/proc/self/mountinfo", OFlags::RDONLY).ok();
        if setup::may_block(config) {
            let task =
                task::start(&mut |report| setup::disks(config, identity, self.scratch, report))?;
            self.phase = Phase::Setup(task);
        }
        setup::network(config, |why| self.console.warn(why))?;
        while let Phase::Setup(_) = self.phase {
            self.turn();
        }
        if self.workload.exit.is_none() {
            self.kernel_log = files::open(c"/dev/kmsg", OFlags::NONBLOCK).ok();
            self.start_workload(config, identity)?;
        }
        Ok(())
    }

    /// Something that has to be there is not: says so, and goes to the end.
    pub fn fail(&mut self, why: Line) {
        // Before the first turn there was no look at the clock.
        self.now = self.clock();
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
        let start = self.clock();
        let timeout = match self.deadline() {
            _ if self.reap_more => Some(0),
            Some(deadline) => Some(deadline.saturating_sub(start)),
            None => None,
        };
        let mut events = heapless::Vec::<_, EVENTS>::new();
        self.poller.wait(timeout, &mut events);
        self.now = self.clock();
        if let Some(late) = timeout.and_then(|timeout| self.now.checked_sub(start + timeout))
            && late > sys::PAUSED
        {
            self.paused += late;
            self.now -= late;
        }
        for (source, flags) in &events {
            match *source {
                Source::Signals => self.read_signals(),
                Source::Listener => self.with_api(|api, host| api.accept(host)),
                Source::Console => self.console.flush(),
                Source::Workload => self.copy_output(),
                Source::Connection(key) => {
                    self.with_api(|api, host| api.on_connection(key, *flags, host))
                }
                Source::Output(key) | Source::Input(key) => {
                    self.with_api(|api, host| api.on_command(key, 0, host))
                }
                Source::ErrorOutput(key) => self.with_api(|api, host| api.on_command(key, 1, host)),
            }
        }
        if self.reap_more {
            self.reap();
        }
        self.on_time();
    }

    fn with_api(&mut self, f: impl FnOnce(&mut Api, &mut Host)) {
        let mut host = Host {
            context: Context {
                poller: &self.poller,
                environment: self.environment,
                scratch: self.scratch,
                now: self.now,
            },
            workload: &mut self.workload,
            sink: self.sink,
        };
        f(self.api, &mut host);
    }

    /// Registers for what can be done next.
    fn watch(&mut self) {
        if let Some(device) = self.console.device() {
            let wanted = if self.console.is_flushed() {
                EventFlags::empty()
            } else {
                EventFlags::OUT
            };
            self.console_watched =
                self.poller
                    .watch(device, Source::Console, self.console_watched, wanted);
        }
        if let Some(Process {
            output: Some(output),
            watched,
            ..
        }) = &mut self.process
        {
            let wanted = if self.console.has_room() {
                EventFlags::IN
            } else {
                EventFlags::empty()
            };
            *watched = self
                .poller
                .watch(output, Source::Workload, *watched, wanted);
        }
    }

    fn deadline(&self) -> Option<u64> {
        let phase = match self.phase {
            Phase::Setup(_) | Phase::Running => self.stop,
            Phase::Linger(until)
            | Phase::Terminate(until)
            | Phase::Kill(until)
            | Phase::Quiesce(_, until) => Some(until),
            // The console's driver does not tell when its last byte is out.
            Phase::Drain(until) => Some(until.min(self.now + 1)),
        };
        [phase, self.api.deadline()].into_iter().flatten().min()
    }

    fn read_signals(&mut self) {
        // One a turn: those that wait make the next turn.
        if let Ok(signal) = sys::read_signal(self.signals.as_fd()) {
            match signal.number {
                SIGCHLD => self.reap(),
                // Ctrl-Alt-Del: the kernel's own SIGINT (kernel/reboot.c, ctrl_alt_del).
                SIGINT if signal.from_kernel => self.stop_workload(),
                number if FORWARDED.contains(&number) => {
                    if let Some(group) = self.workload.group {
                        let _just_ended = sys::kill_group(group, number);
                    }
                }
                _ => {}
            }
        }
    }

    fn stop_workload(&mut self) {
        let note = text!("ctrl-alt-del: stopping the workload");
        self.console.log(Level::Info, note, &[]);
        match (&self.phase, self.workload.group) {
            (Phase::Running, Some(group)) if self.stop.is_none() => {
                let _just_ended = sys::kill_group(group, SIGTERM);
                self.stop = Some(self.now.saturating_add(STOP));
            }
            (Phase::Setup(_), _) => self.fail(text!("stopped before the workload was started")),
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
                Ok(None) | Err(_) => return,
            }
        }
        self.reap_more = true;
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) {
        if self
            .process
            .as_ref()
            .is_some_and(|process| process.pid == Some(pid))
        {
            return self.workload_ended(pid, status);
        }
        match &self.phase {
            Phase::Setup(task) if task.pid == pid => {
                let error = self.read_report();
                match task::outcome(error, status) {
                    Ok(()) => self.phase = Phase::Running,
                    Err(why) => self.fail(why),
                }
            }
            Phase::Quiesce(task, _) if task.pid == pid => {
                let error = self.read_report();
                if let Err(why) = task::outcome(error, status) {
                    self.console.warn(why);
                }
                self.phase = Phase::Drain(self.now.saturating_add(SILENCE));
            }
            _ => self.with_api(|api, host| {
                api.on_exit(pid, status, host);
            }),
        }
    }

    /// The report of the task of this phase, which has ended.
    fn read_report(&mut self) -> Option<Line> {
        match &self.phase {
            Phase::Setup(task) | Phase::Quiesce(task, _) => {
                task::read_report(&task.report, Some(self.console))
            }
            _ => None,
        }
    }

    /// Step 14.
    fn start_workload(&mut self, config: &Config, identity: &Identity) -> Outcome {
        let (output, end) = task::pipe()?;
        task::block(&end)?;
        let task =
            task::spawn(&mut |report| self.become_workload(config, identity, end.as_fd(), report))?;
        // The workload has the kernel's default; what PID 1 forks from now on is spared like itself.
        sys::set_oom_score(b"-1000");
        self.workload.group = Some(task.pid);
        let pid = task.pid.as_raw_pid();
        let fields: [(&str, &dyn Show); 1] = [("pid", &pid)];
        self.console
            .log(Level::Info, text!("workload started"), &fields);
        self.process = Some(Process {
            pid: Some(task.pid),
            report: task.report,
            output: Some(output),
            watched: EventFlags::empty(),
        });
        Ok(())
    }

    /// In the child: becomes the workload.
    fn become_workload(
        &mut self,
        config: &Config,
        identity: &Identity,
        end: rustix::fd::BorrowedFd,
        report: &Report,
    ) -> i32 {
        let entered = spawn::console_input(self.console)
            .map_err(why!("open standard input"))
            .and_then(|input| {
                spawn::enter_session(&Streams::Each([input.as_fd(), end, end]), report)
            });
        if let Err(why) = entered {
            return task::finish(Err(why), report);
        }
        Command {
            argv: config.argv(),
            environment: self.environment,
            identity,
            directory: config.working_dir(),
        }
        .become_it(report)
    }

    fn workload_ended(&mut self, pid: Pid, status: WaitStatus) {
        self.copy_output();
        let Some(process) = &mut self.process else {
            return;
        };
        process.pid = None;
        if let Some(why) = task::read_report(&process.report, None) {
            self.console.error(why);
        }
        let signal = status.terminating_signal();
        let oom_killed =
            signal == Some(SIGKILL as i32) && self.killed_by_oom(pid.as_raw_pid().unsigned_abs());
        let code = match (status.exit_status(), signal) {
            (Some(code), _) => code,
            (None, signal) => KILLED.saturating_add(signal.unwrap_or(0)),
        };
        let fields: [(&str, &dyn Show); 2] = [("exit_code", &code), ("oom_killed", &oom_killed)];
        self.console
            .log(Level::Info, text!("workload exited"), &fields);
        self.workload.group = None;
        self.ended(Exit {
            code,
            oom_killed,
            error: None,
        });
    }

    /// Whether the kernel's log says so, as far as it is written.
    fn killed_by_oom(&self, pid: u32) -> bool {
        let Some(log) = &self.kernel_log else {
            return false;
        };
        // CONSOLE_EXT_LOG_MAX, kernel/printk
        let mut record = [0; 8192];
        loop {
            match files::read(log, &mut record) {
                Ok(0) => return false,
                Ok(count) if kmsg::killed_by_oom(record.get(..count).unwrap_or(&[]), pid) => {
                    return true;
                }
                // EPIPE: records were overwritten; the next read goes on behind them.
                Ok(_) | Err(Errno::PIPE) => {}
                Err(_) => return false,
            }
        }
    }

    /// How it ended is known: those who wait are told, and the end begins.
    fn ended(&mut self, exit: Exit) {
        if self.workload.exit.is_some() {
            return;
        }
        self.workload.exit = Some(exit);
        self.with_api(|api, host| api.on_workload_exit(host));
        let now = self.now;
        let wait = if self.api.is_up() { self.linger } else { 0 };
        self.phase = Phase::Linger(now.saturating_add(wait));
    }

    /// Copies the workload's output to the console, as much as that has room for.
    fn copy_output(&mut self) {
        let Some(process) = &mut self.process else {
            return;
        };
        while let Some(output) = &process.output
            && self.console.has_room()
        {
            match files::read(output, self.console.room()) {
                Ok(0) => process.output = None,
                Ok(count) => self.console.commit(count),
                Err(Errno::AGAIN) => return,
                Err(_) => process.output = None,
            }
        }
    }

    /// Moves on when what is waited for has happened, or has taken too long.
    fn on_time(&mut self) {
        if let Some(deadline) = self.api.deadline()
            && deadline <= self.now
        {
            self.with_api(|api, host| api.on_time(host));
        }
        loop {
            let now = self.now;
            match self.phase {
                Phase::Setup(_) => return,
                Phase::Running => {
                    if let (Some(at), Some(group)) = (self.stop, self.workload.group)
                        && at <= now
                    {
                        self.console
                            .warn(text!("the workload does not stop: killed"));
                        let _just_ended = sys::kill_group(group, SIGKILL);
                        self.stop = None;
                    }
                    return;
                }
                Phase::Linger(until) if self.workload.told || until <= now => {
                    self.api.close(&mut self.workload);
                    sys::kill_all(SIGTERM);
                    self.phase = Phase::Terminate(now.saturating_add(LEFTOVERS));
                    self.reap();
                }
                Phase::Terminate(_) | Phase::Kill(_) if !has_children() => {
                    return self.quiesce(now);
                }
                Phase::Terminate(until) if until <= now => {
                    sys::kill_all(SIGKILL);
                    self.phase = Phase::Kill(now.saturating_add(UNKILLABLE));
                    self.reap();
                }
                Phase::Kill(until) if until <= now => {
                    self.console.warn(text!("a process cannot be killed"));
                    return self.quiesce(now);
                }
                Phase::Quiesce(_, until) if until <= now => {
                    self.console
                        .warn(text!("the file systems cannot be left clean in time"));
                    self.phase = Phase::Drain(now.saturating_add(SILENCE));
                }
                Phase::Drain(until) => {
                    let before = self.console.waiting();
                    self.copy_output();
                    self.console.flush();
                    let left = self.console.waiting();
                    if left == 0 || until <= now {
                        end::reboot();
                    }
                    if left != before {
                        self.phase = Phase::Drain(now.saturating_add(SILENCE));
                    }
                    return;
                }
                Phase::Linger(_) | Phase::Terminate(_) | Phase::Kill(_) | Phase::Quiesce(..) => {
                    return;
                }
            }
        }
    }

    /// Leaves the file systems clean, in a child: a disk may take its time.
    fn quiesce(&mut self, now: u64) {
        let task = task::spawn(&mut |report| {
            let keep = self.mounts.as_ref().unwrap_or(report.pipe());
            sys::close_others(report.pipe(), keep);
            end::quiesce(self.mounts.as_ref(), self.scratch, &mut |why| {
                report.warn(why)
            });
            0
        });
        self.phase = match task {
            Ok(task) => Phase::Quiesce(task, now.saturating_add(QUIESCE)),
            // No memory, or a limit that the workload has put on PID 1. Nobody waits for PID 1 now.
            Err(why) => {
                self.console.warn(why);
                end::quiesce(self.mounts.as_ref(), self.scratch, &mut |why| {
                    self.console.warn(why)
                });
                Phase::Drain(self.clock().saturating_add(SILENCE))
            }
        };
    }
}

/// Whether there is any process but this one: all are its children sooner or later.
fn has_children() -> bool {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::All, look), Err(Errno::CHILD))
}
