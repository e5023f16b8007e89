//! The root file system: mounting it, and leaving the initramfs for it.

use crate::boot::mounts;
use crate::context;
use crate::error;
use crate::error::{Log, Result};
use crate::process::exec;
use crate::process::helper::HelperLog;
use crate::sys::files;
use crate::sys::{self, Stopwatch};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use proto::message::ToLossy;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, move_mount};

/// Where the root is mounted before it becomes the root.
const NEW: &CStr = c"/newroot";
/// How long a device may take to appear, in milliseconds.
const DEVICE_WAIT: u64 = 2000;

/// Mounts an ext4 volume, when its device has appeared; read-only where the device is.
pub fn mount_volume(device: &CStr, target: &CStr, report: &HelperLog) -> Result {
    let watch = Stopwatch::start();
    let mount = |flags| rustix::mount::mount(device, target, c"ext4", flags, None::<&CStr>);
    let mounted = loop {
        let mounted = match rustix::fs::access(device, Access::EXISTS) {
            Ok(()) => mount(MountFlags::RELATIME),
            Err(_) => Err(Errno::NXIO),
        };
        match mounted {
            // A disk's node is there a moment before the disk is (device_add_disk, block/genhd.c).
            Err(Errno::NXIO) if watch.elapsed() < DEVICE_WAIT => sys::sleep(1),
            other => break other,
        }
    };
    let mounted = match mounted {
        Err(Errno::NXIO) => {
            return Err(error!(
                "mount {} on {}: no such device after 2 s",
                device.lossy(),
                target.lossy()
            ));
        }
        Err(Errno::ACCESS | Errno::ROFS) => {
            match mount(MountFlags::RELATIME | MountFlags::RDONLY) {
                // Only a journal is written to by a mount that is read-only.
                Err(Errno::ROFS) => {
                    return Err(error!(
                        "mount {} on {}: read-only device has a journal that must be recovered",
                        device.lossy(),
                        target.lossy()
                    ));
                }
                mounted => {
                    if mounted.is_ok() {
                        report.warn(&format_args!(
                            "{} is write-protected: mounted read-only",
                            device.lossy()
                        ));
                    }
                    mounted
                }
            }
        }
        other => other,
    };
    mounted.map_err(context!("mount {} on {}", device.lossy(), target.lossy()))
}

/// Mounts the root beside the initramfs, and touches all of it that PID 1 looks at: a disk that
/// hangs stops this child, not PID 1, which finds everything in memory.
pub fn mount(device: &CStr, scratch: &mut [u8], report: &HelperLog) -> Result {
    files::make_directory(NEW, 0o755).map_err(context!("create /newroot"))?;
    report.step(&format_args!("mount {}", device.lossy()));
    mount_volume(device, NEW, report)?;
    rustix::process::chroot(NEW).map_err(context!("enter /newroot"))?;
    for tree in mounts::TREES {
        // A root without the directory, perhaps read-only, is told apart by the move's error.
        let _made = files::make_directory(tree, 0o755);
    }
    if let Err(errno) = files::make_directory(c"/root", 0o700) {
        report.warn(&context!("create /root")(errno));
    }
    for accounts in &[exec::PASSWD, exec::GROUP] {
        let _told_later = files::read_whole(accounts, scratch);
    }
    Ok(())
}

/// Moves the kernel's file systems onto the root and makes it `/`; the initramfs is emptied.
pub fn switch(log: &mut dyn Log) -> Result {
    let old = files::open(c"/", OFlags::DIRECTORY).map_err(context!("open /"))?;
    rustix::process::chdir(NEW).map_err(context!("enter /newroot"))?;
    for tree in mounts::TREES {
        // A link there would lead out of the root, to what is deleted below: it is not followed.
        let target = files::behind(tree, 1);
        move_mount(CWD, tree, CWD, target, MoveMountFlags::empty())
            .map_err(context!("move {} onto the root", tree.lossy()))?;
    }
    if let Err(errno) = empty(old) {
        log.warn(&context!("empty the initramfs")(errno));
    }
    rustix::mount::mount_move(c".", c"/").map_err(context!("move the root onto /"))?;
    rustix::process::chroot(c".")
        .and_then(|()| rustix::process::chdir(c"/"))
        .map_err(context!("enter the root"))
}

// linux/magic.h
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Deletes everything in the initramfs: it is the guest's memory, and may hold secrets.
///
/// Only where the old root is a file system in memory (else EXDEV), and never across a mount.
fn empty(old: OwnedFd) -> Result<(), Errno> {
    let kind = rustix::fs::fstatfs(&old)?.f_type as u64;
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Err(Errno::XDEV);
    }
    // Down into the first directory that is not empty, and up again when it is: no recursion.
    let mut here = old;
    let mut depth = 0u32;
    loop {
        here = match delete_entries(&here, depth == 0)? {
            Some(inner) => {
                depth += 1;
                inner
            }
            // Its parent deletes it now.
            None if depth > 0 => {
                depth -= 1;
                enter(&here, c"..")?
            }
            None => return Ok(()),
        }
    }
}

/// Deletes a directory's entries, up to the first directory that is not empty, which is the answer.
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
            // A mount point (rmdir(2)): that is the new root, or what somebody else mounted.
            Err(Errno::BUSY) if is_root => {}
            Err(Errno::NOTEMPTY) => return enter(directory, name).map(Some),
            Err(errno) => return Err(errno),
        }
    }
    Ok(None)
}

fn enter(directory: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}
