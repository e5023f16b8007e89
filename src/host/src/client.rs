//! The API of a VM's pigeon-init, for host drivers.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, http,
    session::Session,
    vsock::{self, API_PORT},
};

/// How long an answer may take that does not wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one try to reach the guest may take: a handshake that begins while the guest's driver
/// starts can get lost.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// The same for one of many tries.
const SHORT_HANDSHAKE: Duration = Duration::from_millis(500);
/// The init's own time limit of a one-shot command.
const EXEC_LIMIT: Duration = Duration::from_secs(30);
/// How often a VM that boots is asked.
const RETRY: Duration = Duration::from_millis(10);

/// A VM, by the Unix socket of its vsock. Each call has a connection of its own, so that calls of
/// several threads do not wait for each other.
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
}

/// How the workload ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Exit {
    /// Its exit code; 128 + the signal that killed it; 125 when it could not be run.
    pub code: i32,
    /// The kernel killed it because memory ran out.
    pub oom_killed: bool,
    /// Why it could not be run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a one-shot command came to.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Output {
    /// Its exit code; -1 when a signal killed it.
    pub exit_code: i32,
    /// The signal that killed it, or 0.
    pub exit_signal: i32,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// There was more of it than an answer holds.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdout_truncated: bool,
    /// There was more of it than an answer holds.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stderr_truncated: bool,
}

/// A command to be run beside the workload.
#[derive(Clone, Debug, Default)]
pub struct Command {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) timeout: Option<Duration>,
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

    /// The working directory, in place of `/`.
    pub fn dir(mut self, dir: &str) -> Command {
        self.cwd = Some(dir.into());
        self
    }

    /// `user`, `uid`, `user:group` or `uid:gid`, in place of root.
    pub fn user(mut self, user: &str) -> Command {
        self.user = Some(user.into());
        self
    }

    /// The time limit of a one-shot command, in place of 30 s. Its end is the group's, by SIGKILL.
    pub fn timeout(mut self, timeout: Duration) -> Command {
        self.timeout = Some(timeout);
        self
    }

    /// As a request has it, the command itself under `key`.
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
    /// The VM behind `uds`, once: an error when its init is not there.
    pub fn connect(uds: impl AsRef<Path>) -> Result<Client, Error> {
        let client = Client {
            uds: uds.as_ref().into(),
        };
        client.status()?;
        Ok(client)
    }

    /// The VM behind `uds`, as soon as its init is there: its root is mounted then, and its
    /// configuration good.
    pub fn connect_within(uds: impl AsRef<Path>, patience: Duration) -> Result<Client, Error> {
        let deadline = Instant::now() + patience;
        let client = Client {
            uds: uds.as_ref().into(),
        };
        loop {
            let connected = vsock::connect(&client.uds, API_PORT, SHORT_HANDSHAKE);
            match connected.and_then(|_| client.status()) {
                Err(error) if error.is_not_yet() && Instant::now() < deadline => {
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

    /// A connection to a port of the guest, such as one of the workload's own.
    pub fn port(&self, port: u32) -> Result<UnixStream, Error> {
        let stream = vsock::connect(&self.uds, port, HANDSHAKE)?;
        stream.set_read_timeout(None).map_err(Error::broken)?;
        Ok(stream)
    }

    /// `GET /v1/status`: whether the init is well.
    pub fn status(&self) -> Result<(), Error> {
        self.call(Some(PATIENCE), |http| http.get("/v1/status"))?;
        Ok(())
    }

    /// `GET /v1/exit_code`: waits for the workload's end.
    pub fn exit_code(&self) -> Result<Exit, Error> {
        parse(self.call(None, |http| http.get("/v1/exit_code"))?)
    }

    /// `POST /v1/signals`: a signal to the workload's process group.
    pub fn signal(&self, signal: u8) -> Result<(), Error> {
        let body = json!({"signal": signal});
        self.call(Some(PATIENCE), |http| http.post("/v1/signals", &body))?;
        Ok(())
    }

    /// `POST /v1/exec`: runs a command to its end and returns what it wrote, up to 1 MiB a stream.
    pub fn exec(&self, command: &Command) -> Result<Output, Error> {
        let mut body = command.request("cmd");
        if let Some(timeout) = command.timeout {
            body["timeout_ms"] = json!(timeout.as_millis());
        }
        let patience = command.timeout.unwrap_or(EXEC_LIMIT) + PATIENCE;
        match self.call(Some(patience), |http| http.post("/v1/exec", &body)) {
            Err(Error::Refused {
                status: 500,
                message,
            }) => Err(Error::NotStarted(message)),
            result => parse(result?),
        }
    }

    /// `GET /v1/ws/exec`: runs a command whose input and output are streams.
    pub fn session(&self, command: &Command) -> Result<Session, Error> {
        Session::start(self, command, None)
    }

    /// [`session`](Client::session) on a terminal of so many columns and rows.
    pub fn terminal(&self, command: &Command, size: (u16, u16)) -> Result<Session, Error> {
        Session::start(self, command, Some(size))
    }

    fn call(
        &self,
        patience: Option<Duration>,
        call: impl FnOnce(&mut http::Client<UnixStream>) -> anyhow::Result<http::Response>,
    ) -> Result<http::Response, Error> {
        let stream = self.port(API_PORT)?;
        stream.set_read_timeout(patience).map_err(Error::broken)?;
        let response = call(&mut http::Client::new(stream)).map_err(Error::broken)?;
        if (200..300).contains(&response.status) {
            return Ok(response);
        }
        Err(refusal(response.status, &response.body))
    }
}

/// What an answer that is none says.
pub(crate) fn refusal(status: u16, body: &[u8]) -> Error {
    let said: Option<Value> = serde_json::from_slice(body).ok();
    let message = said.and_then(|said| said["error"].as_str().map(String::from));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    Error::Refused { status, message }
}

fn parse<T: for<'a> Deserialize<'a>>(response: http::Response) -> Result<T, Error> {
    serde_json::from_slice(&response.body).map_err(Error::broken)
}
