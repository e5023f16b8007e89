//! The event loop's sources, and epoll(7) by their names.

use crate::task::Outcome;
use crate::why;
use pigeon_init::slab::Key;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

/// Where an event comes from.
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
    Connection(Key),
    /// A command's standard output, or both streams of a session.
    Output(Key),
    /// A command's standard error.
    ErrorOutput(Key),
    /// A session's standard input takes bytes again.
    Input(Key),
}

/// Tag in the highest byte, a slot's index in three, its generation in four.
impl From<Source> for EventData {
    fn from(source: Source) -> Self {
        let pack =
            |tag: u64, key: Key| tag << 56 | u64::from(key.index) << 32 | u64::from(key.generation);
        EventData::new_u64(match source {
            Source::Signals => 0,
            Source::Listener => 1 << 56,
            Source::Console => 2 << 56,
            Source::Workload => 3 << 56,
            Source::Connection(key) => pack(4, key),
            Source::Output(key) => pack(5, key),
            Source::ErrorOutput(key) => pack(6, key),
            Source::Input(key) => pack(7, key),
        })
    }
}

impl Source {
    fn from_data(data: EventData) -> Self {
        let data = data.u64();
        let key = Key {
            index: (data >> 32 & 0xff_ffff) as u32,
            generation: data as u32,
        };
        match data >> 56 {
            0 => Source::Signals,
            1 => Source::Listener,
            2 => Source::Console,
            3 => Source::Workload,
            4 => Source::Connection(key),
            5 => Source::Output(key),
            6 => Source::ErrorOutput(key),
            _ => Source::Input(key),
        }
    }
}

/// An epoll instance.
pub struct Poller(OwnedFd);

impl Poller {
    /// Creates one.
    pub fn new() -> Outcome<Self> {
        epoll::create(CreateFlags::CLOEXEC)
            .map_err(why!("create an epoll instance"))
            .map(Self)
    }

    /// Waits for `wanted` events of `fd` instead of `current` ones; what is waited for now.
    ///
    /// With nothing wanted the descriptor is not registered: the kernel reports hang-ups always.
    pub fn watch(
        &self,
        fd: &OwnedFd,
        source: Source,
        current: EventFlags,
        wanted: EventFlags,
    ) -> EventFlags {
        let done = match (current.is_empty(), wanted.is_empty()) {
            _ if current == wanted => Ok(()),
            (true, _) => epoll::add(&self.0, fd, source.into(), wanted),
            (false, true) => epoll::delete(&self.0, fd),
            (false, false) => epoll::modify(&self.0, fd, source.into(), wanted),
        };
        // Only memory can be missing (epoll_ctl(2)); then the next change tries again.
        if done.is_ok() { wanted } else { current }
    }

    /// Waits for events, at most `timeout` milliseconds, for ever without one.
    pub fn wait(
        &self,
        timeout: Option<u64>,
        events: &mut heapless::Vec<(Source, EventFlags), EVENTS>,
    ) {
        let mut buffer = [Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; EVENTS];
        let timeout = timeout.map(|milliseconds| Timespec {
            tv_sec: (milliseconds / 1000) as i64,
            tv_nsec: (milliseconds % 1000) as i64 * 1_000_000,
        });
        let count = epoll::wait(&self.0, &mut buffer[..], timeout.as_ref()).unwrap_or(0);
        events.clear();
        for event in buffer.iter().take(count) {
            let _fits = events.push((Source::from_data(event.data), event.flags));
        }
    }
}

/// Most events taken at once.
pub const EVENTS: usize = 32;
