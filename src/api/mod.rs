//! The API: HTTP/1.1 and WebSocket connections from the context over vsock.

mod command;

use crate::context;
use crate::context::{COMMANDS, Context, NEVER, Source};
use crate::error::{Result, name};
use crate::sys::epoll::Poller;
use crate::sys::files;
use crate::sys::{Region, vsock};
use command::{Command, OUTPUT};
use core::ops::Range;
use proto::bodies::{self, Control, Exec};
use proto::http::{self, Call, Progress, Reader, Status, Style, Target};
use proto::json::{OrNull, Quoted, Spans, Text};
use proto::message;
use proto::message::{Message, ToLossy};
use proto::slab::{Key, Slab};
use proto::websocket::{self, CloseCode, Decoder, Event};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, WaitStatus};

/// The vsock port.
const PORT: u32 = 10_000;
/// Most connections at once; one more waits for an idle one to go, or is told 503.
const CONNECTIONS: usize = 288;
/// Connections the kernel keeps for us while we are at something else.
const BACKLOG: usize = 128;
/// Connections taken in a turn: a turn with output for the console takes its time.
const ACCEPT: usize = 16;

/// Time for a request's head, in milliseconds, from its first byte.
const HEAD_TIME: u64 = 10_000;
/// Time for a request's body, in milliseconds, from the end of its head.
const BODY_TIME: u64 = 30_000;
/// Time in which a client must take some of what waits for it, or answer a close frame, in
/// milliseconds.
const READ_TIME: u64 = 30_000;
/// How long a one-shot command may take, in milliseconds, unless it is told otherwise.
const COMMAND_TIME: u64 = 30_000;
/// How long a killed command is waited for before it is answered for, in milliseconds.
const KILLED_TIME: u64 = 2_000;

/// Received bytes: a request, or a message; the larger of the two.
const IN: usize = http::BUFFER;
const _: () = assert!(IN >= websocket::BUFFER);
/// Most bytes taken from a connection at once, so that none takes all the time.
const READ: usize = 16 << 10;
/// Output in one message.
const MESSAGE: usize = 64 << 10;
/// Bytes to send: a message with its header, and control frames.
const OUT: usize = MESSAGE + 1024;
/// What a connection may have used of its memory for it to be kept: a page in, a page out.
const LITTLE: usize = 4096;
/// Room for control frames, an answer's head, or what stands around output, behind what waits.
const CONTROL: usize = 512;

/// The API's state.
pub struct Api {
    listener: Option<OwnedFd>,
    /// The memory of the last connection that used little of its own, for the next one.
    spare: Option<Region>,
    connections: Slab<Connection, CONNECTIONS>,
}

/// A connection, and the command it runs.
#[repr(C)]
struct Connection {
    socket: OwnedFd,
    mode: Mode,
    /// How the answer being made is framed.
    style: Style,
    /// The answer being sent tells how the workload ended.
    tells: bool,
    /// No more than [`LITTLE`] of each part of its memory was ever used.
    small: bool,
    watched: EventFlags,
    /// When the client, or its command, has taken too long.
    deadline: u64,
    /// When something last happened to it, for choosing which idle one has to go.
    idle_since: u64,
    /// [`IN`] received bytes, then [`OUT`] bytes to send.
    memory: Region,
    received: usize,
    /// The bytes to send that are not sent, in the memory.
    unsent: Range<usize>,
    /// Bytes of the received message that the command has not taken.
    pending: Range<usize>,
    /// How far captured output is sent: which stream, and where in it.
    stream: usize,
    at: usize,
    decoder: Decoder,
    reader: Reader,
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Reading a request.
    Request,
    /// Waiting for the workload's end.
    ExitCode,
    /// Waiting for a one-shot command's end.
    Command,
    /// Sending a one-shot command's output.
    Output,
    /// Sending the last bytes.
    Closing,
    /// Over.
    Gone,
    /// A WebSocket whose command has not come.
    Opened,
    /// A WebSocket and its command.
    Session,
    /// A WebSocket on which a close frame is sent: waiting for the client's.
    Ended,
}

impl Mode {
    fn is_websocket(self) -> bool {
        matches!(self, Mode::Opened | Mode::Session | Mode::Ended)
    }
}

impl Api {
    /// No connection.
    pub const fn new() -> Self {
        Self {
            listener: None,
            spare: None,
            connections: Slab::new(),
        }
    }

    /// Starts listening; a VM without a vsock device has no API.
    pub fn listen(&mut self, poller: &Poller) -> Result {
        let listener =
            vsock::listen(PORT, BACKLOG).map_err(context!("listen on vsock port {}", PORT))?;
        let listener = self.listener.insert(listener);
        let token = Source::Listener.token(Key::default());
        poller.watch(listener, token, &mut EventFlags::empty(), EventFlags::IN);
        Ok(())
    }

    /// Whether anybody could reach it.
    pub fn is_up(&self) -> bool {
        self.listener.is_some()
    }

    /// Takes no more connections and drops those there are; their commands are killed.
    pub fn close(&mut self, context: &mut Context) {
        self.listener = None;
        self.each(context, &mut |connection, context| {
            if connection.mode.is_websocket() {
                connection.queue(&websocket::close_frame(Some(CloseCode::GoingAway as u16)));
                connection.flush(context);
            }
            connection.mode = Mode::Gone;
            true
        });
    }

    /// The listener has connections: takes so many that none is refused while others wait, too.
    pub fn accept(&mut self, context: &mut Context) {
        for _ in 0..ACCEPT {
            let Some(listener) = &self.listener else {
                return;
            };
            let Ok((socket, peer)) = vsock::accept(listener) else {
                return;
            };
            // Only the context may steer PID 1, not a process in the VM by its own or the local CID.
            if peer != vsock::HOST {
                continue;
            }
            let memory = match self.spare.take() {
                _ if self.connections.is_full() && !self.make_room(context) => None,
                None => Region::new(IN + OUT).ok(),
                spare => spare,
            };
            let Some(memory) = memory else {
                refuse(&socket);
                continue;
            };
            let connection = Connection::new(socket, memory, context.now);
            if let Some(key) = self.connections.insert(connection) {
                // What the client sends first may have come along.
                self.on_event(Source::Connection, key, EventFlags::IN, context);
            }
        }
    }

    /// Drops the connection that has been idle longest; whether there was one.
    fn make_room(&mut self, context: &mut Context) -> bool {
        let mut oldest = NEVER;
        let mut found = Key::default();
        for (key, connection) in self.connections.iter() {
            if connection.is_idle() && connection.idle_since < oldest {
                oldest = connection.idle_since;
                found = key;
            }
        }
        match self.connections.get_mut(found) {
            Some(connection) if oldest != NEVER => connection.mode = Mode::Gone,
            _ => return false,
        }
        self.proceed(found, context);
        true
    }

    /// Something happened to a connection or its command.
    pub fn on_event(
        &mut self,
        source: Source,
        key: Key,
        events: EventFlags,
        context: &mut Context,
    ) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let one_shot = connection.mode == Mode::Command;
        match source {
            Source::Connection => connection.on_socket(events),
            Source::Output if one_shot => drop(connection.command.capture(0, context.sink)),
            Source::ErrorOutput if one_shot => drop(connection.command.capture(1, context.sink)),
            _ => {}
        }
        self.proceed(key, context);
    }

    /// Lets a connection do what it can do now. Then it goes, or waits for what is next.
    fn proceed(&mut self, key: Key, context: &mut Context) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        connection.proceed(context);
        if connection.mode != Mode::Gone {
            return connection.watch(key, context);
        }
        connection.command.release(context);
        if connection.small && self.spare.is_none() {
            self.spare = Some(core::mem::take(&mut connection.memory));
        }
        self.connections.remove(key);
    }

    /// A process was reaped; it may be a command's.
    pub fn on_exit(&mut self, pid: Pid, status: WaitStatus, context: &mut Context) {
        if let Some(at) = context.abandoned.iter().position(|other| *other == pid) {
            context.abandoned.swap_remove(at);
            context.commands -= 1;
            return;
        }
        self.each(context, &mut |connection, context| {
            let is_its = connection.command.pid == Some(pid);
            if is_its {
                connection.command_ended(status, context);
            }
            is_its
        });
    }

    /// The workload has ended: all who wait for it are told.
    pub fn on_workload_exit(&mut self, context: &mut Context) {
        self.each(context, &mut |connection, _| {
            connection.mode == Mode::ExitCode
        });
    }

    /// The next time at which something has to be done.
    pub fn deadline(&self) -> u64 {
        let connections = self.connections.iter();
        connections.fold(NEVER, |first, (_, connection)| {
            first.min(connection.deadline)
        })
    }

    /// Does what has to be done by now.
    pub fn on_time(&mut self, context: &mut Context) {
        self.each(context, &mut |connection, context| {
            let is_late = connection.deadline <= context.now;
            if is_late {
                connection.expire(context);
            }
            is_late
        });
    }

    /// Does something to every connection; one for which the answer is true can go on then.
    fn each(
        &mut self,
        context: &mut Context,
        work: &mut dyn FnMut(&mut Connection, &mut Context) -> bool,
    ) {
        for index in 0..self.connections.used() {
            if let Some(key) = self.connections.key_at(index)
                && let Some(connection) = self.connections.get_mut(key)
                && work(connection, context)
            {
                self.proceed(key, context);
            }
        }
    }
}

/// Tells a client that there is no room; what the socket does not take now is lost with it.
fn refuse(socket: &OwnedFd) {
    let body = r#"{"error":"too many connections"}"#;
    let head = http::response(Status::ServiceUnavailable, Style::CLOSE, body.len(), b"");
    let answer = message!("{head}{body}");
    let _client_gone = files::write(socket, answer.as_bytes());
}

impl Connection {
    fn new(socket: OwnedFd, memory: Region, now: u64) -> Self {
        Self {
            socket,
            mode: Mode::Request,
            style: Style::CLOSE,
            tells: false,
            small: true,
            watched: EventFlags::empty(),
            deadline: NEVER,
            idle_since: now,
            memory,
            received: 0,
            unsent: IN..IN,
            pending: 0..0,
            stream: 0,
            at: 0,
            decoder: Decoder::default(),
            reader: Reader::default(),
            command: Command::none(),
        }
    }

    fn is_idle(&self) -> bool {
        self.mode == Mode::Request && !self.reader.started() && self.unsent.is_empty()
    }

    /// Whether bytes of the client are of use now; the kernel keeps them otherwise.
    fn wants_input(&self) -> bool {
        self.mode != Mode::Closing
            && self.received < IN
            && self.has_room()
            && self.pending.is_empty()
    }

    /// Whether an answer's head or a control frame fits behind what waits to be sent.
    fn has_room(&self) -> bool {
        IN + OUT - self.unsent.end >= CONTROL
    }

    fn on_socket(&mut self, events: EventFlags) {
        if events.contains(EventFlags::IN) && self.wants_input() {
            self.receive();
        } else if events.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
            self.mode = Mode::Gone;
        }
    }

    fn receive(&mut self) {
        let end = IN.min(self.received + READ);
        let room = self.memory.part(self.received..end);
        match files::read(&self.socket, room) {
            Ok(count @ 1..) => {
                self.received += count;
                self.small &= self.received <= LITTLE;
            }
            Err(Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.mode = Mode::Gone,
        }
    }

    /// Does whatever can be done now.
    fn proceed(&mut self, context: &mut Context) {
        // How many messages of output a session may still send, as others wait, too.
        let mut messages = 1;
        while self.mode != Mode::Gone {
            self.flush(context);
            // The client reads first. A session still takes what does not have to be answered.
            if !self.unsent.is_empty() && !self.mode.is_websocket() {
                return;
            }
            let more = match self.mode {
                Mode::Request => self.read_request(context),
                Mode::ExitCode => self.tell_exit(context),
                Mode::Command => self.command.status.is_some() && self.answer_command(context),
                Mode::Output => self.send_output(context),
                Mode::Opened | Mode::Ended => self.next_message(context),
                Mode::Session => self.proceed_session(&mut messages, context),
                Mode::Closing | Mode::Gone => {
                    self.mode = Mode::Gone;
                    false
                }
            };
            if !more {
                return;
            }
        }
    }

    /// Takes a request from the received bytes, if a whole one is there; whether to go on.
    fn read_request(&mut self, context: &mut Context) -> bool {
        let was_in_body = self.reader.in_body();
        let input = self.memory.part(0..IN);
        let progress = self.reader.advance(input, &mut self.received);
        match progress {
            Progress::More | Progress::Continue => {
                let in_body = self.reader.in_body();
                if !self.reader.started() {
                    self.deadline = NEVER;
                } else if in_body != was_in_body || self.deadline == NEVER {
                    let time = if in_body { BODY_TIME } else { HEAD_TIME };
                    self.deadline = context.now + time;
                }
                let asked = progress == Progress::Continue;
                if asked {
                    self.queue(http::CONTINUE);
                }
                asked
            }
            Progress::Ready => {
                self.deadline = NEVER;
                self.style = self.reader.style;
                let body = self.reader.body();
                self.dispatch(body.clone(), context);
                self.reader = Reader::default();
                self.discard(body.end);
                true
            }
            Progress::Refused(refusal) => {
                self.refuse_and_close(refusal.status(), refusal.why());
                true
            }
        }
    }

    /// Drops the first received bytes.
    fn discard(&mut self, count: usize) {
        let count = count.min(self.received);
        self.memory.copy_within(count..self.received, 0);
        self.received -= count;
    }

    /// Does what a request asks for; its body is still among the received bytes.
    fn dispatch(&mut self, body: Range<usize>, context: &mut Context) {
        match self.reader.target {
            Target::Unknown => self.refuse(Status::NotFound, message!("no such path")),
            Target::NoUpgrade | Target::Call(Call::Session) => {
                let body = br#"{"error":"a WebSocket handshake, version 13, is needed"}"#;
                self.answer(Status::UpgradeRequired, body, b"");
            }
            Target::WrongMethod(methods) => {
                let body = br#"{"error":"method not allowed"}"#;
                self.answer(Status::MethodNotAllowed, body, methods);
            }
            Target::Upgrade(accept) => {
                self.mode = Mode::Opened;
                self.decoder = Decoder::default();
                self.say(http::switching(&accept));
            }
            Target::Call(Call::Status) => self.answer(Status::Ok, OK, b""),
            Target::Call(Call::ExitCode) => self.mode = Mode::ExitCode,
            Target::Call(Call::Signals) => match self.signal(body, context) {
                Ok(()) => self.answer(Status::Ok, OK, b""),
                Err(Refused(status, why)) => self.refuse(status, why),
            },
            Target::Call(Call::Exec) => match self.start(body, false, context) {
                Ok(()) => self.mode = Mode::Command,
                Err(Refused(status, why)) => self.refuse(status, why),
            },
        }
    }

    fn signal(&mut self, body: Range<usize>, context: &mut Context) -> Result<(), Refused> {
        let body = self.memory.part(body);
        let signal = bodies::signal(body).map_err(|why| Refused(Status::BadRequest, why))?;
        if signal == 0 {
            let why = message!("signal: must be from 1 to 64");
            return Err(Refused(Status::BadRequest, why));
        }
        let sent = match context.workload.group {
            Some(group) => crate::sys::kill_group(group, signal),
            None => Err(Errno::SRCH),
        };
        sent.map_err(|errno| match errno {
            Errno::SRCH => Refused(Status::Conflict, message!("the workload is not running")),
            _ => Refused(
                Status::InternalServerError,
                message!("send the signal: {}", name(errno)),
            ),
        })
    }

    /// Starts the command that a request's body, or a session's first message, asks for.
    fn start(
        &mut self,
        body: Range<usize>,
        session: bool,
        context: &mut Context,
    ) -> Result<(), Refused> {
        let body = self.memory.part(body);
        let mut spans = Spans::default();
        let (exec, what) = match session {
            false => (Exec::read(body, &mut spans), "cmd"),
            true => (Exec::read_session(body, &mut spans), "command"),
        };
        let exec = exec.map_err(|why| Refused(Status::BadRequest, why))?;
        if exec.command().iter().next().is_none_or(Text::is_empty) {
            let why = message!("{what}: must have a command");
            return Err(Refused(Status::BadRequest, why));
        }
        if context.commands == COMMANDS {
            let why = message!("too many commands");
            return Err(Refused(Status::ServiceUnavailable, why));
        }
        self.command.start(&exec, session, context).map_err(|why| {
            self.command = Command::none();
            Refused(Status::InternalServerError, why)
        })?;
        if !session {
            let limit = match exec.timeout_ms() {
                0 => COMMAND_TIME,
                limit => u64::from(limit),
            };
            self.deadline = context.now + limit;
        }
        Ok(())
    }

    /// The process of its command was reaped.
    fn command_ended(&mut self, status: WaitStatus, context: &mut Context) {
        let Some(why) = self.command.ended(status) else {
            return;
        };
        self.command.release(context);
        if self.mode == Mode::Session {
            self.fail_session(why);
        } else {
            self.deadline = NEVER;
            self.refuse(Status::InternalServerError, why);
        }
    }

    /// A one-shot command has ended, or counts as ended: the answer's start. True: go on.
    fn answer_command(&mut self, context: &mut Context) -> bool {
        let (start, length) = self.command.conclude(context.sink);
        self.mode = Mode::Output;
        self.deadline = NEVER;
        self.stream = 0;
        self.at = 0;
        let head = http::response(Status::Ok, self.style, length, b"");
        self.say(head);
        self.say(start);
        // A short answer goes out with its head.
        self.send_output(context)
    }

    /// Queues output of a one-shot command, as much as there is room for. True: go on.
    fn send_output(&mut self, context: &mut Context) -> bool {
        while self.stream < 2 {
            let room = self.memory.part(self.unsent.end..IN + OUT - CONTROL);
            let (count, all) = self.command.escape(self.stream, &mut self.at, room);
            self.unsent.end += count;
            if !all {
                return true;
            }
            let behind = self.command.behind(self.stream);
            self.say(behind);
            self.stream += 1;
            self.at = 0;
        }
        self.command.release(context);
        self.finish_answer();
        true
    }

    /// Answers with how the workload ended, if it has; whether to go on.
    fn tell_exit(&mut self, context: &mut Context) -> bool {
        let Some(exit) = &context.workload.exit else {
            return false;
        };
        let mut body = message!(
            "{{\"code\":{},\"oom_killed\":{}",
            exit.code,
            exit.oom_killed
        );
        if let Some(why) = &exit.error {
            body = message!("{body},\"error\":{}", Quoted(why.as_bytes()));
        }
        let body = message!("{body}}}");
        self.tells = !self.style.head_only;
        self.answer(Status::Ok, body.as_bytes(), b"");
        true
    }

    /// Answers with an error.
    fn refuse(&mut self, status: Status, why: Message) {
        let body = message!("{{\"error\":{}}}", Quoted(why.as_bytes()));
        self.answer(status, body.as_bytes(), b"");
    }

    /// Answers with an error to what cannot be understood any further.
    fn refuse_and_close(&mut self, status: Status, why: &[u8]) {
        self.deadline = NEVER;
        self.style = Style::CLOSE;
        self.refuse(status, message!("{}", why.lossy()));
    }

    /// Queues a whole answer.
    fn answer(&mut self, status: Status, body: &[u8], allow: &[u8]) {
        let head = http::response(status, self.style, body.len(), allow);
        self.queue(head.as_bytes());
        if !self.style.head_only {
            self.queue(body);
        }
        self.finish_answer();
    }

    /// All of an answer is queued: the next request, or the end.
    fn finish_answer(&mut self) {
        if self.mode != Mode::Gone {
            self.mode = match self.style.keep_alive {
                true => Mode::Request,
                false => Mode::Closing,
            };
        }
    }

    /// Moves a session's bytes both ways; whether to go on. `messages`: how many messages of output
    /// it may still send.
    fn proceed_session(&mut self, messages: &mut u32, context: &mut Context) -> bool {
        if !self.pending.is_empty() {
            let bytes = self.memory.part(self.pending.clone());
            let count = self.command.write(bytes);
            self.pending.start += count;
            if count > 0 {
                return true;
            }
        }
        let ended = self.command.status;
        if self.unsent.is_empty() && (*messages > 0 || ended.is_some()) {
            const START: usize = IN + websocket::HEADER_OUT;
            let room = self.memory.part(START..START + MESSAGE);
            let count = self.command.read(OUTPUT, room);
            if count > 0 {
                *messages = messages.saturating_sub(1);
                // The header lies directly before the output.
                let header = websocket::header(websocket::BINARY, count);
                let start = START - header.len();
                self.unsent = start..start;
                self.queue(&header);
                self.unsent.end += count;
                return true;
            }
            if let Some(status) = ended {
                self.command.release(context);
                self.end_session(status);
                return true;
            }
        }
        self.pending.is_empty() && self.next_message(context)
    }

    /// Takes a message from the received bytes, if a whole one is there and an answer has room;
    /// whether to go on.
    fn next_message(&mut self, context: &mut Context) -> bool {
        if !self.has_room() {
            return false;
        }
        let input = self.memory.part(0..IN);
        let event = self.decoder.next(input, &mut self.received);
        let payload = self.decoder.payload.clone();
        let (ended, opened) = (self.mode == Mode::Ended, self.mode == Mode::Opened);
        match event {
            Event::More => return false,
            // The answer to our close frame; anything before it is late.
            Event::Close(_) | Event::Fail(_) if ended => self.mode = Mode::Gone,
            _ if ended => {}
            Event::Pong => {}
            Event::Ping => {
                self.queue(&websocket::header(websocket::PONG, payload.len()));
                let end = self.unsent.end;
                self.unsent.end += payload.len();
                self.memory.copy_within(payload, end);
            }
            Event::Close(code) => self.close_session(code, context),
            Event::Fail(code) => self.close_session(Some(code as u16), context),
            Event::Text if opened => match self.start(payload, true, context) {
                Ok(()) => self.mode = Mode::Session,
                Err(Refused(_, why)) => self.fail_session(why),
            },
            Event::Binary if opened => {
                self.fail_session(message!(
                    "the first message must be a text with the command"
                ));
            }
            Event::Binary => self.pending = payload,
            Event::Text => self.control(payload, context),
        }
        true
    }

    /// A text message to a running session: a new size, or the end of input.
    fn control(&mut self, message: Range<usize>, context: &mut Context) {
        let mut spans = Spans::default();
        match Control::read(self.memory.part(message), &mut spans) {
            Ok(control) => {
                self.command.resize(control.size());
                if control.ends_stdin() {
                    self.command.end_input();
                }
            }
            Err(_) => self.close_session(Some(CloseCode::Policy as u16), context),
        }
    }

    /// The client closes, or must not go on: its command is killed.
    fn close_session(&mut self, code: Option<u16>, context: &mut Context) {
        self.command.release(context);
        self.mode = Mode::Closing;
        self.queue(&websocket::close_frame(code));
    }

    /// The command has ended and its output is sent: how it ended, then the close frame.
    fn end_session(&mut self, status: WaitStatus) {
        let message = message!(
            "{{\"Exit\":{{\"code\":{},\"signal\":{}}}}}",
            OrNull(status.exit_status()),
            OrNull(status.terminating_signal())
        );
        self.finish_session(message, CloseCode::Normal);
    }

    /// The command cannot be started.
    fn fail_session(&mut self, why: Message) {
        let message = message!("{{\"Error\":{{\"message\":{}", Quoted(why.as_bytes()));
        self.finish_session(message!("{message}}}}}"), CloseCode::Internal);
    }

    fn finish_session(&mut self, message: Message, code: CloseCode) {
        self.mode = Mode::Ended;
        self.pending = 0..0;
        self.queue(&websocket::header(
            websocket::TEXT,
            message.as_bytes().len(),
        ));
        self.queue(message.as_bytes());
        self.queue(&websocket::close_frame(Some(code as u16)));
    }

    /// Adds a line to what is to be sent.
    fn say(&mut self, line: Message) {
        self.queue(line.as_bytes());
    }

    /// Adds bytes to those that are to be sent. There is room ([`CONTROL`]), or the connection is
    /// over.
    fn queue(&mut self, bytes: &[u8]) {
        let end = self.unsent.end + bytes.len();
        let room = self.memory.part(self.unsent.end..end);
        if room.len() == bytes.len() {
            room.copy_from_slice(bytes);
            self.unsent.end = end;
        } else {
            self.mode = Mode::Gone;
        }
    }

    /// Sends what the socket takes.
    fn flush(&mut self, context: &mut Context) {
        self.small &= self.unsent.end <= IN + LITTLE;
        while !self.unsent.is_empty() {
            let bytes = self.memory.part(self.unsent.clone());
            // Without a reader PID 1 gets EPIPE alone: it has no handler for SIGPIPE (signal(7)).
            match files::write(&self.socket, bytes) {
                Ok(count) => {
                    self.unsent.start += count;
                    self.deadline = NEVER;
                }
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.mode = Mode::Gone;
                    return;
                }
            }
        }
        self.unsent = IN..IN;
        if self.tells {
            self.tells = false;
            context.workload.exit_code_delivered = true;
        }
    }

    /// Time is up for whatever was waited for.
    fn expire(&mut self, context: &mut Context) {
        match self.mode {
            Mode::Request if self.reader.started() && self.unsent.is_empty() => {
                self.refuse_and_close(Status::RequestTimeout, b"the request took too long");
            }
            Mode::Command if !self.command.killed => {
                self.command.killed = true;
                self.command.kill();
                self.deadline = context.now + KILLED_TIME;
            }
            // It was killed, and cannot be reaped.
            Mode::Command => drop(self.answer_command(context)),
            _ => self.mode = Mode::Gone,
        }
    }

    /// Registers for what is waited for.
    fn watch(&mut self, key: Key, context: &mut Context) {
        self.idle_since = context.now;
        let unsent = !self.unsent.is_empty();
        let mut wanted = EventFlags::RDHUP;
        if self.wants_input() {
            wanted |= EventFlags::IN;
        }
        if unsent {
            wanted |= EventFlags::OUT;
        }
        let waits = match self.mode {
            Mode::Ended => true,
            // A session that goes on may leave its output unread: that stops its command.
            Mode::Opened | Mode::Session => false,
            _ => unsent,
        };
        if waits {
            self.deadline = self.deadline.min(context.now + READ_TIME);
        }
        let (socket, watched) = (&self.socket, &mut self.watched);
        context
            .poller
            .watch(socket, Source::Connection.token(key), watched, wanted);
        self.command
            .watch(key, !unsent, !self.pending.is_empty(), context);
    }
}

/// Why a call is refused.
struct Refused(Status, Message);

/// The answer of a call that has nothing to tell.
const OK: &[u8] = br#"{"ok":true}"#;
