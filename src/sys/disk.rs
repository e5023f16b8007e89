//! Block devices, and the file systems on them (linux/fs.h).

use linux_raw_sys::ioctl::{BLKROGET, BLKROSET, FIFREEZE};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, NoArg, Setter, ioctl};

/// Whether a block device takes no writes.
pub fn is_write_protected(device: &OwnedFd) -> Result<bool> {
    // SAFETY: BLKROGET writes an int.
    unsafe { ioctl(device, Getter::<BLKROGET, i32>::new()) }.map(|value| value != 0)
}

/// From now on a block device takes no writes.
pub fn write_protect(device: &OwnedFd) -> Result<()> {
    // SAFETY: BLKROSET reads an int.
    unsafe { ioctl(device, Setter::<BLKROSET, i32>::new(1)) }
}

/// Writes a file system out and stops all writing to it.
pub fn freeze(directory: &OwnedFd) -> Result<()> {
    // SAFETY: the kernel does not look at FIFREEZE's argument.
    match unsafe { ioctl(directory, NoArg::<FIFREEZE>::new()) } {
        // Frozen already, by way of another mount of the same file system.
        Err(Errno::BUSY) => Ok(()),
        other => other,
    }
}
