//! Commands that the host runs in the VM: one-shot ones and sessions.

use crate::files;
use crate::poll::{Poller, Source};
use crate::spawn::{self, Command, Streams};
use crate::sys::{self, Region};
use crate::task::{self, Outcome, Report};
use crate::why;
use pigeon_init::command::Environment;
use pigeon_init::json::escape;
use pigeon_init::request::Exec;
use pigeon_init::slab::{Key, Slab};
use pigeon_init::text::Line;
use pigeon_init::{config, text};
use rustix::event::epoll::EventFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Most commands at once.
pub const COMMANDS: usize = 128;
/// Output kept of each stream of a one-shot command.
const CAPTURE: usize = 1 << 20;
/// What a pipe can hold (pipe(7)): all that a command that has ended can have left in it.
const PIPE: usize = 64 << 10;
/// How long a one-shot command may take, in milliseconds, unless it is told otherwise.
const TIMEOUT: u64 = 30_000;
/// How long a killed command is waited for before it is answered for.
const KILLED: u64 = 2_000;

/// All commands that run, or whose output is not answered yet.
pub type Commands = Slab<Running, COMMANDS>;

/// A command.
pub struct Running {
    /// Its process and process group, until it is reaped.
    pub pid: Option<Pid>,
    /// How it ended.
    pub status: Option<WaitStatus>,
    /// The connection that waits for it; gone when the client is.
    pub connection: Option<Key>,
    /// Why it could not start; read when it has ended.
    report: OwnedFd,
    /// What kind it is.
    pub kind: Kind,
}

/// What differs between the two kinds of command.
pub enum Kind {
    /// POST /v1/exec
    Once(Once),
    /// GET /v1/ws/exec
    Session(Session),
    /// The client is gone; the process is still to be reaped.
    Abandoned,
}

/// A one-shot command.
pub struct Once {
    /// When it is killed, or answered for if it was.
    pub deadline: u64,
    killed: bool,
    streams: [Stream; 2],
}

/// Captured output.
#[derive(Default)]
struct Stream {
    pipe: Option<OwnedFd>,
    /// [`CAPTURE`] bytes, from the first output on.
    memory: Option<Region>,
    length: usize,
    truncated: bool,
    /// Bytes whose escaped form is counted.
    counted: usize,
    /// Length of their escaped form.
    escaped: usize,
}

/// A session.
pub struct Session {
    /// Where its output is read; closed at its end.
    pub output: Option<OwnedFd>,
    /// Where its input is written, unless that is the terminal.
    input: Option<OwnedFd>,
    terminal: bool,
    /// Bytes that may still come after its end.
    left: usize,
    watched_output: EventFlags,
    watched_input: EventFlags,
}

/// What all commands share.
pub struct Context<'a> {
    /// The event loop.
    pub poller: &'a Poller,
    /// The workload's environment.
    pub environment: &'a mut Environment,
    /// Room for account files; used in the child only.
    pub scratch: &'a mut [u8; 2 * config::DOCUMENT],
    /// Now, in milliseconds.
    pub now: u64,
}

/// In the child: becomes the command.
fn become_command(exec: &Exec, streams: Streams, context: &mut Context, report: &Report) -> i32 {
    if let Err(why) = spawn::enter_session(&streams, report) {
        report.fail(why);
        return 1;
    }
    sys::set_oom_score(b"0");
    let identity = match spawn::resolve_or_root(exec.user().bytes(), context.scratch) {
        Ok(identity) => identity,
        Err(why) => {
            report.fail(why);
            return 1;
        }
    };
    if matches!(streams, Streams::Terminal(_)) {
        let _fits = context.environment.set(b"TERM=xterm-256color");
    }
    for entry in exec.env().iter() {
        if context.environment.set(entry.bytes()).is_err() {
            report.fail(text!("the environment is too large"));
            return 1;
        }
    }
    Command {
        argv: exec.command().iter(),
        environment: context.environment,
        identity: &identity,
        directory: exec.cwd(),
    }
    .become_it(report)
}

impl Running {
    /// Starts a one-shot command.
    pub fn once(exec: &Exec, connection: Key, context: &mut Context) -> Outcome<Self> {
        let (output, output_end) = pipe()?;
        let (error, error_end) = pipe()?;
        let task = task::spawn(&mut |report| {
            let streams = Streams::Output([output_end.as_fd(), error_end.as_fd()]);
            become_command(exec, streams, context, report)
        })?;
        let limit = if exec.timeout_ms() == 0 {
            TIMEOUT
        } else {
            u64::from(exec.timeout_ms())
        };
        let stream = |pipe| Stream {
            pipe: Some(pipe),
            ..Stream::default()
        };
        Ok(Self {
            pid: Some(task.pid),
            status: None,
            connection: Some(connection),
            report: task.report,
            kind: Kind::Once(Once {
                deadline: context.now.saturating_add(limit),
                killed: false,
                streams: [stream(output), stream(error)],
            }),
        })
    }

    /// Starts a session.
    pub fn session(exec: &Exec, connection: Key, context: &mut Context) -> Outcome<Self> {
        let session = if exec.tty() {
            let master = open_terminal(exec)?;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let terminal =
                rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(why!("open a terminal"))?;
            let task = task::spawn(&mut |report| {
                become_command(exec, Streams::Terminal(terminal.as_fd()), context, report)
            })?;
            (task, master, None)
        } else {
            let (input_end, input) = task::pipe()?;
            task::block(&input_end)?;
            let (output, output_end) = pipe()?;
            let task = task::spawn(&mut |report| {
                let streams =
                    Streams::Each([input_end.as_fd(), output_end.as_fd(), output_end.as_fd()]);
                become_command(exec, streams, context, report)
            })?;
            (task, output, Some(input))
        };
        let (task, output, input) = session;
        Ok(Self {
            pid: Some(task.pid),
            status: None,
            connection: Some(connection),
            report: task.report,
            kind: Kind::Session(Session {
                output: Some(output),
                input,
                terminal: exec.tty(),
                left: PIPE,
                watched_output: EventFlags::empty(),
                watched_input: EventFlags::empty(),
            }),
        })
    }

    /// Waits for a command's output under its key.
    pub fn register(&mut self, key: Key, poller: &Poller) {
        match &mut self.kind {
            Kind::Once(once) => {
                let sources = [Source::Output(key), Source::ErrorOutput(key)];
                for (stream, source) in once.streams.iter().zip(sources) {
                    if let Some(pipe) = &stream.pipe {
                        poller.watch(pipe, source, EventFlags::empty(), EventFlags::IN);
                    }
                }
            }
            Kind::Session(session) => session.watch(key, true, false, poller),
            Kind::Abandoned => {}
        }
    }

    /// Gives back all but the name of the process.
    pub fn release(&mut self) {
        self.kind = Kind::Abandoned;
    }

    /// Kills the whole process group, and the process while it is not yet in a group of its own.
    pub fn kill(&self) {
        if let Some(pid) = self.pid {
            let _gone = rustix::process::kill_process_group(pid, Signal::KILL);
            let _gone = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Its process was reaped: takes what it left in its pipes. Why it could not start, if so.
    pub fn ended(&mut self, status: WaitStatus, sink: &mut [u8]) -> Option<Line> {
        self.pid = None;
        self.status = Some(status);
        if let Kind::Once(once) = &mut self.kind {
            once.drain(sink);
        }
        task::read_report(&self.report, None)
    }
}

/// A pipe whose reading end does not block, as the command's end must.
fn pipe() -> Outcome<(OwnedFd, OwnedFd)> {
    let (read, write) = task::pipe()?;
    task::block(&write)?;
    Ok((read, write))
}

fn open_terminal(exec: &Exec) -> Outcome<OwnedFd> {
    let what = why!("open a terminal");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).map_err(what)?;
    rustix::pty::unlockpt(&master).map_err(what)?;
    rustix::io::ioctl_fionbio(&master, true).map_err(what)?;
    resize(master.as_fd(), exec.size());
    Ok(master)
}

/// Tells a terminal its size; a size of 0 is none.
fn resize(terminal: BorrowedFd, (cols, rows): (u32, u32)) {
    if cols > 0 && rows > 0 {
        let size = Winsize {
            ws_col: cols as u16,
            ws_row: rows as u16,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let _gone = rustix::termios::tcsetwinsize(terminal, size);
    }
}

impl Once {
    /// Reads what one of the streams has, by way of `sink`; `index` is 0 for standard output.
    pub fn read(&mut self, index: usize, sink: &mut [u8]) {
        if let Some(stream) = self.streams.get_mut(index) {
            stream.read(sink);
        }
    }

    /// After the end: what is left in the pipes, which others may hold open.
    fn drain(&mut self, sink: &mut [u8]) {
        for stream in &mut self.streams {
            let mut left = PIPE;
            while left > 0
                && let Some(count) = stream.read(sink)
            {
                left = left.saturating_sub(count);
            }
            stream.pipe = None;
            stream.count(true);
        }
    }

    /// Its time is up: true when it was killed before and has to be answered for.
    pub fn expired(&mut self, now: u64) -> bool {
        let was_killed = self.killed;
        self.killed = true;
        self.deadline = now.saturating_add(KILLED);
        was_killed
    }

    /// The answer's text around its two streams, for a command that ended like this.
    pub fn frame(&self, status: Option<WaitStatus>) -> [Line; 3] {
        // One that was killed and cannot be reaped counts as killed.
        let signal = status.map_or(9, |status| status.terminating_signal().unwrap_or(0));
        let code = status.and_then(|status| status.exit_status()).unwrap_or(-1);
        let mut end = text!("\"");
        for (stream, name) in self.streams.iter().zip(["stdout", "stderr"]) {
            if stream.truncated {
                end.add(",\"").add(name).add("_truncated\":true");
            }
        }
        [
            text!(
                "{\"exit_code\":",
                code,
                ",\"exit_signal\":",
                signal,
                ",\"stdout\":\""
            ),
            text!("\",\"stderr\":\""),
            text!(end, "}"),
        ]
    }

    /// Length of the escaped form of both streams.
    pub fn escaped(&self) -> usize {
        self.streams.iter().map(|stream| stream.escaped).sum()
    }

    /// Writes a stream's escaped form from its byte `at` on into `room`; how far it came, and how
    /// much it wrote.
    pub fn escape(&self, index: usize, mut at: usize, room: &mut [u8]) -> (usize, usize) {
        let mut written = 0;
        if let Some(stream) = self.streams.get(index) {
            at += escape(stream.bytes(at), true, &mut |piece| {
                let to = room.get_mut(written..).unwrap_or(&mut []);
                let Some(to) = to.get_mut(..piece.len()) else {
                    return false;
                };
                to.copy_from_slice(piece);
                written += piece.len();
                true
            });
        }
        (at, written)
    }

    /// Whether byte `at` is the end of a stream.
    pub fn is_end(&self, index: usize, at: usize) -> bool {
        self.streams
            .get(index)
            .is_none_or(|stream| at >= stream.length)
    }
}

impl Stream {
    /// Reads once; how much came, `None` when nothing waits or the stream has ended.
    fn read(&mut self, sink: &mut [u8]) -> Option<usize> {
        match files::read(self.pipe.as_ref()?, sink) {
            Ok(count @ 1..) => {
                self.keep(sink.get(..count).unwrap_or(&[]));
                self.count(false);
                Some(count)
            }
            Err(Errno::AGAIN) => None,
            Ok(_) | Err(_) => {
                self.pipe = None;
                None
            }
        }
    }

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

impl Session {
    /// Reads output: `Ok(0)` at its end, AGAIN when nothing waits.
    pub fn read(&mut self, room: &mut [u8], ended: bool) -> Result<usize, Errno> {
        let Some(output) = &self.output else {
            return Ok(0);
        };
        let limit = if ended {
            room.len().min(self.left)
        } else {
            room.len()
        };
        let count = match files::read(output, room.get_mut(..limit).unwrap_or(&mut [])) {
            // A terminal that nobody has open any more.
            Err(Errno::IO) => 0,
            other => other?,
        };
        if ended {
            self.left -= count.min(self.left);
        }
        if count == 0 {
            self.output = None;
        }
        Ok(count)
    }

    fn input(&self) -> Option<&OwnedFd> {
        let input = if self.terminal {
            &self.output
        } else {
            &self.input
        };
        input.as_ref()
    }

    /// Writes input; input that nobody reads any more is taken and dropped.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.input().map(|input| files::write(input, bytes)) {
            Some(Ok(count)) => Ok(count),
            Some(Err(Errno::AGAIN)) => Err(Errno::AGAIN),
            Some(Err(_)) | None => Ok(bytes.len()),
        }
    }

    /// Waits for output while `output`, and for room for input while `input`.
    ///
    /// What is not waited for is not registered: a hang-up is reported even to who asks for nothing.
    pub fn watch(&mut self, key: Key, output: bool, input: bool, poller: &Poller) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(input, EventFlags::OUT);
        let mut on_output = flag(output, EventFlags::IN);
        if self.terminal {
            on_output |= on_input;
        } else if let Some(pipe) = &self.input {
            self.watched_input =
                poller.watch(pipe, Source::Input(key), self.watched_input, on_input);
        }
        if let Some(pipe) = &self.output {
            self.watched_output =
                poller.watch(pipe, Source::Output(key), self.watched_output, on_output);
        }
    }

    /// Ends the command's standard input. A terminal's has no end of its own: its character is typed.
    pub fn end_input(&mut self) {
        if self.terminal {
            /// VEOF of a new terminal (termios(3)): Ctrl-D.
            const EOF: &[u8] = b"\x04";
            let _full = self.write(EOF);
        }
        self.input = None;
    }

    /// The terminal's new size.
    pub fn resize(&self, size: (u32, u32)) {
        if let (true, Some(terminal)) = (self.terminal, &self.output) {
            resize(terminal.as_fd(), size);
        }
    }
}
