//! The workload: its start, its output, its end.

use super::console::Console;
use super::phase::Phase;
use super::{SIGKILL, Supervisor, oom};
use crate::context;
use crate::context::{Exit, Source};
use crate::error::{Discard, Result};
use crate::process::exec::{self, Command, Failure, Streams};
use crate::process::helper::{self, Helper, HelperLog};
use crate::process::oom_score;
use crate::sys::epoll::Poller;
use crate::sys::files;
use proto::environment::Environment;
use proto::message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::WaitStatus;

/// What a killed process's exit code is counted from, as in a shell.
const KILLED: i32 = 128;

/// Pieces of output copied at the end: together more than a pipe holds (pipe(7)).
const PIECES: usize = 8;

/// The workload's standard output and error: our end of the pipe.
#[derive(Default)]
pub struct Output {
    pipe: Option<OwnedFd>,
    watched: EventFlags,
}

impl Output {
    /// Waits for output while there is room for it.
    pub fn watch(&mut self, poller: &Poller, has_room: bool) {
        if let Some(pipe) = &self.pipe {
            let wanted = match has_room {
                true => EventFlags::IN,
                false => EventFlags::empty(),
            };
            let token = Source::Workload.token(Key::default());
            poller.watch(pipe, token, &mut self.watched, wanted);
        }
    }

    /// Copies so many pieces to the console, as far as that has room for them: not for as long as
    /// output comes, as others wait, too. True when there may be more.
    pub fn copy(&mut self, pieces: usize, console: &mut Console) -> bool {
        for _ in 0..pieces {
            let Some(pipe) = &self.pipe else {
                return false;
            };
            if !console.has_room() {
                return false;
            }
            match files::read(pipe, console.room()) {
                Ok(count @ 1..) => console.commit(count),
                Err(Errno::AGAIN) => return false,
                Ok(_) | Err(_) => self.pipe = None,
            }
        }
        true
    }
}

impl Supervisor {
    /// Starts the workload.
    pub fn start_workload(&mut self, command: &Command) -> Result {
        self.kernel_log = files::open(c"/dev/kmsg", OFlags::NONBLOCK).ok();
        let (ours, theirs) = helper::pipe()?;
        helper::set_blocking(&theirs)?;
        let environment = &self.context.defaults.environment;
        let console = &*self.console;
        let proc = &self.context.proc;
        let cgroup = self.context.cgroups.workload.as_ref();
        let child = helper::spawn(cgroup, &mut |log| {
            exec_workload(command, environment, proc, console, &theirs, log)
                .unwrap_or_else(Failure::from)
                .report(log)
        })?;
        self.output.pipe = Some(ours);
        self.context.workload.group = Some(child.pid);
        let pid = child.pid.as_raw_pid();
        self.console
            .info(&"workload started", &format_args!(" pid={pid}"));
        self.child = Some(child);
        self.phase = Phase::Running;
        Ok(())
    }

    /// The workload's process was reaped.
    pub(super) fn workload_ended(&mut self, workload: Helper, status: WaitStatus) {
        if let Some(error) = helper::read_lines(&workload.log, &mut Discard).error {
            self.console.error(&error);
        }
        let signal = status.terminating_signal();
        let pid = workload.pid.as_raw_pid() as u32;
        let oom_killed = signal == Some(SIGKILL as i32)
            && self
                .kernel_log
                .as_ref()
                .is_some_and(|log| oom::killed(log, pid, self.context.sink));
        let code = match status.exit_status() {
            Some(code) => code,
            None => KILLED + signal.unwrap_or(0),
        };
        self.exit_fields = Some(message!(" exit_code={code} oom_killed={oom_killed}"));
        self.finish_output();
        self.context.workload.group = None;
        self.ended(Exit {
            code,
            oom_killed,
            error: None,
        });
    }

    /// Copies what is left of the output, and says behind it how the workload ended. True when there
    /// may be more.
    pub(super) fn finish_output(&mut self) -> bool {
        let more = self.output.copy(PIECES, self.console);
        if !more
            && self.console.has_room()
            && let Some(fields) = self.exit_fields.take()
        {
            self.console.info(&"workload exited", &fields);
        }
        more
    }
}

/// In the child: becomes the workload.
fn exec_workload(
    command: &Command,
    environment: &Environment,
    proc: &OwnedFd,
    console: &Console,
    output: &OwnedFd,
    log: &HelperLog,
) -> Result<Failure> {
    oom_score::set(proc, oom_score::DEFAULT)?;
    let input = console
        .open_input()
        .map_err(context!("open standard input"))?;
    let streams = Streams {
        input: Some(&input),
        output,
        error: output,
    };
    exec::enter_session(&streams, false, log)?;
    Ok(command.exec(environment))
}
