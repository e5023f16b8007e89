//! `/v1/ws/exec`: a command whose input and output are streams, over a WebSocket.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tungstenite::{
    Bytes, HandshakeError, Message, WebSocket,
    client::IntoClientRequest,
    client::client_with_config,
    protocol::{WebSocketConfig, frame::coding::CloseCode},
};

use crate::{Client, Command, Connection, Error, client::refusal, logs::Stream};

/// Maximum size of an input message in bytes; the init accepts 128 KiB.
pub const MESSAGE: usize = 32 << 10;
/// Maximum number of bytes to send: a message, and replies to the init while it does not read.
const QUEUE: usize = 1 << 20;
/// Maximum number of bytes of output buffered while input is sent, for a command that does not read it.
const MAX_AHEAD: usize = 16 << 20;

/// An event of a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Output. It is all standard output unless the command was started with
    /// [`separate_stderr`](Command::separate_stderr).
    Output(Stream, Bytes),
    /// The exit, after all output.
    Exit(Ended),
}

/// A named session.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct SessionInfo {
    /// The name.
    pub id: String,
    /// Its command's pid.
    #[serde(default)]
    pub pid: Option<u32>,
    /// The command and its arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// Whether it is on a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Whether a client is attached.
    #[serde(default)]
    pub attached: bool,
    /// Its exit status; null while it runs.
    #[serde(default)]
    pub exit: Value,
}

/// The exit status of a session's command.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// Its exit code.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

impl Ended {
    /// The status as in a shell: the code, or 128 + the signal.
    pub fn status(&self) -> i32 {
        match (self.code, self.signal) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => -1,
        }
    }
}

/// A running command. If this is dropped before it exits, it is killed with its group, unless it has a
/// [name](Command::id).
///
/// The blocking methods are for a program that reads and writes in turn. One that polls several
/// descriptors waits for [`as_fd`](Session::as_fd) to be readable, and writable while
/// [`is_sending`](Session::is_sending), and then calls [`flush`](Session::flush) and
/// [`try_next`](Session::try_next).
///
/// ```no_run
/// use pigeon::{Client, Command, session::Event};
///
/// let mut session = Client::connect("vm.vsock")?.session(&Command::new(["sort", "-u"]))?;
/// session.send(b"b\na\nb\n")?;
/// session.end_input()?;
/// while let Some(event) = session.next()? {
///     match event {
///         Event::Output(_, bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
///         Event::Exit(ended) => println!("status {}", ended.status()),
///     }
/// }
/// # Ok::<(), pigeon::Error>(())
/// ```
pub struct Session {
    socket: WebSocket<Connection>,
    /// Whether bytes are queued for sending.
    sending: bool,
    /// Events received while sending.
    ahead: VecDeque<Event>,
    /// Their size in bytes.
    ahead_size: usize,
    over: bool,
    /// Whether messages begin with the number of their stream.
    streams: bool,
}

/// Only a flush writes, so that messages are written in one piece and only once.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .write_buffer_size(QUEUE)
        .max_write_buffer_size(QUEUE + 1)
}

/// Memory in bytes that a kept event uses.
fn size(event: &Event) -> usize {
    let bytes = match event {
        Event::Output(_, bytes) => bytes.len(),
        Event::Exit(_) => 0,
    };
    size_of::<Event>() + bytes
}

impl Session {
    pub(crate) fn start(
        client: &Client,
        command: &Command,
        terminal: Option<(u16, u16)>,
    ) -> Result<Session, Error> {
        let mut request = command.request("command");
        request["tty"] = json!(terminal.is_some());
        if command.streams {
            request["streams"] = json!(true);
        }
        if let Some(id) = &command.id {
            request["id"] = json!(id);
        }
        Session::open(client, request, terminal, command.streams)
    }

    pub(crate) fn attach(
        client: &Client,
        id: &str,
        terminal: Option<(u16, u16)>,
    ) -> Result<Session, Error> {
        let mut request = json!({"attach": id});
        let streams = terminal.is_none();
        if streams {
            request["streams"] = json!(true);
        }
        Session::open(client, request, terminal, streams)
    }

    fn open(
        client: &Client,
        mut request: Value,
        terminal: Option<(u16, u16)>,
        streams: bool,
    ) -> Result<Session, Error> {
        let stream = client.connection(Client::RESPONSE_LIMIT)?;
        let upgrade = "ws://localhost/v1/ws/exec".into_client_request();
        let upgrade = upgrade.map_err(Error::broken)?;
        let (socket, _) =
            client_with_config(upgrade, stream, Some(config())).map_err(|error| match error {
                HandshakeError::Failure(tungstenite::Error::Http(response)) => {
                    let body = response.body().as_deref().unwrap_or_default();
                    refusal(response.status().as_u16(), body)
                }
                HandshakeError::Failure(tungstenite::Error::Io(error)) => Error::request_failed(
                    anyhow::Error::from(error).context("no answer to ws/exec"),
                ),
                HandshakeError::Failure(error) => Error::broken(error),
                HandshakeError::Interrupted(_) => Error::Broken("it blocks".into()),
            })?;
        let mut session = Session::new(socket, streams);
        if let Some((columns, rows)) = terminal {
            (request["cols"], request["rows"]) = (json!(columns), json!(rows));
        }
        session.queue(Message::text(request.to_string()))?;
        session.flush()?;
        let connection = session.socket.get_mut();
        connection.set_nonblocking().map_err(Error::broken)?;
        Ok(session)
    }

    fn new(socket: WebSocket<Connection>, streams: bool) -> Session {
        Session {
            socket,
            sending: false,
            ahead: VecDeque::new(),
            ahead_size: 0,
            over: false,
            streams,
        }
    }

    /// Sends all of the input to the command. Output received meanwhile is kept for [`next`](Session::next), up to
    /// 16 MiB: a command that writes more before it has read its input is an error, and needs
    /// [`queue_input`](Session::queue_input).
    pub fn send(&mut self, input: &[u8]) -> Result<(), Error> {
        for chunk in input.chunks(MESSAGE) {
            self.queue_input(chunk)?;
            self.drain()?;
        }
        Ok(())
    }

    /// Ends the command's input.
    pub fn end_input(&mut self) -> Result<(), Error> {
        self.queue_end_of_input()?;
        self.drain()
    }

    /// Sets the terminal's size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Error> {
        self.queue_resize(columns, rows)?;
        self.drain()
    }

    /// Waits for the next event; None after the end.
    #[expect(clippy::should_implement_trait, reason = "it fails")]
    pub fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            let event = self.try_next()?;
            if event.is_some() || self.over {
                return Ok(event);
            }
            self.flush()?;
            self.wait()?;
        }
    }

    /// The next event that was already received.
    pub fn try_next(&mut self) -> Result<Option<Event>, Error> {
        match self.ahead.pop_front() {
            None => self.receive(),
            Some(event) => {
                self.ahead_size -= size(&event);
                Ok(Some(event))
            }
        }
    }

    /// Whether the session has ended.
    pub fn is_over(&self) -> bool {
        self.over && self.ahead.is_empty()
    }

    /// Whether bytes are queued: then wait, and [`flush`](Session::flush), before queuing more input.
    pub fn is_sending(&self) -> bool {
        self.sending
    }

    /// Queues input, at most [`MESSAGE`] bytes, for [`flush`](Session::flush).
    pub fn queue_input(&mut self, input: &[u8]) -> Result<(), Error> {
        self.queue(Message::binary(input.to_vec()))
    }

    /// Queues the end of input for [`flush`](Session::flush).
    pub fn queue_end_of_input(&mut self) -> Result<(), Error> {
        self.queue(Message::text(r#"{"stdin":"eof"}"#))
    }

    /// Queues the terminal's size for [`flush`](Session::flush).
    pub fn queue_resize(&mut self, columns: u16, rows: u16) -> Result<(), Error> {
        let size = json!({"cols": columns, "rows": rows});
        self.queue(Message::text(size.to_string()))
    }

    fn queue(&mut self, message: Message) -> Result<(), Error> {
        self.sending = true;
        match self.socket.write(message) {
            // It is queued, as is the reply to a ping.
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(())
            }
            Err(error) if !self.over => self.failed(error),
            _ => Ok(()),
        }
    }

    /// Sends as much as possible without blocking.
    pub fn flush(&mut self) -> Result<(), Error> {
        match self.socket.flush() {
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                self.sending = true;
                Ok(())
            }
            // The command exited before the end of its input.
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.sending = false;
                Ok(())
            }
            Err(error) if !self.over => self.failed(error),
            _ => {
                self.sending = false;
                Ok(())
            }
        }
    }

    /// Sends everything, and keeps events received meanwhile.
    fn drain(&mut self) -> Result<(), Error> {
        self.flush()?;
        while self.sending && !self.over {
            self.wait()?;
            while let Some(event) = self.receive()? {
                self.keep(event)?;
            }
            self.flush()?;
        }
        Ok(())
    }

    /// Keeps an event received during another operation.
    fn keep(&mut self, event: Event) -> Result<(), Error> {
        let event = match event {
            // A copy: the bytes may be a small part of a buffer that they would keep allocated.
            Event::Output(stream, bytes) => Event::Output(stream, Bytes::copy_from_slice(&bytes)),
            event => event,
        };
        self.ahead_size += size(&event);
        self.ahead.push_back(event);
        if self.ahead_size > MAX_AHEAD {
            self.over = true;
            let error = "the command keeps writing and does not read its input";
            return Err(Error::Broken(error.into()));
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<Event>, Error> {
        while !self.over {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => return self.output(bytes).map(Some),
                Ok(Message::Text(text)) => match self.text(&text)? {
                    None => continue,
                    event => return Ok(event),
                },
                Ok(Message::Close(frame)) => {
                    return Err(match frame {
                        Some(frame)
                            if frame.code == CloseCode::Away && !frame.reason.is_empty() =>
                        {
                            Error::Closed(frame.reason.to_string())
                        }
                        Some(frame) => {
                            Error::Broken(format!("closed with {} {}", frame.code, frame.reason))
                        }
                        None => Error::Broken("it was closed".into()),
                    });
                }
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(None);
                }
                Err(error) => return self.failed(error).map(|()| None),
            }
        }
        Ok(None)
    }

    /// A binary message from the init.
    fn output(&mut self, bytes: Bytes) -> Result<Event, Error> {
        if !self.streams {
            return Ok(Event::Output(Stream::Stdout, bytes));
        }
        let stream = bytes.first().copied().and_then(Stream::of);
        match stream {
            Some(stream) => Ok(Event::Output(stream, bytes.slice(1..))),
            None => {
                self.over = true;
                Err(Error::Broken("a message of an unknown stream".into()))
            }
        }
    }

    /// A text message from the init.
    fn text(&mut self, text: &str) -> Result<Option<Event>, Error> {
        let message: Value = serde_json::from_str(text).map_err(Error::broken)?;
        if let Some(why) = message["Error"]["message"].as_str() {
            self.over = true;
            return Err(Error::NotStarted(why.into()));
        }
        let exit = &message["Exit"];
        if !exit.is_object() {
            return Ok(None); // a message of a later version
        }
        let number = |key| exit[key].as_i64().and_then(|number| number.try_into().ok());
        self.over = true;
        // The init has sent everything, and may have closed the connection.
        let _ = self.socket.close(None);
        Ok(Some(Event::Exit(Ended {
            code: number("code"),
            signal: number("signal"),
        })))
    }

    fn failed(&mut self, error: tungstenite::Error) -> Result<(), Error> {
        self.over = true;
        Err(Error::broken(error))
    }

    /// Waits until the socket is ready.
    fn wait(&self) -> Result<(), Error> {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, self.sending);
        loop {
            match poll(&mut [PollFd::new(self, wanted)], None) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.map(drop).map_err(Error::broken),
            }
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Limit;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        thread,
    };
    use tungstenite::protocol::Role;

    /// A session, and the init's end of its connection.
    fn session() -> (Session, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let mut near = Connection::new(near, Limit::None, None).unwrap();
        near.set_nonblocking().unwrap();
        let socket = WebSocket::from_raw_socket(near, Role::Client, Some(config()));
        (Session::new(socket, false), far)
    }

    /// A frame from the init, which is not masked. (RFC 6455 section 5.2)
    fn frame(first: u8, bytes: &[u8]) -> Vec<u8> {
        let length = u16::try_from(bytes.len()).unwrap();
        [&[first, 126], &length.to_be_bytes()[..], bytes].concat()
    }

    #[test]
    fn a_command_that_writes_and_does_not_read_is_given_up() {
        let (mut session, mut init) = session();
        let init = thread::spawn(move || {
            let output = frame(0x82, &[b'y'; 60_000]);
            let mut sent = 0;
            while sent < 2 * MAX_AHEAD && init.write_all(&output).is_ok() {
                sent += output.len();
            }
            // Without a limit all output would be accepted, and then the input would be sent.
            let _ = io::copy(&mut init, &mut io::sink());
            sent
        });
        let error = session.send(&vec![0; 4 << 20]).unwrap_err().to_string();
        assert!(error.contains("does not read its input"), "{error}");
        // Output received earlier is still available.
        assert!(matches!(session.try_next(), Ok(Some(Event::Output(..)))));
        drop(session);
        assert!(init.join().unwrap() < 2 * MAX_AHEAD);
    }

    #[test]
    fn pings_of_an_init_that_does_not_read_are_answered_up_to_a_limit() {
        let (mut session, mut init) = session();
        init.set_nonblocking(true).unwrap();
        let pings = frame(0x89, &[b'p'; 125]);
        // RFC 6455 section 5.5: a control frame has a length of one byte.
        let pings = [&[0x89, 125], &pings[4..]].concat().repeat(500);
        for round in 0..100 {
            let mut left = &pings[..];
            while !left.is_empty() {
                match init.write(left) {
                    Ok(size) => left = &left[size..],
                    Err(_) => assert_eq!(session.try_next().unwrap(), None),
                }
            }
            // More than the socket buffer holds, but less than the queue: input is accepted too.
            if round == 10 {
                session.queue_input(b"input").unwrap();
            }
        }
        let mut answered = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            session.flush().unwrap();
            match init.read(&mut buffer) {
                Ok(size) => answered += size,
                Err(_) => break,
            }
        }
        // In addition to the queue, the socket has a buffer, which net.core.wmem_default limits.
        assert!(answered > 1000, "{answered}");
        assert!(answered < QUEUE + (1 << 20), "{answered}");
    }
}
