//! The end: unmounting, and everything written to the disks.

use crate::boot::mounts::TREES;
use crate::context;
use crate::error::{Log, name};
use crate::sys::{self, Stopwatch, disk, files};
use core::ffi::CStr;
use proto::message::ToLossy;
use proto::mountinfo;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::system::RebootCommand;

/// How long a busy volume is tried again, in milliseconds.
const BUSY: u64 = 3000;
/// Time between two tries, in milliseconds.
const RETRY: i64 = 10;
/// Volumes that can be kept for freezing when they cannot be unmounted.
const STUCK: usize = 128;

/// Volumes that could not be unmounted.
type Stuck = heapless::Vec<OwnedFd, STUCK>;

/// Unmounts volumes in reverse, makes the root read-only, and writes everything out.
///
/// What cannot be unmounted or made read-only is frozen instead (FIFREEZE, ioctl_fs(2)): that
/// leaves its journal empty as well.
pub fn unmount_all(mounts: Option<&OwnedFd>, buffer: &mut [u8], log: &mut dyn Log) {
    // A boot that failed half-way has its root here.
    let _none = unmount(c"/newroot", UnmountFlags::empty());
    let mut stuck = Stuck::new();
    let watch = Stopwatch::start();
    while let Some(mounts) = mounts {
        let table = read_table(mounts, buffer);
        if !try_unmounting(table, watch.elapsed() < BUSY, &mut stuck, log) {
            break;
        }
        sys::sleep(RETRY);
    }
    // Volumes before the root: a volume may be a file on the root.
    for volume in &stuck {
        if let Err(errno) = disk::freeze(volume) {
            log.warn(&context!("cannot freeze a busy volume")(errno));
        }
    }
    let read_only = MountFlags::RDONLY | MountFlags::RELATIME;
    if let Err(errno) = rustix::mount::mount_remount(c"/", read_only, c"") {
        // EBUSY: something in the kernel, a loop device perhaps, has a file open for writing.
        if let Err(frozen) = freeze_root() {
            let why = context!("cannot make / read-only")(errno);
            log.warn(&format_args!("{why}, nor freeze it: {}", name(frozen)));
        }
    }
    rustix::fs::sync();
}

/// The mount table as it is now (proc_pid_mountinfo(5)); a table over the buffer loses its end.
fn read_table<'b>(file: &OwnedFd, buffer: &'b mut [u8]) -> &'b [u8] {
    let mut length = 0;
    let _start = rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0));
    while let Ok(count @ 1..) = files::read(file, buffer.get_mut(length..).unwrap_or(&mut [])) {
        length += count;
    }
    buffer.get(..length).unwrap_or(&[])
}

/// Tries to unmount every volume, the last mounted first; whether one is still busy.
fn try_unmounting(table: &[u8], patient: bool, stuck: &mut Stuck, log: &mut dyn Log) -> bool {
    let mut busy = false;
    let mut room = [0; mountinfo::PATH_MAX];
    for line in table.rsplit(|byte| *byte == b'\n') {
        let Some(mount) = mountinfo::parse(line) else {
            continue;
        };
        let on_device = mount.major != 0;
        let target = mount.mount_point.decode(&mut room).text;
        if target == c"/" {
            // What is mounted over the root, or the root, which only becomes read-only (umount(2)).
            let _tried_again = unmount(target, UnmountFlags::empty());
        }
        if !is_volume(target.to_bytes(), on_device) {
            continue;
        }
        match unmount(target, UnmountFlags::empty()) {
            // Gone with another one, or hidden below another one that is tried again.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(_) if patient => busy = true,
            Err(errno) => {
                let why = context!("{} stays busy", target.lossy())(errno);
                log.warn(&format_args!("{why}: detached"));
                if on_device {
                    let _table_full = open_directory(target).map(|volume| stuck.push(volume));
                }
                let _detached = unmount(target, UnmountFlags::DETACH);
            }
        }
    }
    busy
}

fn unmount(target: &CStr, flags: UnmountFlags) -> Result<(), Errno> {
    rustix::mount::unmount(target, flags | UnmountFlags::NOFOLLOW)
}

/// What has to be unmounted: all but the root and the kernel's own trees, whose content ends with it.
fn is_volume(path: &[u8], on_device: bool) -> bool {
    let kernels = TREES.iter().any(|tree| {
        let rest = path.strip_prefix(tree.to_bytes());
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
    });
    path != b"/" && (on_device || !kernels)
}

fn open_directory(path: &CStr) -> Result<OwnedFd, Errno> {
    files::open(path, OFlags::NONBLOCK)
}

fn freeze_root() -> Result<(), Errno> {
    disk::freeze(&open_directory(c"/")?)
}

/// The end after a fault in this program: what can be saved without waiting for anybody.
pub fn emergency() -> ! {
    sys::kill_all(9);
    rustix::fs::sync();
    let _not_frozen = freeze_root();
    reboot()
}

/// Restarts the machine, which ends a Firecracker VM. Does not return.
pub fn reboot() -> ! {
    let _refused = rustix::system::reboot(RebootCommand::Restart);
    let _refused = rustix::system::reboot(RebootCommand::PowerOff);
    loop {
        sys::sleep(i64::from(u16::MAX));
    }
}
