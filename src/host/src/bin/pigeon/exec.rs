//! `pigeon exec`: what `docker exec` is to a container.

use std::{
    io::{self, IsTerminal, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pigeon::{
    Command, Error, Session,
    session::{Event, MESSAGE},
};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH},
    low_level::pipe,
};

use crate::{CANNOT_START, NOT_FOUND, Target, terminal};

#[derive(Args)]
pub struct Exec {
    #[command(flatten)]
    target: Target,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run as this user: name or number, with a group after a colon if wanted
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Set a variable, or pass on one that is set here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run in this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run it to its end, then print one JSON object: exit_code, exit_signal, stdout, stderr
    #[arg(long, conflicts_with_all = ["interactive", "tty"])]
    json: bool,
    /// With --json: kill the command after this time [default: 30]
    #[arg(long, value_name = "SECONDS", requires = "json")]
    timeout: Option<f64>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

/// `NAME=VALUE`, or `NAME` that is set in this command's own environment.
pub fn variable(text: &str) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.into(), value.into())),
        None => Some((text.into(), std::env::var(text).ok()?)),
    }
}

impl Exec {
    pub fn run(&self) -> Result<u8> {
        let result = if self.json {
            self.run_json()
        } else {
            self.run_session()
        };
        let Err(error) = result else {
            return result;
        };
        match error.downcast_ref::<Error>() {
            Some(Error::NotStarted(why)) => {
                eprintln!("pigeon: {why}");
                let absent = why.contains("ENOENT") || why.contains("not found");
                Ok(if absent { NOT_FOUND } else { CANNOT_START })
            }
            _ => Err(error),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.command.iter().cloned());
        for (name, value) in self.env.iter().filter_map(|text| variable(text)) {
            command = command.env(&name, &value);
        }
        if let Some(user) = &self.user {
            command = command.user(user);
        }
        if let Some(dir) = &self.workdir {
            command = command.dir(dir);
        }
        command
    }

    fn run_json(&self) -> Result<u8> {
        let mut command = self.command();
        if let Some(seconds) = self.timeout {
            let timeout = Duration::try_from_secs_f64(seconds).context("bad --timeout")?;
            command = command.timeout(timeout);
        }
        let output = self.target.client()?.exec(&command)?;
        println!("{}", json!(output));
        Ok(status(match output.exit_code {
            -1 => 128 + output.exit_signal,
            code => code,
        }))
    }

    fn run_session(&self) -> Result<u8> {
        if self.tty && self.interactive && !io::stdin().is_terminal() {
            bail!("standard input is no terminal: leave out -t, or -i");
        }
        let client = self.target.client()?;
        let session = if self.tty {
            client.terminal(&self.command(), terminal::size().unwrap_or((80, 24)))
        } else {
            client.session(&self.command())
        }?;
        let _restore = if self.tty && self.interactive {
            Some(terminal::raw().context("unable to set the terminal up")?)
        } else {
            None
        };
        pass(session, self.interactive, self.tty)
    }
}

/// An exit status of the guest as one of this command.
fn status(number: i32) -> u8 {
    u8::try_from(number & 0xff).expect("a byte")
}

/// Passes input, output and the terminal's size on until the command ends.
fn pass(mut session: Session, interactive: bool, tty: bool) -> Result<u8> {
    let signals = |signals: &[i32]| -> io::Result<(UnixStream, UnixStream)> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        for &signal in signals {
            pipe::register(signal, far.try_clone()?)?;
        }
        Ok((near, far))
    };
    let (mut resized, _open) = signals(if tty { &[SIGWINCH] } else { &[] })?;
    // A terminal has to be put in order before the end.
    let (ended, _open) = signals(if tty {
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
                Event::Output(_, bytes) => {
                    let mut stdout = io::stdout().lock();
                    let written = stdout.write_all(&bytes).and_then(|()| stdout.flush());
                    written.context("unable to write to standard output")?;
                }
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
        // What is not sent yet comes first.
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
            // Not through the standard library's buffer, which poll(2) knows nothing of.
            match rustix::io::read(stdin.as_fd(), &mut buffer) {
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                // A terminal that has gone, too, is an end.
                Ok(0) | Err(_) => {
                    input = false;
                    session.queue_end_of_input()?;
                }
                Ok(size) => session.queue_input(&buffer[..size])?,
            }
        }
    }
}
