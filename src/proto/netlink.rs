//! rtnetlink requests and their acknowledgements (rtnetlink(7), netlink(7)): bytes only.

use crate::bytes::split;
use core::net::{IpAddr, Ipv4Addr};

// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_TYPE_MASK: u16 = 0x3fff;

// include/uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTNH_F_ONLINK: u32 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

// include/uapi/linux/if_link.h, if_addr.h, if.h, include/linux/socket.h
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFF_UP: u32 = 0x1;
const AF_UNSPEC: u32 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// struct nlmsghdr: length, type, flags, sequence number, port id.
const HEADER: usize = 16;
/// The largest request, a route between IPv6 addresses with a gateway, takes 84 bytes.
const REQUEST: usize = 96;

/// One request with its acknowledgement asked for.
#[derive(Debug)]
pub struct Request {
    bytes: heapless::Vec<u8, REQUEST>,
}

impl Request {
    fn new(kind: u16, flags: u16) -> Self {
        let mut request = Self {
            bytes: heapless::Vec::new(),
        };
        request
            .put(0)
            .put(pair(kind, NLM_F_REQUEST | NLM_F_ACK | flags))
            .put(1)
            .put(0);
        request
    }

    /// Adds four bytes; the length, which comes first, follows.
    fn put(&mut self, word: u32) -> &mut Self {
        let fits = self.bytes.extend_from_slice(&word.to_ne_bytes());
        debug_assert!(fits.is_ok());
        let length = self.bytes.len() as u32;
        if let Some(field) = self.bytes.first_chunk_mut::<4>() {
            *field = length.to_ne_bytes();
        }
        self
    }

    /// struct rtattr: length, type, data of four bytes.
    fn number(&mut self, kind: u16, number: u32) -> &mut Self {
        self.put(pair(8, kind)).put(number)
    }

    /// An attribute that is an address.
    fn address(&mut self, kind: u16, ip: &IpAddr) -> &mut Self {
        match ip {
            IpAddr::V4(ip) => self.number(kind, u32::from_ne_bytes(ip.octets())),
            IpAddr::V6(ip) => {
                self.put(pair(20, kind));
                for word in ip.octets().as_chunks().0 {
                    self.put(u32::from_ne_bytes(*word));
                }
                self
            }
        }
    }

    /// The message to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Two fields of two bytes as one of four.
fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// The two fields.
fn halves(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_ne_bytes();
    (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]))
}

fn family(ip: &IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// Brings interface `index` up, and sets its MTU where one is given.
pub fn link_up(index: u32, mtu: Option<u32>) -> Request {
    let mut request = Request::new(RTM_NEWLINK, 0);
    // struct ifinfomsg: family, padding, type (2), index (4), flags (4), change mask (4)
    request.put(AF_UNSPEC).put(index).put(IFF_UP).put(IFF_UP);
    if let Some(mtu) = mtu {
        request.number(IFLA_MTU, mtu);
    }
    request
}

fn address(kind: u16, flags: u16, index: u32, ip: &IpAddr, prefix: u8) -> Request {
    let mut request = Request::new(kind, flags);
    // struct ifaddrmsg: family, prefix length, flags, scope, index (4)
    request
        .put(u32::from_ne_bytes([
            family(ip),
            prefix,
            IFA_F_NODAD as u8,
            RT_SCOPE_UNIVERSE,
        ]))
        .put(index)
        .address(IFA_LOCAL, ip)
        .address(IFA_ADDRESS, ip)
        .number(IFA_FLAGS, IFA_F_NODAD);
    request
}

/// Gives interface `index` an address, usable at once (no duplicate address detection).
pub fn add_address(index: u32, ip: &IpAddr, prefix: u8) -> Request {
    address(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, ip, prefix)
}

/// Takes the address away.
pub fn remove_address(index: u32, ip: &IpAddr, prefix: u8) -> Request {
    address(RTM_DELADDR, 0, index, ip, prefix)
}

/// A default route through `gateway`; `on_link`: reach it without a route to it.
///
/// A second one is tried after the first, not before it.
pub fn default_route(index: u32, gateway: &IpAddr, on_link: bool) -> Request {
    let flags = if on_link { RTNH_F_ONLINK } else { 0 };
    let mut request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND);
    rtmsg(&mut request, family(gateway), 0, RT_SCOPE_UNIVERSE, flags)
        .address(RTA_GATEWAY, gateway)
        .number(RTA_OIF, index);
    request
}

fn host_route(kind: u16, flags: u16, index: u32, peer: Ipv4Addr) -> Request {
    let mut request = Request::new(kind, flags);
    rtmsg(&mut request, AF_INET, 32, RT_SCOPE_LINK, 0)
        .number(RTA_DST, u32::from_ne_bytes(peer.octets()))
        .number(RTA_OIF, index);
    request
}

/// A /32 route to a peer on the link.
pub fn add_host_route(index: u32, peer: Ipv4Addr) -> Request {
    host_route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, index, peer)
}

/// Takes the route away.
pub fn remove_host_route(index: u32, peer: Ipv4Addr) -> Request {
    host_route(RTM_DELROUTE, 0, index, peer)
}

/// struct rtmsg: family, destination and source prefix lengths, tos, table, protocol, scope, type,
/// flags (4)
fn rtmsg(request: &mut Request, family: u8, prefix: u8, scope: u8, flags: u32) -> &mut Request {
    request
        .put(u32::from_ne_bytes([family, prefix, 0, 0]))
        .put(u32::from_ne_bytes([
            RT_TABLE_MAIN,
            RTPROT_BOOT,
            scope,
            RTN_UNICAST,
        ]))
        .put(flags)
}

/// Whether `ip` and `other` share their first `prefix` bits.
pub fn same_subnet(ip: &IpAddr, other: &IpAddr, prefix: u8) -> bool {
    let (bits, width) = match (ip, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits() ^ b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits(), 128),
        _ => return false,
    };
    let host_bits = u32::from(width - prefix.min(width));
    bits.checked_shr(host_bits).unwrap_or(0) == 0
}

/// The kernel's answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Acknowledgement<'a> {
    /// errno, 0 for success.
    pub errno: i32,
    /// The extended acknowledgement's text, empty when the kernel gave none.
    pub words: &'a [u8],
}

/// Reads the acknowledgement of a request; `None` when it is something else.
pub fn acknowledgement(reply: &[u8]) -> Option<Acknowledgement<'_>> {
    let reply = reply.get(..word(reply, 0)? as usize)?;
    let (kind, flags) = halves(word(reply, 4)?);
    if kind != NLMSG_ERROR {
        return None;
    }
    // struct nlmsgerr: negative errno (4), the request's header, and its payload unless capped
    let errno = (word(reply, HEADER)? as i32).wrapping_neg();
    let mut words = &[][..];
    if flags & NLM_F_ACK_TLVS != 0 {
        let mut at = HEADER + 4;
        at += match flags & NLM_F_CAPPED {
            0 => align(word(reply, at)? as usize),
            _ => HEADER,
        };
        while let Some(attribute) = word(reply, at) {
            let (length, kind) = halves(attribute);
            let next = at + align(usize::from(length).max(4));
            if kind & NLA_TYPE_MASK == NLMSGERR_ATTR_MSG {
                words = split(reply.get(at + 4..next).unwrap_or(&[]), 0).next()?;
            }
            at = next;
        }
    }
    Some(Acknowledgement { errno, words })
}

/// NLMSG_ALIGN, NLA_ALIGN
fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}

/// The four bytes at an offset.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
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
            44, 0, 0, 0, 24, 0, 5, 0x0c, 1, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
            2, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0, // rtmsg, RTNH_F_ONLINK
            8, 0, 5, 0, 169, 254, 0, 1, // RTA_GATEWAY
            8, 0, 4, 0, 2, 0, 0, 0, // RTA_OIF
        ];
        assert_eq!(
            default_route(2, &ip("169.254.0.1"), true).as_bytes(),
            expected
        );
        assert_eq!(
            default_route(2, &ip("10.0.0.1"), false).as_bytes()[24..28],
            [0; 4]
        );
    }

    #[test]
    fn a_host_route_is_of_link_scope() {
        let request = add_host_route(2, Ipv4Addr::new(169, 254, 169, 254));
        assert_eq!(
            request.as_bytes()[16..28],
            [2, 32, 0, 0, 254, 3, 253, 1, 0, 0, 0, 0]
        );
        assert_eq!(request.as_bytes()[28..36], [8, 0, 1, 0, 169, 254, 169, 254]);
    }

    #[test]
    fn the_largest_request_fits() {
        let default = default_route(u32::MAX, &ip("fd00::1"), true);
        assert_eq!(default.as_bytes().len(), 16 + 12 + 20 + 8);
        assert!(add_address(1, &ip("fd00::1"), 128).as_bytes().len() <= REQUEST);
    }

    #[test]
    fn subnets_are_compared_bit_by_bit() {
        assert!(same_subnet(&ip("10.0.0.2"), &ip("10.0.0.1"), 24));
        assert!(!same_subnet(&ip("10.0.0.2"), &ip("169.254.0.1"), 24));
        assert!(same_subnet(&ip("10.0.0.2"), &ip("10.0.0.3"), 31));
        assert!(!same_subnet(&ip("10.0.0.2"), &ip("10.0.0.3"), 32));
        assert!(same_subnet(&ip("10.0.0.2"), &ip("1.2.3.4"), 0));
        assert!(same_subnet(&ip("fd00::2"), &ip("fd00::1"), 64));
        assert!(same_subnet(&ip("fd00::2"), &ip("::"), 0));
        assert!(!same_subnet(&ip("fd00::2"), &ip("10.0.0.1"), 0));
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
    fn the_kernels_words_are_found_behind_a_capped_and_a_whole_echo() {
        let attribute = [&[17, 0, 1, 0][..], b"Invalid MTU.\0", &[0, 0, 0]].concat();
        let capped = [&[0u8; 16][..], &attribute].concat();
        let whole = [&28u32.to_ne_bytes()[..], &[0u8; 24], &attribute].concat();
        for (flags, tail) in [(0x300, capped), (0x200, whole)] {
            let words = b"Invalid MTU.";
            assert_eq!(
                acknowledgement(&reply(22, flags, &tail)),
                Some(Acknowledgement { errno: 22, words })
            );
        }
    }

    #[test]
    fn an_acknowledgement_is_success_and_a_torn_one_is_none() {
        let errno = |reply: &[u8]| acknowledgement(reply).map(|answer| answer.errno);
        assert_eq!(errno(&reply(0, 0, &[0; 16])), Some(0));
        let whole = reply(17, 0x200, &[28, 0, 0, 0, 9, 9, 9, 9]);
        for end in 0..whole.len() {
            assert!(acknowledgement(&whole[..end]).is_none());
        }
        assert_eq!(errno(&whole), Some(17));
    }
}
