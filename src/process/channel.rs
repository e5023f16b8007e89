//! PID 1's end of a stream of a workload or a command.

use crate::sys::epoll::Poller;
use crate::sys::{GuestFile, GuestThreads};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// So many reads take all that a process that has ended can have left: 1 MiB in a pipe (pipe-max-size,
/// pipe(7)), of which a read takes 32 KiB at least, or 64 KiB in a terminal, 4 KiB a read.
const LATE_READS: u32 = 40;

/// Our end of a pipe or terminal, until the other end is closed.
#[derive(Default)]
pub struct Channel {
    file: Option<GuestFile>,
    watched: EventFlags,
    /// How often something came since the process was over.
    late_reads: u32,
}

impl Channel {
    /// A channel, which is open if there is an end; that must not block.
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

    /// Our end, for calls that take no lock.
    pub fn end(&self) -> Option<&OwnedFd> {
        self.file.as_ref()?.fd()
    }

    /// Whether something waits in it for a process that has it locked.
    pub fn is_pending(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::is_pending)
    }

    /// Whether it could not be read, so that nobody knows what is in it.
    pub fn is_locked(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::is_locked)
    }

    /// Whether what waited in it has returned.
    pub fn has_returned(&self) -> bool {
        self.file.as_ref().is_some_and(GuestFile::has_returned)
    }

    /// Closes our end.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Waits for `wanted` events; what is not waited for is not registered, as a hang-up is reported
    /// even to who asks for nothing.
    pub fn watch(&mut self, token: u64, wanted: EventFlags, poller: &Poller) {
        let wanted = match self.is_pending() {
            true => EventFlags::empty(),
            false => wanted,
        };
        if let Some(end) = self.file.as_ref().and_then(GuestFile::fd) {
            poller.watch(end, token, &mut self.watched, wanted);
        }
    }

    /// Reads once, at most `limit` bytes, and has them taken. Returns how many came, 0 if none wait. When
    /// nobody has the other end open any more, ours is closed.
    ///
    /// `over`: the command has ended. Others may write for ever into its pipe: then it counts as its end
    /// when all that the command can have left there was read.
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
            // EIO: a terminal whose other end nobody has open.
            Ok(_) | Err(_) => {
                self.close();
                0
            }
        }
    }

    /// Writes as much as is taken now; what nobody reads any more is taken and dropped.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        match self.file.as_mut().map(|file| file.write(bytes)) {
            Some(Ok(count)) => count,
            Some(Err(Errno::AGAIN)) => 0,
            Some(Err(_)) | None => bytes.len(),
        }
    }

    /// Other bytes will be written than those that were not taken.
    pub fn discard_write(&mut self) {
        if let Some(file) = &mut self.file {
            file.forget();
        }
    }
}
