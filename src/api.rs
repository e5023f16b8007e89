//! The API: HTTP/1.1 and WebSocket connections from the host over vsock.

use crate::commands::{Commands, Context, Kind, Running};
use crate::poll::{Poller, Source};
use crate::sys::{Region, vsock};
use crate::task::{Outcome, name};
use crate::why;
use pigeon_init::http::{self, Call, Progress, Reader, Refusal, Request, Status, Style, Target};
use pigeon_init::json::Text;
use pigeon_init::request::{self, Control, Exec};
use pigeon_init::slab::{Key, Slab};
use pigeon_init::text;
use pigeon_init::text::{Line, Show};
use pigeon_init::websocket::{self, CloseCode, Decoder, Event};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, WaitStatus};

/// The vsock port.
const PORT: u32 = 10_000;
/// Most connections at once; one more waits for an idle one to go, or is told 503.
const CONNECTIONS: usize = 288;
/// Connections the kernel keeps for us while we are at something else.
const BACKLOG: i32 = 128;

/// Time for a request's head, in milliseconds, from its first byte.
const HEAD_TIME: u64 = 10_000;
/// Time for a request's body, in milliseconds, from the end of its head.
const BODY_TIME: u64 = 30_000;
/// Time in which a client must take some of what waits for it, or answer a close frame, in
/// milliseconds.
const READ_TIME: u64 = 30_000;
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
/// Room for control frames, and an answer's head, behind what waits.
const CONTROL: usize = 512;

/// How the workload ended.
pub struct Exit {
    /// Its exit code, 128 + signal, or 125 when it could not be run.
    pub code: i32,
    /// Its main process was killed by the kernel's OOM killer.
    pub oom_killed: bool,
    /// Why it could not be run.
    pub error: Option<Line>,
}

/// The state of the workload as the API sees it.
#[derive(Default)]
pub struct Workload {
    /// Its process group while it runs.
    pub group: Option<Pid>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Somebody has read how.
    pub told: bool,
}

/// What the API needs of the rest.
pub struct Host<'a> {
    /// For commands.
    pub context: Context<'a>,
    /// The workload.
    pub workload: &'a mut Workload,
    /// For output that is dropped.
    pub sink: &'a mut [u8],
}

/// The API's state.
pub struct Api {
    listener: Option<OwnedFd>,
    connections: Slab<Connection, CONNECTIONS>,
    /// The memory of the last connection that used little of its own, for the next one.
    spare: Option<Region>,
    /// The commands it runs.
    pub commands: Commands,
}

struct Connection {
    socket: OwnedFd,
    /// [`IN`] received bytes, then [`OUT`] bytes to send.
    memory: Region,
    received: usize,
    /// The bytes to send that are not sent, in the second part of the memory.
    start: usize,
    end: usize,
    mode: Mode,
    /// How the answer being made is framed.
    style: Style,
    watched: EventFlags,
    deadline: Option<u64>,
    /// When it was last idle, for choosing which idle one has to go.
    idle_since: u64,
    /// The answer being sent tells how the workload ended.
    tells: bool,
    /// No more than [`LITTLE`] of each part of its memory was ever used.
    frugal: bool,
}

enum Mode {
    /// Reading a request.
    Request(Reader),
    /// Waiting for the workload's end.
    ExitCode,
    /// Waiting for a one-shot command's end.
    Command(Key),
    /// Sending a one-shot command's answer.
    Answer(Key, Answer),
    /// A WebSocket.
    Session(Session),
    /// Sending the last bytes.
    Closing,
}

/// How far an answer with captured output is sent: which piece, and where in it.
struct Answer {
    piece: usize,
    at: usize,
}

struct Session {
    decoder: Decoder,
    command: Option<Key>,
    /// Bytes of the received message that the command has not taken.
    pending: core::ops::Range<usize>,
    /// A close frame is sent: wait for the client's.
    closing: bool,
}

/// Whether a connection goes on.
type Goes = Result<(), Gone>;

/// The connection is over.
struct Gone;

impl Api {
    /// No connection.
    pub const fn new() -> Self {
        Self {
            listener: None,
            connections: Slab::new(),
            spare: None,
            commands: Commands::new(),
        }
    }

    /// Starts listening; a VM without a vsock device has no API.
    pub fn listen(&mut self, poller: &Poller) -> Outcome {
        let listener = vsock::listen(PORT, BACKLOG).map_err(why!("listen on vsock port ", PORT))?;
        poller.watch(
            &listener,
            Source::Listener,
            EventFlags::empty(),
            EventFlags::IN,
        );
        self.listener = Some(listener);
        Ok(())
    }

    /// Whether anybody could reach it.
    pub fn is_up(&self) -> bool {
        self.listener.is_some()
    }

    /// Takes no more connections and drops those there are; their commands are killed.
    pub fn close(&mut self, workload: &mut Workload) {
        self.listener = None;
        for index in 0..self.connections.used() {
            let Some(key) = self.connections.key_at(index) else {
                continue;
            };
            if let Some(connection) = self.connections.get_mut(key)
                && matches!(connection.mode, Mode::Session(_))
            {
                let frame = websocket::close_frame(Some(CloseCode::GoingAway as u16));
                let _client_gone = connection
                    .queue(&frame)
                    .and_then(|()| connection.flush(workload));
            }
            self.drop_connection(key);
        }
    }

    /// The listener has a connection.
    pub fn accept(&mut self, host: &mut Host) {
        let Some(listener) = &self.listener else {
            return;
        };
        let Ok((socket, peer)) = vsock::accept(listener) else {
            return;
        };
        // Only the host may steer PID 1, not a process in the VM by its own or the local CID.
        if peer != Some(vsock::HOST) {
            return;
        }
        if self.connections.len() == CONNECTIONS {
            self.make_room();
        }
        let memory = self.spare.take().map_or_else(|| Region::new(IN + OUT), Ok);
        let Ok(memory) = memory else {
            return refuse(&socket);
        };
        let connection = Connection {
            socket,
            memory,
            received: 0,
            start: 0,
            end: 0,
            mode: Mode::Request(Reader::default()),
            style: Style::CLOSE,
            watched: EventFlags::empty(),
            deadline: None,
            idle_since: host.context.now,
            tells: false,
            frugal: true,
        };
        match self.connections.insert(connection) {
            // What the client sends first may have come along.
            Ok(key) => self.on_connection(key, EventFlags::IN, host),
            Err(connection) => refuse(&connection.socket),
        }
    }

    /// Drops the connection that has been idle longest, if one is.
    fn make_room(&mut self) {
        let idle = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.is_idle());
        let oldest = idle
            .min_by_key(|(_, connection)| connection.idle_since)
            .map(|(key, _)| key);
        if let Some(key) = oldest {
            self.drop_connection(key);
        }
    }

    /// Something happened to a connection.
    pub fn on_connection(&mut self, key: Key, events: EventFlags, host: &mut Host) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let mut goes = Ok(());
        if events.contains(EventFlags::IN) && connection.wants_input() {
            goes = connection.receive();
        } else if events.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
            goes = Err(Gone);
        }
        goes = goes.and_then(|()| connection.proceed(key, &mut self.commands, host));
        self.settle(key, goes, host);
    }

    /// After anything was done to a connection: it goes, or waits for what is next.
    fn settle(&mut self, key: Key, goes: Goes, host: &mut Host) {
        match (goes, self.connections.get_mut(key)) {
            (Ok(()), Some(connection)) => connection.watch(key, &mut self.commands, &host.context),
            _ => self.drop_connection(key),
        }
    }

    fn drop_connection(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(key) else {
            return;
        };
        let command = match connection.mode {
            Mode::Command(command) | Mode::Answer(command, _) => Some(command),
            Mode::Session(session) => session.command,
            Mode::Request(_) | Mode::ExitCode | Mode::Closing => None,
        };
        if let Some(command) = command {
            abandon(&mut self.commands, command);
        }
        if connection.frugal && self.spare.is_none() {
            self.spare = Some(connection.memory);
        }
    }

    /// A command has output (`index` 1: on standard error), or a session's takes input again.
    pub fn on_command(&mut self, key: Key, index: usize, host: &mut Host) {
        match self.commands.get_mut(key).map(|command| &mut command.kind) {
            Some(Kind::Once(once)) => once.read(index, host.sink),
            Some(Kind::Session(_)) => self.on_session(key, host),
            Some(Kind::Abandoned) | None => {}
        }
    }

    fn on_session(&mut self, key: Key, host: &mut Host) {
        let Some(connection_key) = self
            .commands
            .get(key)
            .and_then(|command| command.connection)
        else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(connection_key) {
            let goes = connection.proceed(connection_key, &mut self.commands, host);
            self.settle(connection_key, goes, host);
        }
    }

    /// A process was reaped; whether it was a command's.
    pub fn on_exit(&mut self, pid: Pid, status: WaitStatus, host: &mut Host) -> bool {
        let found = self
            .commands
            .iter()
            .find(|(_, command)| command.pid == Some(pid))
            .map(|(key, _)| key);
        let Some(key) = found else {
            return false;
        };
        if let Some(command) = self.commands.get_mut(key) {
            let failure = command.ended(status, host.sink);
            self.answer(key, failure, host);
        }
        true
    }

    /// A command has ended, or counts as ended: its connection can go on.
    fn answer(&mut self, key: Key, failure: Option<Line>, host: &mut Host) {
        let connection_key = self
            .commands
            .get(key)
            .and_then(|command| command.connection);
        let Some(connection_key) = connection_key else {
            self.commands.remove(key);
            return;
        };
        if let Some(connection) = self.connections.get_mut(connection_key) {
            let goes = connection
                .command_ended(key, failure, &mut self.commands, host)
                .and_then(|()| connection.proceed(connection_key, &mut self.commands, host));
            self.settle(connection_key, goes, host);
        }
    }

    /// The workload has ended: all who wait for it are told.
    pub fn on_workload_exit(&mut self, host: &mut Host) {
        for index in 0..self.connections.used() {
            let Some(key) = self.connections.key_at(index) else {
                continue;
            };
            if let Some(connection) = self.connections.get_mut(key)
                && matches!(connection.mode, Mode::ExitCode)
            {
                let goes = connection
                    .tell_exit(host.workload)
                    .and_then(|()| connection.proceed(key, &mut self.commands, host));
                self.settle(key, goes, host);
            }
        }
    }

    /// The next time at which something has to be done.
    pub fn deadline(&self) -> Option<u64> {
        let connections = self
            .connections
            .iter()
            .filter_map(|(_, connection)| connection.deadline);
        let commands = self
            .commands
            .iter()
            .filter_map(|(_, command)| match &command.kind {
                Kind::Once(once) if command.status.is_none() => Some(once.deadline),
                _ => None,
            });
        connections.chain(commands).min()
    }

    /// Does what has to be done by now.
    pub fn on_time(&mut self, host: &mut Host) {
        let now = host.context.now;
        for index in 0..self.commands.used() {
            let Some(key) = self.commands.key_at(index) else {
                continue;
            };
            let Some(command) = self.commands.get_mut(key) else {
                continue;
            };
            if command.status.is_some() {
                continue;
            }
            if let Kind::Once(once) = &mut command.kind
                && once.deadline <= now
            {
                let give_up = once.expired(now);
                command.kill();
                if give_up {
                    self.answer(key, None, host);
                }
            }
        }
        for index in 0..self.connections.used() {
            let Some(key) = self.connections.key_at(index) else {
                continue;
            };
            if let Some(connection) = self.connections.get_mut(key)
                && connection.deadline.is_some_and(|deadline| deadline <= now)
            {
                let goes = connection
                    .expire()
                    .and_then(|()| connection.proceed(key, &mut self.commands, host));
                self.settle(key, goes, host);
            }
        }
    }
}

/// Tells a client that there is no room; what the socket does not take now is lost with it.
fn refuse(socket: &OwnedFd) {
    let mut answer = Line::new();
    let body = r#"{"error":"too many connections"}"#;
    http::response(
        &mut answer,
        Status::ServiceUnavailable,
        Style::CLOSE,
        body.len(),
        "",
    );
    answer.add(body);
    let _client_gone = rustix::net::send(socket, answer.as_bytes(), SendFlags::NOSIGNAL);
}

/// Takes a started command in, and waits for its output.
fn admit(commands: &mut Commands, started: Outcome<Running>, poller: &Poller) -> Outcome<Key> {
    match commands.insert(started?) {
        Ok(key) => {
            if let Some(command) = commands.get_mut(key) {
                command.register(key, poller);
            }
            Ok(key)
        }
        Err(command) => {
            command.kill();
            Err(text!("too many commands"))
        }
    }
}

/// Nobody waits for a command any more: it is killed, and forgotten when it is reaped.
fn abandon(commands: &mut Commands, key: Key) {
    if let Some(command) = commands.get_mut(key) {
        command.connection = None;
        command.kill();
        if command.pid.is_none() {
            commands.remove(key);
        } else {
            command.release();
        }
    }
}

impl Connection {
    fn is_idle(&self) -> bool {
        matches!(&self.mode, Mode::Request(reader) if !reader.started()) && self.start == self.end
    }

    /// Whether bytes of the client are of use now; the kernel keeps them otherwise.
    fn wants_input(&self) -> bool {
        let room = self.received < IN;
        match &self.mode {
            Mode::Request(_) | Mode::ExitCode | Mode::Command(_) | Mode::Answer(..) => {
                room && self.has_room()
            }
            Mode::Session(session) => room && session.pending.is_empty() && self.has_room(),
            Mode::Closing => false,
        }
    }

    /// Whether an answer's head or a control frame fits behind what waits to be sent.
    fn has_room(&self) -> bool {
        OUT - self.end >= CONTROL
    }

    fn receive(&mut self) -> Goes {
        let (input, _) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        let room = input.get_mut(self.received..).ok_or(Gone)?;
        let limit = room.len().min(READ);
        match rustix::net::recv(
            &self.socket,
            room.get_mut(..limit).ok_or(Gone)?,
            RecvFlags::empty(),
        ) {
            Ok((0, _)) => Err(Gone),
            Ok((count, _)) => {
                self.received += count;
                self.frugal &= self.received <= LITTLE;
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(Gone),
        }
    }

    /// Does whatever can be done now.
    fn proceed(&mut self, key: Key, commands: &mut Commands, host: &mut Host) -> Goes {
        let mut output = 1;
        loop {
            self.flush(host.workload)?;
            // The client reads first. A session still takes what does not have to be answered.
            if self.start < self.end && !matches!(self.mode, Mode::Session(_)) {
                return Ok(());
            }
            let more = match &mut self.mode {
                Mode::Request(_) => self.read_request(key, commands, host)?,
                Mode::Answer(..) => self.send_answer(commands, host)?,
                Mode::Session(_) => self.proceed_session(key, &mut output, commands, host)?,
                Mode::Closing => return Err(Gone),
                Mode::ExitCode | Mode::Command(_) => false,
            };
            if !more {
                return Ok(());
            }
        }
    }

    /// Takes a request from the received bytes, if a whole one is there; whether to go on.
    fn read_request(
        &mut self,
        key: Key,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Result<bool, Gone> {
        let Mode::Request(reader) = &mut self.mode else {
            return Ok(false);
        };
        let (input, _) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        let was_in_body = reader.in_body();
        let progress = reader.advance(input, &mut self.received);
        let now = host.context.now;
        match progress {
            Progress::More | Progress::Continue => {
                if !reader.started() {
                    self.deadline = None;
                } else if reader.in_body() && !was_in_body {
                    self.deadline = Some(now.saturating_add(BODY_TIME));
                } else {
                    self.deadline = self.deadline.or(Some(now.saturating_add(HEAD_TIME)));
                }
                if progress == Progress::Continue {
                    self.queue(http::CONTINUE)?;
                    return Ok(true);
                }
                Ok(false)
            }
            Progress::Ready(request) => {
                self.deadline = None;
                self.style = request.style;
                self.dispatch(key, &request, commands, host)?;
                self.discard(request.body.end);
                Ok(true)
            }
            Progress::Refused(Refusal(status, why)) => {
                self.deadline = None;
                self.style = Style::CLOSE;
                self.refuse(*status, *why, "")?;
                Ok(true)
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
    fn dispatch(
        &mut self,
        key: Key,
        request: &Request,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Goes {
        let body = request.body.clone();
        match request.target {
            Target::Unknown => self.refuse(Status::NotFound, "no such path", ""),
            Target::NoUpgrade => {
                let headers =
                    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n";
                self.refuse(
                    Status::UpgradeRequired,
                    "a WebSocket handshake, version 13, is needed",
                    headers,
                )
            }
            Target::WrongMethod(methods) => {
                let allow = text!("Allow: ", methods, "\r\n");
                let allow = core::str::from_utf8(allow.as_bytes()).unwrap_or("");
                self.refuse(Status::MethodNotAllowed, "method not allowed", allow)
            }
            Target::Upgrade(accept) => {
                let mut head = Line::new();
                http::switching(&mut head, &accept);
                self.mode = Mode::Session(Session {
                    decoder: Decoder::default(),
                    command: None,
                    pending: 0..0,
                    closing: false,
                });
                self.queue(head.as_bytes())
            }
            Target::Call(Call::Status) => self.answer(Status::Ok, br#"{"ok":true}"#, ""),
            Target::Call(Call::ExitCode) if host.workload.exit.is_some() => {
                self.tell_exit(host.workload)
            }
            Target::Call(Call::ExitCode) => {
                self.mode = Mode::ExitCode;
                Ok(())
            }
            Target::Call(Call::Signals) => self.signal(body, host),
            Target::Call(Call::Exec) => self.start_command(key, body, commands, host),
            Target::Call(Call::Session) => {
                self.refuse(Status::UpgradeRequired, "a handshake is needed", "")
            }
        }
    }

    fn signal(&mut self, body: core::ops::Range<usize>, host: &mut Host) -> Goes {
        let signal = match request::signal(self.memory.get_mut(body).unwrap_or(&mut [])) {
            Ok(signal) => signal,
            Err(why) => return self.refuse(Status::BadRequest, why, ""),
        };
        if signal == 0 {
            return self.refuse(Status::BadRequest, "signal: must be from 1 to 64", "");
        }
        let Some(group) = host.workload.group else {
            return self.refuse(Status::Conflict, "the workload is not running", "");
        };
        match crate::sys::kill_group(group, signal) {
            Ok(()) => self.answer(Status::Ok, br#"{"ok":true}"#, ""),
            Err(Errno::SRCH) => self.refuse(Status::Conflict, "the workload is not running", ""),
            Err(errno) => self.refuse(
                Status::InternalServerError,
                text!("send the signal: ", name(errno)),
                "",
            ),
        }
    }

    fn start_command(
        &mut self,
        key: Key,
        body: core::ops::Range<usize>,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Goes {
        let body = self.memory.get_mut(body).unwrap_or(&mut []);
        let exec = match Exec::read(body) {
            Ok(exec) => exec,
            Err(why) => return self.refuse(Status::BadRequest, why, ""),
        };
        if exec.command().iter().next().is_none_or(Text::is_empty) {
            return self.refuse(Status::BadRequest, "cmd: must have a command", "");
        }
        if commands.is_full() {
            return self.refuse(Status::ServiceUnavailable, "too many commands", "");
        }
        let started = Running::once(&exec, key, &mut host.context);
        match admit(commands, started, host.context.poller) {
            Ok(command) => {
                self.mode = Mode::Command(command);
                Ok(())
            }
            Err(why) => self.refuse(Status::InternalServerError, why, ""),
        }
    }

    /// The command this connection waits for has ended.
    fn command_ended(
        &mut self,
        key: Key,
        failure: Option<Line>,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Goes {
        match (&mut self.mode, failure) {
            (Mode::Command(_), Some(why)) => {
                commands.remove(key);
                self.mode = Mode::Request(Reader::default());
                self.refuse(Status::InternalServerError, why, "")
            }
            (Mode::Command(_), None) => {
                let Some(Running {
                    kind: Kind::Once(once),
                    status,
                    ..
                }) = commands.get(key)
                else {
                    return Err(Gone);
                };
                let frame = once.frame(*status);
                let length = frame
                    .iter()
                    .map(|line| line.as_bytes().len())
                    .sum::<usize>()
                    + once.escaped();
                let mut head = Line::new();
                http::response(&mut head, Status::Ok, self.style, length, "");
                self.mode = Mode::Answer(key, Answer { piece: 0, at: 0 });
                self.queue(head.as_bytes())?;
                // A short answer goes out with its head.
                self.send_answer(commands, host).map(drop)
            }
            (Mode::Session(_), Some(why)) => {
                commands.remove(key);
                self.fail_session(why)
            }
            _ => Ok(()),
        }
    }

    /// Queues the next part of a one-shot command's answer; whether to go on.
    fn send_answer(&mut self, commands: &mut Commands, host: &mut Host) -> Result<bool, Gone> {
        let Mode::Answer(key, answer) = &mut self.mode else {
            return Ok(false);
        };
        let key = *key;
        let Some(Running {
            kind: Kind::Once(once),
            status,
            ..
        }) = commands.get(key)
        else {
            return Err(Gone);
        };
        let frame = once.frame(*status);
        let (_, output) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        // Head, frame 0, standard output, frame 1, standard error, frame 2.
        while answer.piece < 5 {
            let room = output.get_mut(self.end..).unwrap_or(&mut []);
            if answer.piece % 2 == 0 {
                let text = frame.get(answer.piece / 2).map_or(&[][..], Line::as_bytes);
                let Some(room) = room.get_mut(..text.len()) else {
                    break;
                };
                room.copy_from_slice(text);
                self.end += text.len();
            } else {
                let stream = answer.piece / 2;
                let (at, written) = once.escape(stream, answer.at, room);
                answer.at = at;
                self.end += written;
                if !once.is_end(stream, at) {
                    break;
                }
                answer.at = 0;
            }
            answer.piece += 1;
        }
        if self.style.head_only {
            self.end = self.start;
        }
        if answer.piece == 5 {
            commands.remove(key);
            self.finish_answer(host.context.now);
        }
        Ok(true)
    }

    /// Answers with how the workload ended.
    fn tell_exit(&mut self, workload: &mut Workload) -> Goes {
        let Some(exit) = &workload.exit else {
            return Ok(());
        };
        let mut body = text!("{\"code\":", exit.code, ",\"oom_killed\":", exit.oom_killed);
        if let Some(why) = &exit.error {
            body.add(",\"error\":").quoted(why.as_bytes());
        }
        body.add("}");
        self.tells = !self.style.head_only;
        self.answer(Status::Ok, body.as_bytes(), "")
    }

    /// Answers with an error.
    fn refuse(&mut self, status: Status, why: impl Show, headers: &str) -> Goes {
        let mut body = Line::new();
        body.add("{\"error\":")
            .quoted(text!(why).as_bytes())
            .add("}");
        self.answer(status, body.as_bytes(), headers)
    }

    /// Queues a whole answer.
    fn answer(&mut self, status: Status, body: &[u8], headers: &str) -> Goes {
        let mut answer = Line::new();
        http::response(&mut answer, status, self.style, body.len(), headers);
        self.queue(answer.as_bytes())?;
        if !self.style.head_only {
            self.queue(body)?;
        }
        self.finish_answer(self.idle_since);
        Ok(())
    }

    /// All of an answer is queued: the next request, or the end.
    fn finish_answer(&mut self, now: u64) {
        self.idle_since = now;
        self.mode = if self.style.keep_alive {
            Mode::Request(Reader::default())
        } else {
            Mode::Closing
        };
    }

    /// Moves a session's bytes both ways; whether to go on. `output`: how many messages of output it
    /// may still send, as others wait, too.
    fn proceed_session(
        &mut self,
        key: Key,
        output: &mut u32,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Result<bool, Gone> {
        let unsent = self.start < self.end;
        let room = self.has_room();
        let Mode::Session(session) = &mut self.mode else {
            return Ok(false);
        };
        if let Some(command) = session.command {
            let Some(Running {
                kind: Kind::Session(running),
                status,
                ..
            }) = commands.get_mut(command)
            else {
                return Err(Gone);
            };
            if !session.pending.is_empty() {
                let bytes = self.memory.get(session.pending.clone()).unwrap_or(&[]);
                if let Ok(count) = running.write(bytes) {
                    session.pending.start += count;
                    return Ok(true);
                }
            }
            let ended = *status;
            if !unsent && (*output > 0 || ended.is_some()) {
                let (_, out) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
                let payload = out
                    .get_mut(websocket::HEADER_OUT..)
                    .and_then(|out| out.get_mut(..MESSAGE));
                match running.read(payload.ok_or(Gone)?, ended.is_some()) {
                    Ok(count @ 1..) => {
                        *output = output.saturating_sub(1);
                        self.frame_output(count)?;
                        return Ok(true);
                    }
                    Err(Errno::AGAIN) if ended.is_none() => {}
                    // All output, of a command that has ended.
                    _ => {
                        if let Some(status) = ended {
                            session.command = None;
                            commands.remove(command);
                            self.end_session(status)?;
                            return Ok(true);
                        }
                    }
                }
            }
            let Mode::Session(session) = &self.mode else {
                return Ok(false);
            };
            if !session.pending.is_empty() {
                return Ok(false);
            }
        }
        if !room {
            return Ok(false);
        }
        self.next_message(key, commands, host)
    }

    /// Puts a header before the output that lies at the start of the bytes to send.
    fn frame_output(&mut self, count: usize) -> Goes {
        let (_, out) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        let header = websocket::binary_header(count);
        let start = websocket::HEADER_OUT.saturating_sub(header.len());
        let room = out.get_mut(start..websocket::HEADER_OUT).ok_or(Gone)?;
        room.iter_mut()
            .zip(&header)
            .for_each(|(to, from)| *to = *from);
        self.start = start;
        self.end = websocket::HEADER_OUT + count;
        Ok(())
    }

    /// Takes a message from the received bytes, if a whole one is there; whether to go on.
    fn next_message(
        &mut self,
        key: Key,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Result<bool, Gone> {
        let Mode::Session(session) = &mut self.mode else {
            return Ok(false);
        };
        let (input, _) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        let event = session.decoder.next(input, &mut self.received);
        match event {
            Event::More => return Ok(false),
            Event::Pong => {}
            // The answer to our close frame; anything before it is late.
            Event::Close(_) | Event::Fail(_) if session.closing => return Err(Gone),
            _ if session.closing => {}
            Event::Ping(payload) => {
                self.queue(&websocket::pong_header(payload.len()))?;
                self.queue(&payload)?;
            }
            Event::Close(code) => self.close_session(commands, code)?,
            Event::Fail(code) => self.close_session(commands, Some(code as u16))?,
            Event::Text(message) if session.command.is_none() => {
                self.start_session(key, message, commands, host)?;
            }
            Event::Binary(_) if session.command.is_none() => {
                self.fail_session("the first message must be a text with the command")?;
            }
            Event::Binary(message) => session.pending = message,
            Event::Text(message) => self.control(message, commands)?,
        }
        Ok(true)
    }

    fn start_session(
        &mut self,
        key: Key,
        message: core::ops::Range<usize>,
        commands: &mut Commands,
        host: &mut Host,
    ) -> Goes {
        let exec = match Exec::read_session(self.memory.get_mut(message).unwrap_or(&mut [])) {
            Ok(exec) => exec,
            Err(why) => return self.fail_session(why),
        };
        if exec.command().iter().next().is_none_or(Text::is_empty) {
            return self.fail_session("command: must have a command");
        }
        if commands.is_full() {
            return self.fail_session("too many commands");
        }
        let started = Running::session(&exec, key, &mut host.context);
        match admit(commands, started, host.context.poller) {
            Ok(command) => {
                if let Mode::Session(session) = &mut self.mode {
                    session.command = Some(command);
                }
                Ok(())
            }
            Err(why) => self.fail_session(why),
        }
    }

    /// A text message to a running session: a new size, or the end of input.
    fn control(&mut self, message: core::ops::Range<usize>, commands: &mut Commands) -> Goes {
        let Mode::Session(session) = &mut self.mode else {
            return Ok(());
        };
        let running = session
            .command
            .and_then(|command| commands.get_mut(command));
        let Some(Running {
            kind: Kind::Session(running),
            ..
        }) = running
        else {
            return Ok(());
        };
        match Control::read(self.memory.get_mut(message).unwrap_or(&mut [])) {
            Ok(control) => {
                running.resize(control.size());
                if control.ends_stdin() {
                    running.end_input();
                }
                Ok(())
            }
            Err(_) => self.close_session(commands, Some(CloseCode::Policy as u16)),
        }
    }

    /// The client closes, or must not go on: its command is killed.
    fn close_session(&mut self, commands: &mut Commands, code: Option<u16>) -> Goes {
        if let Mode::Session(Session {
            command: Some(command),
            ..
        }) = &self.mode
        {
            abandon(commands, *command);
        }
        self.mode = Mode::Closing;
        self.queue(&websocket::close_frame(code))
    }

    /// The command has ended and its output is sent: how it ended, then the close frame.
    fn end_session(&mut self, status: WaitStatus) -> Goes {
        let mut message = Line::new();
        let mut number = |name: &str, value: Option<i32>| {
            message.add("\"").add(name).add("\":");
            match value {
                Some(value) => message.add(value),
                None => message.add("null"),
            };
            message.add(if name == "code" { "," } else { "}}" });
        };
        number("code", status.exit_status());
        number("signal", status.terminating_signal());
        let message = text!("{\"Exit\":{", message);
        self.finish_session(message, CloseCode::Normal)
    }

    /// The command cannot be started.
    fn fail_session(&mut self, why: impl Show) -> Goes {
        let mut message = text!("{\"Error\":{\"message\":");
        message.quoted(text!(why).as_bytes()).add("}}");
        self.finish_session(message, CloseCode::Internal)
    }

    fn finish_session(&mut self, message: Line, code: CloseCode) -> Goes {
        if let Mode::Session(session) = &mut self.mode {
            session.closing = true;
            session.command = None;
            session.pending = 0..0;
        }
        self.queue(&websocket::text_header(message.as_bytes().len()))?;
        self.queue(message.as_bytes())?;
        self.queue(&websocket::close_frame(Some(code as u16)))
    }

    /// Adds bytes to those that are to be sent.
    fn queue(&mut self, bytes: &[u8]) -> Goes {
        let (_, output) = self.memory.split_at_mut_checked(IN).ok_or(Gone)?;
        let room = output
            .get_mut(self.end..)
            .and_then(|room| room.get_mut(..bytes.len()));
        room.ok_or(Gone)?.copy_from_slice(bytes);
        self.end += bytes.len();
        Ok(())
    }

    /// Sends what the socket takes.
    fn flush(&mut self, workload: &mut Workload) -> Goes {
        self.frugal &= self.end <= LITTLE;
        let (_, output) = self.memory.split_at_checked(IN).ok_or(Gone)?;
        while self.start < self.end {
            let bytes = output.get(self.start..self.end).ok_or(Gone)?;
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.start += count;
                    self.deadline = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Gone),
            }
        }
        self.start = 0;
        self.end = 0;
        if self.tells {
            self.tells = false;
            workload.told = true;
        }
        Ok(())
    }

    /// Time is up for whatever was waited for.
    fn expire(&mut self) -> Goes {
        self.deadline = None;
        match &self.mode {
            Mode::Request(reader) if reader.started() && self.start == self.end => {
                self.style = Style::CLOSE;
                self.refuse(Status::RequestTimeout, "the request took too long", "")
            }
            _ => Err(Gone),
        }
    }

    /// Registers for what is waited for.
    fn watch(&mut self, key: Key, commands: &mut Commands, context: &Context) {
        let poller = context.poller;
        let mut wanted = EventFlags::RDHUP;
        if self.wants_input() {
            wanted |= EventFlags::IN;
        }
        let unsent = self.start < self.end;
        if unsent {
            wanted |= EventFlags::OUT;
        }
        // A session that goes on may leave its output unread: that stops its command.
        let waits = match &self.mode {
            Mode::Session(session) => session.closing,
            _ => unsent,
        };
        if waits {
            let until = context.now.saturating_add(READ_TIME);
            self.deadline = self.deadline.or(Some(until));
        }
        self.watched = poller.watch(&self.socket, Source::Connection(key), self.watched, wanted);
        if let Mode::Session(session) = &self.mode
            && let Some(command) = session.command
            && let Some(Running {
                kind: Kind::Session(running),
                ..
            }) = commands.get_mut(command)
        {
            running.watch(command, !unsent, !session.pending.is_empty(), poller);
        }
    }
}
