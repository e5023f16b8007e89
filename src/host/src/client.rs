//! The API of a VM's pigeon-init, for host drivers.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error,
    connection::{Connection, Limit},
    files::escape,
    http,
    logs::Logs,
    session::{Session, SessionInfo},
    vsock::{self, API_PORT},
};

/// How long one attempt to reach the guest may take: a handshake can get lost while the guest's driver starts.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// The same for one of several attempts.
const SHORT_HANDSHAKE: Duration = Duration::from_millis(500);
/// The init's own time limit of a one-shot command.
const EXEC_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of an error body that are read.
const MAX_ERROR: u64 = 64 << 10;
/// How often a booting VM is polled.
const RETRY: Duration = Duration::from_millis(10);

/// A VM, by the Unix socket of its vsock. Each call uses its own connection, so that calls of several threads do
/// not wait for each other.
///
/// ```no_run
/// use std::time::Duration;
/// use pigeon::{Client, Command};
///
/// let vm = Client::connect_within("vm.vsock", Duration::from_secs(10))?; // once it has booted
/// let output = vm.exec(&Command::new(["uname", "-r"]).user("nobody"))?;
/// println!("{}", output.stdout);
/// vm.signal(15)?;
/// println!("exit code {}", vm.exit_code()?.code);
/// # Ok::<(), pigeon::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    uds: PathBuf,
    /// How long a guest that does not respond is retried.
    retry_timeout: Duration,
    /// The deadline of all calls.
    deadline: Option<Instant>,
}

/// The workload's exit.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Exit {
    /// Its exit code; 128 + the signal that killed it; 125 if it could not be started.
    pub code: i32,
    /// The kernel killed it because memory ran out.
    pub oom_killed: bool,
    /// Why it could not be started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The result of a one-shot command.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Output {
    /// Its exit code; -1 when a signal killed it.
    pub exit_code: i32,
    /// The signal that killed it, or 0.
    pub exit_signal: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Whether it was truncated in the response.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdout_truncated: bool,
    /// Whether it was truncated in the response.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stderr_truncated: bool,
    /// Whether it was killed by the time limit.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// A command to run beside the workload.
#[derive(Clone, Debug, Default)]
pub struct Command {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) streams: bool,
    pub(crate) id: Option<String>,
}

impl Command {
    /// A command and its arguments. A name without `/` is looked up in the workload's PATH.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Command {
        Command {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Command::default()
        }
    }

    /// Sets a variable on top of the workload's environment.
    pub fn env(mut self, name: &str, value: &str) -> Command {
        self.env.push(format!("{name}={value}"));
        self
    }

    /// Sets the working directory, instead of the workload's.
    pub fn dir(mut self, dir: &str) -> Command {
        self.cwd = Some(dir.into());
        self
    }

    /// Sets the user, as `user`, `uid`, `user:group` or `uid:gid`, instead of root.
    pub fn user(mut self, user: &str) -> Command {
        self.user = Some(user.into());
        self
    }

    /// Sets the time limit of a one-shot command, instead of 30 s. After it the process group gets SIGKILL.
    pub fn timeout(mut self, timeout: Duration) -> Command {
        self.timeout = Some(timeout);
        self
    }

    /// In a session: keeps standard error separate from standard output.
    pub fn separate_stderr(mut self) -> Command {
        self.streams = true;
        self
    }

    /// Names the session, so that it survives its connection and can be [attached](Client::attach) to.
    pub fn id(mut self, id: &str) -> Command {
        self.id = Some(id.into());
        self
    }

    /// The JSON of a request, with the command itself under `key`.
    pub(crate) fn request(&self, key: &str) -> Value {
        let mut request = json!({ key: self.argv });
        if !self.env.is_empty() {
            request["env"] = json!(self.env);
        }
        if let Some(cwd) = &self.cwd {
            request["cwd"] = json!(cwd);
        }
        if let Some(user) = &self.user {
            request["user"] = json!(user);
        }
        request
    }
}

impl Client {
    /// Timeout of calls that do not wait for anything.
    pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
    pub(crate) const RESPONSE_LIMIT: Limit = Limit::Total(Client::RESPONSE_TIMEOUT);

    /// A client for the VM behind `uds`, which may not be up yet.
    pub fn new(uds: impl Into<PathBuf>) -> Client {
        Client {
            uds: uds.into(),
            retry_timeout: Duration::ZERO,
            deadline: None,
        }
    }

    /// For a guest whose init is known to listen: if it is too busy to accept a connection in time, retries
    /// for this long.
    pub fn with_retry_timeout(mut self, timeout: Duration) -> Client {
        self.retry_timeout = timeout;
        self
    }

    /// The same client with a deadline: all its calls together, including those that wait for something, take
    /// at most this long. A session that was started in time continues.
    pub fn within(&self, timeout: Duration) -> Client {
        Client {
            // A timeout beyond the range of `Instant` is no limit; the same below.
            deadline: Instant::now().checked_add(timeout),
            ..self.clone()
        }
    }

    /// Connects to the VM behind `uds`, without retries: an error if its init is not up.
    pub fn connect(uds: impl AsRef<Path>) -> Result<Client, Error> {
        let client = Client::new(uds.as_ref());
        client.status()?;
        Ok(client)
    }

    /// Connects to the VM behind `uds` once its init is up: the root is mounted then, and the configuration
    /// is valid.
    pub fn connect_within(uds: impl AsRef<Path>, timeout: Duration) -> Result<Client, Error> {
        let deadline = Instant::now().checked_add(timeout);
        let client = Client::new(uds.as_ref());
        loop {
            let connected = vsock::connect(&client.uds, API_PORT, SHORT_HANDSHAKE);
            match connected.and_then(|_| client.status()) {
                Err(error) if error.is_not_yet() && is_before(deadline) => {
                    thread::sleep(RETRY);
                }
                result => return result.map(|()| client),
            }
        }
    }

    /// The Unix socket.
    pub fn uds(&self) -> &Path {
        &self.uds
    }

    /// Connects to a vsock port of the guest, such as one of the workload's.
    pub fn port(&self, port: u32) -> Result<UnixStream, Error> {
        let retry_until = Instant::now().checked_add(self.retry_timeout);
        let retry_until = self.deadline.into_iter().chain(retry_until).min();
        let stream = loop {
            let left = self
                .deadline
                .map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(HANDSHAKE, |left| left.min(HANDSHAKE));
            if timeout.is_zero() {
                return Err(Error::TimedOut(format!("port {port}: timed out")));
            }
            match vsock::connect(&self.uds, port, timeout) {
                Err(Error::NotListening { .. }) if is_before(retry_until) => {
                    thread::sleep(RETRY);
                }
                result => break result?,
            }
        };
        stream.set_read_timeout(None).map_err(Error::broken)?;
        Ok(stream)
    }

    /// `GET /v1/status`: checks the init.
    pub fn status(&self) -> Result<(), Error> {
        self.call(Client::RESPONSE_LIMIT, |http| http.get("/v1/status"))?;
        Ok(())
    }

    /// `GET /v1/exit_code`: waits for the workload's exit.
    pub fn exit_code(&self) -> Result<Exit, Error> {
        parse(self.call(Limit::None, |http| http.get("/v1/exit_code"))?)
    }

    /// `POST /v1/signals`: a signal to the workload's process group.
    pub fn signal(&self, signal: u8) -> Result<(), Error> {
        let body = json!({"signal": signal});
        self.call(Client::RESPONSE_LIMIT, |http| {
            http.post("/v1/signals", &body)
        })?;
        Ok(())
    }

    /// `POST /v1/exec`: runs a command until it exits and returns its output, up to 1 MiB per stream.
    pub fn exec(&self, command: &Command) -> Result<Output, Error> {
        let mut body = command.request("cmd");
        if let Some(timeout) = command.timeout {
            body["timeout_ms"] = json!(milliseconds(timeout));
        }
        let timeout = command.timeout.unwrap_or(EXEC_LIMIT);
        let timeout = timeout.saturating_add(Client::RESPONSE_TIMEOUT);
        match self.call(Limit::Total(timeout), |http| http.post("/v1/exec", &body)) {
            Err(Error::Refused {
                status: 500,
                message,
            }) => Err(Error::NotStarted(message)),
            result => parse(result?),
        }
    }

    /// `GET /v1/ws/exec`: runs a command whose input and output are streams. An init built without
    /// the feature `sessions` merges standard error into standard output.
    pub fn session(&self, command: &Command) -> Result<Session, Error> {
        if command.streams && command.id.is_none() && !self.has_sessions()? {
            let merged = Command {
                streams: false,
                ..command.clone()
            };
            return Session::start(self, &merged, None);
        }
        Session::start(self, command, None)
    }

    /// Whether the init has the feature `sessions`.
    fn has_sessions(&self) -> Result<bool, Error> {
        match self.sessions() {
            Err(Error::Refused {
                status: 404 | 405, ..
            }) => Ok(false),
            sessions => sessions.map(|_| true),
        }
    }

    /// [`session`](Client::session) on a terminal with these columns and rows.
    pub fn terminal(&self, command: &Command, size: (u16, u16)) -> Result<Session, Error> {
        Session::start(self, command, Some(size))
    }

    /// Attaches to a named session; missed output comes first. `terminal` is the size of the caller's terminal,
    /// for a session on a terminal.
    pub fn attach(&self, id: &str, terminal: Option<(u16, u16)>) -> Result<Session, Error> {
        Session::attach(self, id, terminal)
    }

    /// `GET /v1/sessions`: the named sessions.
    pub fn sessions(&self) -> Result<Vec<SessionInfo>, Error> {
        let reply = self.call(Client::RESPONSE_LIMIT, |http| http.get("/v1/sessions"))?;
        parse(reply)
    }

    /// `DELETE /v1/sessions/ID`: ends a named session.
    pub fn end_session(&self, id: &str) -> Result<(), Error> {
        let target = format!("/v1/sessions/{}", escape(id));
        self.call(Client::RESPONSE_LIMIT, |http| {
            http.request("DELETE", &target, &[], b"")
        })?;
        Ok(())
    }

    /// `POST /v1/stop`: sends the stop signal to the workload, and SIGKILL after the timeout.
    /// `None` is the image's or the init's default.
    pub fn stop(&self, signal: Option<u8>, timeout: Option<Duration>) -> Result<(), Error> {
        let mut body = json!({});
        if let Some(signal) = signal {
            body["signal"] = json!(signal);
        }
        if let Some(timeout) = timeout {
            body["timeout_ms"] = json!(milliseconds(timeout));
        }
        self.call(Client::RESPONSE_LIMIT, |http| http.post("/v1/stop", &body))?;
        Ok(())
    }

    /// `GET /v1/logs`: the workload's output that is still available, from byte `offset` on; with `follow`
    /// also further output until the workload exits.
    pub fn logs(&self, follow: bool, offset: Option<u64>) -> Result<Logs, Error> {
        let mut target = String::from("/v1/logs");
        let offset = offset.map(|offset| format!("offset={offset}"));
        let follow = follow.then(|| "follow=1".to_string());
        for (query, mark) in follow.into_iter().chain(offset).zip(["?", "&"]) {
            target += mark;
            target += &query;
        }
        let (head, http) = self.start_get(&target, Client::RESPONSE_TIMEOUT, Limit::None)?;
        let offset = head
            .header("log-offset")
            .and_then(|offset| offset.parse().ok());
        let body = http.into_body(&head).map_err(Error::broken)?;
        Ok(Logs::new(body, offset.unwrap_or(0)))
    }

    /// `GET /v1/sysinfo`: memory, load, file descriptors, processors, disks and network.
    pub fn sysinfo(&self) -> Result<Value, Error> {
        parse(self.call(Client::RESPONSE_LIMIT, |http| http.get("/v1/sysinfo"))?)
    }

    /// A connection to the API.
    pub(crate) fn connection(&self, limit: Limit) -> Result<Connection, Error> {
        let stream = self.port(API_PORT)?;
        Connection::new(stream, limit, self.deadline).map_err(Error::broken)
    }

    pub(crate) fn http(&self, limit: Limit) -> Result<http::Client<Connection>, Error> {
        Ok(http::Client::new(self.connection(limit)?))
    }

    /// Sends a `GET` and reads the head of the response within `timeout`; the body is streamed, with the limit
    /// `body`.
    pub(crate) fn start_get(
        &self,
        target: &str,
        timeout: Duration,
        body: Limit,
    ) -> Result<(http::Response, http::Client<Connection>), Error> {
        let mut http = self.http(Limit::Total(timeout))?;
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        http.send(request.as_bytes())
            .map_err(Error::request_failed)?;
        let head = http.receive_head().map_err(Error::request_failed)?;
        if head.status != 200 {
            return Err(Client::refused(head, http));
        }
        http.get_mut().set_limit(body).map_err(Error::broken)?;
        Ok((head, http))
    }

    /// The error in a response whose head has been read.
    pub(crate) fn refused(head: http::Response, http: http::Client<Connection>) -> Error {
        let status = head.status;
        let mut body = vec![];
        match http.into_body(&head) {
            Ok(reader) => match reader.take(MAX_ERROR).read_to_end(&mut body) {
                Ok(_) => refusal(status, &body),
                Err(error) => Error::request_failed(error),
            },
            Err(error) => Error::broken(error),
        }
    }

    /// A `POST` whose response is JSON.
    pub(crate) fn post_within<T: for<'a> Deserialize<'a>>(
        &self,
        timeout: Duration,
        target: &str,
        body: &Value,
    ) -> Result<T, Error> {
        parse(self.call(Limit::Total(timeout), |http| http.post(target, body))?)
    }

    /// Makes a call. An error status is an error.
    pub(crate) fn call(
        &self,
        limit: Limit,
        call: impl FnOnce(&mut http::Client<Connection>) -> anyhow::Result<http::Response>,
    ) -> Result<http::Response, Error> {
        let response = call(&mut self.http(limit)?).map_err(Error::request_failed)?;
        if (200..300).contains(&response.status) {
            return Ok(response);
        }
        Err(refusal(response.status, &response.body))
    }
}

/// Whether a deadline has not passed; None never does.
fn is_before(deadline: Option<Instant>) -> bool {
    deadline.is_none_or(|deadline| Instant::now() < deadline)
}

/// The milliseconds of a timeout in a request. The init refuses more than a day.
fn milliseconds(timeout: Duration) -> u64 {
    timeout.as_millis().try_into().unwrap_or(u64::MAX)
}

/// The error of an invalid response.
pub(crate) fn refusal(status: u16, body: &[u8]) -> Error {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let message = json.and_then(|json| json["error"].as_str().map(String::from));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    Error::Refused { status, message }
}

fn parse<T: for<'a> Deserialize<'a>>(response: http::Response) -> Result<T, Error> {
    serde_json::from_slice(&response.body).map_err(Error::broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::unix::net::UnixListener};

    #[test]
    fn calls_to_an_unresponsive_init_end_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("vsock");
        let listener = UnixListener::bind(&uds).unwrap();
        thread::spawn(move || {
            let mut open = vec![];
            for mut stream in listener.incoming().flatten() {
                stream.write_all(b"OK 1073741824\n").unwrap();
                open.push(stream);
            }
        });
        type Call = fn(&Client) -> Result<(), Error>;
        let calls: [(&str, Call); 9] = [
            ("status", |vm| vm.status()),
            ("exit_code", |vm| vm.exit_code().map(drop)),
            ("stop", |vm| vm.stop(None, None)),
            ("sessions", |vm| vm.sessions().map(drop)),
            ("logs", |vm| vm.logs(true, None).map(drop)),
            ("session", |vm| {
                vm.terminal(&Command::new(["x"]), (80, 24)).map(drop)
            }),
            ("read", |vm| vm.read_text("/f", 1).map(drop)),
            ("write", |vm| {
                vm.write_file("/f", &mut &b"x"[..], None, &Default::default())
                    .map(drop)
            }),
            ("tunnel", |vm| vm.tunnel("localhost:1").map(drop)),
        ];
        for (name, call) in calls {
            let vm = Client::new(&uds).within(Duration::from_millis(50));
            let (sender, results) = std::sync::mpsc::channel();
            thread::spawn(move || sender.send(call(&vm)));
            let result = results.recv_timeout(Duration::from_secs(20));
            let error = result.expect(name).unwrap_err();
            assert!(matches!(error, Error::TimedOut(_)), "{name}: {error}");
            assert!(error.to_string().ends_with("timed out"), "{name}: {error}");
        }
    }

    #[test]
    fn a_busy_guest_is_retried_within_the_timeout_only() {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("vsock");
        let listener = UnixListener::bind(&uds).unwrap();
        // Three connections get no response, the fourth does.
        let guest = thread::spawn(move || {
            for stream in listener.incoming().take(4).skip(3) {
                let mut stream = stream.unwrap();
                stream
                    .read_exact(&mut [0; "CONNECT 10000\n".len()])
                    .unwrap();
                stream.write_all(b"OK 1073741824\nhello").unwrap();
            }
        });
        let error = Client::new(&uds).port(API_PORT).unwrap_err();
        assert!(matches!(error, Error::NotListening { .. }), "{error}");
        let client = Client::new(&uds).with_retry_timeout(Duration::from_secs(60));
        let mut greeting = String::new();
        let mut stream = client.port(API_PORT).unwrap();
        stream.read_to_string(&mut greeting).unwrap();
        assert_eq!(greeting, "hello");
        guest.join().unwrap();
        // A VM that has ended is not retried.
        let error = client.port(API_PORT).unwrap_err();
        assert!(matches!(error, Error::NoVm { .. }), "{error}");
    }
}
