//! Events for the host: lines of JSON on a vsock connection that PID 1 makes.

use crate::context::Source;
use crate::sys::epoll::Poller;
use crate::sys::{self, files, vsock};
use core::fmt::Display;
use proto::buffer::Buffer;
use proto::message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Bytes of events that wait for their connection: there are four kinds, of at most 100 bytes each.
const QUEUE: usize = 1024;

/// The connection to the host, made when there is something to say.
pub struct Events {
    /// `None`: events are disabled.
    port: Option<u32>,
    socket: Option<OwnedFd>,
    watched: EventFlags,
    queue: Buffer<QUEUE>,
    /// The last event is the exit event.
    has_exit: bool,
}

impl Events {
    /// For the host's port, if there is one.
    pub const fn new(port: Option<u32>) -> Self {
        Self {
            port,
            socket: None,
            watched: EventFlags::empty(),
            queue: Buffer::new(),
            has_exit: false,
        }
    }

    /// Drops all further events.
    pub fn disable(&mut self) {
        self.port = None;
        self.close();
    }

    /// Begins to connect, so that the first event finds the connection made.
    pub fn connect(&mut self) {
        if let Some(port) = self.port {
            self.socket = vsock::connect(port).ok();
        }
    }

    /// Sends an event to the host; it is dropped if nobody listens.
    pub fn send(&mut self, event: &dyn Display) {
        if self.port.is_none() {
            return;
        }
        let line = message!("{event}\n");
        // Only a write shows that the last connection is gone or was refused: then a new one is tried.
        let tries = if self.socket.is_some() { 2 } else { 1 };
        for _ in 0..tries {
            if self.socket.is_none() {
                self.close();
                self.connect();
            }
            // More than there is room for has not been taken by anybody.
            let _lost = self.queue.push(line.as_bytes());
            self.flush();
            if self.socket.is_some() {
                return;
            }
        }
    }

    /// Sends the exit event.
    pub fn send_exit(&mut self, event: &dyn Display) {
        self.send(event);
        self.has_exit = self.socket.is_some();
    }

    /// Whether the exit event has been sent.
    pub fn has_delivered_exit(&self) -> bool {
        self.has_exit && self.queue.is_empty()
    }

    /// Writes what the connection takes; before it is made that is nothing.
    pub fn flush(&mut self) {
        while !self.queue.is_empty()
            && let Some(socket) = &self.socket
        {
            match files::write(socket, self.queue.filled()) {
                Ok(count) => self.queue.consume(count),
                Err(Errno::AGAIN) => return,
                // It is being made, or was refused.
                Err(Errno::NOTCONN) if matches!(sys::has_hung_up(socket, 0), Ok(false)) => return,
                Err(_) => self.close(),
            }
        }
    }

    /// Drops the connection; the next event makes another one.
    pub fn close(&mut self) {
        self.socket = None;
        self.watched = EventFlags::empty();
        self.queue.consume(QUEUE);
        self.has_exit = false;
    }

    /// The connection can be written to, or is gone.
    pub fn on_event(&mut self, flags: EventFlags) {
        if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            self.close();
        }
        self.flush();
    }

    /// Registers for when the connection takes bytes, while there are any.
    pub fn watch(&mut self, poller: &Poller) {
        let wanted = match self.queue.is_empty() {
            true => EventFlags::empty(),
            false => EventFlags::OUT,
        };
        if let Some(socket) = &self.socket {
            let token = Source::Events.token(Key::default());
            poller.watch(socket, token, &mut self.watched, wanted);
        }
    }
}
