//! Volumes, mounted at boot and by API calls.

pub mod file_system;

use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::files;
use core::ffi::CStr;
use file_system::{Access, FileSystem};
use proto::config::{Config, Mount};
use proto::message::ToLossy;
use rustix::fs::{AtFlags, CWD};
use rustix::fs::{StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Gid, Uid};

/// A user id and a group id.
pub type Owner = (u32, u32);

/// Mounts the volumes of a configuration. Runs in a helper, as a device may be slow.
pub fn mount_all(config: &Config, owner: Owner, log: &HelperLog) -> Result {
    each_parent_first(config, &mut |volume| mount(volume, owner, log))
}

/// Calls `work` with the volumes, those nearer to the root first, as container engines do: one would hide a
/// volume below it that was mounted before.
fn each_parent_first(config: &Config, work: &mut dyn FnMut(&Mount) -> Result) -> Result {
    let mut left = config.mounts.len();
    let mut depth = 0;
    while left > 0 {
        depth += 1;
        for volume in &*config.mounts {
            if volume.depth() == depth {
                work(volume)?;
                left -= 1;
            }
        }
    }
    Ok(())
}

/// Mounts those whose mount points have nothing mounted on them.
#[cfg(feature = "snapshot")]
pub fn mount_new(config: &Config, owner: Owner, log: &HelperLog) -> Result {
    each_parent_first(
        config,
        &mut |volume| match is_mount_point(volume.mount_path) {
            true => Ok(()),
            false => mount(volume, owner, log),
        },
    )
}

/// Whether a path, with links followed, is the root of a mount (statx(2)).
pub fn is_mount_point(path: &CStr) -> bool {
    let found = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Mounts a volume on its mount point, which is created, and changes its owner. Runs in a helper.
pub fn mount(volume: &Mount, owner: Owner, log: &HelperLog) -> Result {
    let target = volume.mount_path;
    files::make_directories(target.to_bytes()).map_err(error::on("create", target))?;
    // Links are followed, but must not lead to a mount that the shutdown needs.
    if let Some(protected) = protected(target) {
        let (target, protected) = (target.lossy(), protected.lossy());
        return Err(error!("mount on {target}: would hide {protected}"));
    }
    let access = match volume.read_only {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    };
    FileSystem {
        device: match volume.device_path.is_empty() {
            true => volume.fs_type,
            false => volume.device_path,
        },
        fs_type: volume.fs_type,
        options: volume.options,
        access,
    }
    .mount(target, log)?;
    match set_owner(target, owner) {
        // A read-only volume keeps its owner.
        Ok(()) | Err(Errno::ROFS) => Ok(()),
        Err(errno) => {
            let error = error::on("change the owner of", target)(errno);
            // So does one that has no owners, such as a vfat.
            if errno != Errno::PERM {
                // So that the call can be repeated.
                let _still_mounted = rustix::mount::unmount(target, UnmountFlags::DETACH);
                return Err(error);
            }
            log.warn(&error);
            Ok(())
        }
    }
}

/// Changes the owner, unless it is right already, to avoid writing to the disk.
fn set_owner(path: &CStr, owner: Owner) -> Result<(), Errno> {
    let status = rustix::fs::stat(path)?;
    if (status.st_uid, status.st_gid) == owner {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
    rustix::fs::chown(path, Some(uid), Some(gid))
}

/// Mount points that volumes must not hide and API calls must not unmount.
const PROTECTED: [&CStr; 5] = [c"/", c"/dev", c"/sys", c"/proc", c"/run"];

/// The protected mount point that a path leads to, if any.
pub fn protected(path: &CStr) -> Option<&'static CStr> {
    if !is_mount_point(path) {
        return None;
    }
    let identify = |path| files::identify(CWD, path, AtFlags::empty());
    let found = identify(path).ok()?;
    let mut protected = PROTECTED.iter().copied();
    protected.find(|protected| identify(protected) == Ok(found))
}
