//! `POST /v1/exec`: a command, and its output as one response.

use super::error::CallError;
#[cfg(any(feature = "mounts", feature = "sysinfo"))]
use super::error::{report_error, status_of_exit};
#[cfg(any(feature = "mounts", feature = "sysinfo"))]
use super::io::OK;
use super::io::{self, Io};
#[cfg(feature = "mounts")]
use super::mounts::{self, Job};
use super::process::Process;
#[cfg(feature = "sysinfo")]
use super::process::output_pipe;
#[cfg(feature = "sysinfo")]
use super::sysinfo;
use crate::context::{Context, EventSource};
use crate::error;
use crate::error::{Error, Result};
use crate::process::channel::Channel;
use crate::process::helper;
use crate::sys::Region;
use core::fmt::{self, Display};
use proto::bodies::{CommandSpec, ExecRequest};
use proto::bytes;
#[cfg(feature = "mounts")]
use proto::config::{Mount, PATH_MAX};
#[cfg(feature = "mounts")]
use proto::http::Target;
use proto::http::{Content, Status};
use proto::json;
use proto::message;
use proto::message::Message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
#[cfg(feature = "mounts")]
use rustix::fd::OwnedFd;

/// Default time limit of a command, in milliseconds.
const TIMEOUT: u64 = 30_000;
/// How long a killed command may take to exit before the response is sent without it, in milliseconds.
const KILL_TIMEOUT: u64 = 2_000;
/// Maximum output captured from each stream, in bytes.
const CAPTURE: usize = 1 << 20;

/// A command and its output so far.
pub struct Exec {
    /// Its process.
    pub process: Process,
    /// Standard output and standard error.
    streams: [Stream; 2],
    /// When it is killed; after that, when the response is sent even if it was not reaped.
    pub deadline: u64,
    /// How much of the response is queued, once that has begun.
    queued: Option<Position>,
    kind: Kind,
}

/// The kind of process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A command from the host.
    Command,
    /// A child of this program: its output is the response, if it has any.
    #[cfg(any(feature = "mounts", feature = "sysinfo"))]
    Helper,
}

#[derive(Default)]
struct Stream {
    channel: Channel,
    capture: Capture,
}

/// A position in the response: a stream, and a byte in it.
#[derive(Clone, Copy, Default)]
struct Position {
    stream: usize,
    byte: usize,
}

impl Exec {
    /// Starts the command in the body of a request.
    pub fn start(body: &mut [u8], context: &mut Context) -> Result<Self, CallError> {
        context.with_arena(|memory, context| {
            let mut request = ExecRequest::default();
            io::read_body(body, memory, &mut request)?;
            let timeout = match request.timeout_ms {
                0 => TIMEOUT,
                timeout => u64::from(timeout),
            };
            Ok(Self::spawn(&request.spec, timeout, context)?)
        })
    }

    fn spawn(spec: &CommandSpec, timeout: u64, context: &mut Context) -> Result<Self> {
        let (process, pipes) = Process::start_on_pipes(spec, false, true, context)?;
        let deadline = context.now.saturating_add(timeout);
        let streams = [pipes.output, pipes.error];
        Ok(Self::of(process, Kind::Command, streams, deadline))
    }

    fn of(process: Process, kind: Kind, streams: [Channel; 2], deadline: u64) -> Self {
        Self {
            process,
            streams: streams.map(Stream::new),
            deadline,
            queued: None,
            kind,
        }
    }

    /// Starts a child that mounts the volume in the body of a request.
    #[cfg(feature = "mounts")]
    pub fn start_mount(body: &mut [u8], context: &mut Context) -> Result<Self, CallError> {
        context.with_arena(|memory, context| {
            let mut volume = Mount::default();
            io::read_body(body, memory, &mut volume)?;
            let job = Job::Mount(volume, context.workload.owner);
            Self::spawn_mount(&job, &context.proc, context.now)
        })
    }

    /// Starts a child that unmounts the path in the query of a request.
    #[cfg(feature = "mounts")]
    pub fn start_unmount(target: &Target, context: &mut Context) -> Result<Self, CallError> {
        let room = context.temp.get_mut(..PATH_MAX).unwrap_or(&mut []);
        let path = target.path(room).map_err(|why| {
            let error = error!("path: {}", why.message());
            CallError::bad_request(error)
        })?;
        let job = Job::Unmount(path);
        Self::spawn_mount(&job, &context.proc, context.now)
    }

    #[cfg(feature = "mounts")]
    fn spawn_mount(job: &Job, proc: &OwnedFd, now: u64) -> Result<Self, CallError> {
        let deadline = now.saturating_add(helper::TIMEOUT);
        let process = Process::fork(proc, &mut |log| report_error(mounts::run(job, log), log))?;
        let streams = Default::default();
        Ok(Self::of(process, Kind::Helper, streams, deadline))
    }

    /// Starts a child of this program, whose output is the response.
    #[cfg(feature = "sysinfo")]
    pub fn start_sysinfo(context: &mut Context) -> Result<Self, CallError> {
        let (channel, theirs) = output_pipe(context.guest_threads)?;
        let Context { proc, scratch, .. } = context;
        let process = Process::fork(proc, &mut |log| {
            let done = sysinfo::run(&theirs, proc, scratch, log);
            report_error(done.map_err(CallError::from), log)
        })?;
        let deadline = context.now.saturating_add(sysinfo::TIMEOUT);
        let streams = [channel, Channel::default()];
        Ok(Self::of(process, Kind::Helper, streams, deadline))
    }

    /// Reads from one of its streams. `left`: how much more output may be captured.
    pub fn on_output(&mut self, source: EventSource, left: &mut usize) {
        let [output, error] = &mut self.streams;
        let stream = match source {
            EventSource::CommandStdout => output,
            _ => error,
        };
        stream.read(self.process.is_finished(), left);
    }

    /// Handles its timeout: kills it. If it was killed before and cannot be reaped, it counts as ended.
    pub fn expire(&mut self, now: u64) {
        self.deadline = match self.process.was_killed() {
            false => now.saturating_add(KILL_TIMEOUT),
            true => 0,
        };
        self.process.kill();
    }

    /// Whether the response can be sent.
    pub fn is_finished(&self) -> bool {
        self.process.status().is_some() || (self.process.was_killed() && self.deadline == 0)
    }

    /// Waits for its output.
    pub fn watch(&mut self, key: Key, context: &Context) {
        let [output, error] = &mut self.streams;
        let (wanted, poller) = (EventFlags::IN, &context.poller);
        let channel = &mut output.channel;
        channel.watch(EventSource::CommandStdout.token(key), wanted, poller);
        let channel = &mut error.channel;
        channel.watch(EventSource::CommandStderr.token(key), wanted, poller);
    }

    /// The error to respond with, if any. Call once it has ended.
    pub fn failure(&mut self, left: &mut usize) -> Option<CallError> {
        if self.queued.is_none() {
            self.read_remaining(left);
        }
        let reports = self.process.take_reports();
        let code = self
            .process
            .status()
            .and_then(|status| status.exit_status());
        let [output, _] = &self.streams;
        let (status, error) = match (reports.error, code) {
            (error, _) if self.kind == Kind::Command => (Status::InternalServerError, error?),
            #[cfg(any(feature = "mounts", feature = "sysinfo"))]
            (Some(error), _) => (status_of_exit(code), error),
            (None, Some(0)) if output.capture.truncated => {
                let error = error!("commands have all the memory for output");
                (Status::ServiceUnavailable, error)
            }
            (None, Some(0)) => return None,
            _ if self.process.was_killed() => (Status::GatewayTimeout, timed_out(reports.step)),
            _ => (Status::InternalServerError, error!("a helper was killed")),
        };
        Some(CallError::new(status, error))
    }

    /// Queues as much of the response as fits. Returns whether it is complete.
    pub fn queue_response(&mut self, io: &mut Io) -> bool {
        let mut position = match self.queued {
            Some(position) => position,
            None => {
                self.queue_head(io);
                Position::default()
            }
        };
        if io.reply.head_only {
            return true;
        }
        while let Some(stream) = self.streams.get(position.stream) {
            let rest = stream.capture.bytes(position.byte);
            let room = io.spare();
            let (taken, written) = match self.kind {
                Kind::Command => json::escape_into(rest, room),
                #[cfg(any(feature = "mounts", feature = "sysinfo"))]
                Kind::Helper => {
                    let count = bytes::copy(rest, room);
                    (count, count)
                }
            };
            io.commit(written);
            position.byte += taken;
            self.queued = Some(position);
            if taken < rest.len() {
                return false;
            }
            match (self.kind, position.stream) {
                (Kind::Command, 0) => io.queue(STDERR_SEPARATOR),
                (Kind::Command, _) => io.queue(self.tail().as_bytes()),
                #[cfg(any(feature = "mounts", feature = "sysinfo"))]
                (Kind::Helper, _) => return true,
            }
            position = Position {
                stream: position.stream + 1,
                byte: 0,
            };
        }
        true
    }

    /// Reads what is left in its pipes, which other processes may keep open.
    fn read_remaining(&mut self, left: &mut usize) {
        for stream in &mut self.streams {
            while stream.read(true, left) {}
            stream.capture.truncated |= stream.channel.is_locked();
            stream.channel.close();
            stream.capture.measure(true);
        }
    }

    /// Queues the response up to the output.
    fn queue_head(&self, io: &mut Io) {
        #[cfg(any(feature = "mounts", feature = "sysinfo"))]
        if self.kind == Kind::Helper {
            let [output, _] = &self.streams;
            return match output.capture.length {
                0 => io.respond(Status::Ok, OK),
                length => io.queue_head(Status::Ok, Content::Length(length as u64)),
            };
        }
        // One that was killed and cannot be reaped counts as killed.
        let status = self.process.status();
        let signal = status.map_or(Some(9), |status| status.terminating_signal());
        let code = status.and_then(|status| status.exit_status());
        let start = message!(
            "{{\"exit_code\":{},\"exit_signal\":{},\"stdout\":\"",
            code.unwrap_or(-1),
            signal.unwrap_or(0)
        );
        let end = self.tail();
        let mut length = start.as_bytes().len() + STDERR_SEPARATOR.len() + end.as_bytes().len();
        for stream in &self.streams {
            length += stream.capture.escaped;
        }
        io.queue_head(Status::Ok, Content::Length(length as u64));
        io.queue(start.as_bytes());
    }

    /// The response after the output.
    fn tail(&self) -> Message {
        let [output, error] = &self.streams;
        message!(
            "\"{}{}{}}}",
            FlagMember("stdout_truncated", output.capture.truncated),
            FlagMember("stderr_truncated", error.capture.truncated),
            FlagMember("timed_out", self.process.was_killed())
        )
    }

    /// When it is killed if its client is gone.
    pub fn abandoned_deadline(&self, now: u64) -> u64 {
        match self.kind {
            Kind::Command => now,
            // It completes what it has begun.
            #[cfg(any(feature = "mounts", feature = "sysinfo"))]
            Kind::Helper => self.deadline,
        }
    }

    /// Number of bytes of captured output.
    pub fn captured(&self) -> usize {
        let [output, error] = &self.streams;
        output.capture.length + error.capture.length
    }

    /// Frees everything but its process, as its client is gone.
    pub fn release(&mut self) {
        self.streams = Default::default();
    }
}

/// The error of a child of this program that was killed. Only the one that reads /proc reports no step.
fn timed_out(step: Option<Error>) -> Error {
    match step {
        Some(step) => helper::timed_out(Some(step)),
        None => error!("/proc does not answer"),
    }
}

/// The text between the streams.
const STDERR_SEPARATOR: &[u8] = b"\",\"stderr\":\"";

/// Displays `,"name":true`, or nothing.
struct FlagMember(&'static str, bool);

impl Display for FlagMember {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(name, true) => write!(formatter, ",\"{name}\":true"),
            _ => Ok(()),
        }
    }
}

impl Stream {
    fn new(channel: Channel) -> Self {
        Self {
            channel,
            capture: Capture::default(),
        }
    }

    /// Reads once. Returns whether there was any data.
    fn read(&mut self, over: bool, left: &mut usize) -> bool {
        let count = self.channel.read(usize::MAX, over, &mut |output| {
            self.capture.keep(output, left);
            self.capture.measure(false);
        });
        count > 0
    }
}

/// Captured output.
#[derive(Default)]
struct Capture {
    /// [`CAPTURE`] bytes, allocated with the first output.
    memory: Option<Region>,
    length: usize,
    truncated: bool,
    /// Number of bytes whose escaped length is in `escaped`.
    measured: usize,
    /// Length of their escaped form.
    escaped: usize,
}

impl Capture {
    /// Captures bytes, up to the limits of this capture and of all together.
    fn keep(&mut self, bytes: &[u8], left: &mut usize) {
        if self.memory.is_none() {
            self.memory = Region::new(CAPTURE).ok();
        }
        let memory = self.memory.as_deref_mut().unwrap_or(&mut []);
        let room = memory.get_mut(self.length..).unwrap_or(&mut []);
        let wanted = bytes.get(..*left).unwrap_or(bytes);
        let kept = bytes::copy(wanted, room);
        self.length += kept;
        *left -= kept;
        self.truncated |= kept < bytes.len();
    }

    /// The captured bytes from `at` on.
    fn bytes(&self, at: usize) -> &[u8] {
        let memory = self.memory.as_deref().unwrap_or(&[]);
        memory.get(at..self.length).unwrap_or(&[])
    }

    /// Measures the escaped form of new bytes, so that the response's length is known once all are captured.
    fn measure(&mut self, last: bool) {
        let mut length = 0;
        self.measured += json::escape(self.bytes(self.measured), last, &mut |piece| {
            length += piece.len();
            true
        });
        self.escaped += length;
    }
}
