//! Network interfaces: applying the configuration through rtnetlink.

use crate::sys;
use crate::task::{Outcome, name};
use crate::why;
use core::ffi::CStr;
use pigeon_init::bytes::decimal;
use pigeon_init::config::Config;
use pigeon_init::netlink::{self, Refusal, Request};
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The only network interface a Firecracker VM needs.
const ETH0: &CStr = c"eth0";
/// Index of lo, the first interface of every network namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LO_INDEX: u32 = 1;

/// The index of eth0, `None` when there is no such interface.
///
/// From sysfs: SIOCGIFINDEX would make the kernel look for a module of that name (dev_load).
pub fn eth0_index() -> Option<u32> {
    let mut text = [0; 16];
    let length = crate::files::read_found(c"/sys/class/net/eth0/ifindex", &mut text).ok()??;
    decimal(text.get(..length)?.trim_ascii())
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
    pub fn open() -> Outcome<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .map_err(why!("open a netlink socket"))?;
        // An older kernel gives the errno alone.
        let _words = sys::set_option(socket.as_fd(), SOL_NETLINK, NETLINK_EXT_ACK, 1);
        Ok(Self { socket })
    }

    /// Sends a request and reads its acknowledgement; the kernel answers within the send.
    pub fn request(&self, request: &Request) -> Result<(), Refusal> {
        self.exchange(request).unwrap_or_else(|errno| {
            Err(Refusal {
                errno: errno.raw_os_error(),
                message: Line::new(),
            })
        })
    }

    fn exchange(&self, request: &Request) -> Result<Result<(), Refusal>, Errno> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(
            &self.socket,
            request.as_bytes(),
            SendFlags::empty(),
            &kernel,
        )?;
        let mut reply = [0u8; 1024];
        loop {
            let (count, _) = rustix::net::recv(&self.socket, &mut reply, RecvFlags::DONTWAIT)?;
            let answer = netlink::acknowledgement(reply.get(..count).unwrap_or(&[]));
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    /// The same, where "exists already" is success.
    pub fn ensure(&self, request: &Request) -> Result<(), Refusal> {
        match self.request(request) {
            Err(refusal) if refusal.errno == Errno::EXIST.raw_os_error() => Ok(()),
            other => other,
        }
    }
}

/// Brings lo up, and eth0 with its MTU, addresses and routes.
pub fn configure(config: &Config, mut warn: impl FnMut(Line)) -> Outcome {
    let channel = Channel::open()?;
    channel
        .request(&netlink::link_up(LO_INDEX, None))
        .map_err(|refusal| text!("bring lo up: ", refusal))?;
    if config.ip_configs().next().is_none() {
        return Ok(());
    }
    let eth0 = eth0_index().ok_or_else(|| text!("no network interface ", ETH0))?;
    let mtu = config.mtu();
    channel
        .request(&netlink::link_up(eth0, Some(mtu)))
        .map_err(|refusal| text!("bring ", ETH0, " up with MTU ", mtu, ": ", refusal))?;
    if let Err(errno) = checksums_off(&channel.socket) {
        warn(text!(
            "cannot switch ",
            ETH0,
            "'s checksum offload off: ",
            name(errno)
        ));
    }
    for entry in config.ip_configs() {
        let address = entry.address()?;
        channel
            .ensure(&netlink::add_address(eth0, address.ip, address.prefix))
            .map_err(|refusal| {
                text!(
                    "add ",
                    address.ip,
                    "/",
                    u32::from(address.prefix),
                    " to ",
                    ETH0,
                    ": ",
                    refusal
                )
            })?;
    }
    // After all addresses: a gateway may be in the subnet of a later one.
    for entry in config.ip_configs() {
        let Some(gateway) = entry.address()?.gateway else {
            continue;
        };
        let reachable = config.ip_configs().any(|entry| {
            entry
                .address()
                .is_ok_and(|near| netlink::same_subnet(near.ip, gateway, near.prefix))
        });
        channel
            .ensure(&netlink::default_route(eth0, gateway, !reachable))
            .map_err(|refusal| text!("route through ", gateway, ": ", refusal))?;
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
    let mut name = [0; 16];
    name.iter_mut()
        .zip(ETH0.to_bytes())
        .for_each(|(slot, byte)| *slot = *byte);
    let mut toggle = Toggle {
        command: ETHTOOL_STXCSUM,
        data: 0,
    };
    let mut request = InterfaceRequest {
        name,
        toggle: &mut toggle,
        rest: [0; 2],
    };
    // SAFETY: SIOCETHTOOL reads an ifreq, and through its pointer an ethtool_value, which lives.
    unsafe { sys::ioctl_struct(socket.as_fd(), SIOCETHTOOL, &mut request) }
}
