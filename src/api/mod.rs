//! The API: HTTP/1.1 and WebSocket connections from the host over vsock.
#![cfg_attr(
    not(all(feature = "sessions", feature = "logs")),
    allow(dead_code, reason = "what named sessions and readers of the log need")
)]

mod commands;
mod connection;
mod error;
mod exec;
#[cfg(feature = "files")]
mod files;
mod io;
#[cfg(feature = "logs")]
mod logs;
#[cfg(feature = "mounts")]
mod mounts;
mod process;
mod routes;
mod session;
mod signals;
#[cfg(feature = "snapshot")]
mod snapshot;
mod stop;
#[cfg(feature = "sysinfo")]
mod sysinfo;
#[cfg(feature = "tunnel")]
mod tunnel;

#[cfg(feature = "snapshot")]
pub use {
    connection::PendingCall,
    error::{CallError, not_running, report_error, status_of_exit},
    io::read_body,
    routes::SnapshotCall,
};

use crate::context;
use crate::context::{Context, EventSource, NEVER};
use crate::error::Result;
use crate::sys::epoll::Poller;
use crate::sys::{self, Region, vsock};
use commands::{COMMANDS, Commands};
use connection::{Connection, LONG_CONNECTIONS, Shared};
use io::Io;
use proto::http::NO_ROOM;
use proto::slab::{Key, Slab};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, WaitStatus};

/// The vsock port.
const PORT: u32 = 10_000;
/// Maximum number of connections: those without a time limit, those with a command, and some for other
/// calls. A new one replaces one that waits for its client, or gets a 503.
const CONNECTIONS: usize = LONG_CONNECTIONS + COMMANDS + 32;
/// Backlog of the listener.
const BACKLOG: usize = 128;
/// Most connections accepted in one iteration, so that other events get their turn.
const ACCEPT_AT_ONCE: usize = 16;
/// Time until accepting is retried after a failure, in milliseconds: there is no event for free descriptors
/// or memory, and the pending connection keeps the listener readable.
const ACCEPT_RETRY: u64 = 500;

/// The API's state.
pub struct Api {
    listener: Option<OwnedFd>,
    /// Poller events registered for it.
    listener_watched: EventFlags,
    /// When accepting is retried, after a failure.
    accept_retry: Option<u64>,
    /// The memory of a closed connection that used little of it, for the next one.
    spare: Option<Region>,
    connections: Slab<Connection, CONNECTIONS>,
    commands: Commands,
}

impl Api {
    /// No connection.
    pub const fn new() -> Self {
        Self {
            listener: None,
            listener_watched: EventFlags::empty(),
            accept_retry: None,
            spare: None,
            connections: Slab::new(),
            commands: Commands::new(),
        }
    }

    /// Starts listening; a VM without a vsock device has no API.
    pub fn listen(&mut self) -> Result {
        let listener =
            vsock::listen(PORT, BACKLOG).map_err(context!("listen on vsock port {PORT}"))?;
        self.listener = Some(listener);
        self.commands.measure_memory();
        Ok(())
    }

    /// Waits for connections.
    pub fn watch_listener(&mut self, poller: &Poller) {
        if let Some(listener) = &self.listener {
            let token = EventSource::Listener.token(Key::default());
            let watched = &mut self.listener_watched;
            let wanted = match self.accept_retry {
                None => EventFlags::IN,
                Some(_) => EventFlags::empty(),
            };
            poller.watch(listener, token, watched, wanted);
        }
    }

    /// Whether it is listening.
    pub fn is_up(&self) -> bool {
        self.listener.is_some()
    }

    /// Stops listening and closes all connections; their commands are killed.
    pub fn close(&mut self, context: &mut Context) {
        self.listener = None;
        self.for_each(context, &|_| true, &mut Connection::close);
    }

    /// Accepts at most [`ACCEPT_AT_ONCE`] connections.
    pub fn accept(&mut self, context: &mut Context) {
        for _ in 0..ACCEPT_AT_ONCE {
            match self.accept_one(context) {
                Ok(()) if self.listener.as_ref().is_some_and(vsock::has_pending) => {}
                Ok(()) | Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.accept_retry = Some(context.now + ACCEPT_RETRY);
                    return;
                }
            }
        }
    }

    /// Accepts a pending connection, and reads what its client has already sent.
    fn accept_one(&mut self, context: &mut Context) -> rustix::io::Result<()> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        let (socket, peer) = vsock::accept(listener)?;
        // Only the host may connect, not a process in the VM by its own CID or the local one.
        if peer != vsock::HOST {
            return Ok(());
        }
        let memory = match self.spare.take() {
            _ if self.connections.is_full() && !self.make_room(context) => None,
            None => Io::memory().ok(),
            spare => spare,
        };
        let Some(memory) = memory else {
            // One write, as the connection is closed at once.
            let _client_gone = sys::files::write(&socket, NO_ROOM);
            return Ok(());
        };
        let connection = Connection::new(socket, memory, context.now);
        if let Some(key) = self.connections.insert(connection) {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.set_key(key);
            }
            self.on_event(EventSource::Connection, key, EventFlags::IN, context);
        }
        Ok(())
    }

    /// Closes the connection that has waited longest for its client. Returns whether there was one.
    fn make_room(&mut self, context: &mut Context) -> bool {
        let mut first = (NEVER, None);
        for (key, connection) in self.connections.iter() {
            let since = connection.replaceable_since(context.now);
            if since < first.0 {
                first = (since, Some(key));
            }
        }
        let (_, Some(key)) = first else {
            return false;
        };
        self.with(key, context, &mut Connection::close);
        true
    }

    /// Handles an event of a connection or a command.
    pub fn on_event(
        &mut self,
        source: EventSource,
        key: Key,
        events: EventFlags,
        context: &mut Context,
    ) {
        if source == EventSource::Connection {
            self.with(key, context, &mut |connection, shared| {
                connection.on_socket(events, shared)
            });
        } else if source == EventSource::Tunnel {
            self.proceed(key, context);
        } else if let Some(key) = self.commands.on_event(source, key, context) {
            self.proceed(key, context);
        }
    }

    /// Tries all streams of all commands, after a pending call on one has returned.
    pub fn on_any_output(&mut self, context: &mut Context) {
        for index in 0..self.commands.used() {
            if let Some(key) = self.commands.key_at(index) {
                for source in [EventSource::CommandStdout, EventSource::CommandStderr] {
                    self.on_event(source, key, EventFlags::empty(), context);
                }
            }
        }
    }

    /// Registers again after a failed registration.
    pub fn watch(&mut self, context: &mut Context) {
        self.for_each(context, &|_| true, &mut |_, _| {});
        self.commands.watch(context);
    }

    /// Lets a connection make progress.
    fn proceed(&mut self, key: Key, context: &mut Context) {
        self.with(key, context, &mut Connection::proceed);
    }

    /// Calls `work` on a connection, and closes those whose sessions it has taken over or ended.
    fn with(
        &mut self,
        key: Key,
        context: &mut Context,
        work: &mut dyn FnMut(&mut Connection, &mut Shared),
    ) {
        self.with_one(key, context, work);
        while let Some(key) = self.commands.take_replaced() {
            self.with_one(key, context, &mut Connection::proceed);
        }
    }

    /// Calls `work` on a connection, then removes it if it is closed, or registers its events.
    fn with_one(
        &mut self,
        key: Key,
        context: &mut Context,
        work: &mut dyn FnMut(&mut Connection, &mut Shared),
    ) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let mut shared = Shared {
            commands: &mut self.commands,
            context,
        };
        work(connection, &mut shared);
        if !connection.is_closed() {
            return connection.watch(&mut shared);
        }
        let closed = self.connections.remove(key);
        if let Some(memory) = closed.and_then(Connection::into_reusable_memory) {
            self.spare = Some(memory);
        }
    }

    /// Handles the exit of a process that may be a command's.
    pub fn on_exit(&mut self, pid: Pid, status: WaitStatus, context: &mut Context) {
        if let Some(key) = self.commands.on_exit(pid, status, context.now) {
            self.proceed(key, context);
        }
    }

    /// Responds to the connections that wait for the workload's exit.
    pub fn on_workload_exit(&mut self, context: &mut Context) {
        self.for_each(
            context,
            &Connection::waits_for_exit,
            &mut Connection::proceed,
        );
    }

    /// Sends new output, or its end, to the log's followers.
    pub fn on_output(&mut self, context: &mut Context) {
        if context.log_readers > 0 {
            self.for_each(context, &Connection::reads_log, &mut Connection::proceed);
        }
    }

    /// Keeps in the log what the slowest follower still needs, so that the workload waits for it.
    pub fn protect_log(&mut self, context: &mut Context) {
        let needs = self
            .connections
            .iter()
            .filter_map(|(_, connection)| connection.needs_log());
        let keep = match context.log_readers {
            0 => u64::MAX,
            _ => needs.fold(u64::MAX, u64::min),
        };
        context.output_log.set_keep(keep);
    }

    /// The next deadline.
    pub fn deadline(&self) -> u64 {
        let first = self.accept_retry.unwrap_or(NEVER);
        let connections = self.connections.iter();
        connections.fold(
            first.min(self.commands.deadline()),
            |first, (_, connection)| first.min(connection.deadline),
        )
    }

    /// Handles all expired deadlines.
    pub fn run_timers(&mut self, context: &mut Context) {
        for index in 0..self.commands.used() {
            if let Some(key) = self.commands.run_timers(context.now, index) {
                self.proceed(key, context);
            }
        }
        let now = context.now;
        self.accept_retry = self.accept_retry.filter(|retry| *retry > now);
        let is_late = |connection: &Connection| connection.deadline <= now;
        self.for_each(context, &is_late, &mut Connection::expire);
        sys::free_unused(self.connections.shrink());
        self.commands.free_unused();
    }

    /// Calls `work` on every selected connection.
    fn for_each(
        &mut self,
        context: &mut Context,
        selects: &dyn Fn(&Connection) -> bool,
        work: &mut dyn FnMut(&mut Connection, &mut Shared),
    ) {
        for index in 0..self.connections.used() {
            if let Some(key) = self.connections.key_at(index)
                && self
                    .connections
                    .get_mut(key)
                    .is_some_and(|one| selects(one))
            {
                self.with(key, context, work);
            }
        }
    }
}
