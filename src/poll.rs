//! The event loop's sources, and epoll(7) by their names.

use crate::sys;
use crate::task::Outcome;
use crate::why;
use pigeon_init::slab::Key;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

/// Where an event comes from. The last four have a key: the connection's.
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

const SOURCES: [Source; 8] = [
    Source::Signals,
    Source::Listener,
    Source::Console,
    Source::Workload,
    Source::Connection,
    Source::Input,
    Source::Output,
    Source::ErrorOutput,
];

/// Room for the events taken at once.
pub type Events = [Event; 32];

/// No events.
pub const NO_EVENTS: Events = [Event {
    flags: EventFlags::empty(),
    data: EventData::new_u64(0),
}; 32];

/// An epoll instance, and the events it has given out.
pub struct Poller {
    epoll: OwnedFd,
    next: usize,
    count: usize,
    events: &'static mut Events,
}

impl Poller {
    /// Creates one.
    pub fn new(events: &'static mut Events) -> Outcome<Self> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(why!("create an epoll instance"))?;
        Ok(Self {
            epoll,
            next: 0,
            count: 0,
            events,
        })
    }

    /// Waits for `wanted` events of `fd` instead of those `watched`, which says so afterwards.
    ///
    /// With nothing wanted the descriptor is not registered: the kernel reports hang-ups always.
    pub fn watch(
        &self,
        fd: &OwnedFd,
        source: Source,
        key: Key,
        watched: &mut EventFlags,
        wanted: EventFlags,
    ) {
        if *watched == wanted {
            return;
        }
        // The source in the upper half, the key in the lower one.
        let event = Event {
            flags: wanted,
            data: EventData::new_u64((source as u64) << 32 | u64::from(key.to_bits())),
        };
        let operation = match (watched.is_empty(), wanted.is_empty()) {
            (true, _) => sys::EPOLL_ADD,
            (_, true) => sys::EPOLL_DELETE,
            _ => sys::EPOLL_MODIFY,
        };
        // Only memory can be missing (epoll_ctl(2)); then the next change tries again.
        if sys::epoll_control(&self.epoll, operation, fd, &event).is_ok() {
            *watched = wanted;
        }
    }

    /// Waits for events, at most so many milliseconds.
    pub fn wait(&mut self, milliseconds: u64) {
        // -1: for ever, which is what a month is here.
        let timeout = i32::try_from(milliseconds).unwrap_or(-1);
        self.next = 0;
        self.count = sys::epoll_wait(&self.epoll, self.events, timeout);
    }

    /// The next of the events that came.
    pub fn next(&mut self) -> Option<(Source, Key, EventFlags)> {
        let event = self.events.get(..self.count)?.get(self.next)?;
        self.next += 1;
        let data = event.data.u64();
        let source = SOURCES.get((data >> 32) as usize)?;
        Some((*source, Key::from_bits(data as u32), event.flags))
    }
}
