//! The vsock device of a VM on QEMU, with Firecracker's wire: a Unix socket that leads to any port
//! of the guest, and `SOCKET_PORT` for each port of the host that the guest connects to.
//! (Firecracker docs/vsock.md; virtio specification 5.10; linux/virtio_vsock.h)
//!
//! QEMU's own device needs the host kernel's vhost-vsock, and so its /dev/vhost-vsock. The program
//! that rust-vmm has for it, vhost-device-vsock 0.3.0, stalls when there is much to be sent in both
//! directions at once: it writes to the host's stream only when there is nothing to be read from it.
//! `tests/vm/lab.rs` has that and its other faults as tests.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::GuestMemoryMmap;

use super::vhost_user::{Frontend, Ring};

/// The host's context id.
const HOST_CID: u64 = 2;

/// Bytes that the guest may send on a connection before the host has read them; Firecracker's.
const WINDOW: usize = 64 << 10;

/// How long the guest may take to answer a request, or to end what the host has ended.
const GUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest first line of the host: `CONNECT ` and a number of 32 bits.
const MAX_LINE: usize = 32;

/// The first of the host's port numbers, beyond those that anybody listens on.
const FIRST_PORT: u32 = 1 << 30;

/// The virtqueues that QEMU leaves to this device: for packets to the guest, and from it.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;

/// Bytes of a packet's header.
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

// `flags` of SHUTDOWN: its sender receives no more, sends no more.
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
}

/// A connection's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ports {
    host: u32,
    guest: u32,
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// The host has asked for it.
    Requested { deadline: Instant },
    /// Both send, but for a guest that receives no more.
    Open { guest_receives: bool },
    /// The guest has closed it; what it has sent is still written to the host.
    ClosedByGuest,
    /// The host has closed it; the guest confirms.
    ClosedByHost { deadline: Instant },
}

/// A stream of the host's, and what is on its way.
struct Connection {
    stream: UnixStream,
    state: State,
    /// From the guest, to be written to the stream.
    pending: VecDeque<u8>,
    /// Bytes written to the stream, and what of that the guest knows, modulo 2^32.
    forwarded: u32,
    forwarded_told: u32,
    /// Bytes sent to the guest, and those of them that its reader has taken, modulo 2^32.
    sent: u32,
    taken: u32,
    /// The guest's window for this connection.
    window: u32,
    /// The stream was readable when it was last looked at.
    readable: bool,
}

impl Connection {
    fn new(stream: UnixStream, state: State) -> Connection {
        Connection {
            stream,
            state,
            pending: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            taken: 0,
            window: 0,
            readable: false,
        }
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        let underway = self.sent.wrapping_sub(self.taken);
        self.window.saturating_sub(underway) as usize
    }

    /// Whether what the host sends can be passed on.
    fn takes_input(&self) -> bool {
        let open = State::Open {
            guest_receives: true,
        };
        self.state == open && self.credit() > 0
    }

    /// What to wait for on the stream.
    fn wanted(&self) -> PollFlags {
        let mut wanted = PollFlags::empty();
        // One that is known to be readable waits for a buffer of the guest's.
        wanted.set(PollFlags::IN, self.takes_input() && !self.readable);
        wanted.set(PollFlags::OUT, !self.pending.is_empty());
        wanted
    }

    /// Writes what the stream takes of what is pending.
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

    /// Whether the guest should hear of the room that there is again: at half a window.
    fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.forwarded_told) as usize >= WINDOW / 2
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Requested { deadline } | State::ClosedByHost { deadline } => Some(deadline),
            State::Open { .. } | State::ClosedByGuest => None,
        }
    }
}

/// A host's stream that has not said yet where it leads.
struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Caller {
    /// The port that it calls, when its line is whole. Read byte by byte: what follows is the
    /// guest's.
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

/// The vsock device of one VM, which lives as long as this.
pub struct VsockDevice {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl VsockDevice {
    /// Starts it: QEMU connects to `vhost`, the host to `socket`. What goes wrong later is written
    /// to the file `log`.
    pub fn start(guest_cid: u32, vhost: &Path, socket: &Path, log: &Path) -> Result<VsockDevice> {
        let (stop, stopped) = UnixStream::pair()?;
        let bind = |path: &Path| {
            let listener = UnixListener::bind(path)
                .with_context(|| format!("unable to listen on {}", path.display()))?;
            listener.set_nonblocking(true)?;
            anyhow::Ok(listener)
        };
        let mut device = Device {
            stopped,
            qemu: bind(vhost)?,
            listener: bind(socket)?,
            socket: socket.into(),
            guest_cid: guest_cid.into(),
            frontend: None,
            callers: vec![],
            connections: BTreeMap::new(),
            orders: VecDeque::new(),
            next_port: FIRST_PORT,
            last_served: None,
        };
        let log = fs::File::create(log)?;
        let thread = thread::Builder::new().name("vsock".into());
        let thread = thread.spawn(move || {
            if let Err(error) = device.run() {
                let _no_room_for_it = writeln!(&log, "{error:#}");
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
        let _gone_already = self.stop.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _reported = thread.join();
        }
        let _gone_already = fs::remove_file(&self.socket);
    }
}

struct Device {
    /// Ends when the device is to stop.
    stopped: UnixStream,
    /// Where QEMU connects to.
    qemu: UnixListener,
    /// Where the host connects to.
    listener: UnixListener,
    socket: PathBuf,
    guest_cid: u64,
    frontend: Option<Frontend<2>>,
    callers: Vec<Caller>,
    connections: BTreeMap<Ports, Connection>,
    /// Packets without data, in their order: what they go to, operation and flags.
    orders: VecDeque<(Ports, u16, u32)>,
    next_port: u32,
    /// The connection that sent to the guest last: the next one after it is the next.
    last_served: Option<Ports>,
}

/// What a descriptor is that is waited for.
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
    fn run(&mut self) -> Result<()> {
        loop {
            let mut called = false;
            for (source, events) in self.wait()? {
                match source {
                    Source::Stop => return Ok(()),
                    Source::Qemu => self.accept_qemu()?,
                    Source::Frontend => self.serve_qemu()?,
                    Source::Kick(ring) => {
                        if let Some(frontend) = &mut self.frontend {
                            frontend.rings[ring].clear_kick();
                        }
                    }
                    Source::Listener => self.accept()?,
                    Source::Caller => called = true,
                    Source::Connection(ports) => self.on_stream(ports, events),
                }
            }
            if called {
                self.read_lines();
            }
            self.expire();
            self.take_from_guest()?;
            self.give_to_guest()?;
        }
    }

    /// Waits until something happens, and returns what.
    fn wait(&self) -> Result<Vec<(Source, PollFlags)>> {
        let mut sources = vec![
            (Source::Stop, self.stopped.as_fd(), PollFlags::IN),
            (Source::Listener, self.listener.as_fd(), PollFlags::IN),
        ];
        match &self.frontend {
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
            // Of one that waits for the guest, an end is of interest, and always reported.
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
            .min();
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
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

    /// QEMU comes anew when the device is plugged again.
    fn accept_qemu(&mut self) -> Result<()> {
        let (stream, _) = self.qemu.accept()?;
        stream.set_nonblocking(false)?;
        self.frontend = Some(Frontend::new(stream, &self.guest_cid.to_le_bytes())?);
        Ok(())
    }

    fn serve_qemu(&mut self) -> Result<()> {
        let frontend = self.frontend.as_mut().context("QEMU is there")?;
        if !frontend.serve()? {
            self.frontend = None;
            self.connections.clear();
            self.orders.clear();
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<()> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        self.callers.push(Caller {
            stream,
            line: vec![],
        });
        Ok(())
    }

    /// Asks the guest for what those callers want whose line is there.
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
                    self.orders.push_back((ports, REQUEST, 0));
                }
                // The stream is closed.
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
            // Nothing is waited for but its end.
            self.reset(ports);
            return;
        }
        connection.readable |= events.intersects(PollFlags::IN | PollFlags::HUP);
        if events.intersects(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
            self.flush(ports);
        }
    }

    /// Writes to the host what is pending; the guest hears of the room, or of the end.
    fn flush(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        let flushed = connection.flush();
        let done = connection.state == State::ClosedByGuest && connection.pending.is_empty();
        if flushed.is_err() || done {
            self.reset(ports);
        } else if connection.owes_credit() {
            connection.forwarded_told = connection.forwarded;
            self.orders.push_back((ports, CREDIT_UPDATE, 0));
        }
    }

    /// Ends a connection on both sides.
    fn reset(&mut self, ports: Ports) {
        self.connections.remove(&ports);
        let requested = self.orders.contains(&(ports, REQUEST, 0));
        self.orders.retain(|(other, ..)| *other != ports);
        // The guest has not heard of it.
        if !requested {
            self.orders.push_back((ports, RST, 0));
        }
    }

    /// Resets what has waited too long for the guest.
    fn expire(&mut self) {
        let now = Instant::now();
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

    /// Takes all packets that the guest has sent.
    fn take_from_guest(&mut self) -> Result<()> {
        let Some(mut frontend) = self.frontend.take() else {
            return Ok(());
        };
        let taken = match &frontend.memory {
            Some(memory) => self.take_packets(memory, &mut frontend.rings[FROM_GUEST]),
            None => Ok(()),
        };
        self.frontend = Some(frontend);
        taken
    }

    fn take_packets(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Result<()> {
        if ring.kick().is_none() {
            return Ok(());
        }
        loop {
            ring.mute(memory)?;
            while let Some(chain) = ring.pop(memory)? {
                let head = chain.head_index();
                let mut reader = chain.reader(memory)?;
                let mut header = [0; HEADER];
                reader.read_exact(&mut header)?;
                let header = Header::of_bytes(&header);
                let mut data = vec![0; (header.length as usize).min(reader.available_bytes())];
                reader.read_exact(&mut data)?;
                ring.push(memory, head, 0)?;
                self.on_packet(&header, &data);
            }
            if !ring.unmute(memory)? {
                break;
            }
        }
        ring.notify(memory)
    }

    fn on_packet(&mut self, header: &Header, data: &[u8]) {
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        if header.destination_cid != HOST_CID || header.kind != STREAM {
            self.orders.push_back((ports, RST, 0));
            return;
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            match header.operation {
                REQUEST => self.on_request(ports, header),
                RST => {}
                _ => self.orders.push_back((ports, RST, 0)),
            }
            return;
        };
        connection.window = header.buffer;
        connection.taken = header.forwarded;
        match (header.operation, connection.state) {
            (RST, _) => {
                self.connections.remove(&ports);
                self.orders.retain(|(other, ..)| *other != ports);
            }
            (RESPONSE, State::Requested { .. }) => {
                connection.state = State::Open {
                    guest_receives: true,
                };
                // A new stream has room for a line.
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
                // As Firecracker, that it sends no more is not passed on before it also receives no
                // more.
                connection.state = match receives || header.flags & NO_SEND == 0 {
                    true => State::Open {
                        guest_receives: receives,
                    },
                    false => State::ClosedByGuest,
                };
                self.flush(ports);
            }
            (CREDIT_REQUEST, _) => self.orders.push_back((ports, CREDIT_UPDATE, 0)),
            _ => {}
        }
    }

    /// A connection of the guest's to a port of the host.
    fn on_request(&mut self, ports: Ports, header: &Header) {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let stream = UnixStream::connect(path)
            .and_then(|stream| stream.set_nonblocking(true).map(|()| stream));
        let Ok(stream) = stream else {
            self.orders.push_back((ports, RST, 0));
            return;
        };
        let state = State::Open {
            guest_receives: true,
        };
        let mut connection = Connection::new(stream, state);
        connection.window = header.buffer;
        connection.taken = header.forwarded;
        self.connections.insert(ports, connection);
        self.orders.push_back((ports, RESPONSE, 0));
    }

    /// Sends to the guest what there is, as far as it has buffers.
    fn give_to_guest(&mut self) -> Result<()> {
        let Some(mut frontend) = self.frontend.take() else {
            return Ok(());
        };
        let given = match &frontend.memory {
            Some(memory) => self.give_packets(memory, &mut frontend.rings[TO_GUEST]),
            None => Ok(()),
        };
        self.frontend = Some(frontend);
        given
    }

    fn give_packets(&mut self, memory: &GuestMemoryMmap, ring: &mut Ring) -> Result<()> {
        if ring.kick().is_none() {
            return Ok(());
        }
        loop {
            ring.mute(memory)?;
            while self.has_packet()
                && let Some(chain) = ring.pop(memory)?
            {
                let head = chain.head_index();
                let mut writer = chain.writer(memory)?;
                let room = writer.available_bytes().checked_sub(HEADER);
                let room = room.context("a buffer without room for a header")?;
                match self.next_packet(room) {
                    Some((header, data)) => {
                        writer.write_all(&header.to_bytes())?;
                        writer.write_all(&data)?;
                        ring.push(memory, head, HEADER + data.len())?;
                    }
                    None => ring.unpop(),
                }
            }
            // New buffers are of interest while something waits for them.
            if !ring.unmute(memory)? || !self.has_packet() {
                break;
            }
        }
        ring.notify(memory)
    }

    /// Whether there may be something to send to the guest.
    fn has_packet(&self) -> bool {
        let sends = |connection: &Connection| connection.readable && connection.takes_input();
        !self.orders.is_empty() || self.connections.values().any(sends)
    }

    /// The next packet to the guest, with at most `room` bytes of data.
    fn next_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some((ports, operation, flags)) = self.orders.pop_front() {
            let mut header = self.header(ports, operation);
            header.flags = flags;
            return Some((header, vec![]));
        }
        while let Some(ports) = self.next_sender() {
            self.last_served = Some(ports);
            let connection = self.connections.get_mut(&ports)?;
            let mut data = vec![0; room.min(connection.credit())];
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

    /// The connection whose turn it is to send to the guest.
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

    /// The header of a packet to the guest, with what it needs to know of the window.
    fn header(&mut self, ports: Ports, operation: u16) -> Header {
        let forwarded = self.connections.get_mut(&ports).map_or(0, |connection| {
            connection.forwarded_told = connection.forwarded;
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
