//! Console input for a workload that does not run as root.
//!
//! A process that has a terminal open can block all other users of it (TIOCSETD while another process
//! waits in it, drivers/tty/tty_ldisc.c), and PID 1 writes to this one. So such a workload gets a pipe.

use crate::context::{Context, EventSource};
use crate::sys::{GuestFile, files};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Most bytes in one read: a line has at most 4096 (N_TTY_BUF_SIZE).
const MAX_READ: usize = 4096;

/// The console and the pipe, until either is closed.
#[derive(Default)]
pub struct ConsoleInput {
    ends: Option<(OwnedFd, GuestFile)>,
    watched: EventFlags,
}

impl ConsoleInput {
    /// Starts copying from `console` to `pipe`, both non-blocking.
    pub fn open(&mut self, console: OwnedFd, pipe: GuestFile) {
        self.ends = Some((console, pipe));
    }

    /// Waits for input.
    pub fn watch(&mut self, context: &Context) {
        if let Some((console, _)) = &self.ends {
            let token = EventSource::ConsoleInput.token(Key::default());
            let watched = &mut self.watched;
            context
                .poller
                .watch(console, token, watched, EventFlags::IN);
        }
    }

    /// Copies the input. What does not fit in the pipe is lost, as with a terminal that nobody reads.
    pub fn copy(&mut self, context: &mut Context) {
        let Some((console, pipe)) = &mut self.ends else {
            return;
        };
        let room = context.scratch.get_mut(..MAX_READ).unwrap_or(&mut []);
        let copied = match files::read(console, room) {
            // Ctrl-D, or a hang-up.
            Ok(0) => Err(Errno::PIPE),
            Ok(count) => pipe.write(room.get(..count).unwrap_or(&[])),
            Err(errno) => Err(errno),
        };
        pipe.forget();
        if !matches!(copied, Ok(_) | Err(Errno::AGAIN)) {
            self.ends = None;
            self.watched = EventFlags::empty();
        }
    }
}
