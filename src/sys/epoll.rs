//! One epoll instance and the events it gives out (epoll(7)).

use crate::context;
use crate::error::Result;
use core::cell::Cell;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

/// Events taken at once: a turn of the loop handles these before it looks at anything else.
const EVENTS: usize = 32;

/// Waits after which another instance takes over, in which nothing is registered that was closed. What a
/// child has open too stays registered when it is closed (epoll(7)), and wakes who waits for it: a child
/// that is held before it has begun has all there is.
const WAITS: u32 = 1024;

/// Bits of [`EventFlags`] that stand for no event: in which instance something is registered.
const INSTANCE: EventFlags = EventFlags::from_bits_retain(0xff * NEXT_INSTANCE);
const NEXT_INSTANCE: u32 = 1 << 16;

/// Room for the events taken at once.
pub type EventBuffer = [Event; EVENTS];

/// No events.
pub const NO_EVENTS: EventBuffer = [Event {
    flags: EventFlags::empty(),
    data: EventData::new_u64(0),
}; EVENTS];

/// An epoll instance, and the events it has given out.
pub struct Poller {
    epoll: OwnedFd,
    /// A registration has failed.
    failed: Cell<bool>,
    waits: u32,
    /// The number of this instance, of the bits of [`INSTANCE`].
    instance: EventFlags,
    next: usize,
    count: usize,
    events: &'static mut EventBuffer,
}

fn create() -> Result<OwnedFd> {
    epoll::create(CreateFlags::CLOEXEC).map_err(context!("create an epoll instance"))
}

impl Poller {
    /// Creates one.
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

    /// Waits for `wanted` events of `fd` instead of those `watched`, which says so afterwards. An
    /// event comes back with `token`.
    ///
    /// With nothing wanted the descriptor is not registered: the kernel reports hang-ups always. It is to be
    /// called anew after [`has_failed`](Self::has_failed), as when another instance has taken over.
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
        // Memory can be missing, or fs.epoll.max_user_watches be reached (epoll_ctl(2)).
        match changed {
            Ok(()) => *watched = next,
            Err(_) => self.failed.set(true),
        }
    }

    /// Whether a registration has failed since [`clear_failed`](Self::clear_failed): somebody waits
    /// in vain.
    pub fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// All are about to be tried again.
    pub fn clear_failed(&self) {
        self.failed.set(false);
    }

    /// Waits for events, at most `milliseconds`.
    pub fn wait(&mut self, milliseconds: u64) {
        // More than a month is for ever: longer times need a system call that Linux 5.10 has not.
        let timeout = i32::try_from(milliseconds)
            .ok()
            .map(|milliseconds| Timespec {
                tv_sec: i64::from(milliseconds / 1000),
                tv_nsec: i64::from(milliseconds % 1000 * 1_000_000),
            });
        self.next = 0;
        // An error leaves nothing to do but to look again.
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

    /// The next of the events that came: its token and what happened.
    pub fn next(&mut self) -> Option<(u64, EventFlags)> {
        let event = self.events.get(..self.count)?.get(self.next)?;
        self.next += 1;
        Some((event.data.u64(), event.flags))
    }
}
