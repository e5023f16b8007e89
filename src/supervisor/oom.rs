//! Detects in the kernel's log whether the OOM killer killed a process.

use crate::context::TEMP_BUFFER;
use crate::sys::files;
use proto::kmsg;
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Most records read: more than the log holds, unless a process keeps writing.
const RECORDS: usize = 1 << 16;

/// Whether the unread part of the kernel log says that `pid` was OOM-killed.
pub fn was_oom_killed(log: &OwnedFd, pid: u32, record: &mut [u8; TEMP_BUFFER]) -> bool {
    // CONSOLE_EXT_LOG_MAX, kernel/printk
    const _: () = assert!(TEMP_BUFFER >= 8192);
    for _ in 0..RECORDS {
        match files::read(log, &mut *record) {
            Ok(0) => return false,
            Ok(count) => {
                if kmsg::killed_by_oom(record.get(..count).unwrap_or(&[]), pid) {
                    return true;
                }
            }
            // EPIPE: records were overwritten; the next read continues after them.
            Err(Errno::PIPE) => {}
            Err(_) => return false,
        }
    }
    false
}
