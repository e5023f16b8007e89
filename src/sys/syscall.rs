//! Raw system calls.

use super::arch;
use rustix::fd::{FromRawFd, OwnedFd};
use rustix::io::{Errno, Result};

/// Makes a system call. Returns its value, or the errno on failure.
///
/// # Safety
/// The arguments must be valid for call `number`; so must the pointers among them.
pub unsafe fn call(number: u32, arguments: [usize; 5]) -> Result<u32> {
    // SAFETY: as promised by the caller.
    match unsafe { arch::syscall(number, arguments) } as i32 {
        errno @ ..0 => Err(Errno::from_raw_os_error(errno.wrapping_neg())),
        value => Ok(value as u32),
    }
}

/// Makes a system call that returns a new descriptor.
///
/// # Safety
/// As for [`call`], and `number` must be a call that opens a descriptor.
pub unsafe fn call_for_fd(number: u32, arguments: [usize; 5]) -> Result<OwnedFd> {
    // SAFETY: as promised by the caller; nothing else owns the new descriptor.
    unsafe { call(number, arguments).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}
