//! The kernel's own file systems.
//!
//! They are mounted in the initramfs, beside everything else that waits during boot, and moved
//! with all that is mounted in them when the root is there.

use crate::context;
use crate::error::{self, Discard, Log, Result};
use crate::sys::files;
use core::ffi::CStr;
use proto::message::ToLossy;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// A mount of a file system that needs no source.
struct Mount {
    fs_type: &'static CStr,
    target: &'static CStr,
    flags: MountFlags,
    /// As in fstab(5); none when empty.
    options: &'static CStr,
    /// A kernel without one that is not gets a warning.
    required: bool,
    /// Whether the kernel makes the directory, with the file system above it.
    has_directory: bool,
}

impl Mount {
    const fn required(fs_type: &'static CStr, target: &'static CStr, flags: MountFlags) -> Self {
        Self {
            fs_type,
            target,
            flags,
            options: c"",
            required: true,
            has_directory: false,
        }
    }

    const fn optional(fs_type: &'static CStr, target: &'static CStr, flags: MountFlags) -> Self {
        Self {
            required: false,
            ..Self::required(fs_type, target, flags)
        }
    }

    const fn with_options(self, options: &'static CStr) -> Self {
        Self { options, ..self }
    }

    const fn on_existing_directory(self) -> Self {
        Self {
            has_directory: true,
            ..self
        }
    }

    /// Makes the directory, if need be, and mounts the file system on it.
    fn mount(&self, log: &mut dyn Log) -> Result {
        let &Self {
            fs_type, target, ..
        } = self;
        let directory = match self.has_directory {
            true => Ok(()),
            false => files::make_directory(target, 0o755),
        };
        let mounted = directory.and_then(|()| {
            rustix::mount::mount(fs_type, target, fs_type, self.flags, self.options)
        });
        match mounted {
            // Mounted already.
            Ok(()) | Err(Errno::BUSY) => return Ok(()),
            Err(errno) => {
                let why = context!("mount {} on {}", fs_type.lossy(), target.lossy())(errno);
                if self.required {
                    return Err(why);
                }
                log.warn(&why);
            }
        }
        Ok(())
    }
}

const NODEV: MountFlags = MountFlags::NODEV;
const NOEXEC: MountFlags = MountFlags::NOEXEC;
const NOSUID: MountFlags = MountFlags::NOSUID;
const NOATIME: MountFlags = MountFlags::NOATIME;
const RELATIME: MountFlags = MountFlags::RELATIME;
const STRICT: MountFlags = NODEV.union(NOEXEC).union(NOSUID);

const DEV: Mount = Mount::required(c"devtmpfs", c"/dev", NOSUID).with_options(c"mode=0755");

const SYSFS: Mount = Mount::required(c"sysfs", c"/sys", STRICT);

const PROC: Mount = Mount::required(c"proc", c"/proc", STRICT);

const REMAINING: [Mount; 6] = [
    Mount::required(c"devpts", c"/dev/pts", NOEXEC.union(NOSUID).union(NOATIME))
        .with_options(c"mode=0620,gid=5,ptmxmode=666"),
    Mount::required(c"tmpfs", c"/dev/shm", NOSUID.union(NODEV)).with_options(c"mode=1777"),
    // Of the memory /dev/shm can have half, and everybody may fill both: /run/lock. A kernel that
    // finds none, and nobody to kill for it, panics.
    Mount::required(c"tmpfs", c"/run", NOSUID.union(NODEV)).with_options(c"mode=0755,size=10%"),
    Mount::optional(c"mqueue", c"/dev/mqueue", STRICT),
    Mount::optional(c"hugetlbfs", c"/dev/hugepages", RELATIME).with_options(c"pagesize=2M"),
    Mount::optional(c"binfmt_misc", c"/proc/sys/fs/binfmt_misc", RELATIME).on_existing_directory(),
];

/// Links in /dev, and where they lead.
const LINKS: [(&CStr, &CStr); 4] = [
    (c"/dev/fd", c"/proc/self/fd"),
    (c"/dev/stdin", c"/proc/self/fd/0"),
    (c"/dev/stdout", c"/proc/self/fd/1"),
    (c"/dev/stderr", c"/proc/self/fd/2"),
];

/// The trees to move onto the root, each with what is mounted in it.
pub const TREES: [&CStr; 4] = [c"/dev", c"/sys", c"/proc", c"/run"];

/// Device nodes, before anything else: there is no console without them.
pub fn mount_devtmpfs() -> Result {
    DEV.mount(&mut Discard)
}

/// Processes. The descriptor is of the file system, whatever is mounted over it later.
pub fn mount_procfs() -> Result<OwnedFd> {
    PROC.mount(&mut Discard)?;
    files::open(c"/proc", OFlags::PATH | OFlags::DIRECTORY).map_err(context!("open /proc"))
}

/// sysfs, where expedited grace periods are switched on.
pub fn mount_sysfs() -> Result {
    SYSFS.mount(&mut Discard)
}

/// Everything else that is not a cgroup.
pub fn mount_remaining(log: &mut dyn Log) -> Result {
    for mount in &REMAINING {
        mount.mount(log)?;
    }
    files::require_directory(c"/run/lock", 0o1777)?;
    for &(link, target) in &LINKS {
        match rustix::fs::symlink(target, link) {
            Err(Errno::EXIST) => {}
            other => other.map_err(error::on("link", link))?,
        }
    }
    Ok(())
}

/// Where control groups are.
pub const CGROUP: &CStr = c"/sys/fs/cgroup";

/// The directory of several hierarchies of control groups.
pub fn mount_cgroup_tmpfs() -> Result {
    Mount::required(c"tmpfs", CGROUP, STRICT)
        .with_options(c"mode=755")
        .on_existing_directory()
        .mount(&mut Discard)
}

/// The v2 hierarchy of control groups.
pub fn mount_cgroup2(target: &'static CStr) -> Result {
    Mount {
        has_directory: target == CGROUP,
        ..Mount::required(c"cgroup2", target, STRICT.union(RELATIME)).with_options(c"nsdelegate")
    }
    .mount(&mut Discard)
}

/// Switches expedited RCU grace periods on: the switch, and its value before. A kernel without it boots
/// slower.
///
/// The kernel waits several grace periods in cgroup mounts and unmounts; expedited ones take
/// microseconds instead of ticks (Documentation/RCU, rcu_expedited in sysfs).
pub fn expedite_rcu() -> Option<(OwnedFd, [u8; 1])> {
    let switch = files::open(c"/sys/kernel/rcu_expedited", OFlags::RDWR).ok()?;
    let mut before = [0];
    // Attributes of sysfs are written whole, wherever the file stands.
    files::read(&switch, &mut before).ok()?;
    files::write(&switch, b"1").ok()?;
    Some((switch, before))
}
