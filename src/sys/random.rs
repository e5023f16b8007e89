//! The kernel's random numbers (random(4)).

use super::files;
use linux_raw_sys::ioctl::{RNDADDENTROPY, RNDRESEEDCRNG};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, Result};
use rustix::ioctl::{NoArg, Setter, ioctl};

/// Bytes added at once: a multiple of three, as base64 decodes to three bytes at a time.
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

/// Adds the first `length` bytes, credited with 8 bits each, as no one else knows them.
///
/// Before Linux 5.18, fewer than 128 bits do not cause a reseed.
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

/// Reseeds the random number generator from the entropy pool.
pub fn reseed(device: &OwnedFd) -> Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    match unsafe { ioctl(device, NoArg::<RNDRESEEDCRNG>::new()) } {
        // The generator is not seeded yet: its first seed will include what was added.
        Err(Errno::NODATA) => Ok(()),
        other => other,
    }
}
