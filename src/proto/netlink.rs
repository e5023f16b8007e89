//! rtnetlink messages (rtnetlink(7), netlink(7)): requests, acknowledgements, and dumps. Bytes only.

use crate::bytes::{before, copy};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

// include/uapi/linux/netlink.h
/// struct nlmsghdr: length (4), type (2), flags (2), sequence number (4), port id (4).
const NLMSG_HDRLEN: usize = 16;
const NLMSG_ALIGNTO: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// NLM_F_ROOT and NLM_F_MATCH
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
/// Creates an entry or replaces an existing one.
const CREATE_OR_REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// struct nlmsgerr: negative errno (4), the request's header, and its payload unless capped.
const NLMSGERR_ERROR: usize = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// struct nlattr, struct rtattr: length with itself (2), type (2).
const NLA_HDRLEN: usize = 4;
const NLA_TYPE_MASK: u16 = 0x3fff;

// include/uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
/// struct rtmsg: family, destination's prefix length, source's, tos, table, protocol, scope, type,
/// flags (4).
const RTMSG_LEN: usize = 12;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
/// The metric of a route that any other route takes precedence over.
const LOWEST_PRIORITY_METRIC: u32 = u32::MAX;

// include/uapi/linux/if_link.h, if.h
/// struct ifinfomsg: family, padding, type (2), index (4), flags (4), change mask (4).
const IFINFOMSG_LEN: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 0x1;
/// Size of an interface's name, its NUL included.
const IFNAMSIZ: usize = 16;

// include/uapi/linux/if_addr.h
/// struct ifaddrmsg: family, prefix length, flags, scope, index (4).
const IFADDRMSG_LEN: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u8 = 0x02;

// include/uapi/linux/neighbour.h
/// struct ndmsg: family, padding (3), index (4), state (2), flags, type.
const NDMSG_LEN: usize = 12;
const NUD_NOARP: u16 = 0x40;

// include/linux/socket.h
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Maximum length of a request: the longest ones delete an IPv6 route, with all of its attributes, some 200
/// bytes.
const MAX_REQUEST: usize = 256;

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: heapless::Vec<u8, MAX_REQUEST>,
}

impl Request {
    /// A request for an acknowledgement, or for a dump.
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut request = Self {
            bytes: heapless::Vec::new(),
        };
        request.put(&[0; 4]);
        request.put(&kind.to_ne_bytes());
        request.put(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // The sequence number is always 1, as there is one request at a time. The kernel fills in the port id.
        request.put(&1u32.to_ne_bytes());
        request.put(&[0; 4]);
        request.put(body);
        request
    }

    /// Appends bytes, and updates the length in the header.
    fn put(&mut self, bytes: &[u8]) {
        let fits = self.bytes.extend_from_slice(bytes);
        debug_assert!(fits.is_ok());
        let length = self.bytes.len() as u32;
        if let Some(field) = self.bytes.first_chunk_mut() {
            *field = length.to_ne_bytes();
        }
    }

    /// Appends an attribute. Its data is a number or an address, so a multiple of NLA_ALIGNTO.
    fn attribute(&mut self, kind: u16, data: &[u8]) {
        let length = (NLA_HDRLEN + data.len()) as u16;
        self.put(&length.to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        self.put(data);
    }

    fn number(&mut self, kind: u16, number: u32) {
        self.attribute(kind, &number.to_ne_bytes());
    }

    fn address(&mut self, kind: u16, ip: &IpAddr) {
        match ip {
            IpAddr::V4(ip) => self.attribute(kind, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(kind, &ip.octets()),
        }
    }

    /// The message to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn family(ip: &IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// Requests the interface of that name, which is truncated to 15 bytes, the maximum.
pub fn get_link(name: &str) -> Request {
    let mut text = [0; IFNAMSIZ];
    copy(name.as_bytes(), text.split_at_mut(IFNAMSIZ - 1).0);
    let mut request = Request::new(RTM_GETLINK, 0, &[AF_UNSPEC; IFINFOMSG_LEN]);
    request.attribute(IFLA_IFNAME, &text);
    request
}

/// The interface index in the response to [`get_link`], of which the first bytes are enough.
pub fn link_index(received: &[u8]) -> Option<u32> {
    let is_link = u16_at(received, 4)? == RTM_NEWLINK;
    u32_at(received, NLMSG_HDRLEN + 4).filter(|_| is_link)
}

/// Brings interface `index` up, and sets its MTU if one is given.
pub fn link_up(index: u32, mtu: Option<u32>) -> Request {
    let mut body = [0; IFINFOMSG_LEN];
    let fields = [0, index, IFF_UP, IFF_UP];
    for (field, value) in body.as_chunks_mut().0.iter_mut().zip(fields) {
        *field = value.to_ne_bytes();
    }
    let mut request = Request::new(RTM_NEWLINK, NLM_F_ACK, &body);
    if let Some(mtu) = mtu {
        request.number(IFLA_MTU, mtu);
    }
    request
}

fn address(kind: u16, flags: u16, index: u32, ip: &IpAddr, prefix: u8) -> Request {
    let [a, b, c, d] = index.to_ne_bytes();
    let body: [u8; IFADDRMSG_LEN] = [
        family(ip),
        prefix,
        IFA_F_NODAD,
        RT_SCOPE_UNIVERSE,
        a,
        b,
        c,
        d,
    ];
    let mut request = Request::new(kind, NLM_F_ACK | flags, &body);
    request.address(IFA_LOCAL, ip);
    request.address(IFA_ADDRESS, ip);
    request.number(IFA_FLAGS, u32::from(IFA_F_NODAD));
    request
}

/// Adds an address to interface `index`, usable at once (no duplicate address detection).
pub fn add_address(index: u32, ip: &IpAddr, prefix: u8) -> Request {
    address(RTM_NEWADDR, CREATE_OR_REPLACE, index, ip, prefix)
}

/// Removes an address.
pub fn remove_address(index: u32, ip: &IpAddr, prefix: u8) -> Request {
    address(RTM_DELADDR, 0, index, ip, prefix)
}

/// How the next hop is reached.
#[derive(Clone, Copy, Debug)]
pub enum NextHop {
    /// Through the route to its subnet.
    Routed,
    /// Directly on the interface, without a route to it.
    OnLink,
}

/// Makes `gateway` the default route, replacing an existing one: for IPv6 the kernel would merge the two into
/// one with two next hops (ECMP).
pub fn default_route(index: u32, gateway: &IpAddr, next_hop: NextHop) -> Request {
    let flags = match next_hop {
        NextHop::Routed => 0,
        NextHop::OnLink => RTNH_F_ONLINK,
    };
    let body = rtmsg(family(gateway), 0, RTPROT_BOOT, RT_SCOPE_UNIVERSE, flags);
    let mut request = Request::new(RTM_NEWROUTE, NLM_F_ACK | CREATE_OR_REPLACE, &body);
    request.address(RTA_GATEWAY, gateway);
    request.number(RTA_OIF, index);
    request
}

fn host_route(kind: u16, flags: u16, index: u32, peer: Ipv4Addr) -> Request {
    let body = rtmsg(AF_INET, 32, RTPROT_BOOT, RT_SCOPE_LINK, 0);
    let mut request = Request::new(kind, NLM_F_ACK | flags, &body);
    request.attribute(RTA_DST, &peer.octets());
    request.number(RTA_PRIORITY, LOWEST_PRIORITY_METRIC);
    request.number(RTA_OIF, index);
    request
}

/// Adds a /32 route to a peer on the link. Existing routes stay, and take precedence.
pub fn add_host_route(index: u32, peer: Ipv4Addr) -> Request {
    host_route(RTM_NEWROUTE, CREATE_OR_REPLACE, index, peer)
}

/// Removes that route only.
pub fn remove_host_route(index: u32, peer: Ipv4Addr) -> Request {
    host_route(RTM_DELROUTE, 0, index, peer)
}

/// A unicast route in the main table.
fn rtmsg(family: u8, prefix: u8, protocol: u8, scope: u8, flags: u32) -> [u8; RTMSG_LEN] {
    let [a, b, c, d] = flags.to_ne_bytes();
    [
        family,
        prefix,
        0,
        0,
        RT_TABLE_MAIN,
        protocol,
        scope,
        RTN_UNICAST,
        a,
        b,
        c,
        d,
    ]
}

/// Whether the kernel has a route to `gateway` for an address with this prefix length: they share their first
/// `prefix` bits.
pub fn has_route(ip: &IpAddr, gateway: &IpAddr, prefix: u8) -> bool {
    let (bits, width) = match (ip, gateway) {
        // There is none to a network in 0.0.0.0/8 (fib_add_ifaddr, net/ipv4/fib_frontend.c).
        (IpAddr::V4(a), _) if u32::from(a.octets()[0]) >> (8 - prefix.min(8)) == 0 => return false,
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits() ^ b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits(), 128),
        _ => return false,
    };
    let host_bits = u32::from(width - prefix.min(width));
    bits.checked_shr(host_bits).unwrap_or(0) == 0
}

/// Requests all addresses, of all interfaces and families.
pub fn dump_addresses() -> Request {
    Request::new(RTM_GETADDR, NLM_F_DUMP, &[AF_UNSPEC; IFADDRMSG_LEN])
}

/// Requests all routes.
pub fn dump_routes() -> Request {
    Request::new(RTM_GETROUTE, NLM_F_DUMP, &[AF_UNSPEC; RTMSG_LEN])
}

/// Requests all neighbours.
pub fn dump_neighbours() -> Request {
    Request::new(RTM_GETNEIGH, NLM_F_DUMP, &[AF_UNSPEC; NDMSG_LEN])
}

/// A message from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    kind: u16,
    flags: u16,
    /// What follows the header.
    payload: &'a [u8],
}

/// The content of a message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The result of a request other than a dump, or the error of a refused dump.
    Acknowledgement(Acknowledgement<'a>),
    /// One entry of a dump.
    Entry(Entry<'a>),
    /// A dump has ended, with an errno or 0.
    Done(i32),
    /// Anything else, including entries of other kinds.
    Other,
}

/// The messages in one received datagram, without a truncated one at the end.
pub fn messages(received: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = received;
    core::iter::from_fn(move || {
        let length = u32_at(rest, 0)? as usize;
        let message = Message {
            kind: u16_at(rest, 4)?,
            flags: u16_at(rest, 6)?,
            payload: rest.get(NLMSG_HDRLEN..length)?,
        };
        rest = rest.get(align(length)..).unwrap_or(&[]);
        Some(message)
    })
}

impl<'a> Message<'a> {
    /// Its content.
    pub fn reply(&self) -> Reply<'a> {
        match self.kind {
            NLMSG_ERROR => {
                Acknowledgement::parse(self).map_or(Reply::Other, Reply::Acknowledgement)
            }
            NLMSG_DONE => Reply::Done(errno(self.payload).unwrap_or(0)),
            _ => Entry::parse(self).map_or(Reply::Other, Reply::Entry),
        }
    }

    /// Whether something changed during the dump, so that entries may be missing, and it must be repeated.
    pub fn is_interrupted(&self) -> bool {
        self.flags & NLM_F_DUMP_INTR != 0
    }
}

/// The kernel's acknowledgement of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledgement<'a> {
    /// errno, 0 for success.
    pub errno: i32,
    /// The extended acknowledgement's text; empty if there is none.
    pub text: &'a [u8],
}

impl<'a> Acknowledgement<'a> {
    fn parse(message: &Message<'a>) -> Option<Self> {
        Some(Self {
            errno: errno(message.payload)?,
            text: Self::text(message).unwrap_or(&[]),
        })
    }

    fn text(message: &Message<'a>) -> Option<&'a [u8]> {
        if message.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        // The length of the echoed request.
        let echo = match message.flags & NLM_F_CAPPED {
            0 => align(u32_at(message.payload, NLMSGERR_ERROR)? as usize),
            _ => NLMSG_HDRLEN,
        };
        let attributes = message.payload.get(NLMSGERR_ERROR.saturating_add(echo)..)?;
        Some(before(attribute(attributes, NLMSGERR_ATTR_MSG)?, 0))
    }
}

/// The acknowledgement in a received datagram; `None` if it is something else.
pub fn acknowledgement(received: &[u8]) -> Option<Acknowledgement<'_>> {
    messages(received)
        .filter(|message| message.kind == NLMSG_ERROR)
        .find_map(|message| Acknowledgement::parse(&message))
}

/// An entry of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The interface that it belongs to.
    pub index: u32,
    /// Of an address, itself and its prefix length.
    pub address: Option<(IpAddr, u8)>,
    /// Managed by the kernel itself: addresses of lo, link-local IPv6 addresses that were not added with
    /// [`add_address`], routes that follow from addresses, neighbours that are never resolved.
    pub is_automatic: bool,
    message: Message<'a>,
}

impl<'a> Entry<'a> {
    /// Parses a message of a dump; `None` for an entry of another kind.
    fn parse(message: &Message<'a>) -> Option<Self> {
        let payload = message.payload;
        let (index, address, is_automatic) = match message.kind {
            RTM_NEWADDR => {
                let (body, attributes) = payload.split_at_checked(IFADDRMSG_LEN)?;
                let [family, prefix, flags, ..] = *body else {
                    return None;
                };
                // For an address with a peer, IFA_ADDRESS is the peer's.
                let ip =
                    attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS));
                let ip = ip_address(family, ip?)?;
                let is_automatic = match ip {
                    IpAddr::V4(ip) => ip.is_loopback(),
                    // The kernel looks whether another one has its own (net/ipv6/addrconf.c).
                    IpAddr::V6(ip) if ip.is_unicast_link_local() => flags & IFA_F_NODAD == 0,
                    IpAddr::V6(ip) => ip.is_loopback(),
                };
                (u32_at(body, 4)?, Some((ip, prefix)), is_automatic)
            }
            // A unicast route in the main table, over one interface.
            RTM_NEWROUTE => {
                let (body, attributes) = payload.split_at_checked(RTMSG_LEN)?;
                let [
                    AF_INET | AF_INET6,
                    _,
                    _,
                    _,
                    RT_TABLE_MAIN,
                    protocol,
                    _,
                    RTN_UNICAST,
                    ..,
                ] = *body
                else {
                    return None;
                };
                if u32_at(body, 8)? & RTM_F_CLONED != 0 {
                    return None;
                }
                let index = u32_at(attribute(attributes, RTA_OIF)?, 0)?;
                (index, None, protocol == RTPROT_KERNEL)
            }
            RTM_NEWNEIGH => {
                let body = payload.get(..NDMSG_LEN)?;
                let [AF_INET | AF_INET6, ..] = *body else {
                    return None;
                };
                (u32_at(body, 4)?, None, u16_at(body, 8)? & NUD_NOARP != 0)
            }
            _ => return None,
        };
        Some(Self {
            index,
            address,
            is_automatic,
            message: *message,
        })
    }

    /// The request that deletes it, with all attributes the kernel reported, as `ip route flush` does. An
    /// entry already removed with another one (secondary addresses with their primary one, routes with
    /// their address) fails with EADDRNOTAVAIL, ESRCH or ENOENT. `None`: it is longer than any that the
    /// kernel has.
    pub fn delete(&self) -> Option<Request> {
        let Message { kind, payload, .. } = self.message;
        let fits = payload.len() <= MAX_REQUEST - NLMSG_HDRLEN;
        // RTM_DEL… follows RTM_NEW….
        fits.then(|| Request::new(kind + 1, NLM_F_ACK, payload))
    }
}

/// The data of the first attribute of a type.
fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    loop {
        let length = usize::from(u16_at(rest, 0)?);
        let data = rest.get(NLA_HDRLEN..length)?;
        if u16_at(rest, 2)? & NLA_TYPE_MASK == kind {
            return Some(data);
        }
        rest = rest.get(align(length)..)?;
    }
}

fn ip_address(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// The errno that a payload starts with, negative on the wire.
fn errno(payload: &[u8]) -> Option<i32> {
    Some((u32_at(payload, 0)? as i32).wrapping_neg())
}

/// NLMSG_ALIGN, NLA_ALIGN
fn align(length: usize) -> usize {
    length
        .checked_next_multiple_of(NLMSG_ALIGNTO)
        .unwrap_or(length)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_link_is_brought_up_with_its_mtu() {
        let expected = [
            40, 0, 0, 0, 16, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, // ifinfomsg
            8, 0, 4, 0, 0xdc, 5, 0, 0, // IFLA_MTU 1500
        ];
        assert_eq!(link_up(2, Some(1500)).as_bytes(), expected);
        assert_eq!(link_up(1, None).as_bytes().len(), 32);
    }

    #[test]
    fn a_link_is_requested_by_name_and_returns_its_index() {
        let expected = [
            52, 0, 0, 0, 18, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ifinfomsg
            20, 0, 3, 0, b'e', b't', b'h', b'0', // IFLA_IFNAME
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(get_link("eth0").as_bytes(), expected);
        let longest = get_link("abcdefghijklmnop");
        assert_eq!(longest.as_bytes()[36..], *b"abcdefghijklmno\0");
        let link = message(RTM_NEWLINK, 0, &[0, 0, 1, 0, 7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(link_index(&link), Some(7));
        assert_eq!(link_index(&link[..23]), None);
        assert_eq!(link_index(&reply(19, 0, &[0; 16])), None);
    }

    #[test]
    fn an_ipv4_address_is_local_and_without_duplicate_detection() {
        let expected = [
            48, 0, 0, 0, 20, 0, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            2, 24, 2, 0, 2, 0, 0, 0, // ifaddrmsg
            8, 0, 2, 0, 10, 0, 0, 2, // IFA_LOCAL
            8, 0, 1, 0, 10, 0, 0, 2, // IFA_ADDRESS
            8, 0, 8, 0, 2, 0, 0, 0, // IFA_FLAGS
        ];
        assert_eq!(add_address(2, &ip("10.0.0.2"), 24).as_bytes(), expected);
    }

    #[test]
    fn an_ipv6_address_takes_sixteen_bytes() {
        let request = add_address(3, &ip("fd00::2"), 64);
        let bytes = request.as_bytes();
        assert_eq!(bytes.len(), 16 + 8 + 20 + 20 + 8);
        assert_eq!(bytes[16..24], [10, 64, 2, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[24..28], [20, 0, 2, 0]);
        assert_eq!(
            bytes[28..44],
            [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]
        );
    }

    #[test]
    fn a_default_route_has_a_gateway_an_interface_and_no_destination() {
        let expected = [
            44, 0, 0, 0, 24, 0, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            2, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0, // rtmsg, RTNH_F_ONLINK
            8, 0, 5, 0, 169, 254, 0, 1, // RTA_GATEWAY
            8, 0, 4, 0, 2, 0, 0, 0, // RTA_OIF
        ];
        assert_eq!(
            default_route(2, &ip("169.254.0.1"), NextHop::OnLink).as_bytes(),
            expected
        );
        assert_eq!(
            default_route(2, &ip("10.0.0.1"), NextHop::Routed).as_bytes()[24..28],
            [0; 4]
        );
        // NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE: never NLM_F_APPEND.
        let second = default_route(2, &ip("fd00::1"), NextHop::Routed);
        assert_eq!(second.as_bytes()[6..8], [5, 5]);
    }

    #[test]
    fn a_host_route_is_of_link_scope() {
        let request = add_host_route(2, Ipv4Addr::new(169, 254, 169, 254));
        assert_eq!(
            request.as_bytes()[16..28],
            [2, 32, 0, 0, 254, 3, 253, 1, 0, 0, 0, 0]
        );
        assert_eq!(request.as_bytes()[28..36], [8, 0, 1, 0, 169, 254, 169, 254]);
        // Its metric is its own, so that no other is replaced or removed.
        for request in [request, remove_host_route(2, Ipv4Addr::LOCALHOST)] {
            assert_eq!(request.as_bytes()[36..44], [8, 0, 6, 0, 255, 255, 255, 255]);
        }
    }

    #[test]
    fn the_largest_request_fits() {
        let default = default_route(u32::MAX, &ip("fd00::1"), NextHop::OnLink);
        assert_eq!(default.as_bytes().len(), 16 + 12 + 20 + 8);
        assert!(add_address(1, &ip("fd00::1"), 128).as_bytes().len() <= MAX_REQUEST);
        let mut route = vec![0; MAX_REQUEST - NLMSG_HDRLEN];
        route[..16].copy_from_slice(&[10, 64, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 8, 0, 4, 0]);
        for (more, fits) in [(0, true), (4, false)] {
            route.resize(MAX_REQUEST - NLMSG_HDRLEN + more, 0);
            let received = message(RTM_NEWROUTE, 2, &route);
            let [entry] = &entries(&received)[..] else {
                panic!("no route");
            };
            let deleted = entry.delete();
            assert_eq!(deleted.is_some(), fits);
            assert!(deleted.is_none_or(|request| request.as_bytes().len() == MAX_REQUEST));
        }
    }

    #[test]
    fn subnets_are_compared_bit_by_bit() {
        assert!(has_route(&ip("10.0.0.2"), &ip("10.0.0.1"), 24));
        assert!(!has_route(&ip("10.0.0.2"), &ip("169.254.0.1"), 24));
        assert!(has_route(&ip("10.0.0.2"), &ip("10.0.0.3"), 31));
        assert!(!has_route(&ip("10.0.0.2"), &ip("10.0.0.3"), 32));
        assert!(has_route(&ip("fd00::2"), &ip("fd00::1"), 64));
        assert!(has_route(&ip("fd00::2"), &ip("::"), 0));
        assert!(!has_route(&ip("fd00::2"), &ip("10.0.0.1"), 0));
    }

    #[test]
    fn a_network_whose_first_byte_is_0_has_no_route() {
        for prefix in [0, 4, 5] {
            let [ip, gateway] = [ip("10.0.0.2"), ip("10.0.0.1")];
            assert_eq!(has_route(&ip, &gateway, prefix), prefix == 5, "{prefix}");
        }
        assert!(!has_route(&ip("0.1.0.2"), &ip("0.1.0.1"), 24));
        assert!(has_route(&ip("255.0.0.2"), &ip("128.0.0.1"), 1));
        assert!(has_route(&ip("::2"), &ip("::1"), 64));
    }

    fn reply(errno: i32, flags: u16, tail: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(2u16.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend((-errno).to_ne_bytes());
        bytes.extend(tail);
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    #[test]
    fn the_kernels_text_is_found_after_a_capped_or_a_whole_echo() {
        let attribute = [&[17, 0, 1, 0][..], b"Invalid MTU.\0", &[0, 0, 0]].concat();
        let capped = [&[0u8; 16][..], &attribute].concat();
        let whole = [&28u32.to_ne_bytes()[..], &[0u8; 24], &attribute].concat();
        for (flags, tail) in [(0x300, capped), (0x200, whole)] {
            let text = b"Invalid MTU.";
            assert_eq!(
                acknowledgement(&reply(22, flags, &tail)),
                Some(Acknowledgement { errno: 22, text })
            );
        }
    }

    #[test]
    fn a_truncated_acknowledgement_is_ignored() {
        let errno = |reply: &[u8]| acknowledgement(reply).map(|answer| answer.errno);
        assert_eq!(errno(&reply(0, 0, &[0; 16])), Some(0));
        let whole = reply(17, 0x200, &[28, 0, 0, 0, 9, 9, 9, 9]);
        for end in 0..whole.len() {
            assert!(acknowledgement(&whole[..end]).is_none());
        }
        assert_eq!(errno(&whole), Some(17));
    }

    #[test]
    fn a_dump_request_is_only_a_header() {
        let expected = [
            24, 0, 0, 0, 22, 0, 1, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(dump_addresses().as_bytes(), expected);
        assert_eq!(dump_routes().as_bytes()[..8], [28, 0, 0, 0, 26, 0, 1, 3]);
        assert_eq!(
            dump_neighbours().as_bytes()[..8],
            [28, 0, 0, 0, 30, 0, 1, 3]
        );
    }

    /// A message as a Linux 6.1 kernel sends it: type, flags, payload.
    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([1, 0, 0, 0, 9, 0, 0, 0]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn entries(received: &[u8]) -> Vec<Entry<'_>> {
        let replies = messages(received).map(|message| message.reply());
        replies
            .filter_map(|reply| match reply {
                Reply::Entry(entry) => Some(entry),
                _ => None,
            })
            .collect()
    }

    /// The request that deletes an entry: its type and flags, and what is behind the header.
    fn deleted(entry: &Entry) -> Vec<u8> {
        let request = entry.delete().unwrap();
        let bytes = request.as_bytes();
        assert_eq!(bytes[..4], (bytes.len() as u32).to_ne_bytes());
        assert_eq!(bytes[8..16], [1, 0, 0, 0, 0, 0, 0, 0]);
        [&bytes[4..8], &bytes[16..]].concat()
    }

    #[test]
    fn addresses_of_a_dump_are_found_and_deleted() {
        let v4 = [
            2, 24, 0x80, 0, 2, 0, 0, 0, // ifaddrmsg
            8, 0, 1, 0, 10, 0, 0, 9, // IFA_ADDRESS, the peer
            8, 0, 2, 0, 10, 0, 0, 2, // IFA_LOCAL
            9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0, // IFA_LABEL, padded
            8, 0, 8, 0, 0x80, 0, 0, 0, // IFA_FLAGS
        ];
        let v6 = [
            &[10, 64, 0x80, 253, 2, 0, 0, 0, 20, 0, 1, 0, 0xfe, 0x80][..],
            &[0; 13],
            &[7],
        ]
        .concat();
        let mut added = v6.clone();
        added[2] |= 0x02; // IFA_F_NODAD
        let loopback = [
            2, 8, 0x80, 254, 1, 0, 0, 0, // ifaddrmsg
            8, 0, 1, 0, 127, 0, 0, 1, // IFA_ADDRESS
            8, 0, 2, 0, 127, 0, 0, 1, // IFA_LOCAL
        ];
        let received = [
            message(20, 2, &v4),
            message(20, 2, &v6),
            message(20, 2, &added),
            message(20, 2, &loopback),
            message(3, 2, &[0; 4]),
        ]
        .concat();
        let found = entries(&received);
        let seen: Vec<_> = found
            .iter()
            .map(|entry| (entry.index, entry.address.unwrap(), entry.is_automatic))
            .collect();
        assert_eq!(
            seen,
            [
                (2, (ip("10.0.0.2"), 24), false),
                (2, (ip("fe80::7"), 64), true),
                (2, (ip("fe80::7"), 64), false),
                (1, (ip("127.0.0.1"), 8), true)
            ]
        );
        assert_eq!(deleted(&found[0]), [&[21, 0, 5, 0][..], &v4].concat());
        let last = messages(&received).last().unwrap();
        assert_eq!(
            (last.reply(), last.is_interrupted()),
            (Reply::Done(0), false)
        );
    }

    #[test]
    fn routes_of_a_dump_are_found_and_deleted() {
        let default = [
            2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, // rtmsg
            8, 0, 15, 0, 254, 0, 0, 0, // RTA_TABLE
            8, 0, 5, 0, 10, 0, 0, 1, // RTA_GATEWAY
            8, 0, 4, 0, 2, 0, 0, 0, // RTA_OIF
        ];
        let connected = [
            2, 24, 0, 0, 254, 2, 253, 1, 0, 0, 0, 0, // rtmsg, RTPROT_KERNEL
            8, 0, 1, 0, 10, 0, 0, 0, // RTA_DST
            8, 0, 4, 0, 2, 0, 0, 0, // RTA_OIF
        ];
        let metric = [
            2, 8, 0, 0, 254, 3, 253, 1, 0, 0, 0, 0, // rtmsg
            8, 0, 1, 0, 11, 0, 0, 0, // RTA_DST
            8, 0, 6, 0, 7, 0, 0, 0, // RTA_PRIORITY
            8, 0, 4, 0, 3, 0, 0, 0, // RTA_OIF
        ];
        let mut local = connected;
        local[4] = 255;
        let mut cached = default;
        cached[9] = 2;
        let received: Vec<u8> = [&default[..], &connected, &metric, &local, &cached]
            .iter()
            .flat_map(|payload| message(24, 2, payload))
            .collect();
        let found = entries(&received);
        let seen: Vec<_> = found
            .iter()
            .map(|entry| (entry.index, entry.is_automatic))
            .collect();
        assert_eq!(seen, [(2, false), (2, true), (3, false)]);
        assert_eq!(deleted(&found[0]), [&[25, 0, 5, 0][..], &default].concat());
        assert_eq!(deleted(&found[2]), [&[25, 0, 5, 0][..], &metric].concat());
    }

    #[test]
    fn neighbours_of_a_dump_are_found_and_deleted() {
        let stale = [
            2, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 1, // ndmsg, NUD_STALE
            8, 0, 1, 0, 10, 0, 0, 1, // NDA_DST
            10, 0, 2, 0, 2, 0, 0, 0, 0, 1, 0, 0, // NDA_LLADDR, padded
        ];
        let mut multicast = stale;
        multicast[8] = 0x40;
        let received = [message(28, 2, &stale), message(28, 0x12, &multicast)].concat();
        let found = entries(&received);
        let seen: Vec<_> = found.iter().map(|entry| entry.is_automatic).collect();
        assert_eq!(seen, [false, true]);
        assert_eq!(deleted(&found[0]), [&[29, 0, 5, 0][..], &stale].concat());
        let interrupted: Vec<_> = messages(&received)
            .map(|message| message.is_interrupted())
            .collect();
        assert_eq!(interrupted, [false, true]);
    }

    #[test]
    fn truncated_entries_and_other_families_are_ignored() {
        let bridge = [7, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 1, 8, 0, 1, 0, 10, 0, 0, 1];
        assert_eq!(entries(&message(28, 2, &bridge)), []);
        let short = [10, 64, 0, 0, 2, 0, 0, 0, 8, 0, 1, 0, 10, 0, 0, 1];
        assert_eq!(entries(&message(20, 2, &short)), []);
        let whole = [2, 24, 0, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 2];
        let received = message(20, 2, &whole);
        for end in 0..received.len() {
            assert_eq!(messages(&received[..end]).count(), 0, "{end}");
            let payload = &whole[..end.min(whole.len() - 1)];
            assert_eq!(entries(&message(20, 2, payload)), [], "{end}");
        }
        // Lengths that would not end.
        for length in [0u32, 15, u32::MAX] {
            let bytes = [&length.to_ne_bytes()[..], &[0; 12]].concat();
            assert_eq!(messages(&bytes).count(), 0, "{length}");
        }
        assert_eq!(
            entries(&message(20, 2, &[2, 24, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])),
            []
        );
    }
}
