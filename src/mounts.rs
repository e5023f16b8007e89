//! The kernel's own file systems.
//!
//! They are mounted in the initramfs, beside everything else that waits during boot, and moved
//! with all that is mounted in them when the root is there.

use crate::task::{Outcome, failure};
use crate::why;
use crate::{files, sys};
use core::ffi::CStr;
use pigeon_init::bytes::split;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// One mount, of a file system that needs no source.
struct Mount {
    kind: &'static CStr,
    target: &'static CStr,
    /// Empty is none.
    data: &'static CStr,
    flags: MountFlags,
    /// A kernel without one that is not gets a warning.
    required: bool,
}

impl Mount {
    /// A required mount.
    const fn new(
        target: &'static CStr,
        kind: &'static CStr,
        flags: MountFlags,
        data: &'static CStr,
    ) -> Self {
        Self {
            kind,
            target,
            data,
            flags,
            required: true,
        }
    }

    const fn optional(self) -> Self {
        Self {
            required: false,
            ..self
        }
    }

    #[inline(never)]
    fn make(&self, warn: &mut dyn FnMut(Line)) -> Outcome {
        let data = Some(self.data).filter(|data| !data.is_empty());
        let made = make_directory(self.target, 0o755).and_then(|()| {
            rustix::mount::mount(self.kind, self.target, self.kind, self.flags, data)
        });
        let errno = match made {
            // "Already mounted" is success.
            Ok(()) | Err(Errno::BUSY) => return Ok(()),
            Err(errno) => errno,
        };
        let verb = if self.required { "mount " } else { "no " };
        let why = failure(errno, text!("%% on %", verb, self.kind, self.target));
        if self.required {
            return Err(why);
        }
        warn(why);
        Ok(())
    }
}

const NODEV: MountFlags = MountFlags::NODEV;
const NOEXEC: MountFlags = MountFlags::NOEXEC;
const NOSUID: MountFlags = MountFlags::NOSUID;
const STRICT: MountFlags = NODEV.union(NOEXEC).union(NOSUID);

static DEV: Mount = Mount::new(c"/dev", c"devtmpfs", NOSUID, c"mode=0755");
static SYS: Mount = Mount::new(c"/sys", c"sysfs", STRICT, c"");

static REST: [Mount; 7] = [
    Mount::new(c"/proc", c"proc", STRICT, c""),
    Mount::new(
        c"/dev/pts",
        c"devpts",
        NOEXEC.union(NOSUID).union(MountFlags::NOATIME),
        c"mode=0620,gid=5,ptmxmode=666",
    ),
    Mount::new(c"/dev/shm", c"tmpfs", NOSUID.union(NODEV), c"mode=1777"),
    Mount::new(c"/run", c"tmpfs", NOSUID.union(NODEV), c"mode=0755"),
    Mount::new(c"/dev/mqueue", c"mqueue", STRICT, c"").optional(),
    Mount::new(
        c"/dev/hugepages",
        c"hugetlbfs",
        MountFlags::RELATIME,
        c"pagesize=2M",
    )
    .optional(),
    Mount::new(
        c"/proc/sys/fs/binfmt_misc",
        c"binfmt_misc",
        MountFlags::RELATIME,
        c"",
    )
    .optional(),
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
pub fn devices() -> Outcome {
    DEV.make(&mut drop)
}

/// sysfs, where expedited grace periods are switched on.
pub fn sysfs() -> Outcome {
    SYS.make(&mut drop)
}

/// Everything else that is not a cgroup.
pub fn rest(warn: &mut dyn FnMut(Line)) -> Outcome {
    for mount in &REST {
        mount.make(warn)?;
    }
    make_directory(c"/run/lock", 0o1777).map_err(why!("create /run/lock"))?;
    for (link, target) in &LINKS {
        match rustix::fs::symlink(*target, *link) {
            Err(Errno::EXIST) => {}
            other => other.map_err(why!("link ", link))?,
        }
    }
    Ok(())
}

static CGROUPS: [Mount; 2] = [
    Mount::new(c"/sys/fs/cgroup", c"tmpfs", STRICT, c"mode=755"),
    Mount::new(
        c"/sys/fs/cgroup/unified",
        c"cgroup2",
        STRICT.union(MountFlags::RELATIME),
        c"nsdelegate",
    )
    .optional(),
];

/// The v1 hierarchies' directories, named after their controllers.
const CONTROLLERS: [&CStr; 10] = [
    c"/sys/fs/cgroup/net_cls,net_prio",
    c"/sys/fs/cgroup/hugetlb",
    c"/sys/fs/cgroup/pids",
    c"/sys/fs/cgroup/freezer",
    c"/sys/fs/cgroup/cpu,cpuacct",
    c"/sys/fs/cgroup/devices",
    c"/sys/fs/cgroup/blkio",
    c"/sys/fs/cgroup/memory",
    c"/sys/fs/cgroup/perf_event",
    c"/sys/fs/cgroup/cpuset",
];

/// The hybrid cgroup tree: v2 on `unified`, and a v1 hierarchy a controller.
pub fn cgroups(warn: &mut dyn FnMut(Line)) -> Outcome {
    for mount in &CGROUPS {
        mount.make(warn)?;
    }
    for target in CONTROLLERS {
        let controllers = files::behind(target, "/sys/fs/cgroup/".len());
        Mount::new(
            target,
            c"cgroup",
            STRICT.union(MountFlags::RELATIME),
            controllers,
        )
        .optional()
        .make(warn)?;
    }
    Ok(())
}

/// Creates a directory with exactly this mode; one that is there keeps its own.
#[inline(never)]
pub fn make_directory(path: &CStr, mode: u32) -> Result<(), Errno> {
    /// What PID 1's umask takes away (INIT_FS, include/linux/init_task.h).
    const UMASK: u32 = 0o022;
    let bits = Mode::from_raw_mode(mode);
    match rustix::fs::mkdir(path, bits) {
        Ok(()) if mode & UMASK != 0 => rustix::fs::chmod(path, bits),
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Creates a directory and those above it that are missing, with mode 0755.
#[inline(never)]
pub fn make_directories(path: &[u8]) -> Result<(), Errno> {
    let mut prefix = files::Path::new();
    for part in split(path, b'/') {
        let fits =
            prefix.extend_from_slice(part).is_ok() && prefix.extend_from_slice(b"/\0").is_ok();
        if !fits {
            return Err(Errno::NAMETOOLONG);
        }
        match make_directory(sys::c_str(&prefix), 0o755) {
            // What is in the way of the next part, or of the use of the last, says so itself.
            Ok(()) | Err(Errno::ISDIR) => {}
            other => return other,
        }
        prefix.pop();
    }
    Ok(())
}

/// Whether the path leads to something.
pub fn exists(path: &CStr) -> bool {
    rustix::fs::access(path, Access::EXISTS).is_ok()
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
        let switch = files::open(c"/sys/kernel/rcu_expedited", OFlags::RDWR);
        Self {
            switch: switch.ok().and_then(|switch| {
                let mut before = [0];
                // Attributes of sysfs are written whole, wherever the file stands.
                files::read(&switch, &mut before).ok()?;
                files::write(&switch, b"1").ok()?;
                Some((switch, before))
            }),
        }
    }
}

impl Drop for Expedited {
    #[inline(never)]
    fn drop(&mut self) {
        if let Some((switch, before)) = &self.switch {
            // A value just read is taken back.
            let _written = files::write(switch, before);
        }
    }
}
