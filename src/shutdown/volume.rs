//! Leaves the file system of one block device clean, wherever it is mounted.
//!
//! A superblock stays alive while anything uses it: another mount namespace, an overlay, a swap file, a
//! mount on an unreachable path. So the mount table is not enough: if the device is still claimed, its file
//! system is mounted once more and made read-only there, which applies to all its mounts.

use crate::error;
use crate::error::{Result, name};
use crate::process::helper;
use crate::shutdown::detached_fs::KernelFile;
use crate::sys::{self, Stopwatch, disk, files, mount};
use core::ffi::CStr;
use proto::block::{self, DeviceNumber};
use proto::bytes::before;
use proto::message;
use proto::message::{Message, ToLossy};
use proto::mountinfo::{self, Escaped, Mount, PATH_MAX};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, UnmountFlags};

/// How long a file system may stay busy, in milliseconds: the kernel closes some files of dead processes
/// asynchronously.
const BUSY_TIMEOUT: u64 = 1000;
/// Time between two attempts, in milliseconds.
const RETRY: i64 = 10;
/// How long swapoff may take, in milliseconds: it moves the contents to memory.
const SWAPOFF_TIMEOUT: u64 = 3000;

/// How long a loop device may take to name its backing device, in milliseconds.
const LOOP_TIMEOUT: u64 = 100;

/// Major number of loop devices (linux/major.h).
const LOOP_MAJOR: u32 = 7;

// linux/magic.h
const EXT4_SUPER_MAGIC: u64 = 0xef53;
const BTRFS_SUPER_MAGIC: u64 = 0x9123_683e;

/// A device's name (DISK_NAME_LEN, linux/blkdev.h), with the number of a partition, and NUL.
type Name = heapless::Vec<u8, 48>;

/// Tables that are shared by all devices.
pub struct Tables {
    /// A detached procfs.
    pub proc: OwnedFd,
    /// Its self/mountinfo, as it was before anything was unmounted.
    pub mounts: Option<KernelFile>,
    /// The root's device.
    pub root: Option<Volume>,
}

impl Tables {
    /// The lines of the mount table.
    fn mounts(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.mounts.iter().flat_map(KernelFile::lines)
    }
}

/// A block device, with a node of the same name in the working directory.
pub struct Volume {
    /// Its number.
    pub number: DeviceNumber,
    name: Name,
    /// Its backing device.
    backing: Backing,
}

/// The backing device of a device.
#[derive(PartialEq, Eq)]
enum Backing {
    /// None.
    Nothing,
    /// The device that holds the file of a loop device, or that the loop device is set up on.
    Device(DeviceNumber),
    /// Unknown devices: it is a partition of a loop device, a device of the device mapper, a loop device
    /// whose file is on a file system without a device number (btrfs, overlay), or one that cannot be
    /// opened.
    Unknown,
}

impl Volume {
    /// The device of a line of /proc/partitions.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (number, name) = block::partition(line)?;
        let mut with_nul = Name::from_slice(name).ok()?;
        with_nul.push(0).ok()?;
        Some(Self {
            number,
            name: with_nul,
            backing: Backing::Nothing,
        })
    }

    /// Its name, and the path of its node.
    pub fn name(&self) -> &CStr {
        sys::c_str(&self.name)
    }

    /// Makes its node in a directory.
    pub fn make_node(&self, directory: &OwnedFd) -> Result<(), Errno> {
        let (kind, mode) = (FileType::BlockDevice, Mode::RUSR | Mode::WUSR);
        let DeviceNumber { major, minor } = self.number;
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(directory, self.name(), kind, mode, device)
    }

    /// Whether it is a partition of `disk` (disk_name, block/partitions/core.c).
    pub fn is_partition_of(&self, disk: &Self) -> bool {
        let disk = disk.name().to_bytes();
        let number = self.name().to_bytes().strip_prefix(disk);
        match (number, disk.last()) {
            (Some([b'p', b'0'..=b'9', ..]), Some(b'0'..=b'9')) => true,
            (Some([b'0'..=b'9', ..]), last) => !matches!(last, Some(b'0'..=b'9')),
            _ => false,
        }
    }

    /// Finds its backing device.
    pub fn find_backing(&mut self) {
        if self.number.major != LOOP_MAJOR {
            let name = self.name().to_bytes();
            if name.starts_with(b"loop") || name.starts_with(b"dm-") {
                self.backing = Backing::Unknown;
            }
            return;
        }
        // In a child, which may block: a loop device cannot be opened while the kernel reads its partition
        // table (loop_reread_partitions, drivers/block/loop.c), and the disk below it may hang.
        let child = helper::fork(&mut |log| {
            if let Ok(node) = self.open(OFlags::empty())
                && let Ok(number) = disk::loop_backing(&node)
            {
                let _read = files::write(log.pipe(), &number.to_ne_bytes());
            }
            0
        });
        let mut number = [0; size_of::<u64>()];
        self.backing = match child {
            Ok(child) if child.wait_for(LOOP_TIMEOUT) => {
                match files::read(&child.log, &mut number) {
                    Ok(1..) => match number_of(u64::from_ne_bytes(number)) {
                        DeviceNumber { major: 0, .. } => Backing::Unknown,
                        number => Backing::Device(number),
                    },
                    // It is not set up.
                    _ => Backing::Nothing,
                }
            }
            _ => Backing::Unknown,
        };
    }

    /// Whether `other` is known to be its backing device.
    pub fn is_backed_by(&self, other: &Self) -> bool {
        match self.backing {
            Backing::Nothing => false,
            Backing::Device(number) => number == other.number,
            Backing::Unknown => self.is_partition_of(other),
        }
    }

    /// Whether `other` may be its backing device.
    pub fn may_be_backed_by(&self, other: &Self) -> bool {
        self.backing == Backing::Unknown && other.backing == Backing::Nothing
    }

    /// Its mount point and name, for messages: `/data (/dev/vdb)`.
    pub fn label(&self, tables: &Tables) -> Message {
        let name = self.name().lossy();
        if tables.root.as_ref().map(|root| root.number) == Some(self.number) {
            return message!("/ (/dev/{name})");
        }
        let mut room = [0; PATH_MAX];
        match tables.mounts().find_map(|line| self.mount_point(line)) {
            Some(target) => message!("{} (/dev/{name})", target.decode(&mut room).text.lossy()),
            None => message!("/dev/{name}"),
        }
    }

    /// Leaves its file system clean. The error says why it is not.
    pub fn quiesce(&self, tables: &Tables) -> Result {
        let was_mounted = self.unmount(tables);
        // Claimed by a file system, a partition of it, a swap area, or a device on top of it.
        let is_claimed = self.open(OFlags::EXCL).err() == Some(Errno::BUSY);
        let mounted_again = match is_claimed {
            true => self.mount_again(tables),
            false => None,
        };
        let mut result = match &mounted_again {
            Some(directory) => self.make_read_only(directory, tables),
            // If a file system claims it, that is read-only already.
            None => Ok(()),
        };
        if was_mounted || is_claimed {
            result = result.and_then(|()| self.check(tables));
        }
        drop(mounted_again);
        if self.number.major == LOOP_MAJOR
            && let Ok(node) = self.open(OFlags::empty())
        {
            let _not_bound = disk::detach_loop(&node);
        }
        result
    }

    /// The same for the root, which is not unmounted.
    pub fn quiesce_root(&self, tables: &Tables, root: &OwnedFd) -> Result {
        self.make_read_only(root, tables)
            .and_then(|()| self.check(tables))
    }

    fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        files::open(self.name(), flags | OFlags::NONBLOCK)
    }

    /// Unmounts it from each path, in reverse order. Returns whether it was mounted.
    fn unmount(&self, tables: &Tables) -> bool {
        let mut found = false;
        let mut room = [0; PATH_MAX];
        for line in tables.mounts().rev() {
            if let Some(target) = self.mount_point(line) {
                found = true;
                let target = target.decode(&mut room).text;
                let _busy_or_hidden = rustix::mount::unmount(target, UnmountFlags::NOFOLLOW);
            }
        }
        found
    }

    /// The mount point in a line of the mount table, if that is a mount of this device.
    fn mount_point<'l>(&self, line: &'l [u8]) -> Option<Escaped<'l>> {
        let mount = mountinfo::parse(line)?;
        self.is_mounted_by(&mount).then_some(mount.mount_point)
    }

    /// Whether this is a mount of the device.
    pub fn is_mounted_by(&self, mount: &Mount) -> bool {
        if mount.is_btrfs() {
            return mount.source.raw().strip_prefix(b"/dev/") == Some(self.name().to_bytes());
        }
        let DeviceNumber { major, minor } = self.number;
        (mount.major, mount.minor) == (major, minor)
    }

    /// Mounts the file system that holds the device once more, detached. The kernel refuses this for any
    /// other type of file system, and for a read-only one.
    fn mount_again(&self, tables: &Tables) -> Option<OwnedFd> {
        let kinds = KernelFile::read(&tables.proc, c"filesystems").ok()?;
        let mut name = Name::new();
        kinds.lines().find_map(|line| {
            // A type without a device has `nodev` before the tab.
            let kind = line.strip_prefix(b"\t")?;
            name.clear();
            name.extend_from_slice(kind).ok()?;
            name.push(0).ok()?;
            mount::on_device(sys::c_str(&name), self.name()).ok()
        })
    }

    /// Makes the file system read-only; if it stays busy, freezes it, which also empties its journal.
    fn make_read_only(&self, directory: &OwnedFd, tables: &Tables) -> Result {
        let watch = Stopwatch::start();
        let mut swaps = true;
        let refused = loop {
            match remount_read_only(directory) {
                Ok(()) => return Ok(()),
                Err(Errno::BUSY) if swaps => {
                    swaps = false;
                    self.swap_off(directory, tables);
                }
                Err(Errno::BUSY) if watch.elapsed() < BUSY_TIMEOUT => sys::sleep(RETRY),
                Err(errno) => break errno,
            }
        };
        disk::freeze(directory).map_err(|errno| {
            error!(
                "{}: cannot be made read-only: {}, nor frozen: {}",
                self.label(tables),
                name(refused),
                name(errno)
            )
        })?;
        match rustix::fs::fstatfs(directory).map(|status| status.f_type as u64) {
            // An ext4 is checked by its superblock. A frozen btrfs is committed, with an empty log
            // (btrfs_freeze).
            Ok(EXT4_SUPER_MAGIC | BTRFS_SUPER_MAGIC) => Ok(()),
            // XFS keeps its log dirty on purpose (xfs_fs_freeze, fs/xfs/xfs_super.c); others stay marked as
            // in use.
            _ => Err(error!(
                "{} is not clean: it was busy, and could only be frozen",
                self.label(tables)
            )),
        }
    }

    /// Stops swapping to files on it, in a child that is killed if that takes too long. The path of a file
    /// on a detached mount starts at the mount's root.
    fn swap_off(&self, directory: &OwnedFd, tables: &Tables) {
        let Ok(swaps) = KernelFile::read(&tables.proc, c"swaps") else {
            return;
        };
        let mut areas = swaps.lines();
        let _header = areas.next();
        if areas.clone().next().is_none_or(<[u8]>::is_empty) {
            return;
        }
        let child = helper::fork(&mut |_| {
            let mut room = [0; PATH_MAX];
            for line in areas.clone() {
                let absolute = Escaped::new(before(line, b' ')).decode(&mut room).text;
                if is_on(directory, absolute) && disk::swap_off(absolute).is_ok() {
                    continue;
                }
                let relative = absolute.to_bytes_with_nul().get(1..).unwrap_or(&[]);
                let relative = sys::c_str(relative);
                if rustix::process::fchdir(directory).is_ok() && is_on(directory, relative) {
                    let _deleted = disk::swap_off(relative);
                }
            }
            0
        });
        if let Ok(child) = child {
            child.wait_for(SWAPOFF_TIMEOUT);
        }
    }

    /// Checks that it is clean: it may have errors even if it could be made read-only.
    fn check(&self, tables: &Tables) -> Result {
        let (offset, size) = block::EXT_SUPERBLOCK;
        let mut buffer = [0; 256];
        let superblock = buffer.get_mut(..size).unwrap_or(&mut []);
        let read = self
            .open(OFlags::empty())
            .and_then(|node| rustix::io::pread(&node, superblock, offset));
        match read {
            Ok(_) => match block::ext_fault(&buffer) {
                Some(fault) => Err(error!("{} is not clean: {fault}", self.label(tables))),
                None => Ok(()),
            },
            Err(errno) => Err(error!("read {}: {}", self.label(tables), name(errno))),
        }
    }
}

/// Whether `path` is on the file system of `directory`.
fn is_on(directory: &OwnedFd, path: &CStr) -> bool {
    let device = rustix::fs::fstat(directory).map(|status| status.st_dev);
    rustix::fs::stat(path).is_ok_and(|status| Ok(status.st_dev) == device)
}

/// A device number from stat(2).
pub fn number_of(device: u64) -> DeviceNumber {
    DeviceNumber {
        major: rustix::fs::major(device),
        minor: rustix::fs::minor(device),
    }
}

/// Makes the file system that `directory` is on read-only, in all its mounts.
pub fn remount_read_only(directory: &OwnedFd) -> Result<(), Errno> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = rustix::mount::fspick(directory, c"", flags)?;
    rustix::mount::fsconfig_set_flag(&context, c"ro")?;
    rustix::mount::fsconfig_reconfigure(&context)
}
