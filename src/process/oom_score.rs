//! How gladly the OOM killer takes a process (proc_pid_oom_score_adj(5)).

use crate::context;
use crate::error::Result;
use crate::sys::files;
use rustix::fd::OwnedFd;

/// Spares this process and its children to come: what leaves the disks clean.
///
/// PID 1 needs nothing: the kernel never chooses it, and what it starts for others has the usual
/// score. `proc` was opened before anybody could mount something over /proc.
pub fn exempt(proc: &OwnedFd) -> Result {
    files::write_at(proc, c"self/oom_score_adj", b"-1000").map_err(context!("set the OOM score"))
}
