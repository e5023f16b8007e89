//! containerd's task service, for one container.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError},
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed,
        TaskStart,
    },
    topics,
    ttrpc::{Code, Error, TtrpcContext, get_status},
};

use crate::{
    container::{Container, Name},
    events::{Publisher, any, timestamp},
    flags::Flags,
    log,
    process::{Process, Stage},
    stdio::Stdio,
};

/// The result of a call.
type Result<T, E = Error> = std::result::Result<T, E>;

/// How long sending a signal may take if its target has exited.
const KILLS: Duration = Duration::from_secs(5);

/// Locks a mutex; no panic leaves its data inconsistent.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Locks a mutex whose holder may be waiting for the guest. None at the deadline.
pub fn lock_until<T>(mutex: &Mutex<T>, deadline: Instant) -> Option<MutexGuard<'_, T>> {
    const RETRY: Duration = Duration::from_millis(5);
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(TryLockError::WouldBlock) => thread::sleep(RETRY),
        }
    }
}

/// A signal number of Linux, or 0.
fn signal(number: u32) -> Result<u8, Failure> {
    /// SIGRTMAX (signal(7))
    const LAST: u8 = 64;
    let signal = u8::try_from(number).ok().filter(|signal| *signal <= LAST);
    signal.ok_or_else(|| Failure::Invalid(format!("there is no signal {number}")))
}

/// The error of a refused call, with containerd's error codes.
#[derive(Debug)]
pub enum Failure {
    NotFound(String),
    AlreadyExists(String),
    Invalid(String),
    Precondition(String),
    Unimplemented(String),
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Other(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        let (code, text) = match failure {
            Failure::NotFound(text) => (Code::NOT_FOUND, text),
            Failure::AlreadyExists(text) => (Code::ALREADY_EXISTS, text),
            Failure::Invalid(text) => (Code::INVALID_ARGUMENT, text),
            Failure::Precondition(text) => (Code::FAILED_PRECONDITION, text),
            Failure::Unimplemented(text) => (Code::UNIMPLEMENTED, text),
            Failure::Other(error) => (Code::UNKNOWN, format!("{error:#}")),
        };
        Error::RpcStatus(get_status(code, text))
    }
}

/// The service's state.
pub struct Service {
    id: String,
    namespace: String,
    dir: PathBuf,
    /// Sends events.
    pub publisher: Arc<Publisher>,
    container: Mutex<Option<Arc<Container>>>,
    over: Mutex<bool>,
    changed: Condvar,
    /// Number of signals being sent.
    kills: Mutex<usize>,
    sent: Condvar,
}

/// Counts a signal being sent.
struct Kill<'a>(&'a Service);

impl Drop for Kill<'_> {
    fn drop(&mut self) {
        *lock(&self.0.kills) -= 1;
        self.0.sent.notify_all();
    }
}

impl Service {
    /// A service whose container will be created.
    pub fn new(flags: &Flags, dir: &Path, publisher: Publisher) -> Service {
        Service {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            dir: dir.into(),
            publisher: Arc::new(publisher),
            container: Mutex::new(None),
            over: Mutex::new(false),
            changed: Condvar::new(),
            kills: Mutex::new(0),
            sent: Condvar::new(),
        }
    }

    fn begin_kill(&self) -> Kill<'_> {
        *lock(&self.kills) += 1;
        Kill(self)
    }

    /// Waits until all signals were sent: deleting a container that was killed by a signal ends the shim,
    /// possibly before the signal's sender has received its response.
    fn wait_for_kills(&self) {
        let kills = lock(&self.kills);
        let _ = self
            .sent
            .wait_timeout_while(kills, KILLS, |kills| *kills > 0);
    }

    /// Waits for containerd to shut it down.
    pub fn wait(&self) {
        let mut over = lock(&self.over);
        while !*over {
            over = match self.changed.wait(over) {
                Ok(over) => over,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
    }

    fn container(&self) -> Result<Arc<Container>, Failure> {
        let container = lock(&self.container).clone();
        container.ok_or_else(|| Failure::NotFound(format!("container {}", self.id)))
    }

    fn find(&self, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), Failure> {
        let container = self.container()?;
        let process = container.find(exec_id)?;
        Ok((container, process))
    }
}

/// The service for the server.
pub struct Task(pub Arc<Service>);

impl containerd_shim_protos::Task for Task {
    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let service = &self.0;
        if !request.checkpoint.is_empty() {
            let text = "a VM cannot be restored from a checkpoint of runc's".into();
            return Err(Failure::Unimplemented(text).into());
        }
        if lock(&service.container).is_some() {
            return Err(Failure::AlreadyExists(format!("container {}", request.id)).into());
        }
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let bundle = Path::new(&request.bundle);
        let name = Name {
            id: &request.id,
            namespace: &service.namespace,
        };
        let created = Container::create(name, bundle, &request.rootfs, stdio, &service.dir);
        let container = Arc::new(created.map_err(Failure::from)?);
        let pid = container.pid();
        *lock(&service.container) = Some(container);
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        };
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            pid,
            ..TaskCreate::default()
        };
        service
            .publisher
            .publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let publisher = &self.0.publisher;
        let (container, process) = self.0.find(&request.exec_id)?;
        let announcement = container.start(&process, publisher)?;
        let pid = container.pid();
        let container_id = container.id.clone();
        if request.exec_id.is_empty() {
            let event = TaskStart {
                container_id,
                pid,
                ..TaskStart::default()
            };
            publisher.publish(topics::TASK_START_EVENT_TOPIC, &event);
        } else {
            let event = TaskExecStarted {
                container_id,
                exec_id: request.exec_id,
                pid,
                ..TaskExecStarted::default()
            };
            publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
        drop(announcement);
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let container = self.0.container()?;
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        container.add(&request.exec_id, &request.spec.value, stdio)?;
        let event = TaskExecAdded {
            container_id: container.id.clone(),
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        };
        let publisher = &self.0.publisher;
        publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let (container, process) = self.0.find(&request.exec_id)?;
        let (status, ended) = match process.stage() {
            Stage::Created => (Status::CREATED, None),
            Stage::Running(_) if container.is_paused() => (Status::PAUSED, None),
            Stage::Running(_) => (Status::RUNNING, None),
            Stage::Failed(_) => (Status::STOPPED, Some(process.wait())),
            Stage::Ended(ended) => (Status::STOPPED, Some(ended)),
        };
        let stdio = &process.stdio;
        Ok(StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: container.pid(),
            status: status.into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: ended.map(|ended| timestamp(ended.at)).into(),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let (_, process) = self.0.find(&request.exec_id)?;
        let ended = process.wait();
        Ok(WaitResponse {
            exit_status: ended.status,
            exited_at: Some(timestamp(ended.at)).into(),
            ..WaitResponse::default()
        })
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let (container, process) = self.0.find(&request.exec_id)?;
        let _kill = self.0.begin_kill();
        let signal = signal(request.signal)?;
        container.kill(&process, signal, request.all, &self.0.publisher)?;
        Ok(Empty::default())
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let (container, process) = self.0.find(&request.exec_id)?;
        if matches!(process.stage(), Stage::Running(_)) {
            return Err(Failure::Precondition("the process runs".into()).into());
        }
        let is_own = request.exec_id.is_empty();
        if is_own {
            container.end();
        }
        process.end(crate::container::KILLED);
        let ended = process.wait();
        process.drain();
        if is_own {
            self.0.wait_for_kills();
            lock(&self.0.container).take();
            let event = TaskDelete {
                container_id: container.id.clone(),
                pid: container.pid(),
                exit_status: ended.status,
                exited_at: Some(timestamp(ended.at)).into(),
                ..TaskDelete::default()
            };
            self.0
                .publisher
                .publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
            // Events must be sent before, as containerd ends the shim when it receives the response.
            self.0.publisher.flush();
        } else {
            container.remove(&request.exec_id);
        }
        Ok(DeleteResponse {
            pid: container.pid(),
            exit_status: ended.status,
            exited_at: Some(timestamp(ended.at)).into(),
            ..DeleteResponse::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, _: PidsRequest) -> Result<PidsResponse> {
        let process = ProcessInfo {
            pid: self.0.container()?.pid(),
            ..ProcessInfo::default()
        };
        Ok(PidsResponse {
            processes: vec![process],
            ..PidsResponse::default()
        })
    }

    fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Result<Empty> {
        let container = self.0.container()?;
        container.pause()?;
        let event = TaskPaused {
            container_id: container.id.clone(),
            ..TaskPaused::default()
        };
        self.0
            .publisher
            .publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Result<Empty> {
        let container = self.0.container()?;
        container.resume()?;
        let event = TaskResumed {
            container_id: container.id.clone(),
            ..TaskResumed::default()
        };
        self.0
            .publisher
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let (_, process) = self.0.find(&request.exec_id)?;
        process.resize(request.width, request.height);
        Ok(Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let (_, process) = self.0.find(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(Empty::default())
    }

    fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> Result<StatsResponse> {
        let metrics = self.0.container()?.metrics()?;
        Ok(StatsResponse {
            stats: Some(any(&metrics).map_err(Failure::from)?).into(),
            ..StatsResponse::default()
        })
    }

    fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> Result<Empty> {
        let text = "update: a VM keeps the memory and processors that it was started with";
        Err(Failure::Unimplemented(text.into()).into())
    }

    fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        let text = "checkpoint: a VM has snapshots of its own kind, which containerd does not know";
        Err(Failure::Unimplemented(text.into()).into())
    }

    fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Result<ConnectResponse> {
        let container = self.0.container();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.map_or(0, |container| container.pid()),
            version: env!("CARGO_PKG_VERSION").into(),
            ..ConnectResponse::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        // It is called again after the container was deleted.
        if lock(&self.0.container).is_none() || request.now {
            log::write("debug", "shutting down");
            *lock(&self.0.over) = true;
            self.0.changed.notify_all();
        }
        Ok(Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_signals_are_refused() {
        assert_eq!([0, 9, 64].map(|number| signal(number).unwrap()), [0, 9, 64]);
        for number in [65, 255, 256 + 9, u32::MAX] {
            assert!(matches!(signal(number), Err(Failure::Invalid(_))));
        }
    }
}
