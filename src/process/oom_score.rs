//! OOM killer adjustment (proc_pid_oom_score_adj(5)).

use crate::context;
use crate::error::Result;
use crate::sys::files;
use rustix::fd::OwnedFd;

/// Exempts this process and its future children from the OOM killer, so that the disks can be left clean.
///
/// PID 1 needs no exemption, as the kernel never kills it, and commands keep the default score. `proc` was
/// opened before anything could be mounted over /proc.
pub fn exempt(proc: &OwnedFd) -> Result {
    files::write_at(proc, c"self/oom_score_adj", b"-1000").map_err(context!("set the OOM score"))
}
