//! What is prepared for the workload once the API is up: volumes, names, network.
//!
//! What may wait for a device runs in a child.

use crate::sys::{self, List};
use crate::task::{Outcome, Report};
use crate::why;
use crate::{files, interface, mounts, root};
use core::ffi::CStr;
use pigeon_init::accounts::Identity;
use pigeon_init::config::{Config, DOCUMENT};
use pigeon_init::etc::{self, Contents};
use pigeon_init::text;
use pigeon_init::text::Line;
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
    name_servers(config, scratch, report)
}

/// The host name and step 13: calls that do not wait for anything.
pub fn network(config: &Config, warn: &mut dyn FnMut(Line)) -> Outcome {
    host_name(config)?;
    interface::configure(config, warn)
}

fn volumes(config: &Config, identity: &Identity, report: &Report) -> Outcome {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    for mount in config.mounts() {
        let target = sys::c_str(mount.mount_path.bytes_with_nul());
        mounts::make_directories(target.to_bytes()).map_err(why!("create ", target))?;
        // Links of the root are followed, as everywhere in it, but not onto what the end needs.
        let place = identify(target);
        for needed in NEEDED {
            if place.is_some() && place == identify(needed) {
                return Err(text!("mount on %: would hide %", target, needed));
            }
        }
        let device = sys::c_str(mount.device_path.bytes_with_nul());
        root::mount_volume(device, target, report)?;
        let owned = rustix::fs::chown(target, Some(uid), Some(gid));
        unless_read_only(owned, target, report).map_err(why!("change the owner of ", target))?;
    }
    Ok(())
}

/// What no volume may hide.
const NEEDED: List = List(b"/\0/dev\0/sys\0/proc\0/run\0");

/// What two paths to one directory have in common: its device and its number there.
#[inline(never)]
fn identify(path: &CStr) -> Option<(u64, u64)> {
    let status = rustix::fs::stat(path).ok()?;
    Some((status.st_dev, status.st_ino))
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
    let path = c"/etc/hosts";
    let (old, new) = scratch.split_at_mut_checked(DOCUMENT).unwrap_or_default();
    let mut new = Contents::new(new);
    let old = files::read_whole(path, old)?.unwrap_or_default();
    etc::hosts(old, config.etc_hosts(), &mut new);
    replace(path, c"/etc/.hosts.pigeon", &new, report)
}

fn name_servers(config: &Config, scratch: &mut [u8], report: &Report) -> Outcome {
    if config.nameservers().is_empty() {
        return Ok(());
    }
    let mut new = Contents::new(scratch);
    etc::resolv(config.nameservers(), &mut new);
    replace(
        c"/etc/resolv.conf",
        c"/etc/.resolv.conf.pigeon",
        &new,
        report,
    )
}

#[inline(never)]
fn replace(path: &CStr, temporary: &CStr, new: &Contents, report: &Report) -> Outcome {
    mounts::make_directories(b"/etc").map_err(why!("create /etc"))?;
    let written = new
        .bytes()
        .ok_or(Errno::FBIG)
        .and_then(|bytes| files::replace(path, temporary, bytes));
    unless_read_only(written, path, report).map_err(why!("write ", path))
}

/// A root or volume that is mounted read-only keeps what it has; that is worth a warning.
fn unless_read_only(result: Result<(), Errno>, path: &CStr, report: &Report) -> Result<(), Errno> {
    match result {
        Err(Errno::ROFS) => {
            report.warn(text!("% is read-only: left as it is", path));
            Ok(())
        }
        other => other,
    }
}
