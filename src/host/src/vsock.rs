//! The host's side of Firecracker's hybrid vsock: a Unix socket that leads to any guest port. (Firecracker
//! docs/vsock.md; the device for QEMU is part of this crate, and compatible.)

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{Error, lock::LockFile};

/// The port of pigeon-init's API.
pub const API_PORT: u32 = 10_000;

/// Maximum size of a reply to the handshake in bytes: `OK ` and a number of 32 bits.
const MAX_REPLY: usize = 32;

/// Makes one attempt to connect to `port` in the guest. Fails while the guest has no driver or no listener;
/// `timeout` limits the handshake, and every read of the returned stream.
pub fn connect(socket: &Path, port: u32, timeout: Duration) -> Result<UnixStream, Error> {
    let mut stream = UnixStream::connect(socket).map_err(|source| Error::NoVm {
        uds: socket.into(),
        source,
    })?;
    let listening = handshake(&mut stream, port, timeout);
    listening.map_err(|source| Error::NotListening { port, source })?;
    Ok(stream)
}

/// Checks that a new socket at `path` would not replace a socket in use, or a file. A socket without a listener,
/// or a link to one, may be replaced.
fn ensure_vacant(path: &Path) -> anyhow::Result<()> {
    match UnixStream::connect(path) {
        Ok(_) => bail!("{} is in use already", path.display()),
        // There is no listener (unix(7)).
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) => {}
        Err(error) => {
            return Err(error).with_context(|| format!("unable to look at {}", path.display()));
        }
    }
    match fs::metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            bail!("{} exists and is not a socket", path.display())
        }
        _ => Ok(()),
    }
}

/// Removes the socket at `path`, if there is one without a listener. Anything else is an error, and is kept.
pub(crate) fn vacate(path: &Path) -> anyhow::Result<()> {
    ensure_vacant(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unable to remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The exclusive use of a socket's path, until dropped. Processes coordinate by a lock file, `PATH.lock`.
pub struct Reservation {
    socket: PathBuf,
    _lock: LockFile,
}

impl Reservation {
    /// Reserves the path, and removes a socket without a listener there. An error if another process has
    /// reserved it, if the socket is in use, or if there is another kind of file.
    pub fn new(socket: &Path) -> anyhow::Result<Reservation> {
        let mut lock = socket.as_os_str().to_os_string();
        lock.push(".lock");
        let lock = LockFile::try_new(Path::new(&lock))?;
        let lock = lock.with_context(|| format!("{} is in use already", socket.display()))?;
        vacate(socket)?;
        Ok(Reservation {
            socket: socket.into(),
            _lock: lock,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // A hypervisor leaves its socket behind; other listeners may have removed theirs.
        let _ = vacate(&self.socket);
    }
}

fn handshake(stream: &mut UnixStream, port: u32, timeout: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // Byte by byte, as the bytes after the line belong to the caller.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream
            .read_exact(&mut byte)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => io::Error::other("the handshake was not answered"),
                io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                _ => error,
            })?;
        line.push(byte[0]);
        if line.len() > MAX_REPLY {
            break;
        }
    }
    if !line.starts_with(b"OK ") {
        let line = line.escape_ascii();
        return Err(io::Error::other(format!("not a handshake: \"{line}\"")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::unix::{
            fs::symlink,
            net::{UnixDatagram, UnixListener},
        },
        sync::Barrier,
        thread,
    };

    /// Closes a listener. A process that another test starts may have it open until execve.
    fn close(listener: UnixListener, path: &Path) {
        drop(listener);
        while UnixStream::connect(path).is_ok() {}
    }

    #[test]
    fn only_a_socket_without_a_listener_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let _live = UnixListener::bind(path("live")).unwrap();
        let _other = UnixDatagram::bind(path("other")).unwrap();
        close(UnixListener::bind(path("left")).unwrap(), &path("left"));
        fs::write(path("file"), "x").unwrap();
        fs::create_dir(path("directory")).unwrap();
        symlink("live", path("link")).unwrap();
        symlink("left", path("link to left")).unwrap();
        for name in ["live", "other", "file", "directory", "link"] {
            assert!(vacate(&path(name)).is_err(), "{name}");
            assert!(path(name).exists(), "{name}");
        }
        for name in ["link to left", "left", "none"] {
            vacate(&path(name)).unwrap();
            assert!(path(name).symlink_metadata().is_err(), "{name}");
        }
    }

    #[test]
    fn a_path_can_be_reserved_only_once_at_a_time() {
        const MANY: usize = 8;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        for _ in 0..50 {
            // Left behind by a killed process.
            close(UnixListener::bind(&path).unwrap(), &path);
            fs::write(dir.path().join("vsock.lock"), "").unwrap();
            let begin = Barrier::new(MANY);
            let results: Vec<Result<_, String>> = thread::scope(|scope| {
                let reserve = || {
                    begin.wait();
                    let reservation = Reservation::new(&path).map_err(|error| error.to_string())?;
                    Ok((UnixListener::bind(&path).unwrap(), reservation))
                };
                let threads: Vec<_> = (0..MANY).map(|_| scope.spawn(reserve)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            UnixStream::connect(&path).unwrap();
            let refused = format!("{} is in use already", path.display());
            let mut winners = 0;
            for result in results {
                match result {
                    Ok((listener, _reservation)) => {
                        close(listener, &path);
                        winners += 1;
                    }
                    Err(error) => assert_eq!(error, refused),
                }
            }
            assert_eq!(winners, 1);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn the_handshake_leaves_the_guests_bytes_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let host = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"OK 1073741824\nhello").unwrap();
            let mut command = String::new();
            stream.read_to_string(&mut command).unwrap();
            command
        });
        let mut stream = connect(&path, API_PORT, Duration::from_secs(10)).unwrap();
        let mut greeting = [0; 5];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"hello");
        drop(stream);
        assert_eq!(host.join().unwrap(), "CONNECT 10000\n");
    }
}
