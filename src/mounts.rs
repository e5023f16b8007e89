//! The kernel's own file systems.
//!
//! They are mounted in the initramfs, beside everything else that waits during boot, and moved
//! with all that is mounted in them when the root is there.

use crate::task::{Outcome, name};
use crate::why;
use core::ffi::CStr;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// One mount.
struct Mount {
    source: &'static CStr,
    target: &'static CStr,
    kind: &'static CStr,
    flags: MountFlags,
    data: Option<&'static CStr>,
    required: bool,
}

impl Mount {
    /// A required mount of a file system that needs no source and no data.
    const fn new(target: &'static CStr, kind: &'static CStr, flags: MountFlags) -> Self {
        Self {
            source: kind,
            target,
            kind,
            flags,
            data: None,
            required: true,
        }
    }

    const fn data(self, data: &'static CStr) -> Self {
        Self {
            data: Some(data),
            ..self
        }
    }

    /// A kernel without it gets a warning.
    const fn optional(self) -> Self {
        Self {
            required: false,
            ..self
        }
    }

    fn make(&self) -> Result<(), Errno> {
        make_directory(self.target, 0o755)?;
        // "Already mounted" is success.
        match rustix::mount::mount(self.source, self.target, self.kind, self.flags, self.data) {
            Err(Errno::BUSY) => Ok(()),
            other => other,
        }
    }

    fn make_or_warn(&self, warn: &mut dyn FnMut(Line)) -> Outcome {
        match self.make() {
            Err(errno) if self.required => {
                Err(errno).map_err(why!("mount ", self.kind, " on ", self.target))
            }
            Err(errno) => {
                warn(text!(
                    "no ",
                    self.kind,
                    " on ",
                    self.target,
                    ": ",
                    name(errno)
                ));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

const NODEV: MountFlags = MountFlags::NODEV;
const NOEXEC: MountFlags = MountFlags::NOEXEC;
const NOSUID: MountFlags = MountFlags::NOSUID;
const STRICT: MountFlags = NODEV.union(NOEXEC).union(NOSUID);

const DEV: Mount = Mount::new(c"/dev", c"devtmpfs", NOSUID).data(c"mode=0755");
const SYS: Mount = Mount::new(c"/sys", c"sysfs", STRICT);

const REST: [Mount; 7] = [
    Mount::new(c"/proc", c"proc", STRICT),
    Mount::new(
        c"/dev/pts",
        c"devpts",
        NOEXEC.union(NOSUID).union(MountFlags::NOATIME),
    )
    .data(c"mode=0620,gid=5,ptmxmode=666"),
    Mount::new(c"/dev/shm", c"tmpfs", NOSUID.union(NODEV)).data(c"mode=1777"),
    Mount::new(c"/run", c"tmpfs", NOSUID.union(NODEV)).data(c"mode=0755"),
    Mount::new(c"/dev/mqueue", c"mqueue", STRICT).optional(),
    Mount::new(c"/dev/hugepages", c"hugetlbfs", MountFlags::RELATIME)
        .data(c"pagesize=2M")
        .optional(),
    Mount::new(
        c"/proc/sys/fs/binfmt_misc",
        c"binfmt_misc",
        MountFlags::RELATIME,
    )
    .optional(),
];

/// The trees to move onto the root, each with what is mounted in it.
pub const TREES: [&CStr; 4] = [c"/dev", c"/sys", c"/proc", c"/run"];

/// Device nodes, before anything else: there is no console without them.
pub fn devices() -> Outcome {
    DEV.make().map_err(why!("mount devtmpfs on /dev"))
}

/// sysfs, where expedited grace periods are switched on.
pub fn sysfs() -> Outcome {
    SYS.make().map_err(why!("mount sysfs on /sys"))
}

/// Everything else that is not a cgroup.
pub fn rest(warn: &mut dyn FnMut(Line)) -> Outcome {
    for mount in &REST {
        mount.make_or_warn(warn)?;
    }
    make_directory(c"/run/lock", 0o1777).map_err(why!("create /run/lock"))?;
    for (target, link) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
    ] {
        match rustix::fs::symlink(target, link) {
            Err(Errno::EXIST) => {}
            other => other.map_err(why!("link ", link))?,
        }
    }
    Ok(())
}

/// A v1 hierarchy's directory and its controllers.
const CONTROLLERS: [(&CStr, &CStr); 10] = [
    (c"/sys/fs/cgroup/net_cls,net_prio", c"net_cls,net_prio"),
    (c"/sys/fs/cgroup/hugetlb", c"hugetlb"),
    (c"/sys/fs/cgroup/pids", c"pids"),
    (c"/sys/fs/cgroup/freezer", c"freezer"),
    (c"/sys/fs/cgroup/cpu,cpuacct", c"cpu,cpuacct"),
    (c"/sys/fs/cgroup/devices", c"devices"),
    (c"/sys/fs/cgroup/blkio", c"blkio"),
    (c"/sys/fs/cgroup/memory", c"memory"),
    (c"/sys/fs/cgroup/perf_event", c"perf_event"),
    (c"/sys/fs/cgroup/cpuset", c"cpuset"),
];

/// The hybrid cgroup tree: v2 on `unified`, and a v1 hierarchy a controller.
pub fn cgroups(warn: &mut dyn FnMut(Line)) -> Outcome {
    let strict = STRICT.union(MountFlags::RELATIME);
    Mount::new(c"/sys/fs/cgroup", c"tmpfs", STRICT)
        .data(c"mode=755")
        .make_or_warn(warn)?;
    Mount::new(c"/sys/fs/cgroup/unified", c"cgroup2", strict)
        .data(c"nsdelegate")
        .optional()
        .make_or_warn(warn)?;
    for (target, controllers) in CONTROLLERS {
        Mount::new(target, c"cgroup", strict)
            .data(controllers)
            .optional()
            .make_or_warn(warn)?;
    }
    Ok(())
}

/// Creates a directory with exactly this mode; one that is there keeps its own.
pub fn make_directory(path: &CStr, mode: u32) -> Result<(), Errno> {
    /// What PID 1's umask takes away (INIT_FS, include/linux/init_task.h).
    const UMASK: u32 = 0o022;
    let bits = Mode::from_raw_mode(mode);
    match rustix::fs::mkdir(path, bits) {
        Ok(()) if mode & UMASK != 0 => rustix::fs::chmod(path, bits),
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Creates a directory and those above it that are missing, with mode 0755.
pub fn make_directories(path: &[u8]) -> Result<(), Errno> {
    let mut prefix = heapless::Vec::<u8, { pigeon_init::config::PATH }>::new();
    for part in path.split_inclusive(|byte| *byte == b'/') {
        prefix
            .extend_from_slice(part)
            .map_err(|_| Errno::NAMETOOLONG)?;
        match rustix::fs::mkdirat(CWD, &prefix[..], Mode::from_raw_mode(0o755)) {
            // What is in the way of the next part, or of the use of the last, says so itself.
            Ok(()) | Err(Errno::EXIST | Errno::ISDIR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Whether the path leads to something.
pub fn exists(path: &CStr) -> bool {
    rustix::fs::statat(CWD, path, AtFlags::empty()).is_ok()
}

/// Expedited RCU grace periods, while boot waits for them; the value before is put back on drop.
///
/// The kernel waits several grace periods in cgroup mounts and unmounts; expedited ones take
/// microseconds instead of ticks (Documentation/RCU, rcu_expedited in sysfs).
pub struct Expedited {
    /// The switch, held open across the change of root, and its value before.
    switch: Option<(OwnedFd, [u8; 1])>,
}

impl Expedited {
    /// Switches them on; a kernel without the switch boots slower.
    pub fn on() -> Self {
        let path = c"/sys/kernel/rcu_expedited";
        let switch = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        Self {
            switch: switch.ok().and_then(|switch| {
                let mut before = [0];
                rustix::io::pread(&switch, &mut before, 0).ok()?;
                rustix::io::pwrite(&switch, b"1", 0).ok()?;
                Some((switch, before))
            }),
        }
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        if let Some((switch, before)) = &self.switch {
            // A value just read is taken back.
            let _written = rustix::io::pwrite(switch, before, 0);
        }
    }
}
