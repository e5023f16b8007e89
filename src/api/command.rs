//! Commands that the context runs in the VM: one-shot ones and sessions.

use crate::context;
use crate::context::Context;
use crate::context::Source;
use crate::error::Result;
use crate::process::exec::{self, Failure, Streams};
use crate::process::helper::{self, Helper, HelperLog};
use crate::sys::files;
use crate::sys::{self, Region, terminal};
use proto::bodies::Exec;
use proto::json::escape;
use proto::message;
use proto::message::Message;
use proto::slab::Key;
use proto::users::Identity;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, WaitStatus};

/// Output kept of each stream of a one-shot command.
const CAPTURE: usize = 1 << 20;
/// What a pipe can be made to hold (pipe-max-size, pipe(7)): all that a command that has ended can
/// have left in it.
const PIPE: usize = 1 << 20;

const SIGKILL: u32 = 9;

// The pipes of a command.
const INPUT: usize = 0;
/// Standard output, and all of a terminal or of a session.
pub const OUTPUT: usize = 1;

/// A connection's command.
pub struct Command {
    /// Its process and process group, until it is reaped.
    pub pid: Option<Pid>,
    /// How it ended.
    pub status: Option<WaitStatus>,
    /// Its time was over.
    pub killed: bool,
    terminal: bool,
    /// Why it could not start; read when it has ended. None: there is no command.
    log: Option<OwnedFd>,
    /// Input, output and error: our ends. A terminal is the second.
    pipes: [Pipe; 3],
    /// Output and error of a one-shot command.
    captures: [Capture; 2],
}

#[derive(Default)]
struct Pipe {
    end: Option<OwnedFd>,
    watched: EventFlags,
    /// Bytes read since the command's end, or since it was killed.
    late: usize,
}

/// Output that is kept.
#[derive(Default)]
struct Capture {
    /// [`CAPTURE`] bytes, from the first output on.
    memory: Option<Region>,
    length: usize,
    truncated: bool,
    /// Bytes whose escaped form is counted.
    counted: usize,
    /// Length of their escaped form.
    escaped: usize,
}

impl Command {
    /// No command.
    pub fn none() -> Self {
        Self {
            pid: None,
            status: None,
            killed: false,
            terminal: false,
            log: None,
            pipes: Default::default(),
            captures: Default::default(),
        }
    }

    /// Starts a command; a session has an input, and one pipe for all its output.
    pub fn start(&mut self, exec: &Exec, session: bool, context: &mut Context) -> Result {
        let [input, output, error] = &mut self.pipes;
        self.terminal = exec.tty();
        let child = if self.terminal {
            let (master, terminal) = open_terminal(exec)?;
            output.end = Some(master);
            let streams = Streams {
                input: Some(&terminal),
                output: &terminal,
                error: &terminal,
            };
            spawn_command(exec, &streams, context)?
        } else {
            let (out, their_output) = command_output()?;
            output.end = Some(out);
            if session {
                let (their_input, end) = helper::pipe()?;
                helper::set_blocking(&their_input)?;
                input.end = Some(end);
                let streams = Streams {
                    input: Some(&their_input),
                    output: &their_output,
                    error: &their_output,
                };
                spawn_command(exec, &streams, context)?
            } else {
                let (errors, their_errors) = command_output()?;
                error.end = Some(errors);
                let streams = Streams {
                    input: None,
                    output: &their_output,
                    error: &their_errors,
                };
                spawn_command(exec, &streams, context)?
            }
        };
        self.pid = Some(child.pid);
        self.log = Some(child.log);
        context.commands += 1;
        Ok(())
    }

    /// Waits for output while `output`, and for room for input while `input`.
    ///
    /// What is not waited for is not registered: a hang-up is reported even to who asks for nothing.
    pub fn watch(&mut self, key: Key, output: bool, input: bool, context: &Context) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(input, EventFlags::OUT);
        let on_output = flag(output, EventFlags::IN);
        let [input, output, error] = &mut self.pipes;
        if self.terminal {
            output.watch(Source::Output, key, on_input | on_output, context);
        } else {
            input.watch(Source::Input, key, on_input, context);
            output.watch(Source::Output, key, on_output, context);
            error.watch(Source::ErrorOutput, key, on_output, context);
        }
    }

    /// Kills the whole process group.
    pub fn kill(&self) {
        if let Some(pid) = self.pid {
            let _gone = sys::kill_group(pid, SIGKILL);
        }
    }

    /// Its process was reaped. Why it could not start, if so.
    pub fn ended(&mut self, status: WaitStatus) -> Option<Message> {
        self.pid = None;
        self.status = Some(status);
        helper::read_lines(self.log.as_ref()?, &mut drop).error
    }

    /// Nobody is interested in it any more: gives back all it has. While it still runs it is killed,
    /// and counted until it is reaped.
    pub fn release(&mut self, context: &mut Context) {
        if self.log.is_none() {
            return;
        }
        self.kill();
        match self.pid {
            // There is room for every command that is counted.
            Some(pid) => drop(context.abandoned.push(pid)),
            None => context.commands -= 1,
        }
        *self = Self::none();
    }

    /// Reads output, or error output, once; how much came: nothing when nothing waits, or at the end.
    ///
    /// Others may write for ever into the pipe of a command that has ended: no more is taken than it
    /// can have left.
    pub fn read(&mut self, pipe: usize, room: &mut [u8]) -> usize {
        let ended = self.killed || self.status.is_some();
        let Some(pipe) = self.pipes.get_mut(pipe) else {
            return 0;
        };
        let Some(end) = &pipe.end else {
            return 0;
        };
        let limit = room.len().min(PIPE - pipe.late);
        match files::read(end, room.get_mut(..limit).unwrap_or(&mut [])) {
            Ok(count @ 1..) => {
                if ended {
                    pipe.late += count;
                }
                count
            }
            Err(Errno::AGAIN) => 0,
            // EIO: a terminal that nobody has open any more.
            Ok(_) | Err(_) => {
                pipe.end = None;
                0
            }
        }
    }

    /// Writes input, as much as is taken now; input that nobody reads any more is taken and dropped.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let pipe = self.pipes.get(if self.terminal { OUTPUT } else { INPUT });
        let end = pipe.and_then(|pipe| pipe.end.as_ref());
        match end.map(|end| files::write(end, bytes)) {
            Some(Ok(count)) => count,
            Some(Err(Errno::AGAIN)) => 0,
            Some(Err(_)) | None => bytes.len(),
        }
    }

    /// Ends the command's standard input. A terminal's has no end of its own: its character is typed.
    pub fn end_input(&mut self) {
        if self.terminal {
            /// VEOF of a new terminal (termios(3)): Ctrl-D, twice, as one behind an unfinished line
            /// only hands that line over.
            const EOF: &[u8] = b"\x04\x04";
            let _full = self.write(EOF);
        } else if let Some(pipe) = self.pipes.get_mut(INPUT) {
            pipe.end = None;
        }
    }

    /// The terminal's new size.
    pub fn resize(&self, size: (u32, u32)) {
        if let ([_, Pipe { end: Some(end), .. }, _], true) = (&self.pipes, self.terminal) {
            resize(end, size);
        }
    }

    /// Reads one of the streams of a one-shot command, by way of `sink`; whether anything came.
    pub fn capture(&mut self, index: usize, sink: &mut [u8]) -> bool {
        let count = self.read(OUTPUT + index, sink);
        let bytes = sink.get(..count).unwrap_or(&[]);
        if let (Some(capture), [_, ..]) = (self.captures.get_mut(index), bytes) {
            capture.keep(bytes);
            capture.count(false);
        }
        count > 0
    }

    /// A one-shot command has ended, or counts as ended: takes what is left in its pipes, which
    /// others may hold open. The answer's text before its output, and the answer's length.
    pub fn conclude(&mut self, sink: &mut [u8]) -> (Message, usize) {
        for index in 0..self.captures.len() {
            while self.capture(index, sink) {}
        }
        for pipe in &mut self.pipes {
            pipe.end = None;
        }
        // One that was killed and cannot be reaped counts as killed.
        let signal = self
            .status
            .map_or(Some(9), |status| status.terminating_signal());
        let code = self.status.and_then(|status| status.exit_status());
        let start = message!(
            "{{\"exit_code\":{},\"exit_signal\":{},\"stdout\":\"",
            code.unwrap_or(-1),
            signal.unwrap_or(0)
        );
        let mut length = start.as_bytes().len();
        for index in 0..self.captures.len() {
            length += self.behind(index).as_bytes().len();
        }
        for capture in &mut self.captures {
            capture.count(true);
            length += capture.escaped;
        }
        (start, length)
    }

    /// The answer's text behind one of the streams.
    pub fn behind(&self, index: usize) -> Message {
        if index == 0 {
            return message!("\",\"stderr\":\"");
        }
        let [output, error] = &self.captures;
        let note = |capture: &Capture, note| if capture.truncated { note } else { "" };
        message!(
            "\"{}{}}}",
            note(output, ",\"stdout_truncated\":true"),
            note(error, ",\"stderr_truncated\":true")
        )
    }

    /// Writes a stream's escaped form from its byte `at` on into `room`, as much as fits: how much
    /// that is, and whether it is all.
    pub fn escape(&self, index: usize, at: &mut usize, room: &mut [u8]) -> (usize, bool) {
        let Some(capture) = self.captures.get(index) else {
            return (0, true);
        };
        let mut written = 0;
        *at += escape(capture.bytes(*at), true, &mut |piece| {
            let to = room.get_mut(written..).unwrap_or(&mut []);
            let Some(to) = to.get_mut(..piece.len()) else {
                return false;
            };
            to.copy_from_slice(piece);
            written += piece.len();
            true
        });
        (written, *at == capture.length)
    }
}

/// A pipe for output of a command: our end, which does not block, and the command's.
fn command_output() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = helper::pipe()?;
    helper::set_blocking(&theirs)?;
    Ok((ours, theirs))
}

/// Starts a command with these streams.
fn spawn_command(exec: &Exec, streams: &Streams, context: &mut Context) -> Result<Helper> {
    helper::spawn(&mut |log| {
        exec_command(exec, streams, context, log)
            .unwrap_or_else(Failure::from)
            .report(log)
    })
}

/// In the child: becomes the command.
fn exec_command(
    exec: &Exec,
    streams: &Streams,
    context: &mut Context,
    log: &HelperLog,
) -> Result<Failure> {
    exec::enter_session(streams, exec.tty(), log)?;
    sys::set_oom_score(b"0");
    let mut identity = Identity::default();
    match exec.user().bytes() {
        b"" => identity.be_root(),
        user => exec::resolve(user, context.scratch, &mut identity)?,
    }
    if exec.tty() {
        context.environment.set(b"TERM=xterm-256color", b"")?;
    }
    context.environment.set_all(exec.env())?;
    let command = exec::Command {
        argv: [exec.command(), Default::default()],
        identity: &identity,
        directory: exec.cwd(),
    };
    Ok(command.exec(context.environment))
}

/// A new terminal of the wanted size: our end, which does not block, and the command's.
fn open_terminal(exec: &Exec) -> Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let ours = files::open(c"/dev/ptmx", flags).map_err(context!("open a terminal"))?;
    let theirs = terminal::open_peer(&ours).map_err(context!("open a terminal"))?;
    resize(&ours, exec.size());
    Ok((ours, theirs))
}

/// Tells a terminal its size; a size of 0 is none.
fn resize(terminal: &OwnedFd, (cols, rows): (u32, u32)) {
    if cols > 0 && rows > 0 {
        let _gone = terminal::resize(terminal, cols, rows);
    }
}

impl Pipe {
    fn watch(&mut self, source: Source, key: Key, wanted: EventFlags, context: &Context) {
        if let Some(end) = &self.end {
            let watched = &mut self.watched;
            context
                .poller
                .watch(end, source.token(key), watched, wanted);
        }
    }
}

impl Capture {
    /// Keeps bytes as far as there is room for them.
    fn keep(&mut self, bytes: &[u8]) {
        if self.memory.is_none() {
            self.memory = Region::new(CAPTURE).ok();
        }
        let memory = self.memory.as_deref_mut().unwrap_or(&mut []);
        let room = memory.get_mut(self.length..).unwrap_or(&mut []);
        let count = bytes.len().min(room.len());
        room.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        self.length += count;
        self.truncated |= count < bytes.len();
    }

    /// What was kept, from byte `at` on.
    fn bytes(&self, at: usize) -> &[u8] {
        let memory = self.memory.as_deref().unwrap_or(&[]);
        memory.get(at..self.length).unwrap_or(&[])
    }

    /// Counts the escaped form of what came, so that the answer's length is known at the end.
    fn count(&mut self, last: bool) {
        let mut length = 0;
        self.counted += escape(self.bytes(self.counted), last, &mut |piece| {
            length += piece.len();
            true
        });
        self.escaped += length;
    }
}
