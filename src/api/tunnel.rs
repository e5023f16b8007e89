//! `CONNECT host:port`: a connection to a TCP port of the guest, whose bytes go both ways.

use super::io::{CallError, Io};
use crate::context::{Context, Source};
use crate::error;
use crate::error::name;
use crate::sys::files;
use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use proto::address;
use proto::http::{Content, Reply, ResponseHead, Status};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, sockopt};

/// Bytes taken from the server at once, as others wait, too.
const PIECE: usize = 16 << 10;
/// How long a client may send nothing when the server has sent its last, in milliseconds: not every
/// host passes on that one direction has ended (Firecracker does not), so its end is the tunnel's.
const HALF_CLOSED: u64 = 1_000;
/// How long a server may take nothing of what a client has left, in milliseconds.
const LAST_BYTES: u64 = 30_000;

/// A connection to a TCP port.
pub struct Tunnel {
    server: OwnedFd,
    address: SocketAddr,
    watched: EventFlags,
    connected: bool,
    /// The client has ended its half, or all of it, and maybe not all that it sent is taken yet.
    client_leaves: bool,
    /// From the client to the server, by way of the received bytes.
    up: Flow,
    /// From the server to the client, by way of the bytes to send.
    down: Flow,
}

/// One direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Bytes may come.
    Open,
    /// The last ones are on their way.
    Ended,
    /// The end is passed on, or nobody takes them.
    Closed,
}

impl Tunnel {
    /// Begins to connect to an address of the guest.
    pub fn open(host: &str, port: u16) -> Result<Self, CallError> {
        let ip = match host {
            "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            _ => address::parse(host),
        };
        let Some(ip) = ip else {
            let error = error!("{host} is no address: of names only localhost is known");
            return Err(CallError::new(Status::BadGateway, error));
        };
        let connect = || {
            // Only an address of its own can be bound to. The connection gets a port of the kernel's
            // choice, which is free sooner than one that was bound.
            let own = SocketAddr::new(ip, 0);
            rustix::net::bind(&socket(ip)?, &own)?;
            let server = socket(ip)?;
            sockopt::set_tcp_nodelay(&server, true)?;
            Ok(server)
        };
        let address = SocketAddr::new(ip, port);
        Ok(Self {
            server: connect().map_err(|errno| bad_gateway(&address, errno))?,
            address,
            watched: EventFlags::empty(),
            connected: false,
            client_leaves: false,
            up: Flow::Open,
            down: Flow::Open,
        })
    }

    /// Goes on connecting; whether that is done. The answer is queued then.
    pub fn connect(&mut self, io: &mut Io) -> Result<bool, CallError> {
        // Asked again, the kernel says what has come of it (connect(2)).
        match rustix::net::connect(&self.server, &self.address) {
            Ok(()) | Err(Errno::ISCONN) => {}
            Err(Errno::INPROGRESS | Errno::ALREADY) => return Ok(false),
            Err(errno) => return Err(self.failure(errno)),
        }
        self.connected = true;
        let open = Reply {
            keep_alive: true,
            ..Reply::CLOSE
        };
        let head = ResponseHead::new(Status::Ok, open, Content::None);
        io.queue(head.finish().as_bytes());
        Ok(true)
    }

    /// Whether the server has accepted.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Why it has not.
    pub fn failure(&self, errno: Errno) -> CallError {
        bad_gateway(&self.address, errno)
    }

    /// Whether bytes of the client are of use now.
    fn wants_input(&mut self, io: &mut Io) -> bool {
        self.connected && self.up == Flow::Open && io.received().is_empty()
    }

    /// Something happened to the client's end: takes bytes, if they are of use now.
    pub fn receive(&mut self, events: EventFlags, io: &mut Io) {
        if !self.wants_input(io) {
            self.client_leaves |= events.contains(EventFlags::RDHUP);
            return;
        }
        io.receive();
        if core::mem::take(&mut io.broken) {
            self.up = Flow::Ended;
        }
    }

    /// The client takes no more.
    pub fn client_is_gone(&mut self, io: &mut Io) {
        io.broken = false;
        io.drop_unsent();
        self.down = Flow::Closed;
    }

    /// Moves bytes both ways, `pieces` more from the server at most; whether that was anything.
    pub fn proceed(&mut self, io: &mut Io, pieces: &mut u32) -> bool {
        // Both have their turn.
        self.move_up(io) | self.move_down(io, pieces)
    }

    fn move_up(&mut self, io: &mut Io) -> bool {
        let bytes = io.received();
        if self.up == Flow::Closed || (self.up == Flow::Open && bytes.is_empty()) {
            return false;
        }
        if bytes.is_empty() {
            let _gone = rustix::net::shutdown(&self.server, Shutdown::Write);
            self.up = Flow::Closed;
            // One that has ended both directions takes not even nothing.
            if rustix::net::send(io.socket(), &[], SendFlags::NOSIGNAL).is_err() {
                self.client_is_gone(io);
            }
            return true;
        }
        let count = match files::write(&self.server, bytes) {
            Ok(count) => count,
            Err(Errno::AGAIN) => return false,
            Err(_) => {
                self.up = Flow::Closed;
                bytes.len()
            }
        };
        io.discard(0..count);
        true
    }

    fn move_down(&mut self, io: &mut Io, pieces: &mut u32) -> bool {
        if self.down == Flow::Closed || !io.is_sent() {
            return false;
        }
        if self.down == Flow::Ended {
            let _gone = rustix::net::shutdown(io.socket(), Shutdown::Write);
            self.down = Flow::Closed;
            return true;
        }
        if *pieces == 0 {
            return false;
        }
        let room = io.spare().get_mut(..PIECE).unwrap_or(&mut []);
        match files::read(&self.server, room) {
            Ok(count @ 1..) => {
                *pieces -= 1;
                io.commit(count);
            }
            Err(Errno::AGAIN) => return false,
            Ok(_) => self.down = Flow::Ended,
            Err(_) => {
                // A reset: it takes nothing, either.
                self.down = Flow::Ended;
                self.up = Flow::Closed;
            }
        }
        true
    }

    /// Whether both directions have ended.
    pub fn is_over(&self) -> bool {
        self.up == Flow::Closed && self.down == Flow::Closed
    }

    /// How long nothing may move from now on, in milliseconds.
    pub fn timeout(&self) -> Option<u64> {
        match (self.up, self.down) {
            (Flow::Closed, _) => None,
            (Flow::Open, Flow::Closed) if !self.client_leaves => Some(HALF_CLOSED),
            (Flow::Open, _) if !self.client_leaves => None,
            _ => Some(LAST_BYTES),
        }
    }

    /// Registers for what is waited for at the server's end; what is waited for at the client's.
    pub fn watch(&mut self, key: Key, io: &mut Io, context: &Context) -> EventFlags {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let sent = io.is_sent();
        let has_input = self.up != Flow::Closed && !io.received().is_empty();
        let from_server = flag(
            self.connected && self.down == Flow::Open && sent,
            EventFlags::IN,
        );
        let to_server = flag(!self.connected || has_input, EventFlags::OUT);
        let token = Source::Tunnel.token(key);
        let wanted = from_server | to_server;
        context
            .poller
            .watch(&self.server, token, &mut self.watched, wanted);
        let from_client = match self.wants_input(io) {
            true => EventFlags::IN,
            // That it leaves is seen beside what it has sent before.
            false => flag(
                self.up == Flow::Open && !self.client_leaves,
                EventFlags::RDHUP,
            ),
        };
        from_client | flag(!sent, EventFlags::OUT)
    }
}

/// A TCP socket that does not block.
fn socket(ip: IpAddr) -> Result<OwnedFd, Errno> {
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

fn bad_gateway(address: &SocketAddr, errno: Errno) -> CallError {
    let (ip, port) = (address.ip(), u32::from(address.port()));
    let ip = address::Text(&ip);
    let error = match errno {
        Errno::ADDRNOTAVAIL => error!("{ip} is no address of the guest"),
        _ => error!("connect to {ip} port {port}: {}", name(errno)),
    };
    CallError::new(Status::BadGateway, error)
}
