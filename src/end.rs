//! The end: unmounting, and everything written to the disks.

use crate::root::pause;
use crate::sys::{self, Watch};
use crate::task::name;
use core::ffi::CStr;
use pigeon_init::mountinfo::{self, Mount};
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::system::RebootCommand;

/// How long a busy volume is tried again, in milliseconds.
const BUSY: u64 = 3000;
/// Time between two tries, in milliseconds.
const RETRY: i64 = 10;
/// Volumes that can be kept for freezing when they cannot be unmounted.
const STUCK: usize = 128;

/// Unmounts volumes in reverse, makes the root read-only, and writes everything out.
///
/// What cannot be unmounted or made read-only is frozen instead (FIFREEZE, ioctl_fs(2)): that
/// leaves its journal empty as well.
pub fn quiesce(mounts: Option<&OwnedFd>, buffer: &mut [u8], warn: &mut dyn FnMut(Line)) {
    // A boot that failed half-way has its root here.
    let _none = rustix::mount::unmount(c"/newroot", UnmountFlags::NOFOLLOW);
    let mut stuck = heapless::Vec::<OwnedFd, STUCK>::new();
    let watch = Watch::start();
    loop {
        let patient = watch.passed() < BUSY;
        let table = mounts.map_or(0, |file| read_table(file, buffer));
        let busy = unmount_all(
            buffer.get(..table).unwrap_or(&[]),
            patient,
            &mut stuck,
            warn,
        );
        if !busy {
            break;
        }
        pause(RETRY);
    }
    // Volumes before the root: a volume may be a file on the root.
    for volume in &stuck {
        if let Err(errno) = freeze(volume) {
            warn(text!("cannot freeze a busy volume: ", name(errno)));
        }
    }
    let read_only = MountFlags::RDONLY | MountFlags::RELATIME;
    if let Err(errno) = rustix::mount::mount_remount(c"/", read_only, c"") {
        // EBUSY: something in the kernel, a loop device perhaps, has a file open for writing.
        let frozen = open_directory(c"/").and_then(|root| freeze(&root));
        if let Err(frozen) = frozen {
            warn(text!(
                "cannot make / read-only: ",
                name(errno),
                ", nor freeze it: ",
                name(frozen)
            ));
        }
    }
    rustix::fs::sync();
}

/// The mount table as it is now (proc_pid_mountinfo(5)); a table over the buffer loses its end.
fn read_table(file: &OwnedFd, buffer: &mut [u8]) -> usize {
    let mut length = 0;
    let _start = rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0));
    while let Some(room @ [_, ..]) = buffer.get_mut(length..) {
        match rustix::io::read(file, room) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    length
}

/// Tries to unmount every volume, the last mounted first; whether one is still busy.
fn unmount_all(
    table: &[u8],
    patient: bool,
    stuck: &mut heapless::Vec<OwnedFd, STUCK>,
    warn: &mut dyn FnMut(Line),
) -> bool {
    let mut busy = false;
    for mount in table
        .rsplit(|byte| *byte == b'\n')
        .filter_map(mountinfo::parse)
    {
        if !is_volume(&mount) {
            continue;
        }
        let Ok(target) = CStr::from_bytes_with_nul(&mount.target) else {
            continue;
        };
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            // Gone with another one, or hidden below another one that is tried again.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(_) if patient => busy = true,
            Err(errno) => {
                warn(text!(target, " stays busy: ", name(errno), ": detached"));
                if mount.on_device {
                    let _table_full = open_directory(target).map(|volume| stuck.push(volume));
                }
                let _detached =
                    rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            }
        }
    }
    busy
}

/// What has to be unmounted: all but the root and the kernel's own trees, whose content ends with it.
fn is_volume(mount: &Mount) -> bool {
    let path = mount.target.strip_suffix(b"\0").unwrap_or(&mount.target);
    let kernels = crate::mounts::TREES.iter().any(|tree| {
        let rest = path.strip_prefix(tree.to_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    });
    path != b"/" && (mount.on_device || !kernels)
}

fn open_directory(path: &CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
}

/// Writes a file system out and stops all writing to it.
fn freeze(volume: &OwnedFd) -> Result<(), Errno> {
    // linux/fs.h: _IOWR('X', 119, int)
    const FIFREEZE: u32 = 0xc004_5877;
    // SAFETY: the kernel does not look at FIFREEZE's argument.
    match unsafe { sys::ioctl_number(volume.as_fd(), FIFREEZE, 0) } {
        // Frozen already, by way of another mount of the same file system.
        Err(Errno::BUSY) => Ok(()),
        other => other,
    }
}

/// The end after a fault in this program: what can be saved without waiting for anybody.
pub fn emergency() -> ! {
    sys::kill_all(9);
    rustix::fs::sync();
    let _not_frozen = open_directory(c"/").and_then(|root| freeze(&root));
    reboot()
}

/// Restarts the machine, which ends a Firecracker VM. Does not return.
pub fn reboot() -> ! {
    let _refused = rustix::system::reboot(RebootCommand::Restart);
    let _refused = rustix::system::reboot(RebootCommand::PowerOff);
    loop {
        pause(i64::from(u16::MAX));
    }
}
