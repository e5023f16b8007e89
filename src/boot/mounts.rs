//! The kernel's own file systems.
//!
//! They are mounted in the initramfs, while other steps of the boot wait, and moved onto the root, with
//! their submounts, once that is mounted.

use crate::context;
use crate::error::{self, Discard, Log, Result};
use crate::sys::files;
use core::ffi::CStr;
use proto::message::ToLossy;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// A mount of a file system without a source.
struct Mount {
    fs_type: &'static CStr,
    target: &'static CStr,
    flags: MountFlags,
    /// As in fstab(5).
    options: &'static CStr,
    /// If it is not required, a failure is a warning.
    required: bool,
    /// Whether the kernel creates the directory, with the file system that it is in.
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

    /// Creates the directory, unless the kernel has, and mounts the file system on it.
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
    // /dev/shm can take half of the memory, and every user can fill both (/run/lock). A kernel that is out
    // of memory and has no process to kill panics.
    Mount::required(c"tmpfs", c"/run", NOSUID.union(NODEV)).with_options(c"mode=0755,size=10%"),
    Mount::optional(c"mqueue", c"/dev/mqueue", STRICT),
    Mount::optional(c"hugetlbfs", c"/dev/hugepages", RELATIME).with_options(c"pagesize=2M"),
    Mount::optional(c"binfmt_misc", c"/proc/sys/fs/binfmt_misc", RELATIME).on_existing_directory(),
];

/// Links in /dev, and their targets.
const LINKS: [(&CStr, &CStr); 4] = [
    (c"/dev/fd", c"/proc/self/fd"),
    (c"/dev/stdin", c"/proc/self/fd/0"),
    (c"/dev/stdout", c"/proc/self/fd/1"),
    (c"/dev/stderr", c"/proc/self/fd/2"),
];

/// The mounts to move onto the root, with their submounts.
pub const TREES: [&CStr; 4] = [c"/dev", c"/sys", c"/proc", c"/run"];

/// Mounts devtmpfs, before anything else: the console needs it.
pub fn mount_devtmpfs() -> Result {
    DEV.mount(&mut Discard)
}

/// Mounts procfs. The descriptor stays valid if something is mounted over /proc later.
pub fn mount_procfs() -> Result<OwnedFd> {
    PROC.mount(&mut Discard)?;
    files::open(c"/proc", OFlags::PATH | OFlags::DIRECTORY).map_err(context!("open /proc"))
}

/// Mounts sysfs, which [`ExpeditedRcu`] needs.
pub fn mount_sysfs() -> Result {
    SYSFS.mount(&mut Discard)
}

/// Mounts everything else except cgroups.
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

/// Where cgroups are mounted.
pub const CGROUP: &CStr = c"/sys/fs/cgroup";

/// Mounts a tmpfs for several cgroup hierarchies.
pub fn mount_cgroup_tmpfs() -> Result {
    Mount::required(c"tmpfs", CGROUP, STRICT)
        .with_options(c"mode=755")
        .on_existing_directory()
        .mount(&mut Discard)
}

/// Mounts the cgroup v2 hierarchy.
pub fn mount_cgroup2(target: &'static CStr) -> Result {
    Mount {
        has_directory: target == CGROUP,
        ..Mount::required(c"cgroup2", target, STRICT.union(RELATIME)).with_options(c"nsdelegate")
    }
    .mount(&mut Discard)
}

/// Expedited RCU grace periods.
///
/// Cgroup mounts and unmounts wait for several grace periods; expedited ones take microseconds instead of
/// ticks (Documentation/RCU, rcu_expedited in sysfs).
pub struct ExpeditedRcu {
    switch: OwnedFd,
    /// The value of the switch before.
    before: [u8; 1],
}

impl ExpeditedRcu {
    /// Enables them; `None` on a kernel without the switch, where the boot is slower.
    pub fn begin() -> Option<Self> {
        let switch = files::open(c"/sys/kernel/rcu_expedited", OFlags::RDWR).ok()?;
        let mut before = [0];
        // Writes to a sysfs attribute ignore the file position.
        files::read(&switch, &mut before).ok()?;
        files::write(&switch, b"1").ok()?;
        Some(Self { switch, before })
    }

    /// Restores the value from before. Returns the sysfs file, for the shutdown.
    pub fn end(self) -> OwnedFd {
        // Writing back a value that was just read does not fail.
        let _written = files::write(&self.switch, &self.before);
        self.switch
    }
}
