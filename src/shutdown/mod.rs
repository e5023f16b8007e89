//! The shutdown: what is left is killed, every file system is left clean, and the machine restarts.
//!
//! What may block on a disk is done by a helper; [`last_resort`] is for when there is no helper, or no
//! PID 1 to rely on.

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

/// Kills what is left, after SIGKILL was sent to all, in a helper.
pub fn kill_remaining() -> Result<Helper> {
    start(&mut || {
        Helper::start(&mut |_| {
            processes::kill_remaining();
            Ok(())
        })
    })
}

/// Leaves all file systems clean, in a helper: a disk may take its time.
pub fn quiesce() -> Result<Helper> {
    start(&mut || Helper::start(&mut file_systems::quiesce))
}

/// Starts a helper without limits of its own; where something keeps PID 1 from forking, that is taken
/// away.
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
