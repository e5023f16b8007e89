//! All commands, by key: those of a call, and those of a session.

use super::exec::Exec;
use super::io::CallError;
use super::session::Session;
use crate::context::{Context, NEVER, Source};
use crate::error;
use crate::error::Result;
use crate::sys;
use proto::http::{Reply, Status};
use proto::slab::{Key, Slab};
use rustix::process::{Pid, WaitStatus};

/// Most commands at once: those that run, and those whose output is not answered yet.
const COMMANDS: usize = 128;

/// Of the memory, the part that all kept output together may have.
const CAPTURE_PART: u64 = 8;

/// How long the processes of a terminal have to go after its hang-up, in milliseconds.
const HANG_UP_GRACE: u64 = 500;

/// The commands there are.
pub struct Commands {
    slab: Slab<Command, COMMANDS>,
    /// Bytes of output that may be kept in addition to what is kept.
    pub capture_left: usize,
}

/// A command.
pub struct Command {
    /// The connection that it is for; `None`: it is waited for until it is reaped.
    owner: Option<Key>,
    /// When it is killed, as nobody waits for it.
    kill_at: u64,
    /// What it does.
    pub role: Role,
}

/// What a command does.
pub enum Role {
    /// It gives one answer.
    Exec(Exec),
    /// Its streams are a WebSocket's.
    Session(Session),
}

impl Commands {
    /// No commands.
    pub const fn new() -> Self {
        Self {
            slab: Slab::new(),
            capture_left: 0,
        }
    }

    /// Looks at how much memory there is for output.
    pub fn measure_memory(&mut self) {
        let info = rustix::system::sysinfo();
        let memory = info.totalram.saturating_mul(u64::from(info.mem_unit));
        self.capture_left = usize::try_from(memory / CAPTURE_PART).unwrap_or(usize::MAX);
    }

    /// Starts what the body of a request asks for.
    pub fn start_exec(
        &mut self,
        body: &mut [u8],
        reply: Reply,
        owner: Key,
        context: &mut Context,
    ) -> Result<Key, CallError> {
        self.check_room()?;
        self.insert(owner, Role::Exec(Exec::start(body, reply, context)?))
    }

    /// Starts what the first message of a session asks for.
    pub fn start_session(
        &mut self,
        message: &mut [u8],
        owner: Key,
        context: &mut Context,
    ) -> Result<Key, CallError> {
        self.check_room()?;
        self.insert(owner, Role::Session(Session::start(message, context)?))
    }

    fn check_room(&self) -> Result<(), CallError> {
        match self.slab.is_full() {
            true => Err(too_many()),
            false => Ok(()),
        }
    }

    fn insert(&mut self, owner: Key, role: Role) -> Result<Key, CallError> {
        let command = Command {
            owner: Some(owner),
            kill_at: NEVER,
            role,
        };
        self.slab.insert(command).ok_or_else(too_many)
    }

    /// The command of a connection's call.
    pub fn exec(&mut self, key: Key) -> Option<(&mut Exec, &mut usize)> {
        match &mut self.slab.get_mut(key)?.role {
            Role::Exec(exec) => Some((exec, &mut self.capture_left)),
            Role::Session(_) => None,
        }
    }

    /// The command of a connection's session.
    pub fn session(&mut self, key: Key) -> Option<&mut Session> {
        match &mut self.slab.get_mut(key)?.role {
            Role::Session(session) => Some(session),
            Role::Exec(_) => None,
        }
    }

    /// One of a command's streams can be read or written. The connection that can go on.
    pub fn on_event(&mut self, source: Source, key: Key, context: &mut Context) -> Option<Key> {
        let command = self.slab.get_mut(key)?;
        if let Role::Exec(exec) = &mut command.role {
            exec.on_output(source, &mut self.capture_left, context);
        }
        command.owner
    }

    /// A process was reaped; it may be a command's. The connection that can go on.
    pub fn on_exit(&mut self, pid: Pid, status: WaitStatus) -> Option<Key> {
        let key = self
            .slab
            .iter()
            .find(|(_, command)| command.owns(pid))
            .map(|(key, _)| key)?;
        let command = self.slab.get_mut(key)?;
        match &mut command.role {
            Role::Exec(exec) => exec.process.ended(status),
            Role::Session(session) => session.ended(status),
        }
        let owner = command.owner;
        if owner.is_none() {
            // What a hung up shell has left in its group goes with it.
            sys::kill_rest_of_group(pid);
            self.slab.remove(key);
        }
        owner
    }

    /// The connection needs its command no more. While it still runs it is killed, a terminal's after
    /// the hang-up; and it counts until it is reaped.
    pub fn release(&mut self, key: Key, now: u64) {
        let Some(command) = self.slab.get_mut(key) else {
            return;
        };
        let (runs, has_terminal) = match &mut command.role {
            Role::Exec(exec) => {
                self.capture_left += exec.kept();
                exec.release();
                (exec.process.runs(), false)
            }
            Role::Session(session) => (session.process.runs(), session.hang_up()),
        };
        if !runs {
            self.slab.remove(key);
            return;
        }
        command.owner = None;
        command.kill_at = match has_terminal {
            true => now.saturating_add(HANG_UP_GRACE),
            false => now,
        };
        self.kill_late(now);
    }

    /// Kills the commands whose time is over.
    fn kill_late(&mut self, now: u64) {
        for index in 0..self.slab.used() {
            if let Some(key) = self.slab.key_at(index)
                && let Some(command) = self.slab.get_mut(key)
                && command.kill_at <= now
            {
                command.kill_at = NEVER;
                match &mut command.role {
                    Role::Exec(exec) => exec.process.kill(),
                    Role::Session(session) => session.process.kill(),
                }
            }
        }
    }

    /// The next time at which something has to be done.
    pub fn deadline(&self) -> u64 {
        let commands = self.slab.iter();
        commands.fold(NEVER, |first, (_, command)| first.min(command.deadline()))
    }

    /// Does what has to be done by now; calls `each` with the connections that can go on.
    pub fn on_time(&mut self, now: u64, index: usize) -> Option<Key> {
        let key = self.slab.key_at(index)?;
        let command = self.slab.get_mut(key)?;
        if command.deadline() > now {
            return None;
        }
        if command.owner.is_none() {
            self.kill_late(now);
            return None;
        }
        if let Role::Exec(exec) = &mut command.role {
            exec.expire(now);
        }
        command.owner
    }

    /// The range of indexes for [`on_time`](Self::on_time).
    pub fn used(&self) -> usize {
        self.slab.used()
    }
}

impl Command {
    fn owns(&self, pid: Pid) -> bool {
        match &self.role {
            Role::Exec(exec) => exec.process.is(pid),
            Role::Session(session) => session.process.is(pid),
        }
    }

    fn deadline(&self) -> u64 {
        match (&self.role, self.owner) {
            // What is over is answered for by its connection.
            (Role::Exec(exec), Some(_)) if !exec.is_over() => exec.deadline,
            _ => self.kill_at,
        }
    }
}

fn too_many() -> CallError {
    CallError::new(Status::ServiceUnavailable, error!("too many commands"))
}
