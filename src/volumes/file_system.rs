//! Mounts the file systems of block devices, in a helper, as a device may be slow.

use crate::context;
use crate::error;
use crate::error::{Result, name};
use crate::process::helper::HelperLog;
use crate::sys::{self, Stopwatch, disk, files};
use core::ffi::CStr;
use proto::bytes::split;
use proto::config::PATH_MAX;
use proto::message::ToLossy;
use proto::superblock;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// How long a device may take to appear, in milliseconds.
const DEVICE_TIMEOUT: u64 = 2000;

/// A file system to mount.
pub struct FileSystem<'a> {
    /// Its block device; ignored for a tmpfs.
    pub device: &'a CStr,
    /// Its type; empty: identified by the superblock.
    pub fs_type: &'a CStr,
    /// Its options (mount(2), data).
    pub options: &'a CStr,
    /// How it is mounted.
    pub access: Access,
}

/// How a file system may be accessed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read-write, unless its device is write-protected.
    ReadWrite,
    /// Mounted read-only; a dirty journal is still replayed.
    ReadOnly,
    /// Read-only, with the device itself write-protected.
    Shared,
}

impl<'a> FileSystem<'a> {
    /// The one on a device.
    pub fn on(device: &'a CStr) -> Self {
        Self {
            device,
            fs_type: c"",
            options: c"",
            access: Access::ReadWrite,
        }
    }

    /// A tmpfs.
    #[cfg(feature = "overlay")]
    pub fn tmpfs(options: &'a CStr) -> Self {
        Self {
            device: c"tmpfs",
            fs_type: c"tmpfs",
            options,
            access: Access::ReadWrite,
        }
    }

    /// Waits for its device and mounts it, read-only if the device is write-protected.
    pub fn mount(&self, target: &CStr, log: &HelperLog) -> Result {
        let (device, path) = (self.device.lossy(), target.lossy());
        log.step(&format_args!("mount {device} on {path}"));
        self.try_to_mount(target, log)
            .map_err(|why| error!("mount {device} on {path}: {why}"))
    }

    fn try_to_mount(&self, target: &CStr, log: &HelperLog) -> Result {
        let mut fs_type = self.fs_type;
        let mut is_write_protected = false;
        let mut has_btrfs_log = false;
        if fs_type != c"tmpfs" {
            let device = open_device(self.device)?;
            if self.access == Access::Shared {
                disk::write_protect(&device).map_err(context!("write-protect the device"))?;
            }
            is_write_protected = disk::is_write_protected(&device).unwrap_or(false);
            if fs_type.is_empty() {
                fs_type = identify(&device)?;
            }
            if is_write_protected && fs_type == c"btrfs" {
                has_btrfs_log = superblock::btrfs_has_log(reader(&device)).unwrap_or(false);
            }
        }
        let wants_read_only = self.access != Access::ReadWrite || superblock::is_read_only(fs_type);
        let mut data = heapless::Vec::new();
        let mut flags = read_options(self.options, &mut data);
        if wants_read_only || is_write_protected {
            flags |= MountFlags::RDONLY;
        }
        rustix::mount::mount(self.device, target, fs_type, flags, sys::c_str(&data)).map_err(
            |errno| {
                const MUST_BE_REPLAYED: &str =
                    " (its journal must be replayed, and the device is write-protected)";
                let hint = match errno {
                    Errno::NODEV => " (the kernel has no such file system)",
                    // A read-only mount replays the journal, and writes nothing else.
                    Errno::ACCESS | Errno::ROFS if is_write_protected => MUST_BE_REPLAYED,
                    // btrfs_replay_log, fs/btrfs/disk-io.c
                    Errno::IO if has_btrfs_log => MUST_BE_REPLAYED,
                    _ => "",
                };
                error!("{}: {}{hint}", fs_type.lossy(), name(errno))
            },
        )?;
        if is_write_protected && !wants_read_only {
            let device = self.device.lossy();
            log.warn(&format_args!(
                "{device} is write-protected: mounted read-only"
            ));
        }
        Ok(())
    }
}

/// Options that are flags of mount(2), and their opposites.
const FLAGS: [(&[u8], &[u8], MountFlags); 8] = [
    (b"ro", b"rw", MountFlags::RDONLY),
    (b"nosuid", b"suid", MountFlags::NOSUID),
    (b"nodev", b"dev", MountFlags::NODEV),
    (b"noexec", b"exec", MountFlags::NOEXEC),
    (b"sync", b"async", MountFlags::SYNCHRONOUS),
    (b"noatime", b"atime", MountFlags::NOATIME),
    (b"nodiratime", b"diratime", MountFlags::NODIRATIME),
    (b"strictatime", b"relatime", MountFlags::STRICTATIME),
];

/// Splits options as in fstab(5) into flags of mount(2), and into `data` those of the file system.
fn read_options(text: &CStr, data: &mut heapless::Vec<u8, PATH_MAX>) -> MountFlags {
    let mut flags = MountFlags::RELATIME;
    for option in split(text.to_bytes(), b',') {
        let is_it = |(set, unset, _): &&(&[u8], &[u8], _)| *set == option || *unset == option;
        if let Some((set, _, flag)) = FLAGS.iter().find(is_it) {
            flags.set(*flag, *set == option);
            continue;
        }
        if option == b"defaults" {
            continue;
        }
        // They fit, as the whole list did with its NUL.
        if !data.is_empty() {
            let _fits = data.push(b',');
        }
        let _fits = data.extend_from_slice(option);
    }
    let _fits = data.push(0);
    flags
}

/// Waits for a device and opens it. ENXIO: its node appears before the disk is ready (device_add_disk,
/// block/genhd.c).
fn open_device(path: &CStr) -> Result<OwnedFd> {
    let watch = Stopwatch::start();
    loop {
        match files::open(path, OFlags::NONBLOCK) {
            Err(Errno::NOENT | Errno::NXIO) if watch.elapsed() < DEVICE_TIMEOUT => sys::sleep(1),
            Err(Errno::NOENT | Errno::NXIO) => {
                return Err(error!("no such device after 2 s"));
            }
            other => return other.map_err(context!("open the device")),
        }
    }
}

/// The type of the file system on a device.
fn identify(device: &OwnedFd) -> Result<&'static CStr> {
    superblock::identify(reader(device))
        .map_err(context!("read the superblock"))?
        .ok_or_else(|| error!("no ext2, ext3, ext4, xfs, btrfs, squashfs or erofs"))
}

fn reader(device: &OwnedFd) -> impl FnMut(usize, &mut [u8]) -> Result<(), Errno> {
    move |offset, buffer| rustix::io::pread(device, buffer, offset as u64).map(drop)
}
