//! Configures network interfaces through rtnetlink.

use crate::context;
use crate::context::Interfaces;
use crate::error;
#[cfg(feature = "snapshot")]
use crate::error::Discard;
use crate::error::{Log, Result};
use crate::sys;
use crate::sys::files;
use core::fmt;
use core::net::IpAddr;
use proto::address;
#[cfg(feature = "snapshot")]
use proto::config::MAX_ADDRESSES;
use proto::config::{Address, Config};
use proto::message::{ErrnoName, ToLossy};
use proto::netlink::{self, Acknowledgement, NextHop, Request};
#[cfg(feature = "snapshot")]
use proto::netlink::{Entry, Reply};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Index of lo, the first interface of every network namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LO_INDEX: u32 = 1;

/// The index of eth0, the interface to Firecracker's metadata service.
pub fn eth0_index() -> Option<u32> {
    NetlinkSocket::open().ok()?.index("eth0")
}

/// An rtnetlink socket.
pub struct NetlinkSocket {
    fd: OwnedFd,
}

impl NetlinkSocket {
    /// Opens a socket, with extended acknowledgements enabled. Protocol 0 is NETLINK_ROUTE.
    pub fn open() -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .map_err(context!("open a netlink socket"))?;
        // An older kernel only returns the errno.
        let _unsupported = sys::network::enable_extended_acks(&fd);
        Ok(Self { fd })
    }

    /// The index of a network interface; `None` if there is none of that name.
    ///
    /// Not by SIOCGIFINDEX, for which the kernel would try to load a module of that name (dev_load), nor by
    /// sysfs, which a workload may have mounted over.
    pub fn index(&self, name: &str) -> Option<u32> {
        // The reply is truncated after the index, which is near its start.
        let mut reply = [0; 64];
        files::write(&self.fd, netlink::get_link(name).as_bytes()).ok()?;
        let count = files::read(&self.fd, &mut reply).ok()?;
        netlink::link_index(reply.get(..count)?)
    }

    /// Sends a request and reads its acknowledgement, which the kernel queues within the send. EEXIST counts
    /// as success; the error says `what` failed, and the kernel's reason.
    pub fn request(&self, request: &Request, what: fmt::Arguments) -> Result {
        self.request_unless(request, &[Errno::EXIST], what)?;
        Ok(())
    }

    /// The same, with other errnos that count as success. Returns whether it was none of them.
    fn request_unless(
        &self,
        request: &Request,
        accepted: &[Errno],
        what: fmt::Arguments,
    ) -> Result<bool> {
        let mut reply = [0; 1024];
        files::write(&self.fd, request.as_bytes()).map_err(context!("{what}"))?;
        loop {
            let count = files::read(&self.fd, &mut reply).map_err(context!("{what}"))?;
            let acknowledgement = netlink::acknowledgement(reply.get(..count).unwrap_or(&[]));
            if let Some(Acknowledgement { errno, text }) = acknowledgement {
                if errno == 0 || accepted.iter().any(|ok| ok.raw_os_error() == errno) {
                    return Ok(errno == 0);
                }
                let name = ErrnoName(errno);
                return Err(match text {
                    [] => error!("{what}: {name}"),
                    _ => error!("{what}: {name} ({})", text.lossy()),
                });
            }
        }
    }
}

#[cfg(feature = "snapshot")]
impl NetlinkSocket {
    /// Calls `visit` with each entry of a dump. Returns whether the dump is complete: nothing changed
    /// meanwhile.
    fn dump(&self, request: &Request, visit: &mut dyn FnMut(Entry)) -> Result<bool> {
        let failed = context!("list the network's state");
        // The kernel sends at most a page, or the size of the buffer, at once (netlink_recvmsg).
        let mut received = [0; 8192];
        files::write(&self.fd, request.as_bytes()).map_err(&failed)?;
        let mut is_whole = true;
        loop {
            let count = files::read(&self.fd, &mut received).map_err(&failed)?;
            for message in netlink::messages(received.get(..count).unwrap_or(&[])) {
                is_whole &= !message.is_interrupted();
                match message.reply() {
                    Reply::Entry(entry) => visit(entry),
                    Reply::Done(0) => return Ok(is_whole),
                    Reply::Done(errno) | Reply::Acknowledgement(Acknowledgement { errno, .. }) => {
                        return Err(failed(Errno::from_raw_os_error(errno)));
                    }
                    Reply::Other => {}
                }
            }
        }
    }
}

/// Brings up lo, and the interfaces that have addresses, with their MTU, addresses and routes. Returns
/// those interfaces. What exists already is not an error; checksum offload that cannot be disabled is a
/// warning.
pub fn configure(config: &Config, log: &mut dyn Log) -> Result<Interfaces> {
    let socket = NetlinkSocket::open()?;
    let mut interfaces = Interfaces::new();
    socket.request(
        &netlink::link_up(LO_INDEX, None),
        format_args!("bring lo up"),
    )?;
    // The first gateway of a family is used for all: with two, traffic would be split (ECMP).
    let [mut ipv4, mut ipv6] = [None; 2];
    for Address {
        ip,
        prefix,
        device,
        gateway,
    } in config.addresses()
    {
        let index = index(&socket, device)?;
        if !interfaces.contains(&index) {
            // lo is up, and keeps its MTU and its checksum offload.
            if index != LO_INDEX {
                bring_up(&socket, index, device, config, log)?;
            }
            let _one_an_address = interfaces.push(index);
        }
        let request = netlink::add_address(index, &ip, prefix);
        let (ip, prefix) = (address::Text(&ip), u32::from(prefix));
        socket.request(&request, format_args!("add {ip}/{prefix} to {device}"))?;
        if let Some(gateway) = gateway {
            let first = if gateway.is_ipv4() {
                &mut ipv4
            } else {
                &mut ipv6
            };
            first.get_or_insert((gateway, device, index));
        }
    }
    // After all addresses: a gateway may be in the subnet of a later one.
    for (gateway, device, index) in [&ipv4, &ipv6].into_iter().flatten() {
        set_gateway(&socket, config, gateway, device, *index)?;
    }
    Ok(interfaces)
}

/// Replaces the addresses of `interfaces` and of the interfaces in `config` by those in `config`. If an
/// address has changed, or `config_changed`, the interfaces' routes are removed too; their neighbour
/// entries always. Updates `interfaces` to those that have addresses (after a failure, those that may
/// have).
#[cfg(feature = "snapshot")]
pub fn replace(config: &Config, config_changed: bool, interfaces: &mut Interfaces) -> Result {
    let socket = NetlinkSocket::open()?;
    let mut wanted = heapless::Vec::<(AddressKey, bool), MAX_ADDRESSES>::new();
    for Address {
        ip, prefix, device, ..
    } in config.addresses()
    {
        let index = index(&socket, device)?;
        if !interfaces.contains(&index) {
            let pushed = interfaces.push(index);
            pushed.map_err(|_| error!("more than {MAX_ADDRESSES} interfaces have addresses"))?;
        }
        let _fits = wanted.push(((index, Some((ip, prefix))), false));
    }
    let is_ours = |entry: &Entry| !entry.is_automatic && interfaces.contains(&entry.index);
    let mut has_others = config_changed;
    remove(
        &socket,
        &netlink::dump_addresses(),
        "an old address",
        &mut |entry| {
            let mut is_old = is_ours(entry);
            for (one, is_there) in &mut wanted {
                if *one == (entry.index, entry.address) {
                    (*is_there, is_old) = (true, false);
                }
            }
            has_others |= is_old;
            is_old
        },
    )?;
    if has_others || wanted.iter().any(|(_, is_there)| !is_there) {
        remove(
            &socket,
            &netlink::dump_routes(),
            "an old route",
            &mut |entry| is_ours(entry),
        )?;
    }
    // Warnings were logged at the boot already.
    let configured = configure(config, &mut Discard)?;
    let neighbours = netlink::dump_neighbours();
    remove(&socket, &neighbours, "an old neighbour", &mut |entry| {
        is_ours(entry)
    })?;
    *interfaces = configured;
    Ok(())
}

/// What identifies an address: its interface, itself, and its prefix length.
#[cfg(feature = "snapshot")]
type AddressKey = (u32, Option<(IpAddr, u8)>);

/// Deletes the selected entries of a dump.
#[cfg(feature = "snapshot")]
fn remove(
    socket: &NetlinkSocket,
    dump: &Request,
    what: &str,
    selects: &mut dyn FnMut(&Entry) -> bool,
) -> Result {
    /// Maximum number of entries deleted per dump.
    const BATCH: usize = 64;
    /// Maximum number of dumps: enough for far more neighbours than the kernel keeps (gc_thresh3,
    /// arp(7)).
    const MAX_DUMPS: usize = 256;
    for _ in 0..MAX_DUMPS {
        let mut requests = heapless::Vec::<Request, BATCH>::new();
        let mut is_all = true;
        is_all &= socket.dump(dump, &mut |entry| {
            if selects(&entry) {
                let request = entry.delete();
                is_all &= request.is_some_and(|request| requests.push(request).is_ok());
            }
        })?;
        for request in &requests {
            // It may have been removed together with another one.
            let gone = [Errno::ADDRNOTAVAIL, Errno::SRCH, Errno::NOENT];
            socket.request_unless(request, &gone, format_args!("remove {what}"))?;
        }
        if is_all {
            return Ok(());
        }
    }
    Err(error!("remove {what}: there are too many"))
}

/// Makes a gateway the default route.
fn set_gateway(
    socket: &NetlinkSocket,
    config: &Config,
    gateway: &IpAddr,
    device: &str,
    index: u32,
) -> Result {
    let is_on_subnet = config.addresses().any(|address| {
        address.device == device && netlink::has_route(&address.ip, gateway, address.prefix)
    });
    let next_hop = match is_on_subnet {
        true => NextHop::Routed,
        false => NextHop::OnLink,
    };
    let route = netlink::default_route(index, gateway, next_hop);
    let gateway = address::Text(gateway);
    socket.request(&route, format_args!("route through {gateway}"))
}

fn index(socket: &NetlinkSocket, device: &str) -> Result<u32> {
    socket
        .index(device)
        .ok_or_else(|| error!("no network interface {device}"))
}

/// Brings an interface up, which may be up already.
fn bring_up(
    socket: &NetlinkSocket,
    index: u32,
    device: &str,
    config: &Config,
    log: &mut dyn Log,
) -> Result {
    let mtu = config.mtu();
    // EINVAL: over the maximum that the device advertises (virtnet_probe, drivers/net/virtio_net.c), which
    // is its MTU already.
    let accepted: &[Errno] = match config.has_mtu() {
        true => &[],
        false => &[Errno::INVAL],
    };
    let what = format_args!("bring {device} up with MTU {mtu}");
    if !socket.request_unless(&netlink::link_up(index, Some(mtu)), accepted, what)? {
        socket.request(&netlink::link_up(index, None), what)?;
    }
    // Packets on a virtual link need no checksum offload. virtio_net has no switch for the receive side.
    if let Err(errno) = sys::network::disable_tx_checksum(&socket.fd, device) {
        log.warn(&context!("cannot switch {device}'s checksum offload off")(
            errno,
        ));
    }
    Ok(())
}
