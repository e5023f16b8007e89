//! How gladly the OOM killer takes a process (proc_pid_oom_score_adj(5)).

use crate::context;
use crate::error::Result;
use crate::sys::files;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};

/// Never: for PID 1's helpers, which leave the disks clean.
pub const NEVER: &[u8] = b"-1000";
/// As the kernel has it: for the workload and commands.
pub const DEFAULT: &[u8] = b"0";

/// Sets it for this process and its children to come.
///
/// By a descriptor of /proc that was opened before anybody could mount something over it.
pub fn set(proc: &OwnedFd, score: &[u8]) -> Result {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(proc, c"self/oom_score_adj", flags, Mode::empty())
        .and_then(|file| files::write(&file, score))
        .map(drop)
        .map_err(context!("set the OOM score"))
}
