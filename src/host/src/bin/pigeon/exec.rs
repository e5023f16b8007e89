//! `pigeon exec`, used like `docker exec`.

use std::{
    io::{self, IsTerminal, Read},
    os::{fd::AsFd, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pigeon::{
    Command, Error, Session,
    logs::Frame,
    session::{Event, MESSAGE},
};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH},
    low_level::pipe,
};

use crate::{
    CANNOT_START, NOT_FOUND, logs,
    output::{note, say},
    target::Target,
    terminal, vms, workload,
};

#[derive(Args)]
pub struct Exec {
    #[command(flatten)]
    target: Target,
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Allocate a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run in the background and print the session's name
    #[arg(short, long, conflicts_with_all = ["interactive", "json"])]
    detach: bool,
    /// Name the session, so that it survives a disconnect (see pigeon attach)
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    id: Option<String>,
    /// Run as this user: name or number, with a group after a colon if wanted
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Set a variable, or pass on one that is set here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables in a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<std::path::PathBuf>,
    /// Run in this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run it to its end, then print one JSON object: exit_code, exit_signal, stdout, stderr
    #[arg(long, conflicts_with_all = ["interactive", "tty"])]
    json: bool,
    /// With --json: kill the command after this time [default: 30]
    #[arg(long, value_name = "SECONDS", requires = "json", value_parser = crate::parse_timeout)]
    timeout: Option<f64>,
    /// The command and its arguments; a VM's name may come first
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

/// `NAME=VALUE`, or `NAME` with its value in this process's environment.
pub fn variable(text: &str) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.into(), value.into())),
        None => Some((text.into(), std::env::var(text).ok()?)),
    }
}

/// Variables from files, one per line, and from options, which take precedence.
pub fn variables(
    files: &[std::path::PathBuf],
    options: &[String],
) -> Result<Vec<(String, String)>> {
    let mut found = vec![];
    for path in files {
        let shown = path.display();
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("unable to read {shown}"))?;
        // Some editors begin a file with a byte order mark.
        let text = text.trim_start_matches('\u{feff}');
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let name = line.split('=').next().unwrap_or_default();
            ensure!(
                !name.is_empty() && !name.contains(char::is_whitespace),
                "{shown}:{}: {line:?} is not NAME=VALUE",
                number + 1
            );
            found.extend(variable(line));
        }
    }
    for text in options {
        ensure!(
            !text.is_empty() && !text.starts_with('='),
            "{text:?} is not NAME[=VALUE]"
        );
        found.extend(variable(text));
    }
    Ok(found)
}

/// Describes a program that the VM's kernel cannot execute (ENOEXEC).
pub fn no_program(arch: &str) -> String {
    format!("neither a program for {arch} nor a script that begins with #!")
}

/// Reports that a command could not be started and returns its exit code; returns other errors.
pub fn start_error(error: anyhow::Error, program: &str, arch: &str) -> Result<u8> {
    let Some(Error::NotStarted(why)) = error.downcast_ref::<Error>() else {
        return Err(error);
    };
    if why.contains("ENOENT") || why.contains("not found") {
        note!("{program}: not found in the VM ({why})");
        return Ok(NOT_FOUND);
    }
    if why.contains("ENOEXEC") {
        note!("{program}: {} ({why})", no_program(arch));
        return Ok(CANNOT_START);
    }
    note!("{program}: {why}");
    Ok(CANNOT_START)
}

impl Exec {
    pub fn run(&self) -> Result<u8> {
        let (vm, words) = self.words();
        let result = if self.json {
            self.run_json(vm, words)
        } else {
            self.run_session(vm, words)
        };
        let code = result.or_else(|error| start_error(error, &words[0], &self.arch(vm)))?;
        if code == NOT_FOUND && words.len() == 1 && vms::find(&words[0]).is_ok() {
            note!(
                "{0} is a VM: give a command, as in `pigeon exec {0} sh`",
                words[0]
            );
        }
        Ok(code)
    }

    /// The VM's architecture, if known.
    fn arch(&self, name: Option<&str>) -> String {
        let vm = self.target.vm(name).ok().flatten();
        vm.map_or("the VM's architecture".into(), |vm| vm.record.arch)
    }

    /// The VM named by the first word, as in docker, and the command.
    fn words(&self) -> (Option<&str>, &[String]) {
        if let [name, command @ ..] = &self.command[..]
            && !command.is_empty()
            && !self.target.is_given()
            && vms::find(name).is_ok_and(|vm| vm.running || vms::only_running().is_err())
        {
            return (Some(name), command);
        }
        (None, &self.command)
    }

    fn command(&self, words: &[String]) -> Result<Command> {
        let mut command = Command::new(words.iter().cloned());
        for (name, value) in variables(&self.env_file, &self.env)? {
            command = command.env(&name, &value);
        }
        if let Some(user) = &self.user {
            command = command.user(user);
        }
        if let Some(dir) = &self.workdir {
            command = command.dir(dir);
        }
        Ok(command)
    }

    fn run_json(&self, vm: Option<&str>, words: &[String]) -> Result<u8> {
        let mut command = self.command(words)?;
        if let Some(seconds) = self.timeout {
            let timeout = Duration::try_from_secs_f64(seconds).context("bad --timeout")?;
            command = command.timeout(timeout);
        }
        let output = self.target.client(vm)?.exec(&command)?;
        say!("{}", json!(output))?;
        Ok(status(match output.exit_code {
            -1 => 128 + output.exit_signal,
            code => code,
        }))
    }

    fn run_session(&self, vm: Option<&str>, words: &[String]) -> Result<u8> {
        terminal::check(self.interactive, self.tty)?;
        let mut command = self.command(words)?;
        let id = match (&self.id, self.detach) {
            (None, true) => Some(format!("exec-{}", std::process::id())),
            (id, _) => id.clone(),
        };
        if let Some(id) = &id {
            command = command.id(id);
        }
        let client = self.target.client(vm)?;
        if let (Some(id), true) = (&id, self.detach) {
            return detach(&client, &command, self.tty, id);
        }
        let session = match self.tty {
            true => client.terminal(&command, terminal::size().unwrap_or((80, 24))),
            false => client.session(&command.separate_stderr()),
        }?;
        Pass {
            interactive: self.interactive,
            tty: self.tty,
            detachable: id.is_some(),
            signals: true,
        }
        .run(session)
    }
}

/// Starts a detached command.
fn detach(client: &pigeon::Client, command: &Command, tty: bool, id: &str) -> Result<u8> {
    /// How long a command may take to start.
    const START: Duration = Duration::from_secs(10);
    let mut session = match tty {
        true => client.terminal(command, (80, 24)),
        false => client.session(&command.clone().separate_stderr()),
    }?;
    if !tty {
        session.end_input()?;
    }
    let deadline = std::time::Instant::now() + START;
    // Once it is listed, it survives this connection; a failure to start is reported before that.
    loop {
        if let Some(Event::Exit(_)) = session.try_next()? {
            break;
        }
        if client.sessions()?.iter().any(|session| session.id == id) {
            break;
        }
        ensure!(
            std::time::Instant::now() < deadline,
            "{id} has not started in {} s",
            START.as_secs()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    say!("{id}")?;
    Ok(0)
}

#[derive(Args)]
pub struct Attach {
    /// The session's name; without it the sessions are listed
    id: Option<String>,
    #[command(flatten)]
    target: Target,
    /// End the session
    #[arg(long, requires = "id")]
    kill: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with = "id")]
    json: bool,
}

impl Attach {
    pub fn run(&self) -> Result<u8> {
        let client = self.target.client(None)?;
        let sessions = || -> Result<_> {
            let mut sessions = client.sessions()?;
            // The session of `pigeon run` is internal.
            sessions.retain(|session| session.id != workload::SESSION);
            Ok(sessions)
        };
        let Some(id) = &self.id else {
            self.list(&sessions()?)?;
            return Ok(0);
        };
        if self.kill {
            client.end_session(id)?;
            return Ok(0);
        }
        let sessions = sessions()?;
        let known = sessions.iter().find(|session| session.id == *id);
        let known = known.with_context(|| match vms::find(id) {
            Ok(_) => format!("{id} is a VM, not a session in it: `pigeon logs -f {id}` follows it"),
            Err(_) => format!("there is no session {id} in the VM"),
        })?;
        let size = known.tty.then(|| terminal::size().unwrap_or((80, 24)));
        let session = client.attach(id, size)?;
        Pass {
            interactive: true,
            tty: known.tty && io::stdin().is_terminal(),
            detachable: true,
            signals: true,
        }
        .run(session)
    }

    fn list(&self, sessions: &[pigeon::session::SessionInfo]) -> Result<()> {
        if self.json {
            return say!("{}", json!(sessions));
        }
        let row = |session: &pigeon::session::SessionInfo| {
            let state = match (session.exit.is_null(), session.attached) {
                (true, true) => "attached",
                (true, false) => "running",
                (false, _) => "ended",
            };
            vec![session.id.clone(), state.into(), session.command.join(" ")]
        };
        let rows: Vec<_> = sessions.iter().map(row).collect();
        crate::output::table(&["ID", "STATE", "COMMAND"], &rows)
    }
}

/// Converts an exit status of the guest to one of this process.
fn status(number: i32) -> u8 {
    u8::try_from(number & 0xff).expect("a byte")
}

/// Connects a session to the standard streams.
pub struct Pass {
    /// Whether standard input is passed on.
    pub interactive: bool,
    /// Whether the session is on a terminal.
    pub tty: bool,
    /// Whether Ctrl-P Ctrl-Q detaches.
    pub detachable: bool,
    /// Whether signals end this process in an orderly way, if the session is on a terminal.
    pub signals: bool,
}

impl Pass {
    /// Runs until the command exits. Returns its exit code.
    pub fn run(&self, session: Session) -> Result<u8> {
        let _restore = match self.tty && self.interactive && io::stdin().is_terminal() {
            true => Some(terminal::raw().context("unable to set the terminal up")?),
            false => None,
        };
        pass(session, self)
    }
}

/// The detach keys, as in docker.
const DETACH: [u8; 2] = [0x10, 0x11];

/// Finds the detach keys in the input.
#[derive(Default)]
struct DetachKeys {
    /// Whether the last key was the first detach key.
    first: bool,
}

impl DetachKeys {
    /// Returns the part of the input for the session, and whether to detach.
    fn look(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = vec![];
        for &byte in input {
            if std::mem::take(&mut self.first) {
                if byte == DETACH[1] {
                    return (passed, true);
                }
                passed.push(DETACH[0]);
            }
            match byte == DETACH[0] {
                true => self.first = true,
                false => passed.push(byte),
            }
        }
        (passed, false)
    }
}

/// Forwards input, output and the terminal's size until the command exits.
fn pass(mut session: Session, how: &Pass) -> Result<u8> {
    let (interactive, tty) = (how.interactive, how.tty);
    let mut keys = DetachKeys::default();
    let signals = |signals: &[i32]| -> io::Result<(UnixStream, UnixStream)> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        for &signal in signals {
            pipe::register(signal, far.try_clone()?)?;
        }
        Ok((near, far))
    };
    let (mut resized, _open) = signals(if tty { &[SIGWINCH] } else { &[] })?;
    let (ended, _open) = signals(if tty && how.signals {
        &[SIGHUP, SIGINT, SIGQUIT, SIGTERM]
    } else {
        &[]
    })?;
    let mut input = interactive;
    if !interactive && !tty {
        session.queue_end_of_input()?;
        session.flush()?;
    }
    loop {
        while let Some(event) = session.try_next()? {
            match event {
                Event::Output(stream, bytes) => logs::show(&Frame {
                    stream,
                    bytes: bytes.to_vec(),
                })?,
                Event::Exit(ended) => return Ok(status(ended.status())),
            }
        }
        ensure!(
            !session.is_over(),
            "the session has ended without an exit status"
        );
        session.flush()?;

        let sending = session.is_sending();
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, sending);
        let stdin = io::stdin();
        let mut polled = vec![
            PollFd::new(&session, wanted),
            PollFd::new(&resized, PollFlags::IN),
            PollFd::new(&ended, PollFlags::IN),
        ];
        // Send queued data first.
        let reading = input && !sending;
        if reading {
            polled.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        let ready: Vec<_> = polled
            .iter()
            .map(|polled| !polled.revents().is_empty())
            .collect();
        if tty && ready[1] {
            while resized.read(&mut [0; 64]).is_ok_and(|size| size > 0) {}
            if let Some((columns, rows)) = terminal::size() {
                session.queue_resize(columns, rows)?;
            }
        }
        if tty && ready[2] {
            bail!("ended by a signal");
        }
        if reading && ready[3] {
            let mut buffer = [0; MESSAGE];
            // Not through the standard library's buffer, which poll(2) does not see.
            match rustix::io::read(stdin.as_fd(), &mut buffer) {
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                // A closed terminal is an end of input too.
                Ok(0) | Err(_) => {
                    input = false;
                    session.queue_end_of_input()?;
                }
                Ok(size) if how.detachable && tty => {
                    let (input, left) = keys.look(&buffer[..size]);
                    if !input.is_empty() {
                        session.queue_input(&input)?;
                    }
                    if left {
                        return Ok(0);
                    }
                }
                Ok(size) => session.queue_input(&buffer[..size])?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_found_across_reads() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.look(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.look(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.look(b"b"), (b"\x10b".to_vec(), false));
        assert_eq!(keys.look(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.look(b"\x11rest"), (b"".to_vec(), true));
    }

    #[test]
    fn an_env_file_may_have_comments_and_bare_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        std::fs::write(
            &path,
            "# comment\n\nA=1=2\n B= x \nPATH\nNOT_SET_ANYWHERE\n",
        )
        .unwrap();
        let found = variables(std::slice::from_ref(&path), &["A=3".into()]).unwrap();
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(found[..2], [pair("A", "1=2"), pair("B", " x ")]);
        assert_eq!(found[2], pair("PATH", &std::env::var("PATH").unwrap()));
        assert_eq!(found[3..], [pair("A", "3")]);
        std::fs::write(&path, "A=1\nB C=2\n").unwrap();
        let error = variables(&[path], &[]).unwrap_err().to_string();
        assert!(
            error.ends_with(":2: \"B C=2\" is not NAME=VALUE"),
            "{error}"
        );
    }
}
