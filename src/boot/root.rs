//! Mounts the root file system, and switches from the initramfs to it.

#[cfg(feature = "overlay")]
use crate::boot::overlay;
use crate::boot::{mounts, run_dir};
use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::{c_str, files};
use crate::volumes::file_system::{Access, FileSystem};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use proto::config::{Config, Overlay};
use proto::message::ToLossy;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, FileType, OFlags, RawDir};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

/// Where the root is mounted first.
const NEW_ROOT: &CStr = c"/newroot";

/// In a helper: mounts the root, and accesses everything that PID 1 will access: if the disk hangs, it hangs
/// this child, and PID 1 later finds everything in memory.
pub fn mount(config: &Config, scratch: &mut [u8], log: &HelperLog) -> Result {
    files::require_directory(NEW_ROOT, 0o755)?;
    let mut root = FileSystem::on(config.root_device());
    match config.root_overlay() {
        Some(layer) => mount_overlay(root, layer, log)?,
        None => {
            if config.root_read_only {
                root.access = Access::ReadOnly;
            }
            root.mount(NEW_ROOT, log)?;
        }
    }
    let run = files::open(c"/run", OFlags::DIRECTORY).map_err(context!("open /run"))?;
    rustix::process::chroot(NEW_ROOT).map_err(context!("enter /newroot"))?;
    run_dir::copy(c"/run", run, scratch, log);
    for &tree in &mounts::TREES {
        files::make_directory(tree, 0o755).map_err(|errno| match errno {
            Errno::ROFS => error!("the root is read-only and has no {}", tree.lossy()),
            errno => error::on("create", tree)(errno),
        })?;
    }
    if let Err(error) = files::require_directory(c"/root", 0o700) {
        log.warn(&error);
    }
    Ok(())
}

#[cfg(feature = "overlay")]
fn mount_overlay(root: FileSystem, layer: Overlay, log: &HelperLog) -> Result {
    overlay::mount(root, layer, NEW_ROOT, log)
}

#[cfg(not(feature = "overlay"))]
fn mount_overlay(_: FileSystem, _: Overlay, _: &HelperLog) -> Result {
    Err(error!(
        "RootOverlay: this program was built without overlays"
    ))
}

/// Moves the kernel's file systems onto the root and makes it `/`. Returns the initramfs's root directory.
pub fn switch() -> Result<OwnedFd> {
    let old = files::open(c"/", OFlags::DIRECTORY).map_err(context!("open /"))?;
    rustix::process::chdir(NEW_ROOT).map_err(context!("enter /newroot"))?;
    for &tree in &mounts::TREES {
        // Relative to the working directory. Links are not followed: one could lead out of the new root.
        let below = tree.to_bytes_with_nul().get(1..).unwrap_or_default();
        move_mount(CWD, tree, CWD, c_str(below), MoveMountFlags::empty())
            .map_err(context!("move {} onto the root", tree.lossy()))?;
    }
    rustix::mount::mount_move(c".", c"/").map_err(context!("move the root onto /"))?;
    rustix::process::chroot(c".")
        .and_then(|()| rustix::process::chdir(c"/"))
        .map_err(context!("enter the root"))?;
    Ok(old)
}

// linux/magic.h
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Deletes everything in the initramfs, which takes up memory and may hold secrets.
///
/// Only if the old root is a ramfs or tmpfs (otherwise EXDEV), and never across a mount.
pub fn empty(old: OwnedFd) -> Result<(), Errno> {
    let kind = rustix::fs::fstatfs(&old)?.f_type as u64;
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Err(Errno::XDEV);
    }
    // Without recursion: descends to a directory without non-empty directories, empties it, and starts again
    // from the top.
    while let Some(mut here) = delete_entries(&open_directory(&old, c".")?, true)? {
        while let Some(inner) = delete_entries(&here, false)? {
            here = inner;
        }
    }
    Ok(())
}

/// Deletes a directory's entries up to the first directory that is not empty. Returns that one, if any.
fn delete_entries(directory: &OwnedFd, is_root: bool) -> Result<Option<OwnedFd>, Errno> {
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = match entry.file_type() {
            FileType::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        match rustix::fs::unlinkat(directory, name, flags) {
            Ok(()) => {}
            // A mount point (rmdir(2)): the new root, or another mount.
            Err(Errno::BUSY) if is_root => {}
            Err(Errno::NOTEMPTY) => return open_directory(directory, name).map(Some),
            Err(errno) => return Err(errno),
        }
    }
    Ok(None)
}

fn open_directory(directory: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    files::open_at(directory, name, OFlags::DIRECTORY | OFlags::NOFOLLOW)
}
