//! Forwarding TCP ports of the host to a VM by `CONNECT`, without a network device.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Client, Error};

/// How long to wait when no connection can be accepted, for instance with too many open files.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// How long the guest may send nothing after the client has closed its side, before the connection is closed.
/// Not longer, as a client that has closed both sides looks the same and occupies one of the guest's connections.
const QUIET: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// A forwarded port. When this is dropped, it stops listening, and open connections continue.
pub struct Forward {
    address: SocketAddr,
    listener: TcpListener,
}

impl Forward {
    /// Listens on `address` (port 0: any free port) and connects to `target`, such as
    /// `127.0.0.1:80`, in the VM behind `uds`. `failed` is called for connections that fail.
    pub fn start(
        address: impl ToSocketAddrs + std::fmt::Debug,
        uds: &Path,
        target: &str,
        failed: impl Fn(Error) + Send + Clone + 'static,
    ) -> Result<Forward> {
        let listener = TcpListener::bind(&address)
            .with_context(|| format!("unable to listen on {address:?}"))?;
        let address = listener.local_addr()?;
        let (uds, target) = (uds.to_path_buf(), target.to_string());
        let accepting = listener.try_clone()?;
        thread::spawn(move || {
            for client in until_shutdown(accepting.incoming()) {
                let (uds, target, failed) = (uds.clone(), target.clone(), failed.clone());
                thread::spawn(move || {
                    if let Err(error) = relay(&client, uds, &target) {
                        let _ = client.shutdown(Shutdown::Both);
                        failed(error);
                    }
                });
            }
        });
        Ok(Forward { address, listener })
    }

    /// The listening address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // This also ends a blocked accept.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// The connections to a listener until it is shut down. After an error, the next attempt is made after [`PAUSE`].
pub(crate) fn until_shutdown<S>(
    incoming: impl Iterator<Item = io::Result<S>>,
) -> impl Iterator<Item = S> {
    let is_shut_down = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
    incoming
        .take_while(move |client| !client.as_ref().is_err_and(is_shut_down))
        .filter_map(|client| client.inspect_err(|_| thread::sleep(PAUSE)).ok())
}

/// Forwards one connection until both sides are closed.
fn relay(client: &TcpStream, uds: PathBuf, target: &str) -> Result<(), Error> {
    let (guest, early) = Client::new(uds).tunnel(target)?;
    let (mut client, guest) = (client, &guest);
    // Small responses must not be delayed.
    let _ = client.set_nodelay(true);
    let sent = client.write_all(&early);
    sent.map_err(Error::broken)?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let _ = copy(client, guest);
            wait_until_quiet(guest);
            let _ = guest.shutdown(Shutdown::Write);
        });
        let ended = copy(guest, client);
        let how = if ended.is_ok() {
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        let _ = client.shutdown(how);
        if ended.is_err() {
            let _ = guest.shutdown(Shutdown::Both);
        }
    });
    Ok(())
}

/// Waits until the guest has sent nothing for [`QUIET`], or has closed: hybrid vsock does not forward a
/// half-close, but closes both directions, and what the guest still sends would be lost.
pub(crate) fn wait_until_quiet(guest: &UnixStream) {
    let mut polled = [PollFd::new(guest, PollFlags::IN | PollFlags::RDHUP)];
    let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    while poll(&mut polled, Some(&QUIET)) != Ok(0) && !polled[0].revents().intersects(closed) {
        // Another thread reads it.
        thread::sleep(Duration::from_millis(10));
    }
}

/// Copies bytes as they arrive.
pub(crate) fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(size) => to.write_all(&buffer[..size])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Client {
    /// `CONNECT host:port`: a connection to a TCP port of the guest, and the bytes received on it so far.
    pub fn tunnel(&self, target: &str) -> Result<(UnixStream, Vec<u8>), Error> {
        let mut http = self.http(Client::RESPONSE_LIMIT)?;
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        http.send(request.as_bytes())
            .map_err(Error::request_failed)?;
        let head = http.receive_head().map_err(Error::request_failed)?;
        if head.status != 200 {
            return Err(Client::refused(head, http));
        }
        let (stream, early) = http.into_stream();
        Ok((stream.into_stream().map_err(Error::broken)?, early))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn accepting_goes_on_after_a_pause_and_ends_with_the_listener() {
        let error = |errno: rustix::io::Errno| Err(errno.into());
        let results = [
            Ok(1),
            error(rustix::io::Errno::MFILE),
            Ok(2),
            error(rustix::io::Errno::INVAL),
            Ok(3),
        ];
        let begin = Instant::now();
        let clients: Vec<_> = until_shutdown(results.into_iter()).collect();
        assert_eq!(clients, [1, 2]);
        assert!(begin.elapsed() >= PAUSE);
    }
}
