//! What is prepared for the workload once the API is up: volumes, names, network.
//!
//! All of it runs in one child, as any of it may wait for a device.

use crate::why;
use crate::task::{Outcome, Report};
use crate::{files, interface, mounts, root};
use pigeon_init::accounts::Identity;
use pigeon_init::config::Config;
use pigeon_init::etc;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Steps 11 to 13.
pub fn run(config: &Config, identity: &Identity, scratch: &mut [u8], report: &Report) -> Outcome {
    volumes(config, identity, report)?;
    host_name(config)?;
    hosts(config, scratch, report)?;
    name_servers(config, report)?;
    interface::configure(config, report)
}

fn volumes(config: &Config, identity: &Identity, report: &Report) -> Outcome {
    for mount in config.mounts() {
        let target = mount.mount_path.c_str();
        mounts::make_directories(target.to_bytes()).map_err(why!("create ", mount.mount_path))?;
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
    let old = files::read(c"/etc/hosts", scratch)?;
    mounts::make_directories(b"/etc").map_err(why!("create /etc"))?;
    let written = files::replace(c"/etc/hosts", c"/etc/.hosts.pigeon", |file| {
        etc::hosts(old, config.etc_hosts(), |piece| file.put(piece))
    });
    unless_read_only(written, report).map_err(why!("write /etc/hosts"))
}

fn name_servers(config: &Config, report: &Report) -> Outcome {
    if config.nameservers().is_empty() {
        return Ok(());
    }
    mounts::make_directories(b"/etc").map_err(why!("create /etc"))?;
    let written = files::replace(c"/etc/resolv.conf", c"/etc/.resolv.conf.pigeon", |file| {
        etc::resolv(config.nameservers(), |piece| file.put(piece))
    });
    unless_read_only(written, report).map_err(why!("write /etc/resolv.conf"))
}

/// A root or volume that is mounted read-only keeps what it has; that is worth a warning.
fn unless_read_only(result: Result<(), Errno>, report: &Report) -> Result<(), Errno> {
    match result {
        Err(Errno::ROFS) => {
            report.warn("the file system is read-only: left as it is");
            Ok(())
        }
        other => other,
    }
}
