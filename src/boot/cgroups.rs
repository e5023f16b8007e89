//! Control groups (cgroups(7)): the hierarchies, and the groups of the workload and of commands.

use crate::boot::mounts;
use crate::context;
use crate::context::Cgroups;
use crate::error::{Log, Result};
use crate::sys::{self, files};
use core::ffi::CStr;
use proto::bytes::words;
use proto::message::ToLossy;
use proto::users::Identity;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, move_mount};
use rustix::process::{Gid, Uid};

/// Which hierarchies are mounted: the kernel parameter `PIGEON_CGROUPS`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// v1 hierarchies with the controllers, and v2 without any on `unified`, as in systemd's hybrid layout.
    Hybrid,
    /// v2 alone, with all controllers.
    Unified,
    /// None.
    None,
}

/// The v1 hierarchies: each is a directory named after its controllers.
const V1: [&CStr; 10] = [
    c"net_cls,net_prio",
    c"hugetlb",
    c"pids",
    c"freezer",
    c"cpu,cpuacct",
    c"devices",
    c"blkio",
    c"memory",
    c"perf_event",
    c"cpuset",
];

/// The group of the v2 hierarchy that the workload is started in.
const WORKLOAD: &CStr = c"workload";
/// The group of commands.
const COMMANDS: &CStr = c"commands";

/// The files of a group that its owner needs for delegation (cgroups(7)).
const DELEGATED: [&CStr; 4] = [
    c".",
    c"cgroup.procs",
    c"cgroup.subtree_control",
    c"cgroup.threads",
];

impl Layout {
    /// Where the v2 hierarchy is mounted.
    fn v2(self) -> &'static CStr {
        match self {
            Self::Hybrid => c"/sys/fs/cgroup/unified",
            _ => mounts::CGROUP,
        }
    }
}

/// Mounts the hierarchies and makes the workload's group. Logs a warning for what the kernel lacks.
pub fn mount(layout: Layout, log: &mut dyn Log) {
    let v1 = match layout {
        Layout::None => return,
        Layout::Hybrid => mounts::mount_cgroup_tmpfs().and_then(|()| mount_v1(log)),
        Layout::Unified => Ok(()),
    };
    match v1.and_then(|()| mounts::mount_cgroup2(layout.v2())) {
        Ok(()) => make_workload(layout, log),
        Err(why) => log.warn(&why),
    }
}

fn mount_v1(log: &mut dyn Log) -> Result {
    let directory = open_directory(mounts::CGROUP).map_err(context!("open /sys/fs/cgroup"))?;
    for name in &V1 {
        if let Err(errno) = mount_hierarchy(&directory, name) {
            log.warn(&context!("mount cgroup on /sys/fs/cgroup/{}", name.lossy())(errno));
        }
    }
    Ok(())
}

/// Uses the mount API, with which the kernel does not log a message about an unknown controller.
fn mount_hierarchy(parent: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_RELATIME;
    match make_directory(parent, name) {
        Ok(()) => {}
        // Mounted already.
        Err(Errno::EXIST) => return Ok(()),
        other => return other,
    }
    let hierarchy = sys::mount::instance(c"cgroup", name.to_bytes(), attributes)?;
    let from_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&hierarchy, c"", parent, name, from_descriptor)
}

/// Makes the workload's group, and in the unified layout enables all controllers for it.
fn make_workload(layout: Layout, log: &mut dyn Log) {
    let made = open_directory(layout.v2()).and_then(|root| {
        let enabled = match layout {
            Layout::Unified => enable_controllers(&root),
            _ => Ok(()),
        };
        match make_directory(&root, WORKLOAD) {
            Ok(()) | Err(Errno::EXIST) => enabled,
            other => other,
        }
    });
    if let Err(errno) = made {
        log.warn(&context!("make the workload's cgroup")(errno));
    }
}

/// Makes and opens the group of commands. Deferred until the workload runs, as a group with all controllers
/// costs the kernel 0.3 ms. Without it, commands are started in PID 1's group.
pub fn make_commands(cgroups: &mut Cgroups) {
    if let Some(root) = &cgroups.root
        && make_directory(root, COMMANDS).is_ok()
    {
        cgroups.commands = files::open_at(root, COMMANDS, DIRECTORY).ok();
    }
}

/// Buffer size for the line of all controllers, of some 60 bytes.
const LINE: usize = 256;

/// Enables all controllers for child groups, one by one: the kernel applies a write as a whole or not at
/// all, so one that fails must not affect the others.
fn enable_controllers(root: &OwnedFd) -> Result<(), Errno> {
    let (mut names, mut word) = ([0; LINE], [0; LINE]);
    let names = files::read_at(root, c"cgroup.controllers", &mut names)?;
    let file = files::open_at(root, c"cgroup.subtree_control", OFlags::WRONLY)?;
    let mut enabled = Ok(());
    for name in words(names) {
        let word = files::join(&[b"+", name], &mut word).unwrap_or_default();
        enabled = files::write(&file, word.to_bytes()).map(drop).and(enabled);
    }
    enabled
}

/// Opens the workload's group and delegates it to the workload's user.
pub fn open(layout: Layout, user: &Identity, log: &mut dyn Log) -> Cgroups {
    let root = match layout {
        Layout::None => return Cgroups::default(),
        _ => open_directory(layout.v2()),
    };
    let Ok(root) = root else {
        return Cgroups::default();
    };
    let workload = files::open_at(&root, WORKLOAD, DIRECTORY).ok();
    if let Some(workload) = &workload
        && let Err(errno) = delegate(workload, user)
    {
        log.warn(&context!("delegate the workload's cgroup")(errno));
    }
    Cgroups {
        workload,
        commands: None,
        root: Some(root),
    }
}

fn delegate(group: &OwnedFd, user: &Identity) -> Result<(), Errno> {
    if user.uid == 0 {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    for &name in &DELEGATED {
        rustix::fs::chownat(group, name, Some(uid), Some(gid), AtFlags::empty())?;
    }
    Ok(())
}

fn make_directory(parent: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY);

fn open_directory(path: &CStr) -> Result<OwnedFd, Errno> {
    files::open(path, DIRECTORY)
}
