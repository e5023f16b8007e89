//! One epoll instance and its events (epoll(7)).

use crate::context;
use crate::error::Result;
use core::cell::Cell;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

/// Most events returned by one wait.
const EVENTS: usize = 32;

/// Number of waits after which the epoll instance is replaced by a new one without stale registrations. A
/// closed file stays registered while a child has a copy of it (epoll(7)), and causes spurious wakeups: a
/// child that is frozen before it has started has copies of all.
const WAITS: u32 = 1024;

/// Bits of [`EventFlags`] without an event: they hold the number of the instance of a registration.
const INSTANCE: EventFlags = EventFlags::from_bits_retain(0xff * NEXT_INSTANCE);
const NEXT_INSTANCE: u32 = 1 << 16;

/// Buffer for the events of one wait.
pub type EventBuffer = [Event; EVENTS];

/// No events.
pub const NO_EVENTS: EventBuffer = [Event {
    flags: EventFlags::empty(),
    data: EventData::new_u64(0),
}; EVENTS];

/// An epoll instance, and the events of the last wait.
pub struct Poller {
    epoll: OwnedFd,
    /// A registration has failed.
    failed: Cell<bool>,
    waits: u32,
    /// The number of this instance, in the bits of [`INSTANCE`].
    instance: EventFlags,
    next: usize,
    count: usize,
    events: &'static mut EventBuffer,
}

fn create() -> Result<OwnedFd> {
    epoll::create(CreateFlags::CLOEXEC).map_err(context!("create an epoll instance"))
}

impl Poller {
    /// Creates an epoll instance, whose events are returned in this buffer.
    pub fn new(events: &'static mut EventBuffer) -> Result<Self> {
        let epoll = create()?;
        Ok(Self {
            epoll,
            failed: Cell::new(false),
            waits: 0,
            instance: EventFlags::empty(),
            next: 0,
            count: 0,
            events,
        })
    }

    /// Changes the events registered for `fd` from `watched` to `wanted`, and updates `watched`. Events are
    /// returned with `token`.
    ///
    /// Without wanted events the descriptor is not registered, as epoll always reports hang-ups. Call again
    /// after [`has_failed`](Self::has_failed), which is also set by a new instance.
    pub fn watch(&self, fd: &OwnedFd, token: u64, watched: &mut EventFlags, wanted: EventFlags) {
        let instance = self.instance;
        let next = wanted | instance;
        if *watched == next {
            return;
        }
        let data = EventData::new_u64(token);
        let is_watched = *watched & INSTANCE == instance && *watched != instance;
        let changed = match (is_watched, wanted.is_empty()) {
            (false, true) => Ok(()),
            (false, false) => epoll::add(&self.epoll, fd, data, wanted),
            (true, true) => epoll::delete(&self.epoll, fd),
            (true, false) => epoll::modify(&self.epoll, fd, data, wanted),
        };
        // Out of memory, or fs.epoll.max_user_watches reached (epoll_ctl(2)).
        match changed {
            Ok(()) => *watched = next,
            Err(_) => self.failed.set(true),
        }
    }

    /// Whether a registration has failed since [`clear_failed`](Self::clear_failed): events of its source will
    /// be missed.
    pub fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// Clears the flag, before all registrations are retried.
    pub fn clear_failed(&self) {
        self.failed.set(false);
    }

    /// Waits for events, at most `milliseconds`.
    pub fn wait(&mut self, milliseconds: u64) {
        // More than 24 days is no timeout: longer ones need a system call that Linux 5.10 does not have.
        let timeout = i32::try_from(milliseconds)
            .ok()
            .map(|milliseconds| Timespec {
                tv_sec: i64::from(milliseconds / 1000),
                tv_nsec: i64::from(milliseconds % 1000 * 1_000_000),
            });
        self.next = 0;
        // An error counts as no events.
        self.count = epoll::wait(&self.epoll, &mut self.events[..], timeout.as_ref()).unwrap_or(0);
        self.waits = self.waits.wrapping_add(1);
        if self.waits.is_multiple_of(WAITS)
            && let Ok(epoll) = create()
        {
            self.epoll = epoll;
            let number = self.instance.bits().wrapping_add(NEXT_INSTANCE);
            self.instance = EventFlags::from_bits_retain(number) & INSTANCE;
            self.failed.set(true);
        }
    }

    /// The next event of the last wait: its token and flags.
    pub fn next(&mut self) -> Option<(u64, EventFlags)> {
        let event = self.events.get(..self.count)?.get(self.next)?;
        self.next += 1;
        Some((event.data.u64(), event.flags))
    }
}
