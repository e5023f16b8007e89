//! Detects from the kernel's log and vmclock that this VM was restored from a snapshot.

use crate::context::{Context, EventSource};
use crate::sys::files;
use proto::kmsg;
use proto::slab::Key;
use proto::vmclock;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Most records of the kernel's log read in one iteration, so that a process that writes many does not
/// block the event loop.
const RECORDS: usize = 64;

/// How long after a call's restore the kernel may still report that restore, in milliseconds: the call can
/// be faster than the kernel, whose interrupt handler needs pages that the snapshot has on disk.
const LATE: u64 = 5_000;

/// The sources that report restores.
#[derive(Default)]
pub struct Triggers {
    /// /dev/kmsg, positioned at its end.
    log: Device,
    /// /dev/vmclock0
    clock: Device,
    /// The generation that the clock last had.
    generation: Option<u64>,
    /// Until then, the first line of the log is about a restore that a call has completed.
    late_until: u64,
}

#[derive(Default)]
struct Device {
    file: Option<OwnedFd>,
    watched: EventFlags,
}

/// What the triggers reported.
#[derive(Clone, Copy, Default)]
pub struct Notification {
    /// There was a restore.
    pub is_restored: bool,
    /// The kernel has reseeded since.
    pub is_reseeded: bool,
}

impl Triggers {
    /// Starts watching the devices that the boot opened.
    pub fn watch(&mut self, context: &mut Context) {
        let log = context.snapshot.kernel_log.take();
        self.log.file = log.filter(|log| rustix::fs::seek(log, SeekFrom::End(0)).is_ok());
        self.clock.file = context.snapshot.vmclock.take();
        self.generation = self.read_generation();
        if self.generation.is_none() {
            self.clock.file = None;
        }
        for device in [&mut self.log, &mut self.clock] {
            // A clock whose driver cannot be polled (EPERM) is read when the log has a new record.
            device.watch(context, EventFlags::IN);
        }
    }

    /// Registers again with a new poller instance.
    pub fn rewatch(&mut self, context: &Context) {
        self.log.watch(context, EventFlags::IN);
        let wanted = self.clock.watched & EventFlags::IN;
        self.clock.watch(context, wanted);
    }

    /// A call has restored this VM: what the kernel reports late is not about another restore.
    pub fn restored_by_call(&mut self, has_line: bool, now: u64) {
        self.generation = self.read_generation();
        self.late_until = if has_line {
            0
        } else {
            now.saturating_add(LATE)
        };
    }

    /// Polls the triggers; `flags` are their poller events.
    ///
    /// Each restore is reported once: with a vmclock, its generation tells whether a line of the log is
    /// about a restore already reported.
    pub fn poll(&mut self, flags: EventFlags, context: &mut Context) -> Notification {
        let mut has_line = false;
        for _ in 0..RECORDS {
            let Some(log) = &self.log.file else {
                break;
            };
            match files::read(log, &mut context.temp[..]) {
                Ok(count) => {
                    let record = context.temp.get(..count).unwrap_or(&[]);
                    has_line |= kmsg::is_virtual_machine_fork(record);
                }
                // EPIPE: records were overwritten; the next read continues after them.
                Err(Errno::PIPE) => {}
                Err(_) => break,
            }
        }
        // A clock that never notifies (no VMCLOCK_FLAG_NOTIFICATION_PRESENT).
        if flags.contains(EventFlags::HUP) {
            self.clock.watch(context, EventFlags::empty());
        }
        if has_line {
            has_line = core::mem::take(&mut self.late_until) <= context.now;
        }
        let before = self.generation;
        self.generation = self.read_generation();
        Notification {
            is_restored: match self.generation {
                Some(_) => self.generation != before,
                None => has_line,
            },
            is_reseeded: has_line,
        }
    }

    fn read_generation(&self) -> Option<u64> {
        let mut page = [0; vmclock::LENGTH];
        rustix::io::pread(self.clock.file.as_ref()?, &mut page, 0).ok()?;
        vmclock::generation(&page)
    }
}

impl Device {
    fn watch(&mut self, context: &Context, wanted: EventFlags) {
        if let Some(file) = &self.file {
            let token = EventSource::RestoreTrigger.token(Key::default());
            context.poller.watch(file, token, &mut self.watched, wanted);
        }
    }
}
