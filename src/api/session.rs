//! `GET /v1/ws/exec`: a command whose streams are the messages of a WebSocket.

use super::io::{self, CallError, Io};
use super::process::{Channel, Process, Read, Spec, input_pipe, output_pipe};
use crate::context;
use crate::context::{Context, Source};
use crate::error;
use crate::error::Result;
use crate::page::PageBox;
use crate::process::exec::{Input, Streams};
use crate::sys::{self, Inherited, Region, terminal};
use core::fmt::{self, Display};
use core::ops::Range;
use proto::arena::Arena;
use proto::bodies::{self, ID, SessionControl, SessionRequest, Stdin};
use proto::http::Status;
use proto::json::Quoted;
use proto::message;
use proto::message::{Message, ToLossy};
use proto::ring::{self, Cursor, Ring};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::process::WaitStatus;

/// What ends a terminal's input: VEOF of a new terminal (termios(3)), Ctrl-D, twice, as one behind an
/// unfinished line only hands that line over.
const TERMINAL_EOF: &[u8] = b"\x04\x04";

/// The first byte of a message of standard output, when each has one.
const STDOUT: u8 = 1;
/// The same of standard error.
const STDERR: u8 = 2;

/// Bytes of output that a named session keeps while nobody is attached.
const HISTORY: usize = 64 << 10;

/// Bytes of a command that are shown in the list of sessions.
const SHOWN: usize = 256;

/// A session, attached or not.
pub struct Session {
    /// Its process.
    pub process: Process,
    streams: SessionStreams,
    /// Each message of output begins with the number of its stream.
    has_stream_bytes: bool,
    /// Bytes of the received message that the command has not taken.
    pending: Range<usize>,
    /// The client has ended the input: so much of [`TERMINAL_EOF`] is written.
    eof: Option<usize>,
    /// It outlives its connection.
    named: Option<PageBox<Named>>,
}

/// What a session has that outlives its connection.
struct Named {
    id: heapless::String<ID>,
    /// Its command as the entries of a JSON list, as far as it is shown.
    command: heapless::String<SHOWN>,
    /// Its last output, which a client that attaches has perhaps missed.
    history: Ring<Region>,
    /// How much of that was sent.
    sent: Cursor,
}

enum SessionStreams {
    Pipes {
        input: Channel,
        output: Channel,
        /// Standard error, unless that goes to `output`.
        error: Channel,
    },
    Terminal {
        master: Channel,
        /// The other end, until the command has ended: a master whose other end nobody has open reads
        /// EIO, which is no end, and keeps epoll awake.
        slave: Option<OwnedFd>,
    },
}

/// What a running session did.
pub enum Progress {
    /// It waits.
    Waits,
    /// It did something: there may be more.
    Again,
    /// The input is written: the client's next message can be taken.
    TakesMessage,
    /// Its command has ended and all its output is queued.
    Ended(WaitStatus),
}

/// What a session's first message asks for.
pub enum Request {
    /// A new session.
    Started(Session),
    /// To go on with the session of this name; whether messages begin with their streams.
    Attach(heapless::String<ID>, bool),
}

impl Session {
    /// Reads the first message, and starts what it asks for. `admit`: whether there can be a session of
    /// that name.
    pub fn start(
        message: &mut [u8],
        admit: &dyn Fn(&str) -> Result<(), CallError>,
        context: &mut Context,
    ) -> Result<Request, CallError> {
        context.with_arena(|memory, context| {
            let mut request = SessionRequest::default();
            io::read_body(message, memory, &mut request)?;
            let has_name = !request.id.is_empty() || !request.attach.is_empty();
            if has_name && cfg!(not(feature = "sessions")) {
                let error = error!("there are no named sessions in this build");
                return Err(CallError::new(Status::NotImplemented, error));
            }
            if !request.attach.is_empty() {
                // It is no longer than an id can be.
                let id = heapless::String::try_from(request.attach).unwrap_or_default();
                return Ok(Request::Attach(id, request.streams));
            }
            if !request.id.is_empty() {
                admit(request.id)?;
            }
            Ok(Request::Started(Self::spawn(&request, context)?))
        })
    }

    fn spawn(request: &SessionRequest, context: &mut Context) -> Result<Self> {
        let spec = Spec {
            argv: request.command,
            env: request.env,
            cwd: request.cwd,
            user: request.user,
            tty: request.tty,
        };
        let named = match request.id {
            "" => None,
            _ => Some(Named::new(request)?),
        };
        let (process, streams) = match request.tty {
            true => start_on_terminal(&spec, (request.cols, request.rows), context)?,
            false => start_on_pipes(&spec, request.streams, context)?,
        };
        Ok(Self {
            process,
            streams,
            has_stream_bytes: request.streams,
            pending: 0..0,
            eof: None,
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

    /// An entry of the list of sessions.
    pub fn describe(&self, attached: bool) -> Message {
        let (id, command) = match &self.named {
            Some(named) => (named.id.as_str(), named.command.as_str()),
            None => ("", ""),
        };
        let tty = matches!(self.streams, SessionStreams::Terminal { .. });
        let start = message!(
            "{{\"id\":\"{id}\",\"pid\":{},\"command\":[{command}],\"tty\":{tty},\"attached\":{attached}",
            OrNull(self.process.pid())
        );
        match self.process.status() {
            None => message!("{start},\"exit\":null}}"),
            Some(status) => message!(
                "{start},\"exit\":{{\"code\":{},\"signal\":{}}}}}",
                OrNull(status.exit_status()),
                OrNull(status.terminating_signal())
            ),
        }
    }

    /// Its process was reaped.
    pub fn ended(&mut self, status: WaitStatus) {
        if let SessionStreams::Terminal { slave, .. } = &mut self.streams {
            *slave = None;
        }
        self.process.ended(status);
    }

    /// Another client goes on with it.
    pub fn attach(&mut self, has_stream_bytes: bool) {
        self.has_stream_bytes = has_stream_bytes;
        self.pending = 0..0;
    }

    /// The client is gone and may come back: what it sent last is dropped, as half a message is.
    pub fn detach(&mut self) {
        self.pending = 0..0;
        if self.writes_eof() {
            self.eof = None;
        }
    }

    /// Takes output that nobody reads now, as much as is kept.
    pub fn keep_output(&mut self) {
        self.fill_history(u64::MAX);
    }

    /// Reads output into the history, but not over what position `keep` on still needs; whether any
    /// came.
    fn fill_history(&mut self, keep: u64) -> bool {
        let Some(named) = &mut self.named else {
            return false;
        };
        let over = self.process.is_over();
        let mut came = false;
        let (output, error) = self.streams.outputs();
        for (stream, channel) in [(STDOUT, Some(output)), (STDERR, error)] {
            let Some(channel) = channel else {
                continue;
            };
            let room = named.history.room(stream, keep);
            if room.is_empty() {
                continue;
            }
            match channel.read(room, over) {
                Read::Bytes(count) => {
                    named.history.commit(stream, count);
                    came = true;
                }
                Read::Empty => {}
                Read::End => channel.close(),
            }
        }
        came
    }

    /// Whether it takes messages now.
    pub fn takes_messages(&self) -> bool {
        self.pending.is_empty() && !self.writes_eof()
    }

    fn writes_eof(&self) -> bool {
        match self.streams {
            SessionStreams::Terminal { .. } => {
                self.eof.is_some_and(|written| written < TERMINAL_EOF.len())
            }
            SessionStreams::Pipes { .. } => false,
        }
    }

    /// Takes a binary message, which lies there among the received bytes.
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
        if let SessionStreams::Terminal { master, .. } = &self.streams {
            resize(master, control.cols, control.rows);
        }
        if control.stdin == Some(Stdin::Eof) {
            match &mut self.streams {
                SessionStreams::Pipes { input, .. } => input.close(),
                SessionStreams::Terminal { .. } => self.eof = self.eof.or(Some(0)),
            }
        }
        Ok(())
    }

    /// Moves bytes both ways. `messages`: how many messages of output may still be sent.
    pub fn proceed(&mut self, messages: &mut u32, io: &mut Io) -> Progress {
        if self.write_input(io) {
            return Progress::Again;
        }
        let status = self.process.status();
        if io.is_sent() && (*messages > 0 || status.is_some()) {
            let sent = match self.is_named() {
                true => self.send_history(io),
                false => self.send_output(io),
            };
            if sent {
                *messages = messages.saturating_sub(1);
                return Progress::Again;
            }
            if let Some(status) = status {
                return Progress::Ended(status);
            }
        }
        match self.takes_messages() {
            true => Progress::TakesMessage,
            false => Progress::Waits,
        }
    }

    /// Queues a message of output, from the command straight into it; whether there was any.
    fn send_output(&mut self, io: &mut Io) -> bool {
        let over = self.process.is_over();
        let prefix = usize::from(self.has_stream_bytes);
        let (output, error) = self.streams.outputs();
        for (stream, channel) in [(STDOUT, Some(output)), (STDERR, error)] {
            let Some(channel) = channel else {
                continue;
            };
            let room = io.message_room().get_mut(prefix..).unwrap_or(&mut []);
            match channel.read(room, over) {
                Read::Bytes(count) => {
                    if self.has_stream_bytes
                        && let Some(first) = io.message_room().first_mut()
                    {
                        *first = stream;
                    }
                    io.commit_message(prefix + count);
                    return true;
                }
                Read::End => channel.close(),
                Read::Empty => {}
            }
        }
        false
    }

    /// Queues a message of what the client has not had of the history; whether there was any.
    fn send_history(&mut self, io: &mut Io) -> bool {
        let keep = self.named.as_ref().map_or(0, |named| named.sent.position());
        let came = self.fill_history(keep);
        let prefix = usize::from(self.has_stream_bytes);
        let Some(named) = self.named.as_deref_mut() else {
            return false;
        };
        let Some((stream, bytes)) = named.history.read(&mut named.sent) else {
            return came;
        };
        let room = io.message_room();
        if self.has_stream_bytes
            && let Some(first) = room.first_mut()
        {
            *first = stream;
        }
        let room = room.get_mut(prefix..).unwrap_or(&mut []);
        let count = bytes.len().min(room.len());
        for (to, from) in room.iter_mut().zip(bytes) {
            *to = *from;
        }
        io.commit_message(prefix + count);
        named.history.advance(&mut named.sent, count);
        true
    }

    /// Writes input as much as the command takes; whether that was anything.
    fn write_input(&mut self, io: &mut Io) -> bool {
        let input = match &self.streams {
            SessionStreams::Pipes { input, .. } => input,
            SessionStreams::Terminal { master, .. } => master,
        };
        if !self.pending.is_empty() {
            let bytes = io.received().get(self.pending.clone()).unwrap_or(&[]);
            let count = input.write(bytes);
            self.pending.start += count;
            return count > 0;
        }
        if self.writes_eof()
            && let Some(written) = &mut self.eof
        {
            let count = input.write(TERMINAL_EOF.get(*written..).unwrap_or(&[]));
            *written += count;
            return count > 0;
        }
        false
    }

    /// Registers for its streams: for output while the client takes it, or nobody is attached.
    pub fn watch(&mut self, key: Key, wants_output: bool, context: &Context) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(!self.takes_messages(), EventFlags::OUT);
        let on_output = flag(wants_output, EventFlags::IN);
        match &mut self.streams {
            SessionStreams::Pipes {
                input,
                output,
                error,
            } => {
                input.watch(Source::Input, key, on_input, context);
                output.watch(Source::Output, key, on_output, context);
                error.watch(Source::ErrorOutput, key, on_output, context);
            }
            SessionStreams::Terminal { master, .. } => {
                master.watch(Source::Output, key, on_input | on_output, context);
            }
        }
    }

    /// The client is gone: closes our ends, which hangs a terminal up. Whether it was one.
    pub fn hang_up(&mut self) -> bool {
        match &mut self.streams {
            SessionStreams::Pipes {
                input,
                output,
                error,
            } => {
                input.close();
                output.close();
                error.close();
                false
            }
            SessionStreams::Terminal { master, slave } => {
                master.close();
                *slave = None;
                true
            }
        }
    }
}

/// `{"Exit":{"code":N|null,"signal":N|null}}`
pub struct ExitMessage(pub WaitStatus);

impl Display for ExitMessage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = OrNull(self.0.exit_status());
        let signal = OrNull(self.0.terminating_signal());
        write!(
            formatter,
            "{{\"Exit\":{{\"code\":{code},\"signal\":{signal}}}}}"
        )
    }
}

impl SessionStreams {
    /// Where output comes from, and error output if that is apart.
    fn outputs(&mut self) -> (&mut Channel, Option<&mut Channel>) {
        match self {
            Self::Pipes { output, error, .. } => (output, Some(error)),
            Self::Terminal { master, .. } => (master, None),
        }
    }
}

impl Named {
    fn new(request: &SessionRequest) -> Result<PageBox<Self>> {
        let memory = Region::new(HISTORY + ring::PIECE).map_err(context!("allocate memory"))?;
        let empty = || Self {
            id: heapless::String::new(),
            command: heapless::String::new(),
            history: Ring::new(memory),
            sent: Cursor::default(),
        };
        let mut named = PageBox::new(empty).map_err(context!("allocate memory"))?;
        let _checked_to_fit = named.id.push_str(request.id);
        for argument in request.command {
            let separator = if named.command.is_empty() { "" } else { "," };
            let entry = message!("{separator}{}", Quoted(&argument.lossy()));
            // What does not fit is not shown.
            if named.command.push_str(entry.as_str()).is_err() {
                break;
            }
        }
        Ok(named)
    }
}

fn start_on_pipes(
    spec: &Spec,
    separate: bool,
    context: &mut Context,
) -> Result<(Process, SessionStreams)> {
    let (input, their_input) = input_pipe()?;
    let (output, their_output) = output_pipe()?;
    let errors = match separate {
        true => Some(output_pipe()?),
        false => None,
    };
    let their_error = errors.as_ref().map_or(&their_output, |(_, theirs)| theirs);
    let streams = Streams {
        input: Input::Pipe(Inherited::new(&their_input)),
        output: Inherited::new(&their_output),
        error: Inherited::new(their_error),
    };
    let process = Process::start(spec, streams, context)?;
    let streams = SessionStreams::Pipes {
        input,
        output,
        error: errors.map_or_else(Channel::default, |(ours, _)| ours),
    };
    Ok((process, streams))
}

fn start_on_terminal(
    spec: &Spec,
    (cols, rows): (u16, u16),
    context: &mut Context,
) -> Result<(Process, SessionStreams)> {
    let master = terminal::open(context.pts.as_ref()).map_err(context!("open a terminal"))?;
    let slave = terminal::open_peer(&master).map_err(context!("open a terminal"))?;
    let master = Channel::new(master);
    resize(&master, cols, rows);
    let terminal = Inherited::new(&slave);
    let streams = Streams {
        input: Input::Terminal(terminal),
        output: terminal,
        error: terminal,
    };
    let process = Process::start(spec, streams, context)?;
    let streams = SessionStreams::Terminal {
        master,
        slave: Some(slave),
    };
    Ok((process, streams))
}

/// Tells a terminal its size; one of 0 is unknown.
fn resize(master: &Channel, cols: u16, rows: u16) {
    if let Some(master) = master.end()
        && cols > 0
        && rows > 0
    {
        let _gone = sys::terminal::resize(master, cols, rows);
    }
}

/// A number, or `null`, for display.
struct OrNull(Option<i32>);

impl Display for OrNull {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(formatter),
            None => formatter.write_str("null"),
        }
    }
}
