//! What is prepared for the workload once the API is up: volumes, names, network.
//!
//! What may wait for a device runs in a child.

use crate::boot::root;
use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::List;
use crate::sys::files;
use core::ffi::CStr;
use proto::config::{Config, DOCUMENT};
use proto::etc_files::{self, Contents};
use proto::message::ToLossy;
use proto::users::Identity;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Whether anything of this may wait for a disk.
pub fn may_block(config: &Config) -> bool {
    !config.mounts.is_empty() || !config.etc_hosts.is_empty() || !config.etc_resolv.is_empty()
}

/// Steps 11 and 12, but for the host name.
pub fn disks(
    config: &Config,
    identity: &Identity,
    scratch: &mut [u8],
    report: &HelperLog,
) -> Result {
    volumes(config, identity, report)?;
    hosts(config, scratch, report)?;
    name_servers(config, scratch, report)
}

fn volumes(config: &Config, identity: &Identity, report: &HelperLog) -> Result {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    for mount in &config.mounts {
        let target = mount.mount_path;
        files::make_directories(target.to_bytes())
            .map_err(context!("create {}", target.lossy()))?;
        // Links of the root are followed, as everywhere in it, but not onto what the end needs.
        let place = identify(target);
        for needed in NEEDED {
            if place.is_some() && place == identify(needed) {
                return Err(error!(
                    "mount on {}: would hide {}",
                    target.lossy(),
                    needed.lossy()
                ));
            }
        }
        let device = mount.device_path;
        report.step(&format_args!(
            "mount {} on {}",
            device.lossy(),
            target.lossy()
        ));
        root::mount_volume(device, target, report)?;
        let owned = rustix::fs::chown(target, Some(uid), Some(gid));
        unless_read_only(owned, target, report)
            .map_err(context!("change the owner of {}", target.lossy()))?;
    }
    Ok(())
}

/// What no volume may hide.
const NEEDED: List = List(b"/\0/dev\0/sys\0/proc\0/run\0");

/// What two paths to one directory have in common: its device and its number there.
fn identify(path: &CStr) -> Option<(u64, u64)> {
    let status = rustix::fs::stat(path).ok()?;
    Some((status.st_dev, status.st_ino))
}

/// Sets the host name.
pub fn host_name(config: &Config) -> Result {
    if config.hostname.is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(config.hostname.as_bytes()).map_err(context!("set the host name"))
}

fn hosts(config: &Config, scratch: &mut [u8], report: &HelperLog) -> Result {
    if config.etc_hosts.is_empty() {
        return Ok(());
    }
    let path = c"/etc/hosts";
    let (old, new) = scratch.split_at_mut_checked(DOCUMENT).unwrap_or_default();
    let mut new = Contents::new(new);
    let old = files::read_whole(path, old)?.unwrap_or_default();
    etc_files::hosts(old, &config.etc_hosts, &mut new);
    replace(path, c"/etc/.hosts.pigeon", &new, report)
}

fn name_servers(config: &Config, scratch: &mut [u8], report: &HelperLog) -> Result {
    if config.etc_resolv.is_empty() {
        return Ok(());
    }
    let mut new = Contents::new(scratch);
    etc_files::resolv(&config.etc_resolv, &mut new);
    replace(
        c"/etc/resolv.conf",
        c"/etc/.resolv.conf.pigeon",
        &new,
        report,
    )
}

fn replace(path: &CStr, temporary: &CStr, new: &Contents, report: &HelperLog) -> Result {
    files::make_directories(b"/etc").map_err(context!("create /etc"))?;
    let written = new
        .bytes()
        .ok_or(Errno::FBIG)
        .and_then(|bytes| files::replace(path, temporary, bytes));
    unless_read_only(written, path, report).map_err(context!("write {}", path.lossy()))
}

/// A root or volume that is mounted read-only keeps what it has; that is worth a warning.
fn unless_read_only(
    result: Result<(), Errno>,
    path: &CStr,
    report: &HelperLog,
) -> Result<(), Errno> {
    match result {
        Err(Errno::ROFS) => {
            report.warn(&format_args!(
                "{} is read-only: left as it is",
                path.lossy()
            ));
            Ok(())
        }
        other => other,
    }
}
