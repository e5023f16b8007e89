//! `POST /v1/mounts` and `DELETE /v1/mounts`: volumes that come and go after the boot.
//!
//! A disk may hang, so a child does it. Each call has one of its own: one that hangs costs no other.
//! It ends its work also when its client goes, so that nothing is left half done. Of two calls at once
//! for one mount point both can come through: the later one lies on top.

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

/// What a child is to do.
pub enum Job<'a> {
    /// Mount this, and give it that owner.
    Mount(Mount<'a>, Owner),
    /// Unmount what is mounted there.
    Unmount(&'a CStr),
}

/// In the child: does it.
pub fn run(job: &Job, log: &HelperLog) -> Result<(), CallError> {
    sys::close_others(&[log.pipe()]);
    match job {
        Job::Mount(volume, owner) => mount(volume, *owner, log),
        Job::Unmount(path) => unmount(path, log),
    }
}

fn mount(volume: &Mount, owner: Owner, log: &HelperLog) -> Result<(), CallError> {
    let (device, place) = (volume.device_path, volume.mount_path);
    log.step(&format_args!("mount on {}", place.lossy()));
    if volumes::is_mount_point(place) {
        let error = error!("mount on {}: something is mounted there", place.lossy());
        return Err(CallError::new(Status::Conflict, error));
    }
    if !device.is_empty() && matches!(files::open(device, OFlags::PATH), Err(Errno::NOENT)) {
        rescan();
    }
    Ok(volumes::mount(volume, owner, log)?)
}

/// Has the kernel look for devices that came after the boot: not every hypervisor tells it of them
/// (sysfs-bus-pci, /sys/bus/pci/rescan). A VM without PCI has none to look for.
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
            // It is no mount point (umount(2)).
            Errno::INVAL | Errno::NOENT | Errno::NOTDIR => Status::NotFound,
            Errno::BUSY => Status::Conflict,
            _ => Status::InternalServerError,
        };
        CallError::new(status, error::on("unmount", path)(errno))
    })
}
