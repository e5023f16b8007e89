//! The kernel's own file systems.
//!
//! They are mounted in the initramfs, beside everything else that waits during boot, and moved
//! with all that is mounted in them when the root is there.

use crate::context;
use crate::error;
use crate::error::{Discard, Log, Result};
use crate::sys::List;
use crate::sys::files;
use core::ffi::CStr;
use proto::message::ToLossy;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// One mount, of a file system that needs no source.
struct Mount {
    /// Its kind, where, and its options, as in fstab(5); each ends with NUL.
    words: &'static [u8],
    flags: MountFlags,
    /// A kernel without one that is not gets a warning.
    required: bool,
}

impl Mount {
    const fn required(words: &'static [u8], flags: MountFlags) -> Self {
        Self {
            words,
            flags,
            required: true,
        }
    }

    const fn optional(words: &'static [u8], flags: MountFlags) -> Self {
        Self {
            words,
            flags,
            required: false,
        }
    }

    fn make(&self, log: &mut dyn Log) -> Result {
        let mut words = List(self.words);
        let mut word = || words.next().unwrap_or_default();
        match mount(word(), word(), word(), self.flags) {
            Err(why) if self.required => return Err(error!("mount {why}")),
            Err(why) => log.warn(&format_args!("no {why}")),
            Ok(()) => {}
        }
        Ok(())
    }
}

/// Mounts `kind` on a directory, which is made; empty options are none.
fn mount(kind: &CStr, target: &CStr, data: &CStr, flags: MountFlags) -> Result {
    let data = Some(data).filter(|data| !data.is_empty());
    let made = files::make_directory(target, 0o755)
        .and_then(|()| rustix::mount::mount(kind, target, kind, flags, data));
    match made {
        // "Already mounted" is success.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(context!("{} on {}", kind.lossy(), target.lossy())(errno)),
    }
}

const NODEV: MountFlags = MountFlags::NODEV;
const NOEXEC: MountFlags = MountFlags::NOEXEC;
const NOSUID: MountFlags = MountFlags::NOSUID;
const RELATIME: MountFlags = MountFlags::RELATIME;
const STRICT: MountFlags = NODEV.union(NOEXEC).union(NOSUID);

static DEV: Mount = Mount::required(b"devtmpfs\0/dev\0mode=0755\0", NOSUID);
static SYS: Mount = Mount::required(b"sysfs\0/sys\0", STRICT);

static REST: [Mount; 7] = [
    Mount::required(b"proc\0/proc\0", STRICT),
    Mount::required(
        b"devpts\0/dev/pts\0mode=0620,gid=5,ptmxmode=666\0",
        NOEXEC.union(NOSUID).union(MountFlags::NOATIME),
    ),
    Mount::required(b"tmpfs\0/dev/shm\0mode=1777\0", NOSUID.union(NODEV)),
    // Of the memory /dev/shm can have half, and everybody may fill both: /run/lock. A kernel that finds
    // none, and nobody to kill for it, panics.
    Mount::required(b"tmpfs\0/run\0mode=0755,size=10%\0", NOSUID.union(NODEV)),
    Mount::optional(b"mqueue\0/dev/mqueue\0", STRICT),
    Mount::optional(b"hugetlbfs\0/dev/hugepages\0pagesize=2M\0", RELATIME),
    Mount::optional(b"binfmt_misc\0/proc/sys/fs/binfmt_misc\0", RELATIME),
];

/// Links in /dev, each followed by where it leads.
const LINKS: List = List(
    b"/dev/fd\0/proc/self/fd\0\
      /dev/stdin\0/proc/self/fd/0\0\
      /dev/stdout\0/proc/self/fd/1\0\
      /dev/stderr\0/proc/self/fd/2\0",
);

/// The trees to move onto the root, each with what is mounted in it.
pub const TREES: List = List(b"/dev\0/sys\0/proc\0/run\0");

/// Device nodes, before anything else: there is no console without them.
pub fn devices() -> Result {
    DEV.make(&mut Discard)
}

/// sysfs, where expedited grace periods are switched on.
pub fn sysfs() -> Result {
    SYS.make(&mut Discard)
}

/// Everything else that is not a cgroup.
pub fn mount_remaining(log: &mut dyn Log) -> Result {
    for mount in &REST {
        mount.make(log)?;
    }
    files::make_directory(c"/run/lock", 0o1777).map_err(context!("create /run/lock"))?;
    let mut links = LINKS;
    while let (Some(link), Some(target)) = (links.next(), links.next()) {
        match rustix::fs::symlink(target, link) {
            Err(Errno::EXIST) => {}
            other => other.map_err(context!("link {}", link.lossy()))?,
        }
    }
    Ok(())
}

static CGROUPS: [Mount; 2] = [
    Mount::required(b"tmpfs\0/sys/fs/cgroup\0mode=755\0", STRICT),
    Mount::optional(
        b"cgroup2\0/sys/fs/cgroup/unified\0nsdelegate\0",
        STRICT.union(RELATIME),
    ),
];

/// Controllers with a v1 hierarchy, whose directory has their name.
const CONTROLLERS: List = List(
    b"net_cls,net_prio\0hugetlb\0pids\0freezer\0cpu,cpuacct\0devices\0blkio\0memory\0\
      perf_event\0cpuset\0",
);

/// The hybrid cgroup tree: v2 on `unified`, and a v1 hierarchy a controller.
pub fn cgroups(log: &mut dyn Log) -> Result {
    for mount in &CGROUPS {
        mount.make(log)?;
    }
    let mut path = files::Path::new();
    for controllers in CONTROLLERS {
        let parts: [&[u8]; 2] = [b"/sys/fs/cgroup/", controllers.to_bytes()];
        let target = files::join(&parts, &mut path).unwrap_or_default();
        let made = mount(c"cgroup", target, controllers, STRICT.union(RELATIME));
        if let Err(why) = made {
            log.warn(&format_args!("no {why}"));
        }
    }
    Ok(())
}

/// ExpeditedRcu RCU grace periods, while boot waits for them; the value before is put back on drop.
///
/// The kernel waits several grace periods in cgroup mounts and unmounts; expedited ones take
/// microseconds instead of ticks (Documentation/RCU, rcu_expedited in sysfs).
pub struct ExpeditedRcu {
    /// The switch, held open across the change of root, and its value before.
    switch: Option<(OwnedFd, [u8; 1])>,
}

impl ExpeditedRcu {
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

impl Drop for ExpeditedRcu {
    fn drop(&mut self) {
        if let Some((switch, before)) = &self.switch {
            // A value just read is taken back.
            let _written = files::write(switch, before);
        }
    }
}
