//! A connection to a guest, with a time limit.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// How long to wait for a guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    /// No limit: it responds when an event occurs.
    None,
    /// A timeout for each read and write; their total is unlimited.
    Progress(Duration),
    /// A timeout for all of them together, also for a guest that responds byte by byte.
    Total(Duration),
}

/// A stream to a guest with a time limit. A read or write beyond it fails with
/// [`TimedOut`](io::ErrorKind::TimedOut).
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    limit: Limit,
    /// The deadline of this limit, and that of all calls of the client.
    deadline: Option<Instant>,
    client_deadline: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(
        stream: UnixStream,
        limit: Limit,
        client_deadline: Option<Instant>,
    ) -> io::Result<Connection> {
        let mut connection = Connection {
            stream,
            limit,
            deadline: None,
            client_deadline,
        };
        connection.set_limit(limit)?;
        Ok(connection)
    }

    /// Sets the limit, counted from now.
    pub(crate) fn set_limit(&mut self, limit: Limit) -> io::Result<()> {
        self.limit = limit;
        let (timeout, deadline) = match limit {
            Limit::None => (None, None),
            Limit::Progress(timeout) => (Some(timeout), None),
            // A timeout beyond the range of `Instant` is no limit.
            Limit::Total(timeout) => (None, Instant::now().checked_add(timeout)),
        };
        self.deadline = deadline.into_iter().chain(self.client_deadline).min();
        self.set_timeouts(timeout)
    }

    /// Removes all limits: the caller waits with poll(2).
    pub(crate) fn set_nonblocking(&mut self) -> io::Result<()> {
        self.client_deadline = None;
        self.set_limit(Limit::None)?;
        self.stream.set_nonblocking(true)
    }

    /// Returns the stream, without a limit.
    pub(crate) fn into_stream(self) -> io::Result<UnixStream> {
        self.set_timeouts(None)?;
        Ok(self.stream)
    }

    /// The underlying stream.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    fn limited<T>(
        &mut self,
        mut act: impl FnMut(&mut UnixStream) -> io::Result<T>,
    ) -> io::Result<T> {
        let has_limit = self.limit != Limit::None || self.deadline.is_some();
        loop {
            if let Some(deadline) = self.deadline {
                let mut left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                if let Limit::Progress(timeout) = self.limit {
                    left = left.min(timeout);
                }
                self.set_timeouts(Some(left))?;
            }
            match act(&mut self.stream) {
                // The kernel does not restart calls on a socket with a timeout (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && has_limit => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                result => return result,
            }
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.limited(|stream| stream.read(buffer))
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limited(|stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SHORT: Duration = Duration::from_millis(100);

    fn is_timeout<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    }

    fn connection(limit: Limit, client_deadline: Option<Instant>) -> (Connection, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Connection::new(near, limit, client_deadline).unwrap(), far)
    }

    #[test]
    fn a_guest_that_responds_byte_by_byte_gets_no_extra_time() {
        let begin = Instant::now();
        let (mut connection, mut far) = connection(Limit::Total(SHORT), None);
        // Sent here, as the thread may be scheduled after the timeout.
        far.write_all(b"x").unwrap();
        thread::spawn(move || {
            while far.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let mut read = vec![];
        assert!(is_timeout(connection.read_to_end(&mut read)));
        assert!(!read.is_empty() && begin.elapsed() >= SHORT);
        // With a timeout for each byte, it does not time out.
        connection.set_limit(Limit::Progress(10 * SHORT)).unwrap();
        connection.read_exact(&mut [0; 100]).unwrap();
    }

    #[test]
    fn a_guest_that_reads_nothing_times_out() {
        let (mut connection, _far) = connection(Limit::Progress(SHORT), None);
        assert!(is_timeout(connection.write_all(&vec![0; 16 << 20])));
        assert!(is_timeout(connection.read(&mut [0])));
    }

    #[test]
    fn no_limit_exceeds_the_deadline_of_the_client() {
        let hour = Duration::from_secs(3600);
        for limit in [Limit::None, Limit::Progress(hour), Limit::Total(hour)] {
            let end = Instant::now() + SHORT;
            let (mut connection, _far) = connection(limit, Some(end));
            assert!(is_timeout(connection.read(&mut [0])), "{limit:?}");
            assert!(Instant::now() >= end);
        }
    }
}
