//! What all rooms share: the time, the workload's state, and buffers that have one owner.

use crate::sys;
use crate::sys::epoll::Poller;
use proto::config::DOCUMENT;
use proto::environment::Environment;
use proto::message::Message;
use proto::slab::Key;
use rustix::process::Pid;

/// A time that does not come.
pub const NEVER: u64 = u64::MAX;

/// Most commands at once: those that run, and those whose output is not answered yet.
pub const COMMANDS: usize = 128;

/// Room for a piece of a command's output on its way, or for a record of the kernel's log.
pub const SINK: usize = 16 << 10;

/// Where an event comes from. The last four carry the key of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The signalfd.
    Signals,
    /// The vsock listener.
    Listener,
    /// The console takes bytes again.
    Console,
    /// The workload's standard output and error.
    Workload,
    /// A connection of the API.
    Connection,
    /// The standard input of a connection's command takes bytes again.
    Input,
    /// Its standard output, or all streams of a terminal.
    Output,
    /// Its standard error.
    ErrorOutput,
}

impl Source {
    const ALL: [Self; 8] = [
        Self::Signals,
        Self::Listener,
        Self::Console,
        Self::Workload,
        Self::Connection,
        Self::Input,
        Self::Output,
        Self::ErrorOutput,
    ];

    /// The token of an epoll registration: the source in the upper half, the key in the lower one.
    pub fn token(self, key: Key) -> u64 {
        (self as u64) << 32 | u64::from(key.to_bits())
    }

    /// The source and key of a token.
    pub fn of_token(token: u64) -> Option<(Self, Key)> {
        let source = Self::ALL.get((token >> 32) as usize)?;
        Some((*source, Key::from_bits(token as u32)))
    }
}

/// How the workload ended.
pub struct Exit {
    /// Its exit code, 128 + signal, or 125 when it could not be run.
    pub code: i32,
    /// Its main process was killed by the kernel's OOM killer.
    pub oom_killed: bool,
    /// Why it could not be run.
    pub error: Option<Message>,
}

/// The state of the workload.
#[derive(Default)]
pub struct Workload {
    /// Its process group while it runs.
    pub group: Option<Pid>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Somebody has read how.
    pub exit_code_delivered: bool,
}

/// What the supervisor and the API share.
pub struct Context {
    /// Now, in milliseconds.
    pub now: u64,
    /// The workload.
    pub workload: Workload,
    /// The workload's environment.
    pub environment: &'static mut Environment,
    /// Room for files.
    pub scratch: &'static mut [u8; 2 * DOCUMENT],
    /// Room for what is read to be looked at once.
    pub sink: &'static mut [u8; SINK],
    /// Commands that run, or whose output is not answered yet.
    pub commands: usize,
    /// Those of the commands that were killed because their clients are gone.
    pub abandoned: heapless::Vec<Pid, COMMANDS>,
    /// The event loop's descriptor.
    pub poller: Poller,
}

impl Context {
    /// No workload and no command.
    pub fn new(
        poller: Poller,
        environment: &'static mut Environment,
        scratch: &'static mut [u8; 2 * DOCUMENT],
        sink: &'static mut [u8; SINK],
    ) -> Self {
        Self {
            now: sys::milliseconds(),
            workload: Workload::default(),
            environment,
            scratch,
            sink,
            commands: 0,
            abandoned: heapless::Vec::new(),
            poller,
        }
    }
}
