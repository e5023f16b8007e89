//! Running a VM: console, output, signals, and the record that outlives it.

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use pigeon::{
    Client, Command, Error, Exit,
    events::{self, Event},
    logs::Frame,
    machine::{End, Machine},
    progress::Progress,
    vsock,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use serde_json::json;
use signal_hook::{
    consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2},
    iterator::Signals,
};

use super::{
    EVENTS_PORT, Held, Run, describe_end,
    document::{Plan, SessionPlan},
    health::HealthCheck,
};
use crate::{
    CANNOT_START, FAILED,
    exec::{Pass, no_program, start_error},
    logs::{filter_console, remove_partial_frame, warn_of_loss},
    output::{exit_code, note, say},
    segments::Writer,
    snapshot, terminal,
    vms::{self, Claim},
    workload,
};

/// Exit code after a kill, as in a shell: 128 + SIGKILL.
const KILLED: u8 = 137;
const TERM: u8 = 15;
/// Signals that are passed on to the workload, like `docker run` does: many programs dump their state or reopen
/// their log, and continue.
const PASSED: [i32; 3] = [SIGQUIT, SIGUSR1, SIGUSR2];
/// Bytes at the end of the console that are searched for a panic.
const TAIL: usize = 16 << 10;
/// Lines at the end of the console that are shown after a failure if the console was not.
const SHOWN_LINES: usize = 15;
/// How long a VM may take to shut down, in addition to its workload's time.
const SHUTDOWN: Duration = Duration::from_secs(10);
/// Maximum size of the recorded events in bytes.
const MAX_EVENT_LOG: u64 = 1 << 20;
/// How often to check whether this process is in the terminal's foreground again.
const BACKGROUND_CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// How often to check for an interrupted snapshot.
const SNAPSHOT_CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a VM may take until its API is up, for a session.
const BOOT: Duration = Duration::from_secs(120);
/// How long the last output may take to arrive after the VM has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

/// The signals that [`Owner::watch`] handles; until then they are pending.
pub fn signals() -> io::Result<Signals> {
    crate::catch(&[&[SIGINT, SIGTERM, SIGHUP, SIGCONT], &PASSED[..]].concat())
}

/// Everything needed to run a VM.
pub struct Owner<'a> {
    /// Declared before `claim`, so that the socket is free once the claim is released.
    pub _reservation: vsock::Reservation,
    pub run: &'a Run,
    pub claim: Arc<Claim>,
    pub plan: Plan,
    pub uds: PathBuf,
}

/// The end of a VM.
struct Ended {
    exit: Option<Exit>,
    end: End,
    killed: bool,
    /// The result of a session that runs instead of the workload.
    session: Option<Result<u8>>,
    console: String,
}

/// Receives the init's events.
pub struct EventLog {
    exit: mpsc::Receiver<Exit>,
    /// None if its path is not available.
    _listener: Option<events::Listener>,
}

/// Pending requests to the VM.
struct Asked {
    exit: mpsc::Receiver<Exit>,
    session: Option<mpsc::Receiver<Result<u8>>>,
}

impl Owner<'_> {
    /// Runs until the VM has ended. Returns the exit code, which `events` may also report.
    pub fn watch(
        &self,
        mut machine: Box<dyn Machine>,
        mut signals: Signals,
        events: EventLog,
        held: Held,
    ) -> Result<u8> {
        let machine = machine.as_mut();
        let child = machine.process().child();
        let (console, keyboard) = (child.stdout.take(), child.stdin.take());
        let shows_console = self.run.shows_console();
        let mut restore = None;
        match keyboard {
            Some(keyboard) if shows_console => pass_keys(keyboard),
            // The pipe stays open for the VM.
            keyboard => std::mem::forget(keyboard),
        }
        let console = console.context("the console is piped")?;
        let shown = match (shows_console, self.run.json) {
            (false, _) => Shown::Nowhere,
            (true, false) => Shown::Stdout,
            (true, true) => Shown::Stderr,
        };
        let file = Writer::new(&self.claim.dir, vms::CONSOLE)?;
        let console = thread::spawn(move || record_console(console, file, shown));
        let over = Arc::new(AtomicBool::new(false));
        let output = self.follow_output(over.clone());

        self.watch_snapshots(over.clone());
        let asked = self.ask();
        let mut session = None;
        // When to kill the VM if it has not ended.
        let mut kill_at: Option<Instant> = None;
        let mut stopping = false;
        let (fallback, use_keys) = mpsc::channel();
        let mut killed = false;
        let status = loop {
            if let Some(status) = machine.process().wait(Duration::from_millis(20))? {
                break status;
            }
            if let Some(receiver) = &asked.session
                && session.is_none()
                && let Ok(result) = receiver.try_recv()
            {
                session = Some(result);
                kill_at.get_or_insert(Instant::now() + SHUTDOWN);
            }
            if shows_console && restore.is_none() && terminal::is_ours() {
                restore = Some(terminal::console().context("unable to set the terminal up")?);
            }
            for signal in signals.pending() {
                match stopping {
                    // After Ctrl-Z the terminal has the shell's mode.
                    _ if signal == SIGCONT => {
                        drop(restore.take());
                    }
                    _ if PASSED.contains(&signal) => self.pass(signal),
                    false => {
                        stopping = true;
                        if shows_console {
                            note!("stopping the VM; once more kills it");
                        }
                        let timeout = self.run.stop_timeout()?;
                        // After a session the VM ends by itself.
                        if session.is_none() {
                            kill_at = Some(Instant::now() + timeout + SHUTDOWN);
                            self.request_stop(timeout, fallback.clone());
                        }
                    }
                    true => kill_at = Some(Instant::now()),
                }
            }
            if use_keys.try_recv().is_ok() {
                let has_keyboard = self.run.guest.arch.has_keyboard();
                if has_keyboard && let Err(error) = machine.ctrl_alt_delete() {
                    note!("{error:#}");
                }
            }
            if kill_at.is_some_and(|at| Instant::now() >= at) && !killed {
                killed = true;
                machine.process().kill();
            }
        };
        drop(held);
        let console = console.join().unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        over.store(true, Ordering::Relaxed);
        let _ = output.recv_timeout(LAST_OUTPUT);
        let end = match machine.end(status) {
            _ if console.contains("Kernel panic - not syncing") => End::Panic,
            end => end,
        };
        if let Some(receiver) = &asked.session
            && session.is_none()
        {
            session = receiver.recv_timeout(LAST_OUTPUT).ok();
        }
        // A response arrives before the VM ends, or not at all.
        let answered = asked.exit.recv_timeout(Duration::from_millis(200)).ok();
        let event = events.exit.try_iter().last();
        drop(events);
        let ended = Ended {
            exit: answered.or(event).or_else(|| logged_exit(&console)),
            end,
            killed,
            session,
            console,
        };
        self.finish(ended)
    }

    /// Starts the requests that wait until the VM is up.
    fn ask(&self) -> Asked {
        if let Some(check) = HealthCheck::of(&self.plan.document) {
            check.start(self.uds.clone(), self.claim.clone());
        }
        Asked {
            exit: ask_exit_code(&self.uds),
            session: self
                .plan
                .session
                .as_ref()
                .map(|plan| self.start_session(plan)),
        }
    }

    /// Records the init's events. An exit event is as reliable as the API's response.
    pub fn listen_for_events(&self) -> EventLog {
        let (sender, exit) = mpsc::channel();
        let path = self.claim.dir.join(vms::EVENTS);
        let claim = self.claim.clone();
        let listening = events::Listener::bind(&self.uds, EVENTS_PORT)
            .and_then(|listener| Ok((listener.acceptor()?, listener)));
        // Events are optional.
        let (acceptor, listener) = match listening {
            Ok(listening) => listening,
            Err(error) => {
                note!("{error:#}");
                return EventLog {
                    exit,
                    _listener: None,
                };
            }
        };
        thread::spawn(move || {
            let mut file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .ok()?;
            // The init connects again after a snapshot.
            loop {
                let mut events = acceptor.accept().ok()?;
                while let Ok(Some(event)) = events.next_event() {
                    let mut line = json!(event);
                    line["time"] = json!(vms::now());
                    // A guest can send any number of events.
                    if file.metadata().is_ok_and(|file| file.len() < MAX_EVENT_LOG) {
                        let _ = writeln!(file, "{line}");
                    }
                    if let Event::Started { .. } = event {
                        let _ = claim.update(|record| record.up = Some(vms::now()));
                    }
                    if let Event::Exited { code, oom_killed } = event {
                        let error = None;
                        let _ = sender.send(Exit {
                            code,
                            oom_killed,
                            error,
                        });
                        return Some(());
                    }
                }
            }
        });
        EventLog {
            exit,
            _listener: Some(listener),
        }
    }

    /// Records the workload's output, and shows it if the console is not shown. The receiver is notified once
    /// all output has arrived.
    fn follow_output(&self, over: Arc<AtomicBool>) -> mpsc::Receiver<()> {
        let (done, receiver) = mpsc::channel();
        let (uds, dir) = (self.uds.clone(), self.claim.dir.clone());
        let shown = self.run.quiet && !self.run.detach && self.plan.session.is_none();
        thread::spawn(move || {
            let file = Writer::append(&dir, vms::OUTPUT, remove_partial_frame);
            let mut file = match file {
                Ok(file) => file,
                Err(error) => {
                    note!("the workload's output: {error:#}");
                    return None;
                }
            };
            let mut is_recorded = true;
            let mut sink = |frame: Frame| {
                // The VM continues if nothing reads the output, or the disk is full.
                let written = file.write(&frame.encode(), frame.bytes.len());
                if let Err(error) = &written
                    && is_recorded
                {
                    note!("unable to keep the output for `pigeon logs`: {error:#}");
                }
                is_recorded = written.is_ok();
                if shown {
                    let _ = show_quietly(&frame);
                }
                anyhow::Ok(())
            };
            let followed = follow(&uds, &over, &mut sink);
            if let Ok(Some(mut seen)) = followed {
                // The rest is on the console, among other messages.
                let is_over = || over.load(Ordering::Relaxed);
                let mut rest = |mut frame: Frame| {
                    let known = frame
                        .bytes
                        .len()
                        .min(usize::try_from(seen).unwrap_or(usize::MAX));
                    frame.bytes.drain(..known);
                    seen -= known as u64;
                    match frame.bytes.is_empty() {
                        true => Ok(()),
                        false => sink(frame),
                    }
                };
                let filtered = filter_console(&dir, is_over, &mut rest);
                if let Err(error) = filtered {
                    note!("{error:#}");
                }
            } else if let Err(error) = followed {
                note!("the workload's output: {error:#}");
            }
            done.send(()).ok()
        });
        receiver
    }

    /// Resumes the VM if a `pigeon snapshot` was killed while the VM was paused.
    fn watch_snapshots(&self, over: Arc<AtomicBool>) {
        let Some(restorable) = self.claim.record().restorable else {
            return;
        };
        let (dir, uds) = (restorable.dir, self.uds.clone());
        thread::spawn(move || {
            let mut has_failed = false;
            while !over.load(Ordering::Relaxed) {
                let resumed = snapshot::resume_orphaned(&dir, &uds);
                match &resumed {
                    Ok(true) => note!("a snapshot was interrupted; the VM was resumed"),
                    Err(error) if !has_failed => note!("unable to resume the VM: {error:#}"),
                    _ => {}
                }
                has_failed = resumed.is_err();
                thread::sleep(SNAPSHOT_CHECK_INTERVAL);
            }
        });
    }

    /// Sends the workload a signal.
    fn pass(&self, signal: i32) {
        let (uds, record) = (self.uds.clone(), self.claim.record());
        thread::spawn(move || {
            let send = || workload::signal(&record, &Client::connect(&uds)?, signal.try_into()?);
            if let Err(error) = send() {
                let signal = pigeon::signal::name(signal);
                note!("unable to send the workload {signal}: {error:#}");
            }
        });
    }

    /// Requests the init to stop the workload; notifies `fallback` if that fails.
    fn request_stop(&self, timeout: Duration, fallback: mpsc::Sender<()>) {
        let (uds, record) = (self.uds.clone(), self.claim.record());
        let has_keyboard = self.run.guest.arch.has_keyboard();
        thread::spawn(move || {
            // This process exits with the VM.
            let wait = |timeout| {
                thread::sleep(timeout);
                false
            };
            let stop = |client: &Client| workload::stop(&record, client, None, timeout, wait);
            let client = Client::connect(&uds).map_err(anyhow::Error::from);
            if client.and_then(|client| stop(&client)).is_ok() {
                return;
            }
            // Ctrl-Alt-Del also works if the init does not have this call, or its API is not up yet.
            let _ = fallback.send(());
            // The request is repeated once the API is up. If the VM has ended meanwhile, nothing is needed.
            let Ok(client) = Client::connect_within(&uds, timeout) else {
                return;
            };
            if stop(&client).is_err() && !has_keyboard {
                let _ = client.signal(TERM);
            }
        });
    }

    /// Runs the real workload as a session, in a thread, and then ends the VM.
    fn start_session(&self, plan: &SessionPlan) -> mpsc::Receiver<Result<u8>> {
        let (sender, receiver) = mpsc::channel();
        let mut command = Command::new(plan.argv.clone());
        if let Some(user) = &plan.user {
            command = command.user(user);
        }
        if let Some(dir) = &plan.workdir {
            command = command.dir(dir);
        }
        let (uds, tty, interactive) = (self.uds.clone(), self.run.tty, self.run.interactive);
        let program = plan.argv.first().cloned().unwrap_or_default();
        let arch = self.run.guest.arch.name();
        thread::spawn(move || {
            let run = || {
                let waiting = Progress::spinner("booting");
                let client = Client::connect_within(&uds, BOOT)?;
                drop(waiting);
                // Signals need its pid, which is listed only for named sessions. An init built without that
                // feature has no list.
                let command = match client.sessions() {
                    Ok(_) => command.id(workload::SESSION),
                    Err(_) => command,
                };
                let session = match tty {
                    true => client.terminal(&command, terminal::size().unwrap_or((80, 24))),
                    false => client.session(&command.separate_stderr()),
                }?;
                Pass {
                    interactive,
                    tty,
                    detachable: false,
                    signals: false,
                }
                .run(session)
            };
            let result = run().or_else(|error| start_error(error, &program, arch));
            let ended = Client::connect(&uds).and_then(|client| client.signal(TERM));
            let _ = sender.send(result);
            drop(ended);
        });
        receiver
    }

    /// Reports and records how the VM has ended.
    fn finish(&self, ended: Ended) -> Result<u8> {
        let Ended {
            exit,
            end,
            killed,
            session,
            console,
        } = ended;
        let good = matches!(end, End::Reboot | End::PowerOff);
        // With a session, the workload is an internal detail.
        let exit = match &session {
            Some(Ok(code)) => Some(Exit {
                code: (*code).into(),
                oom_killed: false,
                error: None,
            }),
            _ => exit,
        };
        let code = match (&exit, &session) {
            _ if killed && !matches!(session, Some(Ok(_))) => KILLED,
            (_, Some(Err(error))) => exit_code(error),
            (_, Some(Ok(code))) => *code,
            (Some(exit), _) if good => u8::try_from(exit.code & 0xff).unwrap_or(FAILED),
            _ => FAILED,
        };
        let name = match end {
            _ if killed => "killed",
            End::Reboot | End::PowerOff => "orderly",
            End::Panic => "panic",
            End::Failed(_) => "hypervisor",
        };
        let recorded = self.claim.update(|record| {
            record.exit = exit.clone();
            record.end = Some(name.into());
            record.exit_code = Some(code);
            record.ended = Some(vms::now());
        });
        let removed = match self.run.rm && !self.claim.restarts() {
            true => self.claim.remove(),
            false => recorded,
        };
        // The exit code is the workload's, even if the disk is full.
        if let Err(error) = removed {
            note!("{error:#}");
        }
        if self.run.json {
            say!("{}", describe_end(exit.as_ref(), name, code))?;
            return Ok(code);
        }
        if let Some(Err(error)) = session
            && !killed
        {
            if !self.run.shows_console() && !good {
                show_console_end(&console);
            }
            return Err(error);
        }
        let unseen = !self.run.shows_console();
        let message = match (&exit, end) {
            _ if killed => "killed".into(),
            (Some(exit), End::Reboot | End::PowerOff) if exit.oom_killed => {
                format!("exit code {}: out of memory (-m gives more)", exit.code)
            }
            (Some(exit), End::Reboot | End::PowerOff) if exit.error.is_some() => {
                let error = exit.error.as_deref().unwrap_or_default();
                format!("the workload could not be started: {error}")
            }
            // If only the output is shown, no message follows it.
            (Some(_), End::Reboot | End::PowerOff) if unseen && code < CANNOT_START - 1 => {
                return Ok(code);
            }
            (Some(exit), End::Reboot | End::PowerOff) if is_no_program(code, &console) => {
                let why = no_program(self.run.guest.arch.name());
                format!("exit code {}: {why}", exit.code)
            }
            (Some(exit), End::Reboot | End::PowerOff) => {
                format!("exit code {}", exit.code)
            }
            (_, End::Panic) => "the guest's kernel panicked: see the console".into(),
            (_, End::Failed(status)) => format!("the hypervisor failed ({status:?})"),
            (None, _) => "the VM ended before its API came up: see the console".into(),
        };
        if unseen && !(good && exit.is_some()) && !killed {
            show_console_end(&console);
        } else if unseen && let Some(line) = complaint(&console) {
            let _ = writeln!(io::stderr(), "{line}");
        }
        note!("{message}");
        Ok(code)
    }
}

/// Errors are ignored by the caller: the output may have no reader.
fn show_quietly(frame: &Frame) -> io::Result<()> {
    match frame.stream {
        pigeon::logs::Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&frame.bytes)?;
            stdout.flush()
        }
        pigeon::logs::Stream::Stderr => io::stderr().write_all(&frame.bytes),
    }
}

/// The init's last warning or error on a console.
fn complaint(console: &str) -> Option<&str> {
    console.lines().rfind(|line| {
        let level = line.strip_prefix("pigeon-init: level=");
        level.is_some_and(|rest| !rest.starts_with("info") && !rest.starts_with("debug"))
    })
}

/// Whether the guest's kernel cannot execute the workload (ENOEXEC).
fn is_no_program(code: u8, console: &str) -> bool {
    code == CANNOT_START && complaint(console).is_some_and(|line| line.contains(": ENOEXEC\""))
}

/// Shows the last lines of a console that was not shown.
fn show_console_end(console: &str) {
    let lines: Vec<_> = console.lines().collect();
    let from = lines.len().saturating_sub(SHOWN_LINES);
    for line in &lines[from..] {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Forwards output until the workload has exited, reconnecting as necessary. If the rest is not available
/// from the init, returns the offset at which it begins.
fn follow(
    uds: &Path,
    over: &AtomicBool,
    sink: &mut impl FnMut(Frame) -> Result<()>,
) -> Result<Option<u64>> {
    let client = Client::new(uds);
    let mut offset = 0;
    while !over.load(Ordering::Relaxed) {
        let mut logs = match client.logs(true, Some(offset)) {
            Ok(logs) => logs,
            Err(Error::Refused {
                status: 404 | 405, ..
            }) => return Ok(Some(offset)),
            Err(_) => {
                thread::sleep(RETRY);
                continue;
            }
        };
        warn_of_loss(offset, logs.offset());
        loop {
            match logs.next_frame() {
                Ok(Some(frame)) => sink(frame)?,
                // The workload has exited, and all output was read.
                Ok(None) if !logs.is_cut() => return Ok(None),
                Ok(None) | Err(_) => break,
            }
            offset = logs.offset();
        }
    }
    Ok(Some(offset))
}

/// Copies standard input to the console until either is closed.
fn pass_keys(mut keyboard: ChildStdin) {
    thread::spawn(move || {
        let stdin = io::stdin();
        let mut buffer = [0; 4096];
        loop {
            // Polled before the read, which would stop this process in the background (&, or Ctrl-Z and bg).
            let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                result if result.is_err() => break,
                _ => {}
            }
            if stdin.is_terminal() && !terminal::is_ours() {
                thread::sleep(BACKGROUND_CHECK_INTERVAL);
                continue;
            }
            // Not through the standard library's buffer, which poll(2) does not see.
            match rustix::io::read(&stdin, &mut buffer) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                Ok(size) if size > 0 && keyboard.write_all(&buffer[..size]).is_ok() => {}
                _ => break,
            }
        }
        // The console stays open after the end of standard input.
        std::mem::forget(keyboard);
    });
}

/// The stream on which a console is shown.
#[derive(Clone, Copy, PartialEq)]
enum Shown {
    Nowhere,
    Stdout,
    Stderr,
}

/// Records the console, shows it, and returns its end.
fn record_console(mut console: ChildStdout, mut file: Writer, shown: Shown) -> Vec<u8> {
    let mut tail = VecDeque::new();
    let mut buffer = [0; 4096];
    while let Ok(size) = console.read(&mut buffer) {
        if size == 0 {
            break;
        }
        let chunk = &buffer[..size];
        // The VM continues if nothing reads the output, or the disk is full.
        let _ = file.write(chunk, size);
        let _ = match shown {
            Shown::Nowhere => Ok(()),
            Shown::Stderr => io::stderr().write_all(chunk),
            Shown::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(chunk).and_then(|()| stdout.flush())
            }
        };
        tail.extend(chunk);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
    tail.into()
}

/// The exit code in the init's log, for a VM that ended before its API was reached.
fn logged_exit(tail: &str) -> Option<Exit> {
    const MESSAGE: &str = "msg=\"workload exited\" ";
    let line = tail
        .lines()
        .rfind(|line| line.starts_with("pigeon-init: level=") && line.contains(MESSAGE))?;
    let value = |key: &str| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(key))
    };
    Some(Exit {
        code: value("exit_code=")?.parse().ok()?,
        oom_killed: value("oom_killed=")? == "true",
        error: None,
    })
}

/// How often a VM that does not respond is polled.
const RETRY: Duration = Duration::from_millis(20);

/// Requests the workload's exit code once the API is up, and waits for it.
fn ask_exit_code(uds: &Path) -> mpsc::Receiver<Exit> {
    let (sender, exit) = mpsc::channel();
    let uds = uds.to_path_buf();
    thread::spawn(move || {
        // The process exits when the VM has ended.
        let forever = Duration::from_secs(u32::MAX.into());
        loop {
            let response =
                Client::connect_within(&uds, forever).and_then(|client| client.exit_code());
            match response {
                Ok(exit) => break drop(sender.send(exit)),
                // The preparation of a snapshot closes connections.
                Err(Error::Broken(_) | Error::TimedOut(_)) => thread::sleep(RETRY),
                Err(_) => break,
            }
        }
    });
    exit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_also_read_from_the_console() {
        let console = "serving\r\npigeon-init: level=info msg=\"workload exited\" exit_code=9 \
                       oom_killed=false uid=0 gid=0\r\n[    8.2] reboot: Restarting system\r\n";
        let exit = logged_exit(console).unwrap();
        assert_eq!((exit.code, exit.oom_killed), (9, false));
        assert_eq!(logged_exit("echo pigeon-init: level=info"), None);
    }
}
