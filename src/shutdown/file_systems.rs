//! Unmounts all file systems, the root's last.
//!
//! One child per device, so that a hung device delays no other, and can be named.

use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::shutdown::budget::VOLUMES_TIMEOUT;
use crate::shutdown::detached_fs::{self, KernelFile};
use crate::shutdown::volume::{self, Tables, Volume};
use crate::sys::signal::SIGCHLD;
use crate::sys::{self, Fork, SignalSet, Stopwatch, files};
use core::fmt::Display;
use proto::block::DeviceNumber;
use proto::message::ToLossy;
use proto::mountinfo::{self, Mount, PATH_MAX};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::mount::MountPropagationFlags;
use rustix::process::{Pid, WaitOptions};

/// Maximum number of devices: far more than a VM can have.
const DEVICES: usize = 256;

/// How long a device waits for others that may be backed by it, in milliseconds; the other half of the
/// time is its own.
const DEPENDENTS_TIMEOUT: u64 = VOLUMES_TIMEOUT / 2;

/// Major number of RAM disks, which do not outlive the VM (linux/major.h).
const RAMDISK_MAJOR: u32 = 1;

/// The state of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for other devices.
    Waiting,
    /// A child unmounts it.
    Running(Pid),
    /// Finished, or given up.
    Ended,
}

type Devices = heapless::Vec<(Volume, State), DEVICES>;

/// Leaves every file system clean, and logs those that are not. Runs in a helper.
pub fn quiesce(log: &HelperLog) -> Result {
    let root = files::open(c"/", OFlags::DIRECTORY).map_err(context!("open /"))?;
    // Unmounts must not propagate to other mount namespaces.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    let _propagates = rustix::mount::mount_change(c"/", private);
    let mut devices = Devices::new();
    let tables = match find_devices(&root, &mut devices, log) {
        Ok(tables) => tables,
        Err(error) => {
            // The caller falls back to the kernel's emergency remount, which may not be available.
            if let Err(errno) = volume::remount_read_only(&root) {
                log.warn(&context!("make / read-only")(errno));
            }
            return Err(error!("cannot look for volumes: {error}"));
        }
    };
    warn_unplugged(&devices, &tables, log);
    let in_time = quiesce_all(&mut devices, &tables, log);
    if let Some(volume) = &tables.root {
        log.step(&format_args!("unmounting {}", volume.label(&tables)));
        if let Err(error) = volume.quiesce_root(&tables, &root) {
            log.warn(&error);
        }
    }
    // A hung disk would block this, too.
    if in_time {
        log.step(&"writing all file systems out");
        rustix::fs::sync();
    }
    Ok(())
}

/// Finds the root's device and all others, and makes a node for each in a new tmpfs, which becomes the
/// working directory.
fn find_devices(root: &OwnedFd, devices: &mut Devices, log: &HelperLog) -> Result<Tables> {
    let proc = detached_fs::proc().map_err(context!("mount proc"))?;
    let nodes = detached_fs::mount(c"tmpfs", b"").map_err(context!("mount tmpfs"))?;
    rustix::process::fchdir(&nodes).map_err(context!("enter the nodes' directory"))?;
    let partitions = KernelFile::read(&proc, c"partitions").map_err(context!("read partitions"))?;
    let mounts = KernelFile::read(&proc, c"self/mountinfo").ok();
    let root = rustix::fs::fstat(root).map(|status| volume::number_of(status.st_dev));
    // A root without a device number may be a btrfs, whose mount table entry names the device.
    let root_mount = match (&root, &mounts) {
        (Ok(DeviceNumber { major: 0, .. }), Some(mounts)) => {
            let mut last_first = mounts.lines().rev().filter_map(mountinfo::parse);
            last_first.find(|mount| mount.mount_point.raw() == b"/")
        }
        _ => None,
    };
    let is_root = |volume: &Volume| {
        let is_mounted = |mount| volume.is_mounted_by(mount);
        Ok(volume.number) == root || root_mount.as_ref().is_some_and(is_mounted)
    };
    let mut root_volume = None;
    for line in partitions.lines() {
        let Some(mut volume) = Volume::parse(line) else {
            continue;
        };
        if volume.number.major == RAMDISK_MAJOR {
            continue;
        }
        if let Err(errno) = volume.make_node(&nodes) {
            let name = volume.name().lossy();
            log.warn(&context!("make a node of /dev/{name}")(errno));
            continue;
        }
        if is_root(&volume) {
            root_volume = Some(volume);
            continue;
        }
        volume.find_backing();
        if let Err((volume, _)) = devices.push((volume, State::Waiting)) {
            let name = volume.name().lossy();
            log.warn(&format_args!(
                "over {DEVICES} disks: /dev/{name} is left as it is"
            ));
        }
    }
    Ok(Tables {
        proc,
        mounts,
        root: root_volume,
    })
}

/// Warns of mounted file systems whose device was unplugged: their data cannot be written.
fn warn_unplugged(devices: &Devices, tables: &Tables, log: &HelperLog) {
    if let Some(mounts) = &tables.mounts {
        each_writable_mount(mounts, "lost the device of", &mut |mount, text| {
            let mut volumes = devices.iter().map(|(volume, _)| volume).chain(&tables.root);
            let is_disk = ![0, RAMDISK_MAJOR].contains(&mount.major);
            if is_disk && !volumes.any(|volume| volume.is_mounted_by(mount)) {
                log.warn(text);
            }
        });
    }
}

/// Calls `log` for each file system that has a device and is writable, as `WHAT /data (/dev/vdb)`.
pub fn each_writable_mount(
    mounts: &KernelFile,
    what: &str,
    log: &mut dyn FnMut(&Mount, &dyn Display),
) {
    let mut paths = ([0; PATH_MAX], [0; PATH_MAX]);
    for mount in mounts.lines().filter_map(mountinfo::parse) {
        if (mount.major != 0 || mount.is_btrfs()) && mount.is_writable {
            let target = mount.mount_point.decode(&mut paths.0).text.lossy();
            let source = mount.source.decode(&mut paths.1).text.lossy();
            log(&mount, &format_args!("{what} {target} ({source})"));
        }
    }
}

/// Leaves all devices clean, each in its own child, a device before its backing device. Returns false if
/// some have timed out.
fn quiesce_all(devices: &mut Devices, tables: &Tables, log: &HelperLog) -> bool {
    if all_ended(devices) {
        return true;
    }
    let watch = Stopwatch::start();
    let ended = sys::signalfd(SignalSet::of([SIGCHLD]));
    loop {
        start_all(devices, watch.elapsed() < DEPENDENTS_TIMEOUT, tables, log);
        if all_ended(devices) {
            return true;
        }
        if watch.elapsed() >= VOLUMES_TIMEOUT {
            for (volume, state) in devices.iter() {
                if *state != State::Ended {
                    log.warn(&format_args!(
                        "timed out unmounting {}",
                        volume.label(tables)
                    ));
                }
            }
            return false;
        }
        wait_for_child(ended.as_ref().ok());
        reap(devices, tables, log);
    }
}

fn all_ended(devices: &Devices) -> bool {
    devices.iter().all(|(_, state)| *state == State::Ended)
}

/// Starts the devices that need not wait. With `is_early`, a device also waits for those that may be backed
/// by it.
fn start_all(devices: &mut Devices, is_early: bool, tables: &Tables, log: &HelperLog) {
    for at in 0..devices.len() {
        let Some((volume, State::Waiting)) = devices.get(at) else {
            continue;
        };
        // A disk and its partitions must not be tried at the same time: trying one claims both.
        let waits = devices.iter().any(|(other, state)| {
            *state != State::Ended
                && (other.is_backed_by(volume)
                    || volume.is_partition_of(other) && !volume.is_backed_by(other)
                    || is_early && other.may_be_backed_by(volume))
        });
        if waits {
            continue;
        }
        let quiesce = || {
            if let Err(error) = volume.quiesce(tables) {
                log.warn(&error);
            }
        };
        let running = |(_, state): &(Volume, State)| matches!(state, State::Running(_));
        let state = match sys::fork() {
            Ok(Fork::Child) => {
                quiesce();
                sys::exit(0)
            }
            Ok(Fork::Parent(pid)) => State::Running(pid),
            // Retried when another child has exited.
            Err(_) if devices.iter().any(running) => return,
            Err(_) => {
                log.step(&format_args!("unmounting {}", volume.label(tables)));
                quiesce();
                State::Ended
            }
        };
        if let Some(device) = devices.get_mut(at) {
            device.1 = state;
        }
    }
}

/// Waits for a child to exit, at most a second, so that a pause of the VM uses up only one wait.
fn wait_for_child(ended: Option<&OwnedFd>) {
    match ended {
        Some(ended) => {
            let _waited = sys::is_readable(ended, 1);
            let _signal = sys::read_signal(ended);
        }
        None => sys::sleep(10),
    }
}

fn reap(devices: &mut Devices, tables: &Tables, log: &HelperLog) {
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        for (volume, state) in devices.iter_mut() {
            if *state != State::Running(pid) {
                continue;
            }
            *state = State::Ended;
            if status.exit_status() != Some(0) {
                let label = volume.label(tables);
                log.warn(&format_args!(
                    "{label}: a helper was killed while unmounting"
                ));
            }
        }
    }
}
