//! Freezes and thaws all processes (the freezer of cgroup v2, Documentation/admin-guide/cgroup-v2.rst).
//! Runs in helpers, which are in the root cgroup like PID 1: that one is never frozen.

use crate::context;
use crate::error::Result;
use crate::sys::{self, Stopwatch, files};
use core::ffi::CStr;
use core::fmt::Write;
use proto::bytes::split;
use proto::message::{Message, ToLossy};
use proto::process_stat;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, OFlags, XattrFlags};
use rustix::io::Errno;

/// Marks a group that was frozen here, and not by another process before.
const FROZEN_XATTR: &CStr = c"trusted.pigeon.frozen";

/// Once a list of processes is this long, in bytes, no more are added.
const NAMES: usize = 128;

/// Maximum number of groups waiting to be visited: with more, some processes are not counted.
const GROUPS: usize = 512;

/// The directories that freezing needs.
pub struct Freezer<'a> {
    /// The root of cgroup v2.
    pub root: &'a OwnedFd,
    /// The group that the root cgroup's processes are moved to.
    pub workload: Option<&'a OwnedFd>,
    /// /proc
    pub proc: &'a OwnedFd,
}

impl Freezer<'_> {
    /// Freezes every group below the root, and waits until all their processes have stopped. Returns the
    /// number of frozen processes, or `None` after `timeout` milliseconds; then `running` names those that
    /// are not frozen.
    pub fn freeze(&self, timeout: u64, running: &mut Message) -> Result<Option<usize>> {
        let watch = Stopwatch::start();
        self.move_self_to_root()
            .map_err(context!("leave the cgroup that PID 1 was moved to"))?;
        loop {
            let mut is_frozen = self.freeze_groups(None)?;
            if is_frozen {
                // A process that is moved into a frozen group gets frozen soon.
                *running = Message::new();
                self.move_root_processes(running);
                is_frozen = running.is_empty();
            }
            if is_frozen {
                return Ok(Some(self.count()));
            }
            if watch.elapsed() >= timeout {
                if running.is_empty() {
                    self.freeze_groups(Some(running))?;
                }
                return Ok(None);
            }
            sys::sleep(1);
        }
    }

    /// Moves PID 1 and this helper back to the root cgroup, if root has moved PID 1: the start script of
    /// Docker in Docker moves all processes.
    fn move_self_to_root(&self) -> Result<(), Errno> {
        if has_line(self.proc, c"self/cgroup", b"0::/")? {
            return Ok(());
        }
        files::write_at(self.root, c"cgroup.procs", b"0")?;
        files::write_at(self.root, c"cgroup.procs", b"1")
    }

    /// Moves the processes of the root cgroup to the workload's, and names them: all but PID 1 and its
    /// helpers, which run this program, and kernel threads, which run none.
    fn move_root_processes(&self, running: &mut Message) {
        let own = self.program(b"self");
        each_process(self.root, &mut |pid| {
            let program = self.program(pid);
            if program.is_none() || program == own {
                return;
            }
            let moved = self
                .workload
                .ok_or(Errno::NOENT)
                .and_then(|group| files::write_at(group, c"cgroup.procs", pid));
            self.describe(pid, false, running);
            if let Err(errno) = moved {
                let name = crate::error::name(errno);
                let _ = write!(running, " cannot be moved to the workload's cgroup: {name}");
            }
        });
    }

    /// Identifies the program of a process; kernel threads and zombies have none.
    fn program(&self, pid: &[u8]) -> Option<(u64, u64)> {
        let mut path = [0; 32];
        let path = files::join(&[pid, b"/exe"], &mut path)?;
        files::identify(self.proc.as_fd(), path, AtFlags::empty()).ok()
    }

    /// Freezes the groups that are not frozen yet, and names the processes that still run. Returns whether
    /// all are frozen.
    fn freeze_groups(&self, mut running: Option<&mut Message>) -> Result<bool> {
        let (mut is_frozen, mut result) = (true, Ok(()));
        self.each_group(&mut |name, group| match freeze_group(group) {
            // It was removed meanwhile.
            Ok(true) | Err(Errno::NOENT | Errno::NODEV) => {}
            Ok(false) => {
                is_frozen = false;
                if let Some(running) = &mut running {
                    self.each_process_below(group, &mut |pid| self.describe(pid, true, running));
                    if running.is_empty() {
                        let _ = write!(running, "the cgroup {}", name.lossy());
                    }
                }
            }
            Err(errno) => {
                result = Err(context!("freeze the cgroup {}", name.lossy())(errno));
            }
        });
        result.map(|()| is_frozen)
    }

    /// Thaws what was frozen here.
    pub fn thaw(&self) -> Result {
        let mut result = Ok(());
        self.each_group(&mut |name, group| {
            let mut value = [0];
            if rustix::fs::fgetxattr(group, FROZEN_XATTR, &mut value).is_ok() {
                let thawed = files::write_at(group, c"cgroup.freeze", b"0")
                    .and_then(|()| rustix::fs::fremovexattr(group, FROZEN_XATTR));
                if let Err(errno) = thawed {
                    result = Err(context!("thaw the cgroup {}", name.lossy())(errno));
                }
            }
        });
        result
    }

    /// Calls `visit` with each group directly below the root.
    fn each_group(&self, visit: &mut dyn FnMut(&CStr, &OwnedFd)) {
        files::each_directory(self.root, &mut |name| {
            if let Ok(group) = files::open_at(self.root, name, OFlags::DIRECTORY) {
                visit(name, &group);
            }
        });
    }

    fn count(&self) -> usize {
        let mut count = 0;
        self.each_group(&mut |_, group| self.each_process_below(group, &mut |_| count += 1));
        count
    }

    /// Calls `visit` with each process of a group and of those below it.
    fn each_process_below(&self, group: &OwnedFd, visit: &mut dyn FnMut(&[u8])) {
        let mut groups = heapless::Vec::<OwnedFd, GROUPS>::new();
        let enter = |group: &OwnedFd, name: &CStr, groups: &mut heapless::Vec<_, GROUPS>| {
            if let Ok(group) = files::open_at(group, name, OFlags::DIRECTORY) {
                let _counted = groups.push(group);
            }
        };
        enter(group, c".", &mut groups);
        while let Some(group) = groups.pop() {
            each_process(&group, visit);
            files::each_directory(&group, &mut |name| enter(&group, name, &mut groups));
        }
    }

    /// Appends `dd (71)` to a comma-separated list; with `running`, only a process that is not sleeping, as
    /// frozen ones are.
    fn describe(&self, pid: &[u8], running: bool, list: &mut Message) {
        let mut text = [0; 512];
        if list.as_bytes().len() < NAMES
            && let Some((name, state)) = self.state(pid, &mut text)
            && (!running || matches!(state, b'R' | b'D'))
        {
            let separator = if list.is_empty() { "" } else { ", " };
            let _ = write!(list, "{separator}{} ({})", name.lossy(), pid.lossy());
        }
    }

    /// A process's name and state.
    fn state<'t>(&self, pid: &[u8], text: &'t mut [u8]) -> Option<(&'t [u8], u8)> {
        let mut path = [0; 32];
        let path = files::join(&[pid, b"/stat"], &mut path)?;
        process_stat::parse(files::read_at(self.proc, path, text).ok()?)
    }
}

/// Freezes a group. Returns whether it was frozen before and all its processes have stopped: until then,
/// one of them may make another group.
fn freeze_group(group: &OwnedFd) -> Result<bool, Errno> {
    if has_line(group, c"cgroup.freeze", b"1")? {
        return has_line(group, c"cgroup.events", b"frozen 1");
    }
    rustix::fs::fsetxattr(group, FROZEN_XATTR, b"1", XattrFlags::empty())?;
    files::write_at(group, c"cgroup.freeze", b"1")?;
    Ok(false)
}

/// Whether the first KiB of one of the kernel's files has this line.
fn has_line(directory: &OwnedFd, path: &CStr, wanted: &[u8]) -> Result<bool, Errno> {
    let mut text = [0; 1024];
    let mut lines = split(files::read_at(directory, path, &mut text)?, b'\n');
    Ok(lines.any(|line| line == wanted))
}

/// Calls `visit` with the pid of each process in a group.
fn each_process(group: &OwnedFd, visit: &mut dyn FnMut(&[u8])) {
    let Ok(file) = files::open_at(group, c"cgroup.procs", OFlags::RDONLY) else {
        return;
    };
    let mut number = heapless::Vec::<u8, 16>::new();
    let mut piece = [0; 1024];
    // A threaded group lists none (EOPNOTSUPP): its domain does.
    while let Ok(count @ 1..) = files::read(&file, &mut piece) {
        for &byte in piece.get(..count).unwrap_or(&[]) {
            if byte != b'\n' {
                let _fits = number.push(byte);
                continue;
            }
            visit(&number);
            number.clear();
        }
    }
}
