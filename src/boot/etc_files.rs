//! The host name, /etc/hosts and /etc/resolv.conf.

use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::files;
use core::ffi::CStr;
use proto::config::{Config, MAX_DOCUMENT_SIZE};
use proto::etc_files::{self, Contents};
use proto::message::ToLossy;
use rustix::fs::{AtFlags, CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// A file that is replaced.
struct File {
    path: &'static CStr,
    /// In the same directory, for the rename.
    temporary: &'static CStr,
    /// Mounted over it if the root cannot be written.
    substitute: &'static CStr,
}

const HOSTS: File = File {
    path: c"/etc/hosts",
    temporary: c"/etc/.hosts.pigeon",
    substitute: c"/run/pigeon/hosts",
};

const RESOLV_CONF: File = File {
    path: c"/etc/resolv.conf",
    temporary: c"/etc/.resolv.conf.pigeon",
    substitute: c"/run/pigeon/resolv.conf",
};

/// Sets the host name.
pub fn set_host_name(config: &Config) -> Result {
    if config.hostname.is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(config.hostname.as_bytes()).map_err(context!("set the host name"))
}

/// Whether any file has something configured.
pub fn are_configured(config: &Config) -> bool {
    !config.etc_hosts.is_empty() || !config.etc_resolv.is_empty()
}

/// Writes the files that have something configured.
pub fn write(config: &Config, scratch: &mut [u8], log: &HelperLog) -> Result {
    if !config.etc_hosts.is_empty() {
        write_hosts(config, scratch, log)?;
    }
    if !config.etc_resolv.is_empty() {
        let (old, new) = scratch
            .split_at_mut_checked(MAX_DOCUMENT_SIZE)
            .unwrap_or_default();
        let mut new = Contents::new(new);
        etc_files::resolv(&config.etc_resolv, &mut new);
        // A file that cannot be read is replaced.
        let old = files::read_whole(RESOLV_CONF.path, old);
        RESOLV_CONF.replace(old.ok().flatten().unwrap_or_default(), &new, log)?;
    }
    Ok(())
}

/// Writes /etc/hosts, also without entries, which removes those of another configuration.
pub fn write_hosts(config: &Config, scratch: &mut [u8], log: &HelperLog) -> Result {
    let (old, new) = scratch
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or_default();
    let mut new = Contents::new(new);
    let old = files::read_whole(HOSTS.path, old)?.unwrap_or_default();
    etc_files::hosts(old, &config.etc_hosts, &mut new);
    HOSTS.replace(old, &new, log)
}

impl File {
    /// Replaces the file if its contents differ: a second boot writes nothing.
    fn replace(&self, old: &[u8], new: &Contents, log: &HelperLog) -> Result {
        let path = self.path.lossy();
        let new = new
            .bytes()
            .ok_or_else(|| error!("write {path}: too long"))?;
        if old == new {
            return Ok(());
        }
        let written = files::make_directory(c"/etc", 0o755)
            .and_then(|()| files::replace(self.path, self.temporary, new));
        match written {
            // A root that is read-only, full, or shut down by the kernel after errors (EIO since 6.12); a
            // file that is immutable (chattr(1)) or a mount point (EBUSY).
            Err(
                Errno::ROFS | Errno::IO | Errno::NOSPC | Errno::DQUOT | Errno::PERM | Errno::BUSY,
            ) => {
                if let Err(errno) = self.cover(new) {
                    log.warn(&context!("{path} cannot be written; mount over it")(errno));
                }
                Ok(())
            }
            other => other.map_err(context!("write {path}")),
        }
    }

    /// Mounts a file in memory over it. If it is a link, over the link itself.
    fn cover(&self, contents: &[u8]) -> Result<(), Errno> {
        files::make_directory(c"/run/pigeon", 0o755)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
        let substitute = files::open(self.substitute, flags)?;
        files::write_whole(&substitute, contents)?;
        if self.is_covered() {
            return Ok(());
        }
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, self.substitute, clone)?;
        let target = files::open(self.path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let both_by_descriptor =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, c"", &target, c"", both_by_descriptor)
    }

    /// Whether the substitute is mounted over it already.
    fn is_covered(&self) -> bool {
        let identify = |path| files::identify(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
        identify(self.path).is_ok_and(|file| identify(self.substitute) == Ok(file))
    }
}
