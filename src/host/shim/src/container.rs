//! A container: a VM, or a pod's sandbox, which runs nothing.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{self, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use containerd_shim_protos::{
    api::Mount,
    cgroups_v2::metrics::Metrics,
    events::task::{TaskExit, TaskOOM},
    topics,
};
use pigeon::{
    Client, Error as ApiError,
    files::WriteOptions,
    kill::{Sent, Target},
};

use crate::{
    events::{Publisher, timestamp},
    log, metrics,
    process::{Process, SIGKILL, Stage, Taken},
    service::{Failure, lock},
    spec::{self, Plan},
    stdio::Stdio,
    user,
    vm::{self, Vm},
};

/// Exit status after SIGKILL, as in a shell.
pub const KILLED: u32 = 128 + SIGKILL as u32;
/// How long a VM may take to end after a signal has killed its process.
const ENDING: Duration = Duration::from_secs(2);
/// How long a container may take to exit on SIGKILL before its VM is killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a signal waits for a starting process.
const STARTING: Duration = Duration::from_secs(10);
/// Signals that are ignored by default, and those that stop a process (signal(7)): SIGCHLD, SIGCONT, SIGURG,
/// SIGWINCH; SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU.
const IGNORED: [u8; 4] = [17, 18, 23, 28];
const STOPPING: [u8; 4] = [19, 20, 21, 22];
/// Maximum size of the guest's /etc/passwd in bytes.
const MAX_USERS: u64 = 4 << 20;

/// The container's name in containerd.
pub struct Name<'a> {
    /// Its id in the namespace.
    pub id: &'a str,
    /// The namespace.
    pub namespace: &'a str,
}

/// A created container.
pub struct Container {
    /// Its id in containerd.
    pub id: String,
    namespace: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its process.
    pub process: Arc<Process>,
    /// Exec processes.
    added: Mutex<BTreeMap<String, Arc<Process>>>,
    /// None for a pod's sandbox.
    vm: Option<Arc<Vm>>,
    /// Files of the host to copy into the VM.
    files: Vec<(PathBuf, String)>,
    added_before: AtomicU32,
    paused: AtomicBool,
}

impl Container {
    /// Makes the root's image and starts the VM, without waiting for its boot.
    pub fn create(
        name: Name,
        bundle: &Path,
        mounts: &[Mount],
        stdio: Stdio,
        dir: &Path,
    ) -> Result<Container> {
        let Name { id, namespace } = name;
        let mut plan = spec::read(bundle, id)?;
        let outputs = stdio.open(id, namespace)?;
        let vm = match plan.is_sandbox {
            true => None,
            false => Some(Container::boot(&mut plan, mounts, dir)?),
        };
        let process = Process::new("", "container".into(), plan.process, stdio, Some(outputs))?;
        Ok(Container {
            id: id.into(),
            namespace: namespace.into(),
            bundle: bundle.into(),
            process: Arc::new(process),
            added: Mutex::new(BTreeMap::new()),
            vm,
            files: plan.files,
            added_before: AtomicU32::new(0),
            paused: AtomicBool::new(false),
        })
    }

    fn boot(plan: &mut Plan, mounts: &[Mount], dir: &Path) -> Result<Arc<Vm>> {
        let root = vm::root(mounts, plan, dir)?;
        Vm::boot(plan, &root, dir)
    }

    /// The pid on the host for its processes: that of the hypervisor or the shim.
    pub fn pid(&self) -> u32 {
        self.vm.as_ref().map_or(std::process::id(), |vm| vm.pid)
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// A process by its exec id, which is empty for the container's own.
    pub fn find(&self, exec_id: &str) -> Result<Arc<Process>, Failure> {
        if exec_id.is_empty() {
            return Ok(self.process.clone());
        }
        let found = lock(&self.added).get(exec_id).cloned();
        found.ok_or_else(|| Failure::NotFound(format!("process {exec_id}")))
    }

    fn running_vm(&self) -> Result<&Arc<Vm>, Failure> {
        let vm = self.vm.as_ref();
        vm.ok_or_else(|| Failure::Unimplemented("nothing runs in a pod's sandbox".into()))
    }

    /// Adds an exec process, without starting it.
    pub fn add(&self, exec_id: &str, spec: &[u8], stdio: Stdio) -> Result<(), Failure> {
        self.running_vm()?;
        if self.is_paused() {
            return Err(Failure::Precondition("the container is paused".into()));
        }
        let spec: spec::Process = serde_json::from_slice(spec).context("the process")?;
        for warning in spec::check_process(&spec)? {
            log::warn(&warning);
        }
        let number = self.added_before.fetch_add(1, Ordering::SeqCst);
        let process = Process::new(exec_id, format!("exec-{number}"), spec, stdio, None)?;
        let mut added = lock(&self.added);
        if added.contains_key(exec_id) {
            return Err(Failure::AlreadyExists(format!("process {exec_id}")));
        }
        added.insert(exec_id.into(), Arc::new(process));
        Ok(())
    }

    /// Starts a process. Its exit is published only after the returned guard was dropped, so that its start
    /// is published first.
    pub fn start(
        self: &Arc<Container>,
        process: &Arc<Process>,
        publisher: &Arc<Publisher>,
    ) -> Result<Sender<()>, Failure> {
        // A running or starting process is not affected.
        let Some(taken) = process.take() else {
            let text = "a process is started once, and not when it has ended";
            return Err(Failure::Precondition(text.into()));
        };
        let started = match self.is_paused() {
            true => Err(anyhow!("the container is paused")),
            false => self.start_in_vm(process, taken, publisher),
        };
        // Closes its streams, for whose end clients wait.
        if let Err(error) = &started {
            process.fail(&format!("{error:#}"));
            if process.exec_id.is_empty() {
                self.end();
            }
        }
        Ok(started?)
    }

    fn start_in_vm(
        self: &Arc<Container>,
        process: &Arc<Process>,
        taken: Taken,
        publisher: &Arc<Publisher>,
    ) -> Result<Sender<()>> {
        let (announcement, announced) = mpsc::channel();
        let Some(vm) = &self.vm else {
            process.run_nothing(taken);
            return Ok(announcement);
        };
        vm.wait_started().context("unable to boot the VM")?;
        if process.exec_id.is_empty() {
            self.copy_files(vm)?;
        }
        let passwd = read(&vm.client_until(vm.deadline()), "/etc/passwd")?;
        let home = user::home(process.uid(), &passwd);
        let (container, publisher) = (self.clone(), publisher.clone());
        process.start(taken, vm, home, &self.namespace, move |process| {
            // Only dropping the sender ends this.
            let _ = announced.recv();
            container.ended(process, &publisher);
        })?;
        Ok(announcement)
    }

    fn copy_files(&self, vm: &Vm) -> Result<()> {
        for (source, target) in &self.files {
            copy(vm, source, target)
                .with_context(|| format!("unable to copy {} to {target}", source.display()))?;
        }
        Ok(())
    }

    /// Handles the exit of a process; if it is the container's own, all others end.
    fn ended(&self, process: &Process, publisher: &Publisher) {
        if process.exec_id.is_empty() {
            let added: Vec<_> = lock(&self.added).values().cloned().collect();
            for process in added {
                process.expect_end();
                if matches!(process.stage(), Stage::Running(_)) && process.end(KILLED) {
                    self.publish_exit(&process, publisher);
                }
            }
        }
        self.publish_exit(process, publisher);
        if process.exec_id.is_empty()
            && let Some(vm) = &self.vm
        {
            vm.end();
        }
    }

    fn publish_exit(&self, process: &Process, publisher: &Publisher) {
        let Stage::Ended(ended) = process.stage() else {
            return;
        };
        if ended.for_memory {
            let event = TaskOOM {
                container_id: self.id.clone(),
                ..TaskOOM::default()
            };
            publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            log::warn("the guest's OOM killer has ended a process");
        }
        let id = match process.exec_id.as_str() {
            "" => &self.id,
            id => id,
        };
        let event = TaskExit {
            container_id: self.id.clone(),
            id: id.into(),
            pid: self.pid(),
            exit_status: ended.status,
            exited_at: Some(timestamp(ended.at)).into(),
            ..TaskExit::default()
        };
        publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// Sends a signal to a process, or to all processes of the container.
    pub fn kill(
        self: &Arc<Container>,
        process: &Arc<Process>,
        signal: u8,
        all: bool,
        publisher: &Arc<Publisher>,
    ) -> Result<(), Failure> {
        let stage = match self.vm {
            Some(_) => process.wait_started(STARTING),
            // A sandbox's process has no pid to wait for.
            None => process.stage(),
        };
        let pid = match stage {
            Stage::Ended(_) | Stage::Failed(_) => {
                return Err(Failure::NotFound("process already finished".into()));
            }
            // Not started yet, or the VM is booting.
            Stage::Created => {
                if STOPPING.contains(&signal) {
                    let text = "the process was not started".into();
                    return Err(Failure::Precondition(text));
                }
                if is_harmless(signal) || self.end_created(process, signal, publisher) {
                    return Ok(());
                }
                // It was started meanwhile.
                return self.kill(process, signal, all, publisher);
            }
            Stage::Running(_) if process.is_over() => {
                // After a kill, the exit does not wait until the output is read.
                if signal == SIGKILL {
                    process.expect_end();
                }
                return Err(Failure::NotFound("process already finished".into()));
            }
            Stage::Running(pid) => pid,
        };
        let Some(vm) = &self.vm else {
            // As with a pause container; stopping it has no visible effect.
            if !is_harmless(signal)
                && !STOPPING.contains(&signal)
                && process.end(128 + u32::from(signal))
            {
                self.publish_exit(process, publisher);
            }
            return Ok(());
        };
        let is_own = process.exec_id.is_empty();
        if self.is_paused() {
            if signal != SIGKILL || !is_own {
                return Err(Failure::Precondition("the container is paused".into()));
            }
            self.end_now(process, KILLED, publisher);
            return Ok(());
        }
        let target = match (all, pid) {
            (true, _) => Target::All,
            (false, Some(pid)) => Target::Process(pid),
            (false, None) => return Err(Failure::Precondition("the process starts".into())),
        };
        if signal == SIGKILL {
            process.expect_end();
            if is_own {
                self.end_later(process, publisher);
            }
        }
        match vm.signal(target, signal) {
            Ok(Sent::Sent) => Ok(()),
            Ok(Sent::NoProcess) => Err(Failure::NotFound("process already finished".into())),
            // The VM ends with this process, possibly before it responds.
            Err(_) if is_own && (signal == SIGKILL || vm.end_within(ENDING).is_some()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Applies a signal's default action to a process that was not started. False if it was started
    /// meanwhile.
    fn end_created(&self, process: &Process, signal: u8, publisher: &Publisher) -> bool {
        let has_ended = process.end_created(128 + u32::from(signal));
        if has_ended {
            self.ended(process, publisher);
        }
        has_ended
    }

    /// Ends a process immediately, and the VM if the process is the container's own.
    fn end_now(&self, process: &Arc<Process>, status: u32, publisher: &Arc<Publisher>) {
        process.expect_end();
        if process.end(status) {
            self.ended(process, publisher);
        }
    }

    /// The same after a timeout, if the guest has not ended the process.
    fn end_later(self: &Arc<Container>, process: &Arc<Process>, publisher: &Arc<Publisher>) {
        let (container, process) = (self.clone(), process.clone());
        let publisher = publisher.clone();
        thread::spawn(move || {
            thread::sleep(KILL_TIMEOUT);
            if matches!(process.stage(), Stage::Running(_)) {
                log::warn("the guest has not ended its process: the VM is ended");
                container.end_now(&process, KILLED, &publisher);
            }
        });
    }

    /// Removes an exec process.
    pub fn remove(&self, exec_id: &str) {
        lock(&self.added).remove(exec_id);
    }

    /// Ends the VM.
    pub fn end(&self) {
        if let Some(vm) = &self.vm {
            vm.end();
        }
    }

    /// Pauses the VM.
    pub fn pause(&self) -> Result<(), Failure> {
        let vm = self.running_vm()?;
        // A starting process needs the guest, which would not respond.
        if !matches!(self.process.stage(), Stage::Running(Some(_))) {
            return Err(Failure::Precondition("the container does not run".into()));
        }
        vm.pause()?;
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Resumes the VM.
    pub fn resume(&self) -> Result<(), Failure> {
        self.running_vm()?.resume()?;
        self.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Its resource usage.
    pub fn metrics(&self) -> Result<Metrics, Failure> {
        let vm = self.running_vm()?;
        if self.is_paused() {
            return Err(Failure::Precondition("the container is paused".into()));
        }
        let sysinfo = vm
            .client_until(vm.deadline())
            .sysinfo()
            .map_err(anyhow::Error::from)?;
        Ok(metrics::of(&sysinfo))
    }
}

/// Whether a signal has no effect on a process without handlers. (Signal 0 only checks for existence;
/// kill(2).)
fn is_harmless(signal: u8) -> bool {
    signal == 0 || IGNORED.contains(&signal)
}

/// Copies a file with its mode and owner into the guest.
fn copy(vm: &Vm, source: &Path, target: &str) -> Result<()> {
    let mut file = File::open(source)?;
    let found = file.metadata()?;
    let options = WriteOptions {
        mode: Some(found.permissions().mode() & 0o7777),
        user: Some(format!("{}:{}", found.uid(), found.gid())),
    };
    let length = Some(found.len());
    vm.client.write_file(target, &mut file, length, &options)?;
    Ok(())
}

/// Reads a file of the guest; empty if it does not exist.
fn read(client: &Client, path: &str) -> Result<String> {
    match client.read_text(path, MAX_USERS) {
        Err(ApiError::Refused { status: 404, .. }) => Ok(String::new()),
        text => Ok(text?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{process::Ended, soon};
    use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
    use std::{io::Read, os::unix::fs::OpenOptionsExt};

    /// A pod's sandbox without a VM, and a publisher whose events are not delivered.
    fn sandbox(stdio: Stdio) -> (Arc<Container>, Arc<Publisher>) {
        let outputs = stdio.open("pod", "").unwrap();
        let spec = spec::Process::default();
        let process = Process::new("", "container".into(), spec, stdio, Some(outputs));
        let container = Container {
            id: "pod".into(),
            namespace: String::new(),
            bundle: PathBuf::new(),
            process: Arc::new(process.unwrap()),
            added: Mutex::new(BTreeMap::new()),
            vm: None,
            files: vec![],
            added_before: AtomicU32::new(0),
            paused: AtomicBool::new(false),
        };
        let publisher = Publisher::start(String::new(), "");
        (Arc::new(container), Arc::new(publisher))
    }

    /// Standard output in a FIFO, and its reader.
    fn fifo(dir: &Path) -> (Stdio, File) {
        let path = dir.join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32);
        let reader = options.open(&path).unwrap();
        let stdio = Stdio {
            stdout: path.display().to_string(),
            ..Stdio::default()
        };
        (stdio, reader)
    }

    /// Waits until a FIFO has no writer; before that, reading it would block.
    fn has_no_writer(reader: &mut File) -> bool {
        soon(|| matches!(reader.read(&mut [0]), Ok(0)))
    }

    /// A container with a running process, in a VM whose init does not respond.
    fn unresponsive(dir: &Path) -> (Arc<Container>, Arc<Publisher>) {
        let (container, publisher) = sandbox(Stdio::default());
        let mut container = Arc::into_inner(container).unwrap();
        container.vm = Some(vm::tests::unresponsive_vm(dir, REQUEST_TIMEOUT));
        container.process.set_running(7);
        (Arc::new(container), publisher)
    }

    /// The guest's request timeout in these tests.
    const REQUEST_TIMEOUT: Duration = Duration::from_millis(500);
    /// How long a request may take to fail on a busy machine.
    const FAILURE_TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn requests_to_an_unresponsive_guest_fail_in_bounded_time() {
        let dir = tempfile::tempdir().unwrap();
        let (container, publisher) = unresponsive(dir.path());
        let spec = br#"{"args":["/bin/true"],"cwd":"/"}"#;
        container.add("e", spec, Stdio::default()).unwrap();
        let added = container.find("e").unwrap();
        let (sender, results) = mpsc::channel();
        let spawn = |request: &'static str, has_failed: Box<dyn FnOnce() -> bool + Send>| {
            let sender = sender.clone();
            thread::spawn(move || sender.send((request, has_failed())));
        };
        for signal in [15, 1] {
            let (container, publisher) = (container.clone(), publisher.clone());
            spawn(
                "Kill",
                Box::new(move || {
                    let kill = container.kill(&container.process, signal, false, &publisher);
                    kill.is_err()
                }),
            );
        }
        let (own, publisher) = (container.clone(), publisher.clone());
        spawn(
            "Start",
            Box::new(move || own.start(&added, &publisher).is_err()),
        );
        let own = container.clone();
        spawn("Stats", Box::new(move || own.metrics().is_err()));
        for _ in 0..4 {
            let (request, has_failed) = results
                .recv_timeout(FAILURE_TIMEOUT)
                .expect("every request fails in time");
            assert!(has_failed, "{request}");
        }
        assert!(matches!(
            container.find("e").unwrap().stage(),
            Stage::Failed(_)
        ));
        assert_eq!(container.process.stage(), Stage::Running(Some(7)));
    }

    fn is_refused<T>(result: Result<T, Failure>) -> bool {
        matches!(result, Err(Failure::Precondition(_)))
    }

    fn status(process: &Process) -> Option<u32> {
        match process.stage() {
            Stage::Ended(Ended { status, .. }) => Some(status),
            _ => None,
        }
    }

    #[test]
    fn a_second_start_is_refused_and_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (stdio, mut reader) = fifo(dir.path());
        let (pod, publisher) = sandbox(stdio);
        assert!(pod.start(&pod.process, &publisher).is_ok());
        // The output was closed.
        assert!(has_no_writer(&mut reader));
        assert!(is_refused(pod.start(&pod.process, &publisher)));
        pod.paused.store(true, Ordering::SeqCst);
        assert!(is_refused(pod.start(&pod.process, &publisher)));
        assert_eq!(pod.process.stage(), Stage::Running(None));
    }

    #[test]
    fn a_process_killed_before_its_start_never_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (stdio, mut reader) = fifo(dir.path());
        let (pod, publisher) = sandbox(stdio);
        pod.kill(&pod.process, 15, false, &publisher).unwrap();
        assert!(has_no_writer(&mut reader));
        assert!(is_refused(pod.start(&pod.process, &publisher)));
        assert_eq!(status(&pod.process), Some(143));
    }

    #[test]
    fn a_sandbox_exits_on_signals_with_a_default_action() {
        let (pod, publisher) = sandbox(Stdio::default());
        let kill = |signal| pod.kill(&pod.process, signal, false, &publisher);
        for signal in [0].into_iter().chain(IGNORED) {
            kill(signal).unwrap();
            assert_eq!(pod.process.stage(), Stage::Created);
        }
        assert!(STOPPING.into_iter().all(|signal| is_refused(kill(signal))));
        assert_eq!(pod.process.stage(), Stage::Created);
        assert!(pod.start(&pod.process, &publisher).is_ok());
        for signal in [0].into_iter().chain(IGNORED).chain(STOPPING) {
            kill(signal).unwrap();
            assert_eq!(pod.process.stage(), Stage::Running(None));
        }
        kill(34).unwrap();
        assert_eq!(status(&pod.process), Some(162));
        assert!(matches!(kill(0), Err(Failure::NotFound(_))));
    }
}
