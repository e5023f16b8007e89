//! `POST /v1/exec`: a command, and its output as one answer.

#[cfg(feature = "mounts")]
use super::io::OK;
use super::io::{self, CallError, Io};
#[cfg(feature = "mounts")]
use super::mounts::{self, Job};
use super::process::{Channel, Process, Read, Spec, output_pipe};
#[cfg(feature = "sysinfo")]
use super::sysinfo;
use crate::context::{Context, Source};
use crate::error;
use crate::error::{Error, Result};
use crate::process::exec::{Input, Streams};
#[cfg(feature = "mounts")]
use crate::process::helper;
use crate::sys::{Inherited, Region};
use core::fmt::{self, Display};
use proto::bodies::ExecRequest;
#[cfg(feature = "mounts")]
use proto::config::Mount;
#[cfg(feature = "mounts")]
use proto::http::Target;
use proto::http::{Content, Reply, ResponseHead, Status};
use proto::json;
use proto::message;
use proto::message::Message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
#[cfg(feature = "mounts")]
use rustix::fd::OwnedFd;

/// How long a command may take, in milliseconds, unless the call says otherwise.
const TIMEOUT: u64 = 30_000;
/// How long a killed command is waited for before it is answered for, in milliseconds.
const KILL_TIMEOUT: u64 = 2_000;
/// Output kept of each stream, in bytes.
const CAPTURE: usize = 1 << 20;

/// A command, and what it has said so far.
pub struct Exec {
    /// Its process.
    pub process: Process,
    /// Standard output and standard error.
    streams: [Stream; 2],
    /// When it is killed; once it is, when it is answered for though it was not reaped.
    pub deadline: u64,
    /// How its answer is framed.
    pub reply: Reply,
    /// Its answer has begun: how much of it is queued.
    queued: Option<Position>,
    kind: Kind,
}

/// What the process is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A command of the host's.
    Command,
    /// A child of this program, whose output is the answer as it is.
    #[cfg(feature = "sysinfo")]
    Report,
    /// A child of this program that mounts or unmounts, and says nothing when that is done.
    #[cfg(feature = "mounts")]
    Mount,
}

#[derive(Default)]
struct Stream {
    channel: Channel,
    capture: Capture,
}

/// A place in an answer: a stream, and a byte in it.
#[derive(Clone, Copy, Default)]
struct Position {
    stream: usize,
    byte: usize,
}

impl Exec {
    /// Starts what the body of a request asks for.
    pub fn start(body: &mut [u8], reply: Reply, context: &mut Context) -> Result<Self, CallError> {
        context.with_arena(|memory, context| {
            let mut request = ExecRequest::default();
            io::read_body(body, memory, &mut request)?;
            let spec = Spec {
                argv: request.cmd,
                env: request.env,
                cwd: request.cwd,
                user: request.user,
                tty: false,
            };
            let timeout = match request.timeout_ms {
                0 => TIMEOUT,
                timeout => u64::from(timeout),
            };
            Ok(Self::spawn(&spec, timeout, reply, context)?)
        })
    }

    fn spawn(spec: &Spec, timeout: u64, reply: Reply, context: &mut Context) -> Result<Self> {
        let (output, their_output) = output_pipe()?;
        let (error, their_error) = output_pipe()?;
        let streams = Streams {
            input: Input::Null,
            output: Inherited::new(&their_output),
            error: Inherited::new(&their_error),
        };
        let process = Process::start(spec, streams, context)?;
        let deadline = context.now.saturating_add(timeout);
        let streams = [output, error];
        Ok(Self::of(process, Kind::Command, streams, deadline, reply))
    }

    fn of(
        process: Process,
        kind: Kind,
        streams: [Channel; 2],
        deadline: u64,
        reply: Reply,
    ) -> Self {
        Self {
            process,
            streams: streams.map(Stream::new),
            deadline,
            reply,
            queued: None,
            kind,
        }
    }

    /// Has a child mount what the body of a request describes.
    #[cfg(feature = "mounts")]
    pub fn start_mount(
        body: &mut [u8],
        reply: Reply,
        context: &mut Context,
    ) -> Result<Self, CallError> {
        context.with_arena(|memory, context| {
            let mut volume = Mount::default();
            io::read_body(body, memory, &mut volume)?;
            let job = Job::Mount(volume, context.workload.owner);
            Self::spawn_mount(&job, reply, &context.proc, context.now)
        })
    }

    /// Has a child unmount what the query of a request names.
    #[cfg(feature = "mounts")]
    pub fn start_unmount(
        target: &Target,
        reply: Reply,
        context: &mut Context,
    ) -> Result<Self, CallError> {
        let job = Job::Unmount(mounts::read_path(target, context.sink)?);
        Self::spawn_mount(&job, reply, &context.proc, context.now)
    }

    #[cfg(feature = "mounts")]
    fn spawn_mount(job: &Job, reply: Reply, proc: &OwnedFd, now: u64) -> Result<Self, CallError> {
        let deadline = now.saturating_add(helper::TIMEOUT);
        let process = Process::fork(proc, &mut |log| mounts::run(job, log))?;
        let streams = Default::default();
        Ok(Self::of(process, Kind::Mount, streams, deadline, reply))
    }

    /// Starts a child of this program, whose output is the answer.
    #[cfg(feature = "sysinfo")]
    pub fn start_report(reply: Reply, context: &mut Context) -> Result<Self, CallError> {
        let (channel, theirs) = output_pipe()?;
        let Context { proc, scratch, .. } = context;
        let process = Process::fork(proc, &mut |log| sysinfo::run(&theirs, proc, scratch, log))?;
        let deadline = context.now.saturating_add(sysinfo::TIMEOUT);
        let streams = [channel, Channel::default()];
        Ok(Self::of(process, Kind::Report, streams, deadline, reply))
    }

    /// Reads what waits in one of its streams. `left`: how much more output may be kept.
    pub fn on_output(&mut self, source: Source, left: &mut usize, context: &mut Context) {
        let [output, error] = &mut self.streams;
        let stream = match source {
            Source::Output => output,
            _ => error,
        };
        stream.read(self.process.is_over(), left, context.sink);
    }

    /// Its time is over: it is killed. When it was killed already and cannot be reaped, it counts as
    /// ended.
    pub fn expire(&mut self, now: u64) {
        self.deadline = match self.process.was_killed() {
            false => now.saturating_add(KILL_TIMEOUT),
            true => 0,
        };
        self.process.kill();
    }

    /// Whether it can be answered.
    pub fn is_over(&self) -> bool {
        self.process.status().is_some() || (self.process.was_killed() && self.deadline == 0)
    }

    /// Registers for its output.
    pub fn watch(&mut self, key: Key, context: &Context) {
        let [output, error] = &mut self.streams;
        let wanted = EventFlags::IN;
        output.channel.watch(Source::Output, key, wanted, context);
        error
            .channel
            .watch(Source::ErrorOutput, key, wanted, context);
    }

    /// Why there is no answer but that, if so; to be asked when it is over.
    pub fn failure(&mut self, left: &mut usize, context: &mut Context) -> Option<CallError> {
        if self.queued.is_none() {
            self.conclude(left, context);
        }
        let lines = self.process.lines();
        let code = self
            .process
            .status()
            .and_then(|status| status.exit_status());
        let [output, _] = &self.streams;
        let (status, error) = match (lines.error, code) {
            (Some(error), _) => (self.failure_status(code), error),
            _ if self.kind == Kind::Command => return None,
            (None, Some(0)) if output.capture.truncated => {
                let error = error!("commands have all the memory for output");
                (Status::ServiceUnavailable, error)
            }
            (None, Some(0)) => return None,
            _ if self.process.was_killed() => (Status::GatewayTimeout, self.time_over(lines.step)),
            _ => (Status::InternalServerError, error!("a helper was killed")),
        };
        Some(CallError::new(status, error))
    }

    /// The status of what a child that ended with this exit code says.
    fn failure_status(&self, code: Option<i32>) -> Status {
        match (self.kind, code) {
            #[cfg(feature = "mounts")]
            (Kind::Mount, code) => mounts::status_of(code),
            _ => Status::InternalServerError,
        }
    }

    /// What a child of this program was at that had to be killed.
    fn time_over(&self, step: Option<Error>) -> Error {
        match (self.kind, step) {
            #[cfg(feature = "mounts")]
            (Kind::Mount, step) => helper::timed_out(step),
            _ => error!("/proc does not answer"),
        }
    }

    /// Queues as much of the answer as there is room for; whether that was the rest.
    pub fn queue_answer(&mut self, io: &mut Io) -> bool {
        let mut position = match self.queued {
            Some(position) => position,
            None => {
                self.queue_head(io);
                Position::default()
            }
        };
        match self.kind {
            Kind::Command => {}
            #[cfg(feature = "sysinfo")]
            Kind::Report => return self.queue_report(position, io),
            #[cfg(feature = "mounts")]
            Kind::Mount => return true,
        }
        while let Some(stream) = self.streams.get(position.stream) {
            let capture = &stream.capture;
            let room = io.spare();
            let mut written = 0;
            position.byte += json::escape(capture.bytes(position.byte), true, &mut |piece| {
                let end = written + piece.len();
                let Some(to) = room.get_mut(written..end) else {
                    return false;
                };
                to.copy_from_slice(piece.as_bytes());
                written = end;
                true
            });
            io.commit(written);
            self.queued = Some(position);
            if position.byte < capture.length {
                return false;
            }
            match position.stream {
                0 => io.queue(BETWEEN),
                _ => io.queue(self.end().as_bytes()),
            }
            position = Position {
                stream: position.stream + 1,
                byte: 0,
            };
        }
        true
    }

    /// The same for an answer that is the output as it is.
    #[cfg(feature = "sysinfo")]
    fn queue_report(&mut self, mut position: Position, io: &mut Io) -> bool {
        if self.reply.head_only {
            return true;
        }
        let [output, _] = &self.streams;
        let rest = output.capture.bytes(position.byte);
        let room = io.spare();
        let count = rest.len().min(room.len());
        for (to, from) in room.iter_mut().zip(rest) {
            *to = *from;
        }
        io.commit(count);
        position.byte += count;
        self.queued = Some(position);
        position.byte == output.capture.length
    }

    /// Takes what is left in its pipes, which others may hold open.
    fn conclude(&mut self, left: &mut usize, context: &mut Context) {
        for stream in &mut self.streams {
            while stream.read(true, left, context.sink) {}
            stream.channel.close();
            stream.capture.measure(true);
        }
    }

    /// The answer up to the output.
    fn queue_head(&self, io: &mut Io) {
        match self.kind {
            Kind::Command => {}
            #[cfg(feature = "sysinfo")]
            Kind::Report => {
                let [output, _] = &self.streams;
                let content = Content::Length(output.capture.length as u64);
                let head = ResponseHead::new(Status::Ok, self.reply, content);
                return io.queue(head.finish().as_bytes());
            }
            #[cfg(feature = "mounts")]
            Kind::Mount => return io.respond(self.reply, Status::Ok, OK),
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
        let end = self.end();
        let mut length = start.as_bytes().len() + BETWEEN.len() + end.as_bytes().len();
        for stream in &self.streams {
            length += stream.capture.escaped;
        }
        let content = Content::Length(length as u64);
        let head = ResponseHead::new(Status::Ok, self.reply, content);
        io.queue(head.finish().as_bytes());
        io.queue(start.as_bytes());
    }

    /// The answer behind the output.
    fn end(&self) -> Message {
        let [output, error] = &self.streams;
        message!(
            "\"{}{}{}}}",
            Flag("stdout_truncated", output.capture.truncated),
            Flag("stderr_truncated", error.capture.truncated),
            Flag("timed_out", self.process.was_killed())
        )
    }

    /// When it is killed if nobody waits for its answer any more.
    pub fn kill_abandoned_at(&self, now: u64) -> u64 {
        match self.kind {
            #[cfg(feature = "mounts")]
            Kind::Mount => self.deadline,
            _ => now,
        }
    }

    /// How much of the output that may be kept it has.
    pub fn kept(&self) -> usize {
        let [output, error] = &self.streams;
        output.capture.length + error.capture.length
    }

    /// Nobody waits for its answer any more: gives back all but its process.
    pub fn release(&mut self) {
        self.streams = Default::default();
    }
}

/// What stands between the streams.
const BETWEEN: &[u8] = b"\",\"stderr\":\"";

/// A member that is there when it is true, for display.
struct Flag(&'static str, bool);

impl Display for Flag {
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

    /// Reads once, by way of `sink`; whether anything came.
    fn read(&mut self, over: bool, left: &mut usize, sink: &mut [u8]) -> bool {
        match self.channel.read(sink, over) {
            Read::Bytes(count) => {
                let bytes = sink.get(..count).unwrap_or(&[]);
                self.capture.keep(bytes, left);
                self.capture.measure(false);
                true
            }
            Read::Empty => false,
            Read::End => {
                self.channel.close();
                false
            }
        }
    }
}

/// Output that is kept.
#[derive(Default)]
struct Capture {
    /// [`CAPTURE`] bytes, from the first output on.
    memory: Option<Region>,
    length: usize,
    truncated: bool,
    /// Bytes whose escaped form is measured.
    measured: usize,
    /// Length of their escaped form.
    escaped: usize,
}

impl Capture {
    /// Keeps bytes as far as there is room for them: in this capture, and in all of them together.
    fn keep(&mut self, bytes: &[u8], left: &mut usize) {
        if self.memory.is_none() {
            self.memory = Region::new(CAPTURE).ok();
        }
        let memory = self.memory.as_deref_mut().unwrap_or(&mut []);
        let room = memory.get_mut(self.length..).unwrap_or(&mut []);
        let kept = bytes.len().min(room.len()).min(*left);
        for (to, from) in room.iter_mut().zip(bytes.iter().take(kept)) {
            *to = *from;
        }
        self.length += kept;
        *left -= kept;
        self.truncated |= kept < bytes.len();
    }

    /// What was kept, from byte `at` on.
    fn bytes(&self, at: usize) -> &[u8] {
        let memory = self.memory.as_deref().unwrap_or(&[]);
        memory.get(at..self.length).unwrap_or(&[])
    }

    /// Measures the escaped form of what came, so that the answer's length is known at the end.
    fn measure(&mut self, last: bool) {
        let mut length = 0;
        self.measured += json::escape(self.bytes(self.measured), last, &mut |piece| {
            length += piece.len();
            true
        });
        self.escaped += length;
    }
}
