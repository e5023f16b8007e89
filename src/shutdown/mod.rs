//! The shutdown: kills remaining processes, leaves every file system clean, and restarts the machine.
//!
//! Helpers do what may block on a disk; [`last_resort`] is for when there can be no helper, or PID 1 has
//! panicked.

pub mod budget;
mod detached_fs;
mod file_systems;
pub mod last_resort;
mod processes;
mod volume;

use crate::error::Result;
use crate::process::helper::Helper;
use crate::sys;
use rustix::system::RebootCommand;

/// Starts a helper that kills the processes that survived SIGKILL to all.
pub fn kill_remaining() -> Result<Helper> {
    start(&mut || {
        Helper::start(&mut |_| {
            processes::kill_remaining();
            Ok(())
        })
    })
}

/// Starts a helper that leaves all file systems clean: disks may be slow.
pub fn quiesce() -> Result<Helper> {
    start(&mut || Helper::start(&mut file_systems::quiesce))
}

/// Starts a helper without resource limits. If the fork fails, removes what may limit forks and retries.
fn start(helper: &mut dyn FnMut() -> Result<Helper>) -> Result<Helper> {
    processes::lift_resource_limits();
    helper().or_else(|_| {
        processes::allow_forks();
        helper()
    })
}

/// Restarts the machine, which ends a Firecracker VM. Does not return.
pub fn reboot() -> ! {
    let _refused = rustix::system::reboot(RebootCommand::Restart);
    let _refused = rustix::system::reboot(RebootCommand::PowerOff);
    loop {
        sys::sleep(i64::from(u16::MAX));
    }
}
