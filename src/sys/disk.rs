//! Block devices, and the file systems on them (linux/fs.h).

use super::syscall::call;
use core::ffi::CStr;
use linux_raw_sys::general::__NR_swapoff;
use linux_raw_sys::ioctl::{BLKROGET, BLKROSET, FIFREEZE};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, NoArg, Setter, ioctl};

/// Whether a block device is write-protected.
pub fn is_write_protected(device: &OwnedFd) -> Result<bool> {
    // SAFETY: BLKROGET writes an int.
    unsafe { ioctl(device, Getter::<BLKROGET, i32>::new()) }.map(|value| value != 0)
}

/// Write-protects a block device.
pub fn write_protect(device: &OwnedFd) -> Result<()> {
    // SAFETY: BLKROSET reads an int.
    unsafe { ioctl(device, Setter::<BLKROSET, i32>::new(1)) }
}

/// Syncs a file system and blocks all writes to it.
pub fn freeze(directory: &OwnedFd) -> Result<()> {
    // SAFETY: the kernel does not look at FIFREEZE's argument.
    match unsafe { ioctl(directory, NoArg::<FIFREEZE>::new()) } {
        // Frozen already, through another mount of the same file system.
        Err(Errno::BUSY) => Ok(()),
        other => other,
    }
}

// linux/loop.h
const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_GET_STATUS64: u32 = 0x4c05;

/// The backing device of a loop device: that of its file, or the device it is bound to
/// (struct loop_info64: lo_device, lo_inode, lo_rdevice, …).
pub fn loop_backing(device: &OwnedFd) -> Result<u64> {
    // SAFETY: LOOP_GET_STATUS64 writes a struct loop_info64, which is 29 words.
    let info = unsafe { ioctl(device, Getter::<LOOP_GET_STATUS64, [u64; 29]>::new()) }?;
    let [of_file, _, of_device, ..] = info;
    Ok(if of_device == 0 { of_file } else { of_device })
}

/// Detaches a loop device, once it is no longer open.
pub fn detach_loop(device: &OwnedFd) -> Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    unsafe { ioctl(device, NoArg::<LOOP_CLR_FD>::new()) }
}

/// Stops swapping to a file or device (swapoff(2)).
pub fn swap_off(path: &CStr) -> Result<()> {
    // SAFETY: reads a path that ends with NUL.
    unsafe { call(__NR_swapoff, [path.as_ptr() as usize, 0, 0, 0, 0]) }.map(drop)
}
