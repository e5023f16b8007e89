//! Socket options and ioctls of network devices.

use super::syscall::call;
use linux_raw_sys::general::__NR_setsockopt;
use linux_raw_sys::net::SOL_NETLINK;
use linux_raw_sys::netlink::NETLINK_EXT_ACK;
use proto::bytes::copy;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Result;
use rustix::ioctl::{Setter, ioctl};

/// Enables error messages in the acknowledgements of a netlink socket (NETLINK_EXT_ACK, netlink(7)).
pub fn enable_extended_acks(socket: &OwnedFd) -> Result<()> {
    let on = 1u32;
    let arguments = [
        socket.as_raw_fd() as usize,
        SOL_NETLINK as usize,
        NETLINK_EXT_ACK as usize,
        &raw const on as usize,
        size_of_val(&on),
    ];
    // SAFETY: reads an int at `on`.
    unsafe { call(__NR_setsockopt, arguments) }.map(drop)
}

// linux/sockios.h, linux/ethtool.h
const SIOCETHTOOL: u32 = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;

/// struct ethtool_value
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// struct ifreq, whose union is 24 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    data: *mut EthtoolValue,
    unused: [u64; 2],
}

/// Disables a device's transmit checksum offload (ETHTOOL_STXCSUM, linux/ethtool.h).
pub fn disable_tx_checksum(socket: &OwnedFd, interface: &str) -> Result<()> {
    let mut name = [0; 16];
    // The last byte stays NUL.
    copy(interface.as_bytes(), name.split_at_mut(15).0);
    let mut off = EthtoolValue {
        command: ETHTOOL_STXCSUM,
        data: 0,
    };
    let request = InterfaceRequest {
        name,
        data: &raw mut off,
        unused: [0; 2],
    };
    // SAFETY: reads an ifreq, and through its pointer an ethtool_value, which outlives the call.
    unsafe { ioctl(socket, Setter::<SIOCETHTOOL, _>::new(request)) }
}
