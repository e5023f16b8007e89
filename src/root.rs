//! The root file system: mounting it, and leaving the initramfs for it.

use crate::mounts::{self, exists, make_directory};
use crate::sys;
use crate::task::{Explain, Outcome, Report, name};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// Where the root is mounted before it becomes the root.
const NEW: &CStr = c"/newroot";
/// How long a device may take to appear, in milliseconds.
const DEVICE_WAIT: u64 = 2000;

/// Mounts an ext4 volume, when its device has appeared; read-only where the device is.
pub fn mount_volume(device: &CStr, target: &CStr, report: &Report) -> Outcome {
    let what = || text!("mount ", device, " on ", target);
    let start = sys::milliseconds();
    while !exists(device) {
        if sys::milliseconds().wrapping_sub(start) >= DEVICE_WAIT {
            return Err(text!(what(), ": no such device after 2 s"));
        }
        pause(1);
    }
    let flags = MountFlags::RELATIME;
    match rustix::mount::mount(device, target, c"ext4", flags, None::<&CStr>) {
        Err(errno @ (Errno::ACCESS | Errno::ROFS)) => {
            report.warn(text!(device, " is write-protected: mounted read-only"));
            rustix::mount::mount(device, target, c"ext4", flags | MountFlags::RDONLY, None::<&CStr>)
                .map_err(|_| errno)
                .explain(what)
        }
        other => other.explain(what),
    }
}

/// Sleeps; for children only.
pub fn pause(milliseconds: i64) {
    let time = rustix::thread::Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let _interrupted = rustix::thread::nanosleep(&time);
}

/// Mounts the root beside the initramfs.
pub fn mount(device: &CStr, report: &Report) -> Outcome {
    make_directory(NEW, 0o755).explain(|| text!("create ", NEW))?;
    mount_volume(device, NEW, report)
}

/// Moves the kernel's file systems onto the root and makes it `/`; the initramfs is emptied.
pub fn switch(report: &mut impl FnMut(Line)) -> Outcome {
    let old = rustix::fs::open(c"/", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .explain(|| text!("open /"))?;
    rustix::process::chdir(NEW).explain(|| text!("enter ", NEW))?;
    for tree in mounts::TREES {
        let target = tree.to_bytes_with_nul().get(1..).and_then(|name| CStr::from_bytes_with_nul(name).ok());
        let target = target.unwrap_or(c".");
        // A root without the directory, perhaps read-only, is told apart by the move's error.
        let _made = make_directory(target, 0o755);
        rustix::mount::mount_move(tree, target).explain(|| text!("move ", tree, " onto the root"))?;
    }
    if let Err(why) = empty(&old) {
        report(why);
    }
    rustix::mount::mount_move(c".", c"/").explain(|| text!("move the root onto /"))?;
    rustix::process::chroot(c".").explain(|| text!("chroot"))?;
    rustix::process::chdir(c"/").explain(|| text!("enter /"))?;
    if let Err(errno) = make_directory(c"/root", 0o700) {
        report(text!("create /root: ", name(errno)));
    }
    Ok(())
}

// linux/magic.h
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Deepest directory of an initramfs that is emptied.
const DEPTH: usize = 32;

/// Deletes everything in the initramfs: it is the guest's memory, and may hold secrets.
///
/// Only where the old root is a file system in memory, and never across a mount.
fn empty(old: &rustix::fd::OwnedFd) -> Outcome {
    let kind = rustix::fs::fstatfs(old).explain(|| text!("statfs /"))?.f_type as u64;
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Err(text!("the initramfs is no file system in memory: left as it is"));
    }
    let device = rustix::fs::fstat(old).explain(|| text!("stat /"))?.st_dev;
    // From the top into the first directory that has one, deleting on the way back: no recursion.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut open = heapless::Vec::<rustix::fd::OwnedFd, DEPTH>::new();
    let mut names = heapless::Vec::<heapless::CString<256>, DEPTH>::new();
    loop {
        let here = open.last().unwrap_or(old);
        match first_directory(here, device).explain(|| text!("read the initramfs"))? {
            Some(name) => {
                let inner = rustix::fs::openat(here, &*name, flags, Mode::empty())
                    .explain(|| text!("open ", &*name, " in the initramfs"))?;
                let room = open.push(inner).is_ok() && names.push(name).is_ok();
                if !room {
                    return Err(text!("the initramfs is nested deeper than ", DEPTH, " levels"));
                }
            }
            None => {
                open.pop();
                let Some(name) = names.pop() else {
                    return Ok(());
                };
                let parent = open.last().unwrap_or(old);
                rustix::fs::unlinkat(parent, &*name, AtFlags::REMOVEDIR)
                    .explain(|| text!("delete ", &*name, " in the initramfs"))?;
            }
        }
    }
}

/// Deletes a directory's files; the name of its first directory on the same device.
fn first_directory(directory: &rustix::fd::OwnedFd, device: u64) -> Result<Option<heapless::CString<256>>, Errno> {
    rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let status = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if status.st_dev != device {
            continue;
        }
        if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
            continue;
        }
        // A directory that holds a mount stays; its own device tells it from the mount.
        return heapless::CString::from_bytes_with_nul(name.to_bytes_with_nul())
            .map(Some)
            .map_err(|_| Errno::NAMETOOLONG);
    }
    Ok(None)
}
