//! Mounts a root that is shared by many VMs below a writable layer (overlayfs).

use crate::error::{self, Result};
use crate::process::helper::HelperLog;
use crate::sys::files;
use crate::volumes::file_system::{Access, FileSystem};
use core::ffi::CStr;
use proto::config::Overlay;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Gid, Uid};

/// The shared root.
const LOWER: &CStr = c"/lower";
/// The file system of the writable layer.
const WRITABLE: &CStr = c"/writable";
/// Its directories; on a device they exist from the second boot on.
const UPPER: &CStr = c"/writable/upper";
const WORK: &CStr = c"/writable/work";
const OPTIONS: &CStr = c"lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work";

/// Mounts the root on `target` with a writable layer over it.
pub fn mount(root: FileSystem, layer: Overlay, target: &CStr, log: &HelperLog) -> Result {
    files::require_directory(LOWER, 0o700)?;
    files::require_directory(WRITABLE, 0o700)?;
    FileSystem {
        access: Access::Shared,
        ..root
    }
    .mount(LOWER, log)?;
    match layer {
        Overlay::Tmpfs(options) => FileSystem::tmpfs(options),
        Overlay::Device(device) => FileSystem::on(device),
    }
    .mount(WRITABLE, log)?;
    create_upper()?;
    files::require_directory(WORK, 0o755)?;
    rustix::mount::mount(
        c"overlay",
        target,
        c"overlay",
        MountFlags::RELATIME,
        OPTIONS,
    )
    .map_err(error::on("mount an overlay on", target))?;
    // The overlay holds its own private mounts of the layers (ovl_get_layers, fs/overlayfs/super.c).
    for directory in [LOWER, WRITABLE] {
        rustix::mount::unmount(directory, UnmountFlags::empty())
            .map_err(error::on("unmount", directory))?;
    }
    Ok(())
}

/// Creates the upper directory, whose owner and mode are those of `/`, with the shared root's. That of an
/// earlier boot keeps its own.
fn create_upper() -> Result {
    let root = rustix::fs::stat(LOWER).map_err(error::on("stat", LOWER))?;
    let mode = Mode::from_raw_mode(root.st_mode);
    match rustix::fs::mkdir(UPPER, mode) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        failed => return failed.map_err(error::on("create", UPPER)),
    }
    let (owner, group) = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
    rustix::fs::chown(UPPER, Some(owner), Some(group))
        // Afterwards, as chown removes set-id bits, and mkdir applies the umask.
        .and_then(|()| rustix::fs::chmod(UPPER, mode))
        .map_err(error::on("set the owner and mode of", UPPER))
}
