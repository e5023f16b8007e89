//! Network interfaces: applying the configuration through rtnetlink.

use crate::context;
use crate::error;
use crate::error::{Log, Result, name};
use crate::sys;
use crate::sys::files;
use proto::address;
use proto::bytes::{decimal, trim};
use proto::config::{Address, Config};
use proto::message::{ErrnoName, ToLossy};
use proto::netlink::{self, Acknowledgement, Existing, Request};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Index of lo, the first interface of every network namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LO_INDEX: u32 = 1;

/// The index of eth0, the only interface a Firecracker VM needs; `None` when it is not there.
///
/// From sysfs: SIOCGIFINDEX would make the kernel look for a module of that name (dev_load).
pub fn eth0_index() -> Option<u32> {
    let file = files::open(c"/sys/class/net/eth0/ifindex", OFlags::RDONLY).ok()?;
    let mut text = [0; 16];
    let length = files::read(&file, &mut text).ok()?;
    decimal(trim(text.get(..length as usize)?))
}

/// A channel to the kernel's network configuration.
pub struct Channel {
    socket: OwnedFd,
}

// linux/netlink.h
const SOL_NETLINK: u32 = 270;
const NETLINK_EXT_ACK: u32 = 11;

impl Channel {
    /// Opens one, with the kernel's words asked for. Protocol 0 is NETLINK_ROUTE.
    pub fn open() -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .map_err(context!("open a netlink socket"))?;
        // An older kernel gives the errno alone.
        let _words = sys::set_option(&socket, SOL_NETLINK, NETLINK_EXT_ACK, 1);
        Ok(Self { socket })
    }

    /// Sends a request and reads its acknowledgement, which the kernel gives within the send. What
    /// exists already is success; the error is the kernel's reason alone.
    pub fn request(&self, request: &Request) -> Result {
        let mut reply = [0; 1024];
        let mut done = files::write(&self.socket, request.as_bytes());
        loop {
            done = done.and_then(|_| files::read(&self.socket, &mut reply));
            let count = done.map_err(|errno| error!("{}", name(errno)))?;
            let answer = netlink::acknowledgement(reply.get(..count as usize).unwrap_or(&[]));
            if let Some(Acknowledgement { errno, text }) = answer {
                if errno == 0 || errno == Errno::EXIST.raw_os_error() {
                    return Ok(());
                }
                let name = ErrnoName(errno);
                return Err(match text {
                    [] => error!("{name}"),
                    _ => error!("{name} ({})", text.lossy()),
                });
            }
        }
    }
}

/// Brings lo up, and eth0 with its MTU, addresses and routes.
pub fn configure(config: &Config, log: &mut dyn Log) -> Result {
    let channel = Channel::open()?;
    channel
        .request(&netlink::link_up(LO_INDEX, None))
        .map_err(|why| error!("bring lo up: {why}"))?;
    if config.ip_configs.is_empty() {
        return Ok(());
    }
    let eth0 = eth0_index().ok_or_else(|| error!("no network interface eth0"))?;
    let mtu = config.mtu();
    channel
        .request(&netlink::link_up(eth0, Some(mtu)))
        .map_err(|error| error!("bring eth0 up with MTU {mtu}: {error}"))?;
    if let Err(errno) = checksums_off(&channel.socket) {
        log.warn(&context!("cannot switch eth0's checksum offload off")(
            errno,
        ));
    }
    for Address { ip, prefix, .. } in config.addresses() {
        channel
            .request(&netlink::add_address(eth0, &ip, prefix))
            .map_err(|error| error!("add {}/{prefix} to eth0: {error}", address::Text(&ip)))?;
    }
    // After all addresses: a gateway may be in the subnet of a later one.
    for Address { gateway, .. } in config.addresses() {
        let Some(gateway) = gateway else {
            continue;
        };
        let on_link = !config
            .addresses()
            .any(|near| netlink::same_subnet(&near.ip, &gateway, near.prefix));
        let route = netlink::default_route(eth0, &gateway, on_link, Existing::Keep);
        channel
            .request(&route)
            .map_err(|error| error!("route through {}: {error}", address::Text(&gateway)))?;
    }
    Ok(())
}

// linux/sockios.h, linux/ethtool.h
const SIOCETHTOOL: u32 = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;

/// struct ethtool_value
#[repr(C)]
struct Toggle {
    command: u32,
    data: u32,
}

/// struct ifreq, whose union is 24 bytes.
#[repr(C)]
struct InterfaceRequest<'a> {
    name: [u8; 16],
    toggle: &'a mut Toggle,
    rest: [u64; 2],
}

/// Packets on a virtual wire need no checksums of the device's. Those received are the device's own
/// business: virtio_net has no switch for them.
fn checksums_off(socket: &OwnedFd) -> Result<(), Errno> {
    let mut toggle = Toggle {
        command: ETHTOOL_STXCSUM,
        data: 0,
    };
    let mut request = InterfaceRequest {
        name: *b"eth0\0\0\0\0\0\0\0\0\0\0\0\0",
        toggle: &mut toggle,
        rest: [0; 2],
    };
    // SAFETY: SIOCETHTOOL reads an ifreq, and through its pointer an ethtool_value, which lives.
    unsafe { sys::ioctl_struct(socket, SIOCETHTOOL, &mut request) }
}
