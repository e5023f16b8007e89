//! Events for the host: lines of JSON on a vsock connection from PID 1.

use crate::context::EventSource;
use crate::sys::epoll::Poller;
use crate::sys::{self, files, vsock};
use core::fmt::Display;
use proto::buffer::Buffer;
use proto::message;
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Bytes of events queued for the connection: there are four kinds, of at most 100 bytes each.
const QUEUE: usize = 1024;

/// The connection to the host, opened when there is an event to send.
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
    /// Events for a port of the host, if one is configured.
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

    /// Starts connecting early, so that the first event does not wait for the connection.
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
        // Only a write shows that the last connection is closed or was refused: then a new one is tried.
        let tries = if self.socket.is_some() { 2 } else { 1 };
        for _ in 0..tries {
            if self.socket.is_none() {
                self.close();
                self.connect();
            }
            // If the queue is full, nobody reads it.
            let _dropped = self.queue.push(line.as_bytes());
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

    /// Writes what the connection accepts: nothing until it is established.
    pub fn flush(&mut self) {
        while !self.queue.is_empty()
            && let Some(socket) = &self.socket
        {
            match files::write(socket, self.queue.filled()) {
                Ok(count) => self.queue.consume(count),
                Err(Errno::AGAIN) => return,
                // It is being established, or was refused.
                Err(Errno::NOTCONN) if matches!(sys::has_hung_up(socket, 0), Ok(false)) => return,
                Err(_) => self.close(),
            }
        }
    }

    /// Drops the connection; the next event opens a new one.
    pub fn close(&mut self) {
        self.socket = None;
        self.watched = EventFlags::empty();
        self.queue.consume(QUEUE);
        self.has_exit = false;
    }

    /// The connection is writable, or was closed.
    pub fn on_event(&mut self, flags: EventFlags) {
        if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            self.close();
        }
        self.flush();
    }

    /// Waits until the connection is writable, while anything is queued.
    pub fn watch(&mut self, poller: &Poller) {
        let wanted = match self.queue.is_empty() {
            true => EventFlags::empty(),
            false => EventFlags::OUT,
        };
        if let Some(socket) = &self.socket {
            let token = EventSource::Events.token(Key::default());
            poller.watch(socket, token, &mut self.watched, wanted);
        }
    }
}
