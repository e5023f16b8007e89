//! State that all modules share: the time, the workload's state, and large buffers.

use crate::context;
use crate::error::{Error, Result};
use crate::output_log::OutputLog;
use crate::sys::epoll::Poller;
use crate::sys::{self, GuestThreads, Region};
use core::fmt::{self, Display};
#[cfg(feature = "snapshot")]
use proto::config::MEMBERS;
use proto::config::{MAX_ADDRESSES, MAX_DOCUMENT_SIZE, PATH_MAX};
use proto::environment::Environment;
use proto::json::Quoted;
use proto::rlimit::Rlimits;
use proto::signal::Signal;
use proto::slab::Key;
use proto::users::MAX_HOME;
#[cfg(feature = "snapshot")]
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::process::Pid;
#[cfg(feature = "snapshot")]
use rustix::process::WaitStatus;

/// A deadline that never expires.
pub const NEVER: u64 = u64::MAX;

/// Size of the buffer for a record of the kernel's log, or for the list of sessions.
pub const TEMP_BUFFER: usize = 16 << 10;

/// Size of the buffer for the strings of a request: as long as the longest request.
pub const ARENA: usize = 160 << 10;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventSource {
    /// The signalfd.
    Signals,
    /// The vsock listener.
    Listener,
    /// The console is writable.
    Console,
    /// The console has input.
    ConsoleInput,
    /// The boot's helper has finished a part, or has exited.
    Helper,
    /// The workload's standard output, with its standard error unless that has its own pipe.
    WorkloadStdout,
    /// The workload's standard error.
    WorkloadStderr,
    /// The connection for events is writable.
    Events,
    /// A connection of the API, by its key.
    Connection,
    /// The standard input of a command, by its key, is writable.
    CommandStdin,
    /// Its standard output, or all streams of a terminal.
    CommandStdout,
    /// Its standard error.
    CommandStderr,
    /// The server's end of a tunnel, by the connection's key.
    Tunnel,
    /// The kernel's log has a new record, or vmclock a new generation.
    #[cfg(feature = "snapshot")]
    RestoreTrigger,
}

impl EventSource {
    const ALL: &[Self] = &[
        Self::Signals,
        Self::Listener,
        Self::Console,
        Self::ConsoleInput,
        Self::Helper,
        Self::WorkloadStdout,
        Self::WorkloadStderr,
        Self::Events,
        Self::Connection,
        Self::CommandStdin,
        Self::CommandStdout,
        Self::CommandStderr,
        Self::Tunnel,
        #[cfg(feature = "snapshot")]
        Self::RestoreTrigger,
    ];

    /// The token of an epoll registration: the source in the upper half, the key in the lower one.
    pub fn token(self, key: Key) -> u64 {
        (self as u64) << 32 | u64::from(key.to_bits())
    }

    /// The source and key of a token.
    pub fn from_token(token: u64) -> Option<(Self, Key)> {
        let source = Self::ALL.get((token >> 32) as usize)?;
        Some((*source, Key::from_bits(token as u32)))
    }
}

/// How the workload ended.
pub struct Exit {
    /// Its exit code, 128 + signal, or 125 when it could not be run. 137 when it could not be killed.
    pub code: i32,
    /// Its main process was killed by the kernel's OOM killer.
    pub oom_killed: bool,
    /// Why it could not be run.
    pub error: Option<Error>,
}

/// `{"code":N,"oom_killed":bool}`, and the error if there is one.
impl Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            code, oom_killed, ..
        } = self;
        write!(formatter, "{{\"code\":{code},\"oom_killed\":{oom_killed}")?;
        if let Some(error) = &self.error {
            write!(formatter, ",\"error\":{}", Quoted(error))?;
        }
        formatter.write_str("}")
    }
}

/// The state of the workload.
#[derive(Default)]
pub struct Workload {
    /// Its process group while it runs.
    pub group: Option<Pid>,
    /// The user id and the group id that it has, and that volumes get.
    pub owner: (u32, u32),
    /// Its exit, once it has ended.
    pub exit: Option<Exit>,
    /// A client has read the exit code.
    pub exit_code_delivered: bool,
    /// Its stop signal, if not SIGTERM.
    pub stop_signal: Option<Signal>,
    /// A requested stop that has not been handled yet.
    pub stop: Option<Stop>,
}

/// A request to stop the workload.
#[derive(Clone, Copy)]
pub struct Stop {
    /// The signal to send; `None`: its own stop signal.
    pub signal: Option<Signal>,
    /// Time until SIGKILL, in milliseconds.
    pub timeout: u64,
}

impl Stop {
    /// Unless a call says otherwise.
    pub const DEFAULT: Self = Self {
        signal: None,
        timeout: 10_000,
    };

    /// Merges two requests that arrived in one iteration of the event loop.
    pub fn merge(self, later: Self) -> Self {
        Self {
            signal: later.signal.or(self.signal),
            timeout: self.timeout.min(later.timeout),
        }
    }
}

/// What a command inherits from the workload, unless the call says otherwise.
pub struct CommandDefaults {
    /// The workload's environment.
    pub environment: Environment,
    /// The image or the document sets HOME; otherwise a command gets its user's home directory.
    pub sets_home: bool,
    /// The workload's working directory, NUL-terminated.
    pub working_dir: heapless::Vec<u8, PATH_MAX>,
    /// The workload's resource limits.
    pub rlimits: Rlimits,
    /// The home directory of root.
    pub root_home: heapless::Vec<u8, MAX_HOME>,
}

impl CommandDefaults {
    /// Empty, until the boot fills them in.
    pub const fn new() -> Self {
        Self {
            environment: Environment::new(),
            sets_home: false,
            working_dir: heapless::Vec::new(),
            rlimits: Rlimits::new(),
            root_home: heapless::Vec::new(),
        }
    }
}

/// The v2 control groups (their directories) that processes are started in; if one is missing, PID 1's
/// own is used.
///
/// Commands have a separate group: a user who freezes the workload's must not lock out the host.
#[derive(Default)]
pub struct Cgroups {
    /// The root of the hierarchy.
    pub root: Option<OwnedFd>,
    /// The workload's group, owned by its user.
    pub workload: Option<OwnedFd>,
    /// The commands' group, owned by root.
    pub commands: Option<OwnedFd>,
}

/// State of snapshots and restores that other modules use.
#[cfg(feature = "snapshot")]
pub struct Snapshot {
    /// The workload is frozen, or soon will be: no command starts, and no signal is sent.
    pub is_held: bool,
    /// Number of connections that wait for the response to a snapshot call.
    pub pending_calls: usize,
    /// The running helper.
    pub helper: Option<Pid>,
    /// Its exit status, once it was reaped.
    pub helper_status: Option<WaitStatus>,
    /// Poller events of the restore triggers, until they are handled.
    pub trigger_events: EventFlags,
    /// The next deadline of a hold or a restore.
    pub deadline: u64,
    /// /dev/kmsg, opened before the workload can replace it; the restore triggers take it.
    pub kernel_log: Option<OwnedFd>,
    /// /dev/vmclock0, likewise.
    pub vmclock: Option<OwnedFd>,
    /// The configuration, from the boot or from the last restore.
    pub applied: AppliedConfig,
    /// The interfaces that its addresses were added to.
    pub interfaces: Interfaces,
}

/// Indexes of network interfaces.
pub type Interfaces = heapless::Vec<u32, MAX_ADDRESSES>;

/// What is kept of the configuration: enough to tell what a new one changes.
#[cfg(feature = "snapshot")]
#[derive(Clone, Copy)]
pub struct AppliedConfig {
    /// The digests of its members.
    pub digests: [u64; MEMBERS.len()],
    /// The signal that tells the workload of a restore.
    pub restore_signal: Option<Signal>,
    /// It came from MMDS.
    pub is_from_mmds: bool,
}

/// Large static buffers.
pub struct Buffers {
    /// The strings of the current request.
    pub arena: [u8; ARENA],
    /// Short-lived data: a record of the kernel's log, a path, a list of sessions.
    pub temp: [u8; TEMP_BUFFER],
}

/// Memory for two files, or for a document and its strings.
pub fn document_memory() -> Result<Region> {
    Region::new(2 * MAX_DOCUMENT_SIZE).map_err(context!("allocate memory"))
}

/// What the supervisor and the API share.
pub struct Context {
    /// The current time that deadlines are compared with: milliseconds of the monotonic clock, without
    /// pauses of the VM.
    pub now: u64,
    /// The workload.
    pub workload: Workload,
    /// What commands inherit from it.
    pub defaults: &'static mut CommandDefaults,
    /// Buffer for reading whole files; once the workload runs, used in children only.
    pub scratch: Region,
    /// See [`Buffers`].
    pub temp: &'static mut [u8; TEMP_BUFFER],
    /// See [`Buffers`].
    pub arena: &'static mut [u8],
    /// The workload's last output.
    pub output_log: OutputLog,
    /// Number of connections that read the log.
    pub log_readers: usize,
    /// Number of connections without a time limit.
    pub long_connections: usize,
    /// The event loop's epoll instance.
    pub poller: Poller,
    /// Threads that read and write the pipes and terminals of commands and the workload.
    pub guest_threads: &'static GuestThreads,
    /// /proc, opened before anything could be mounted over it.
    pub proc: OwnedFd,
    /// /dev/pts, likewise.
    pub pts: Option<OwnedFd>,
    /// The sysfs file that expedites RCU grace periods, for the shutdown.
    pub rcu_expedited: Option<OwnedFd>,
    /// The groups that the workload and commands are started in.
    pub cgroups: Cgroups,
    /// See [`Snapshot`].
    #[cfg(feature = "snapshot")]
    pub snapshot: Snapshot,
}

impl Context {
    /// No workload and no command.
    pub fn new(
        poller: Poller,
        defaults: &'static mut CommandDefaults,
        buffers: &'static mut Buffers,
        scratch: Region,
        guest_threads: &'static GuestThreads,
        proc: OwnedFd,
    ) -> Self {
        Self {
            now: sys::milliseconds(),
            workload: Workload::default(),
            defaults,
            scratch,
            temp: &mut buffers.temp,
            arena: &mut buffers.arena,
            output_log: OutputLog::none(),
            log_readers: 0,
            long_connections: 0,
            poller,
            guest_threads,
            proc,
            pts: None,
            rcu_expedited: None,
            cgroups: Cgroups::default(),
            #[cfg(feature = "snapshot")]
            snapshot: Snapshot {
                is_held: false,
                pending_calls: 0,
                trigger_events: EventFlags::empty(),
                helper: None,
                helper_status: None,
                deadline: NEVER,
                kernel_log: None,
                vmclock: None,
                applied: AppliedConfig {
                    digests: [0; MEMBERS.len()],
                    restore_signal: None,
                    is_from_mmds: false,
                },
                interfaces: Interfaces::new(),
            },
        }
    }

    /// Records which interfaces have addresses, for a restore that replaces them.
    pub fn set_interfaces(&mut self, interfaces: Interfaces) {
        #[cfg(feature = "snapshot")]
        return self.snapshot.interfaces = interfaces;
        #[cfg(not(feature = "snapshot"))]
        drop(interfaces);
    }

    /// Whether the workload is held for a snapshot.
    pub fn is_held(&self) -> bool {
        #[cfg(feature = "snapshot")]
        if self.snapshot.is_held {
            return true;
        }
        false
    }

    /// The next deadline of a snapshot or a restore.
    pub fn deadline(&self) -> u64 {
        #[cfg(feature = "snapshot")]
        return self.snapshot.deadline;
        #[cfg(not(feature = "snapshot"))]
        NEVER
    }

    /// Lends the memory for the strings of a request.
    pub fn with_arena<T>(&mut self, work: impl FnOnce(&mut [u8], &mut Self) -> T) -> T {
        let arena = core::mem::take(&mut self.arena);
        let result = work(arena, self);
        self.arena = arena;
        result
    }
}
