//! File systems of disks and of memory, mounted at boot and for the host.

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
use rustix::process::{Gid, Uid};

/// A user id and a group id.
pub type Owner = (u32, u32);

/// Mounts the volumes of a configuration, in a helper: a device may take its time.
pub fn mount_all(config: &Config, owner: Owner, log: &HelperLog) -> Result {
    config
        .mounts
        .iter()
        .try_for_each(|volume| mount(volume, owner, log))
}

/// Mounts those where nothing is mounted yet.
#[cfg(feature = "snapshot")]
pub fn mount_new(config: &Config, owner: Owner, log: &HelperLog) -> Result {
    let mut volumes = config.mounts.iter();
    volumes.try_for_each(|volume| match is_mount_point(volume.mount_path) {
        true => Ok(()),
        false => mount(volume, owner, log),
    })
}

/// Whether a path leads to the root of a mount, whatever links it has (statx(2)).
pub fn is_mount_point(path: &CStr) -> bool {
    let found = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Mounts a volume on its mount point, which is made, and gives it that owner. In a helper, too.
pub fn mount(volume: &Mount, owner: Owner, log: &HelperLog) -> Result {
    let target = volume.mount_path;
    files::make_directories(target.to_bytes()).map_err(error::on("create", target))?;
    // Links of the root are followed, as everywhere in it, but not onto what the end needs.
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
        // One that is mounted read-only keeps what it has.
        Ok(()) | Err(Errno::ROFS) => Ok(()),
        other => other.map_err(error::on("change the owner of", target)),
    }
}

/// Gives it that owner, unless it has it: the disk is not written to for nothing.
fn set_owner(path: &CStr, owner: Owner) -> Result<(), Errno> {
    let status = rustix::fs::stat(path)?;
    if (status.st_uid, status.st_gid) == owner {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
    rustix::fs::chown(path, Some(uid), Some(gid))
}

/// What no volume may hide, and nobody unmount: roots of mounts.
const PROTECTED: [&CStr; 5] = [c"/", c"/dev", c"/sys", c"/proc", c"/run"];

/// What of that a path leads to, if anything.
pub fn protected(path: &CStr) -> Option<&'static CStr> {
    if !is_mount_point(path) {
        return None;
    }
    let identify = |path| files::identify(CWD, path, AtFlags::empty());
    let place = identify(path).ok()?;
    let mut protected = PROTECTED.iter().copied();
    protected.find(|protected| identify(protected) == Ok(place))
}
