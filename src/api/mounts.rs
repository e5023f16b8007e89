//! `POST /v1/mounts` and `DELETE /v1/mounts`: mounts and unmounts volumes after the boot.
//!
//! A disk may hang, so each call has its own child. The child completes its work even if the client
//! disconnects, so that nothing is left half done. Two simultaneous calls for one mount point can both
//! succeed: the later mount covers the earlier one.

use super::error::CallError;
use crate::error;
use crate::process::helper::HelperLog;
use crate::sys::{self, files};
use crate::volumes::{self, Owner};
use core::ffi::CStr;
use proto::config::Mount;
use proto::http::Status;
use proto::message::ToLossy;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The work of a child.
pub enum Job<'a> {
    /// Mount a volume, and set its owner.
    Mount(Mount<'a>, Owner),
    /// Unmount a path.
    Unmount(&'a CStr),
}

/// In the child: does the work.
pub fn run(job: &Job, log: &HelperLog) -> Result<(), CallError> {
    sys::close_others(&[log.pipe()]);
    match job {
        Job::Mount(volume, owner) => mount(volume, *owner, log),
        Job::Unmount(path) => unmount(path, log),
    }
}

fn mount(volume: &Mount, owner: Owner, log: &HelperLog) -> Result<(), CallError> {
    let (device, target) = (volume.device_path, volume.mount_path);
    log.step(&format_args!("mount on {}", target.lossy()));
    if volumes::is_mount_point(target) {
        let error = error!("mount on {}: something is mounted there", target.lossy());
        return Err(CallError::new(Status::Conflict, error));
    }
    if !device.is_empty() && matches!(files::open(device, OFlags::PATH), Err(Errno::NOENT)) {
        rescan();
    }
    Ok(volumes::mount(volume, owner, log)?)
}

/// Makes the kernel look for hot-plugged devices, of which not every hypervisor notifies it (sysfs-bus-pci,
/// /sys/bus/pci/rescan). Does nothing in a VM without PCI.
fn rescan() {
    let _no_pci = files::open(c"/sys/bus/pci/rescan", OFlags::WRONLY)
        .and_then(|rescan| files::write_whole(&rescan, b"1"));
}

fn unmount(path: &CStr, log: &HelperLog) -> Result<(), CallError> {
    log.step(&format_args!("unmount {}", path.lossy()));
    let unmounted = match volumes::protected(path) {
        Some(_) => Err(Errno::BUSY),
        None => rustix::mount::unmount(path, UnmountFlags::empty()),
    };
    unmounted.map_err(|errno| {
        let status = match errno {
            // EINVAL: not a mount point (umount(2)).
            Errno::INVAL | Errno::NOENT | Errno::NOTDIR => Status::NotFound,
            Errno::BUSY => Status::Conflict,
            _ => Status::InternalServerError,
        };
        CallError::new(status, error::on("unmount", path)(errno))
    })
}
