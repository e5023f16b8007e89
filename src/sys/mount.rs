//! Detached mounts (fsopen(2), fsmount(2)).

use super::files;
use core::ffi::CStr;
use proto::bytes::split;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, Result};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

/// A new instance of a file system without a device, whose type is also the source in the mount table.
/// `options` are comma-separated flags.
pub fn instance(kind: &CStr, options: &[u8], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let context = open(kind, kind)?;
    let mut room = [0; 64];
    for option in split(options, b',').filter(|option| !option.is_empty()) {
        let option = files::join(&[option], &mut room).ok_or(Errno::NAMETOOLONG)?;
        fsconfig_set_flag(&context, option)?;
    }
    mount(&context, attributes)
}

/// Mounts the file system on a device (a path), which may be mounted elsewhere. Returns its root directory.
pub fn on_device(kind: &CStr, device: &CStr) -> Result<OwnedFd> {
    let mounted = mount(&open(kind, device)?, MountAttrFlags::empty())?;
    files::open_at(&mounted, c".", OFlags::DIRECTORY)
}

fn open(kind: &CStr, source: &CStr) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"source", source)?;
    Ok(context)
}

fn mount(context: &OwnedFd, attributes: MountAttrFlags) -> Result<OwnedFd> {
    fsconfig_create(context)?;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
