//! What is prepared for the workload once the API is up: volumes, names, network.
//!
//! What may wait for a device runs in a child.

use crate::task::{Outcome, Report};
use crate::why;
use crate::{files, interface, mounts, root};
use core::ffi::CStr;
use pigeon_init::accounts::Identity;
use pigeon_init::config::Config;
use pigeon_init::etc;
use pigeon_init::text;
use pigeon_init::text::Line;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, statat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Whether anything of this may wait for a disk.
pub fn may_block(config: &Config) -> bool {
    config.mounts().next().is_some()
        || config.etc_hosts().next().is_some()
        || !config.nameservers().is_empty()
}

/// Steps 11 and 12, but for the host name.
pub fn disks(config: &Config, identity: &Identity, scratch: &mut [u8], report: &Report) -> Outcome {
    volumes(config, identity, report)?;
    hosts(config, scratch, report)?;
    name_servers(config, report)
}

/// The host name and step 13: calls that do not wait for anything.
pub fn network(config: &Config, warn: impl FnMut(Line)) -> Outcome {
    host_name(config)?;
    interface::configure(config, warn)
}

fn volumes(config: &Config, identity: &Identity, report: &Report) -> Outcome {
    for mount in config.mounts() {
        let target = mount.mount_path.c_str();
        mounts::make_directories(target.to_bytes()).map_err(why!("create ", mount.mount_path))?;
        // Links of the root are followed, as everywhere in it, but not onto what the end needs.
        for tree in mounts::TREES.into_iter().chain([c"/"]) {
            if same(target, tree) {
                return Err(text!("mount on ", target, ": would hide ", tree));
            }
        }
        root::mount_volume(mount.device_path.c_str(), target, report)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let owned = rustix::fs::open(target, flags, Mode::empty()).and_then(|directory| {
            let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
            rustix::fs::fchown(&directory, Some(uid), Some(gid))
        });
        unless_read_only(owned, report).map_err(why!("change the owner of ", mount.mount_path))?;
    }
    Ok(())
}

/// Whether two paths lead to the same directory.
fn same(one: &CStr, other: &CStr) -> bool {
    let identity =
        |path| statat(CWD, path, AtFlags::empty()).map(|stat| (stat.st_dev, stat.st_ino));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

fn host_name(config: &Config) -> Outcome {
    if config.hostname().is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(config.hostname().bytes()).map_err(why!("set the host name"))
}

fn hosts(config: &Config, scratch: &mut [u8], report: &Report) -> Outcome {
    if config.etc_hosts().next().is_none() {
        return Ok(());
    }
    let old = files::read_whole(c"/etc/hosts", scratch)?;
    mounts::make_directories(b"/etc").map_err(why!("create /etc"))?;
    let written = files::replace(c"/etc/hosts", c"/etc/.hosts.pigeon", &mut |file| {
        etc::hosts(old, config.etc_hosts(), |piece| file.put(piece))
    });
    unless_read_only(written, report).map_err(why!("write /etc/hosts"))
}

fn name_servers(config: &Config, report: &Report) -> Outcome {
    if config.nameservers().is_empty() {
        return Ok(());
    }
    mounts::make_directories(b"/etc").map_err(why!("create /etc"))?;
    let written = files::replace(
        c"/etc/resolv.conf",
        c"/etc/.resolv.conf.pigeon",
        &mut |file| etc::resolv(config.nameservers(), |piece| file.put(piece)),
    );
    unless_read_only(written, report).map_err(why!("write /etc/resolv.conf"))
}

/// A root or volume that is mounted read-only keeps what it has; that is worth a warning.
fn unless_read_only(result: Result<(), Errno>, report: &Report) -> Result<(), Errno> {
    match result {
        Err(Errno::ROFS) => {
            report.warn(text!("the file system is read-only: left as it is"));
            Ok(())
        }
        other => other,
    }
}
