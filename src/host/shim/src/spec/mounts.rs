//! A container's mounts: file systems of the guest's, and files and folders of the host, which are
//! copied.

use std::{fs, os::unix::fs::FileTypeExt, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Folder, Plan, config::Mount};

/// Where the init mounts what it needs itself; a container's mount there is that.
const OWN_MOUNTS: [&str; 7] = [
    "/proc",
    "/sys",
    "/dev",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/run",
];
/// Kinds of file systems of the kernel's, which the init mounts.
const KERNEL_MOUNTS: [&str; 6] = ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Most bytes of a file or a folder of the host that is copied into a VM.
pub const MAX_BIND: u64 = 256 << 20;
/// Flags of a mount that the configuration document knows. (README, `Mounts[].Options`)
const FLAGS: [&str; 7] = [
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "strictatime",
];

/// The name that a pod's containers share by a file, as they would share a namespace.
pub fn hostname(mounts: &[Mount]) -> Option<String> {
    let mount = mounts
        .iter()
        .find(|mount| mount.destination == "/etc/hostname")?;
    let text = fs::read_to_string(&mount.source).ok()?;
    let name = text.trim();
    (!name.is_empty()).then(|| name.into())
}

impl Plan {
    /// Adds a mount of the container's.
    pub(super) fn add(&mut self, mount: &Mount) -> Result<()> {
        ensure!(
            mount.uid_mappings.is_empty(),
            "uidMappings: a VM's users are not those of the host"
        );
        let target = mount.destination.trim_end_matches('/');
        let own = OWN_MOUNTS.contains(&target);
        let is_bind = mount.kind == "bind"
            || mount
                .options
                .iter()
                .any(|option| option == "bind" || option == "rbind");
        if is_bind {
            return self.bind(mount, target);
        }
        match mount.kind.as_str() {
            kind if KERNEL_MOUNTS.contains(&kind) => Ok(()),
            "tmpfs" if own => Ok(()),
            "tmpfs" => {
                let wanted =
                    |option: &&String| FLAGS.contains(&option.as_str()) || option.contains('=');
                let options: Vec<_> = mount.options.iter().filter(wanted).cloned().collect();
                let mut entry = json!({"FSType": "tmpfs", "MountPath": target});
                if !options.is_empty() {
                    entry["Options"] = json!(options.join(","));
                }
                self.mount(entry);
                Ok(())
            }
            kind => bail!("a mount of type {kind} cannot be had in a VM"),
        }
    }

    /// Adds to the document's mounts.
    pub fn mount(&mut self, entry: Value) {
        match self.document["Mounts"].as_array_mut() {
            Some(mounts) => mounts.push(entry),
            None => self.document["Mounts"] = json!([entry]),
        }
    }

    fn bind(&mut self, mount: &Mount, target: &str) -> Result<()> {
        let source = Path::new(&mount.source);
        let found = fs::metadata(source).with_context(|| format!("unable to find {source:?}"))?;
        let read_only = mount.options.iter().any(|option| option == "ro");
        if found.is_dir() {
            // /dev/shm and the like of a pod, shared between containers; this one has its own.
            if OWN_MOUNTS.contains(&target) {
                self.warnings
                    .push(format!("{target} is the VM's own, not {}", mount.source));
                return Ok(());
            }
            let size = size_of(source)?;
            ensure!(size <= MAX_BIND, too_large(source, size));
            if !read_only {
                self.warnings.push(format!(
                    "{target} is a copy of {}: what is written there stays in the VM",
                    mount.source
                ));
            }
            self.folders.push(Folder {
                source: source.into(),
                target: target.into(),
                read_only,
            });
            return Ok(());
        }
        let kind = found.file_type();
        ensure!(
            kind.is_file(),
            "{source:?} is a {}: it cannot be copied into a VM",
            match kind {
                kind if kind.is_socket() => "socket",
                kind if kind.is_fifo() => "FIFO",
                _ => "device",
            }
        );
        ensure!(found.len() <= MAX_BIND, too_large(source, found.len()));
        self.files.push((source.into(), target.into()));
        Ok(())
    }
}

fn too_large(source: &Path, size: u64) -> String {
    format!(
        "{source:?} has {} MiB, and is copied into the VM: at most {} MiB can be",
        size >> 20,
        MAX_BIND >> 20
    )
}

/// Bytes of the files in a folder.
fn size_of(dir: &Path) -> Result<u64> {
    let mut size = 0;
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("unable to read {dir:?}"))?;
        for entry in entries {
            let entry = entry?;
            let found = entry.path().symlink_metadata()?;
            match found.is_dir() {
                true => dirs.push(entry.path()),
                false => size += found.len(),
            }
            if size > MAX_BIND {
                return Ok(size);
            }
        }
    }
    Ok(size)
}
