//! The console: log lines and the workload's output, written without ever blocking.

use crate::context::EventSource;
use crate::error::Log;
use crate::sys::epoll::Poller;
use crate::sys::{files, terminal};
use core::ffi::CStr;
use core::fmt::{self, Display, Write};
use proto::buffer::Buffer;
use proto::json::Quoted;
use proto::message;
use proto::message::{Level, Message};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, OFlags, statat};
use rustix::io::Errno;

/// Size of the queue in bytes: three pages of output, and a reserve for log lines.
const QUEUE: usize = 16 << 10;
/// Bytes of the queue that the workload's output leaves free, so that log lines still fit.
const LOG_RESERVE: usize = 4 << 10;

/// Most bytes in one write. An emulated serial port accepts any number at once, but the driver spends
/// time on each. An iteration of the event loop writes twice at most.
const MAX_WRITE: usize = 512;

/// Tried in this order; a VM without a serial port has no console.
const DEVICES: [&CStr; 3] = [c"ttyS0", c"ttyAMA0", c"console"];

/// Where the log and the workload's output go.
pub struct Console {
    /// /dev, opened before anything could be mounted over it.
    directory: Option<OwnedFd>,
    /// The device and its name.
    device: Option<(OwnedFd, &'static CStr)>,
    level: Level,
    /// The workload's user and group id, once known; added to every line.
    identity: Option<(u32, u32)>,
    /// Number of log lines that did not fit.
    lost: u32,
    /// Poller events registered for the device.
    watched: EventFlags,
    /// Bytes written to the device, modulo 2^64.
    written: usize,
    /// The workload's last line has no line feed yet.
    open_line: bool,
    queue: Buffer<QUEUE>,
}

impl Console {
    /// A console without a device: lines wait in the queue.
    pub const fn new() -> Self {
        Self {
            directory: None,
            device: None,
            queue: Buffer::new(),
            level: Level::Info,
            identity: None,
            lost: 0,
            watched: EventFlags::empty(),
            written: 0,
            open_line: false,
        }
    }

    /// Opens the first available device and writes what is queued.
    pub fn open(&mut self, level: Level) {
        self.level = level;
        self.directory = files::open(c"/dev", OFlags::PATH).ok();
        self.device = self.open_first();
        self.flush();
    }

    /// The console for a command's standard input: its directory and its name. The command opens it
    /// itself, so that it blocks as a terminal does (copies of a descriptor share its flags).
    pub fn input(&self) -> Option<(&OwnedFd, &'static CStr)> {
        let (_, name) = self.device.as_ref()?;
        Some((self.directory.as_ref()?, *name))
    }

    /// The same for PID 1: opened, and non-blocking.
    pub fn reader(&self) -> Option<OwnedFd> {
        let (_, name) = self.device.as_ref()?;
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open_device(name, flags).ok()
    }

    fn open_device(&self, name: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
        let directory = self.directory.as_ref().ok_or(Errno::NOENT)?;
        files::open_at(directory, name, flags)
    }

    /// Opens the first device that can be opened.
    fn open_first(&self) -> Option<(OwnedFd, &'static CStr)> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        DEVICES.iter().find_map(|name| {
            // Opening or writing to a pipe in its place could block.
            let status = statat(self.directory.as_ref()?, *name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            if FileType::from_raw_mode(status.st_mode) != FileType::CharacterDevice {
                return None;
            }
            let device = self.open_device(name, flags).ok()?;
            // A port without hardware can be opened, but even an empty write fails.
            files::write(&device, &[]).ok()?;
            Some((device, *name))
        })
    }

    /// Waits until the device is writable, while anything is queued.
    pub fn watch(&mut self, poller: &Poller) {
        let wanted = match self.queue.is_empty() {
            true => EventFlags::empty(),
            false => EventFlags::OUT,
        };
        if let Some((device, _)) = &self.device {
            let watched = &mut self.watched;
            poller.watch(
                device,
                EventSource::Console.token(Key::default()),
                watched,
                wanted,
            );
        }
    }

    /// Adds the workload's user and group id to all further lines.
    pub fn set_identity(&mut self, uid: u32, gid: u32) {
        self.identity = Some((uid, gid));
    }

    /// Writes a line; `fields` follows the message, as ` key=value`.
    pub fn log(&mut self, level: Level, message: &dyn Display, fields: &dyn Display) {
        if level < self.level {
            return;
        }
        let mut line = message!("{}{fields}", LogLine(level, message));
        if let Some((uid, gid)) = self.identity {
            // Writing to a message never fails.
            let _ = write!(line, " uid={uid} gid={gid}");
        }
        self.write_line(&line);
    }

    /// Writes a line at level info; `fields` follows the message, as ` key=value`.
    pub fn info(&mut self, message: &dyn Display, fields: &dyn Display) {
        self.log(Level::Info, message, fields);
    }

    /// Writes a line at level warn.
    pub fn warn(&mut self, message: &dyn Display) {
        self.log(Level::Warn, message, &"");
    }

    /// Writes a line at level error.
    pub fn error(&mut self, message: &dyn Display) {
        self.log(Level::Error, message, &"");
    }

    fn write_line(&mut self, line: &Message) {
        self.flush();
        // A log line starts at the beginning of a line.
        if self.open_line {
            self.open_line = !self.queue.push(b"\n");
        }
        if self.lost > 0 {
            let note = LogLine(Level::Warn, &"the console was too slow");
            if !self.push_line(&message!("{note} lost_lines={}", self.lost)) {
                self.lost = self.lost.saturating_add(1);
                return;
            }
            self.lost = 0;
        }
        if !self.push_line(line) {
            self.lost = self.lost.saturating_add(1);
        }
        self.flush();
    }

    fn push_line(&mut self, line: &Message) -> bool {
        let text = line.as_bytes();
        text.len() < self.queue.free() && self.queue.push(text) && self.queue.push(b"\n")
    }

    /// Free space for the workload's output, in bytes.
    pub fn room(&self) -> usize {
        self.queue.free().saturating_sub(LOG_RESERVE)
    }

    /// Queues output of the workload, no more than there is [`room`](Self::room) for.
    pub fn write(&mut self, output: &[u8]) {
        if self.queue.push(output) {
            self.open_line = !output.ends_with(b"\n");
        }
        self.flush();
    }

    /// Bytes that have not been sent yet: those queued here, and those in the device's driver.
    pub fn pending(&self) -> usize {
        self.queue.filled().len() + self.unsent()
    }

    /// Bytes that have been sent, modulo 2^64.
    pub fn sent(&self) -> usize {
        self.written.wrapping_sub(self.unsent())
    }

    /// Bytes in the device's driver; 0 for a device that is not a terminal.
    fn unsent(&self) -> usize {
        let device = self.device.as_ref();
        device.map_or(0, |(device, _)| terminal::unsent(device).unwrap_or(0))
    }

    /// Writes what the device accepts now, at most [`MAX_WRITE`] bytes.
    pub fn flush(&mut self) {
        if !self.queue.is_empty() {
            let Some((device, _)) = &self.device else {
                return self.queue.consume(QUEUE);
            };
            let filled = self.queue.filled();
            match files::write(device, filled.get(..MAX_WRITE).unwrap_or(filled)) {
                Ok(count) => {
                    self.queue.consume(count);
                    self.written = self.written.wrapping_add(count);
                }
                Err(Errno::AGAIN) => {}
                // It is gone, or was hung up: open it again, or another one if that fails.
                Err(_) => {
                    self.device = self.open_first();
                    self.watched = EventFlags::empty();
                }
            }
        }
    }
}

impl Log for Console {
    fn warn(&mut self, message: &dyn Display) {
        Self::warn(self, message);
    }
}

/// Displays the start of a log line: `pigeon-init: level=info msg="…"`.
struct LogLine<'a>(Level, &'a dyn Display);

impl Display for LogLine<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(level, message) = self;
        let (level, message) = (level.name(), Quoted(*message));
        write!(formatter, "pigeon-init: level={level} msg={message}")
    }
}
