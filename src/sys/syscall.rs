//! The system call itself.

use super::arch;
use rustix::fd::{FromRawFd, OwnedFd};
use rustix::io::{Errno, Result};

/// One system call; its value, or the errno that it failed with.
///
/// # Safety
/// The arguments must be what call `number` takes; pointers among them must be good for it.
pub unsafe fn call(number: u32, arguments: [usize; 5]) -> Result<u32> {
    // SAFETY: as promised by the caller.
    match unsafe { arch::syscall(number, arguments) } as i32 {
        errno @ ..0 => Err(Errno::from_raw_os_error(errno.wrapping_neg())),
        value => Ok(value as u32),
    }
}

/// One system call whose value is a new descriptor.
///
/// # Safety
/// As for [`call`], and `number` must be a call that opens a descriptor.
pub unsafe fn call_for_fd(number: u32, arguments: [usize; 5]) -> Result<OwnedFd> {
    // SAFETY: as promised by the caller; nobody else knows the new descriptor.
    unsafe { call(number, arguments).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}
