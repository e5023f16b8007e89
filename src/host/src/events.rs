//! Events that the init sends to the host (`PIGEON_EVENTS_PORT`): it connects to a vsock port of
//! the host, which hybrid vsock maps to a Unix socket.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::vsock;

/// An event in a VM.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The root is mounted, the configuration is valid, the API is up.
    Ready,
    /// The workload runs.
    Started {
        /// Its pid.
        pid: u32,
    },
    /// The workload has ended.
    Exited {
        /// Its exit code; 128 + the signal that killed it.
        code: i32,
        /// The kernel killed it because memory ran out.
        oom_killed: bool,
    },
    /// The VM was restored from a snapshot.
    Restored {
        /// 1 plus the number of restores.
        generation: u64,
    },
    /// An event of a later version.
    #[serde(other)]
    Unknown,
}

/// The socket for a VM's events, until dropped.
pub struct Listener {
    acceptor: Acceptor,
    path: PathBuf,
}

/// Waits for connections to a [`Listener`], which may be dropped meanwhile.
pub struct Acceptor(UnixListener);

/// The Unix socket for the guest's connections to a port of the host. (Firecracker docs/vsock.md,
/// "Guest-initiated connections")
pub fn socket_path(uds: &Path, port: u32) -> PathBuf {
    let mut path = uds.as_os_str().to_os_string();
    path.push(format!("_{port}"));
    path.into()
}

impl Listener {
    /// Listens for the VM whose vsock socket is `uds`; call it before the VM starts.
    pub fn bind(uds: &Path, port: u32) -> Result<Listener> {
        let path = socket_path(uds, port);
        // An existing socket was left behind by a VM that has ended.
        vsock::vacate(&path)?;
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("unable to create {}", path.display()))?;
        Ok(Listener {
            acceptor: Acceptor(listener),
            path,
        })
    }

    /// Waits for a connection from the VM.
    pub fn accept(&self) -> Result<Events> {
        self.acceptor.accept()
    }

    /// For a thread that waits indefinitely: the socket is removed when this is dropped, not the acceptor.
    pub fn acceptor(&self) -> Result<Acceptor> {
        let listener = self.acceptor.0.try_clone();
        listener.map(Acceptor).context("unable to listen")
    }
}

impl Acceptor {
    /// Waits for a connection from the VM.
    pub fn accept(&self) -> Result<Events> {
        let (stream, _) = self.0.accept().context("unable to accept")?;
        Ok(Events(BufReader::new(stream)))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Maximum size of an event in bytes.
const MAX_LINE: u64 = 4096;

/// The events of one connection.
pub struct Events(BufReader<UnixStream>);

impl Events {
    /// Waits for the next one; None if the VM has ended.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        let mut line = String::new();
        let size = self
            .0
            .by_ref()
            .take(MAX_LINE)
            .read_line(&mut line)
            .context("unable to read events")?;
        if size == 0 {
            return Ok(None);
        }
        let event = serde_json::from_str(&line);
        event
            .map(Some)
            .with_context(|| format!("not an event: {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn events_are_lines_of_json_at_the_ports_socket() {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("vm.vsock");
        let listener = Listener::bind(&uds, 10_001).unwrap();
        let path = dir.path().join("vm.vsock_10001");
        let mut guest = UnixStream::connect(&path).unwrap();
        let lines = "{\"event\":\"ready\"}\n{\"event\":\"started\",\"pid\":84}\n\
                     {\"event\":\"exited\",\"code\":137,\"oom_killed\":true}\n\
                     {\"event\":\"restored\",\"generation\":2}\n{\"event\":\"later\",\"x\":[]}\n";
        guest.write_all(lines.as_bytes()).unwrap();
        drop(guest);
        let mut events = listener.accept().unwrap();
        let mut seen = vec![];
        while let Some(event) = events.next_event().unwrap() {
            seen.push(event);
        }
        let expected = [
            Event::Ready,
            Event::Started { pid: 84 },
            Event::Exited {
                code: 137,
                oom_killed: true,
            },
            Event::Restored { generation: 2 },
            Event::Unknown,
        ];
        assert_eq!(seen, expected);
        assert!(Listener::bind(&uds, 10_001).is_err());
        let _waiting = listener.acceptor().unwrap();
        drop(listener);
        assert!(!path.exists());
        // Any other file at this path is kept.
        fs::write(&path, "x").unwrap();
        assert!(Listener::bind(&uds, 10_001).is_err());
        assert!(path.exists());
    }
}
