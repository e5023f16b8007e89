//! Kills processes that a cgroup keeps alive, and lifts limits that keep PID 1 from forking.

use crate::shutdown::detached_fs::{self, KernelFile};
use crate::sys::files;
use proto::bytes::split;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::process::{Resource, Rlimit};

/// Kills the remaining processes: in each cgroup below the v2 root, and those that a v1 cgroup has
/// frozen. Runs in a helper, after SIGKILL was sent to all.
pub fn kill_remaining() {
    let Ok(proc) = detached_fs::proc() else {
        return;
    };
    leave_cgroups(&proc);
    if let Ok(root) = unified() {
        files::each_directory(&root, &mut |name| {
            let group = files::open_at(&root, name, OFlags::DIRECTORY | OFlags::NOFOLLOW);
            // It includes all descendant cgroups (Documentation/admin-guide/cgroup-v2.rst).
            let _before_5_14 =
                group.and_then(|group| files::write_at(&group, c"cgroup.kill", b"1"));
        });
    }
    // Moving a process to a cgroup that is not frozen thaws it (freezer_attach,
    // kernel/cgroup/legacy_freezer.c), and it dies of the pending signal.
    if let Some(freezer) = hierarchy(&proc, b"freezer") {
        files::each_directory(&proc, &mut |name| {
            if name.to_bytes().iter().all(u8::is_ascii_digit) {
                let _kernel_thread = files::write_at(&freezer, c"cgroup.procs", name.to_bytes());
            }
        });
    }
}

/// Lifts limits that root may have set on PID 1 (prlimit(2)), and that its children inherit.
pub fn lift_resource_limits() {
    let set = |resource, value| {
        let limit = Rlimit {
            current: value,
            maximum: value,
        };
        let _unprivileged = rustix::process::setrlimit(resource, limit);
    };
    set(Resource::As, None);
    set(Resource::Data, None);
    set(Resource::Nofile, Some(1024));
}

/// Removes what may keep PID 1 from forking: its cgroup's limits, and system-wide ones.
pub fn allow_forks() {
    let Ok(proc) = detached_fs::proc() else {
        return;
    };
    leave_cgroups(&proc);
    // The kernel's default pid_max (linux/threads.h); the kernel caps threads-max by its memory.
    let _lower = files::write_at(&proc, c"sys/kernel/pid_max", b"32768");
    let _lower = files::write_at(&proc, c"sys/kernel/threads-max", b"32768");
}

/// Moves this process to the root of each hierarchy that may limit it.
fn leave_cgroups(proc: &OwnedFd) {
    let leave = |root: Option<OwnedFd>| {
        if let Some(root) = root {
            let _there_already = files::write_at(&root, c"cgroup.procs", b"0");
        }
    };
    leave(unified().ok());
    leave(hierarchy(proc, b"pids"));
    leave(hierarchy(proc, b"memory"));
}

/// The root of cgroup v2.
fn unified() -> rustix::io::Result<OwnedFd> {
    detached_fs::mount(c"cgroup2", b"")
}

/// The root of the v1 hierarchy with this controller, which can only be mounted with all of its
/// controllers (proc_pid_cgroup(5)).
fn hierarchy(proc: &OwnedFd, controller: &[u8]) -> Option<OwnedFd> {
    let hierarchies = KernelFile::read(proc, c"self/cgroup").ok()?;
    // `4:cpu,cpuacct:/path`
    let controllers = hierarchies.lines().find_map(|line| {
        let controllers = split(line, b':').nth(1)?;
        let found = split(controllers, b',').any(|one| one == controller);
        found.then_some(controllers)
    })?;
    detached_fs::mount(c"cgroup", controllers).ok()
}
