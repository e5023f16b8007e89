//! The commands of calls and sessions, by key.

use super::error::{CallError, refuse_while_held};
use super::exec::Exec;
#[cfg(feature = "files")]
use super::files::Transfer;
#[cfg(feature = "files")]
use super::io::Io;
use super::io::read_body;
use super::process::Process;
use super::session::Session;
use crate::context::{Context, EventSource, NEVER};
use crate::error;
use crate::error::Result;
use crate::sys;
use core::fmt::{self, Write};
use proto::bodies::SessionRequest;
use proto::bytes::SliceWriter;
use proto::http::Status;
use proto::slab::{Key, Slab};
use rustix::process::{Pid, WaitStatus};

/// Maximum number of commands: running ones, and those whose response has not been sent yet.
pub const COMMANDS: usize = 128;

/// All captured output together may take this fraction of the memory: 1/8.
const CAPTURE_PART: u64 = 8;

/// Maximum number of named sessions.
const SESSIONS: usize = 32;

/// How long a named session is kept after its command has exited, in milliseconds.
const ENDED_SESSION_TIMEOUT: u64 = 600_000;

/// How long the processes of a terminal may take to exit after its hang-up, in milliseconds.
const HANG_UP_GRACE: u64 = 500;

/// All commands.
pub struct Commands {
    slab: Slab<Command, COMMANDS>,
    /// Connections to close, whose sessions were taken over or ended.
    replaced: heapless::Vec<Key, SESSIONS>,
    /// Bytes of output that may still be captured.
    pub capture_left: usize,
}

/// A command.
pub struct Command {
    /// The connection that it belongs to.
    owner: Option<Key>,
    /// Abandoned: kept only until its process is reaped.
    is_abandoned: bool,
    /// When it is killed, or removed if it has ended.
    kill_at: u64,
    /// What kind of command it is.
    pub role: Role,
}

/// A kind of command.
pub enum Role {
    /// `POST /v1/exec`, or a helper with one response.
    Exec(Exec),
    /// A session on a WebSocket.
    Session(Session),
    /// A file transfer, which has taken over its connection.
    #[cfg(feature = "files")]
    Transfer(Transfer),
}

impl Commands {
    /// No commands.
    pub const fn new() -> Self {
        Self {
            slab: Slab::new(),
            replaced: heapless::Vec::new(),
            capture_left: 0,
        }
    }

    /// Determines how much memory there is for output.
    pub fn measure_memory(&mut self) {
        let info = rustix::system::sysinfo();
        let memory = info.totalram.saturating_mul(u64::from(info.mem_unit));
        self.capture_left = usize::try_from(memory / CAPTURE_PART).unwrap_or(usize::MAX);
    }

    /// Adds a command with one response.
    pub fn insert_exec(&mut self, exec: Exec, owner: Key) -> Result<Key, CallError> {
        self.insert(owner, Role::Exec(exec))
    }

    /// Starts the command of a session's first message, or attaches to a named session.
    pub fn start_session(
        &mut self,
        message: &mut [u8],
        owner: Key,
        context: &mut Context,
    ) -> Result<Key, CallError> {
        refuse_while_held(context)?;
        context.with_arena(|memory, context| {
            let mut request = SessionRequest::default();
            read_body(message, memory, &mut request)?;
            let has_name = !request.id.is_empty() || !request.attach.is_empty();
            if has_name && cfg!(not(feature = "sessions")) {
                let error = error!("there are no named sessions in this build");
                return Err(CallError::new(Status::NotImplemented, error));
            }
            if !request.attach.is_empty() {
                return self.attach(request.attach, request.streams, owner);
            }
            if !request.id.is_empty() {
                self.admit(request.id)?;
            }
            if self.slab.is_full() {
                return Err(too_many());
            }
            let session = Session::start(&request, context)?;
            self.insert(owner, Role::Session(session))
        })
    }

    /// Checks whether a session of this name can be created.
    fn admit(&self, id: &str) -> Result<(), CallError> {
        if self.find_session(id).is_some() {
            let error = error!("there is a session {id} already");
            return Err(CallError::new(Status::Conflict, error));
        }
        if self.sessions().count() >= SESSIONS {
            let error = error!("there are {SESSIONS} named sessions");
            return Err(CallError::new(Status::ServiceUnavailable, error));
        }
        Ok(())
    }

    /// Attaches to a named session; a client that is attached already is disconnected.
    fn attach(&mut self, id: &str, streams: bool, owner: Key) -> Result<Key, CallError> {
        let key = self.find_session(id).ok_or_else(|| no_session(id))?;
        if let Some(command) = self.slab.get_mut(key) {
            let before = command.owner.replace(owner);
            command.kill_at = NEVER;
            if let Role::Session(session) = &mut command.role {
                session.attach(streams);
            }
            self.note_replaced(before);
        }
        Ok(key)
    }

    fn note_replaced(&mut self, connection: Option<Key>) {
        if let Some(key) = connection {
            // It has room for one connection per named session.
            let _fits = self.replaced.push(key);
        }
    }

    /// Takes the key of a connection to close, whose session was taken over or ended.
    pub fn take_replaced(&mut self) -> Option<Key> {
        self.replaced.pop()
    }

    /// The named sessions.
    fn sessions(&self) -> impl Iterator<Item = (Key, &Command, &Session)> {
        self.slab
            .iter()
            .filter_map(|(key, command)| match &command.role {
                Role::Session(session) if session.is_named() && !command.is_abandoned => {
                    Some((key, command, session))
                }
                _ => None,
            })
    }

    fn find_session(&self, id: &str) -> Option<Key> {
        self.sessions()
            .find(|(_, _, session)| session.id() == Some(id))
            .map(|(key, _, _)| key)
    }

    /// Writes the list of named sessions as JSON, at most some 16 KiB.
    pub fn list_sessions(&self, list: &mut SliceWriter) -> fmt::Result {
        let mut separator = "";
        list.write_str("[")?;
        for (_, command, session) in self.sessions() {
            list.write_str(separator)?;
            session.describe(command.owner.is_some(), list)?;
            separator = ",";
        }
        list.write_str("]")
    }

    /// Ends a named session: hangs up its terminal, and kills processes that do not exit.
    pub fn end_session(&mut self, id: &str, now: u64) -> Result<(), CallError> {
        let key = self.find_session(id).ok_or_else(|| no_session(id))?;
        if let Some(command) = self.slab.get_mut(key) {
            let owner = command.owner;
            self.note_replaced(owner);
        }
        self.abandon(key, now);
        Ok(())
    }

    /// Starts a child that takes over a connection: it reads the rest of the request and responds.
    #[cfg(feature = "files")]
    pub fn start_transfer(
        &mut self,
        io: &mut Io,
        head: usize,
        owner: Key,
        context: &mut Context,
    ) -> Result<Key, CallError> {
        self.check_room(context)?;
        let (socket, received) = io.parts();
        let transfer = Transfer::start(socket, received, head, context)?;
        self.insert(owner, Role::Transfer(transfer))
    }

    /// Checks whether another command can start.
    pub fn check_room(&self, context: &Context) -> Result<(), CallError> {
        refuse_while_held(context)?;
        match self.slab.is_full() {
            true => Err(too_many()),
            false => Ok(()),
        }
    }

    fn insert(&mut self, owner: Key, role: Role) -> Result<Key, CallError> {
        let command = Command {
            owner: Some(owner),
            is_abandoned: false,
            kill_at: NEVER,
            role,
        };
        self.slab.insert(command).ok_or_else(too_many)
    }

    /// The command of a connection's call.
    pub fn exec(&mut self, key: Key) -> Option<(&mut Exec, &mut usize)> {
        match &mut self.slab.get_mut(key)?.role {
            Role::Exec(exec) => Some((exec, &mut self.capture_left)),
            _ => None,
        }
    }

    /// The session of a connection, unless another connection has taken it over.
    pub fn session(&mut self, key: Key, owner: Key) -> Option<&mut Session> {
        let command = self.slab.get_mut(key)?;
        match &mut command.role {
            Role::Session(session) if command.owner == Some(owner) => Some(session),
            _ => None,
        }
    }

    /// Whether a connection's transfer is complete.
    #[cfg(feature = "files")]
    pub fn is_transfer_done(&mut self, key: Key) -> bool {
        match self.slab.get_mut(key).map(|command| &command.role) {
            Some(Role::Transfer(transfer)) => transfer.is_finished(),
            _ => true,
        }
    }

    /// Handles an event of a command's stream. Returns the connection that can proceed.
    pub fn on_event(
        &mut self,
        source: EventSource,
        key: Key,
        context: &mut Context,
    ) -> Option<Key> {
        let command = self.slab.get_mut(key)?;
        match (&mut command.role, command.owner) {
            (Role::Exec(exec), _) => exec.on_output(source, &mut self.capture_left),
            (Role::Session(session), None) => {
                session.keep_output();
                session.watch(key, true, context);
            }
            _ => {}
        }
        command.owner
    }

    /// Handles the exit of a process that may be a command's. Returns the connection that can proceed.
    pub fn on_exit(&mut self, pid: Pid, status: WaitStatus, now: u64) -> Option<Key> {
        let key = self
            .slab
            .iter()
            .find(|(_, command)| command.owns(pid))
            .map(|(key, _)| key)?;
        let command = self.slab.get_mut(key)?;
        if command.is_abandoned {
            // A shell that was hung up may have left processes in its group.
            sys::kill_rest_of_group(pid);
            self.slab.remove(key);
            return None;
        }
        command.process().release_launch();
        match &mut command.role {
            Role::Exec(exec) => exec.process.set_exited(status),
            Role::Session(session) => session.set_exited(status),
            #[cfg(feature = "files")]
            Role::Transfer(transfer) => transfer.process.set_exited(status),
        }
        if command.owner.is_none() {
            command.kill_at = now.saturating_add(ENDED_SESSION_TIMEOUT);
        }
        command.owner
    }

    /// Detaches a connection from its command. A named session is kept until a client has read its exit
    /// status; any other command is killed.
    pub fn disconnect(&mut self, key: Key, owner: Key, context: &Context) {
        let Some(command) = self.slab.get_mut(key) else {
            return;
        };
        if command.owner != Some(owner) {
            // Another connection has taken it over.
            return;
        }
        match &mut command.role {
            Role::Session(session) if session.is_named() => {
                command.owner = None;
                if session.process.status().is_some() {
                    command.kill_at = context.now.saturating_add(ENDED_SESSION_TIMEOUT);
                }
                session.detach();
                session.keep_output();
                session.watch(key, true, context);
            }
            _ => self.abandon(key, context.now),
        }
    }

    /// Ends a command that is no longer needed. If it still runs, it is killed, on a terminal some time after
    /// the hang-up; it keeps its slot until it is reaped.
    fn abandon(&mut self, key: Key, now: u64) {
        let Some(command) = self.slab.get_mut(key) else {
            return;
        };
        let after_grace = now.saturating_add(HANG_UP_GRACE);
        let (is_running, kill_at) = match &mut command.role {
            Role::Exec(exec) => {
                self.capture_left += exec.captured();
                exec.release();
                (exec.process.is_running(), exec.abandoned_deadline(now))
            }
            Role::Session(session) => match session.hang_up() {
                true => (session.process.is_running(), after_grace),
                false => (session.process.is_running(), now),
            },
            // Its connection was shut down, which makes it exit.
            #[cfg(feature = "files")]
            Role::Transfer(transfer) => (transfer.process.is_running(), after_grace),
        };
        if !is_running {
            self.slab.remove(key);
            return;
        }
        command.owner = None;
        command.is_abandoned = true;
        command.kill_at = kill_at;
        self.kill_overdue(now);
    }

    /// Kills the commands whose deadline has passed.
    fn kill_overdue(&mut self, now: u64) {
        for index in 0..self.slab.used() {
            if let Some(key) = self.slab.key_at(index)
                && let Some(command) = self.slab.get_mut(key)
                && command.kill_at <= now
            {
                command.kill_at = NEVER;
                if !command.is_abandoned {
                    // A session that has ended and was never attached to again.
                    self.slab.remove(key);
                    continue;
                }
                command.process().kill();
            }
        }
    }

    /// The next deadline.
    pub fn deadline(&self) -> u64 {
        let commands = self.slab.iter();
        commands.fold(NEVER, |first, (_, command)| first.min(command.deadline()))
    }

    /// Handles the deadline of the command at `index`. Returns the connection that can proceed.
    pub fn run_timers(&mut self, now: u64, index: usize) -> Option<Key> {
        let key = self.slab.key_at(index)?;
        let command = self.slab.get_mut(key)?;
        command.process().release_launch();
        if command.deadline() > now {
            return None;
        }
        if command.owner.is_none() {
            self.kill_overdue(now);
            return None;
        }
        match &mut command.role {
            Role::Exec(exec) => exec.expire(now),
            Role::Session(_) => {}
            #[cfg(feature = "files")]
            Role::Transfer(transfer) => transfer.check_progress(now),
        }
        command.owner
    }

    /// Registers again for the output of sessions without a client.
    pub fn watch(&mut self, context: &Context) {
        for index in 0..self.slab.used() {
            if let Some(key) = self.slab.key_at(index)
                && let Some(Command {
                    owner: None,
                    role: Role::Session(session),
                    ..
                }) = self.slab.get_mut(key)
            {
                session.watch(key, true, context);
            }
        }
    }

    /// The key of a command, by its index.
    pub fn key_at(&self, index: usize) -> Option<Key> {
        self.slab.key_at(index)
    }

    /// The range of indexes for [`run_timers`](Self::run_timers).
    pub fn used(&self) -> usize {
        self.slab.used()
    }

    /// Frees the memory that many commands at the same time have used.
    pub fn free_unused(&mut self) {
        sys::free_unused(self.slab.shrink());
    }
}

impl Command {
    fn process(&mut self) -> &mut Process {
        match &mut self.role {
            Role::Exec(exec) => &mut exec.process,
            Role::Session(session) => &mut session.process,
            #[cfg(feature = "files")]
            Role::Transfer(transfer) => &mut transfer.process,
        }
    }

    fn owns(&self, pid: Pid) -> bool {
        match &self.role {
            Role::Exec(exec) => exec.process.has_pid(pid),
            Role::Session(session) => session.process.has_pid(pid),
            #[cfg(feature = "files")]
            Role::Transfer(transfer) => transfer.process.has_pid(pid),
        }
    }

    fn deadline(&self) -> u64 {
        match (&self.role, self.owner) {
            // One that is finished waits for its connection.
            (Role::Exec(exec), Some(_)) if !exec.is_finished() => exec.deadline,
            #[cfg(feature = "files")]
            (Role::Transfer(transfer), Some(_)) if !transfer.is_finished() => transfer.deadline,
            _ => self.kill_at,
        }
    }
}

fn no_session(id: &str) -> CallError {
    CallError::new(Status::NotFound, error!("there is no session {id}"))
}

fn too_many() -> CallError {
    CallError::new(Status::ServiceUnavailable, error!("too many commands"))
}
