//! A TCP port of this machine that leads to a vsock port of a guest, for clients that only know
//! TCP: curl, and whatever a language brings.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::Result;

use crate::vsock;

/// How long the guest may be silent before a relayed connection is given up.
const PATIENCE: Duration = Duration::from_secs(180);

/// A port that is relayed as long as this process runs.
pub struct Relay {
    address: SocketAddr,
}

impl Relay {
    /// Relays a free port to `port` of the guest behind the hybrid-vsock `socket`.
    pub fn start(socket: &Path, port: u32) -> Result<Relay> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let socket = socket.to_path_buf();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let socket = socket.clone();
                thread::spawn(move || relay(client, socket, port));
            }
        });
        Ok(Relay { address })
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// One connection. What cannot be connected is closed, which is what a client expects.
fn relay(client: TcpStream, socket: PathBuf, port: u32) -> Option<()> {
    let guest = vsock::connect(&socket, port, PATIENCE).ok()?;
    let (from_client, to_client) = (client.try_clone().ok()?, client);
    let (from_guest, to_guest) = (guest.try_clone().ok()?, guest);
    let there = thread::spawn(move || {
        // The end of a client's bytes is the end of the connection: half-open ones do not exist
        // on hybrid vsock.
        let _ = copy(from_client, &to_guest);
        let _ = to_guest.shutdown(Shutdown::Both);
    });
    let _ = copy(from_guest, &to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    there.join().ok()
}

/// Copies bytes as they come.
fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            size => to.write_all(&buffer[..size])?,
        }
    }
}
