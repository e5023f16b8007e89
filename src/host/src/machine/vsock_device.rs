//! The vsock device of a VM on QEMU, with Firecracker's protocol: a Unix socket that leads to any port of the
//! guest, and `SOCKET_PORT` for each port of the host that the guest connects to. (Firecracker docs/vsock.md;
//! virtio specification 5.10; linux/virtio_vsock.h)
//!
//! QEMU's own device needs the host kernel's vhost-vsock, and so its /dev/vhost-vsock. rust-vmm's program,
//! vhost-device-vsock 0.3.0, stalls when much data is sent in both directions at once: it writes to the
//! host's stream only when there is nothing to read from it. `tests/vm/lab.rs` tests this and its other
//! faults.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::FileExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::vhost_user::{Frontend, Ring};
use crate::forward::PAUSE;

/// The host's context id.
const HOST_CID: u64 = 2;

/// Receive window of a connection in bytes, as in Firecracker.
const WINDOW: usize = 64 << 10;

/// How long the guest may take to respond to a request, or to a shutdown by the host.
const GUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of connections opened by the guest, and by the host; Firecracker allows as many in total.
/// Separate limits keep the API reachable however many connections the guest opens.
const MAX_CONNECTIONS: usize = 1023;

/// Maximum number of packets without data waiting for buffers of the guest, before resets are dropped: more
/// than all connections need, a request or response and a credit update each.
const MAX_ORDERS: usize = 4 * MAX_CONNECTIONS;

/// Maximum size of the host's first line: `CONNECT ` and a number of 32 bits.
const MAX_LINE: usize = 32;

/// The first of the host's port numbers, above those that are listened on.
const FIRST_PORT: u32 = 1 << 30;

/// The virtqueues that this device handles: packets to the guest, and from it.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;

/// Size of a packet's header in bytes.
const HEADER: usize = 44;

/// `type` of a stream's packets.
const STREAM: u16 = 1;

// `op`
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

// `flags` of SHUTDOWN: the sender will receive no more, send no more.
const NO_RECEIVE: u32 = 1;
const NO_SEND: u32 = 2;

/// struct virtio_vsock_hdr, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Header {
    source_cid: u64,
    destination_cid: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    buffer: u32,
    forwarded: u32,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let parts: [&[u8]; 10] = [
            &self.source_cid.to_le_bytes(),
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.operation.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buffer.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ];
        bytes.copy_from_slice(&parts.concat());
        bytes
    }

    fn of_bytes(bytes: &[u8; HEADER]) -> Header {
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let half = |at: usize| u16::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        Header {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            operation: half(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// The connection of a packet from the guest.
    fn ports(&self) -> Ports {
        Ports {
            host: self.destination_port,
            guest: self.source_port,
        }
    }
}

/// Reads a packet from the guest. None without a complete header; no data if it is incomplete or exceeds a
/// window.
fn read_packet(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Option<(Header, Option<Vec<u8>>)> {
    let mut reader = chain.reader(memory).ok()?;
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).ok()?;
    let header = Header::of_bytes(&header);
    let length = header.length as usize;
    // Descriptors can overlap: 4 GiB of data may be described in little memory.
    if length > reader.available_bytes().min(WINDOW) {
        return Some((header, None));
    }
    let mut data = vec![0; length];
    reader.read_exact(&mut data).ok()?;
    Some((header, Some(data)))
}

/// A connection's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ports {
    host: u32,
    guest: u32,
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Requested by the host.
    Requested { deadline: Instant },
    /// Open; the guest may have stopped receiving.
    Open { guest_receives: bool },
    /// Closed by the guest; data that it sent before is still written to the host.
    ClosedByGuest,
    /// Closed by the host; waiting for the guest's confirmation.
    ClosedByHost { deadline: Instant },
}

/// A host stream, and its data in flight.
struct Connection {
    stream: UnixStream,
    by_guest: bool,
    state: State,
    /// Data from the guest that is to be written to the stream.
    pending: VecDeque<u8>,
    /// Bytes written to the stream, and how many of them were reported to the guest, modulo 2^32.
    forwarded: u32,
    forwarded_reported: u32,
    /// Bytes sent to the guest, and how many of them its reader has consumed, modulo 2^32.
    sent: u32,
    taken: u32,
    /// The guest's window for this connection.
    window: u32,
    /// Whether the stream was readable at the last poll.
    readable: bool,
}

impl Connection {
    fn new(stream: UnixStream, state: State) -> Connection {
        Connection {
            stream,
            by_guest: false,
            state,
            pending: VecDeque::new(),
            forwarded: 0,
            forwarded_reported: 0,
            sent: 0,
            taken: 0,
            window: 0,
            readable: false,
        }
    }

    /// Bytes that the guest can receive now.
    fn credit(&self) -> usize {
        let underway = self.sent.wrapping_sub(self.taken);
        self.window.saturating_sub(underway) as usize
    }

    /// Whether data from the host can be sent to the guest.
    fn takes_input(&self) -> bool {
        let open = State::Open {
            guest_receives: true,
        };
        self.state == open && self.credit() > 0
    }

    /// The events to poll the stream for.
    fn wanted(&self) -> PollFlags {
        let mut wanted = PollFlags::empty();
        // A stream known to be readable waits for a buffer of the guest.
        wanted.set(PollFlags::IN, self.takes_input() && !self.readable);
        wanted.set(PollFlags::OUT, !self.pending.is_empty());
        wanted
    }

    /// Writes as much pending data as the stream accepts.
    fn flush(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            match self.stream.write(self.pending.as_slices().0) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether to send a credit update: after half a window.
    fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.forwarded_reported) as usize >= WINDOW / 2
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Requested { deadline } | State::ClosedByHost { deadline } => Some(deadline),
            State::Open { .. } | State::ClosedByGuest => None,
        }
    }
}

/// A host stream that has not sent its `CONNECT` line yet.
struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Caller {
    /// The requested port, once the line is complete. Reads byte by byte, as the bytes after the line are for
    /// the guest.
    fn read_port(&mut self) -> io::Result<Option<u32>> {
        let mut byte = [0];
        while self.line.last() != Some(&b'\n') {
            match self.stream.read(&mut byte) {
                Ok(1) if self.line.len() < MAX_LINE => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        let line = String::from_utf8_lossy(&self.line);
        let mut words = line.split_ascii_whitespace();
        let connect = words
            .next()
            .is_some_and(|word| word.eq_ignore_ascii_case("connect"));
        let port = words.next().and_then(|port| port.parse().ok());
        match port.filter(|_| connect) {
            Some(port) => Ok(Some(port)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The vsock device of one VM; it stops on drop.
pub struct VsockDevice {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl VsockDevice {
    /// Starts it: QEMU connects to `vhost`, the host to `socket`. The last error is written to the file `log`.
    pub fn start(guest_cid: u32, vhost: &Path, socket: &Path, log: &Path) -> Result<VsockDevice> {
        let (stop, stopped) = UnixStream::pair()?;
        let mut device = Device::new(stopped, guest_cid, vhost, socket, log)?;
        let thread = thread::Builder::new().name("vsock".into());
        let thread = thread.spawn(move || {
            if let Err(error) = device.run() {
                device.report(&error);
            }
        })?;
        Ok(VsockDevice {
            stop,
            thread: Some(thread),
            socket: socket.into(),
        })
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        // While it listens, the socket at this path is its own.
        let _gone_already = fs::remove_file(&self.socket);
        let _gone_already = self.stop.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _reported = thread.join();
        }
    }
}

struct Device {
    /// Closed to stop the device.
    stopped: UnixStream,
    log: fs::File,
    /// The socket for QEMU.
    qemu: UnixListener,
    /// The socket for the host.
    listener: UnixListener,
    /// When to accept connections again after an error.
    paused_until: Option<Instant>,
    socket: PathBuf,
    guest_cid: u64,
    frontend: Option<Frontend<2>>,
    callers: Vec<Caller>,
    connections: BTreeMap<Ports, Connection>,
    /// Queued packets without data, in order: connection and operation.
    orders: VecDeque<(Ports, u16)>,
    next_port: u32,
    /// The connection that was served last; the next one follows in order.
    last_served: Option<Ports>,
    /// Whether the virtqueues have more packets than are processed in a turn.
    unserved: bool,
}

/// The source of an event.
#[derive(Clone, Copy)]
enum Source {
    Stop,
    Qemu,
    Frontend,
    Kick(usize),
    Listener,
    Caller,
    Connection(Ports),
}

impl Device {
    fn new(
        stopped: UnixStream,
        guest_cid: u32,
        vhost: &Path,
        socket: &Path,
        log: &Path,
    ) -> Result<Device> {
        let bind = |path: &Path| {
            let listener = UnixListener::bind(path)
                .with_context(|| format!("unable to listen on {}", path.display()))?;
            listener.set_nonblocking(true)?;
            anyhow::Ok(listener)
        };
        Ok(Device {
            stopped,
            log: fs::File::create(log)?,
            qemu: bind(vhost)?,
            listener: bind(socket)?,
            paused_until: None,
            socket: socket.into(),
            guest_cid: guest_cid.into(),
            frontend: None,
            callers: vec![],
            connections: BTreeMap::new(),
            orders: VecDeque::new(),
            next_port: FIRST_PORT,
            last_served: None,
            unserved: false,
        })
    }

    fn run(&mut self) -> Result<()> {
        while self.turn()? {}
        Ok(())
    }

    /// Handles the next events; false to stop the device.
    fn turn(&mut self) -> Result<bool> {
        let mut called = false;
        for (source, events) in self.wait()? {
            match source {
                Source::Stop => return Ok(false),
                Source::Qemu => self.accept_qemu(),
                Source::Frontend => self.serve_qemu(),
                Source::Kick(ring) => {
                    if let Some(frontend) = &mut self.frontend {
                        frontend.rings[ring].clear_kick();
                    }
                }
                Source::Listener => self.accept(),
                Source::Caller => called = true,
                Source::Connection(ports) => self.on_stream(ports, events),
            }
        }
        if called {
            self.read_lines();
        }
        self.expire();
        self.serve_guest();
        Ok(true)
    }

    /// Overwrites the log with the last error, as the guest can cause any number of errors.
    fn report(&self, error: &anyhow::Error) {
        let line = format!("{error:#}\n");
        let written = self.log.set_len(0);
        let _no_room_for_it = written.and_then(|()| self.log.write_all_at(line.as_bytes(), 0));
    }

    /// Waits for events and returns them.
    fn wait(&self) -> Result<Vec<(Source, PollFlags)>> {
        let mut sources = vec![(Source::Stop, self.stopped.as_fd(), PollFlags::IN)];
        if self.accepts() {
            sources.push((Source::Listener, self.listener.as_fd(), PollFlags::IN));
        }
        match &self.frontend {
            None if self.paused_until.is_some() => {}
            None => sources.push((Source::Qemu, self.qemu.as_fd(), PollFlags::IN)),
            Some(frontend) => {
                sources.push((Source::Frontend, frontend.as_fd(), PollFlags::IN));
                for (number, ring) in frontend.rings.iter().enumerate() {
                    let kick = ring
                        .kick()
                        .map(|kick| (Source::Kick(number), kick, PollFlags::IN));
                    sources.extend(kick);
                }
            }
        }
        let callers = self.callers.iter();
        sources
            .extend(callers.map(|caller| (Source::Caller, caller.stream.as_fd(), PollFlags::IN)));
        for (ports, connection) in &self.connections {
            let wanted = connection.wanted();
            let requested = matches!(connection.state, State::Requested { .. });
            // While it waits for the guest, only a hangup is of interest, which poll(2) always reports.
            if !wanted.is_empty() || requested {
                sources.push((
                    Source::Connection(*ports),
                    connection.stream.as_fd(),
                    wanted,
                ));
            }
        }
        let deadline = self
            .connections
            .values()
            .filter_map(Connection::deadline)
            .chain(self.paused_until)
            .min();
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = match self.unserved {
            true => Some(Duration::ZERO),
            false => timeout,
        };
        let timeout = timeout.map(Timespec::try_from).transpose()?;
        let mut fds: Vec<_> = sources
            .iter()
            .map(|(_, fd, events)| PollFd::from_borrowed_fd(*fd, *events))
            .collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = sources
            .iter()
            .zip(&fds)
            .map(|((source, ..), fd)| (*source, fd.revents()));
        Ok(happened.filter(|(_, events)| !events.is_empty()).collect())
    }

    /// QEMU connects again when the device is replugged.
    fn accept_qemu(&mut self) {
        let accepted = self.qemu.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        let config = self.guest_cid.to_le_bytes();
        match accepted.map_err(anyhow::Error::from) {
            Ok(stream) => match Frontend::new(stream, &config) {
                Ok(frontend) => self.frontend = Some(frontend),
                Err(error) => self.report(&error),
            },
            Err(error) => self.pause(&error),
        }
    }

    /// A guest can cause invalid requests of QEMU, after which the device is unplugged.
    fn serve_qemu(&mut self) {
        let Some(frontend) = &mut self.frontend else {
            return;
        };
        let served = frontend.serve();
        if let Err(error) = &served {
            self.report(error);
        }
        if !served.unwrap_or(false) {
            self.frontend = None;
            self.forget();
        }
    }

    /// Closes all connections without notifying the guest.
    fn forget(&mut self) {
        self.connections.clear();
        self.orders.clear();
    }

    fn accept(&mut self) {
        let accepted = self.listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => self.callers.push(Caller {
                stream,
                line: vec![],
            }),
            Err(error) => self.pause(&error.into()),
        }
    }

    /// Stops accepting for a while: a connection that cannot be accepted would cause a busy loop.
    fn pause(&mut self, error: &anyhow::Error) {
        self.paused_until = Some(Instant::now() + PAUSE);
        self.report(error);
    }

    /// Whether connections from the host are accepted; others wait in the kernel's queue.
    fn accepts(&self) -> bool {
        let hosts = self.connections.len() - self.made_by_guest();
        self.paused_until.is_none() && self.callers.len() + hosts < MAX_CONNECTIONS
    }

    fn made_by_guest(&self) -> usize {
        let connections = self.connections.values();
        connections.filter(|connection| connection.by_guest).count()
    }

    /// Sends connection requests to the guest for callers whose line is complete.
    fn read_lines(&mut self) {
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.read_port() {
                Ok(None) => self.callers.push(caller),
                Ok(Some(guest)) => {
                    let ports = Ports {
                        host: self.vacant_port(),
                        guest,
                    };
                    let state = State::Requested {
                        deadline: Instant::now() + GUEST_TIMEOUT,
                    };
                    self.connections
                        .insert(ports, Connection::new(caller.stream, state));
                    self.order(ports, REQUEST);
                }
                // An invalid line or an error: dropping the caller closes the stream.
                Err(_) => {}
            }
        }
    }

    fn vacant_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.keys().any(|ports| ports.host == port) {
                return port;
            }
        }
    }

    fn on_stream(&mut self, ports: Ports, events: PollFlags) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if matches!(connection.state, State::Requested { .. }) {
            // Only a hangup was polled for.
            self.reset(ports);
            return;
        }
        connection.readable |= events.intersects(PollFlags::IN | PollFlags::HUP);
        if events.intersects(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
            self.flush(ports);
        }
    }

    /// Writes pending data to the host, and reports credit or the end to the guest.
    fn flush(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        let flushed = connection.flush();
        let done = connection.state == State::ClosedByGuest && connection.pending.is_empty();
        if flushed.is_err() || done {
            self.reset(ports);
        } else if connection.owes_credit() {
            connection.forwarded_reported = connection.forwarded;
            self.order(ports, CREDIT_UPDATE);
        }
    }

    /// Closes a connection on both sides.
    fn reset(&mut self, ports: Ports) {
        let requested = self.orders.contains(&(ports, REQUEST));
        self.remove(ports);
        // The request was not sent to the guest yet.
        if !requested {
            self.order(ports, RST);
        }
    }

    /// Closes a connection on the host's side.
    fn remove(&mut self, ports: Ports) {
        self.connections.remove(&ports);
        self.orders.retain(|(other, _)| *other != ports);
    }

    /// Queues a packet without data. A guest that sends but provides no buffers for the replies must not fill
    /// the host's memory: each reply is queued once, and the number of resets, also for connections that do
    /// not exist, is limited.
    fn order(&mut self, ports: Ports, operation: u16) {
        let order = (ports, operation);
        let too_many = operation == RST && self.orders.len() >= MAX_ORDERS;
        if !too_many && !self.orders.contains(&order) {
            self.orders.push_back(order);
        }
    }

    /// Resets connections whose deadline has passed, and ends a pause.
    fn expire(&mut self) {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        let late = |connection: &Connection| connection.deadline().is_some_and(|at| at <= now);
        let expired: Vec<_> = self
            .connections
            .iter()
            .filter_map(|(ports, connection)| late(connection).then_some(*ports))
            .collect();
        for ports in expired {
            self.reset(ports);
        }
    }

    // -- The guest's side.

    /// Processes the guest's packets, and sends pending ones. Invalid virtqueues are ignored until the
    /// guest's driver sets them up again.
    fn serve_guest(&mut self) {
        self.unserved = false;
        let Some(mut frontend) = self.frontend.take() else {
            return;
        };
        let served = match &frontend.memory {
            Some(memory) => self.serve_rings(memory, &mut frontend.rings),
            None => Ok(()),
        };
        if let Err(error) = served {
            frontend.rings.iter_mut().for_each(Ring::stop);
            self.forget();
            self.report(&error);
        }
        self.frontend = Some(frontend);
    }

    fn serve_rings(&mut self, memory: &GuestMemoryMmap, rings: &mut [Ring; 2]) -> Result<()> {
        let more = self.take_packets(memory, &mut rings[FROM_GUEST])?;
        self.unserved = self.give_packets(memory, &mut rings[TO_GUEST])? || more;
        Ok(())
    }

    /// Processes the guest's packets, at most the size of a virtqueue; true if there may be more.
    fn take_packets(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Result<bool> {
        if ring.kick().is_none() {
            return Ok(false);
        }
        let mut left = ring.size();
        let more = loop {
            ring.mute(memory)?;
            while left > 0
                && let Some(chain) = ring.pop(memory)?
            {
                left -= 1;
                let head = chain.head_index();
                let packet = read_packet(memory, chain);
                ring.push(memory, head, 0)?;
                match packet {
                    Some((header, Some(data))) => self.on_packet(&header, &data),
                    Some((header, None)) => self.reset(header.ports()),
                    None => {}
                }
            }
            if !ring.unmute(memory)? {
                break false;
            }
            if left == 0 {
                break true;
            }
        };
        ring.notify(memory)?;
        Ok(more)
    }

    fn on_packet(&mut self, header: &Header, data: &[u8]) {
        let ports = header.ports();
        if header.destination_cid != HOST_CID || header.kind != STREAM {
            self.order(ports, RST);
            return;
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            match header.operation {
                REQUEST => self.on_request(ports, header),
                RST => {}
                _ => self.order(ports, RST),
            }
            return;
        };
        connection.window = header.buffer;
        connection.taken = header.forwarded;
        match (header.operation, connection.state) {
            // Linux resets a closed connection after 8 s (VSOCK_CLOSE_TIMEOUT). A slow host still gets the
            // data sent before.
            (RST, State::ClosedByGuest) => {}
            (RST, _) => self.remove(ports),
            (RESPONSE, State::Requested { .. }) => {
                connection.state = State::Open {
                    guest_receives: true,
                };
                // A new stream's buffer has room for a line.
                if writeln!(&connection.stream, "OK {}", ports.host).is_err() {
                    self.reset(ports);
                }
            }
            (RW, State::Open { .. }) => {
                connection.pending.extend(data);
                let room = connection.pending.len() <= WINDOW;
                self.flush(ports);
                if !room {
                    self.reset(ports);
                }
            }
            (SHUTDOWN, State::Open { guest_receives }) => {
                let receives = guest_receives && header.flags & NO_RECEIVE == 0;
                // Like in Firecracker, the end of sending is not forwarded until the guest also stops
                // receiving.
                connection.state = match receives || header.flags & NO_SEND == 0 {
                    true => State::Open {
                        guest_receives: receives,
                    },
                    false => State::ClosedByGuest,
                };
                self.flush(ports);
            }
            (CREDIT_REQUEST, _) => self.order(ports, CREDIT_UPDATE),
            _ => {}
        }
    }

    /// Handles a connection from the guest to a port of the host.
    fn on_request(&mut self, ports: Ports, header: &Header) {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let vacant = self.made_by_guest() < MAX_CONNECTIONS;
        let stream = vacant.then(|| connect(Path::new(&path)));
        let Some(Ok(stream)) = stream else {
            self.order(ports, RST);
            return;
        };
        let state = State::Open {
            guest_receives: true,
        };
        let mut connection = Connection::new(stream, state);
        connection.by_guest = true;
        connection.window = header.buffer;
        connection.taken = header.forwarded;
        self.connections.insert(ports, connection);
        self.order(ports, RESPONSE);
    }

    /// Sends packets to the guest while it has buffers, at most the size of a virtqueue; true if there may be
    /// more.
    fn give_packets(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Result<bool> {
        if ring.kick().is_none() {
            return Ok(false);
        }
        let mut left = ring.size();
        let more = loop {
            ring.mute(memory)?;
            while left > 0
                && self.has_packet()
                && let Some(chain) = ring.pop(memory)?
            {
                left -= 1;
                let head = chain.head_index();
                let writer = chain.writer(memory).ok();
                let sized = writer.and_then(|writer| {
                    let room = writer.available_bytes().checked_sub(HEADER)?;
                    Some((writer, room))
                });
                // A buffer without room for a header and data is returned empty.
                let Some((mut writer, room @ 1..)) = sized else {
                    ring.push(memory, head, 0)?;
                    continue;
                };
                match self.next_packet(room) {
                    Some((header, data)) => {
                        writer.write_all(&header.to_bytes())?;
                        writer.write_all(&data)?;
                        ring.push(memory, head, HEADER + data.len())?;
                    }
                    None => ring.unpop(),
                }
            }
            // Kicks for new buffers are needed only while packets wait.
            if !ring.unmute(memory)? || !self.has_packet() {
                break false;
            }
            if left == 0 {
                break true;
            }
        };
        ring.notify(memory)?;
        Ok(more)
    }

    /// Whether there may be a packet for the guest.
    fn has_packet(&self) -> bool {
        let sends = |connection: &Connection| connection.readable && connection.takes_input();
        !self.orders.is_empty() || self.connections.values().any(sends)
    }

    /// The next packet to the guest, with at most `room` bytes of data.
    fn next_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some((ports, operation)) = self.orders.pop_front() {
            return Some((self.header(ports, operation), vec![]));
        }
        while let Some(ports) = self.next_sender() {
            self.last_served = Some(ports);
            let connection = self.connections.get_mut(&ports)?;
            // Room and credit are untrusted.
            let mut data = vec![0; room.min(connection.credit()).min(WINDOW)];
            match connection.stream.read(&mut data) {
                Ok(0) => {
                    connection.readable = false;
                    connection.state = State::ClosedByHost {
                        deadline: Instant::now() + GUEST_TIMEOUT,
                    };
                    let mut header = self.header(ports, SHUTDOWN);
                    header.flags = NO_RECEIVE | NO_SEND;
                    return Some((header, vec![]));
                }
                Ok(count) => {
                    data.truncate(count);
                    connection.sent = connection.sent.wrapping_add(count as u32);
                    let mut header = self.header(ports, RW);
                    header.length = count as u32;
                    return Some((header, data));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    connection.readable = false;
                }
                Err(_) => {
                    self.connections.remove(&ports);
                    return Some((self.header(ports, RST), vec![]));
                }
            }
        }
        None
    }

    /// The next connection to send to the guest, in turn.
    fn next_sender(&self) -> Option<Ports> {
        let senders = || {
            self.connections
                .iter()
                .filter(|(_, connection)| connection.readable && connection.takes_input())
                .map(|(ports, _)| *ports)
        };
        senders()
            .find(|ports| Some(*ports) > self.last_served)
            .or_else(|| senders().next())
    }

    /// The header of a packet to the guest, with the current window.
    fn header(&mut self, ports: Ports, operation: u16) -> Header {
        let forwarded = self.connections.get_mut(&ports).map_or(0, |connection| {
            connection.forwarded_reported = connection.forwarded;
            connection.forwarded
        });
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            kind: STREAM,
            operation,
            buffer: WINDOW as u32,
            forwarded,
            ..Header::default()
        }
    }
}

/// Connects to the host's listener at `path`. If its queue is full, fails with EAGAIN instead of blocking.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::vhost_user::tests::{Driver, WRITE};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_header_has_the_kernels_layout() {
        let header = Header {
            source_cid: 1,
            destination_cid: 2,
            source_port: 3,
            destination_port: 4,
            length: 5,
            kind: 6,
            operation: 7,
            flags: 8,
            buffer: 9,
            forwarded: 10,
        };
        let bytes = header.to_bytes();
        let at = [0, 8, 16, 20, 24, 28, 30, 32, 36, 40];
        assert_eq!(
            at.map(|at: usize| bytes[at]),
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
        );
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), at.len());
        assert_eq!(Header::of_bytes(&bytes), header);
    }

    /// A device without QEMU, and the stream that stops it when closed.
    fn device(dir: &Path) -> (Device, UnixStream) {
        let (stop, stopped) = UnixStream::pair().unwrap();
        let [vhost, socket, log] = ["vhost", "socket", "log"].map(|name| dir.join(name));
        let device = Device::new(stopped, GUEST_CID, &vhost, &socket, &log).unwrap();
        (device, stop)
    }

    const GUEST_CID: u32 = 3;

    #[test]
    fn a_connection_that_cannot_be_accepted_does_not_end_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, stop) = device(dir.path());
        // The listener becomes readable, and accept(2) fails, as with too many open files.
        for listener in [&device.listener, &device.qemu] {
            rustix::net::shutdown(listener, rustix::net::Shutdown::Both).unwrap();
        }
        let start = Instant::now();
        let mut turns = 0;
        while start.elapsed() < PAUSE * 3 {
            assert!(device.turn().unwrap());
            turns += 1;
        }
        assert!(turns < 20, "{turns} turns");
        assert_ne!(fs::read(dir.path().join("log")).unwrap(), b"");
        drop(stop);
        while device.turn().unwrap() {}
    }

    /// The header of a packet from the guest to a port of the host.
    fn packet(guest: u32, host: u32, operation: u16) -> Header {
        Header {
            source_cid: GUEST_CID.into(),
            destination_cid: HOST_CID,
            source_port: guest,
            destination_port: host,
            kind: STREAM,
            operation,
            buffer: WINDOW as u32,
            ..Header::default()
        }
    }

    /// The next packets to the guest: destination port and operation.
    fn sent(device: &mut Device) -> Vec<(u32, u16)> {
        std::iter::from_fn(|| device.next_packet(4096))
            .map(|(header, _)| (header.destination_port, header.operation))
            .collect()
    }

    #[test]
    fn a_listener_with_a_full_queue_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let listener = UnixListener::bind(dir.path().join("socket_7")).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // A backlog of 0 allows one connection.
        device.on_packet(&packet(100, 7, REQUEST), &[]);
        let (sender, done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            device.on_packet(&packet(101, 7, REQUEST), &[]);
            sender.send(sent(&mut device)).unwrap();
        });
        let sent = done.recv_timeout(Duration::from_secs(10));
        assert_eq!(sent, Ok(vec![(100, RESPONSE), (101, RST)]));
    }

    #[test]
    fn guest_connections_are_limited_and_leave_room_for_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        crate::process::raise_open_files();
        let listener = UnixListener::bind(dir.path().join("socket_7")).unwrap();
        let guests = 1..=MAX_CONNECTIONS as u32;
        for guest in guests.clone() {
            device.on_packet(&packet(guest, 7, REQUEST), &[]);
            listener.accept().unwrap();
        }
        let accepted: Vec<_> = guests.map(|guest| (guest, RESPONSE)).collect();
        assert_eq!(sent(&mut device), accepted);
        device.on_packet(&packet(9999, 7, REQUEST), &[]);
        assert_eq!(sent(&mut device), [(9999, RST)]);
        assert!(device.accepts());
        // A closed connection makes room.
        device.on_packet(&packet(5, 7, RST), &[]);
        device.on_packet(&packet(9999, 7, REQUEST), &[]);
        assert_eq!(sent(&mut device), [(9999, RESPONSE)]);
    }

    #[test]
    fn excess_host_connections_wait_for_room() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        crate::process::raise_open_files();
        for host in 0..MAX_CONNECTIONS as u32 {
            assert!(device.accepts());
            let (stream, _) = UnixStream::pair().unwrap();
            let state = State::Open {
                guest_receives: true,
            };
            let ports = Ports { host, guest: 10000 };
            let connection = Connection::new(stream, state);
            device.connections.insert(ports, connection);
        }
        assert!(!device.accepts());
        device.on_packet(&packet(10000, 7, RST), &[]);
        assert!(device.accepts());
    }

    /// A guest: memory, and the drivers' sides of the virtqueues.
    struct Guest {
        memory: GuestMemoryMmap,
        receive: Driver,
        send: Driver,
    }

    /// Addresses of packets in the guest's memory: received and sent ones.
    const RECEIVED: u64 = 0x1_0000;
    const SENT: u64 = 0x4_0000;

    /// Size of the guest's memory in bytes.
    const MEMORY: usize = 0x10_0000;

    impl Guest {
        /// Plugs a device in, in place of QEMU.
        fn plug(device: &mut Device) -> (Guest, UnixStream) {
            let (qemu, stream) = UnixStream::pair().unwrap();
            let ranges = [(GuestAddress(0), MEMORY)];
            let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            let mut frontend = Frontend::new(stream, &[]).unwrap();
            let guest = Guest {
                receive: Driver::new(&memory, 0, &mut frontend.rings[TO_GUEST]),
                send: Driver::new(&memory, 0x1000, &mut frontend.rings[FROM_GUEST]),
                memory: memory.clone(),
            };
            frontend.memory = Some(memory);
            device.frontend = Some(frontend);
            (guest, qemu)
        }

        /// Sends a packet; its data is the memory after the header.
        fn send(&mut self, header: &Header) {
            self.write(header);
            self.send.add(&[(SENT, HEADER as u32 + header.length, 0)]);
        }

        fn write(&self, header: &Header) {
            let bytes = header.to_bytes();
            let at = GuestAddress(SENT);
            self.memory.write_slice(&bytes, at).unwrap();
        }

        /// Receives a packet into a buffer of 4 KiB, and returns its operation.
        fn receive(&mut self, device: &mut Device) -> Option<u16> {
            self.receive.add(&[(RECEIVED, 4096, WRITE)]);
            device.turn().unwrap();
            let length = self.receive.take()?;
            assert!(length >= HEADER as u32);
            let mut bytes = [0; HEADER];
            let at = GuestAddress(RECEIVED);
            self.memory.read_slice(&mut bytes, at).unwrap();
            Some(Header::of_bytes(&bytes).operation)
        }
    }

    /// Opens a connection from the guest's port 5 to the host's port 7, and returns the host's end.
    fn connected(device: &mut Device) -> UnixStream {
        let path = format!("{}_7", device.socket.display());
        let listener = UnixListener::bind(path).unwrap();
        device.on_packet(&packet(5, 7, REQUEST), &[]);
        assert_eq!(sent(device), [(5, RESPONSE)]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Waits until a connection is closed: a process that another test starts may have it open until execve.
    fn assert_closed(host: &mut UnixStream) {
        host.set_nonblocking(false).unwrap();
        let timeout = Some(Duration::from_secs(10));
        host.set_read_timeout(timeout).unwrap();
        assert_eq!(host.read(&mut [0; 16]).unwrap(), 0);
    }

    #[test]
    fn a_slow_host_gets_everything_that_was_sent_before_the_close() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let ports = Ports { host: 7, guest: 5 };
        let data = vec![7; WINDOW / 4];
        let mut length = 0;
        while device.connections[&ports].pending.is_empty() {
            device.on_packet(&packet(5, 7, RW), &data);
            length += data.len();
        }
        let mut shutdown = packet(5, 7, SHUTDOWN);
        shutdown.flags = NO_RECEIVE | NO_SEND;
        device.on_packet(&shutdown, &[]);
        device.on_packet(&packet(5, 7, RST), &[]);
        let reader = thread::spawn(move || {
            host.set_nonblocking(false).unwrap();
            host.read_exact(&mut vec![0; length]).unwrap();
            assert_closed(&mut host);
        });
        while device.connections.contains_key(&ports) {
            device.turn().unwrap();
        }
        reader.join().unwrap();
    }

    #[test]
    fn a_guest_that_reads_no_replies_does_not_fill_host_memory() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let mut data = vec![7; WINDOW / 2];
        for number in 0..100_000_u32 {
            // Data to closed ports, from a different port each time; a credit request; and a credit update.
            device.on_packet(&packet(number + 10, 9, RW), &[]);
            device.on_packet(&packet(5, 7, CREDIT_REQUEST), &[]);
            if number < 100 {
                device.on_packet(&packet(5, 7, RW), &data);
                host.read_exact(&mut data).unwrap();
            }
        }
        assert!(device.orders.len() <= MAX_ORDERS);
        let updates = device.orders.iter();
        let updates = updates.filter(|(_, operation)| *operation == CREDIT_UPDATE);
        assert_eq!(updates.count(), 1);
        // Connections of the host still work.
        let mut caller = UnixStream::connect(&device.socket).unwrap();
        caller.write_all(b"CONNECT 10000\n").unwrap();
        device.turn().unwrap();
        device.turn().unwrap();
        assert_eq!(sent(&mut device).last(), Some(&(10000, REQUEST)));
    }

    #[test]
    fn a_packet_longer_than_the_window_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let (mut guest, _qemu) = Guest::plug(&mut device);
        let mut header = packet(5, 7, RW);
        header.length = 4 * WINDOW as u32;
        guest.write(&header);
        // The same memory several times.
        let mut buffers = vec![(SENT, HEADER as u32, 0)];
        buffers.extend([(SENT, WINDOW as u32, 0); 4]);
        guest.send.add(&buffers);
        device.turn().unwrap();
        assert_eq!(guest.send.take(), Some(0));
        assert_closed(&mut host);
        assert_eq!(guest.receive(&mut device), Some(RST));
    }

    #[test]
    fn a_packet_with_too_little_data_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let (mut guest, _qemu) = Guest::plug(&mut device);
        let mut header = packet(5, 7, RW);
        header.length = 11;
        guest.write(&header);
        guest.send.add(&[(SENT, HEADER as u32 + 10, 0)]);
        device.turn().unwrap();
        assert_closed(&mut host);
        assert_eq!(guest.receive(&mut device), Some(RST));
    }

    #[test]
    fn a_turn_ends_even_if_the_guest_keeps_sending() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, stop) = device(dir.path());
        let (guest, _qemu) = Guest::plug(&mut device);
        guest.write(&packet(5, 7, RST));
        let ring = &mut device.frontend.as_mut().unwrap().rings[FROM_GUEST];
        Driver::endless(&guest.memory, 0x1000, ring, (SENT, HEADER as u32));
        let (sender, done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            // The guest kicks once; after that the device knows that there is more.
            for _ in 0..100 {
                device.turn().unwrap();
            }
            drop(stop);
            while device.turn().unwrap() {}
            sender.send(()).unwrap();
        });
        done.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn invalid_buffers_are_returned_and_the_device_continues() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let (mut guest, _qemu) = Guest::plug(&mut device);
        // Too short for a header, outside of memory, and writable for the device.
        for buffer in [
            (SENT, HEADER as u32 - 1, 0),
            (MEMORY as u64, 4096, 0),
            (SENT, 4096, WRITE),
        ] {
            guest.send.add(&[buffer]);
            device.turn().unwrap();
            assert_eq!(guest.send.take(), Some(0), "{buffer:?}");
            assert_eq!(fs::read(dir.path().join("log")).unwrap(), b"");
        }
        let mut header = packet(5, 7, RW);
        header.length = 5;
        guest.send(&header);
        device.turn().unwrap();
        assert_eq!(host.read(&mut [0; 16]).unwrap(), 5);

        // A packet to the guest waits for a buffer with room for it.
        guest.send(&packet(5, 7, CREDIT_REQUEST));
        device.turn().unwrap();
        for buffer in [
            (RECEIVED, HEADER as u32, WRITE),
            (MEMORY as u64, 4096, WRITE),
            (RECEIVED, 4096, 0),
        ] {
            guest.receive.add(&[buffer]);
            device.turn().unwrap();
            assert_eq!(guest.receive.take(), Some(0), "{buffer:?}");
        }
        assert_eq!(guest.receive(&mut device), Some(CREDIT_UPDATE));
    }

    #[test]
    fn invalid_virtqueues_are_disabled_until_set_up_again() {
        // An index beyond all descriptors, and a chain without a descriptor.
        let spoil: [fn(&mut Driver); 2] = [
            |driver| driver.set_index(1000),
            |driver| driver.offer(crate::machine::vhost_user::tests::SIZE),
        ];
        for spoil in spoil {
            let dir = tempfile::tempdir().unwrap();
            let (mut device, _stop) = device(dir.path());
            let mut host = connected(&mut device);
            let (mut guest, _qemu) = Guest::plug(&mut device);
            spoil(&mut guest.send);
            device.turn().unwrap();
            assert_closed(&mut host);
            assert_ne!(fs::read(dir.path().join("log")).unwrap(), b"");
            // The device waits without a busy loop.
            let kicks = device.frontend.as_ref().unwrap().rings.iter();
            assert_eq!(kicks.filter_map(Ring::kick).count(), 0);

            let (mut guest, _qemu) = Guest::plug(&mut device);
            guest.send(&packet(5, 9, REQUEST));
            device.turn().unwrap();
            assert_eq!(guest.receive(&mut device), Some(RST));
        }
    }

    #[test]
    fn an_unsupported_request_from_qemu_unplugs_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let (mut device, _stop) = device(dir.path());
        let mut host = connected(&mut device);
        let (_guest, mut qemu) = Guest::plug(&mut device);
        qemu.write_all([99_u32, 1, 0].map(u32::to_ne_bytes).as_flattened())
            .unwrap();
        device.turn().unwrap();
        assert_closed(&mut host);
        assert_ne!(fs::read(dir.path().join("log")).unwrap(), b"");
        // QEMU can connect again.
        UnixStream::connect(dir.path().join("vhost")).unwrap();
        device.turn().unwrap();
        assert!(device.frontend.is_some());
    }
}
