//! File systems that are mounted nowhere yet (fsopen(2), fsmount(2)).

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

/// A file system without a device, whose kind stands for that in the mount table; the options are words
/// with commas between.
pub fn instance(kind: &CStr, options: &[u8], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let context = open(kind, kind)?;
    let mut room = [0; 64];
    for option in split(options, b',').filter(|option| !option.is_empty()) {
        let option = files::join(&[option], &mut room).ok_or(Errno::NAMETOOLONG)?;
        fsconfig_set_flag(&context, option)?;
    }
    mount(&context, attributes)
}

/// The file system on a device, once more where it is mounted already; `device` is a path.
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
