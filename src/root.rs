//! The root file system: mounting it, and leaving the initramfs for it.

use crate::mounts::{self, exists, make_directory};
use crate::sys::Watch;
use crate::task::{Outcome, Report, name};
use crate::why;
use crate::{files, spawn};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, move_mount};

/// Where the root is mounted before it becomes the root.
const NEW: &CStr = c"/newroot";
/// How long a device may take to appear, in milliseconds.
const DEVICE_WAIT: u64 = 2000;

/// Mounts an ext4 volume, when its device has appeared; read-only where the device is.
pub fn mount_volume(device: &CStr, target: &CStr, report: &Report) -> Outcome {
    let what = why!("mount ", device, " on ", target);
    let watch = Watch::start();
    while !exists(device) {
        if watch.passed() >= DEVICE_WAIT {
            return Err(text!(
                "mount ",
                device,
                " on ",
                target,
                ": no such device after 2 s"
            ));
        }
        pause(1);
    }
    let flags = MountFlags::RELATIME;
    match rustix::mount::mount(device, target, c"ext4", flags, None::<&CStr>) {
        Err(errno @ (Errno::ACCESS | Errno::ROFS)) => {
            report.warn(text!(device, " is write-protected: mounted read-only"));
            rustix::mount::mount(
                device,
                target,
                c"ext4",
                flags | MountFlags::RDONLY,
                None::<&CStr>,
            )
            .map_err(|_| errno)
            .map_err(what)
        }
        other => other.map_err(what),
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

/// Mounts the root beside the initramfs, and touches all of it that PID 1 looks at: a disk that
/// hangs stops this child, not PID 1, which finds everything in memory.
pub fn mount(device: &CStr, scratch: &mut [u8], report: &Report) -> Outcome {
    make_directory(NEW, 0o755).map_err(why!("create ", NEW))?;
    mount_volume(device, NEW, report)?;
    rustix::process::chroot(NEW).map_err(why!("enter ", NEW))?;
    for tree in mounts::TREES {
        // A root without the directory, perhaps read-only, is told apart by the move's error.
        let _made = make_directory(tree, 0o755);
    }
    if let Err(errno) = make_directory(c"/root", 0o700) {
        report.warn(text!("create /root: ", name(errno)));
    }
    for accounts in [spawn::PASSWD, spawn::GROUP] {
        let _told_later = files::read_whole(accounts, scratch);
    }
    Ok(())
}

/// Moves the kernel's file systems onto the root and makes it `/`; the initramfs is emptied.
pub fn switch(report: &mut impl FnMut(Line)) -> Outcome {
    let old = rustix::fs::open(c"/", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(why!("open /"))?;
    rustix::process::chdir(NEW).map_err(why!("enter ", NEW))?;
    for tree in mounts::TREES {
        let target = tree
            .to_bytes_with_nul()
            .get(1..)
            .and_then(|name| CStr::from_bytes_with_nul(name).ok());
        let target = target.unwrap_or(c".");
        // A link there would lead out of the root, to what is deleted below: it is not followed.
        move_mount(CWD, tree, CWD, target, MoveMountFlags::empty()).map_err(why!(
            "move ",
            tree,
            " onto the root"
        ))?;
    }
    if let Err(errno) = empty(&old) {
        report(text!("empty the initramfs: ", name(errno)));
    }
    rustix::mount::mount_move(c".", c"/").map_err(why!("move the root onto /"))?;
    rustix::process::chroot(c".").map_err(why!("chroot"))?;
    rustix::process::chdir(c"/").map_err(why!("enter /"))
}

// linux/magic.h
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A file's name (NAME_MAX, limits.h).
type Name = heapless::Vec<u8, 255>;

/// Deepest directory of an initramfs that is emptied.
const DEPTH: usize = 32;

/// Deletes everything in the initramfs: it is the guest's memory, and may hold secrets.
///
/// Only where the old root is a file system in memory (else EXDEV), and never across a mount.
fn empty(old: &OwnedFd) -> Result<(), Errno> {
    let kind = rustix::fs::fstatfs(old)?.f_type as u64;
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Err(Errno::XDEV);
    }
    // Down into the first directory that is not empty, deleting on the way back: no recursion.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut open = heapless::Vec::<OwnedFd, DEPTH>::new();
    loop {
        let here = open.last().unwrap_or(old);
        match delete_entries(here)? {
            Some(name) => {
                let inner = rustix::fs::openat(here, &name[..], flags, Mode::empty())?;
                open.push(inner).map_err(|_| Errno::NAMETOOLONG)?;
            }
            // Its parent deletes it now.
            None if open.pop().is_some() => {}
            None => return Ok(()),
        }
    }
}

/// Deletes a directory's entries, up to the first directory that is not empty: its name.
fn delete_entries(directory: &OwnedFd) -> Result<Option<Name>, Errno> {
    rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(0))?;
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
            // A mount point (rmdir(2)): that is the new root, or what somebody else mounted.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(Errno::NOTEMPTY) => {
                return heapless::Vec::from_slice(name.to_bytes())
                    .map(Some)
                    .map_err(|_| Errno::NAMETOOLONG);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(None)
}
