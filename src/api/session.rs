//! `GET /v1/ws/exec`: a command whose streams are the messages of a WebSocket.

use super::io::{CallError, Io};
use super::process::{Channel, Process, Read, Spec, input_pipe, output_pipe};
use crate::context;
use crate::context::{Context, Source};
use crate::error::Result;
use crate::process::exec::Streams;
use crate::sys::{self, terminal};
use core::fmt::{self, Display};
use core::ops::Range;
use proto::arena::Arena;
use proto::bodies::{SessionControl, SessionRequest, Stdin};
use proto::http::Status;
use proto::message;
use proto::message::Message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::process::WaitStatus;

/// What ends a terminal's input: VEOF of a new terminal (termios(3)), Ctrl-D, twice, as one behind an
/// unfinished line only hands that line over.
const TERMINAL_EOF: &[u8] = b"\x04\x04";

/// A running session.
pub struct Session {
    /// Its process.
    pub process: Process,
    streams: SessionStreams,
    /// Bytes of the received message that the command has not taken.
    pending: Range<usize>,
    /// The client has ended the input: so much of [`TERMINAL_EOF`] is written.
    eof: Option<usize>,
}

enum SessionStreams {
    Pipes {
        input: Channel,
        output: Channel,
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

impl Session {
    /// Starts what the first message asks for.
    pub fn start(message: &mut [u8], context: &mut Context) -> Result<Self, CallError> {
        context.with_arena(|memory, context| {
            let request = SessionRequest::decode(message, &mut Arena::new(memory))
                .map_err(CallError::bad_request)?;
            let spec = Spec {
                argv: request.command,
                env: request.env,
                cwd: request.cwd,
                user: request.user,
                tty: request.tty,
            };
            let (process, streams) = match request.tty {
                true => start_on_terminal(&spec, (request.cols, request.rows), context),
                false => start_on_pipes(&spec, context),
            }
            .map_err(|error| CallError::new(Status::InternalServerError, error))?;
            Ok(Self {
                process,
                streams,
                pending: 0..0,
                eof: None,
            })
        })
    }

    /// Its process was reaped.
    pub fn ended(&mut self, status: WaitStatus) {
        if let SessionStreams::Terminal { slave, .. } = &mut self.streams {
            *slave = None;
        }
        self.process.ended(status);
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
        let control = context
            .with_arena(|memory, _| SessionControl::decode(message, &mut Arena::new(memory)))?;
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
            let output = match &mut self.streams {
                SessionStreams::Pipes { output, .. } => output,
                SessionStreams::Terminal { master, .. } => master,
            };
            match output.read(io.message_room(), status.is_some()) {
                Read::Bytes(count) => {
                    *messages = messages.saturating_sub(1);
                    io.commit_message(count);
                    return Progress::Again;
                }
                Read::End if status.is_none() => output.close(),
                Read::End | Read::Empty => {}
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

    /// Registers for its streams: for output while the client takes it.
    pub fn watch(&mut self, key: Key, io: &Io, context: &Context) {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let on_input = flag(!self.takes_messages(), EventFlags::OUT);
        let on_output = flag(io.is_sent(), EventFlags::IN);
        match &mut self.streams {
            SessionStreams::Pipes { input, output } => {
                input.watch(Source::Input, key, on_input, context);
                output.watch(Source::Output, key, on_output, context);
            }
            SessionStreams::Terminal { master, .. } => {
                master.watch(Source::Output, key, on_input | on_output, context);
            }
        }
    }

    /// The client is gone: closes our ends, which hangs a terminal up. Whether it was one.
    pub fn hang_up(&mut self) -> bool {
        match &mut self.streams {
            SessionStreams::Pipes { input, output } => {
                input.close();
                output.close();
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
pub fn exit_message(status: WaitStatus) -> Message {
    message!(
        "{{\"Exit\":{{\"code\":{},\"signal\":{}}}}}",
        OrNull(status.exit_status()),
        OrNull(status.terminating_signal())
    )
}

fn start_on_pipes(spec: &Spec, context: &mut Context) -> Result<(Process, SessionStreams)> {
    let (input, their_input) = input_pipe()?;
    let (output, their_output) = output_pipe()?;
    let streams = Streams {
        input: Some(&their_input),
        output: &their_output,
        error: &their_output,
    };
    let process = Process::start(spec, &streams, context)?;
    Ok((process, SessionStreams::Pipes { input, output }))
}

fn start_on_terminal(
    spec: &Spec,
    (cols, rows): (u16, u16),
    context: &mut Context,
) -> Result<(Process, SessionStreams)> {
    let master = terminal::open().map_err(context!("open a terminal"))?;
    let slave = terminal::open_peer(&master).map_err(context!("open a terminal"))?;
    let master = Channel::new(master);
    resize(&master, cols, rows);
    let streams = Streams {
        input: Some(&slave),
        output: &slave,
        error: &slave,
    };
    let process = Process::start(spec, &streams, context)?;
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
