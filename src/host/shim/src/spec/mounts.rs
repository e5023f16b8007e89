//! A container's mounts: file systems of the guest, and files and directories of the host, which are copied.

use std::{fs, os::unix::fs::FileTypeExt, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Folder, Plan, config::Mount};

/// Mount points of the init; they replace a container's mounts at the same paths.
const OWN_MOUNTS: [&str; 7] = [
    "/proc",
    "/sys",
    "/dev",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/run",
];
/// Types of kernel file systems, which the init mounts.
const KERNEL_MOUNTS: [&str; 6] = ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Maximum size in bytes of a file or directory of the host that is copied into a VM.
pub const MAX_BIND: u64 = 256 << 20;
/// Mount flags supported by the configuration document. (README, `Mounts[].Options`)
const FLAGS: [&str; 7] = [
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "strictatime",
];

/// The hostname file that a pod's containers share, in place of a shared namespace.
pub fn hostname(mounts: &[Mount]) -> Option<String> {
    let mount = mounts
        .iter()
        .find(|mount| mount.destination == "/etc/hostname")?;
    let text = fs::read_to_string(&mount.source).ok()?;
    let name = text.trim();
    (!name.is_empty()).then(|| name.into())
}

impl Plan {
    /// Adds a mount of the container.
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

    /// Adds an entry to the document's mounts.
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
            // Such as /dev/shm, which is shared in a pod; the VM has its own.
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

/// Total size of the files in a directory in bytes.
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
