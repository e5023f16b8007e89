//! PID 1's end of a pipe or terminal of the workload or a command.

use crate::sys::epoll::Poller;
use crate::sys::{GuestFile, GuestThreads};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Number of reads that drain everything an exited process can have written: 1 MiB in a pipe
/// (pipe-max-size, pipe(7)), with at least 32 KiB per read, or 64 KiB in a terminal, with 4 KiB per read.
const LATE_READS: u32 = 40;

/// Our end of a pipe or terminal, until the other end is closed.
#[derive(Default)]
pub struct Channel {
    file: Option<GuestFile>,
    watched: EventFlags,
    /// Number of reads with data since the process ended.
    late_reads: u32,
}

impl Channel {
    /// A channel, which is open if there is an end. The end must be non-blocking.
    pub fn new(end: Option<OwnedFd>, threads: &'static GuestThreads) -> Self {
        Self {
            file: end.map(|end| GuestFile::new(end, threads)),
            ..Self::default()
        }
    }

    /// Whether our end is open.
    pub fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Whether a call on it is pending, as another process holds its lock.
    pub fn is_pending(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::is_pending)
    }

    /// Whether the last call could not be made, or is pending: its contents are unknown.
    pub fn is_locked(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::is_locked)
    }

    /// Whether a pending call has returned.
    pub fn has_returned(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::has_returned)
    }

    /// Closes our end.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Waits for `wanted` events. Without any it is not registered, as epoll always reports hang-ups.
    pub fn watch(&mut self, token: u64, wanted: EventFlags, poller: &Poller) {
        let wanted = match self.is_pending() {
            true => EventFlags::empty(),
            false => wanted,
        };
        if let Some(end) = self.file.as_ref().and_then(GuestFile::fd) {
            poller.watch(end, token, &mut self.watched, wanted);
        }
    }

    /// Reads once, at most `limit` bytes, and passes them to `take`. Returns their number, 0 if there are
    /// none now. Closes our end if the other end is closed.
    ///
    /// `over`: the command has ended. Other processes may keep writing to its pipe, so it is closed once
    /// everything that the command itself can have written was read.
    pub fn read(&mut self, limit: usize, over: bool, take: &mut dyn FnMut(&[u8])) -> usize {
        let Some(file) = &mut self.file else {
            return 0;
        };
        if self.late_reads == LATE_READS {
            self.close();
            return 0;
        }
        match file.read(limit, over, take) {
            Ok(count @ 1..) => {
                self.late_reads += u32::from(over);
                count
            }
            Err(Errno::AGAIN) => 0,
            // EIO: a terminal whose other end is closed.
            Ok(_) | Err(_) => {
                self.close();
                0
            }
        }
    }

    /// Writes as much as is accepted now. If the other end is closed, the bytes are dropped.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        match self.file.as_mut().map(|file| file.write(bytes)) {
            Some(Ok(count)) => count,
            Some(Err(Errno::AGAIN)) => 0,
            Some(Err(_)) | None => bytes.len(),
        }
    }

    /// Drops a pending write: the next call will not repeat the bytes that were not written.
    pub fn discard_write(&mut self) {
        if let Some(file) = &mut self.file {
            file.forget();
        }
    }
}
