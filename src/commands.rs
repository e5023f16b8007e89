//! Commands that the host runs in the VM: one-shot ones and sessions.

use crate::api::Host;
use crate::files;
use crate::poll::Source;
use crate::spawn::{self, Failure, Streams};
use crate::sys::{self, Region, terminal};
use crate::task::{self, Outcome, Report};
use crate::why;
use pigeon_init::accounts::Identity;
use pigeon_init::json::escape;
use pigeon_init::request::Exec;
use pigeon_init::slab::Key;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, WaitStatus};

/// Most commands at once: those that run, and those whose output is not answered yet.
pub const COMMANDS: usize = 128;
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
    report: Option<OwnedFd>,
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
    #[inline(never)]
    pub fn none() -> Self {
        Self {
            pid: None,
            status: None,
            killed: false,
            terminal: false,
            report: None,
            pipes: Default::default(),
            captures: Default::default(),
        }
    }

    /// Starts a command; a session has an input, and one pipe for all its output.
    pub fn start(&mut self, exec: &Exec, session: bool, host: &mut Host) -> Outcome {
        let mut streams = Streams::default();
        let [theirs_in, theirs_out, theirs_error] = &mut streams;
        let [input, output, error] = &mut self.pipes;
        self.terminal = exec.tty();
        if self.terminal {
            open_terminal(exec, &mut output.end, theirs_in)?;
        } else {
            spawn::pipe(false, &mut output.end, theirs_out)?;
            // Input of a one-shot command stays what PID 1's is: /dev/null.
            let (last, theirs) = if session {
                (input, theirs_in)
            } else {
                (error, theirs_error)
            };
            spawn::pipe(session, &mut last.end, theirs)?;
        }
        let task = task::spawn(&mut |report| {
            let failure = become_command(exec, &streams, host, report);
            failure.unwrap_or_else(Failure::from).tell(report)
        })?;
        self.pid = Some(task.pid);
        self.report = Some(task.report);
        host.commands += 1;
        Ok(())
    }

    /// Waits for output while `output`, and for room for input while `input`.
    ///
    /// What is not waited for is not registered: a hang-up is reported even to who asks for nothing.
    pub fn watch(&mut self, key: Key, output: bool, input: bool, host: &Host) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(input, EventFlags::OUT);
        let on_output = flag(output, EventFlags::IN);
        let [input, output, error] = &mut self.pipes;
        if self.terminal {
            output.watch(Source::Output, key, on_input | on_output, host);
        } else {
            input.watch(Source::Input, key, on_input, host);
            output.watch(Source::Output, key, on_output, host);
            error.watch(Source::ErrorOutput, key, on_output, host);
        }
    }

    /// Kills the whole process group.
    pub fn kill(&self) {
        if let Some(pid) = self.pid {
            let _gone = sys::kill_group(pid, SIGKILL);
        }
    }

    /// Its process was reaped. Why it could not start, if so.
    pub fn ended(&mut self, status: WaitStatus) -> Option<Line> {
        self.pid = None;
        self.status = Some(status);
        task::read_report(self.report.as_ref()?, None)
    }

    /// Nobody is interested in it any more: gives back all it has. While it still runs it is killed,
    /// and counted until it is reaped.
    pub fn release(&mut self, host: &mut Host) {
        if self.report.is_none() {
            return;
        }
        self.kill();
        match self.pid {
            // There is room for every command that is counted.
            Some(pid) => drop(host.abandoned.push(pid)),
            None => host.commands -= 1,
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
                let count = count as usize;
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
            Some(Ok(count)) => count as usize,
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
    pub fn conclude(&mut self, sink: &mut [u8]) -> (Line, usize) {
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
        let start = text!(
            "{\"exit_code\":%,\"exit_signal\":%,\"stdout\":\"",
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
    pub fn behind(&self, index: usize) -> Line {
        if index == 0 {
            return text!("\",\"stderr\":\"");
        }
        let [output, error] = &self.captures;
        let note = |capture: &Capture, note| if capture.truncated { note } else { "" };
        text!(
            "\"%%}",
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

/// In the child: becomes the command.
fn become_command(
    exec: &Exec,
    streams: &Streams,
    host: &mut Host,
    report: &Report,
) -> Outcome<Failure> {
    spawn::enter_session(streams, exec.tty(), report)?;
    sys::set_oom_score(b"0");
    let mut identity = Identity::default();
    match exec.user().bytes() {
        b"" => identity.be_root(),
        user => spawn::resolve(user, host.scratch, &mut identity)?,
    }
    if exec.tty() {
        host.environment.set(b"TERM=xterm-256color", b"")?;
    }
    host.environment.set_all(exec.env())?;
    let command = spawn::Command {
        argv: [exec.command(), Default::default()],
        environment: host.environment,
        identity: &identity,
        directory: exec.cwd(),
    };
    Ok(command.become_it())
}

/// A new terminal of the wanted size: our end, which does not block, and the command's.
fn open_terminal(exec: &Exec, ours: &mut Option<OwnedFd>, theirs: &mut Option<OwnedFd>) -> Outcome {
    let what = why!("open a terminal");
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let ours = ours.insert(files::open(c"/dev/ptmx", flags).map_err(what)?);
    *theirs = Some(terminal::open_peer(ours).map_err(what)?);
    resize(ours, exec.size());
    Ok(())
}

/// Tells a terminal its size; a size of 0 is none.
fn resize(terminal: &OwnedFd, (cols, rows): (u32, u32)) {
    if cols > 0 && rows > 0 {
        let _gone = terminal::resize(terminal, cols, rows);
    }
}

impl Pipe {
    fn watch(&mut self, source: Source, key: Key, wanted: EventFlags, host: &Host) {
        if let Some(end) = &self.end {
            let watched = &mut self.watched;
            host.poller.watch(end, source, key, watched, wanted);
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
