//! A Unix socket for a VM's API without the handshake of hybrid vsock, for clients that do not support it, such
//! as curl.

use std::{
    fs::{self, Permissions},
    io::{self, Write},
    net::Shutdown,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    Error,
    forward::{copy, until_shutdown, wait_until_quiet},
    image::disk::directory_of,
    vsock::{self, API_PORT},
};

/// How long the guest may take to accept a connection.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// The proxy's socket, removed on drop; open connections stay open.
pub struct Proxy {
    socket: PathBuf,
    listener: UnixListener,
    _reservation: vsock::Reservation,
}

impl Proxy {
    /// Creates `socket`, accessible only by this user, for the API behind `uds`. A socket left behind by an earlier
    /// proxy is replaced.
    pub fn start(socket: &Path, uds: &Path) -> Result<Proxy> {
        let reservation = vsock::Reservation::new(socket)?;
        let cannot = || format!("unable to create {}", socket.display());
        // No other user may connect before its mode is set.
        let private = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(directory_of(socket))
            .with_context(cannot)?;
        let made = private.path().join("s");
        let listener = UnixListener::bind(&made).with_context(cannot)?;
        fs::set_permissions(&made, Permissions::from_mode(0o600)).with_context(cannot)?;
        fs::rename(&made, socket).with_context(cannot)?;
        let uds = uds.to_path_buf();
        let accepting = listener.try_clone().with_context(cannot)?;
        thread::spawn(move || {
            for client in until_shutdown(accepting.incoming()) {
                let uds = uds.clone();
                thread::spawn(move || relay(client, &uds));
            }
        });
        Ok(Proxy {
            socket: socket.into(),
            listener,
            _reservation: reservation,
        })
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = fs::remove_file(&self.socket);
        // This also ends a blocked accept.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// One connection.
fn relay(client: UnixStream, uds: &Path) -> Option<()> {
    let guest = match vsock::connect(uds, API_PORT, HANDSHAKE) {
        Ok(guest) => guest,
        Err(error) => return refuse(client, &error),
    };
    // No timeout: waiting for an exit code can take long.
    guest.set_read_timeout(None).ok()?;
    let (from_client, to_client) = (client.try_clone().ok()?, client);
    let (from_guest, to_guest) = (guest.try_clone().ok()?, guest);
    let there = thread::spawn(move || {
        let _ = copy(from_client, &to_guest);
        wait_until_quiet(&to_guest);
        // Hybrid vsock does not support half-open connections.
        let _ = to_guest.shutdown(Shutdown::Both);
    });
    let _ = copy(from_guest, &to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    there.join().ok()
}

/// The response if there is no VM: closing the connection without one looks like a broken proxy.
fn refuse(mut client: UnixStream, error: &Error) -> Option<()> {
    let body = json!({"error": error.to_string()}).to_string();
    let response = format!(
        "HTTP/1.1 502 Bad Gateway\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    client.write_all(response.as_bytes()).ok()?;
    client.shutdown(Shutdown::Write).ok()?;
    // Read the request: a client that cannot send it does not read the response.
    client.set_read_timeout(Some(HANDSHAKE)).ok()?;
    copy(client, io::sink()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_socket_is_private_and_replaces_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let [uds, socket] = ["vm.vsock", "api.sock"].map(|name| dir.path().join(name));
        fs::write(&socket, "a file").unwrap();
        assert!(Proxy::start(&socket, &uds).is_err());
        assert_eq!(fs::read_to_string(&socket).unwrap(), "a file");
        fs::remove_file(&socket).unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        // A child that another test starts has it open until its execve.
        while UnixStream::connect(&socket).is_ok() {}
        let guest = UnixListener::bind(&uds).unwrap();
        let proxy = Proxy::start(&socket, &uds).unwrap();
        let gone = uds.clone();
        assert_eq!(
            fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(Proxy::start(&socket, &uds).is_err());
        let host = thread::spawn(move || {
            // The first connection only checks whether there is a listener.
            let (mut stream, command) = loop {
                let (mut stream, _) = guest.accept().unwrap();
                let mut command = [0; 14];
                stream.read_exact(&mut command).unwrap();
                stream.write_all(b"OK 1\n").unwrap();
                let mut first = [0];
                if stream.read(&mut first).unwrap() == 1 {
                    break (stream, command);
                }
            };
            stream.write_all(b"answer").unwrap();
            command
        });
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"?").unwrap();
        let mut response = String::new();
        client.read_to_string(&mut response).unwrap();
        assert_eq!(response, "answer");
        assert_eq!(&host.join().unwrap(), b"CONNECT 10000\n");
        // The VM has ended, and its socket was removed.
        fs::remove_file(&gone).unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"GET /v1/status").unwrap();
        let mut response = String::new();
        client.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.1 502 "), "{response}");
        assert!(
            response.contains("{\"error\":\"unable to connect to "),
            "{response}"
        );
        let link = dir.path().join("link");
        fs::hard_link(&socket, &link).unwrap();
        drop(proxy);
        assert!(!socket.exists());
        let error = UnixStream::connect(&link).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
