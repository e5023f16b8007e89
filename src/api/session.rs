//! `GET /v1/ws/exec`: a command whose streams are messages on a WebSocket.

use super::io::{Io, MAX_OUTPUT};
use super::process::{Pipes, Process};
use crate::context;
use crate::context::{Context, EventSource};
use crate::error::Result;
use crate::page::PageBox;
use crate::process::channel::Channel;
use crate::process::exec::{Input, Streams};
use crate::sys::terminal::{self, Size};
use crate::sys::{GuestFile, Inherited, Region};
use core::fmt::{self, Display, Write};
use core::ops::Range;
use proto::arena::Arena;
use proto::bodies::{self, CommandSpec, MAX_ID, SessionControl, SessionRequest, Stdin};
use proto::bytes::SliceWriter;
use proto::json::Quoted;
use proto::message;
use proto::message::{Message, ToLossy};
use proto::ring::{Cursor, Ring};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::process::WaitStatus;

/// Ends a terminal's input: VEOF of a new terminal (termios(3)), Ctrl-D, twice, as the first one after an
/// unfinished line only submits that line.
const TERMINAL_EOF: &[u8] = b"\x04\x04";

/// The first byte of a message of standard output, with `streams`.
const STDOUT: u8 = 1;
/// The same of standard error.
const STDERR: u8 = 2;

/// Bytes of output that a named session keeps while nobody is attached.
const HISTORY: usize = 64 << 10;

/// Memory in addition to that, in bytes, for the headers of the ring's records.
const HISTORY_SPARE: usize = 4 << 10;

/// Maximum number of bytes of a command in the list of sessions.
const MAX_LISTED_COMMAND: usize = 256;

/// A session, attached or not.
pub struct Session {
    /// Its process.
    pub process: Process,
    pipes: Pipes,
    /// The pipes are a terminal.
    tty: bool,
    /// Each message of output begins with the number of its stream.
    has_stream_bytes: bool,
    /// The bytes of the received message that are not written yet.
    pending: Range<usize>,
    /// How much of [`TERMINAL_EOF`] is written, once the client has ended the input.
    eof: Option<usize>,
    /// A terminal size that is not set yet.
    pending_size: Option<Size>,
    /// Set for a session that outlives its connection.
    named: Option<PageBox<NamedSession>>,
}

/// State of a session that survives its connection.
struct NamedSession {
    id: heapless::String<MAX_ID>,
    /// Its command as the entries of a JSON list, truncated for display.
    command: heapless::String<MAX_LISTED_COMMAND>,
    /// Its last output, for a client that attaches later.
    history: Ring<Region>,
    /// How much of that has been sent.
    sent: Cursor,
}

/// The progress of a session.
pub enum Progress {
    /// It has to wait.
    Blocked,
    /// It did something, and there may be more to do.
    Progressed,
    /// The input is written: it can take the client's next message.
    ReadyForMessage,
    /// Its command has exited and all its output is queued.
    Exited(WaitStatus),
}

impl Session {
    /// Starts the command of a first message.
    pub fn start(request: &SessionRequest, context: &mut Context) -> Result<Self> {
        let spec = &request.spec;
        let named = match request.id {
            "" => None,
            _ => Some(NamedSession::new(request)?),
        };
        let (process, pipes) = match spec.tty {
            true => start_on_terminal(spec, (request.cols, request.rows), context),
            false => Process::start_on_pipes(spec, true, request.streams, context),
        }?;
        Ok(Self {
            process,
            pipes,
            tty: spec.tty,
            has_stream_bytes: request.streams,
            pending: 0..0,
            eof: None,
            pending_size: None,
            named,
        })
    }

    /// Its name, if it outlives its connection.
    pub fn id(&self) -> Option<&str> {
        Some(&self.named.as_ref()?.id)
    }

    /// Whether it outlives its connection.
    pub fn is_named(&self) -> bool {
        cfg!(feature = "sessions") && self.named.is_some()
    }

    /// Writes its entry in the list of sessions.
    pub fn describe(&self, attached: bool, list: &mut SliceWriter) -> fmt::Result {
        let Some(named) = &self.named else {
            return Ok(());
        };
        let (id, command) = (&named.id, &named.command);
        let tty = self.tty;
        write!(
            list,
            "{{\"id\":\"{id}\",\"pid\":{},\"command\":[{command}],\"tty\":{tty},\"attached\":{attached},\"exit\":{}}}",
            OrNull(self.process.pid()),
            OrNull(self.process.status().map(ExitStatus))
        )
    }

    /// Its process was reaped.
    pub fn set_exited(&mut self, status: WaitStatus) {
        self.pipes.slave = None;
        self.process.set_exited(status);
    }

    /// Attaches another client.
    pub fn attach(&mut self, has_stream_bytes: bool) {
        self.has_stream_bytes = has_stream_bytes;
        self.drop_input();
    }

    /// Detaches the client. The rest of its last message is dropped.
    pub fn detach(&mut self) {
        self.drop_input();
    }

    fn drop_input(&mut self) {
        self.pending = 0..0;
        // The next client has an end of input of its own.
        self.eof = None;
        self.pending_size = None;
        if let Some(slave) = &mut self.pipes.slave {
            slave.forget();
        }
        self.pipes.input_of(self.tty).discard_write();
    }

    /// Whether some of the history has not been sent, which no event reports.
    pub fn has_unsent_history(&mut self) -> bool {
        let Some(named) = self.named.as_deref_mut() else {
            return false;
        };
        named.history.read(&mut named.sent).is_some()
    }

    /// Reads output into the history while no client is attached.
    pub fn keep_output(&mut self) {
        self.fill_history(u64::MAX);
    }

    /// Reads output into the history, without overwriting anything from position `keep` on. Returns whether
    /// there was any.
    fn fill_history(&mut self, keep: u64) -> bool {
        self.keep_stream(STDOUT, keep) | self.keep_stream(STDERR, keep)
    }

    fn keep_stream(&mut self, stream: u8, keep: u64) -> bool {
        let Some(named) = &mut self.named else {
            return false;
        };
        if cfg!(not(feature = "sessions")) {
            return false;
        }
        let room = named.history.room(keep);
        if room == 0 {
            return false;
        }
        let over = self.process.is_finished();
        let count = self.pipes.of(stream).read(room, over, &mut |output| {
            named.history.push(stream, output, keep);
        });
        count > 0
    }

    /// Whether it takes messages now.
    pub fn takes_messages(&self) -> bool {
        self.pending.is_empty() && !self.writes_eof()
    }

    fn writes_eof(&self) -> bool {
        self.eof.is_some_and(|written| written < TERMINAL_EOF.len())
    }

    /// Takes a binary message, by its range in the received bytes.
    pub fn take_input(&mut self, payload: Range<usize>) {
        self.pending = payload;
    }

    /// Takes a text message: a new size, or the end of input.
    pub fn take_control(
        &mut self,
        message: &mut [u8],
        context: &mut Context,
    ) -> Result<(), Message> {
        let mut control = SessionControl::default();
        bodies::decode(message, &mut Arena::new(context.arena), &mut control)?;
        if let Some(slave) = &mut self.pipes.slave
            && let size @ Some(_) = Size::new(control.cols, control.rows)
        {
            slave.forget();
            self.pending_size = size;
        }
        match control.stdin {
            Some(Stdin::Eof) if self.tty => self.eof = self.eof.or(Some(0)),
            Some(Stdin::Eof) => self.pipes.input.close(),
            None => {}
        }
        Ok(())
    }

    /// Moves data in both directions. `budget`: how many messages of output may still be sent in this turn.
    pub fn proceed(&mut self, budget: &mut u32, io: &mut Io) -> Progress {
        if self.write_input(io) {
            return Progress::Progressed;
        }
        let status = self.process.status();
        if io.is_sent() && (*budget > 0 || status.is_some()) {
            let sent = match self.is_named() {
                true => self.send_history(io),
                false => self.send_output(io),
            };
            if sent {
                *budget = budget.saturating_sub(1);
                return Progress::Progressed;
            }
            if let Some(status) = status {
                // The client gets all of it: nobody can attach any more.
                self.named = None;
                return Progress::Exited(status);
            }
        }
        match self.takes_messages() {
            true => Progress::ReadyForMessage,
            false => Progress::Blocked,
        }
    }

    /// Queues a message of output. Returns whether there was any.
    fn send_output(&mut self, io: &mut Io) -> bool {
        self.send_stream(STDOUT, io) || self.send_stream(STDERR, io)
    }

    fn send_stream(&mut self, stream: u8, io: &mut Io) -> bool {
        let prefix = self.has_stream_bytes.then_some(stream);
        let over = self.process.is_finished();
        let room = MAX_OUTPUT - usize::from(prefix.is_some());
        let count = self.pipes.of(stream).read(room, over, &mut |output| {
            io.queue_message(prefix, output);
        });
        count > 0
    }

    /// Queues a message of the unsent history. Returns whether there was any.
    fn send_history(&mut self, io: &mut Io) -> bool {
        let keep = self.named.as_ref().map_or(0, |named| named.sent.position());
        let came = self.fill_history(keep);
        let Some(named) = self.named.as_deref_mut() else {
            return false;
        };
        let Some((stream, piece)) = named.history.read(&mut named.sent) else {
            return came;
        };
        let prefix = self.has_stream_bytes.then_some(stream);
        let piece = piece.get(..MAX_OUTPUT - 1).unwrap_or(piece);
        io.queue_message(prefix, piece);
        named.history.advance(&mut named.sent, piece.len());
        true
    }

    /// Sets a pending terminal size, and writes as much input as the command accepts. Returns whether any
    /// input was written.
    fn write_input(&mut self, io: &mut Io) -> bool {
        if let Some(size) = self.pending_size
            && let Some(slave) = &mut self.pipes.slave
            && slave.resize(size) != Err(Errno::AGAIN)
        {
            self.pending_size = None;
        }
        let writes_eof = self.writes_eof();
        let input = self.pipes.input_of(self.tty);
        if !self.pending.is_empty() {
            let bytes = io.received().get(self.pending.clone()).unwrap_or(&[]);
            let count = input.write(bytes);
            self.pending.start += count;
            return count > 0;
        }
        if writes_eof && let Some(written) = &mut self.eof {
            let count = input.write(TERMINAL_EOF.get(*written..).unwrap_or(&[]));
            *written += count;
            return count > 0;
        }
        false
    }

    /// Waits for events of its streams; `wants_output`: the client can be sent output, or none is attached.
    pub fn watch(&mut self, key: Key, wants_output: bool, context: &Context) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(!self.takes_messages(), EventFlags::OUT);
        let on_output = flag(wants_output, EventFlags::IN);
        let on_terminal = flag(self.tty, on_input);
        let Pipes {
            input,
            output,
            error,
            ..
        } = &mut self.pipes;
        let poller = &context.poller;
        input.watch(EventSource::CommandStdin.token(key), on_input, poller);
        output.watch(
            EventSource::CommandStdout.token(key),
            on_output | on_terminal,
            poller,
        );
        error.watch(EventSource::CommandStderr.token(key), on_output, poller);
    }

    /// Closes our ends, which hangs up a terminal. Returns whether it has one.
    pub fn hang_up(&mut self) -> bool {
        self.pipes = Pipes::default();
        self.tty
    }
}

/// Displays an exit status: `{"code":N|null,"signal":N|null}`.
pub struct ExitStatus(pub WaitStatus);

impl Display for ExitStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = OrNull(self.0.exit_status());
        let signal = OrNull(self.0.terminating_signal());
        write!(formatter, "{{\"code\":{code},\"signal\":{signal}}}")
    }
}

impl Pipes {
    /// The channel for input.
    fn input_of(&mut self, tty: bool) -> &mut Channel {
        match tty {
            true => &mut self.output,
            false => &mut self.input,
        }
    }

    /// The channel for output of a stream.
    fn of(&mut self, stream: u8) -> &mut Channel {
        match stream {
            STDERR => &mut self.error,
            _ => &mut self.output,
        }
    }
}

impl NamedSession {
    fn new(request: &SessionRequest) -> Result<PageBox<Self>> {
        let memory = Region::new(HISTORY + HISTORY_SPARE).map_err(context!("allocate memory"))?;
        let empty = || Self {
            id: heapless::String::new(),
            command: heapless::String::new(),
            history: Ring::new(memory),
            sent: Cursor::default(),
        };
        let mut named = PageBox::new(empty).map_err(context!("allocate memory"))?;
        let _checked_to_fit = named.id.push_str(request.id);
        for argument in request.spec.argv {
            let separator = if named.command.is_empty() { "" } else { "," };
            let entry = message!("{separator}{}", Quoted(&argument.lossy()));
            // The rest is not shown.
            if named.command.push_str(entry.as_str()).is_err() {
                break;
            }
        }
        Ok(named)
    }
}

fn start_on_terminal(
    spec: &CommandSpec,
    (cols, rows): (u16, u16),
    context: &mut Context,
) -> Result<(Process, Pipes)> {
    let (master, slave) = terminal::open(context.pts.as_ref(), Size::new(cols, rows))
        .map_err(context!("open a terminal"))?;
    let terminal = Inherited::new(&slave);
    let streams = Streams {
        input: Input::Terminal(terminal),
        output: terminal,
        error: terminal,
    };
    let process = Process::start(spec, streams, context)?;
    let pipes = Pipes {
        output: Channel::new(Some(master), context.guest_threads),
        slave: Some(GuestFile::new(slave, context.guest_threads)),
        ..Pipes::default()
    };
    Ok((process, pipes))
}

/// Displays a value, or `null`.
struct OrNull<T>(Option<T>);

impl<T: Display> Display for OrNull<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(formatter),
            None => formatter.write_str("null"),
        }
    }
}
