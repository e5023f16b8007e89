//! Sockets between the VM and its host (vsock(7)).

use super::files;
use linux_raw_sys::ioctl::IOCTL_VM_SOCKETS_GET_LOCAL_CID;
use linux_raw_sys::vm_sockets::{VMADDR_CID_HOST, sockaddr_vm};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, ioctl};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};

/// The host's CID.
pub const HOST: u32 = VMADDR_CID_HOST;
/// VMADDR_CID_ANY
const ANY: u32 = u32::MAX;

/// A vsock address.
struct Address {
    cid: u32,
    port: u32,
}

// SAFETY: the closure gets a sockaddr_vm that outlives its call, and its size.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let address = sockaddr_vm {
            svm_family: AddressFamily::VSOCK.as_raw(),
            svm_reserved1: 0,
            svm_port: self.port,
            svm_cid: self.cid,
            svm_flags: 0,
            svm_zero: [0; _],
        };
        call((&raw const address).cast(), size_of_val(&address) as u32)
    }
}

/// The CID of an address.
fn cid(address: &SocketAddrAny) -> Option<u32> {
    let has_cid = address.address_family() == AddressFamily::VSOCK
        && address.addr_len() as usize >= core::mem::offset_of!(sockaddr_vm, svm_flags);
    // SAFETY: the address is of this family, and initialised up to and including its CID.
    has_cid.then(|| unsafe { (*address.as_ptr().cast::<sockaddr_vm>()).svm_cid })
}

/// Whether there is a vsock device: without one, sockets can be created but not connected.
fn has_device() -> Result<bool> {
    let device = files::open(c"/dev/vsock", OFlags::RDONLY)?;
    // SAFETY: the call writes an unsigned int.
    let cid = unsafe { ioctl(device, Getter::<IOCTL_VM_SOCKETS_GET_LOCAL_CID, u32>::new()) }?;
    Ok(cid != ANY)
}

/// A socket that listens on `port` of every CID of this VM.
pub fn listen(port: u32, backlog: usize) -> Result<OwnedFd> {
    if !has_device()? {
        return Err(Errno::NODEV);
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &Address { cid: ANY, port })?;
    rustix::net::listen(&socket, backlog as i32)?;
    Ok(socket)
}

/// Starts connecting to a port of the host. The socket is writable once it is connected or has failed
/// (connect(2), EINPROGRESS).
pub fn connect(port: u32) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &Address { cid: HOST, port }) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// Whether a connection can be [accepted](accept).
pub fn has_pending(socket: &OwnedFd) -> bool {
    super::is_readable(socket, 0).unwrap_or(false)
}

/// Accepts a connection. Returns it with its peer's CID. Call only if one is pending: otherwise accept4 sleeps
/// until the next tick, even on a non-blocking socket (vsock_accept, net/vmw_vsock/af_vsock.c).
pub fn accept(socket: &OwnedFd) -> Result<(OwnedFd, u32)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (connection, peer) = rustix::net::acceptfrom_with(socket, flags)?;
    Ok((connection, peer.as_ref().and_then(cid).unwrap_or(ANY)))
}
