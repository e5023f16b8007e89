//! `pigeon mount` and `pigeon unmount`: volumes of a VM that runs.

use std::path::Path;

use anyhow::{Result, ensure};
use clap::Args;
use pigeon::mounts::Mount;

use crate::{cp::Place, target::Target};

#[derive(Args)]
pub struct MountVolume {
    /// The block device in the VM, such as /dev/vdb; tmpfs with -t tmpfs
    device: String,
    /// Where to mount it: NAME:/PATH, or /PATH if only one VM runs; created if absent
    path: String,
    /// The file system [default: found on the device]
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    fs_type: Option<String>,
    /// Mount options as in fstab, such as noatime,size=64m
    #[arg(short, long)]
    options: Option<String>,
    /// Mount it read-only
    #[arg(short, long)]
    read_only: bool,
    #[command(flatten)]
    target: Target,
}

impl MountVolume {
    pub fn run(&self) -> Result<()> {
        let (name, path) = in_guest(&self.path)?;
        let in_memory = self.fs_type.as_deref() == Some("tmpfs");
        let mount = Mount {
            device_path: (!in_memory).then(|| self.device.clone()),
            mount_path: path.into(),
            fs_type: self.fs_type.clone(),
            read_only: self.read_only,
            options: self.options.clone(),
        };
        Ok(self.target.client(name)?.mount(&mount)?)
    }
}

#[derive(Args)]
pub struct UnmountVolume {
    /// The mount point: NAME:/PATH, or /PATH if only one VM runs
    path: String,
    #[command(flatten)]
    target: Target,
}

impl UnmountVolume {
    pub fn run(&self) -> Result<()> {
        let (name, path) = in_guest(&self.path)?;
        Ok(self.target.client(name)?.unmount(path)?)
    }
}

/// An optional VM name, and a path in the VM.
fn in_guest(text: &str) -> Result<(Option<&str>, &str)> {
    let (name, path) = match Place::of(text) {
        Place::There(name, path) => (name, path),
        Place::Here(_) => (None, text),
    };
    ensure!(
        Path::new(path).is_absolute(),
        "{path:?} is not an absolute path in the VM"
    );
    Ok((name, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_the_guest_may_have_the_vms_name_before_it() {
        assert_eq!(in_guest("/data").unwrap(), (None, "/data"));
        assert_eq!(in_guest("web:/data").unwrap(), (Some("web"), "/data"));
        assert_eq!(in_guest(":/a:b").unwrap(), (None, "/a:b"));
        assert_eq!(in_guest("/a:b").unwrap(), (None, "/a:b"));
        assert!(in_guest("web:data").is_err() && in_guest("data").is_err());
    }
}
