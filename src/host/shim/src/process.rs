//! A process of a container, its own or an exec process, as a session in the VM. A thread copies its streams.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, bail, ensure};
use pigeon::{
    Arch, Command, Error, Session,
    files::{FileInfo, WriteOptions},
    logs::Stream,
    session::{Event, MESSAGE},
};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    container::KILLED,
    launch, log, logger,
    service::{lock, lock_until},
    spec,
    stdio::{Input, Output, Outputs, Stdio},
    vm::Vm,
};

/// Bytes of output buffered for a reader before the process blocks.
const PENDING: usize = 1 << 20;
/// The same once the process was killed: its exit is reported after its output.
const PENDING_KILLED: usize = 32 << 20;
/// How long a client may take to read the last output after the process has exited, and after its deletion.
const DRAIN: Duration = Duration::from_secs(2);
/// Interval of polling for that.
const RETRY: Duration = Duration::from_millis(2);
/// How long a VM may take to end after it has closed a session.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// How long the kernel's last message may take to arrive from the guest's console.
const CONSOLE: Duration = Duration::from_millis(300);
/// The error if the process is killed during its start.
const KILLED_EARLY: &str = "it was killed while it started";
/// SIGKILL
pub const SIGKILL: u8 = 9;

/// The exit of a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// Its exit code, or 128 and the signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// Whether the guest's kernel killed it because memory ran out.
    pub for_memory: bool,
}

impl Ended {
    fn now(status: u32) -> Ended {
        Ended {
            status,
            at: SystemTime::now(),
            for_memory: false,
        }
    }
}

/// The stage of a process.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// It was not started.
    Created,
    /// It runs; the pid in the guest is set once it is known.
    Running(Option<u32>),
    /// It could not be started.
    Failed(String),
    /// It has exited.
    Ended(Ended),
}

enum Request {
    Resize(u16, u16),
    CloseInput,
}

/// Resources for starting a process, which can be taken once.
pub struct Taken {
    /// None if it is opened at the start.
    outputs: Option<Outputs>,
    requests: Receiver<Request>,
    woken: io::PipeReader,
}

/// A process.
pub struct Process {
    /// The exec id in containerd; empty for the container's own process.
    pub exec_id: String,
    /// Its session's name.
    session: String,
    spec: spec::Process,
    /// Where its streams are.
    pub stdio: Stdio,
    stage: Mutex<Stage>,
    changed: Condvar,
    requests: Mutex<(Sender<Request>, io::PipeWriter)>,
    /// Resources for its start, until that.
    taken: Mutex<Option<Taken>>,
    /// The exit of its program, which is reported once its output was read.
    over: OnceLock<Ended>,
    /// Whether SIGKILL was sent to it.
    killed: Mutex<bool>,
    /// Whether its streams are finished.
    drained: Mutex<bool>,
    has_drained: Condvar,
}

impl Process {
    /// Creates a process without starting it. If there are no outputs, the start opens them.
    pub fn new(
        exec_id: &str,
        session: String,
        spec: spec::Process,
        stdio: Stdio,
        outputs: Option<Outputs>,
    ) -> Result<Process> {
        let (sender, requests) = mpsc::channel();
        let (wake, woken) = io::pipe().map(|(reader, writer)| (writer, reader))?;
        Ok(Process {
            exec_id: exec_id.into(),
            session,
            spec,
            stdio,
            stage: Mutex::new(Stage::Created),
            changed: Condvar::new(),
            requests: Mutex::new((sender, wake)),
            taken: Mutex::new(Some(Taken {
                outputs,
                requests,
                woken,
            })),
            over: OnceLock::new(),
            killed: Mutex::new(false),
            drained: Mutex::new(false),
            has_drained: Condvar::new(),
        })
    }

    /// Its current stage.
    pub fn stage(&self) -> Stage {
        lock(&self.stage).clone()
    }

    /// Its user id.
    pub fn uid(&self) -> u32 {
        self.spec.user.uid
    }

    /// Takes the resources for its start; None if it was started or has ended before.
    pub fn take(&self) -> Option<Taken> {
        lock(&self.taken).take()
    }

    /// Enters the running stage without a program.
    pub fn run_nothing(&self, taken: Taken) {
        drop(taken);
        self.enter(Stage::Running(None));
        *lock(&self.drained) = true;
    }

    /// Simulates a running process of a guest.
    #[cfg(test)]
    pub fn set_running(&self, pid: u32) {
        self.take();
        self.enter(Stage::Running(Some(pid)));
    }

    /// Enters a stage, unless the process has ended. Returns whether it did.
    fn enter(&self, stage: Stage) -> bool {
        let mut current = lock(&self.stage);
        if matches!(*current, Stage::Ended(_) | Stage::Failed(_)) {
            return false;
        }
        *current = stage;
        self.changed.notify_all();
        true
    }

    /// Marks it as failed to start, and closes its streams.
    pub fn fail(&self, why: &str) {
        self.enter(Stage::Failed(why.into()));
        self.take();
        *lock(&self.drained) = true;
        self.has_drained.notify_all();
        self.wake();
    }

    /// Whether its program has exited, even if that was not reported yet.
    pub fn is_over(&self) -> bool {
        self.over.get().is_some()
    }

    fn set_over(&self, ended: Ended) {
        let _stage = lock(&self.stage);
        let _ = self.over.set(ended);
        self.changed.notify_all();
    }

    /// Waits until its start has completed.
    pub fn wait_started(&self, timeout: Duration) -> Stage {
        let deadline = Instant::now() + timeout;
        let mut stage = lock(&self.stage);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if *stage != Stage::Running(None) || self.is_over() || left.is_zero() {
                return stage.clone();
            }
            stage = match self.changed.wait_timeout(stage, left) {
                Ok((stage, _)) => stage,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Marks it as ended, with the exit of its program if that is known. False if it had ended before.
    pub fn end(&self, status: u32) -> bool {
        let ended = self.over.get().copied();
        self.enter(Stage::Ended(ended.unwrap_or(Ended::now(status))))
    }

    /// The same for a process that was not started; closes its streams. A concurrent start fails.
    pub fn end_created(&self, status: u32) -> bool {
        {
            let mut stage = lock(&self.stage);
            if *stage != Stage::Created {
                return false;
            }
            *stage = Stage::Ended(Ended::now(status));
            self.changed.notify_all();
        }
        if self.take().is_some() {
            *lock(&self.drained) = true;
        }
        true
    }

    /// Waits for its exit.
    pub fn wait(&self) -> Ended {
        let mut stage = lock(&self.stage);
        loop {
            match &*stage {
                Stage::Ended(ended) => return *ended,
                Stage::Failed(_) => return Ended::now(KILLED),
                _ => {}
            }
            stage = match self.changed.wait(stage) {
                Ok(stage) => stage,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
    }

    /// Waits until its output was read, up to a time limit, after which it is discarded. A logger, unlike a
    /// client, cannot just disappear, so its limit is longer.
    pub fn drain(&self) {
        let deadline = Instant::now()
            + match self.stdio.stdout.starts_with("binary://") {
                true => logger::TIMEOUT,
                false => DRAIN,
            };
        // It was never started.
        if self.take().is_some() {
            return;
        }
        let mut drained = lock(&self.drained);
        while !*drained {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Observed by the thread.
                *drained = true;
                break;
            }
            drained = match self.has_drained.wait_timeout(drained, left) {
                Ok((drained, _)) => drained,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        drop(drained);
        self.wake();
    }

    fn request(&self, request: Request) {
        let _ = lock(&self.requests).0.send(request);
        self.wake();
    }

    fn wake(&self) {
        let _ = lock(&self.requests).1.write(&[0]);
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, columns: u32, rows: u32) {
        let size = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        self.request(Request::Resize(size(columns), size(rows)));
    }

    /// Ends its input once clients have closed it.
    pub fn close_input(&self) {
        self.request(Request::CloseInput);
    }

    /// Records that SIGKILL is sent to it.
    pub fn expect_end(&self) {
        *lock(&self.killed) = true;
        self.wake();
    }

    /// Starts it with the taken resources; `at_end` is called after its exit. `home` is that of its user.
    pub fn start(
        self: &Arc<Process>,
        taken: Taken,
        vm: &Arc<Vm>,
        home: &str,
        namespace: &str,
        at_end: impl FnOnce(&Process) + Send + 'static,
    ) -> Result<()> {
        let Outputs { files, logger } = match taken.outputs {
            Some(outputs) => outputs,
            None => self.stdio.open(&self.exec_id, namespace)?,
        };
        let input = Input::open(&self.stdio.stdin)?;
        let is_own = self.exec_id.is_empty();
        // The launcher makes the root read-only, for the container's own process: until then files are copied
        // to it.
        let read_only = vm.read_only && is_own;
        let program = launch::program(&self.spec, home, Arch::HOST, is_own, read_only)?;
        let deadline = vm.deadline();
        let _one_at_a_time = lock_until(&vm.launches, deadline);
        ensure!(_one_at_a_time.is_some(), "the guest does not respond");
        let client = vm.client_until(deadline);
        ensure!(self.stage() == Stage::Created, KILLED_EARLY);
        let options = WriteOptions {
            mode: Some(0o700),
            user: None,
        };
        let length = program.len() as u64;
        client.write_file(
            launch::PATH,
            &mut program.as_slice(),
            Some(length),
            &options,
        )?;
        // Checked now, as it removes itself.
        let launcher = client.file_info(launch::PATH)?;
        let init = vm.init(&client)?;
        let command = Command::new([launch::PATH]).id(&self.session).dir("/");
        let mut session = match self.stdio.terminal {
            true => {
                let size = self.spec.console_size.unwrap_or_default();
                client.terminal(&command, (size.width, size.height))
            }
            false => client.session(&command.separate_stderr()),
        }?;
        if input.is_none() && !self.stdio.terminal {
            session.end_input()?;
        }
        if !self.enter(Stage::Running(None)) {
            self.end_session(vm);
            bail!(KILLED_EARLY);
        }
        let mut streams = Streams {
            process: self.clone(),
            vm: vm.clone(),
            session,
            input,
            outputs: files,
            requests: taken.requests,
            woken: File::from(std::os::fd::OwnedFd::from(taken.woken)),
        };
        thread::spawn(move || {
            let stage = streams.run();
            let failed = matches!(stage, Stage::Failed(_));
            if streams.process.enter(stage) && !failed {
                at_end(&streams.process);
            }
            // The client may still be reading, until it sees the end of the streams.
            let process = streams.process.clone();
            if !failed {
                streams.deliver(|process| *lock(&process.drained));
            }
            drop(streams);
            if let Some(logger) = logger {
                logger.finish();
            }
            *lock(&process.drained) = true;
            process.has_drained.notify_all();
        });
        self.confirm_start(vm, deadline, [init, &launcher])
    }

    /// Waits until it has executed its program: before that, its executable is one of `pre_exec`, the init
    /// that forked it or the launcher.
    fn confirm_start(&self, vm: &Vm, deadline: Instant, pre_exec: [&FileInfo; 2]) -> Result<()> {
        let client = vm.client_until(deadline);
        loop {
            match self.stage() {
                Stage::Failed(why) => bail!("{why}"),
                Stage::Ended(_) | Stage::Running(Some(_)) => return Ok(()),
                Stage::Running(None) if self.is_over() => return Ok(()),
                Stage::Created | Stage::Running(None) => {}
            }
            let sessions = client.sessions().unwrap_or_default();
            let mut sessions = sessions.into_iter();
            let session = sessions.find(|session| session.id == self.session);
            if let Some(pid) = session.and_then(|session| session.pid) {
                let program = client.file_info(&format!("/proc/{pid}/exe"));
                if program.is_ok_and(|program| !pre_exec.contains(&&program)) {
                    self.enter(Stage::Running(Some(pid)));
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                let why = "it has not started in time";
                self.fail(why);
                self.end_session(vm);
                bail!(why);
            }
            thread::sleep(RETRY);
        }
    }

    /// Ends an exec process in the guest, where a named session survives its connection. The container's own
    /// ends with the VM.
    fn end_session(&self, vm: &Vm) {
        if !self.exec_id.is_empty()
            && let Err(error) = vm.client_until(vm.deadline()).end_session(&self.session)
        {
            let error = anyhow::Error::from(error);
            log::error(&error.context(format!("unable to end {}", self.session)));
        }
    }
}

/// The streams of a running process.
struct Streams {
    process: Arc<Process>,
    vm: Arc<Vm>,
    session: Session,
    input: Option<Input>,
    outputs: [Output; 2],
    requests: Receiver<Request>,
    woken: File,
}

impl Streams {
    /// Runs until the process has exited and its output was read: a client may disconnect when the exit is
    /// reported, and without a VM in between the exit could not come before the output.
    fn run(&mut self) -> Stage {
        let stage = self.run_to_end();
        if let Stage::Ended(ended) = stage {
            self.process.set_over(ended);
            self.deliver(|process| *lock(&process.killed));
            self.wait_taken();
        }
        stage
    }

    fn run_to_end(&mut self) -> Stage {
        match self.pass() {
            Ok(ended) => {
                if self.process.stage() == Stage::Running(None)
                    && let Some(why) = self.launch_failure(&ended)
                {
                    return Stage::Failed(why);
                }
                let status = u32::try_from(ended.status()).unwrap_or(KILLED);
                let pid = match self.process.stage() {
                    Stage::Running(pid) => pid,
                    _ => None,
                };
                let by_guest = ended.signal == Some(SIGKILL.into()) && !*lock(&self.process.killed);
                let for_memory = by_guest && pid.is_some_and(|pid| self.was_killed_for_memory(pid));
                Stage::Ended(Ended {
                    status,
                    at: SystemTime::now(),
                    for_memory,
                })
            }
            Err(Error::NotStarted(why)) => Stage::Failed(why),
            Err(error) => {
                let why = self.vm.end_within(LAST_WORDS);
                let why = why.unwrap_or_else(|| error.to_string());
                if !*lock(&self.process.killed) {
                    let error = anyhow::anyhow!("{}: {why}", self.process.session);
                    log::error(&error);
                }
                Stage::Ended(Ended::now(KILLED))
            }
        }
    }

    /// Why the process could not execute its program.
    fn launch_failure(&self, ended: &pigeon::session::Ended) -> Option<String> {
        /// Maximum size of the program's message in bytes. Root in the container can replace it.
        const MAX_FAILURE: u64 = 4096;
        let client = self.vm.client_until(self.vm.deadline());
        let what = client.read_text(launch::FAILURE, MAX_FAILURE);
        let what = what.ok()?;
        let errno = ended.code.filter(|_| !what.is_empty())?;
        let error = io::Error::from_raw_os_error(errno);
        Some(format!("{what}: {error}"))
    }

    fn was_killed_for_memory(&self, pid: u32) -> bool {
        let deadline = Instant::now() + CONSOLE;
        loop {
            if self.vm.was_killed_for_memory(pid) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(RETRY);
        }
    }

    fn pass(&mut self) -> Result<pigeon::session::Ended, Error> {
        loop {
            let most = match *lock(&self.process.killed) {
                true => PENDING_KILLED,
                false => PENDING,
            };
            while self.outputs.iter().all(|output| output.pending() < most) {
                match self.session.try_next()? {
                    Some(Event::Output(stream, bytes)) => {
                        let number = usize::from(stream == Stream::Stderr);
                        self.outputs[number].write(&bytes);
                    }
                    Some(Event::Exit(ended)) => return Ok(ended),
                    None => break,
                }
            }
            self.session.flush()?;
            self.wait(most);
            self.outputs.iter_mut().for_each(Output::flush);
            self.handle_requests()?;
            self.pass_input()?;
        }
    }

    /// Waits for events.
    fn wait(&self, most: usize) {
        let mut wanted = PollFlags::empty();
        let takes_output = self.outputs.iter().all(|output| output.pending() < most);
        wanted.set(PollFlags::IN, takes_output);
        wanted.set(PollFlags::OUT, self.session.is_sending());
        let mut descriptors = vec![PollFd::new(&self.woken, PollFlags::IN)];
        if !wanted.is_empty() {
            descriptors.push(PollFd::new(&self.session, wanted));
        }
        if let Some(input) = self.input.as_ref().filter(|_| !self.session.is_sending()) {
            descriptors.push(PollFd::new(input, PollFlags::IN));
        }
        let waiting: Vec<_> = self.outputs.iter().filter_map(Output::waiting).collect();
        for output in &waiting {
            descriptors.push(PollFd::new(output, PollFlags::OUT));
        }
        let _ = poll(&mut descriptors, None);
    }

    fn handle_requests(&mut self) -> Result<(), Error> {
        if is_readable(&self.woken) {
            let _ = self.woken.read(&mut [0; 64]);
        }
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Resize(columns, rows) => self.session.queue_resize(columns, rows)?,
                Request::CloseInput => {
                    if let Some(input) = &mut self.input {
                        input.end();
                    }
                }
            }
        }
        Ok(())
    }

    fn pass_input(&mut self) -> Result<(), Error> {
        if self.session.is_sending() {
            return Ok(());
        }
        let Some(input) = &mut self.input else {
            return Ok(());
        };
        let mut buffer = [0; MESSAGE];
        match input.read(&mut buffer) {
            Ok(None) => Ok(()),
            Ok(Some(size @ 1..)) => self.session.queue_input(&buffer[..size]),
            Ok(Some(0)) | Err(_) => {
                self.input = None;
                self.session.queue_end_of_input()
            }
        }
    }

    /// Writes the remaining output, until `is_over`.
    fn deliver(&mut self, is_over: impl Fn(&Process) -> bool) {
        loop {
            self.outputs.iter_mut().for_each(Output::flush);
            if is_readable(&self.woken) {
                let _ = self.woken.read(&mut [0; 64]);
            }
            let waiting: Vec<_> = self.outputs.iter().filter_map(Output::waiting).collect();
            if waiting.is_empty() || is_over(&self.process) {
                return;
            }
            let mut descriptors = vec![PollFd::new(&self.woken, PollFlags::IN)];
            for output in &waiting {
                descriptors.push(PollFd::new(output, PollFlags::OUT));
            }
            let _ = poll(&mut descriptors, None);
        }
    }

    /// Waits until readers have emptied their FIFOs, up to a time limit, or until the process was killed.
    fn wait_taken(&mut self) {
        let deadline = Instant::now() + DRAIN;
        while !*lock(&self.process.killed)
            && Instant::now() < deadline
            && !self.outputs.iter_mut().all(Output::is_taken)
        {
            thread::sleep(RETRY);
        }
    }
}

fn is_readable(file: &impl AsFd) -> bool {
    let mut descriptors = [PollFd::new(file, PollFlags::IN)];
    poll(&mut descriptors, Some(&rustix::event::Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added() -> Process {
        let (spec, stdio) = (spec::Process::default(), Stdio::default());
        Process::new("e", "exec-0".into(), spec, stdio, None).unwrap()
    }

    #[test]
    fn an_unreported_exit_survives_the_end_of_the_container() {
        let process = added();
        process.run_nothing(process.take().unwrap());
        process.set_over(Ended::now(7));
        assert!(process.end(KILLED));
        assert_eq!(process.wait().status, 7);
    }

    #[test]
    fn a_process_killed_while_it_starts_does_not_run() {
        let process = added();
        let _starts = process.take().unwrap();
        assert!(process.end_created(KILLED) && !process.end_created(KILLED));
        assert!(!process.enter(Stage::Running(None)));
        assert_eq!(process.wait().status, KILLED);
        // A running process cannot be ended as a created one.
        let process = added();
        process.run_nothing(process.take().unwrap());
        assert!(!process.end_created(KILLED));
        assert_eq!(process.stage(), Stage::Running(None));
    }
}
