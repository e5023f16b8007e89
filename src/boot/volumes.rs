//! Extra volumes.

use crate::boot::file_system::{Access, FileSystem};
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::files;
use core::ffi::CStr;
#[cfg(feature = "snapshot")]
use proto::config::PATH;
use proto::config::{Config, Mount};
use proto::message::ToLossy;
use proto::users::Identity;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Mounts them, in a helper: a device may take its time.
pub fn mount_all(config: &Config, user: &Identity, log: &HelperLog) -> Result {
    config
        .mounts
        .iter()
        .try_for_each(|volume| mount(volume, user, log))
}

/// Mounts those where nothing is mounted yet.
#[cfg(feature = "snapshot")]
pub fn mount_new(config: &Config, user: &Identity, log: &HelperLog) -> Result {
    let mut volumes = config.mounts.iter();
    volumes.try_for_each(|volume| match is_mount_point(volume.mount_path) {
        true => Ok(()),
        false => mount(volume, user, log),
    })
}

/// Whether something is mounted there: it is of another file system than the directory above.
#[cfg(feature = "snapshot")]
pub fn is_mount_point(path: &CStr) -> bool {
    let mut room = [0; PATH + 4];
    let above = files::join(&[path.to_bytes(), b"/.."], &mut room);
    match (identify(path), above.and_then(identify)) {
        (Some((device, _)), Some((above, _))) => device != above,
        _ => false,
    }
}

fn mount(volume: &Mount, user: &Identity, log: &HelperLog) -> Result {
    let target = volume.mount_path;
    files::make_directories(target.to_bytes()).map_err(error::on("create", target))?;
    // Links of the root are followed, as everywhere in it, but not onto what the end needs.
    let place = identify(target);
    for &needed in &NEEDED {
        if place.is_some() && place == identify(needed) {
            let (target, needed) = (target.lossy(), needed.lossy());
            return Err(error!("mount on {target}: would hide {needed}"));
        }
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
    match own(target, user) {
        // One that is mounted read-only keeps what it has.
        Ok(()) | Err(Errno::ROFS) => Ok(()),
        other => other.map_err(error::on("change the owner of", target)),
    }
}

/// Makes it the user's, unless it is: the disk is not written to for nothing.
fn own(path: &CStr, user: &Identity) -> Result<(), Errno> {
    let status = rustix::fs::stat(path)?;
    if (status.st_uid, status.st_gid) == (user.uid, user.gid) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::fs::chown(path, Some(uid), Some(gid))
}

/// What no volume may hide.
const NEEDED: [&CStr; 5] = [c"/", c"/dev", c"/sys", c"/proc", c"/run"];

/// What two paths to one directory have in common: its device and its number there.
fn identify(path: &CStr) -> Option<(u64, u64)> {
    let status = rustix::fs::stat(path).ok()?;
    Some((status.st_dev, status.st_ino))
}
