//! The host at the other end of a guest's network link: a small TCP/IP stack in this process.
//!
//! QEMU passes the guest's Ethernet frames over a Unix stream socket. The host answers ARP and ping for every
//! IPv4 address, so that any gateway and the addresses behind it are reachable, and serves MMDS at its link-local
//! address. It drops segments and connections if a test says so, which a proxy in front of a real TCP stack
//! could not.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, Device, DeviceCapabilities, Medium},
    socket::{AnySocket, tcp},
    time,
    wire::{
        ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, IpCidr, IpProtocol,
        Ipv4Address, Ipv4Packet, TcpPacket,
    },
};

use crate::mmds::{Fault, MAX_REQUEST, Mmds, Request, Service};

/// The address of MMDS.
pub const MMDS_ADDRESS: Ipv4Address = Ipv4Address::new(169, 254, 169, 254);
const MMDS_PORT: u16 = 80;
/// The MAC address of Firecracker's MMDS.
const MMDS_MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
/// Maximum number of simultaneous connections to MMDS.
const MMDS_CONNECTIONS: usize = 30;
/// An Ethernet header and 1,500 bytes.
const MAX_FRAME: usize = 1514;

/// The traffic seen so far; it can be read while the VM runs and afterwards.
#[derive(Clone, Default)]
pub struct Traffic {
    requests: Arc<Mutex<Vec<Request>>>,
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Traffic {
    /// MMDS requests so far, in order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no poison").clone()
    }

    /// All Ethernet frames that the guest has sent so far.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        self.frames.lock().expect("no poison").clone()
    }
}

/// Waits on the Unix socket `path` for QEMU to connect, and acts as the host until QEMU disconnects. Without
/// `mmds`, nothing has MMDS's address.
pub(crate) fn attach(path: &Path, mmds: Option<Mmds>) -> Result<Traffic> {
    let listener = UnixListener::bind(path).with_context(|| format!("unable to bind {path:?}"))?;
    let traffic = Traffic::default();
    let seen = traffic.clone();
    thread::spawn(move || {
        // If QEMU does not connect, there is nothing to do; its own error has the reason.
        if let Ok((stream, _)) = listener.accept()
            && let Ok((cable, inbox)) = Cable::new(stream)
        {
            Host::new(cable, mmds, seen).run(&inbox);
        }
    });
    Ok(traffic)
}

/// Receives and sends frames, in QEMU's framing: each frame after its length, a big-endian u32.
struct Cable {
    stream: UnixStream,
    arrived: Option<Vec<u8>>,
}

impl Cable {
    fn new(stream: UnixStream) -> io::Result<(Cable, mpsc::Receiver<Vec<u8>>)> {
        let (sender, inbox) = mpsc::channel();
        let mut source = stream.try_clone()?;
        thread::spawn(move || -> io::Result<()> {
            loop {
                let mut length = [0; 4];
                source.read_exact(&mut length)?;
                let mut frame = vec![0; u32::from_be_bytes(length) as usize];
                source.read_exact(&mut frame)?;
                sender.send(frame).map_err(io::Error::other)?;
            }
        });
        Ok((
            Cable {
                stream,
                arrived: None,
            },
            inbox,
        ))
    }
}

struct Arrived(Vec<u8>);
struct Sender<'a>(&'a mut UnixStream);

impl Device for Cable {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: time::Instant) -> Option<(Arrived, Sender<'_>)> {
        Some((Arrived(self.arrived.take()?), Sender(&mut self.stream)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Sender<'_>> {
        Some(Sender(&mut self.stream))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        capabilities
    }
}

impl phy::RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut message = u32::try_from(length)
            .expect("frames are small")
            .to_be_bytes()
            .to_vec();
        message.resize(4 + length, 0);
        let result = f(&mut message[4..]);
        // A VM that has just ended receives no more frames.
        let _ = self.0.write_all(&message);
        result
    }
}

/// The kind of a frame, as far as faults depend on it.
#[derive(Debug, PartialEq)]
enum Meaning {
    /// A segment to MMDS from this port of the guest; `syn`: the first one of a connection.
    Segment {
        port: u16,
        syn: bool,
    },
    /// Anything else for MMDS's address, including ARP.
    ToMmds,
    Other,
}

fn meaning(frame: &[u8]) -> Meaning {
    let parse = || {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                let arp = ArpPacket::new_checked(ethernet.payload()).ok()?;
                (arp.target_protocol_addr() == MMDS_ADDRESS.octets()).then_some(Meaning::ToMmds)
            }
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
                if ip.dst_addr() != MMDS_ADDRESS {
                    return None;
                }
                if ip.next_header() != IpProtocol::Tcp {
                    return Some(Meaning::ToMmds);
                }
                let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
                Some(Meaning::Segment {
                    port: tcp.src_port(),
                    syn: tcp.syn() && !tcp.ack(),
                })
            }
            _ => None,
        }
    };
    parse().unwrap_or(Meaning::Other)
}

/// The host.
struct Host {
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    mmds: Option<(Mmds, Service)>,
    connections: Vec<Connection>,
    /// The guest's port of each connection so far.
    ports: Vec<u16>,
    traffic: Traffic,
    start: Instant,
}

/// One of MMDS's sockets and its state.
struct Connection {
    socket: SocketHandle,
    /// The number of its connection, once there is one.
    number: Option<usize>,
    inbox: Vec<u8>,
    outbox: VecDeque<u8>,
    sent: usize,
    next_drip: Instant,
}

impl Host {
    fn new(mut cable: Cable, mmds: Option<Mmds>, traffic: Traffic) -> Host {
        let start = Instant::now();
        let config = Config::new(MMDS_MAC.into());
        let mut interface = Interface::new(config, &mut cable, time::Instant::ZERO);
        // With a prefix length of 0 every guest is on-link, whatever its addresses.
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(MMDS_ADDRESS.into(), 0))
                .expect("there is room for one");
        });
        interface.set_any_ip(true);
        let mut sockets = SocketSet::new(vec![]);
        let mut connection = || {
            let [receive, transmit] =
                [8 << 10, 64 << 10].map(|n| tcp::SocketBuffer::new(vec![0; n]));
            let mut socket = tcp::Socket::new(receive, transmit);
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            Connection::new(sockets.add(socket))
        };
        let count = if mmds.is_some() { MMDS_CONNECTIONS } else { 0 };
        let connections = (0..count).map(|_| connection()).collect();
        let mmds = mmds.map(|mmds| (mmds.clone(), Service::new(mmds)));
        Host {
            cable,
            interface,
            sockets,
            mmds,
            connections,
            ports: vec![],
            traffic,
            start,
        }
    }

    fn run(mut self, inbox: &mpsc::Receiver<Vec<u8>>) {
        loop {
            self.poll();
            match inbox.recv_timeout(self.idle_time()) {
                Ok(frame) => self.arrive(frame),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Receives a frame, unless a fault drops it.
    fn arrive(&mut self, frame: Vec<u8>) {
        let meaning = meaning(&frame);
        self.traffic
            .frames
            .lock()
            .expect("no poison")
            .push(frame.clone());
        let lost = match (meaning, &self.mmds) {
            (Meaning::Other, _) => false,
            (_, None) => true,
            (Meaning::ToMmds, Some(_)) => false,
            (Meaning::Segment { port, syn }, Some((mmds, _))) => {
                if syn && !self.ports.contains(&port) {
                    self.ports.push(port);
                }
                let number = self.ports.iter().position(|&p| p == port);
                match number.and_then(|number| mmds.fault(number)) {
                    Some(Fault::Silent) => true,
                    Some(Fault::Refuse) => {
                        // The port is closed only while this segment is handled.
                        self.listening().for_each(tcp::Socket::abort);
                        false
                    }
                    // The 31st connection: without a free socket, the stack would answer with a reset.
                    _ => syn && self.listening().next().is_none(),
                }
            }
        };
        if !lost {
            self.cable.arrived = Some(frame);
            self.interface
                .poll(self.now(), &mut self.cable, &mut self.sockets);
        }
    }

    fn listening(&mut self) -> impl Iterator<Item = &mut tcp::Socket<'static>> {
        self.sockets.iter_mut().filter_map(|(_, socket)| {
            tcp::Socket::downcast_mut(socket).filter(|s| s.state() == tcp::State::Listen)
        })
    }

    fn poll(&mut self) {
        if let Some((mmds, service)) = &mut self.mmds {
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<tcp::Socket>(connection.socket);
                connection.serve(socket, &self.ports, mmds, service, &self.traffic);
            }
        }
        self.interface
            .poll(self.now(), &mut self.cable, &mut self.sockets);
    }

    /// How long to sleep unless a frame arrives.
    fn idle_time(&mut self) -> Duration {
        let stack = self.interface.poll_delay(self.now(), &self.sockets);
        let stack = stack.map_or(Duration::MAX, |delay| {
            Duration::from_micros(delay.total_micros())
        });
        let drips = self
            .connections
            .iter()
            .filter(|connection| !connection.outbox.is_empty());
        let drips = drips.map(|c| c.next_drip.saturating_duration_since(Instant::now()));
        // A byte that is due but waits for room in the window must not cause a busy loop.
        let drips = drips.map(|delay| delay.max(Duration::from_millis(1)));
        drips.fold(stack, Duration::min).min(Duration::from_secs(1))
    }

    fn now(&self) -> time::Instant {
        time::Instant::from_micros(self.start.elapsed().as_micros() as i64)
    }
}

impl Connection {
    fn new(socket: SocketHandle) -> Connection {
        Connection {
            socket,
            number: None,
            inbox: vec![],
            outbox: VecDeque::new(),
            sent: 0,
            next_drip: Instant::now(),
        }
    }

    /// Makes as much progress as possible.
    fn serve(
        &mut self,
        socket: &mut tcp::Socket,
        ports: &[u16],
        mmds: &Mmds,
        service: &mut Service,
        traffic: &Traffic,
    ) {
        if !socket.is_open() {
            *self = Connection::new(self.socket);
            socket
                .listen(MMDS_PORT)
                .expect("a closed socket can listen");
        }
        let Some(peer) = socket.remote_endpoint() else {
            return;
        };
        let number = || ports.iter().position(|&port| port == peer.port);
        let Some(number) = self.number.or_else(number) else {
            return;
        };
        self.number = Some(number);

        if socket.can_recv() {
            let inbox = &mut self.inbox;
            let _ = socket.recv(|bytes| (bytes.len(), inbox.extend_from_slice(bytes)));
        }
        let fault = mmds.fault(number);
        match Request::parse(&self.inbox, number) {
            _ if self.inbox.len() >= MAX_REQUEST => socket.abort(),
            Ok(Some((request, length))) => {
                self.inbox.drain(..length);
                self.outbox.extend(match fault {
                    Some(Fault::Instead(bytes)) => bytes.clone(),
                    _ => service.respond(&request),
                });
                traffic.requests.lock().expect("no poison").push(request);
            }
            Ok(None) => {}
            Err(_) => socket.abort(),
        }
        self.send(socket, fault);
        // Close when the guest has closed and everything is sent; a connection with lost segments stays open.
        let stalled = matches!(fault, Some(Fault::Stall(end)) if self.sent == *end);
        if socket.state() == tcp::State::CloseWait && self.outbox.is_empty() && !stalled {
            socket.close();
        }
    }

    /// Sends as much as the window and the fault allow.
    fn send(&mut self, socket: &mut tcp::Socket, fault: Option<&Fault>) {
        if !socket.may_send() {
            return;
        }
        let allowed = match fault {
            Some(Fault::Stall(end) | Fault::Reset(end) | Fault::Close(end)) => end - self.sent,
            Some(Fault::Drip(interval)) if self.next_drip <= Instant::now() => {
                self.next_drip = Instant::now() + *interval;
                1
            }
            Some(Fault::Drip(_)) => 0,
            _ => usize::MAX,
        };
        let bytes = self.outbox.make_contiguous();
        let bytes = &bytes[..bytes.len().min(allowed)];
        let sent = socket.send_slice(bytes).expect("it may send");
        self.outbox.drain(..sent);
        self.sent += sent;
        let delivered = socket.send_queue() == 0;
        match fault {
            Some(Fault::Stall(end)) if self.sent == *end => self.outbox.clear(),
            Some(Fault::Reset(end)) if self.sent == *end && delivered => socket.abort(),
            Some(Fault::Close(end)) if self.sent == *end => socket.close(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_for_mmds_are_recognised() {
        let mut arp = vec![0; 42];
        arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(meaning(&arp), Meaning::Other);
        arp[38..42].copy_from_slice(&MMDS_ADDRESS.octets());
        assert_eq!(meaning(&arp), Meaning::ToMmds);

        let mut syn = vec![0; 54];
        syn[12..18].copy_from_slice(&[8, 0, 0x45, 0, 0, 40]);
        syn[23] = 6;
        syn[30..34].copy_from_slice(&MMDS_ADDRESS.octets());
        syn[34..38].copy_from_slice(&[0x80, 0x01, 0, 80]);
        syn[46..48].copy_from_slice(&[0x50, 0x02]);
        assert_eq!(
            meaning(&syn),
            Meaning::Segment {
                port: 0x8001,
                syn: true
            }
        );
        syn[47] = 0x10;
        assert_eq!(
            meaning(&syn),
            Meaning::Segment {
                port: 0x8001,
                syn: false
            }
        );
        syn[30] = 10;
        assert_eq!(meaning(&syn), Meaning::Other);
        assert_eq!(meaning(&syn[..20]), Meaning::Other);
    }
}
