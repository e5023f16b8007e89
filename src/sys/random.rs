//! The kernel's random numbers (random(4)).

use super::files;
use linux_raw_sys::ioctl::{RNDADDENTROPY, RNDRESEEDCRNG};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, Result};
use rustix::ioctl::{NoArg, Setter, ioctl};

/// Bytes given to the kernel at once: what decodes from base64 three at a time fits.
pub const PIECE: usize = 48;

/// struct rand_pool_info (linux/random.h)
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; PIECE],
}

/// Opens the device.
pub fn open() -> Result<OwnedFd> {
    files::open(c"/dev/urandom", OFlags::WRONLY)
}

/// Adds the first `length` bytes, which nobody else can know: 8 bits each.
///
/// Before Linux 5.18 nothing is made new with fewer than 128 bits of them.
pub fn add(device: &OwnedFd, bytes: [u8; PIECE], length: usize) -> Result<()> {
    let length = length.min(PIECE) as i32;
    let info = PoolInfo {
        entropy_count: length * 8,
        buf_size: length,
        buf: bytes,
    };
    // SAFETY: reads a rand_pool_info, whose buffer has at least the bytes it says.
    unsafe { ioctl(device, Setter::<RNDADDENTROPY, _>::new(info)) }
}

/// From now on all random numbers come from what was added.
pub fn reseed(device: &OwnedFd) -> Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    match unsafe { ioctl(device, NoArg::<RNDRESEEDCRNG>::new()) } {
        // There are none yet: the first ones come from it.
        Err(Errno::NODATA) => Ok(()),
        other => other,
    }
}
