//! A connection to a guest, which is not waited for longer than its limit says.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// How long a guest is waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    /// For ever: it answers when something has happened.
    None,
    /// So long for each read and write, for as many as it takes.
    Progress(Duration),
    /// So long for all of them: a guest that answers byte by byte does not get more.
    Total(Duration),
}

/// A stream with such a limit. What is not read or written in time is an error of the kind
/// [`TimedOut`](io::ErrorKind::TimedOut).
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    limit: Limit,
    /// When there is no more time, and when there is none for any call of its client.
    deadline: Option<Instant>,
    end_of_all: Option<Instant>,
}

impl Connection {
    pub(crate) fn new(
        stream: UnixStream,
        limit: Limit,
        end_of_all: Option<Instant>,
    ) -> io::Result<Connection> {
        let mut connection = Connection {
            stream,
            limit,
            deadline: None,
            end_of_all,
        };
        connection.set_limit(limit)?;
        Ok(connection)
    }

    /// From now on.
    pub(crate) fn set_limit(&mut self, limit: Limit) -> io::Result<()> {
        self.limit = limit;
        let (timeout, deadline) = match limit {
            Limit::None => (None, None),
            Limit::Progress(timeout) => (Some(timeout), None),
            Limit::Total(timeout) => (None, Some(Instant::now() + timeout)),
        };
        self.deadline = deadline.into_iter().chain(self.end_of_all).min();
        self.set_timeouts(timeout)
    }

    /// Without any limit from now on: whoever uses it waits by poll(2).
    pub(crate) fn set_nonblocking(&mut self) -> io::Result<()> {
        self.end_of_all = None;
        self.set_limit(Limit::None)?;
        self.stream.set_nonblocking(true)
    }

    /// The stream, without a limit.
    pub(crate) fn into_stream(self) -> io::Result<UnixStream> {
        self.set_timeouts(None)?;
        Ok(self.stream)
    }

    /// The stream itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    fn limited<T>(&mut self, act: impl FnOnce(&mut UnixStream) -> io::Result<T>) -> io::Result<T> {
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
        let has_limit = self.limit != Limit::None || self.deadline.is_some();
        act(&mut self.stream).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock if has_limit => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
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

    fn connection(limit: Limit, end_of_all: Option<Instant>) -> (Connection, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Connection::new(near, limit, end_of_all).unwrap(), far)
    }

    #[test]
    fn a_guest_that_answers_byte_by_byte_does_not_get_more_time() {
        let begin = Instant::now();
        let (mut connection, mut far) = connection(Limit::Total(SHORT), None);
        thread::spawn(move || {
            while far.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let mut read = vec![];
        assert!(is_timeout(connection.read_to_end(&mut read)));
        assert!(!read.is_empty() && begin.elapsed() >= SHORT);
        // With time for each byte it would go on.
        connection.set_limit(Limit::Progress(10 * SHORT)).unwrap();
        connection.read_exact(&mut [0; 100]).unwrap();
    }

    #[test]
    fn a_guest_that_takes_nothing_is_not_waited_for() {
        let (mut connection, _far) = connection(Limit::Progress(SHORT), None);
        assert!(is_timeout(connection.write_all(&vec![0; 16 << 20])));
        assert!(is_timeout(connection.read(&mut [0])));
    }

    #[test]
    fn no_limit_goes_beyond_the_end_of_all_calls() {
        let hour = Duration::from_secs(3600);
        for limit in [Limit::None, Limit::Progress(hour), Limit::Total(hour)] {
            let end = Instant::now() + SHORT;
            let (mut connection, _far) = connection(limit, Some(end));
            assert!(is_timeout(connection.read(&mut [0])), "{limit:?}");
            assert!(Instant::now() >= end);
        }
    }
}
