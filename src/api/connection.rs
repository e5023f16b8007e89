//! A connection: a state machine whose states hold the data that is valid in them.

use super::commands::Commands;
#[cfg(feature = "snapshot")]
use super::error::not_running;
use super::error::{CallError, error_body, refuse_while_held};
use super::exec::Exec;
use super::io::{Io, LAST_BYTES_TIMEOUT, MAX_BODY, OK};
#[cfg(feature = "logs")]
use super::logs::{self, LogReader, LogsRequest};
#[cfg(feature = "snapshot")]
use super::routes::SnapshotCall;
use super::routes::{Call, RouteError, route};
use super::session::{ExitStatus, Progress};
#[cfg(feature = "tunnel")]
use super::tunnel::Tunnel;
use super::{signals, stop};
use crate::context::{Context, EventSource, NEVER};
use crate::error;
use crate::error::Error;
#[cfg(feature = "snapshot")]
use crate::sys;
use crate::sys::Region;
use core::fmt::Display;
use core::mem;
use core::ops::Range;
#[cfg(feature = "sessions")]
use proto::bytes::SliceWriter;
#[cfg(feature = "files")]
use proto::http::Framing;
use proto::http::{
    self, BodyDecoder, Content, Head, HeadParser, JSON, Reply, RequestError, Status, Target,
};
use proto::json::Quoted;
use proto::message;
use proto::message::ToLossy;
use proto::slab::Key;
use proto::websocket::{CloseCode, CloseFrame, Decoder, Event, FrameHeader, Opcode};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
#[cfg(feature = "tunnel")]
use rustix::io::Errno;
use rustix::net::Shutdown;

/// Time limit for a request's head, in milliseconds, from its first byte.
const HEAD_TIMEOUT: u64 = 10_000;
/// Time limit for a request's body, in milliseconds, from the end of its head.
const BODY_TIMEOUT: u64 = 30_000;
/// Time limit for a WebSocket's first message, in milliseconds.
const COMMAND_TIMEOUT: u64 = 10_000;
/// How long a client may read nothing while data is queued for it, or leave a close frame unanswered, in
/// milliseconds.
const SEND_TIMEOUT: u64 = 30_000;
/// Time limit for a tunnel's TCP connection, in milliseconds.
#[cfg(feature = "tunnel")]
const CONNECT_TIMEOUT: u64 = 10_000;
/// Maximum number of connections without a time limit.
pub const LONG_CONNECTIONS: usize = 256;
/// Maximum number of waiting snapshot calls; they run one after the other.
#[cfg(feature = "snapshot")]
const SNAPSHOT_CALLS: usize = 8;
/// How long a client may take to send a request or to read a response before a new connection may replace
/// it, in milliseconds.
const SLOW_CLIENT: u64 = 1000;

/// State that the connections share.
pub struct Shared<'a> {
    /// Their commands.
    pub commands: &'a mut Commands,
    /// What all modules share.
    pub context: &'a mut Context,
}

/// A connection of the API.
pub struct Connection {
    io: Io,
    state: State,
    /// The connection's own key.
    key: Key,
    watched: EventFlags,
    /// When the connection times out.
    pub deadline: u64,
    /// When it last did something, to find the connection that has been idle longest.
    idle_since: u64,
    /// The response being sent has the workload's exit code.
    carries_exit_code: bool,
}

/// The state of a connection.
enum State {
    /// Reading a request's head.
    Head(HeadParser),
    /// Reading a request's body.
    Body(Request),
    /// Waiting for the workload's exit.
    ExitCode,
    /// Waiting for a command to exit, or sending its response.
    Exec(Key),
    /// A WebSocket.
    WebSocket(Decoder, Stage),
    /// Sending the workload's output.
    #[cfg(feature = "logs")]
    Logs(LogReader),
    /// Handed over to a child, which responds.
    #[cfg(feature = "files")]
    Transfer(Key),
    /// Forwarding bytes between the client and a TCP port.
    #[cfg(feature = "tunnel")]
    Tunnel(Tunnel),
    /// Waiting for the response to a snapshot call.
    #[cfg(feature = "snapshot")]
    Snapshot(PendingCall),
    /// Sending the last response.
    LastResponse,
    /// Sending a WebSocket's last bytes. Its client waits until this end closes (RFC 6455 section 7.1.1).
    Closing,
    /// Sending the last bytes, and discarding what the client sends until it has closed, or until this time
    /// in milliseconds: otherwise a reset could keep it from reading the response (RFC 9112 section 9.6).
    Draining(u64),
    /// Closed.
    Closed,
}

/// The state of a WebSocket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waiting for the message with the command.
    AwaitingCommand,
    /// Its command runs.
    Session(Key),
    /// Waiting for the client's close frame.
    CloseSent,
}

/// A request whose body is being read. Its head and decoded content are at the start of the received bytes.
struct Request {
    call: Result<Call, RouteError>,
    /// Bytes of the head.
    head: usize,
    /// Bytes of decoded content after it so far.
    length: usize,
    body: BodyDecoder,
}

/// A snapshot call. Its body is at the start of the received bytes.
#[cfg(feature = "snapshot")]
#[derive(Clone, Copy)]
pub struct PendingCall {
    /// Which one.
    pub call: SnapshotCall,
    /// When it arrived, in microseconds of the monotonic clock.
    pub received_us: u64,
    length: usize,
}

/// Whether there may be more to do, or the connection has to wait.
#[derive(PartialEq, Eq)]
enum Step {
    Again,
    Wait,
}

impl State {
    fn is_websocket(&self) -> bool {
        matches!(self, Self::WebSocket(..))
    }

    /// Whether it has no time limit.
    fn is_long(&self) -> bool {
        self.is_websocket()
            || self.reads_log()
            || self.is_tunnel()
            || matches!(self, Self::ExitCode)
    }

    /// Whether it reads the log.
    fn reads_log(&self) -> bool {
        #[cfg(feature = "logs")]
        if let Self::Logs(_) = self {
            return true;
        }
        false
    }

    fn command(&self) -> Option<Key> {
        match self {
            Self::Exec(key) | Self::WebSocket(_, Stage::Session(key)) => Some(*key),
            #[cfg(feature = "files")]
            Self::Transfer(key) => Some(*key),
            _ => None,
        }
    }

    /// Whether the client's bytes are forwarded.
    fn is_tunnel(&self) -> bool {
        #[cfg(feature = "tunnel")]
        if let Self::Tunnel(_) = self {
            return true;
        }
        false
    }

    /// Whether a snapshot call waits for its response. Its body is then still needed, at the start of the
    /// received bytes.
    fn is_snapshot_call(&self) -> bool {
        #[cfg(feature = "snapshot")]
        if let Self::Snapshot(_) = self {
            return true;
        }
        false
    }

    /// Whether a child handles the connection.
    fn is_transfer(&self) -> bool {
        #[cfg(feature = "files")]
        if let Self::Transfer(_) = self {
            return true;
        }
        false
    }
}

impl Connection {
    /// A new connection.
    pub fn new(socket: OwnedFd, memory: Region, now: u64) -> Self {
        Self {
            io: Io::new(socket, memory),
            state: State::Head(HeadParser::default()),
            key: Key::default(),
            watched: EventFlags::empty(),
            deadline: NEVER,
            idle_since: now,
            carries_exit_code: false,
        }
    }

    /// Sets the connection's own key.
    pub fn set_key(&mut self, key: Key) {
        self.key = key;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// Since when the connection has been waiting for its client, if a new connection may replace it: it
    /// is idle, or its client has taken longer than [`SLOW_CLIENT`] to send a request or to read a
    /// response. Otherwise [`NEVER`].
    pub fn replaceable_since(&self, now: u64) -> u64 {
        let (deadline, timeout) = match &self.state {
            State::Draining(until) => (*until, LAST_BYTES_TIMEOUT),
            State::Head(_) | State::LastResponse | State::Closing if !self.io.is_sent() => {
                (self.deadline, SEND_TIMEOUT)
            }
            State::Head(parser) if !parser.started() => return self.idle_since,
            State::Head(_) => (self.deadline, HEAD_TIMEOUT),
            State::Body(_) => (self.deadline, BODY_TIMEOUT),
            _ => return NEVER,
        };
        match deadline.saturating_sub(timeout) {
            since if since.saturating_add(SLOW_CLIENT) <= now => since,
            _ => NEVER,
        }
    }

    /// Whether it waits for the workload's exit.
    pub fn waits_for_exit(&self) -> bool {
        matches!(self.state, State::ExitCode)
    }

    /// Whether it reads the log.
    pub fn reads_log(&self) -> bool {
        self.state.reads_log()
    }

    /// The position from which it still needs the log, if it reads the log.
    pub fn needs_log(&self) -> Option<u64> {
        #[cfg(feature = "logs")]
        if let State::Logs(reader) = &self.state {
            return Some(reader.needs());
        }
        None
    }

    /// Whether it waits until its client reads output.
    fn sends_log(&self) -> bool {
        #[cfg(feature = "logs")]
        if let State::Logs(_) = self.state {
            return self.deadline != NEVER;
        }
        false
    }

    /// Whether more of a command's response, or of a session's output, can be sent.
    fn has_output(&self, commands: &mut Commands) -> bool {
        match self.state {
            State::Exec(key) => commands
                .exec(key)
                .is_some_and(|(exec, _)| exec.is_finished()),
            State::WebSocket(_, Stage::Session(key)) => commands
                .session(key, self.key)
                .is_some_and(|session| session.has_unsent_history()),
            _ => false,
        }
    }

    /// Its memory, if another connection can use it.
    pub fn into_reusable_memory(self) -> Option<Region> {
        self.io.into_reusable_memory()
    }

    /// Closes it: the VM shuts down, a snapshot is taken, or a new connection replaces it.
    pub fn close(&mut self, shared: &mut Shared) {
        if self.state.is_websocket() && !matches!(self.state, State::WebSocket(_, Stage::CloseSent))
        {
            let reason = match shared.context.is_held() {
                true => "a snapshot is taken",
                false => "the VM shuts down",
            };
            let frame = CloseFrame::new(CloseCode::GoingAway, reason);
            self.io.queue(frame.as_bytes());
            self.io.send();
        }
        self.enter(State::Closed, shared);
    }

    /// Enters another state, and detaches from the command of the old one.
    fn enter(&mut self, state: State, shared: &mut Shared) {
        let context = &mut *shared.context;
        context.long_connections += usize::from(state.is_long());
        context.long_connections -= usize::from(self.state.is_long());
        context.log_readers += usize::from(state.reads_log());
        context.log_readers -= usize::from(self.state.reads_log());
        #[cfg(feature = "snapshot")]
        {
            context.snapshot.pending_calls += usize::from(state.is_snapshot_call());
            context.snapshot.pending_calls -= usize::from(self.state.is_snapshot_call());
        }
        if self.state.is_transfer() || matches!(state, State::Closed) && !self.io.broken {
            // A child may have a copy of it: the one that serves it must exit, and one that is frozen before
            // it has started must not keep it open.
            let _ended = rustix::net::shutdown(self.io.socket(), Shutdown::Both);
        }
        if let Some(key) = self.state.command() {
            shared.commands.disconnect(key, self.key, context);
        }
        self.deadline = match state {
            State::Body(_) => context.now + BODY_TIMEOUT,
            State::WebSocket(_, Stage::AwaitingCommand) => context.now + COMMAND_TIMEOUT,
            State::WebSocket(_, Stage::CloseSent) => context.now + SEND_TIMEOUT,
            #[cfg(feature = "tunnel")]
            State::Tunnel(_) => context.now + CONNECT_TIMEOUT,
            _ => NEVER,
        };
        self.state = state;
    }

    /// The state after a response: the next request, or closing.
    fn next_state(&self) -> State {
        match self.io.reply.keep_alive {
            true => State::Head(HeadParser::default()),
            false => State::LastResponse,
        }
    }

    /// Continues after a response was queued.
    fn finish(&mut self, shared: &mut Shared) {
        self.enter(self.next_state(), shared);
    }

    /// Responds with an error.
    fn fail(&mut self, error: &CallError, shared: &mut Shared) {
        self.io.respond_error(error);
        self.finish(shared);
    }

    /// Responds with an error, and closes once the client stops sending.
    fn fail_and_close(&mut self, error: &CallError, shared: &mut Shared) {
        self.io.reply.keep_alive = false;
        self.io.respond_error(error);
        self.drain(shared);
    }

    /// Enters [`State::Draining`], after the last bytes were queued.
    fn drain(&mut self, shared: &mut Shared) {
        let until = shared.context.now + LAST_BYTES_TIMEOUT;
        self.enter(State::Draining(until), shared);
    }

    /// Handles events of the socket.
    pub fn on_socket(&mut self, events: EventFlags, shared: &mut Shared) {
        #[cfg(feature = "tunnel")]
        if let State::Tunnel(tunnel) = &mut self.state {
            let before = tunnel.timeout(&self.io);
            tunnel.receive(events, &mut self.io);
            if tunnel.is_connected() && tunnel.timeout(&self.io) != before {
                self.restart_tunnel_timeout(shared.context.now);
            }
            return self.proceed(shared);
        }
        if events.contains(EventFlags::IN) && self.wants_input(shared.commands) {
            self.io.receive();
        } else if events.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
            self.io.broken = true;
        }
        self.proceed(shared);
    }

    /// Whether to read from the client now; otherwise the kernel buffers its bytes.
    fn wants_input(&self, commands: &mut Commands) -> bool {
        self.io.has_room()
            && match self.state {
                State::LastResponse | State::Closing | State::Closed => false,
                _ if self.state.is_transfer() || self.state.is_tunnel() => false,
                _ if self.state.is_snapshot_call() => false,
                // Pipelined requests stay in the kernel, except for their first bytes.
                State::Exec(_) | State::ExitCode => !self.io.has_received(),
                State::WebSocket(_, Stage::Session(key)) => commands
                    .session(key, self.key)
                    .is_some_and(|session| session.takes_messages()),
                _ => true,
            }
    }

    /// Makes as much progress as is possible now.
    pub fn proceed(&mut self, shared: &mut Shared) {
        // How many pieces of output may be sent in this turn, so that other connections get theirs.
        let mut budget = 1;
        while !self.is_closed() {
            self.send(shared.context);
            #[cfg(feature = "tunnel")]
            if self.io.broken
                && let State::Tunnel(tunnel) = &mut self.state
            {
                tunnel.on_client_gone(&mut self.io);
            }
            if self.io.broken {
                return self.enter(State::Closed, shared);
            }
            // The client must read first, but a session or a tunnel can still receive.
            if !self.io.is_sent() && !self.state.is_websocket() && !self.state.is_tunnel() {
                return;
            }
            if self.step(&mut budget, shared) == Step::Wait {
                return;
            }
        }
    }

    fn step(&mut self, budget: &mut u32, shared: &mut Shared) -> Step {
        match &mut self.state {
            State::Head(_) => self.read_head(shared),
            State::Body(_) => self.read_body(shared),
            State::ExitCode => self.respond_exit_code(shared),
            State::Exec(key) => {
                let key = *key;
                self.respond_exec(key, budget, shared)
            }
            State::WebSocket(_, Stage::Session(key)) => {
                let key = *key;
                self.proceed_session(key, budget, shared)
            }
            State::WebSocket(..) => self.take_message(shared),
            #[cfg(feature = "logs")]
            State::Logs(_) => self.send_log(shared),
            #[cfg(feature = "files")]
            State::Transfer(key) => {
                let key = *key;
                if shared.commands.is_transfer_done(key) {
                    self.enter(State::Closed, shared);
                }
                Step::Wait
            }
            #[cfg(feature = "tunnel")]
            State::Tunnel(_) => self.proceed_tunnel(budget, shared),
            State::Draining(until) => {
                self.deadline = *until;
                self.io.discard_received();
                Step::Wait
            }
            #[cfg(feature = "snapshot")]
            State::Snapshot(_) => Step::Wait,
            State::LastResponse if self.io.may_be_unread() => {
                let _gone = rustix::net::shutdown(self.io.socket(), Shutdown::Write);
                self.drain(shared);
                Step::Again
            }
            State::LastResponse | State::Closing | State::Closed => {
                self.enter(State::Closed, shared);
                Step::Wait
            }
        }
    }

    /// Sends what the socket accepts.
    fn send(&mut self, context: &mut Context) {
        if self.io.is_sent() {
            return;
        }
        let waits_for_client = match self.state {
            State::WebSocket(_, Stage::Session(_)) => false,
            State::Body(_) | State::WebSocket(..) => true,
            _ => self.state.is_tunnel(),
        };
        if self.io.send() && !waits_for_client {
            self.deadline = NEVER;
        }
        if self.io.is_sent() && mem::take(&mut self.carries_exit_code) {
            context.workload.exit_code_delivered = true;
        }
    }

    /// Parses a request's head from the received bytes, and decides what has to be decided before its body
    /// is read.
    fn read_head(&mut self, shared: &mut Shared) -> Step {
        let State::Head(parser) = &mut self.state else {
            return Step::Wait;
        };
        let head = match parser.parse(self.io.received()) {
            Ok(Some(head)) => head,
            Ok(None) => {
                if !parser.started() {
                    self.deadline = NEVER;
                } else if self.deadline == NEVER {
                    self.deadline = shared.context.now + HEAD_TIMEOUT;
                }
                return Step::Wait;
            }
            Err(error) => return self.refuse(error, shared),
        };
        let (length, reply) = (head.length, head.reply);
        let call = match head.target {
            Target::Resource { path, .. } => route(head.method, path),
            #[cfg(feature = "tunnel")]
            Target::Authority { host, port } => {
                let tunnel = open_tunnel(host, port, shared.context);
                self.io.reply = reply;
                self.io.discard(0..length);
                match tunnel {
                    Ok(tunnel) => self.enter(State::Tunnel(tunnel), shared),
                    // The client may have sent tunnel data already, which must not be parsed.
                    Err(error) => self.fail_and_close(&error, shared),
                }
                return Step::Again;
            }
            #[cfg(not(feature = "tunnel"))]
            Target::Authority { .. } => return self.refuse(RequestError::RequestTarget, shared),
        };
        #[cfg(feature = "files")]
        if call == Ok(Call::Files) {
            let has_body = head.framing != Framing::None;
            self.io.reply = reply;
            return self.start_transfer(length, has_body, shared);
        }
        let expects_continue = head.expects_continue;
        let request = Request {
            call,
            head: length,
            length: 0,
            body: match BodyDecoder::new(head.framing, MAX_BODY as u64) {
                Ok(body) => body,
                Err(error) => return self.refuse(error, shared),
            },
        };
        self.io.reply = reply;
        if expects_continue && call.is_err() {
            // Respond at once; the client may send the body or not.
            self.io.reply.keep_alive = false;
        } else if !request.body.is_complete() {
            if expects_continue && self.io.received().len() == length {
                self.io.queue(http::CONTINUE);
            }
            self.enter(State::Body(request), shared);
            return Step::Again;
        }
        self.dispatch(&request, shared);
        if !request.body.is_complete() {
            self.drain(shared);
        }
        Step::Again
    }

    /// Hands the connection to a child, which parses the request again.
    #[cfg(feature = "files")]
    fn start_transfer(&mut self, head: usize, has_body: bool, shared: &mut Shared) -> Step {
        let context = &mut *shared.context;
        match shared
            .commands
            .start_transfer(&mut self.io, head, self.key, context)
        {
            Ok(key) => self.enter(State::Transfer(key), shared),
            Err(error) if has_body => self.fail_and_close(&error, shared),
            Err(error) => {
                self.io.reply.keep_alive = false;
                self.fail(&error, shared);
            }
        }
        Step::Again
    }

    /// Decodes a request's body from the received bytes, and dispatches the request once it is complete.
    fn read_body(&mut self, shared: &mut Shared) -> Step {
        let State::Body(request) = &mut self.state else {
            return Step::Wait;
        };
        let start = request.head + request.length;
        let undecoded = self.io.received().get_mut(start..).unwrap_or(&mut []);
        let decoded = match request.body.decode(undecoded) {
            Ok(decoded) => decoded,
            Err(error) => return self.refuse(error, shared),
        };
        request.length += decoded.content;
        self.io
            .discard(start + decoded.content..start + decoded.consumed);
        if !request.body.is_complete() {
            return Step::Wait;
        }
        if let State::Body(request) = mem::replace(&mut self.state, State::Closing) {
            self.dispatch(&request, shared);
        }
        Step::Again
    }

    /// Responds to a malformed request, and closes.
    fn refuse(&mut self, error: RequestError, shared: &mut Shared) -> Step {
        let error = CallError::new(error.status(), error!("{}", error.message()));
        self.io.reply = Reply::CLOSE;
        self.fail_and_close(&error, shared);
        Step::Again
    }

    /// Handles a complete request: queues its response, or starts what the response needs.
    fn dispatch(&mut self, request: &Request, shared: &mut Shared) {
        let called = match request.call {
            Ok(call) => self.call(call, request, shared),
            Err(RouteError::NotFound) => {
                Err(CallError::new(Status::NotFound, error!("no such path")))
            }
            Err(RouteError::MethodNotAllowed(allow)) => {
                let body = error_body(&"method not allowed");
                let content = Content::Length(body.as_bytes().len() as u64);
                let more = Some(("Allow", &allow as &dyn Display));
                self.io
                    .queue_head_with(Status::MethodNotAllowed, content, JSON, more);
                self.io.queue_body(body.as_bytes());
                Ok(self.next_state())
            }
        };
        let next = called.unwrap_or_else(|error| {
            self.io.respond_error(&error);
            self.next_state()
        });
        // A call that waits keeps its body.
        let kept = if next.is_snapshot_call() {
            request.length
        } else {
            0
        };
        self.io.discard(0..request.head + request.length - kept);
        self.enter(next, shared);
    }

    /// Handles a call. Returns the next state.
    fn call(
        &mut self,
        call: Call,
        request: &Request,
        shared: &mut Shared,
    ) -> Result<State, CallError> {
        let Shared { commands, context } = shared;
        let (head, body) = self
            .io
            .part(0..request.head + request.length)
            .split_at_mut_checked(request.head)
            .unwrap_or_default();
        match call {
            Call::Status => {}
            // Handled by a child, before its body is read.
            #[cfg(feature = "files")]
            Call::Files => {}
            Call::Signals => signals::send(body, context)?,
            Call::Stop => stop::stop(body, context)?,
            Call::ExitCode => {
                if context.workload.exit.is_none() {
                    check_long_connections(context)?;
                }
                return Ok(State::ExitCode);
            }
            #[cfg(feature = "sessions")]
            Call::ListSessions => {
                let mut list = SliceWriter::new(context.temp);
                let _fits = commands.list_sessions(&mut list);
                self.io.respond(Status::Ok, list.as_bytes());
                return Ok(self.next_state());
            }
            #[cfg(feature = "sessions")]
            Call::EndSession => {
                if let Target::Resource { path, .. } = target(head) {
                    let id = path.strip_prefix("/v1/sessions/").unwrap_or("");
                    commands.end_session(id, context.now)?;
                }
            }
            #[cfg(feature = "logs")]
            Call::Logs => {
                check_long_connections(context)?;
                let logs = LogsRequest::parse(&target(head))?;
                let reader = LogReader::start(logs, &mut self.io, context)?;
                return Ok(State::Logs(reader));
            }
            #[cfg(feature = "snapshot")]
            Call::Snapshot(call) => {
                check_snapshot_calls(context)?;
                return Ok(State::Snapshot(PendingCall {
                    call,
                    received_us: sys::microseconds(),
                    length: request.length,
                }));
            }
            Call::WebSocketExec => {
                let Some(key) = parse_again(head).and_then(|head| head.websocket) else {
                    let error = error!("a WebSocket handshake, version 13, is needed");
                    return Err(CallError::new(Status::UpgradeRequired, error));
                };
                check_long_connections(context)?;
                refuse_while_held(context)?;
                let accept = http::websocket_accept(key);
                let accept = Some(("Sec-WebSocket-Accept", &accept.lossy() as &dyn Display));
                self.io.reply = Reply::OPEN;
                let status = Status::SwitchingProtocols;
                self.io.queue_head_with(status, Content::None, JSON, accept);
                return Ok(State::WebSocket(Decoder::default(), Stage::AwaitingCommand));
            }
            #[cfg(feature = "mounts")]
            Call::Unmount if !body.is_empty() => {
                return Err(CallError::bad_request(error!("this call takes no body")));
            }
            call => {
                commands.check_room(context)?;
                let exec = match call {
                    #[cfg(feature = "sysinfo")]
                    Call::Sysinfo => Exec::start_sysinfo(context),
                    #[cfg(feature = "mounts")]
                    Call::Mount => Exec::start_mount(body, context),
                    #[cfg(feature = "mounts")]
                    Call::Unmount => Exec::start_unmount(&target(head), context),
                    _command => Exec::start(body, context),
                };
                let key = commands.insert_exec(exec?, self.key)?;
                return Ok(State::Exec(key));
            }
        }
        self.io.respond(Status::Ok, OK);
        Ok(self.next_state())
    }

    /// The snapshot call that it waits for.
    #[cfg(feature = "snapshot")]
    pub fn pending_call(&self) -> Option<PendingCall> {
        match self.state {
            State::Snapshot(pending) => Some(pending),
            _ => None,
        }
    }

    /// That call's body.
    #[cfg(feature = "snapshot")]
    pub fn body(&mut self) -> &mut [u8] {
        match self.state {
            State::Snapshot(PendingCall { length, .. }) => self.io.part(0..length),
            _ => &mut [],
        }
    }

    /// Responds to that call.
    #[cfg(feature = "snapshot")]
    pub fn respond_to_call(&mut self, status: Status, body: &dyn Display, shared: &mut Shared) {
        if let State::Snapshot(PendingCall { length, .. }) = self.state {
            self.io.discard(0..length);
            self.io.respond_with_text(status, body);
            self.finish(shared);
            self.proceed(shared);
        }
    }

    /// Responds with the workload's exit code, once it has exited.
    fn respond_exit_code(&mut self, shared: &mut Shared) -> Step {
        let Some(exit) = &shared.context.workload.exit else {
            return Step::Wait;
        };
        self.carries_exit_code = !self.io.reply.head_only;
        self.io.respond_with_text(Status::Ok, exit);
        self.finish(shared);
        Step::Again
    }

    /// Responds with a command's output, once it has exited.
    fn respond_exec(&mut self, key: Key, budget: &mut u32, shared: &mut Shared) -> Step {
        let Some((exec, left)) = shared.commands.exec(key) else {
            self.io.broken = true;
            return Step::Again;
        };
        if !exec.is_finished() || *budget == 0 {
            return Step::Wait;
        }
        *budget -= 1;
        if let Some(error) = exec.failure(left) {
            self.fail(&error, shared);
        } else if exec.queue_response(&mut self.io) {
            self.finish(shared);
        }
        // Send what is queued first.
        Step::Again
    }

    /// Sends output of the workload. A client that reads none for too long is disconnected.
    #[cfg(feature = "logs")]
    fn send_log(&mut self, shared: &mut Shared) -> Step {
        let State::Logs(reader) = &mut self.state else {
            return Step::Wait;
        };
        let before = reader.position();
        let progress = reader.proceed(&mut self.io, shared.context);
        let moved = reader.position() != before;
        match progress {
            logs::Progress::Blocked if self.deadline == NEVER || moved => {
                self.deadline = shared.context.now + SEND_TIMEOUT;
            }
            logs::Progress::Blocked => {}
            logs::Progress::Idle => self.deadline = NEVER,
            logs::Progress::Done => {
                self.finish(shared);
                return Step::Again;
            }
        }
        Step::Wait
    }

    /// Moves a session's data in both directions.
    fn proceed_session(&mut self, key: Key, budget: &mut u32, shared: &mut Shared) -> Step {
        let Some(session) = shared.commands.session(key, self.key) else {
            let reason = "the session was taken or ended";
            self.close_session(CloseCode::GoingAway, reason, shared);
            return Step::Again;
        };
        match session.proceed(budget, &mut self.io) {
            Progress::Blocked => return Step::Wait,
            Progress::Progressed => {}
            Progress::ReadyForMessage => return self.take_message(shared),
            Progress::Exited(status) => match session.process.failure() {
                Some(error) => self.fail_session(&error, shared),
                None => {
                    let message = format_args!("{{\"Exit\":{}}}", ExitStatus(status));
                    self.end_session(&message, CloseCode::Normal, "", shared);
                }
            },
        }
        Step::Again
    }

    /// Connects a tunnel, or moves its data in both directions.
    #[cfg(feature = "tunnel")]
    fn proceed_tunnel(&mut self, budget: &mut u32, shared: &mut Shared) -> Step {
        let State::Tunnel(tunnel) = &mut self.state else {
            return Step::Wait;
        };
        if !tunnel.is_connected() {
            match tunnel.connect(&mut self.io) {
                Ok(true) => self.deadline = NEVER,
                Ok(false) => return Step::Wait,
                Err(error) => self.fail_and_close(&error, shared),
            }
            return Step::Again;
        }
        // Checked first, as a tunnel whose client has disconnected makes no progress.
        if tunnel.is_closed() {
            self.enter(State::Closed, shared);
        } else if !tunnel.proceed(&mut self.io, budget) {
            return Step::Wait;
        }
        self.restart_tunnel_timeout(shared.context.now);
        Step::Again
    }

    /// Restarts a tunnel's idle timeout.
    #[cfg(feature = "tunnel")]
    fn restart_tunnel_timeout(&mut self, now: u64) {
        if let State::Tunnel(tunnel) = &self.state {
            let timeout = tunnel.timeout(&self.io);
            self.deadline = timeout.map_or(NEVER, |timeout| now + timeout);
        }
    }

    /// Takes a WebSocket message from the received bytes, if there is a complete one and room for a reply.
    fn take_message(&mut self, shared: &mut Shared) -> Step {
        if !self.io.has_reserve() {
            return Step::Wait;
        }
        let State::WebSocket(decoder, stage) = &mut self.state else {
            return Step::Wait;
        };
        let (input, received) = self.io.input();
        let event = decoder.next(input, received);
        match (event, *stage) {
            (Event::Incomplete, _) => return Step::Wait,
            // The reply to our close frame; other frames before it are ignored.
            (Event::Close(_), Stage::CloseSent) => self.enter(State::Closed, shared),
            (Event::Error(_), Stage::CloseSent) => self.drain(shared),
            (_, Stage::CloseSent) | (Event::Pong, _) => {}
            (Event::Ping(payload), _) => {
                let header = FrameHeader::new(Opcode::Pong, payload.len());
                self.io.queue(header.as_bytes());
                self.io.queue_received(payload);
            }
            (Event::Close(code), _) => {
                self.io.queue(CloseFrame::echo(code).as_bytes());
                self.enter(State::Closing, shared);
            }
            (Event::Error(error), _) => {
                let frame = CloseFrame::new(error.close_code(), error.message());
                self.io.queue(frame.as_bytes());
                self.drain(shared);
            }
            (Event::Text(payload), Stage::AwaitingCommand) => {
                self.start_session(payload, shared);
            }
            (Event::Binary(_), Stage::AwaitingCommand) => {
                let reason = error!("the first message must be a text with the command");
                self.fail_session(&reason, shared);
            }
            (Event::Binary(payload), Stage::Session(key)) => {
                if let Some(session) = shared.commands.session(key, self.key) {
                    session.take_input(payload);
                }
            }
            (Event::Text(payload), Stage::Session(key)) => {
                self.take_control(payload, key, shared);
            }
        }
        Step::Again
    }

    /// Starts the command of a session.
    fn start_session(&mut self, message: Range<usize>, shared: &mut Shared) {
        let message = self.io.part(message);
        let context = &mut *shared.context;
        match shared.commands.start_session(message, self.key, context) {
            Ok(key) => self.enter_stage(Stage::Session(key), shared),
            Err(error) => self.fail_session(&error.error, shared),
        }
    }

    /// Handles a control message: a new terminal size, or the end of input.
    fn take_control(&mut self, message: Range<usize>, key: Key, shared: &mut Shared) {
        let message = self.io.part(message);
        if let Some(session) = shared.commands.session(key, self.key)
            && let Err(error) = session.take_control(message, shared.context)
        {
            self.close_session(CloseCode::PolicyViolation, error.as_str(), shared);
        }
    }

    /// Sends a close frame and ends a session.
    fn close_session(&mut self, code: CloseCode, reason: &str, shared: &mut Shared) {
        self.io.queue(CloseFrame::new(code, reason).as_bytes());
        self.enter_stage(Stage::CloseSent, shared);
    }

    /// Ends a session whose command cannot be started.
    fn fail_session(&mut self, error: &Error, shared: &mut Shared) {
        let reason = message!("{error}");
        let message = format_args!("{{\"Error\":{{\"message\":{}}}}}", Quoted(error));
        self.end_session(&message, CloseCode::InternalError, reason.as_str(), shared);
    }

    /// Sends the last message of a session and a close frame.
    fn end_session(
        &mut self,
        message: &dyn Display,
        code: CloseCode,
        reason: &str,
        shared: &mut Shared,
    ) {
        let message = message!("{message}");
        let header = FrameHeader::new(Opcode::Text, message.as_bytes().len());
        self.io.queue(header.as_bytes());
        self.io.queue(message.as_bytes());
        self.io.queue(CloseFrame::new(code, reason).as_bytes());
        self.enter_stage(Stage::CloseSent, shared);
    }

    /// Enters the next stage of a WebSocket.
    fn enter_stage(&mut self, stage: Stage, shared: &mut Shared) {
        if let State::WebSocket(decoder, _) = &mut self.state {
            let decoder = mem::take(decoder);
            self.enter(State::WebSocket(decoder, stage), shared);
        }
    }

    /// Handles a timeout.
    pub fn expire(&mut self, shared: &mut Shared) {
        match &self.state {
            State::Head(_) | State::Body(_) if self.io.is_sent() => {
                let error = error!("the request took too long");
                let error = CallError::new(Status::RequestTimeout, error);
                self.io.reply = Reply::CLOSE;
                self.fail_and_close(&error, shared);
            }
            State::WebSocket(_, Stage::AwaitingCommand) if self.io.is_sent() => {
                let reason = "no command came within 10 s";
                self.close_session(CloseCode::PolicyViolation, reason, shared);
            }
            #[cfg(feature = "tunnel")]
            State::Tunnel(tunnel) if !tunnel.is_connected() => {
                let error = tunnel.failure(Errno::TIMEDOUT);
                self.fail_and_close(&error, shared);
            }
            _ => self.enter(State::Closed, shared),
        }
        self.proceed(shared);
    }

    /// Registers the events that it waits for.
    pub fn watch(&mut self, shared: &mut Shared) {
        let context = &mut *shared.context;
        self.idle_since = context.now;
        let sent = self.io.is_sent();
        // A child notices itself when its client disconnects.
        let mut wanted = match self.state.is_transfer() {
            true => EventFlags::empty(),
            false => EventFlags::RDHUP,
        };
        if self.wants_input(shared.commands) {
            wanted |= EventFlags::IN;
        }
        if !sent || self.sends_log() || self.has_output(shared.commands) {
            wanted |= EventFlags::OUT;
        }
        // The client of a running session or a tunnel may leave output unread: that only blocks the other end.
        let may_wait = matches!(self.state, State::WebSocket(_, Stage::Session(_)));
        if !sent && !may_wait && !self.state.is_tunnel() {
            self.deadline = self.deadline.min(context.now + SEND_TIMEOUT);
        }
        #[cfg(feature = "tunnel")]
        if let State::Tunnel(tunnel) = &mut self.state {
            wanted = tunnel.watch(self.key, &mut self.io, context);
        }
        let token = EventSource::Connection.token(self.key);
        context
            .poller
            .watch(self.io.socket(), token, &mut self.watched, wanted);
        match self.state {
            State::Exec(key) => {
                if let Some((exec, _)) = shared.commands.exec(key) {
                    exec.watch(key, context);
                }
            }
            State::WebSocket(_, Stage::Session(key)) => {
                if let Some(session) = shared.commands.session(key, self.key) {
                    session.watch(key, sent, context);
                }
            }
            _ => {}
        }
    }
}

/// Parses a head again, for the few calls that need it.
fn parse_again(head: &[u8]) -> Option<Head<'_>> {
    HeadParser::default().parse(head).ok()?
}

/// The target of a head that was parsed before.
#[cfg(any(feature = "sessions", feature = "logs", feature = "mounts"))]
fn target(head: &[u8]) -> Target<'_> {
    let nothing = Target::Resource {
        path: "",
        query: "",
    };
    parse_again(head).map_or(nothing, |head| head.target)
}

/// Begins to connect a tunnel, if there may be one now.
#[cfg(feature = "tunnel")]
fn open_tunnel(host: &str, port: u16, context: &Context) -> Result<Tunnel, CallError> {
    check_long_connections(context)?;
    refuse_while_held(context)?;
    Tunnel::open(host, port, &context.proc)
}

/// Checks whether a snapshot call can be handled, and may wait.
#[cfg(feature = "snapshot")]
fn check_snapshot_calls(context: &Context) -> Result<(), CallError> {
    if context.workload.group.is_none() {
        return Err(not_running());
    }
    if context.snapshot.pending_calls >= SNAPSHOT_CALLS {
        let error = error!("too many calls wait for another one");
        return Err(CallError::new(Status::ServiceUnavailable, error));
    }
    Ok(())
}

/// Checks whether there may be another connection without a time limit.
fn check_long_connections(context: &Context) -> Result<(), CallError> {
    if context.long_connections < LONG_CONNECTIONS {
        return Ok(());
    }
    let error = error!("too many waiting calls and sessions");
    Err(CallError::new(Status::ServiceUnavailable, error))
}
