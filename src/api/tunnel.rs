//! `CONNECT host:port`: forwards bytes between the client and a TCP port of the guest.

use super::error::CallError;
use super::io::{Io, LAST_BYTES_TIMEOUT};
use crate::context::{Context, EventSource};
use crate::error;
use crate::error::name;
use crate::sys::files;
use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use proto::address;
use proto::http::{Content, Reply, Status};
use proto::slab::Key;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrAny, SocketFlags, SocketType, sockopt,
};

/// Most bytes read from the server at once, so that other connections get their turn.
const PIECE: usize = 16 << 10;
/// How long a client may stay silent after the server has closed its side, in milliseconds. Not every
/// host forwards half-closes (Firecracker does not), so the tunnel ends then.
const HALF_CLOSED_TIMEOUT: u64 = 1_000;
/// How long a server may read nothing after its client has closed, in milliseconds.
const SLOW_SERVER_TIMEOUT: u64 = 30_000;

/// A connection to a TCP port.
pub struct Tunnel {
    server: OwnedFd,
    ip: IpAddr,
    port: u16,
    watched: EventFlags,
    connected: bool,
    /// The client has closed its side or the connection, but some of its bytes may not have been read yet.
    client_closing: bool,
    /// From the client to the server, through the input buffer.
    up: Flow,
    /// From the server to the client, through the output buffer.
    down: Flow,
}

/// One direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Open.
    Open,
    /// Closing: the last bytes are being sent.
    Closing,
    /// Closed, or the receiver is gone.
    Closed,
}

impl Tunnel {
    /// Begins to connect to an address of the guest.
    pub fn open(host: &str, port: u16, proc: &OwnedFd) -> Result<Self, CallError> {
        let ip = match host {
            "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            _ => address::parse(host),
        };
        let Some(ip) = ip else {
            let error = error!("{host} is no address: of names only localhost is known");
            return Err(CallError::new(Status::BadGateway, error));
        };
        let connect = || {
            // Binding succeeds only for the guest's own addresses. The connection itself is not bound, as a port
            // that the kernel chooses is free again sooner.
            rustix::net::bind(&socket(ip, proc)?, &socket_address(ip, 0))?;
            let server = socket(ip, proc)?;
            sockopt::set_tcp_nodelay(&server, true)?;
            Ok(server)
        };
        Ok(Self {
            server: connect().map_err(|errno| bad_gateway(&ip, port, errno))?,
            ip,
            port,
            watched: EventFlags::empty(),
            connected: false,
            client_closing: false,
            up: Flow::Open,
            down: Flow::Open,
        })
    }

    /// Continues to connect. Returns whether it is connected; then the response is queued.
    pub fn connect(&mut self, io: &mut Io) -> Result<bool, CallError> {
        // A repeated call returns the result of the first one (connect(2)).
        match rustix::net::connect(&self.server, &socket_address(self.ip, self.port)) {
            Ok(()) | Err(Errno::ISCONN) => {}
            Err(Errno::INPROGRESS | Errno::ALREADY) => return Ok(false),
            Err(errno) => return Err(self.failure(errno)),
        }
        self.connected = true;
        io.reply = Reply::OPEN;
        io.queue_head(Status::Ok, Content::None);
        Ok(true)
    }

    /// Whether it is connected to the server.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// The error if it cannot connect.
    pub fn failure(&self, errno: Errno) -> CallError {
        bad_gateway(&self.ip, self.port, errno)
    }

    /// Whether to read from the client now.
    fn wants_input(&mut self, io: &mut Io) -> bool {
        self.connected && self.up == Flow::Open && io.received().is_empty()
    }

    /// Handles events of the client's end: reads from it if that is wanted.
    pub fn receive(&mut self, events: EventFlags, io: &mut Io) {
        if !self.wants_input(io) {
            // A reset of the vsock device only reports an error.
            let ends = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
            self.client_closing |= events.intersects(ends);
            return;
        }
        io.receive();
        if core::mem::take(&mut io.broken) {
            self.up = Flow::Closing;
        }
    }

    /// Handles a client that no longer receives.
    pub fn on_client_gone(&mut self, io: &mut Io) {
        io.broken = false;
        io.drop_unsent();
        self.down = Flow::Closed;
    }

    /// Moves bytes in both directions, at most `budget` pieces from the server. Returns whether it moved any.
    pub fn proceed(&mut self, io: &mut Io, budget: &mut u32) -> bool {
        // Not `||`: both directions get their turn.
        self.move_up(io) | self.move_down(io, budget)
    }

    fn move_up(&mut self, io: &mut Io) -> bool {
        let bytes = io.received();
        if self.up == Flow::Closed || (self.up == Flow::Open && bytes.is_empty()) {
            return false;
        }
        if bytes.is_empty() {
            let _gone = rustix::net::shutdown(&self.server, Shutdown::Write);
            self.up = Flow::Closed;
            // A client that has closed both directions fails even an empty send.
            if rustix::net::send(io.socket(), &[], SendFlags::NOSIGNAL).is_err() {
                self.on_client_gone(io);
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

    fn move_down(&mut self, io: &mut Io, budget: &mut u32) -> bool {
        if self.down == Flow::Closed || !io.is_sent() {
            return false;
        }
        if self.down == Flow::Closing {
            let _gone = rustix::net::shutdown(io.socket(), Shutdown::Write);
            self.down = Flow::Closed;
            return true;
        }
        if *budget == 0 {
            return false;
        }
        let room = io.spare().get_mut(..PIECE).unwrap_or(&mut []);
        match files::read(&self.server, room) {
            Ok(count @ 1..) => {
                *budget -= 1;
                io.commit(count);
            }
            Err(Errno::AGAIN) => return false,
            Ok(_) => self.down = Flow::Closing,
            Err(_) => {
                // A reset: the server does not receive either.
                self.down = Flow::Closing;
                self.up = Flow::Closed;
            }
        }
        true
    }

    /// Whether both directions are closed.
    pub fn is_closed(&self) -> bool {
        self.up == Flow::Closed && self.down == Flow::Closed
    }

    /// The idle timeout from now on, in milliseconds.
    pub fn timeout(&self, io: &Io) -> Option<u64> {
        match (self.up, self.down) {
            (Flow::Closed, _) => None,
            (Flow::Open, Flow::Closed) if !self.client_closing => match io.may_be_unread() {
                true => Some(LAST_BYTES_TIMEOUT),
                false => Some(HALF_CLOSED_TIMEOUT),
            },
            (Flow::Open, _) if !self.client_closing => None,
            _ => Some(SLOW_SERVER_TIMEOUT),
        }
    }

    /// Registers for events at the server's end. Returns those to wait for at the client's.
    pub fn watch(&mut self, key: Key, io: &mut Io, context: &Context) -> EventFlags {
        let flag = |wanted, flag| if wanted { flag } else { EventFlags::empty() };
        let sent = io.is_sent();
        let has_input = self.up != Flow::Closed && !io.received().is_empty();
        let from_server = flag(
            self.connected && self.down == Flow::Open && sent,
            EventFlags::IN,
        );
        let to_server = flag(!self.connected || has_input, EventFlags::OUT);
        let token = EventSource::Tunnel.token(key);
        let wanted = from_server | to_server;
        context
            .poller
            .watch(&self.server, token, &mut self.watched, wanted);
        let from_client = match self.wants_input(io) {
            true => EventFlags::IN,
            // Detects that it closes even if its earlier bytes have not been read yet.
            false => flag(
                self.up == Flow::Open && !self.client_closing,
                EventFlags::RDHUP,
            ),
        };
        from_client | flag(!sent, EventFlags::OUT)
    }
}

/// A socket address for system calls.
fn socket_address(ip: IpAddr, port: u16) -> SocketAddrAny {
    SocketAddr::new(ip, port).into()
}

/// A non-blocking TCP socket; `proc` is /proc. For a family that the kernel lacks it would run the root's
/// modprobe and make PID 1 wait for it (__sock_create, net/socket.c).
fn socket(ip: IpAddr, proc: &OwnedFd) -> Result<OwnedFd, Errno> {
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => {
            files::open_at(proc, c"self/net/if_inet6", OFlags::PATH)
                .map_err(|_| Errno::AFNOSUPPORT)?;
            AddressFamily::INET6
        }
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

fn bad_gateway(ip: &IpAddr, port: u16, errno: Errno) -> CallError {
    let (ip, port) = (address::Text(ip), u32::from(port));
    let error = match errno {
        Errno::ADDRNOTAVAIL => error!("{ip} is no address of the guest"),
        _ => error!("connect to {ip} port {port}: {}", name(errno)),
    };
    CallError::new(Status::BadGateway, error)
}
